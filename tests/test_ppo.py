import ast
import csv
import dataclasses
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import ppo

SCRIPT = Path(ppo.__file__)
SMALL = {"num_envs": 2, "num_steps": 8, "total_timesteps": 32, "num_minibatches": 2, "update_epochs": 2}
TIME_COLUMNS = ("wall_time", "sps")


# Environments whose right answers are known.


class Clock(gym.Env):
    """Counts to `length` and ends; shows the count modulo 4 as a one-hot vector and pays `reward`.

    `reward` may be a function of (episode, count); `edit_obs`, a function of the count, is added to the observation.
    """

    def __init__(
        self,
        length=math.inf,
        ends_by="truncation",
        reward=1.0,
        edit_obs=lambda count: 0.0,
        action_space=None,
        on_action=lambda action: None,
        on_reset=lambda seed: None,
    ):
        self.length, self.ends_by, self.edit_obs = length, ends_by, edit_obs
        self.reward = reward if callable(reward) else lambda episode, count: reward
        self.observation_space = Box(-1, 1, (4,), np.float32)
        self.action_space = action_space or Discrete(2)
        self.on_action, self.on_reset = on_action, on_reset
        self.episode = 0

    def observe(self):
        return (np.eye(4)[self.count % 4] + self.edit_obs(self.count)).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.on_reset(seed)
        self.episode, self.count = self.episode + 1, 0
        return self.observe(), {}

    def step(self, action):
        self.on_action(action)
        self.count += 1
        is_over = self.count >= self.length
        terminated, truncated = is_over and self.ends_by == "termination", is_over and self.ends_by == "truncation"
        return self.observe(), self.reward(self.episode, self.count), terminated, truncated, {}


class Walkers(gym.vector.VectorEnv):
    """Random walkers under NEXT_STEP autoreset, of whose episodes half end by truncation and half by termination.

    `reset_reward` is what the reset rows pay, and `terminal_shift` is added to each observation after a termination:
    nothing that an agent learns may depend on them.
    """

    def __init__(
        self, num_envs, reset_reward=0.0, terminal_shift=0.0, action_space=None, autoreset=AutoresetMode.NEXT_STEP
    ):
        self.num_envs, self.reset_reward, self.terminal_shift = num_envs, reset_reward, terminal_shift
        self.metadata = {} if autoreset is None else {"autoreset_mode": autoreset}
        self.single_observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.single_action_space = action_space or Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.dones = np.zeros(self.num_envs, bool)
        self.positions = np.zeros((self.num_envs, 2))
        return self.positions.astype(np.float32), {}

    def step(self, actions):
        moves = self.np_random.normal(size=(self.num_envs, 2)) + 0.1 * actions.reshape(self.num_envs, -1)
        chances = self.np_random.random(self.num_envs)
        is_reset = self.dones
        self.positions = np.where(is_reset[:, None], 0.0, self.positions + moves)
        terminations, truncations = ~is_reset & (chances < 0.1), ~is_reset & (chances > 0.9)
        self.dones = terminations | truncations
        rewards = np.where(is_reset, self.reset_reward, self.positions.sum(-1))
        obs = self.positions + self.terminal_shift * terminations[:, None]
        return obs.astype(np.float32), rewards, terminations, truncations, {}


def register(make_env):
    """Register a factory of environments, or of vector environments if it takes `num_envs`; returns the new id."""
    env_id = f"Test{len(gym.registry)}-v0"
    is_vector = "num_envs" in inspect.signature(make_env).parameters
    gym.register(
        env_id,
        entry_point=None if is_vector else make_env,
        vector_entry_point=make_env if is_vector else None,
        disable_env_checker=True,
    )
    return env_id


@pytest.fixture(autouse=True)
def the_same_start_for_each_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path):
    """Train in a folder of its own; returns the agent and the rows of metrics.csv."""
    numbers = itertools.count()

    def run(env_id, **flags):
        run_dir = tmp_path / f"run{next(numbers)}"
        agent = ppo.train(ppo.Args(**{**SMALL, **flags, "env_id": env_id, "run_dir": str(run_dir)}))
        return agent, read_rows(run_dir)

    return run


def read_rows(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return [float(row[name]) for row in rows]


def without_time(rows):
    return [{name: cell for name, cell in row.items() if name not in TIME_COLUMNS} for row in rows]


def spy_on_gae(monkeypatch):
    """Let `train` work as ever and return the list that collects the arguments and the result of each compute_gae."""
    calls, compute_gae, parameters = [], ppo.compute_gae, inspect.signature(ppo.compute_gae)

    def spy(*args, **kwargs):
        advantages = compute_gae(*args, **kwargs)
        arguments = {name: np.copy(x) for name, x in parameters.bind(*args, **kwargs).arguments.items()}
        calls.append(types.SimpleNamespace(**arguments, advantages=advantages.copy()))
        return advantages

    monkeypatch.setattr(ppo, "compute_gae", spy)
    return calls


def spy_on_adam(monkeypatch):
    """The same for the steps of the optimizer: the global norm of the gradient, and the settings."""
    calls, step = [], torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm, settings = torch.stack(gradients).norm().item(), self.param_groups[0]
        calls.append(types.SimpleNamespace(norm=norm, lr=settings["lr"], eps=settings["eps"]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    return calls


# compute_gae.


def gae_of_the_golden_rollout(**flags):
    """Five NEXT_STEP rows: an episode of two, the reset row 2, and two rows of the next episode."""
    rewards = np.array([1.0, 1, 0, 1, 1])
    values = np.array([2.0, 3, 7, 4, 6, 5])
    terminations = np.array([False, flags.get("terminated", False), False, False, False])
    dones = terminations | np.array([False, flags.get("truncated", False), False, False, False])
    return ppo.compute_gae(rewards, values[:-1], values[1:], terminations, dones, 0.5, 0.5)


@pytest.mark.parametrize(
    ("flags", "first_two"),
    [
        ({"truncated": True}, [0.875, 1.5]),
        ({"terminated": True}, [0, -2]),
        ({"terminated": True, "truncated": True}, [0, -2]),
    ],
)
def test_gae_of_the_golden_rollout(flags, first_two):
    assert_close(gae_of_the_golden_rollout(**flags)[[0, 1, 3, 4]], np.array([*first_two, -0.625, -2.5]))


@pytest.mark.parametrize(
    ("truncated_at", "terminated_at", "expected"),
    [
        (
            [],
            [3, 7, 11],
            [457.83447, 374.114269, 288.298, 196, 465.5610193, 378.1084735]
            + [289.387, 194, 476.2875687, 382.102678, 290.476, 192],
        ),
        (
            [3, 7],
            [11],
            [457.010879, 373.2385742, 287.366905, 195.01, 463.9138373, 376.3570838]
            + [287.52481, 192.02, 476.2875687, 382.102678, 290.476, 192],
        ),
    ],
)
def test_gae_of_three_episodes_whose_next_values_are_not_the_shifted_values(truncated_at, terminated_at, expected):
    rewards = np.array([101.0, 102, 103, 200, 104, 105, 106, 201, 107, 108, 109, 202])
    values = np.array([-3.0, 2, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10])
    next_values = np.array([2.0, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10, -3])
    terminations = np.isin(range(12), terminated_at)
    dones = terminations | np.isin(range(12), truncated_at)
    advantages = ppo.compute_gae(rewards, values, next_values, terminations, dones, 0.99, 0.95)
    assert_close(advantages, np.array(expected, float), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [(1, [3, 2, 1, 0, -4.9]), (0.7, [2.2899, 1.73, 1, 0, -4.9]), (0.4, [1.7256, 1.46, 1, 0, -4.9])],
)
def test_gae_with_a_termination_inside(gae_lambda, expected):
    rewards, values = np.array([0.0, 0, 0, 0, 1]), np.array([-3.0, -2, -1, 0, 5, -1])
    ends = np.array([False, False, False, True, False])
    advantages = ppo.compute_gae(rewards, values[:-1], values[1:], ends, ends, 0.9, gae_lambda)
    assert_close(advantages, np.array(expected, float), rtol=0, atol=1e-9)


def test_targets_of_a_terminal_reward_at_lambda_0():
    rewards, values, ends = np.array([0.0, 1]), np.array([0.3, 0.95]), np.array([False, True])
    advantages = ppo.compute_gae(rewards, values, np.array([0.95, 0.7]), ends, ends, 0.99, 0.0)
    assert_close(advantages + values, np.array([0.9405, 1.0]))


numbers = st.floats(-10, 10)


@st.composite
def rollouts(draw):
    """rewards, values (T + 1 rows), next_values of their own, terminations and dones, (T, N), gamma and lambda."""
    num_steps, num_envs = draw(st.integers(1, 12)), draw(st.integers(1, 3))

    def array(elements, rows):
        return np.array(draw(st.lists(elements, min_size=rows * num_envs, max_size=rows * num_envs))).reshape(rows, -1)

    terminations, truncations = array(st.booleans(), num_steps), array(st.booleans(), num_steps)
    return types.SimpleNamespace(
        rewards=array(numbers, num_steps),
        values=array(numbers, num_steps + 1),
        next_values=array(numbers, num_steps),
        terminations=terminations,
        dones=terminations | truncations,
        gamma=draw(st.floats(0, 1)),
        gae_lambda=draw(st.floats(0, 1)),
    )


any_rollout = settings(max_examples=150, deadline=None, derandomize=True)


@any_rollout
@given(rollouts())
def test_gae_is_the_sum_of_its_definition(r):
    advantages = ppo.compute_gae(
        r.rewards, r.values[:-1], r.next_values, r.terminations, r.dones, r.gamma, r.gae_lambda
    )
    num_steps, num_envs = r.rewards.shape
    for t, n in itertools.product(range(num_steps), range(num_envs)):
        expected = 0.0
        for k in range(t, num_steps):
            future = 0.0 if r.terminations[k, n] else r.gamma * r.next_values[k, n]
            expected += (r.gamma * r.gae_lambda) ** (k - t) * (r.rewards[k, n] + future - r.values[k, n])
            if r.dones[k, n]:
                break
        assert advantages[t, n] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@any_rollout
@given(rollouts())
def test_gae_at_lambda_0_is_the_td_error(r):
    advantages = ppo.compute_gae(r.rewards, r.values[:-1], r.next_values, r.terminations, r.dones, r.gamma, 0.0)
    assert_close(advantages, r.rewards + r.gamma * r.next_values * ~r.terminations - r.values[:-1])


@any_rollout
@given(rollouts())
def test_gae_at_lambda_1_is_the_bootstrapped_return_minus_the_baseline(r):
    values, next_values = r.values[:-1], r.values[1:]
    advantages = ppo.compute_gae(r.rewards, values, next_values, r.terminations, r.dones, r.gamma, 1.0)
    num_steps, num_envs = r.rewards.shape
    for t, n in itertools.product(range(num_steps), range(num_envs)):
        last = next((k for k in range(t, num_steps) if r.dones[k, n]), num_steps - 1)
        expected = sum(r.gamma ** (k - t) * r.rewards[k, n] for k in range(t, last + 1))
        if not r.terminations[last, n]:
            expected += r.gamma ** (last + 1 - t) * next_values[last, n]
        assert advantages[t, n] == pytest.approx(expected - values[t, n], rel=1e-9, abs=1e-9)


@any_rollout
@given(rollouts())
def test_gae_of_each_environment_alone_is_its_column_and_no_input_is_changed(r):
    arrays = (r.rewards, r.values[:-1], r.next_values, r.terminations, r.dones)
    copies = [x.copy() for x in arrays]
    together = ppo.compute_gae(*arrays, r.gamma, r.gae_lambda)
    assert together.shape == r.rewards.shape
    for n in range(together.shape[1]):
        alone = ppo.compute_gae(*(x[:, n] for x in arrays), r.gamma, r.gae_lambda)
        assert alone.shape == together[:, n].shape
        np.testing.assert_array_equal(alone, together[:, n])
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_nan_value_after_a_termination_does_not_leak():
    rewards, values, next_values = np.ones(3), np.ones(3), np.array([1.0, np.nan, 1.0])
    ends = np.array([False, True, False])
    assert np.isfinite(ppo.compute_gae(rewards, values, next_values, ends, ends, 0.9, 0.9)).all()


def test_gae_of_float32_arrays_is_float32_and_as_accurate():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2048, 4)), rng.normal(size=(2049, 4))
    terminations, truncations = rng.random((2, 2048, 4)) < 0.01
    dones = terminations | truncations
    exact = ppo.compute_gae(rewards, values[:-1], values[1:], terminations, dones, 0.999, 0.99)
    rewards, values = rewards.astype(np.float32), values.astype(np.float32)
    advantages = ppo.compute_gae(rewards, values[:-1], values[1:], terminations, dones, 0.999, 0.99)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, exact, rtol=1e-5, atol=1e-5)


