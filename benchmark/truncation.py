"""What it is worth to bootstrap through a time limit: a pendulum learns in short episodes, and is judged in long ones.

    python benchmark/truncation.py          # 5 seeds each way, 10 minutes; prints the returns

Pendulum-v1 never terminates. It is trained with a time limit of 20 steps, after which the value of the last observation
bootstraps the return, as in ppo.py, or does not, as if the limit were the end of the task. Then each agent is judged by
50 episodes of the 200 steps that Pendulum-v1 has.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402

FLAGS = {"num_envs": 16, "num_steps": 64, "num_minibatches": 8, "update_epochs": 10, "learning_rate": 2e-3}
FLAGS |= {"gae_lambda": 0.95, "normalize_reward": True}


@dataclass
class Args:
    seeds: int = 5  # seeds of each way
    total_timesteps: int = 150_000  # steps of training
    max_episode_steps: int = 20  # time limit in training
    gamma: float = 0.95  # discount factor


def compute_gae_without_bootstrap(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    return compute_gae(rewards, values, next_values, dones, dones, gamma, gae_lambda)


def long_return(seed, options):
    """Train on the short task, and return the mean return on the long one."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        args = ppo.Args("ShortPendulum-v0", seed, options.total_timesteps, gamma=options.gamma, **FLAGS)
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            agent = ppo.train(replace(args, run_dir=f"{folder}/run"))
            ppo.evaluate(agent, replace(args, env_id="Pendulum-v1", eval_episodes=50), Path(folder))
        return json.loads(Path(folder, "eval.json").read_text())["mean"]


if __name__ == "__main__":
    options, compute_gae = tyro.cli(Args), ppo.compute_gae
    entry_point = gym.spec("Pendulum-v1").entry_point
    gym.register("ShortPendulum-v0", entry_point, max_episode_steps=options.max_episode_steps)
    for name, function in ("bootstrapped", compute_gae), ("not bootstrapped", compute_gae_without_bootstrap):
        ppo.compute_gae = function
        returns = [long_return(seed, options) for seed in range(1, options.seeds + 1)]
        std = statistics.stdev(returns) if len(returns) > 1 else 0.0
        print(f"{name:17}{statistics.mean(returns):8.0f} ± {std:.0f}  {[round(r) for r in returns]}", flush=True)
