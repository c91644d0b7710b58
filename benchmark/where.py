"""Where the time of ppo.py goes, beside what the environment and the network's arithmetic alone need.

    python benchmark/where.py                # CartPole-v1 and HalfCheetah-v5: a minute

A phase's time is measured within the run, by clocks around the calls. The limit of the environment is its own step with
nothing around it, from the same seed with the same actions. That of the policy and of the update are the matrix
products of the networks alone, with as many rows: for an action one a layer; in an update three (forward, backward to
the weights and to the inputs, which the first layer lacks), and the forward products for values and log-probabilities.
What is printed is microseconds for each step of an environment.
"""

import csv
import math
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


def timed(function, clock, name, arguments):
    def call(*args, **kwargs):
        arguments.append(args)
        start = time.perf_counter()
        result = function(*args, **kwargs)
        clock[name] = clock.get(name, 0.0) + time.perf_counter() - start
        return result

    return call


def measure(flags, originals):
    """Seconds of a run by phase, of which the update is what the others leave; the seed and actions of its steps."""
    clock, resets, steps, (make_envs, sample, compute_gae) = {}, [], [], originals

    def make_timed_envs(args):
        envs = make_envs(args)
        reset = envs.reset
        envs.reset = lambda seed: (resets.append(seed), reset(seed=seed))[1]
        envs.step = timed(envs.step, clock, "environment", steps)
        return envs

    ppo.make_envs = make_timed_envs
    ppo.NumpyPolicy.sample = timed(sample, clock, "policy", [])
    ppo.compute_gae = timed(compute_gae, clock, "GAE", [])
    with tempfile.TemporaryDirectory() as folder:
        ppo.train(ppo.Args(**flags, run_dir=f"{folder}/run"))
        with open(f"{folder}/run/metrics.csv") as file:
            seconds = float(list(csv.DictReader(file))[-1]["wall_time"])
    ppo.make_envs, ppo.NumpyPolicy.sample, ppo.compute_gae = originals
    return clock | {"update and the rest": seconds - sum(clock.values())}, resets[0], [action for (action,) in steps]


def seconds_of_products(num_rows, sizes, multiply, ones, skip_first=0):
    """Seconds of the products of a network's layers with so many rows, once."""
    layers = [(ones((num_rows, i)), ones((i, o))) for i, o in zip(sizes, sizes[1:])][skip_first:]
    repeats, start = 2000, time.perf_counter()
    for _ in range(repeats):
        for inputs, weights in layers:
            multiply(inputs, weights)
    return (time.perf_counter() - start) / repeats


def limits(flags, seed, actions):
    """Seconds that the environment alone and the matrix products alone need for as many steps."""
    args = ppo.Args(**flags)
    N, num_iterations = args.num_envs, args.total_timesteps // (args.num_envs * args.num_steps)
    num_rows = N * args.num_steps // args.num_minibatches
    envs = gym.make_vec(args.env_id, N)
    envs.reset(seed=seed)
    start = time.perf_counter()
    for action in actions:
        envs.step(action)
    seconds = {"environment": time.perf_counter() - start}
    num_inputs, action_space = math.prod(envs.single_observation_space.shape), envs.single_action_space
    num_outputs = int(action_space.n) if hasattr(action_space, "n") else action_space.shape[0]
    envs.close()
    actor, critic = (num_inputs, 64, 64, num_outputs), (num_inputs, 64, 64, 1)
    per_action = seconds_of_products(N, actor, np.matmul, lambda shape: np.ones(shape, np.float32))
    products = {"forward": 0.0, "update": 0.0}
    for sizes in actor, critic:
        forward = seconds_of_products(num_rows, sizes, torch.matmul, torch.ones)
        products["forward"] += forward
        products["update"] += 2 * forward + seconds_of_products(num_rows, sizes, torch.matmul, torch.ones, skip_first=1)
    per_iteration = args.num_minibatches * (args.update_epochs * products["update"] + products["forward"])
    return seconds | {"policy": len(actions) * per_action, "update and the rest": num_iterations * per_iteration}


def main(options):
    torch.set_num_threads(1)
    originals = ppo.make_envs, ppo.NumpyPolicy.sample, ppo.compute_gae
    for name, flags in RUNS.items():
        clocks, seeds, actions = zip(*(measure(flags, originals) for _ in range(options.repeats)))
        alone, total_steps = limits(flags, seeds[0], actions[0]), flags["total_timesteps"]
        medians = {phase: np.median([clock[phase] for clock in clocks]) for phase in clocks[0]}
        print(f"{name}\n{'':24}{'us a step':>10}{'share':>8}{'limit':>8}")
        for phase, seconds in medians.items():
            limit = f"{1e6 * alone[phase] / total_steps:8.1f}" if phase in alone else ""
            print(f"{phase:24}{1e6 * seconds / total_steps:10.1f}{seconds / sum(medians.values()):8.0%}{limit}")


if __name__ == "__main__":
    main(tyro.cli(Args))