# The losses, by running the lines of `train` that compute them on numbers of our own.


def mentions(node, name):
    return any(isinstance(child, ast.Name) and child.id == name for child in ast.walk(node))


def assigns(node, name):
    return any(
        isinstance(child, ast.Name) and child.id == name and isinstance(child.ctx, ast.Store)
        for child in ast.walk(node)
    )


def execute(statements, **variables):
    scope = {**vars(ppo), **variables}
    exec(compile(ast.Module(list(statements), type_ignores=[]), ppo.__file__, "exec"), scope)
    return types.SimpleNamespace(**scope)


def losses(
    ratio=(1.0,),
    advantages=(0.0,),
    new_values=(0.0,),
    old_values=(0.0,),
    returns=(0.0,),
    entropy=(0.0,),
    old_logprobs=(0.0,),
    kl_coef=0.0,
    **flags,
):
    """All the variables of the minibatch loop of `train`, just before it takes its gradient step.

    The defaults of the losses not asked for are 0. Advantages are left as they are, unless norm_adv says otherwise.
    """
    initial_kl_coef = 1.0 if kl_coef > 0 else 0.0
    args = ppo.Args(**{"norm_adv": False, "kl_coef": initial_kl_coef, **flags})
    ratio, new_values, old_logprobs = (
        torch.as_tensor(x, dtype=torch.float64) for x in (ratio, new_values, old_logprobs)
    )
    ratio.requires_grad_(), new_values.requires_grad_()
    new_logprobs, entropy = old_logprobs + ratio.log(), torch.as_tensor(entropy, dtype=torch.float64)
    dist = types.SimpleNamespace(log_prob=lambda actions: new_logprobs, entropy=lambda: entropy)
    tree = ast.parse(inspect.getsource(ppo.train))
    loop = [node for node in ast.walk(tree) if isinstance(node, ast.For) and assigns(node, "policy_loss")][-1]
    result = execute(
        itertools.takewhile(lambda statement: not mentions(statement, "diagnostics"), loop.body),
        args=args,
        agent=lambda obs: (dist, new_values),
        kl_coef=kl_coef,
        indices=slice(None),
        batch=(
            *([], [], old_logprobs),  # observations and actions, of which the stand-ins make nothing
            *(torch.as_tensor(x, dtype=torch.float64) for x in (old_values, advantages, returns)),
        ),
    )
    result.given_ratio, result.given_values = ratio, new_values
    return result


@pytest.mark.parametrize(
    ("advantage", "ratio", "slope"), [(1, 0.7, -1), (1, 1.3, 0), (-1, 0.7, 0), (-1, 1.3, 1), (1, 1.1, -1), (-1, 0.9, 1)]
)
def test_the_clipped_surrogate_pulls_only_where_it_is_not_clipped(advantage, ratio, slope):
    result = losses(ratio=[ratio], advantages=[advantage])
    (gradient,) = torch.autograd.grad(result.policy_loss, result.given_ratio)
    assert gradient.item() == pytest.approx(slope)


def test_the_clipped_surrogate_is_the_pessimistic_mean():
    result = losses(ratio=[0.7, 1.3, 0.7, 1.3], advantages=[1, 1, -1, -1])
    assert result.policy_loss.item() == pytest.approx(-np.mean([0.7, 1.2, -0.8, -1.3]))


def test_an_infinite_clip_coef_leaves_the_plain_surrogate():
    result = losses(ratio=[0.01, 50], advantages=[-3, 2], clip_coef=math.inf)
    assert result.policy_loss.item() == pytest.approx(-np.mean([-0.03, 100]))
    assert result.clipfrac.item() == 0


def test_clipfrac_is_the_share_of_ratios_outside_the_clip():
    assert losses(ratio=[0.7, 0.9, 1.0, 1.1, 1.3]).clipfrac.item() == pytest.approx(0.4)


def test_norm_adv_standardizes_the_advantages_of_the_minibatch():
    advantages = np.array([1.0, 2, 6])
    result = losses(ratio=[1, 1, 1], advantages=advantages, norm_adv=True)
    (gradient,) = torch.autograd.grad(result.policy_loss, result.given_ratio)
    assert_close(gradient.numpy(), -(advantages - 3) / np.std(advantages, ddof=1) / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope"), [(1, 2, 1.62, 0), (0.1, 2, 1.805, -1.9), (1, -2, 4.5, 3)]
)
def test_the_clipped_value_loss(value, target, loss, slope):
    result = losses(new_values=[value], returns=[target], clip_vloss=True)
    (gradient,) = torch.autograd.grad(result.value_loss, result.given_values)
    assert result.value_loss.item() == pytest.approx(loss)
    assert gradient.item() == pytest.approx(slope)


def test_the_value_clip_is_around_the_stored_value():
    result = losses(new_values=[6], old_values=[5], returns=[7], clip_vloss=True)
    assert result.value_loss.item() == pytest.approx(0.5 * 1.8**2)


def test_the_value_loss_is_half_the_mean_squared_error():
    result = losses(new_values=[1, 2, 4], old_values=[9, 9, 9], returns=[0, 5, 4])
    assert result.value_loss.item() == pytest.approx(0.5 * (1 + 9 + 0) / 3)


def test_the_loss_adds_up_its_terms():
    result = losses(
        ratio=[0.5, 1.5, 1.0],
        advantages=[1, 2, -1],
        new_values=[1, 2, 3],
        entropy=[0.2, 0.4, 0.9],
        ent_coef=0.3,
        vf_coef=0.7,
        kl_coef=5.0,
    )
    approx_kl = np.mean([0.5 - 1 - math.log(0.5), 1.5 - 1 - math.log(1.5), 0])
    expected = -np.mean([0.5, 2 * 1.2, -1]) - 0.3 * 0.5 + 0.7 * 0.5 * 14 / 3 + 5 * approx_kl
    assert result.loss.item() == pytest.approx(expected)
    assert result.loss.shape == ()


def test_approx_kl_is_the_true_kl_in_expectation_and_so_is_its_gradient():
    logits = torch.tensor([[1.0, -0.5, 0.3, 2.0], [0.2, 0.9, -1.0, 0.5]], dtype=torch.float64)
    old, new = logits.log_softmax(-1)
    kl = (old.exp() * (old - new)).sum()
    expectation = 0.0
    for p, old_logprob, new_logprob in zip(old.exp(), old, new, strict=True):
        result = losses(ratio=[(new_logprob - old_logprob).exp()], old_logprobs=[old_logprob])
        assert result.approx_kl.item() >= 0
        expectation += p * result.approx_kl.item()
        (slope,) = torch.autograd.grad(result.approx_kl, result.given_ratio)
        assert slope.item() == pytest.approx(1 - (old_logprob - new_logprob).exp().item())
    assert expectation.item() == pytest.approx(kl.item())


# Training, on environments whose right answers are known.


def test_nothing_is_learned_from_reset_rows_or_from_what_follows_a_termination(run, monkeypatch):
    sample = ppo.NumpyPolicy.sample

    def train(reset_reward=0.0, terminal_shift=0.0, reset_action=None, **flags):
        walkers = []

        def make_env(num_envs):
            walkers.append(Walkers(num_envs, reset_reward, terminal_shift, Box(-1, 1, (2,))))
            return walkers[0]

        def sample_another_action_on_reset_rows(self, obs, rng):
            actions = sample(self, obs, rng)
            if reset_action is not None:
                actions[walkers[0].dones] = reset_action
            return actions

        monkeypatch.setattr(ppo.NumpyPolicy, "sample", sample_another_action_on_reset_rows)
        agent, rows = run(register(make_env), num_envs=4, num_steps=16, total_timesteps=256, **flags)
        return agent.state_dict(), without_time(rows)

    for flags in (
        {},
        {"normalize_obs": True, "normalize_reward": True},
        {"recompute_advantages": True, "clip_vloss": True, "kl_coef": 1.0, "target_kl": 0.01},
    ):
        weights, rows = train(**flags)
        assert int(rows[-1]["episodes"]) > 20
        for perturbation in ({"reset_reward": 1e3}, {"terminal_shift": 1e3}, {"reset_action": 0.5}):
            perturbed_weights, perturbed_rows = train(**perturbation, **flags)
            assert perturbed_rows == rows, perturbation
            for name, weight in weights.items():
                assert torch.equal(perturbed_weights[name], weight), (perturbation, name)


