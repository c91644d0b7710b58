"""Steps per second, and time to solve CartPole-v1, of our scripts and of Stable-Baselines3, side by side.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py                 # every row, 5 runs or 10 seeds each: about half an hour on 2 cores
    python benchmark/speed.py --repeats 1 --seeds 0     # a first look

The two take turns, each in a process and with one thread of its own, so that whatever else the machine is doing hits
both alike. Printed are the medians and their ratio. Steps per second leave out the first iterations, with their imports
and warm-up; the time to solve is all of it, from the start of the process to a mean return of 475 over 100 episodes.
Stable-Baselines3 has no A3C: there, two workers are compared with one.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
CHEETAH = "ppo.py --env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10"
CHEETAH += " --learning-rate 3e-4 --gamma 0.99 --gae-lambda 0.95"
PONG = "ppo.py --env-id ALE/Pong-v5 --num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4 --clip-reward 1"
CARTPOLE = "ppo.py --num-steps 128 --num-minibatches 4 --update-epochs 4"
SB3_CARTPOLE = ("PPO", "CartPole-v1", 4, 20_480, {"n_steps": 128, "batch_size": 128, "n_epochs": 4})

# name, our command, and the other one: a command of ours, too, or SB3's algorithm, environment, number of environments,
# total steps and settings
SPEED_ROWS = (
    ("PPO CartPole-v1, 4 x 128", f"{CARTPOLE} --num-envs 4 --total-timesteps 40960", SB3_CARTPOLE),
    ("PPO CartPole-v1, 64 x 128; SB3 4 x 128", f"{CARTPOLE} --num-envs 64 --total-timesteps 409600", SB3_CARTPOLE),
    ("PPO HalfCheetah-v5, paper's settings", f"{CHEETAH} --total-timesteps 12288",
     ("PPO", "HalfCheetah-v5", 1, 8192, {"n_steps": 2048, "batch_size": 64, "n_epochs": 10})),
    ("PPO Pong-v5, 8 x 128", f"{PONG} --total-timesteps 6144",
     ("PPO", "ALE/Pong-v5", 8, 4096, {"n_steps": 128, "batch_size": 256, "n_epochs": 4})),
    ("A2C CartPole-v1, 16 x 5", "a2c.py --num-envs 16 --num-steps 5 --total-timesteps 160000",
     ("A2C", "CartPole-v1", 16, 80_000, {"n_steps": 5})),
    ("A3C CartPole-v1, 2 workers; 1 worker", "a3c.py --num-workers 2 --total-timesteps 120000",
     "a3c.py --num-workers 1 --total-timesteps 60000"),
    ("A2C HalfCheetah-v5, torchrun 2 x 16 envs; 1 x 16",
     "2 a2c.py --env-id HalfCheetah-v5 --num-envs 16 --num-steps 128 --total-timesteps 163840",
     "a2c.py --env-id HalfCheetah-v5 --num-envs 16 --num-steps 128 --total-timesteps 81920"),
)  # fmt: skip

# The settings of the RL zoo for CartPole-v1.
SOLVE_ROWS = (
    ("PPO CartPole-v1", "ppo.py", ("PPO", "CartPole-v1", 8, 100_000, {
        "n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0,
        "learning_rate": 1e-3, "clip_range": 0.2})),
    ("A2C CartPole-v1", "a2c.py", ("A2C", "CartPole-v1", 8, 500_000, {"ent_coef": 0.0})),
    ("A3C CartPole-v1, 2 workers; 1 worker", "a3c.py --num-workers 2", "a3c.py --num-workers 1"),
)  # fmt: skip

# With a seed it learns until CartPole-v1 is solved; without one it prints the steps per second.
SB3 = """
import json, sys, time, stable_baselines3, torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack
torch.set_num_threads(1)
algorithm, env_id, num_envs, total, settings, seed = json.loads(sys.argv[1])
for name in ("learning_rate", "clip_range"):
    if name in settings:
        settings[name] = lambda left, start=settings[name]: start * left
class StopWhenSolved(BaseCallback):
    def _on_step(self):
        episodes = self.model.ep_info_buffer
        return len(episodes) < 100 or sum(episode["r"] for episode in episodes) < 475 * len(episodes)
