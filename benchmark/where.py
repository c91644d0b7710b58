"""Where the time of ppo.py goes, beside what the environment and the network's arithmetic alone need.

    python benchmark/where.py                # CartPole-v1 and HalfCheetah-v5: a minute

A phase's time is measured within the run, by clocks around the calls. The limit of the environment is its own step with
the same actions and nothing around it; that of the policy and of the update are the matrix products of the two networks
alone, with as many rows: one forward product for each layer, and three (forward, and backward to the inputs and to the
weights) for each layer in an update. What is printed is microseconds for each step of an environment.
"""

import csv
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402

RUNS = {
    "CartPole-v1, 4 x 128, 4 passes of 4 minibatches": {
        "num_envs": 4, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "total_timesteps": 40_960,
    },
    "CartPole-v1, the default: 64 x 32, 4 passes of 4 minibatches": {"total_timesteps": 204_800},
    "HalfCheetah-v5, 8 x 128, 10 passes of 8 minibatches": {
        "env_id": "HalfCheetah-v5", "num_envs": 8, "num_steps": 128, "num_minibatches": 8, "update_epochs": 10,
        "total_timesteps": 40_960,
    },
}  # fmt: skip


@dataclass
class Args:
    repeats: int = 3  # runs of each row, of which the median counts


def timed(function, clock, name):
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - start
        return result

    return call


def measure(flags, monkeypatched):
    """Seconds of a run by phase; the update is what the others leave."""
    clock, make_envs, sample, compute_gae = {}, *monkeypatched

    def make_timed_envs(args):
        envs = make_envs(args)
        envs.step = timed(envs.step, clock, "environment")
        return envs

    ppo.make_envs = make_timed_envs
    ppo.NumpyPolicy.sample = timed(sample, clock, "policy")
    ppo.compute_gae = timed(compute_gae, clock, "GAE")
    with tempfile.TemporaryDirectory() as folder:
        ppo.train(ppo.Args(**flags, run_dir=f"{folder}/run"))
        with open(f"{folder}/run/metrics.csv") as file:
            seconds = float(list(csv.DictReader(file))[-1]["wall_time"])
    return clock | {"update and the rest": seconds - sum(clock.values())}


def limits(flags):
    """Seconds that the environment alone and the matrix products alone need for as many steps."""
    args = ppo.Args(**flags)
    N, num_rows = args.num_envs, args.num_envs * args.num_steps // args.num_minibatches
    num_steps = args.total_timesteps // N
    mode = "sync" if N == 1 else None
    envs = gym.make_vec(args.env_id, N, mode)
    envs.reset(seed=0)
    actions = [envs.action_space.sample() for _ in range(num_steps)]
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    seconds = {"environment": time.perf_counter() - start}
    num_inputs, action_space = int(np.prod(envs.single_observation_space.shape)), envs.single_action_space
    num_outputs = int(action_space.n) if hasattr(action_space, "n") else action_space.shape[0]
    envs.close()

    def products(rows, sizes, multiply, zeros):
        layers = [(zeros((rows, i)), zeros((i, o))) for i, o in zip(sizes, sizes[1:])]
        repeats = 2000
        start = time.perf_counter()
        for _ in range(repeats):
            for inputs, weights in layers:
                multiply(inputs, weights)
        return (time.perf_counter() - start) / repeats

    actor, critic = (num_inputs, 64, 64, num_outputs), (num_inputs, 64, 64, 1)
    seconds["policy"] = num_steps * products(N, actor, np.matmul, lambda shape: np.ones(shape, np.float32))
    num_updates = args.total_timesteps // (N * args.num_steps) * args.update_epochs * args.num_minibatches
    passes = sum(products(num_rows, sizes, torch.matmul, torch.ones) for sizes in (actor, critic))
    return seconds | {"update and the rest": 3 * num_updates * passes}


def main(options):
    torch.set_num_threads(1)
    originals = ppo.make_envs, ppo.NumpyPolicy.sample, ppo.compute_gae
    for name, flags in RUNS.items():
        runs = [measure(flags, originals) for _ in range(options.repeats)]
        ppo.make_envs, ppo.NumpyPolicy.sample, ppo.compute_gae = originals
        alone, total_steps = limits(flags), flags["total_timesteps"]
        print(f"{name}\n{'':24}{'us a step':>10}{'share':>8}{'limit':>8}")
        medians = {phase: np.median([run[phase] for run in runs]) for phase in runs[0]}
        for phase, seconds in medians.items():
            limit = f"{1e6 * alone[phase] / total_steps:8.1f}" if phase in alone else ""
            print(f"{phase:24}{1e6 * seconds / total_steps:10.1f}{seconds / sum(medians.values()):8.0%}{limit}")


if __name__ == "__main__":
    main(tyro.cli(Args))