@pytest.mark.parametrize(
    ("ends_by", "expected"), [("truncation", [10, 10, 10, 10]), ("termination", [3.439, 2.71, 1.9, 1])]
)
def test_the_value_of_reward_1_goes_on_after_a_time_limit_and_stops_at_a_termination(run, ends_by, expected):
    agent, _ = run(
        register(lambda: Clock(length=4, ends_by=ends_by)),
        gamma=0.9,
        num_envs=8,
        num_steps=32,
        total_timesteps=256 * 40,
        learning_rate=1e-2,
        max_grad_norm=math.inf,
        update_epochs=8,
    )
    with torch.no_grad():
        values = agent.get_value(torch.eye(4))
    assert_close(values, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0.05)


def test_the_last_value_bootstraps_and_each_next_value_is_the_value_of_the_next_row(run, monkeypatch):
    calls = spy_on_gae(monkeypatch)
    run(register(lambda: Clock(length=3, ends_by="termination")), learning_rate=0.0)
    assert len(calls) == 2
    for call in calls:
        np.testing.assert_array_equal(call.next_values[:-1], call.values[1:])
        assert (call.terminations == call.dones).all()
    # The count is 1, 2, 3 (terminated), then 0 on the reset row: the end of row t is the flag of row t.
    np.testing.assert_array_equal(np.concatenate([call.dones for call in calls])[:, 0], [t % 4 == 2 for t in range(16)])


@pytest.mark.parametrize("normalize_obs", [False, True])
@pytest.mark.parametrize(
    "action_space", [Discrete(3), Box(-1, 1, (3,), np.float32), Box(0, 1, (2, 2), np.float32)], ids=str
)
def test_the_ratio_is_1_before_the_first_gradient_step(run, action_space, normalize_obs):
    env_id = register(lambda: Clock(length=5, action_space=action_space))
    one_step = {"update_epochs": 1, "num_minibatches": 1, "learning_rate": 0.1}
    for flags in (one_step, {"learning_rate": 0.0}):
        _, rows = run(env_id, total_timesteps=64, log_std_init=2.0, normalize_obs=normalize_obs, **flags)
        assert len(rows) == 4
        assert max(map(abs, column(rows, "approx_kl"))) < 1e-6
        assert max(column(rows, "clipfrac")) == 0


def test_the_entropy_bonus_widens_the_policy_at_the_rate_of_adam(run):
    flags = {"total_timesteps": 64, "update_epochs": 1, "num_minibatches": 1, "learning_rate": 0.01}
    env_id = register(lambda: Clock(action_space=Box(-1, 1, (2,))))
    agent, rows = run(env_id, **flags, anneal_lr=False, norm_adv=False, ent_coef=1e6)
    assert_close(agent.log_std.detach(), torch.full((2,), 0.01 * len(rows)), rtol=0.05, atol=0)


def test_box_actions_are_clipped_on_their_way_into_the_environment_and_nowhere_else(run, monkeypatch):
    taken, sampled, scored = [], [], []
    sample, log_prob = ppo.NumpyPolicy.sample, ppo.Independent.log_prob

    def spy_sample(self, obs, rng):
        sampled.append(sample(self, obs, rng))
        return sampled[-1].copy()

    def spy_log_prob(self, value):
        scored.append(value.numpy())
        return log_prob(self, value)

    monkeypatch.setattr(ppo.NumpyPolicy, "sample", spy_sample)
    monkeypatch.setattr(ppo.Independent, "log_prob", spy_log_prob)
    low, high = np.array([-1, 0], np.float32), np.array([1, 3], np.float32)
    run(
        register(lambda: Clock(action_space=Box(low, high), on_action=lambda action: taken.append(action.copy()))),
        total_timesteps=16,
        log_std_init=2.0,
    )
    sampled = np.concatenate(sampled).astype(np.float32)
    assert (sampled < low).any(0).all() and (sampled > high).any(0).all()
    np.testing.assert_array_equal(scored[0][:-1].reshape(16, 2), sampled)  # its last row has no action
    np.testing.assert_array_equal(taken, np.clip(sampled, low, high))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_box_actions_have_the_type_of_their_space(run, dtype):
    taken = []
    run(register(lambda: Clock(action_space=Box(-1, 1, (2,), dtype), on_action=lambda action: taken.append(action))))
    assert {action.dtype for action in taken} == {np.dtype(dtype)}


def test_discrete_actions_start_where_the_space_does(run):
    taken = []
    _, rows = run(register(lambda: Clock(action_space=Discrete(3, start=5), on_action=taken.append)))
    assert set(taken) == {5, 6, 7}
    assert np.isfinite(column(rows, "policy_loss")).all()


@pytest.mark.parametrize("start, dtype", [(0, np.uint8), (-1, np.int32), (2, np.uint64)])
def test_discrete_actions_have_the_type_of_their_space(run, start, dtype):
    taken, space = [], Discrete(3, start=start, dtype=dtype)
    run(register(lambda: Clock(action_space=space, on_action=taken.append)))
    assert set(taken) == {start, start + 1, start + 2}
    assert {action.dtype for action in taken} == {np.dtype(dtype)}


def test_one_transition_in_two_rows_is_enough_for_the_most_minibatches(run):
    env_id = register(lambda: Clock(length=1, ends_by="termination"))
    _, rows = run(env_id, num_envs=2, num_steps=4, total_timesteps=64, num_minibatches=2)
    assert len(rows) == 8
    assert np.isfinite([column(rows, name) for name in ("policy_loss", "value_loss", "approx_kl")]).all()
    with pytest.raises(ppo.ConfigError, match="--num-minibatches"):
        run(env_id, num_envs=2, num_steps=4, total_timesteps=64, num_minibatches=3)


def test_gradients_are_clipped_by_their_global_norm_and_the_epsilon_of_adam_is_1e_5(run, monkeypatch):
    calls = spy_on_adam(monkeypatch)
    env_id = register(Clock)
    run(env_id, max_grad_norm=math.inf)
    assert max(call.norm for call in calls) > 1
    assert calls[0].eps == 1e-5
    calls.clear()
    run(env_id, max_grad_norm=1e-2)
    assert max(call.norm for call in calls) == pytest.approx(1e-2, rel=1e-3)
    assert len(calls) == 2 * 2 * 2  # iterations, epochs, minibatches


def test_the_gradient_of_each_step_is_that_of_its_own_minibatch_and_of_no_earlier_one(run, monkeypatch):
    calls = spy_on_adam(monkeypatch)
    flags = {"learning_rate": 0.0, "num_minibatches": 1, "update_epochs": 3, "max_grad_norm": math.inf}
    run(register(Clock), total_timesteps=16, **flags)
    assert [call.norm for call in calls] == pytest.approx([calls[0].norm] * 3, rel=1e-4)


def test_each_epoch_takes_every_transition_once_in_an_order_of_its_own(run, monkeypatch):
    minibatches, forward, numbers = [], ppo.Agent.forward, itertools.count(1)

    def spy_forward(self, obs):
        if torch.is_grad_enabled():  # not in the estimate of the advantages
            minibatches.append(obs.sum(-1))
        return forward(self, obs)

    monkeypatch.setattr(ppo.Agent, "forward", spy_forward)
    # Every observation is a number of its own; of the 16 rows of both environments, 2 are resets.
    env_id = register(lambda: Clock(length=6, edit_obs=lambda count: 2.0 * next(numbers)))
    run(env_id, num_steps=16, total_timesteps=32, num_minibatches=3, update_epochs=4)
    assert [len(minibatch) for minibatch in minibatches] == [10, 9, 9] * 4
    epochs = [torch.cat(minibatches[i : i + 3]).tolist() for i in range(0, 12, 3)]
    assert len(set(epochs[0])) == 28
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(epochs[0]) not in epochs


def test_recompute_advantages_estimates_them_anew_before_each_further_epoch(run, monkeypatch):
    calls = spy_on_gae(monkeypatch)
    env_id = register(Clock)
    run(env_id, update_epochs=3, total_timesteps=16)
    assert len(calls) == 1
    calls.clear()
    run(env_id, update_epochs=3, total_timesteps=16, recompute_advantages=True)
    assert len(calls) == 3
    assert all((calls[i].rewards == calls[0].rewards).all() for i in (1, 2))
    assert len({call.values.tobytes() for call in calls}) == 3


class Residual(torch.nn.Sequential):
    def forward(self, x):
        return self[4](self[1](self[0](x)) + self[3](self[2](self[1](self[0](x)))))