if env_id.startswith("ALE/"):
    import ale_py
    policy, envs = "CnnPolicy", VecFrameStack(make_atari_env(env_id, num_envs, env_kwargs={"frameskip": 1}), 4)
else:
    policy, envs = "MlpPolicy", make_vec_env(env_id, num_envs, seed=1000 * (seed or 1))
model = getattr(stable_baselines3, algorithm)(policy, envs, seed=seed, device="cpu", **settings)
if seed is None:
    model.learn(num_envs * model.n_steps)
    start = time.perf_counter()
    model.learn(total)
    print(total / (time.perf_counter() - start))
else:
    callback = StopWhenSolved()
    model.learn(total, callback=callback)
    print(model.num_timesteps if not callback.on_step() else "unsolved")
"""


def run(*command):
    """Run Python with `command`, and return what it printed and the seconds that it took."""
    start, one_thread = time.perf_counter(), os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=one_thread)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip(), time.perf_counter() - start


def run_ours(command):
    """Run one of our scripts, and return the rows of its metrics.csv and the seconds that the process took.

    A number before the name of the script is that of the processes that torchrun starts.
    """
    words = command.split()
    torchrun = []
    if words[0].isdigit():
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", words.pop(0)]
    with tempfile.TemporaryDirectory() as run_dir:
        _, seconds = run(*torchrun, ROOT / words[0], *words[1:], "--run-dir", run_dir)
        with open(Path(run_dir, "metrics.csv")) as file:
            return list(csv.DictReader(file)), seconds


def steps_per_second(command):
    rows, _ = run_ours(command)
    first, last = rows[len(rows) // 10], rows[-1]
    steps = int(last["global_step"]) - int(first["global_step"])
    return steps / (float(last["wall_time"]) - float(first["wall_time"]))


def seconds_to_solve(command):
    """Seconds from the start of the process until the mean return of the last 100 episodes was 475, or infinity.

    What the process takes beyond its log, to import and to end, counts in full.
    """
    rows, process_seconds = run_ours(command)
    returns = []
    for row, previous in zip(rows, [{"episodes": 0}, *rows]):
        new_episodes = int(row["episodes"]) - int(previous["episodes"])
        returns += [float(row["episodic_return"])] * new_episodes if new_episodes else []
        if len(returns) >= 100 and sum(returns[-100:]) >= 475 * 100:
            return process_seconds - float(rows[-1]["wall_time"]) + float(row["wall_time"])
    return float("inf")


@dataclass
class Args:
    repeats: int = 5  # runs of each side in the rows of steps per second; 0 leaves these rows out
    seeds: int = 10  # runs of each side in the rows of the time to solve; 0 leaves these rows out
    only: str = ""  # only the rows whose names begin so


def main(args):
    print(f"{'':55}{'ours':>10}{'other':>10}{'ratio':>8}")
    for name, ours, other in SPEED_ROWS if args.repeats else ():
        if name.startswith(args.only):
            speeds, other_speeds = [], []
            for _ in range(args.repeats):
                speeds.append(steps_per_second(ours))
                is_ours = isinstance(other, str)
                other_speeds.append(
                    steps_per_second(other) if is_ours else float(run("-c", SB3, json.dumps((*other, None)))[0])
                )
            speed, other_speed = statistics.median(speeds), statistics.median(other_speeds)
            print(f"{name + ', steps/s':55}{speed:10.0f}{other_speed:10.0f}{speed / other_speed:8.2f}", flush=True)
    for name, ours, other in SOLVE_ROWS if args.seeds else ():
        if name.startswith(args.only):
            times, other_times, unsolved = [], [], 0
            for seed in range(1, args.seeds + 1):
                times.append(seconds_to_solve(f"{ours} --seed {seed}"))
                if isinstance(other, str):
                    other_times.append(seconds_to_solve(f"{other} --seed {seed}"))
                else:
                    printed, seconds = run("-c", SB3, json.dumps((*other, seed)))
                    unsolved += printed == "unsolved"
                    other_times.append(seconds)
            seconds, other_seconds = statistics.median(times), statistics.median(other_times)
            print(f"{name + ', seconds to solve':55}{seconds:10.1f}{other_seconds:10.1f}", end="")
            print(f"{other_seconds / seconds:8.2f}", f"({unsolved} of SB3 unsolved)" if unsolved else "", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
