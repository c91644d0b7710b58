"""Steps per second, and time to solve CartPole-v1, of our scripts and of Stable-Baselines3, side by side.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py                 # every row, each 5 times: about 10 minutes on 2 cores
    python benchmark/speed.py --repeats 1     # a first look

The two take turns, each in a process and with one thread of its own, so that whatever else the machine is doing hits
both alike. Printed are the medians and their ratio. Steps per second leave out the first iteration, with its imports
and warm-up; the time to solve is all of it, from the start of the process to a mean return of 475 over 100 episodes.
"""

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
CHEETAH = "--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --num-minibatches 32 --update-epochs 10"
CHEETAH += " --learning-rate 3e-4 --gamma 0.99 --gae-lambda 0.95"
CARTPOLE = "--env-id CartPole-v1 --num-steps 128 --num-minibatches 4 --update-epochs 4"

# name, arguments of ppo.py, arguments of SB3_SPEED: environment, environments, steps, minibatch, epochs, total steps
SPEED_ROWS = (
    ("PPO CartPole-v1, 4 x 128", f"{CARTPOLE} --num-envs 4 --total-timesteps 40960", "CartPole-v1 4 128 128 4 20480"),
    ("PPO CartPole-v1, 64 x 128; SB3 4 x 128", f"{CARTPOLE} --num-envs 64 --total-timesteps 409600",
     "CartPole-v1 4 128 128 4 20480"),
    ("PPO HalfCheetah-v5, paper's settings", f"{CHEETAH} --total-timesteps 12288", "HalfCheetah-v5 1 2048 64 10 8192"),
)  # fmt: skip

SB3_SPEED = """
import sys, time, torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
torch.set_num_threads(1)
env_id, (num_envs, num_steps, minibatch_size, epochs, total) = sys.argv[1], map(int, sys.argv[2:])
envs = make_vec_env(env_id, num_envs, seed=1)
model = PPO("MlpPolicy", envs, n_steps=num_steps, batch_size=minibatch_size, n_epochs=epochs, device="cpu")
model.learn(num_envs * num_steps)
start = time.perf_counter()
model.learn(total)
print(total / (time.perf_counter() - start))
"""

# The settings of the RL zoo for PPO on CartPole-v1.
SB3_SOLVE = """
import sys, torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
torch.set_num_threads(1)
class StopWhenSolved(BaseCallback):
    def _on_step(self):
        episodes = self.model.ep_info_buffer
        return len(episodes) < 100 or sum(episode["r"] for episode in episodes) < 475 * len(episodes)
seed = int(sys.argv[1])
model = PPO(
    "MlpPolicy", make_vec_env("CartPole-v1", 8, seed=1000 * seed), seed=seed, n_steps=32, batch_size=256, n_epochs=20,
    gamma=0.98, gae_lambda=0.8, ent_coef=0.0, device="cpu",
    learning_rate=lambda left: 1e-3 * left, clip_range=lambda left: 0.2 * left,
)
callback = StopWhenSolved()
model.learn(100_000, callback=callback)
print(model.num_timesteps if not callback.on_step() else "unsolved")
"""


def run(*command):
    """Run Python with `command`, and return what it printed and the seconds that it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout.strip(), time.perf_counter() - start


def run_ours(script, flags):
    """Run one of our scripts, and return the rows of its metrics.csv and the seconds that the process took."""
    with tempfile.TemporaryDirectory() as run_dir:
        _, seconds = run(ROOT / script, *flags.split(), "--run-dir", run_dir)
        with open(Path(run_dir, "metrics.csv")) as file:
            return list(csv.DictReader(file)), seconds


def steps_per_second(rows):
    first, last = rows[0], rows[-1]
    steps = int(last["global_step"]) - int(first["global_step"])
    return steps / (float(last["wall_time"]) - float(first["wall_time"]))


def seconds_to_solve(rows, process_seconds):
    """Seconds from the start of the process until the mean return of the last 100 episodes was 475, or None.

    What the process takes beyond its log, to import and to end, counts in full.
    """
    returns = []
    for row, previous in zip(rows, [{"episodes": 0}, *rows]):
        new_episodes = int(row["episodes"]) - int(previous["episodes"])
        returns += [float(row["episodic_return"])] * new_episodes if new_episodes else []
        if len(returns) >= 100 and sum(returns[-100:]) >= 475 * 100:
            return process_seconds - float(rows[-1]["wall_time"]) + float(row["wall_time"])


@dataclass
class Args:
    repeats: int = 5  # runs of each side in the rows of steps per second
    seeds: int = 10  # runs of each side in the row of the time to solve; 0 leaves the row out


def main(args):
    print(f"{'':45}{'ours':>12}{'SB3':>12}{'ratio':>8}")
    for name, our_flags, sb3_flags in SPEED_ROWS if args.repeats else ():
        ours, sb3 = [], []
        for _ in range(args.repeats):
            ours.append(steps_per_second(run_ours("ppo.py", our_flags)[0]))
            sb3.append(float(run("-c", SB3_SPEED, *sb3_flags.split())[0]))
        ours, sb3 = statistics.median(ours), statistics.median(sb3)
        print(f"{name + ', steps/s':45}{ours:12.0f}{sb3:12.0f}{ours / sb3:8.2f}", flush=True)
    ours, sb3, unsolved = [], [], 0
    for seed in range(1, args.seeds + 1):
        seconds = seconds_to_solve(*run_ours("ppo.py", f"--seed {seed}"))
        printed, sb3_seconds = run("-c", SB3_SOLVE, str(seed))
        unsolved += printed == "unsolved"
        ours.append(seconds or float("inf"))
        sb3.append(sb3_seconds)
    if args.seeds:
        ours, sb3 = statistics.median(ours), statistics.median(sb3)
        print(f"{'PPO CartPole-v1, seconds to solve':45}{ours:12.1f}{sb3:12.1f}{sb3 / ours:8.2f}", end="")
        print(f"  ({unsolved} of SB3's runs reached 100k steps unsolved)" if unsolved else "")


if __name__ == "__main__":
    main(tyro.cli(Args))