# Edits of make_mlp by a reader who thinks of PyTorch alone.
EDITS = {
    "none": lambda mlp: mlp,
    "ReLU": lambda mlp: mlp[:1].append(torch.nn.ReLU()).extend(mlp[2:]),
    "one layer": lambda mlp: mlp[:2].append(mlp[4]),
    "no bias": lambda mlp: mlp[:4].append(torch.nn.Linear(64, mlp[4].out_features, bias=False)),
    "residual": lambda mlp: Residual(*mlp),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_the_actions_of_each_rollout_come_from_the_policy_of_that_time(run, monkeypatch, edit):
    sample, log_stds, make_mlp = ppo.NumpyPolicy.sample, set(), ppo.make_mlp

    def check_sample(self, obs, rng):
        with torch.no_grad():
            dist = self.agent.get_dist(torch.as_tensor(obs))
        actions = sample(self, obs, types.SimpleNamespace(standard_normal=np.ones))
        np.testing.assert_allclose(actions, (dist.mean + dist.variance.sqrt()).numpy(), rtol=1e-5, atol=1e-5)
        log_stds.add(self.agent.log_std[0].item())
        return sample(self, obs, rng)

    monkeypatch.setattr(ppo, "make_mlp", lambda *args, **kwargs: edit(make_mlp(*args, **kwargs)))
    monkeypatch.setattr(ppo.NumpyPolicy, "sample", check_sample)
    run(register(lambda: Clock(action_space=Box(-1, 1, (2,)))), normalize_obs=True, learning_rate=0.1)
    assert len(log_stds) == 2  # rollouts


def test_observation_statistics_change_only_between_an_update_and_the_next_rollout(run, monkeypatch):
    order, sample, forward = [], ppo.NumpyPolicy.sample, ppo.Agent.forward

    def spy_sample(self, obs, rng):
        order.append(("act", self.agent.obs_statistics.count.item()))
        return sample(self, obs, rng)

    def spy_forward(self, obs):
        order.append(("update", self.obs_statistics.count.item()))
        return forward(self, obs)

    monkeypatch.setattr(ppo.NumpyPolicy, "sample", spy_sample)
    monkeypatch.setattr(ppo.Agent, "forward", spy_forward)
    run(register(lambda: Clock(length=4)), normalize_obs=True)
    assert [key for key, _ in itertools.groupby(order)] == [("act", 0), ("update", 0), ("act", 14), ("update", 14)]


@pytest.mark.parametrize("most", [1, 255])
def test_bytes_that_are_no_image_are_standardized_by_the_raw_ones_of_all_transitions(run, most):
    to_bytes, space = lambda obs: (most * obs).astype(np.uint8), Box(0, 255, (4,), np.uint8)
    env_id = register(lambda: gym.wrappers.TransformObservation(Clock(length=4), to_bytes, space))
    agent = run(env_id)[0]
    statistics = agent.obs_statistics
    share = np.array([4, 3, 3, 3]) / 13  # of each count: of the 16 rows of an environment, 4, 9 and 14 are resets
    assert statistics.count == 26
    np.testing.assert_allclose(statistics.mean.numpy(), most * share)
    np.testing.assert_allclose(statistics.var.numpy(), most**2 * share * (1 - share))
    features = agent.encode(torch.from_numpy(most * np.eye(4, dtype=np.uint8)))
    np.testing.assert_allclose(features.numpy(), (np.eye(4) - share) / np.sqrt(share * (1 - share)), rtol=1e-5)


# The adaptive KL penalty and early stopping.


@pytest.mark.parametrize(("kl", "factor"), [(0.5, 0.5), (0.65, 0.5), (0.68, 1), (1.48, 1), (1.52, 2), (9, 2)])
def test_beta_halves_under_two_thirds_of_the_target_and_doubles_over_one_and_a_half_of_it(kl, factor):
    target_kl = 0.01
    logratio = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    logratio = logratio[(logratio.exp() - 1 - logratio - kl * target_kl).abs().argmin()]
    dist = types.SimpleNamespace(log_prob=lambda actions: logratio.repeat(3))
    tree = ast.parse(inspect.getsource(ppo.train))
    changes = [node for node in ast.walk(tree) if isinstance(node, ast.If) and assigns(node, "kl_coef")]
    (adaptation,) = (node for node in changes if mentions(node, "b_logprobs"))  # not what a checkpoint sets it to
    result = execute(
        [adaptation],
        args=ppo.Args(kl_coef=3.0, target_kl=target_kl),
        agent=types.SimpleNamespace(get_dist=lambda obs: dist),
        b_obs=torch.zeros(3, 4),
        b_actions=None,
        b_logprobs=torch.zeros(3, dtype=torch.float64),
        kl_coef=3.0,
    )
    assert result.kl_coef == 3.0 * factor


def test_beta_is_never_lost_at_0_or_at_infinity(run):
    env_id = register(lambda: Clock(length=5))
    flags = {"total_timesteps": 16 * 60, "kl_coef": 1.0, "learning_rate": 1e-9}
    assert float(run(env_id, **flags, target_kl=1e9)[1][-1]["kl_coef"]) == 1e-6
    flags |= {"learning_rate": 1e-2, "anneal_lr": False, "kl_coef": 1e5}
    assert float(run(env_id, **flags, target_kl=1e-30)[1][-1]["kl_coef"]) == 1e6


def test_parameters_that_are_not_finite_stop_the_run(run):
    env_id = register(lambda: Clock(length=5))
    with pytest.raises(FloatingPointError, match=r"parameters\[\d+\] is nan at step 16"):
        run(env_id, kl_coef=1e39, update_epochs=1, num_minibatches=1)


def test_beta_follows_its_target_from_update_to_update(run):
    env_id = register(lambda: Clock(reward=lambda episode, count: count % 3))
    halved, doubled, fixed = (
        column(run(env_id, kl_coef=2.0, target_kl=target_kl, total_timesteps=64)[1], "kl_coef")
        for target_kl in (1e3, 1e-12, None)
    )
    assert halved == [1, 0.5, 0.25, 0.125]
    assert doubled == [4, 8, 16, 32]
    assert fixed == [2, 2, 2, 2]


def test_a_large_penalty_holds_the_policy_near_the_old_one(run):
    env_id = register(lambda: Clock(reward=lambda episode, count: count % 3))
    flags = {"clip_coef": math.inf, "update_epochs": 20, "learning_rate": 1e-2, "total_timesteps": 128}
    free, held = (column(run(env_id, kl_coef=kl_coef, **flags)[1], "approx_kl") for kl_coef in (0.0, 1e3))
    assert max(held) < 0.5 * max(free)


def test_without_a_penalty_the_target_kl_ends_the_update_before_the_step_that_would_follow(run, monkeypatch):
    calls = spy_on_adam(monkeypatch)
    env_id = register(lambda: Clock(reward=lambda episode, count: count % 3))
    flags = {"total_timesteps": 64, "update_epochs": 4, "learning_rate": 1e-2, "anneal_lr": False}
    run(env_id, target_kl=1e-5, **flags)
    assert len(calls) == 4  # the first minibatch of an update has a KL of 0, and the second is over the target
    calls.clear()
    run(env_id, target_kl=1e-5, kl_coef=1.0, **flags)
    assert len(calls) == 4 * 4 * 2
    calls.clear()
    _, rows = run(env_id, target_kl=1e3, **flags)
    assert len(calls) == 4 * 4 * 2
    assert column(rows, "kl_coef") == [0] * 4


def test_an_infinite_clip_coef_trains_and_clips_nothing(run):
    env_id = register(lambda: Clock(reward=lambda episode, count: count % 3))
    flags = {"learning_rate": 0.1, "update_epochs": 10, "clip_vloss": True}
    clipfracs = [column(run(env_id, clip_coef=c, **flags)[1], "clipfrac") for c in (math.inf, 0.01)]
    assert max(clipfracs[0]) == 0
    assert max(clipfracs[1]) > 0


# The log.


def test_metrics_csv_has_its_columns_and_args_json_the_arguments(tmp_path):
    args = ppo.Args(**SMALL, clip_coef=math.inf, run_dir=str(tmp_path / "new" / "run"))
    ppo.train(args)
    rows = read_rows(tmp_path / "new" / "run")
    assert json.loads((tmp_path / "new" / "run" / "args.json").read_text()) == vars(args)
    assert column(rows, "global_step") == [16, 32]
    assert set(rows[0]) >= {
        *("global_step", "wall_time", "sps", "episodes", "episodic_return", "episodic_length", "policy_loss"),
        *("value_loss", "entropy", "learning_rate", "approx_kl", "clipfrac", "explained_variance"),
    }


def test_a_row_is_on_disk_as_soon_as_its_iteration_ends(tmp_path):
    run_dir, num_rows = tmp_path / "run", []
    env_id = register(lambda: Clock(on_action=lambda action: num_rows.append(len(read_rows(run_dir)))))
    ppo.train(ppo.Args(**{**SMALL, "num_envs": 1, "total_timesteps": 24}, env_id=env_id, run_dir=str(run_dir)))
    assert num_rows == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize("flags", [{}, {"normalize_reward": True, "clip_reward": 0.1}], ids=["raw", "normalized"])
def test_episodes_are_counted_once_and_averaged_over_those_since_the_last_row(run, flags):
    env_id = register(lambda: Clock(length=5, reward=lambda episode, count: episode))
    _, rows = run(env_id, num_steps=4, total_timesteps=2 * 4 * 5, num_minibatches=1, **flags)
    # Episode k pays k in each of its 5 steps. They end at steps 5, 11 and 17 of each environment.
    assert [row["episodes"] for row in rows] == ["0", "2", "4", "4", "6"]
    assert [row["episodic_return"] for row in rows] == ["", "5.0", "10.0", "", "15.0"]
    assert [row["episodic_length"] for row in rows] == ["", "5.0", "5.0", "", "5.0"]
    _, rows = run(env_id, num_steps=16, total_timesteps=2 * 16 * 2, **flags)
    assert [row["episodic_return"] for row in rows] == ["7.5", "20.0"]


def test_losses_are_means_over_all_the_minibatches_of_the_update(run):
    env_id = register(lambda: Clock(reward=lambda episode, count: count**2 % 7))
    flags = {"num_steps": 16, "total_timesteps": 64, "learning_rate": 0.0, "norm_adv": False}
    (_, whole), (_, parts) = (run(env_id, update_epochs=k, num_minibatches=m, **flags) for k, m in ((1, 1), (3, 8)))
    for name in ("policy_loss", "value_loss", "entropy"):
        assert column(parts, name) == pytest.approx(column(whole, name), rel=1e-4)


def test_the_logged_numbers_are_those_of_the_transitions(run, monkeypatch):
    calls = spy_on_gae(monkeypatch)
    env_id = register(lambda num_envs: Walkers(num_envs))
    flags = {"learning_rate": 0.0, "norm_adv": False, "num_minibatches": 1, "update_epochs": 1}
    _, rows = run(env_id, num_envs=4, num_steps=32, total_timesteps=256, **flags)
    is_reset = np.zeros((1, 4), bool)
    for row, call in zip(rows, calls, strict=True):
        is_transition = ~np.concatenate([is_reset, call.dones[:-1]])
        is_reset = call.dones[-1:]
        advantages, values = call.advantages[is_transition], call.values[is_transition]
        explained_variance = 1 - advantages.var() / (advantages + values).var()
        assert float(row["policy_loss"]) == pytest.approx(-advantages.mean(), rel=1e-4)
        assert float(row["value_loss"]) == pytest.approx(0.5 * np.mean(advantages**2), rel=1e-4)
        assert float(row["explained_variance"]) == pytest.approx(explained_variance, abs=1e-4)
        assert float(row["entropy"]) == pytest.approx(math.log(3), abs=1e-2)


def test_the_learning_rate_falls_linearly_to_0_or_stays(run):
    env_id = register(Clock)
    for anneal_lr, expected in ((True, [0.1, 0.075, 0.05, 0.025]), (False, [0.1] * 4)):
        _, rows = run(env_id, learning_rate=0.1, total_timesteps=64, anneal_lr=anneal_lr)
        assert column(rows, "learning_rate") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("final_gamma", "expected"), [(None, [0.5] * 4), (0.9, [0.5, 0.7, 0.9, 0.9]), (0.0, [0.5, 0.25, 0.0, 0.0])]
)
def test_gamma_moves_linearly_to_its_final_value_by_half_of_the_run_or_stays(run, monkeypatch, final_gamma, expected):
    calls = spy_on_gae(monkeypatch)
    flags = {"total_timesteps": 64, "update_epochs": 2, "recompute_advantages": True}
    run(register(Clock), gamma=0.5, final_gamma=final_gamma, **flags)
    assert [call.gamma for call in calls] == pytest.approx(np.repeat(expected, 2))


def test_the_optimizer_takes_the_learning_rate_that_is_logged(run, monkeypatch):
    calls = spy_on_adam(monkeypatch)
    _, rows = run(register(Clock), total_timesteps=64)
    assert [call.lr for call in calls[::4]] == column(rows, "learning_rate")


@pytest.mark.parametrize(
    ("env_id", "flags"),
    [
        ("CartPole-v1", {"num_envs": 8, "num_steps": 32, "total_timesteps": 2048}),
        ("Pendulum-v1", {"num_steps": 256, "total_timesteps": 2048, "normalize_obs": True, "normalize_reward": True}),
    ],
)
def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(run, env_id, flags):
    rows = []
    for seed, num_threads in ((3, 2), (3, 1), (4, 1)):
        torch.set_num_threads(num_threads)  # whatever the process was at before
        rows.append(without_time(run(env_id, seed=seed, **flags)[1]))
    first, again, other = rows
    assert first == again
    assert int(first[-1]["episodes"]) > 0
    for name in ("episodic_return", "policy_loss", "value_loss", "approx_kl"):
        assert first[-1][name] != other[-1][name]


@pytest.mark.parametrize(
    ("mode", "name"), [(None, "CartPoleVectorEnv"), ("native", "CartPoleVectorEnv"), ("sync", "SyncVectorEnv")]
)
def test_the_vectorization_mode_is_the_native_one_unless_another_is_asked_for(mode, name):
    envs = ppo.make_envs(ppo.Args(num_envs=2, vectorization_mode=mode))
    assert type(envs.unwrapped).__name__ == name


def test_async_environments_give_what_sync_ones_do_and_leave_no_process_behind(run):
    flags = {"num_steps": 256, "total_timesteps": 1024}
    rows = {mode: run("Pendulum-v1", vectorization_mode=mode, **flags)[1] for mode in ("sync", "async")}
    assert without_time(rows["sync"]) == without_time(rows["async"])
    assert multiprocessing.active_children() == []


def test_an_error_leaves_no_environment_process_behind(run):
    env_id = register(lambda: Clock(reward=math.nan))
    with pytest.raises(FloatingPointError):
        run(env_id, vectorization_mode="async")
    assert multiprocessing.active_children() == []


def test_neighbouring_seeds_share_no_environment_seed(run):
    seen = []
    env_id = register(lambda: Clock(length=3, on_reset=seen.append))
    seeds = []
    for seed in range(4):
        run(env_id, seed=seed, num_envs=4)
        seeds += [s for s in seen if s is not None]
        seen.clear()
    assert len(seeds) == 4 * 4
    assert len(set(seeds)) == len(seeds)


@pytest.fixture
def wandb_calls(monkeypatch):
    """Stand in for the package wandb; returns the list of what it is told."""
    calls = []

    def init(**kwargs):
        calls.append(("init", kwargs))
        return types.SimpleNamespace(
            id="an-id",
            log=lambda metrics, step: calls.append(("log", metrics, step)),
            finish=lambda **kwargs: calls.append(("finish", kwargs)),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=Exception, Video=None))
    return calls


def test_track_sends_the_rows_of_metrics_csv_to_wandb(run, tmp_path, wandb_calls):
    env_id = register(lambda: Clock(length=5))
    _, rows = run(env_id, track=True, wandb_project_name="project", wandb_entity="team", total_timesteps=48)
    (_, init), *logs, last = wandb_calls
    assert (init["project"], init["entity"], init["config"]["env_id"]) == ("project", "team", env_id)
    assert init["dir"] == tmp_path / "run0"
    assert init["id"] is None and init["resume"] == "allow"
    assert last == ("finish", {"exit_code": 0})
    assert [step for _, _, step in logs] == [16, 32, 48]
    assert [{k: "" if v is None else str(v) for k, v in metrics.items()} for _, metrics, _ in logs] == rows
    assert torch.load(tmp_path / "run0" / "checkpoint.pt", weights_only=True)["log"][-1] == "an-id"


def test_track_tells_wandb_that_a_run_has_failed(run, wandb_calls):
    with pytest.raises(FloatingPointError):
        run(register(lambda: Clock(reward=nan_at(12, math.nan))), track=True)
    assert [what for what, *_ in wandb_calls] == ["init", "log", "finish"]
    assert wandb_calls[-1] == ("finish", {"exit_code": 1})


def test_track_without_a_login_is_refused_by_name(tmp_path, monkeypatch):
    class Error(Exception):
        pass

    def init(**kwargs):
        raise Error("No API key configured.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Error=Error, init=init))
    with pytest.raises(ppo.ConfigError, match="--track"):
        ppo.train(ppo.Args(track=True, run_dir=str(tmp_path / "run")))


def test_track_without_the_package_is_one_line_and_leaves_the_folder_to_the_next_try(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags = {**SMALL, "run_dir": str(tmp_path / "run")}
    with pytest.raises(ppo.ConfigError, match="--track: .*wandb"):
        ppo.train(ppo.Args(**flags, track=True))
    ppo.train(ppo.Args(**flags))


def test_a_run_that_fails_closes_its_environments(run, monkeypatch):
    closed = []
    monkeypatch.setattr(Clock, "close", lambda self: closed.append(self))
    with pytest.raises(FloatingPointError):
        run(register(lambda: Clock(reward=nan_at(6, math.nan))), num_envs=3)
    assert len(closed) == 3


# Rewards that the learner sees and the log does not.


def spy_on_return_statistics(monkeypatch):
    """Let `train` work as ever and return the list that collects what each rollout adds to the return statistics."""
    batches, update = [], ppo.RunningStatistics.update

    def spy(self, batch):
        if self.mean.ndim == 0:
            batches.append(np.copy(batch))
        return update(self, batch)

    monkeypatch.setattr(ppo.RunningStatistics, "update", spy)
    return batches


def test_discounted_returns_of_two_rollouts_worked_out_by_hand(run, monkeypatch):
    batches = spy_on_return_statistics(monkeypatch)
    env_id = register(lambda: Clock(length=3, reward=lambda episode, count: 2.0 ** (3 * episode + count - 4)))
    flags = {"num_envs": 1, "num_steps": 5, "total_timesteps": 10, "num_minibatches": 1}
    run(env_id, normalize_reward=True, gamma=0.5, **flags)
    # Rewards are 1, 2, 4, reset, 8 and 16, 32, reset, 64, 128: the second episode is in both rollouts.
    assert [batch.tolist() for batch in batches] == [[1, 2.5, 5.25, 8], [20, 42, 64, 160]]


@pytest.mark.parametrize(("gamma", "final_gamma"), [(0.0, None), (0.7, None), (1.0, None), (0.4, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("num_steps", [2, 5])
def test_discounted_returns_are_the_discounted_sums_of_the_episodes_so_far(
    run, monkeypatch, num_steps, gamma, final_gamma
):
    batches, steps = spy_on_return_statistics(monkeypatch), []

    class Recorded(Walkers):
        def step(self, actions):
            obs, rewards, terminations, truncations, infos = super().step(actions)
            steps.append((rewards.astype(np.float32).astype(float), terminations | truncations))
            return obs, rewards, terminations, truncations, infos

    flags = {"num_envs": 8, "num_steps": num_steps, "total_timesteps": 8 * num_steps * 12, "num_minibatches": 1}
    env_id = register(lambda num_envs: Recorded(num_envs, reset_reward=1e3))
    agent, _ = run(env_id, normalize_reward=True, gamma=gamma, final_gamma=final_gamma, **flags)
    rewards, dones = map(np.array, zip(*steps))
    final = gamma if final_gamma is None else final_gamma
    gammas = np.concatenate([np.linspace(gamma, final, 6 + 1)[:-1], [final] * 6]).repeat(num_steps)
    num_rows = len(rewards)
    is_reset = np.concatenate([np.zeros((1, 8), bool), dones[:-1]])
    expected = np.zeros((num_rows, 8))
    for (t, n), _ in np.ndenumerate(expected):
        start = max((k + 1 for k in range(t) if is_reset[k, n]), default=0)  # of the episode that row t is in
        expected[t, n] = sum(gammas[k + 1 : t + 1].prod() * rewards[k, n] for k in range(start, t + 1))
    assert len(batches) == 12
    for i, batch in enumerate(batches):
        rows = slice(i * num_steps, (i + 1) * num_steps)
        np.testing.assert_allclose(batch, expected[rows][~is_reset[rows]], rtol=1e-9, atol=1e-9)
    assert agent.return_statistics.count == (~is_reset).sum()
    # Episodes have ended in every row of a rollout, and some have gone on for more than a whole one.
    assert all(dones[row::num_steps].any() for row in range(num_steps))
    assert any(not dones[t : t + num_steps + 1, n].any() for t in range(num_rows - num_steps) for n in range(8))


def rewards_of_clocks(run, monkeypatch, **flags):
    """Train on seven clocks for three rollouts of 8 steps; returns the agent and three arrays, (24, 7): the rewards as
    they should be, raw and scaled at a gamma of 0.8, and those that compute_gae gets.

    The episodes end inside a rollout, on its last step (length 8), or so that its last row is a reset (length 7).
    """
    lengths, ends = (3, 3, 7, 7, 8, 8, math.inf), ("termination", "truncation") * 4
    clocks, calls = zip(lengths, ends), spy_on_gae(monkeypatch)

    def reward(episode, count):
        return (7 * episode + count**2) % 5 - 2.0

    env_id = register(lambda: Clock(*next(clocks), reward=reward))
    agent, _ = run(env_id, num_envs=7, num_steps=8, total_timesteps=3 * 8 * 7, **flags)
    raw, returns, is_reset = np.zeros((24, 7)), np.zeros((24, 7)), np.zeros((24, 7), bool)
    for (t, n), _ in np.ndenumerate(raw):
        episode, count = int(t // (lengths[n] + 1)) + 1, int(t % (lengths[n] + 1)) + 1
        is_reset[t, n] = count > lengths[n]
        if not is_reset[t, n]:
            raw[t, n] = reward(episode, count)
            returns[t, n] = sum(0.8 ** (count - k) * reward(episode, k) for k in range(1, count + 1))
    stds = [returns[:end][~is_reset[:end]].std() for end in (8, 16, 24)]
    return agent, raw, raw / np.repeat(stds, 8)[:, None], np.concatenate([call.rewards for call in calls])


def test_rewards_are_raw_unless_asked_otherwise(run, monkeypatch):
    _, raw, _, rewards = rewards_of_clocks(run, monkeypatch)
    np.testing.assert_array_equal(rewards, raw)


def test_normalize_reward_divides_by_the_standard_deviation_of_all_discounted_returns_so_far(run, monkeypatch):
    agent, _, scaled, rewards = rewards_of_clocks(run, monkeypatch, normalize_reward=True, gamma=0.8)
    np.testing.assert_allclose(rewards, scaled, rtol=1e-5)
    assert agent.return_statistics.count == 24 * 7 - 2 * (6 + 3 + 2)  # the rows but for the resets


def test_clip_reward_bounds_the_raw_reward(run, monkeypatch):
    _, raw, _, rewards = rewards_of_clocks(run, monkeypatch, clip_reward=1.5)
    np.testing.assert_array_equal(rewards, raw.clip(-1.5, 1.5))


def test_clip_reward_bounds_the_reward_after_its_normalization(run, monkeypatch):
    flags = {"clip_reward": 1.0, "normalize_reward": True, "gamma": 0.8}
    _, _, scaled, rewards = rewards_of_clocks(run, monkeypatch, **flags)
    assert scaled.min() < -1 and scaled.max() > 1
    np.testing.assert_allclose(rewards, scaled.clip(-1, 1), rtol=1e-5)


def test_rewards_whose_return_never_changes_are_divided_by_no_less_than_1e_4(run, monkeypatch):
    calls = spy_on_gae(monkeypatch)
    run(register(lambda: Clock(reward=1e-3)), normalize_reward=True, gamma=0.0)
    assert_close(calls[-1].rewards, np.full((8, 2), 10.0, np.float32))


# Bad input.

WRONG_SETTINGS = [
    *(("seed", value) for value in (-1, 2**31)),
    *(("total_timesteps", value) for value in (-1, 0, 31)),
    *(("num_envs", value) for value in (-1, 0)),
    *(("num_steps", value) for value in (-1, 0, 1)),
    *(("num_minibatches", value) for value in (-1, 0, 9, 16, 32, 10**6)),
    *((name, value) for name in ("update_epochs", "checkpoint_interval") for value in (-1, 0)),
    ("eval_episodes", -1),
    *((name, value) for name in ("gamma", "final_gamma", "gae_lambda") for value in (-0.1, 1.1, math.nan, math.inf)),
    *(
        (name, value)
        for name in ("learning_rate", "vf_coef", "ent_coef", "kl_coef")
        for value in (-1, math.nan, math.inf)
    ),
    *(
        (name, value)
        for name in ("clip_coef", "target_kl", "max_grad_norm", "clip_reward")
        for value in (-1.0, 0.0, math.nan)
    ),
    *(("log_std_init", value) for value in (-20.1, 20.1, math.nan, math.inf, -math.inf)),
    *(("env_kwargs", (("a", 1), ("b", value))) for value in ("true", "false", "FALSE", "no", "Off", "None")),
]


def test_every_flag_that_takes_a_number_is_among_the_wrong_settings():
    numbers = {field.name for field in dataclasses.fields(ppo.Args) if re.search(r"int|float", str(field.type))}
    assert numbers == {name for name, _ in WRONG_SETTINGS}


@pytest.fixture
def refusal(tmp_path):
    """Have `train` refuse its arguments before it writes anything; returns its one line."""

    def refusal(**flags):
        with pytest.raises(ppo.ConfigError) as error:
            ppo.train(ppo.Args(**flags))
        assert list(tmp_path.iterdir()) == []
        assert "\n" not in str(error.value)
        return str(error.value)

    return refusal


@pytest.mark.parametrize(("name", "value"), WRONG_SETTINGS)
def test_a_setting_out_of_range_is_refused_by_the_name_of_its_flag(refusal, name, value):
    flags = {"num_envs": 2, "num_steps": 16, "total_timesteps": 32, "num_minibatches": 2, name: value}
    line = refusal(**flags)
    assert line.startswith(f"--{name.replace('_', '-')} must be ") and line.endswith(f", not {value}")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", (0, 2**31 - 1)),
        ("num_minibatches", (1, 8)),
        ("log_std_init", (-20.0, 20.0)),
        *((name, (0.0, 1.0)) for name in ("gamma", "final_gamma", "gae_lambda")),
        *((name, (0.0, 1e9)) for name in ("learning_rate", "vf_coef", "ent_coef", "kl_coef")),
        *((name, (1e-9, math.inf)) for name in ("clip_coef", "max_grad_norm", "clip_reward", "target_kl")),
        *((name, (1, 10**9)) for name in ("update_epochs", "checkpoint_interval")),
        ("eval_episodes", (0, 10**9)),
        ("total_timesteps", (32, 10**12)),
        *((name, (None,)) for name in ("clip_reward", "target_kl", "final_gamma")),
        ("env_kwargs", (None, (("a", True), ("b", "word")), {"a": [1.0, 2.0]})),
    ],
)
def test_a_setting_at_the_end_of_its_range_is_accepted(name, values):
    for value in values:
        flags = {"num_envs": 2, "num_steps": 16, "total_timesteps": 32, "num_minibatches": 2, name: value}
        ppo.check_args(ppo.Args(**flags))


def test_the_least_number_of_timesteps_is_one_rollout_of_every_process():
    args = ppo.Args(**SMALL)
    ppo.check_args(args, world_size=2)
    with pytest.raises(ppo.ConfigError, match="^--total-timesteps must be at least one rollout, 48, not 32$"):
        ppo.check_args(args, world_size=3)


@pytest.mark.parametrize(
    ("env_id", "hint"),
    [
        ("CartPoel-v1", "CartPole"),
        ("CartPole-v99", "v1"),
        ("nowhere:CartPole-v1", "nowhere"),
        ("not an id", "not an id"),
        ("ALE/Pogn-v5", "Pong"),
    ],
)
def test_an_unknown_environment_is_refused_with_a_hint(refusal, env_id, hint):
    line = refusal(env_id=env_id)
    assert "--env-id" in line and hint in line


def test_a_misspelt_atari_game_is_not_blamed_on_a_missing_package(refusal):
    pytest.importorskip("ale_py")
    assert "pip install" not in refusal(env_id="ALE/Pogn-v5")


@pytest.mark.parametrize("action_space", [MultiDiscrete([2, 3]), MultiBinary(2), Tuple([Discrete(2)])], ids=str)
def test_actions_other_than_discrete_and_box_are_refused(refusal, action_space):
    line = refusal(env_id=register(lambda: Clock(action_space=action_space)))
    assert "--env-id" in line and type(action_space).__name__ in line


@pytest.mark.parametrize("obs_space", [Discrete(4), Dict({"x": Box(-1, 1)})], ids=str)
def test_observations_other_than_a_box_are_refused(refusal, obs_space):
    def make_env():
        env = Clock()
        env.observation_space = obs_space
        return env

    line = refusal(env_id=register(make_env))
    assert "--env-id" in line and type(obs_space).__name__ in line and "FlattenObservation" in line


@pytest.mark.parametrize("autoreset", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED, None])
@pytest.mark.filterwarnings("ignore:.*AutoresetMode metadata")
def test_an_autoreset_mode_other_than_next_step_is_refused(refusal, autoreset):
    line = refusal(env_id=register(lambda num_envs: Walkers(num_envs, autoreset=autoreset)))
    assert "--vectorization-mode" in line and "NEXT_STEP" in line


@pytest.mark.parametrize(("env_id", "mode"), [("Pendulum-v1", "native"), ("CartPoel-v1", "async")])
def test_a_vectorization_mode_or_id_that_does_not_exist_is_refused(refusal, env_id, mode):
    line = refusal(env_id=env_id, vectorization_mode=mode)
    assert f"--env-id {env_id}" in line and f"--vectorization-mode {mode}" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(refusal):
    assert refusal(cuda=True).startswith("--cuda ")


def test_a_run_folder_that_cannot_be_made_or_holds_a_run_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ppo.ConfigError, match="--run-dir"):
        ppo.train(ppo.Args(**SMALL, run_dir=str(tmp_path / "file" / "run")))
    ppo.train(ppo.Args(**SMALL, run_dir=str(tmp_path / "run")))
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with pytest.raises(ppo.ConfigError, match="--run-dir"):
        ppo.train(ppo.Args(**SMALL, run_dir=str(tmp_path / "run")))
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def nan_at(step, value):
    return lambda *counts: value if counts[-1] == step else 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("quantity", "part"), [("reward", "reward"), ("observation", "edit_obs")])
def test_a_reward_or_observation_that_is_not_finite_stops_the_run_and_keeps_its_log(tmp_path, quantity, part, value):
    env_id = register(lambda: Clock(**{part: nan_at(20, value)}))
    run_dir = tmp_path / "run"
    with pytest.raises(FloatingPointError, match=rf"^{quantity}\b.* step 40$"):  # step 20 of 2
        ppo.train(ppo.Args(**{**SMALL, "total_timesteps": 64}, env_id=env_id, run_dir=str(run_dir)))
    assert column(read_rows(run_dir), "global_step") == [16, 32]


def test_a_first_observation_that_is_not_finite_stops_the_run(run):
    with pytest.raises(FloatingPointError, match="observation"):
        run(register(lambda: Clock(edit_obs=nan_at(0, math.nan))))


@pytest.mark.parametrize(
    ("flags", "reward"),
    [({}, 1e30), ({"learning_rate": 1e6, "anneal_lr": False}, 1.0)],
    ids=["reward", "learning rate"],
)
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_loss_and_the_step(run, flags, reward):
    env_id = register(lambda: Clock(reward=reward, action_space=Box(-1, 1, (2,))))
    with pytest.raises(FloatingPointError, match=r"(policy_loss|value_loss|approx_kl) .* step \d+"):
        run(env_id, total_timesteps=1600, **flags)


# The command line.


def run_script(folder, *flags, **env):
    """Run a copy of the script, alone in a folder, as a user would."""
    shutil.copy(SCRIPT, folder)
    return subprocess.run(
        [sys.executable, SCRIPT.name, *flags],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def missing(tmp_path_factory):
    """A PYTHONPATH on which the module of that name cannot be imported."""

    def missing(name):
        folder = tmp_path_factory.mktemp("missing")
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{name}'\", name='{name}')")
        return str(folder)

    return missing


@pytest.mark.slow
def test_the_script_runs_alone_without_wandb_and_prints_a_bar_and_one_line(tmp_path, missing):
    result = run_script(tmp_path, "--total-timesteps", "4096", PYTHONPATH=missing("wandb"))
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith("CartPole-v1__ppo__1__")
    assert sorted(path.name for path in run_dir.iterdir()) == ["args.json", "checkpoint.pt", "metrics.csv"]
    rows = read_rows(run_dir)
    for step, seconds, sps in zip(*(column(rows, name) for name in ("global_step", *TIME_COLUMNS)), strict=True):
        assert sps == pytest.approx(step / seconds, rel=0.05)
    assert re.fullmatch(rf"CartPole-v1: return [\d.]+, 4096 steps in [\d.]+ s, runs/{run_dir.name}\n", result.stdout)
    pieces = [piece for piece in re.split(r"[\r\n]+", result.stderr) if piece.strip()]
    assert all(piece.startswith("CartPole-v1:") for piece in pieces), result.stderr
    assert "100%" in pieces[-1] and "step/s" in pieces[-1] and "return" in pieces[-1]


@pytest.mark.slow
def test_track_works_offline(tmp_path):
    pytest.importorskip("wandb")
    flags = ("--track", "--num-envs", "2", "--total-timesteps", "256")
    result = run_script(tmp_path, *flags, WANDB_MODE="offline", WANDB_SILENT="true")
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("runs/*/metrics.csv"))) == 1
    assert len(list(tmp_path.glob("**/offline-run-*/run-*.wandb"))) == 1


def assert_ends_with_one_line(result, folder, *parts):
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert all(part in line for part in parts), line
    assert [path.name for path in folder.iterdir()] == [SCRIPT.name]


@pytest.mark.parametrize(
    ("module", "env_id", "remedy"),
    [("mujoco", "HalfCheetah-v5", "gymnasium[mujoco]"), ("ale_py", "ALE/Pong-v5", "pip install ale-py")],
)
def test_a_missing_extra_is_named_in_one_line(tmp_path, missing, module, env_id, remedy):
    result = run_script(tmp_path, "--env-id", env_id, PYTHONPATH=missing(module))
    assert_ends_with_one_line(result, tmp_path, "--env-id", env_id, remedy)


def test_a_bad_setting_ends_the_script_with_one_line(tmp_path):
    assert_ends_with_one_line(run_script(tmp_path, "--gamma", "nan"), tmp_path, "ppo.py", "--gamma")


def test_a_reward_that_is_not_finite_ends_the_script_with_one_line_below_its_bar(tmp_path):
    (tmp_path / "faulty.py").write_text(
        "import gymnasium as gym\n"
        "def make():\n"
        "    return gym.wrappers.TransformReward(gym.make('CartPole-v1'), lambda reward: float('nan'))\n"
        "gym.register('Faulty-v0', make, disable_env_checker=True)\n"
    )
    result = run_script(tmp_path, "--env-id", "faulty:Faulty-v0", "--num-envs", "2")
    assert result.returncode not in (0, 2)
    assert result.stdout == ""
    *bar, line = [piece for piece in re.split(r"[\r\n]+", result.stderr) if piece.strip()]
    assert all(piece.startswith("faulty:Faulty-v0:") for piece in bar), result.stderr
    assert re.fullmatch(r"ppo\.py: .*reward.* step 2", line)


def test_the_inline_metadata_is_in_step_with_requirements_txt():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer")
    (block,) = re.findall(r"(?m)^# /// script$\n((?:^#(?:| .*)$\n)+)^# ///$", SCRIPT.read_text())
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    requirements = (SCRIPT.parent / "requirements.txt").read_text().split("\n")
    assert sorted(metadata["dependencies"]) == sorted(line for line in requirements if line)
    assert metadata["requires-python"]


# The agent.


def make_agent(obs_space, action_space=None, seed=0, **flags):
    torch.manual_seed(seed)
    envs = types.SimpleNamespace(single_observation_space=obs_space, single_action_space=action_space or Discrete(4))
    return ppo.Agent(envs, **flags)


def sharpen(agent):
    """Make the policy differ clearly from state to state and from action to action."""
    layer = agent.actor if isinstance(agent.actor, torch.nn.Linear) else agent.actor[-1]
    with torch.no_grad():
        layer.weight *= 100
        layer.bias.normal_()


def sample(space, *lead):
    rng = np.random.default_rng(0)
    shape = (*lead, *space.shape)
    if space.dtype == np.uint8:
        return rng.integers(space.high.max(), size=shape, dtype=np.uint8, endpoint=True)
    return rng.normal(size=shape)


FLAT = Box(-1, 1, (5,), np.float32)
RAM = Box(0, 255, (16,), np.uint8)
CHW = Box(0, 255, (4, 84, 84), np.uint8)
HWC = Box(0, 255, (84, 84, 3), np.uint8)
BITS = Box(0, 1, (16,), np.uint8)
OBS_SPACES = pytest.mark.parametrize(
    "space", [
        FLAT, Box(-1, 1, (2, 3)), RAM, CHW, HWC, Box(0, 255, (210, 160, 3), np.uint8),
        Box(0, 255, (40, 36, 84), np.uint8), Box(0, 255, (84, 36, 36), np.uint8), Box(0, 255, (64, 20, 64), np.uint8),
    ],
    ids=str,
)


@OBS_SPACES
@pytest.mark.parametrize("action_space", [Discrete(4), Box(-1, 1, (3,)), Box(-1, 1, (2, 2)), Box(-1, 1, ())], ids=str)
def test_there_is_one_value_and_one_distribution_for_each_observation(space, action_space):
    agent = make_agent(space, action_space)
    obs = torch.as_tensor(sample(space, 3, 2)).to(torch.uint8 if space.dtype == np.uint8 else torch.float32)
    actions = agent.get_dist(obs).sample()
    assert actions.shape == (3, 2, *action_space.shape)
    dist, value = agent(obs)
    for numbers in (agent.get_value(obs), value, dist.log_prob(actions), dist.entropy()):
        assert numbers.shape == (3, 2)
    assert_close(value, agent.get_value(obs))
    assert_close(dist.log_prob(actions), agent.get_dist(obs).log_prob(actions))
    assert agent.get_dist(obs[0, 0]).sample().shape == action_space.shape
    one_by_one = torch.stack([agent.get_value(obs[t, n][None])[0] for t in range(3) for n in range(2)])
    assert_close(one_by_one.reshape(3, 2), value, rtol=1e-4, atol=1e-3)  # a convolution rounds by how many images


def test_the_log_probability_and_the_entropy_of_a_box_action_are_summed_over_its_dimensions():
    agent = make_agent(FLAT, Box(-1, 1, (2, 2)), log_std_init=-0.5)
    obs, actions = torch.as_tensor(sample(FLAT, 3)).float(), torch.randn(3, 2, 2)
    dist = agent.get_dist(obs)
    z = (actions - dist.mean) / math.exp(-0.5)
    expected = (-0.5 * z**2 + 0.5 - 0.5 * math.log(2 * math.pi)).sum((1, 2))
    assert_close(dist.log_prob(actions), expected)
    assert_close(dist.entropy(), torch.full((3,), 4 * (0.5 * math.log(2 * math.pi * math.e) - 0.5)))


def test_images_may_have_their_channels_first_or_last():
    obs = torch.as_tensor(sample(HWC, 2))
    value = make_agent(HWC).get_value(obs)
    assert_close(value, make_agent(Box(0, 255, (3, 84, 84), np.uint8)).get_value(obs.permute(0, 3, 1, 2)))


def gradients_of(output, agent):
    return torch.autograd.grad(output.sum(), list(agent.parameters()), allow_unused=True, retain_graph=True)


def test_actor_and_critic_share_one_network_for_images_and_nothing_for_vectors():
    for space, num_convolutions, is_shared in ((CHW, 3, True), (FLAT, 0, False)):
        agent = make_agent(space)
        assert sum(isinstance(module, torch.nn.Conv2d) for module in agent.modules()) == num_convolutions
        obs = torch.as_tensor(sample(space, 2), dtype=torch.uint8 if space is CHW else torch.float32)
        dist, value = agent(obs)
        used_by_actor, used_by_critic = (
            {p for p, g in zip(agent.parameters(), gradients_of(output, agent), strict=True) if g is not None}
            for output in (dist.logits, value)
        )
        assert bool(used_by_actor & used_by_critic) == is_shared


@pytest.mark.parametrize("space", [CHW, HWC], ids=str)
def test_a_rollout_of_images_has_the_features_of_each_image_alone(space):
    agent = make_agent(space)
    obs = torch.as_tensor(sample(space, 2 * 301)).reshape(301, 2, *space.shape)  # no multiple of what is done at once
    with torch.no_grad():
        together, values = agent.encode(obs), agent.get_value(obs)
        alone = torch.stack([agent.encode(image) for image in obs.flatten(0, 1)])
    np.testing.assert_allclose(together, alone.reshape(301, 2, -1), rtol=1e-4, atol=1e-5)
    assert values.shape == (301, 2)


@pytest.mark.parametrize("space, most", [(CHW, 255), (Box(0, 1, (2, 40, 40), np.uint8), 1)], ids=str)
def test_the_bytes_of_images_are_brought_to_the_unit_interval(space, most):
    agent, obs = make_agent(space), sample(space, 2)
    agent.encoder = torch.nn.Flatten()  # encode gives what the network would get
    np.testing.assert_allclose(agent.encode(torch.as_tensor(obs)).numpy(), obs.reshape(2, -1) / most, rtol=1e-6)


@pytest.mark.parametrize("normalize_obs", [False, True])
@pytest.mark.parametrize("space", [FLAT, RAM, BITS, CHW], ids=str)
def test_discrete_actions_are_sampled_as_often_as_the_policy_says(space, normalize_obs):
    agent = make_agent(space, Discrete(4), normalize_obs=normalize_obs)
    sharpen(agent)
    if normalize_obs:
        agent.obs_statistics.update(sample(space, 50))
    num_samples = 2_000 if space is CHW else 20_000
    obs = np.repeat(sample(space, 1).astype(space.dtype), num_samples, 0)
    actions = ppo.NumpyPolicy(agent).sample(obs, np.random.default_rng(0))
    with torch.no_grad():
        expected = num_samples * agent.get_dist(torch.as_tensor(obs[0])[None]).probs[0].numpy()
    assert expected.max() > 1.3 * expected.min() and expected.min() > 20
    chi_square = ((np.bincount(actions, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # the 0.1 % quantile at 3 degrees of freedom


@pytest.mark.parametrize("normalize_obs", [False, True])
@pytest.mark.parametrize("space", [FLAT, RAM, CHW], ids=str)
@pytest.mark.parametrize("shape", [(3,), (2, 2), ()], ids=str)
def test_box_actions_are_sampled_with_the_mean_and_standard_deviation_of_the_policy(space, shape, normalize_obs):
    agent = make_agent(space, Box(-1, 1, shape), normalize_obs=normalize_obs, log_std_init=0.5)
    sharpen(agent)
    with torch.no_grad():
        agent.log_std += torch.randn(shape)
    if normalize_obs:
        seen = sample(space, 50)
        seen[:, 0] = 3  # always, so that anything else is clipped
        agent.obs_statistics.update(seen)
    policy, obs = ppo.NumpyPolicy(agent), sample(space, 6).astype(space.dtype)
    with torch.no_grad():
        dist = agent.get_dist(torch.as_tensor(obs))
    for constant in (0.0, 1.0, -2.0):
        rng = types.SimpleNamespace(standard_normal=partial(np.full, fill_value=constant))
        expected = dist.mean + constant * dist.variance.sqrt()
        np.testing.assert_allclose(policy.sample(obs, rng), expected.numpy(), rtol=1e-5, atol=1e-5)
    draws = policy.sample(np.repeat(obs[:1], 300, 0), np.random.default_rng(0))
    assert draws.shape == (300, *shape)
    noise = (draws - dist.mean[0].numpy()) / dist.variance[0].sqrt().numpy()
    assert np.abs(noise.mean(0)).max() < 4 / 300**0.5 and np.abs(noise.std(0) - 1).max() < 4 / 600**0.5


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()], ids=str)
def test_running_statistics_are_those_of_all_batches_together(shape):
    statistics, rng = ppo.RunningStatistics(shape), np.random.default_rng(0)
    batches = [rng.normal(100 * size, size, (size, *shape)).astype(np.float32) for size in (1, 7, 400, 2, 33)]
    for batch in (*batches[:3], *map(torch.as_tensor, batches[3:])):
        statistics.update(batch)
    everything = np.concatenate(batches).astype(np.float64)
    assert statistics.count == len(everything)
    np.testing.assert_allclose(statistics.mean.numpy(), everything.mean(0), rtol=1e-10)
    np.testing.assert_allclose(statistics.var.numpy(), everything.var(0), rtol=1e-10)


def test_without_torchrun_an_average_over_processes_is_left_alone_and_the_only_item_is_gathered():
    mean = torch.tensor([1.5, -2.0])
    assert ppo.average_over_processes(mean, 7) == 7
    assert mean.tolist() == [1.5, -2]
    assert ppo.gather([1, 2]) == [[1, 2]]


@pytest.mark.parametrize("space", [FLAT, RAM, CHW], ids=str)
def test_normalized_observations_are_standardized_and_clipped_to_10(space):
    agent, seen = make_agent(space, normalize_obs=True), sample(space, 50)
    agent.encoder = torch.nn.Flatten()
    seen[:, 0] = 3  # never changes
    seen[:, 1] = seen[:, 1] > 0  # and so small that others are far from it
    agent.obs_statistics.update(seen)
    obs = sample(space, 6).astype(space.dtype)
    obs[:, 0] = 3
    obs[:2, 1] = 200
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.nan_to_num((obs - seen.mean(0, dtype=float)) / seen.std(0, dtype=float)).clip(-10, 10)
    assert expected.max() == 10 and np.abs(expected).min() == 0
    features = agent.encode(torch.as_tensor(obs))
    np.testing.assert_allclose(features.numpy(), expected.reshape(6, -1), rtol=1e-5, atol=1e-5)


def test_running_statistics_are_saved_with_the_weights():
    agent, other = (make_agent(FLAT, seed=seed, normalize_obs=True, normalize_reward=True) for seed in (0, 1))
    agent.obs_statistics.update(sample(FLAT, 50))
    agent.return_statistics.update(np.array([1.0, 2, 6]))
    other.load_state_dict(agent.state_dict())
    obs = torch.as_tensor(sample(FLAT, 3))
    assert_close(other.get_value(obs), agent.get_value(obs), rtol=0, atol=0)
    assert (other.return_statistics.count, other.return_statistics.mean) == (3, 3)
    assert other.return_statistics.var.item() == pytest.approx(14 / 3)


@pytest.mark.parametrize("kind", ["discrete", "box", "images"])
def test_theta_is_all_parameters_and_its_gradient_all_of_theirs_in_the_same_places(run, monkeypatch, kind):
    images = Box(0, 255, (2, 40, 40), np.uint8)

    def make_env():
        env = Clock(length=5, action_space=Box(-1, 1, (2, 2)) if kind == "box" else None)
        if kind == "images":
            env = gym.wrappers.TransformObservation(env, lambda obs: np.full((2, 40, 40), obs[0], np.uint8), images)
        return env

    losses, places, grad, step = [], [], torch.autograd.grad, torch.optim.Adam.step

    def spy_on_grad(loss, parameters, **flags):
        losses.append(loss)
        return grad(loss, parameters, retain_graph=True, **flags)

    def spy_on_step(self):
        (theta,) = self.param_groups[0]["params"]
        parameters = list(agents[0].parameters())
        losses[-1].backward()  # sets the gradient of each parameter, wherever it lies
        for parameter in parameters:
            start = (parameter.data_ptr() - theta.data_ptr()) // theta.element_size()
            places.append((start, start + parameter.numel()))
            if len(losses) == 1:
                assert torch.equal(theta[slice(*places[-1])], initial.pop(0))
            expected = torch.zeros(3) if parameter is agents[0].unused else parameter.grad.flatten()
            assert torch.equal(theta.grad[slice(*places[-1])], expected)
            parameter.grad = None
        assert sorted(places)[0][0] == 0 and sum(p.numel() for p in parameters) == len(theta)
        assert len({start for start, _ in places}) == len(parameters)
        return step(self)

    agents, initial, init = [], [], ppo.Agent.__init__

    def spy_on_init(self, *args):
        init(self, *args)
        self.unused = torch.nn.Parameter(torch.ones(3))  # of no part of the loss: its gradient is 0
        agents.append(self)
        initial.extend(parameter.detach().flatten().clone() for parameter in self.parameters())

    monkeypatch.setattr(ppo.Agent, "__init__", spy_on_init)
    monkeypatch.setattr(torch.autograd, "grad", spy_on_grad)
    monkeypatch.setattr(torch.optim.Adam, "step", spy_on_step)
    run(register(make_env), max_grad_norm=math.inf, total_timesteps=32)
    assert losses


@pytest.mark.parametrize("space", [FLAT, CHW], ids=str)
def test_layers_are_orthogonal_with_their_gains(space):
    agent = make_agent(space)
    gains = {}
    for name, module in agent.named_modules():
        if hasattr(module, "weight"):
            singular_values = torch.linalg.svdvals(module.weight.detach().flatten(1))
            assert_close(singular_values, singular_values[0].expand_as(singular_values), rtol=1e-4, atol=1e-6)
            assert (module.bias == 0).all()
            gains[name] = round(singular_values[0].item(), 4)
    actor, critic = ("actor", "critic") if space is CHW else ("actor.4", "critic.4")
    assert (gains.pop(actor), gains.pop(critic)) == (0.01, 1)
    assert set(gains.values()) == {1.4142}
    assert len(gains) == 4


def test_the_standard_deviation_does_not_depend_on_the_state_and_starts_where_the_flag_says():
    agent = make_agent(FLAT, Box(-1, 1, (3,)), log_std_init=-1.5)
    assert_close(agent.get_dist(torch.randn(7, 5)).variance.sqrt(), torch.full((7, 3), math.exp(-1.5)))
    assert any(p is agent.log_std for p in agent.parameters())
    assert_close(make_agent(FLAT, Box(-1, 1, (3,)), log_std_init=-1).log_std, torch.full((3,), -1.0))


# Learning.


def final_return(capsys):
    return float(re.search(r"return (\S+),", capsys.readouterr().out)[1])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_default_flags_solve_cartpole(seed, tmp_path, capsys):
    agent = ppo.train(ppo.Args(seed=seed, run_dir=str(tmp_path / "run")))
    assert final_return(capsys) >= 475
    envs = ppo.make_envs(ppo.Args(num_envs=20))
    obs, _ = envs.reset(seed=12345)
    policy, rng = ppo.NumpyPolicy(agent), np.random.default_rng(0)
    returns = np.zeros(20)  # of the first episode of each environment
    while not returns.all():
        obs, _, _, _, infos = envs.step(policy.sample(obs, rng))
        if "episode" in infos:
            returns = np.where(infos["_episode"] & (returns == 0), infos["episode"]["r"], returns)
    assert returns.mean() >= 450


@pytest.mark.slow
def test_pendulum_is_learned_with_continuous_actions(run, capsys):
    _, rows = run(
        "Pendulum-v1",
        num_envs=16,
        num_steps=64,
        total_timesteps=80_000,
        gamma=0.9,
        gae_lambda=0.95,
        learning_rate=2e-3,
        update_epochs=10,
        num_minibatches=8,
        normalize_reward=True,
    )
    assert float(next(row["episodic_return"] for row in rows if row["episodic_return"])) < -900
    assert final_return(capsys) > -300


def test_half_cheetah_runs_with_every_normalization(run):
    pytest.importorskip("mujoco")
    flags = {
        "num_steps": 64,
        "total_timesteps": 256,
        "normalize_obs": True,
        "normalize_reward": True,
        "clip_reward": 10.0,
    }
    agent, rows = run("HalfCheetah-v5", **flags)
    assert len(rows) == 2
    assert agent.obs_statistics.count == agent.return_statistics.count == 256
    assert all(torch.isfinite(weight).all() for weight in agent.state_dict().values())


def test_pong_runs_from_stacked_images(run):
    pytest.importorskip("ale_py")
    agent, rows = run("ALE/Pong-v5", total_timesteps=32, clip_reward=1.0)
    assert len(rows) == 2
    assert np.isfinite([column(rows, name) for name in ("policy_loss", "value_loss", "entropy", "approx_kl")]).all()
    assert agent.obs_shape == (4, 84, 84)


def test_atari_takes_the_largest_seed(run):
    pytest.importorskip("ale_py")
    run("ALE/Pong-v5", total_timesteps=16, seed=2**31 - 1)


@pytest.mark.slow
def test_atari_rewards_and_scores_are_raw():
    pytest.importorskip("ale_py")
    envs = ppo.make_envs(ppo.Args("ALE/MsPacman-v5", num_envs=4, clip_reward=1.0))
    envs.action_space.seed(0)
    envs.reset(seed=0)
    rewards, returns = [], []
    for _ in range(800):
        _, reward, _, _, infos = envs.step(envs.action_space.sample())
        rewards.append(reward)
        if "episode" in infos:
            returns += infos["episode"]["r"][infos["_episode"]].tolist()
    envs.close()
    assert np.max(rewards) >= 10
    assert returns and min(returns) >= 10
