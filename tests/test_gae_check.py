"""gae_check.py: the proof can fail, each mistake is called by its name, and nobody who is right is accused."""

import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gae_check  # noqa: E402
from gae_check import Args, compute_gae, judge  # noqa: E402


def verdict(function, name="f", given=(), **args):
    return judge(function, name, dict(given), Args(**args))


def with_parameters(function, names, optional=()):
    """A function of **arguments that says it takes these parameters."""
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, kind, default=0.5 if n in optional else inspect.Parameter.empty) for n in names]

    def wrapper(**arguments):
        return function(**arguments)

    wrapper.__signature__ = inspect.Signature(parameters)
    return wrapper


# The golden numbers.


@pytest.mark.parametrize(
    "terminated, truncated, expected",
    [(False, True, [0.875, 1.5]), (True, False, [0.0, -2.0]), (True, True, [0.0, -2.0])],
)
def test_golden_next_step_rollout(terminated, truncated, expected):
    rewards, values = np.array([1.0, 1, 0, 1, 1]), np.array([2.0, 3, 7, 4, 6, 5])
    terminations, dones = np.zeros(5, bool), np.zeros(5, bool)
    terminations[1], dones[1] = terminated, terminated or truncated
    advantages = compute_gae(rewards, values[:-1], values[1:], terminations, dones, 0.5, 0.5)
    assert np.allclose(advantages[[0, 1, 3, 4]], expected + [-0.625, -2.5], atol=1e-12, rtol=0)


def test_golden_terminal_reward_at_lambda_0():
    values, ends = np.array([0.3, 0.95]), np.array([False, True])
    advantages = compute_gae(np.array([0.0, 1.0]), values, np.array([0.95, 7.0]), ends, ends, 0.99, 0.0)
    assert np.allclose(advantages + values, [0.9405, 1.0], atol=1e-12, rtol=0)


AFTER_STEP_8 = [476.2875687, 382.102678, 290.476, 192]


@pytest.mark.parametrize(
    "terminated, expected",
    [
        ([3, 7, 11], [457.83447, 374.114269, 288.298, 196, 465.5610193, 378.1084735, 289.387, 194]),
        ([11], [457.010879, 373.2385742, 287.366905, 195.01, 463.9138373, 376.3570838, 287.52481, 192.02]),
    ],
)
def test_golden_three_episodes(terminated, expected):
    rewards = np.array([101.0, 102, 103, 200, 104, 105, 106, 201, 107, 108, 109, 202])
    values = np.array([-3.0, 2, 3, 4, -1, 5, 6, 7, -2, 8, 9, 10])
    steps = np.arange(12)
    terminations, dones = np.isin(steps, terminated), np.isin(steps, [3, 7, 11])
    advantages = compute_gae(rewards, values, np.roll(values, -1), terminations, dones, 0.99, 0.95)
    assert np.allclose(advantages, expected + AFTER_STEP_8, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "gae_lambda, expected",
    [(1.0, [3, 2, 1, 0, -4.9]), (0.7, [2.2899, 1.73, 1, 0, -4.9]), (0.4, [1.7256, 1.46, 1, 0, -4.9])],
)
def test_golden_lambdas(gae_lambda, expected):
    values, ends = np.array([-3.0, -2, -1, 0, 5, -1]), np.array([False, False, False, True, False])
    rewards = np.array([0.0, 0, 0, 0, 1])
    assert np.allclose(compute_gae(rewards, values[:-1], values[1:], ends, ends, 0.9, gae_lambda), expected, atol=1e-4)


def test_nan_after_a_termination_does_not_leak():
    ends, values = np.array([False, True, False]), np.ones(3)
    assert np.isfinite(compute_gae(np.ones(3), values, np.array([1, np.nan, 1]), ends, ends, 0.9, 0.9)).all()


def test_against_exact_fractions():
    """The definition in rational arithmetic, written out for one environment."""
    rng = np.random.default_rng(0)
    gamma, gae_lambda = Fraction(7, 8), Fraction(3, 4)
    for _ in range(20):
        rewards, values, next_values = rng.integers(-9, 10, (3, 7))
        terminations = rng.random(7) < 0.2
        dones = terminations | (rng.random(7) < 0.2)
        expected = []
        for t in range(7):
            total, weight = Fraction(0), Fraction(1)
            for k in range(t, 7):
                successor = 0 if terminations[k] else int(next_values[k])
                total += weight * (int(rewards[k]) + gamma * successor - int(values[k]))
                weight *= gamma * gae_lambda
                if dones[k]:
                    break
            expected.append(float(total))
        arguments = (rewards.astype(float), values.astype(float), next_values.astype(float), terminations, dones)
        assert np.allclose(compute_gae(*arguments, float(gamma), float(gae_lambda)), expected, atol=1e-12, rtol=0)


# Published implementations.


def random_arrays(seed, num_steps=16, num_envs=4):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, num_steps, num_envs))
    terminations = rng.random((num_steps, num_envs)) < 0.15
    return rewards, values, next_values, terminations, terminations | (rng.random((num_steps, num_envs)) < 0.15)


def test_agrees_with_torchrl():
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    torch = pytest.importorskip("torch")
    for seed in range(10):
        rewards, values, next_values, terminations, dones = arrays = random_arrays(seed)
        tensors = (torch.as_tensor(array) for array in (values, next_values, rewards, dones, terminations))
        theirs, targets = functional.generalized_advantage_estimate(0.97, 0.9, *tensors)
        ours = compute_gae(*arrays, 0.97, 0.9)
        assert np.allclose(ours, theirs.numpy(), atol=1e-5)  # it multiplies the masks in float32
        assert np.allclose(ours + values, targets.numpy(), atol=1e-5)
    assert verdict(functional.generalized_advantage_estimate)["verdict"] == "correct"


def test_agrees_with_stable_baselines3():
    buffers = pytest.importorskip("stable_baselines3.common.buffers")
    torch, gym = pytest.importorskip("torch"), pytest.importorskip("gymnasium")
    space = gym.spaces.Box(-1, 1, (1,))
    rewards, values, next_values, terminations, dones = random_arrays(0)
    buffer = buffers.RolloutBuffer(16, space, space, device="cpu", gae_lambda=0.9, gamma=0.97, n_envs=4)
    # It has one flag, and puts the bootstrap of a truncated step into the reward. Where no episode ended, V(s_{t+1}) is
    # the next row of values.
    next_values = np.where(dones, next_values, np.concatenate([values[1:], next_values[-1:]]))
    buffer.rewards[:] = rewards + 0.97 * next_values * (dones & ~terminations)
    buffer.values[:], buffer.episode_starts[1:] = values, dones[:-1]
    buffer.compute_returns_and_advantage(torch.as_tensor(next_values[-1]), dones[-1])
    ours = compute_gae(rewards, values, next_values, terminations, dones, 0.97, 0.9)
    assert np.allclose(buffer.advantages, ours, atol=1e-5)
    assert np.allclose(buffer.returns, ours + values, atol=1e-5)


# The proof.


def loop_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda, bug=None):
    """GAE as people write it, and with one of their mistakes in it. It shares nothing with gae_check.py."""
    num_steps = len(rewards)
    terminations, dones = np.asarray(terminations, bool), np.asarray(dones, bool)
    advantages, advantage = np.zeros(np.shape(rewards)), 0.0
    steps = range(num_steps) if bug == "forward" else reversed(range(num_steps))
    for t in steps:
        if bug == "last step" and t == num_steps - 1:
            continue
        reward, value, next_value, termination, done = rewards[t], values[t], next_values[t], terminations[t], dones[t]
        discount, trace = gamma, gamma * gae_lambda
        if bug == "truncation":
            termination = done
        elif bug == "V(s_t)":
            next_value = np.where(done & ~termination, value, next_value)
        elif bug == "V(s_t) everywhere":
            next_value = value
        elif bug == "next episode":
            next_value = values[t + 1] if t + 1 < num_steps else next_value
        elif bug == "past termination":
            termination = termination & False
        elif bug == "not cut":
            done = done & False
        elif bug == "not cut at truncation":
            done = termination
        elif bug == "ignored":
            termination, done = termination & False, done & False
        elif bug == "early":
            termination, done = (f[t + 1] if t + 1 < num_steps else f[t] for f in (terminations, dones))
        elif bug == "late":
            termination, done = (f[t - 1] if t else f[t] & False for f in (terminations, dones))
        elif bug == "inverted":
            termination, done = ~termination, ~done
        elif bug == "dropped" and (done & ~termination).any():
            truncation = done & ~termination
            reward, next_value = np.where(truncation, value, reward), np.where(truncation, 0, next_value)
        elif bug == "last termination" and t == num_steps - 1:
            termination = termination & False
        elif bug == "no bootstrap" and t == num_steps - 1:
            next_value = 0.0 * next_value
        elif bug == "no lambda":
            trace = gamma
        elif bug == "no gamma":
            trace = gae_lambda
        elif bug == "neither":
            trace = 1.0
        elif bug == "squared":
            trace = gamma * gae_lambda**2
        elif bug == "no trace":
            trace = 0.0
        elif bug == "both squared":
            trace = (gamma * gae_lambda) ** 2
        elif bug == "complement":
            trace = gamma - gamma * gae_lambda
        elif bug == "swapped":
            discount = gae_lambda
        elif bug == "no gamma in delta":
            discount = 1.0
        elif bug == "lambda in delta":
            discount = gamma * gae_lambda
        elif bug == "fixed":
            discount, trace = 0.99, 0.99 * gae_lambda
        elif bug == "another fixed":
            discount = 0.98
        elif bug == "another fixed everywhere":
            discount, trace = 0.995, 0.995 * gae_lambda
        elif bug == "another lambda":
            trace = gamma * 0.97
        elif bug == "gamma on reward":
            reward = gamma * np.asarray(reward)
        elif bug == "always V(s_T)":
            next_value = next_values[-1]
        elif bug == "wraps" and t == num_steps - 1:
            next_value = values[0]
        elif bug == "twice" and t == num_steps - 1:
            reward = reward + gamma * np.where(termination, 0.0, next_value)
        elif bug == "twice at truncation":
            reward = reward + gamma * np.where(done & ~termination, next_value, 0.0)
        elif bug == "flags swapped":
            termination = done & ~termination
        elif bug == "flags exchanged":
            termination, done = done, termination
        elif bug == "done reward dropped":
            reward, termination = np.where(done, 0.0, reward), done
        elif bug == "terminated is 0":
            reward = np.where(termination, value, reward)
        elif bug == "done is 0":
            reward, next_value = np.where(done, value, reward), np.where(done, 0.0, next_value)
        elif bug == "reward dropped":
            reward = np.where(termination, 0.0, reward)
        elif bug == "last flag" and t == num_steps - 1:
            termination = terminations[t - 1]
        elif bug == "V(s_{t+1}) for V(s_t)":
            value = next_value
        elif bug == "clipped rewards":
            reward = np.clip(reward, -1, 1)
        elif bug == "sign of rewards":
            reward = np.sign(reward)
        elif bug == "no baseline at termination":
            value = np.where(termination, 0.0, value)
        elif bug == "plus V(s_t)":
            value = -np.asarray(value)
        elif bug == "minus V(s_{t+1})":
            next_value = -np.asarray(next_value)
        elif bug == "lambda-return from 0" and t == num_steps - 1:
            next_value = np.where(done, 1.0, 1.0 - gae_lambda) * next_value
        elif bug == "no gamma at truncation":
            next_value = np.where(done & ~termination, 1 / gamma, 1.0) * next_value
        elif bug == "normalised rewards":
            reward = ((rewards - np.mean(rewards)) / (np.std(rewards) + 1e-8))[t]
        elif bug == "no baseline":
            value = 0.0 * value
        elif bug == "reward early":
            reward = rewards[t + 1] if t + 1 < num_steps else 0.0 * reward
        elif bug == "reward late":
            reward = rewards[t - 1] if t else 0.0 * reward
        delta = np.asarray(reward) + discount * np.where(termination, 0.0, next_value) - np.asarray(value)
        first = discount if bug == "next return" else trace  # as r + gamma G' - V does it, where G' is of lambda
        advantages[t] = delta + first * np.where(done, 0.0, advantage)
        advantage = delta + trace * np.where(done, 0.0, advantage)
    if bug == "normalised":
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    zero = np.zeros_like(advantages[:1])
    return {
        "sign": -advantages,
        "nothing stored": 0.0 * advantages,
        "reversed": advantages[::-1],
        "first step": np.concatenate([zero, advantages[1:]]),
        "exponents from 1": gamma * gae_lambda * advantages,
        "1 - lambda": advantages - gae_lambda * advantages,
        "without mean": advantages - advantages.mean(),
        "by deviation": advantages / (advantages.std() + 1e-8),
        "clipped": np.clip(advantages, -1, 1),
        "clipped at 5": np.clip(advantages, -5, 5),
        "clipped at 10": np.clip(advantages, -10, 10),
        "gamma once more": gamma * advantages,
        "integers": np.trunc(advantages),
        "half precision": advantages.astype(np.float16).astype(float),
        "one array": np.stack([advantages[0]] * num_steps),
        "a step early": np.concatenate([advantages[1:], zero]),
        "a step late": np.concatenate([zero, advantages[:-1]]),
    }.get(bug, advantages)


NAMES = {
    "truncation": "truncation treated as termination",
    "V(s_t)": "bootstraps from V(s_t)",
    "V(s_t) everywhere": "bootstraps from V(s_t)",
    "next episode": "bootstraps from the next episode's first state",
    "past termination": "bootstraps past a termination",
    "not cut": "the sum is not cut at the end of an episode",
    "not cut at truncation": "the sum is not cut at a truncation",
    "ignored": "the ends of episodes are ignored",
    "early": "done flag one step early",
    "late": "done flag one step late",
    "inverted": "done flag inverted",
    "dropped": "a truncated step gets the advantage 0",
    "no bootstrap": "no bootstrap at the end of the rollout",
    "last step": "the last step is left out",
    "last termination": "the last step's termination is ignored",
    "no lambda": "lambda missing in the trace",
    "no gamma": "gamma missing in the trace",
    "neither": "gamma and lambda missing in the trace",
    "squared": "gamma or lambda squared in the trace",
    "no trace": "no trace, only the TD error",
    "next return": "the TD error with the next lambda-return for V(s_{t+1})",
    "swapped": "gamma and lambda swapped",
    "no gamma in delta": "gamma missing in delta",
    "lambda in delta": "lambda in delta",
    "fixed": "gamma or lambda fixed inside",
    "no baseline at termination": "V(s_t) is not subtracted at a terminated step",
    "plus V(s_t)": "a sign is wrong in delta",
    "minus V(s_{t+1})": "a sign is wrong in delta",
    "lambda-return from 0": "the lambda-return starts from 0",
    "no gamma at truncation": "gamma missing in delta",
    "normalised rewards": "rewards normalised inside",
    "nothing stored": "all advantages are 0",
    "no baseline": "the baseline V(s_t) is not subtracted",
    "reward early": "reward one step early",
    "reward late": "reward one step late",
    "normalised": "advantages normalised inside",
    "both squared": "gamma or lambda squared in the trace",
    "complement": "1 - lambda in the trace",
    "another fixed": "gamma or lambda fixed inside",
    "gamma on reward": "gamma multiplies the reward",
    "always V(s_T)": "bootstraps every step from V(s_T)",
    "wraps": "bootstraps the last step from V(s_0)",
    "twice": "the bootstrap counts twice",
    "twice at truncation": "the bootstrap counts twice",
    "flags swapped": "terminations and truncations swapped",
    "terminated is 0": "a terminated step gets the advantage 0",
    "done is 0": "the last step of every episode gets the advantage 0",
    "reward dropped": "the reward of a terminated step is dropped",
    "last flag": "done flag one step late",
    "V(s_{t+1}) for V(s_t)": "V(s_{t+1}) is subtracted for V(s_t)",
    "clipped rewards": "numbers are clipped inside",
    "sign of rewards": "numbers are clipped inside",
    "clipped": "numbers are clipped inside",
    "clipped at 5": "numbers are clipped inside",
    "clipped at 10": "numbers are clipped inside",
    "gamma once more": "gamma or lambda multiplies delta_t",
    "another fixed everywhere": "gamma or lambda fixed inside",
    "another lambda": "gamma or lambda fixed inside",
    "flags exchanged": "terminations and truncations swapped",
    "done reward dropped": "the reward of a terminated step is dropped",
    "first step": "the first step is left out",
    "exponents from 1": "gamma or lambda multiplies delta_t",
    "1 - lambda": "1 - lambda multiplies the sum",
    "without mean": "advantages normalised inside",
    "by deviation": "advantages normalised inside",
    "integers": "the advantages are rounded",
    "half precision": "the advantages are rounded",
    "one array": "every step gets the advantage of the first",
    "a step early": "the advantages are a step early or late",
    "a step late": "the advantages are a step early or late",
    "sign": "the sign is reversed",
    "reversed": "the advantages come out in reverse",
    "forward": "the loop runs forward",
}


def test_the_identities_hold():
    for seed in range(3):
        errors = gae_check.prove(seed)
        assert len(errors) == 7
        assert max(errors.values()) < 1e-12


@pytest.fixture(scope="module")
def errors_with_bugs():
    """{bug: {identity: largest error}}."""
    errors = {}
    with pytest.MonkeyPatch.context() as patch:
        for bug in NAMES:
            patch.setattr(gae_check, "compute_gae", lambda *arguments, bug=bug: loop_gae(*arguments, bug=bug))
            errors[bug] = gae_check.prove(1)
    return errors


@pytest.mark.parametrize("bug", NAMES)
def test_the_proof_fails_for_every_bug(bug, errors_with_bugs):
    assert max(errors_with_bugs[bug].values()) > 1e-3


@pytest.mark.parametrize("identity", gae_check.prove(1))
def test_every_identity_can_fail(identity, errors_with_bugs):
    """One that no bug breaks would prove nothing."""
    assert max(errors[identity] for errors in errors_with_bugs.values()) > 1e-3


def test_a_failed_proof_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(gae_check, "__file__", "/nowhere/gae_check.py")
    assert gae_check.main([]) == 0
    monkeypatch.setattr(gae_check, "compute_gae", lambda *arguments: loop_gae(*arguments, bug="no lambda"))
    assert gae_check.main([]) == 1


# The signatures: each is another way to hand a rollout over to the same loop, with or without a bug in it.


def flag(array):
    return np.asarray(array) > 0.5


def next_row(values, last):
    return np.concatenate([np.asarray(values)[1:], np.asarray(last)[None]])


def full(rewards, values, next_values, terminations, dones, gamma, gae_lambda, bug=None):
    return loop_gae(rewards, values, next_values, flag(terminations), flag(dones), gamma, gae_lambda, bug)


def gymnasium_flags(r, v, next_values, terminated, truncated, gamma, lam, bug=None):
    return loop_gae(r, v, next_values, flag(terminated), flag(terminated) | flag(truncated), gamma, lam, bug)


def two_flags_long_values(rewards, values, dones, truncated, gamma, lambda_, bug=None):
    dones = flag(dones)
    return loop_gae(rewards, values[:-1], values[1:], dones & ~flag(truncated), dones, gamma, lambda_, bug)


def textbook(rewards, values, next_value, dones, gamma=0.99, lambda_=0.95, bug=None):
    return loop_gae(rewards, values, next_row(values, next_value), flag(dones), flag(dones), gamma, lambda_, bug)


def long_values_masks(rewards, values, masks, gamma, tau, bug=None):
    return loop_gae(rewards, values[:-1], values[1:], ~flag(masks), ~flag(masks), gamma, tau, bug)


def kostrikov(rewards, value_preds, next_value, masks, gamma, gae_lambda, bug=None):
    masks = flag(masks)
    assert len(masks) == len(rewards) + 1
    next_values = next_row(value_preds, next_value)
    return loop_gae(rewards, value_preds, next_values, ~masks[1:], ~masks[1:], gamma, gae_lambda, bug)


def cleanrl(rewards, values, dones, next_value, next_done, gamma, gae_lambda, bug=None):
    dones = np.concatenate([flag(dones)[1:], flag(next_done)[None]])
    return loop_gae(rewards, values, next_row(values, next_value), dones, dones, gamma, gae_lambda, bug)


def stable_baselines(rewards, values, episode_starts, last_values, dones, gamma, gae_lambda, bug=None):
    return cleanrl(rewards, values, episode_starts, last_values, dones, gamma, gae_lambda, bug)


def time_limits_only(rewards, values, next_values, truncations, gamma, lam, bug=None):
    return loop_gae(rewards, values, next_values, flag(truncations) & False, flag(truncations), gamma, lam, bug)


def spinning_up(rews, vals, last_val, gamma, lam, bug=None):
    no = np.zeros(np.shape(rews), bool)
    return loop_gae(rews, vals, next_row(vals, last_val), no, no, gamma, lam, bug)


def per_step_discounts(r_t, discount_t, lambda_, values, bug=None):
    gamma = np.max(discount_t) or 0.5
    return loop_gae(r_t, values[:-1], values[1:], ~flag(discount_t), ~flag(discount_t), gamma, lambda_, bug)


def parameters_of(signature):
    return [name for name in inspect.signature(signature).parameters if name != "bug"]


TWO_FLAGS = [full, gymnasium_flags, two_flags_long_values]
ONE_FLAG = [textbook, long_values_masks, kostrikov, cleanrl, stable_baselines]
SIGNATURES = [*TWO_FLAGS, *ONE_FLAG, time_limits_only, spinning_up, per_step_discounts]
NEEDS_TWO_FLAGS = ["truncation", "V(s_t)", "not cut at truncation", "dropped", "twice at truncation", "flags swapped"]
NEEDS_TWO_FLAGS += ["flags exchanged", "done is 0", "done reward dropped", "no gamma at truncation"]
NEEDS_NEXT_VALUES = ["next episode", "past termination"]
ANYWHERE = [bug for bug in NAMES if bug not in NEEDS_TWO_FLAGS + NEEDS_NEXT_VALUES]


@pytest.mark.parametrize("signature", SIGNATURES)
def test_a_correct_function_passes_in_every_signature(signature):
    report = verdict(signature)
    assert report["verdict"] == "correct", report
    told = " ".join(report["notes"])
    assert ("flag cannot tell" in told) == (signature in [*ONE_FLAG, time_limits_only, per_step_discounts])
    assert ("NEXT_STEP" in told) == (signature is two_flags_long_values)
    assert ("without a done flag" in told) == (signature is spinning_up)


CASES = [
    *itertools.product(NEEDS_TWO_FLAGS, TWO_FLAGS),
    *itertools.product(NEEDS_NEXT_VALUES, [full, gymnasium_flags]),
    *itertools.product(ANYWHERE, [full, two_flags_long_values, textbook, kostrikov, cleanrl]),
    *itertools.product(["no lambda", "forward", "normalised", "no bootstrap"], SIGNATURES),
]


@pytest.mark.parametrize(
    "bug, signature, with_returns",
    [(*case, False) for case in dict.fromkeys(CASES)] + [(bug, cleanrl, True) for bug in ANYWHERE],
)
def test_every_mistake_is_recognised_by_name(bug, signature, with_returns):
    def mutant(**arguments):
        advantages = signature(**arguments, bug=bug)
        values = np.asarray(next(arguments[n] for n in ("values", "v", "value_preds", "vals") if n in arguments))
        return (advantages, advantages + values[: len(advantages)]) if with_returns else advantages

    report = verdict(with_parameters(mutant, parameters_of(signature)))
    assert (report["verdict"], report["mistake"]) == ("mistake", NAMES[bug])
    assert report["cure"]
    assert abs(report["expected"] - report["got"]) > 1e-4


def test_every_listed_mistake_has_a_mutant():
    assert {name for name, _, _ in gae_check.MISTAKES} == set(NAMES.values())


def test_bootstrapping_from_the_next_episode_with_one_flag():
    """Without a mask on the value, what comes after a termination is the next episode's first state."""

    def bootstrapped(rewards, values, next_value, dones, gamma, lam):
        deltas = rewards + gamma * next_row(values, next_value) - values
        return recursion(deltas, gamma * lam * (1.0 - dones))

    def with_starts(rewards, values, episode_starts, last_values, dones, gamma, lam):
        return bootstrapped(rewards, values, last_values, next_row(episode_starts, dones), gamma, lam)

    def long_values(r, v, d, gamma, lam):
        return bootstrapped(r, v[:-1], v[-1], d, gamma, lam)

    for function in (bootstrapped, with_starts, long_values):
        assert verdict(function)["mistake"] == "bootstraps from the next episode's first state"


def test_no_mask_at_all():
    def next_row_for_all(rewards, values, next_value, dones, gamma, lam):
        deltas = rewards + gamma * next_row(values, next_value) - values
        return recursion(deltas, np.full_like(deltas, gamma * lam))

    def though_it_knows_all(rewards, values, next_values, terminated, truncated, gamma, lam):
        return next_row_for_all(rewards, values, next_values[-1], truncated, gamma, lam)

    for function in (next_row_for_all, though_it_knows_all):
        assert verdict(function)["mistake"] == "the ends of episodes are ignored"


def test_two_mistakes_at_once():
    def both(rewards, values, next_values, terminated, truncated, gamma, lam):
        dones = flag(terminated) | flag(truncated)
        return loop_gae(rewards, values, next_values, dones, dones, gamma, 1.0)

    def both_discounts(rewards, values, next_values, terminated, truncated, gamma, lam):
        dones = flag(terminated) | flag(truncated)
        deltas = rewards + np.where(flag(terminated), 0.0, next_values) - values
        return recursion(deltas, gamma * (1.0 - dones))

    assert verdict(both)["mistake"] == "truncation treated as termination and lambda missing in the trace"
    assert verdict(both_discounts)["mistake"] == "lambda missing in the trace and gamma missing in delta"


def to_go(rewards, dones, gamma):
    return recursion(np.asarray(rewards), gamma * (1.0 - dones))


RETURNS = {
    "the returns are advantages + next values": lambda r, v, n, d, a, g: a + n,
    "the returns are the advantages": lambda r, v, n, d, a, g: a,
    "the returns are advantages + rewards": lambda r, v, n, d, a, g: a + r,
    "the returns are normalised advantages + values": lambda r, v, n, d, a, g: (a - a.mean()) / (a.std() + 1e-8) + v,
    "the returns have no bootstrap": lambda r, v, n, d, a, g: to_go(r, d, g),
    "the returns run on into the next episode": lambda r, v, n, d, a, g: to_go(r, 0 * d, g),
}


@pytest.mark.parametrize("mistake", RETURNS)
def test_returns_from_the_wrong_values(mistake):
    def with_next_values(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        advantages = loop_gae(rewards, values, next_values, flag(terminations), flag(dones), gamma, gae_lambda)
        return advantages, RETURNS[mistake](rewards, values, next_values, flag(dones), advantages, gamma)

    def with_bootstrap(rewards, values, last_value, dones, gamma, lam):
        advantages = textbook(rewards, values, last_value, dones, gamma, lam)
        next_values = next_row(values, last_value)
        return RETURNS[mistake](rewards, values, next_values, flag(dones), advantages, gamma), advantages

    assert verdict(with_next_values)["mistake"] == mistake
    assert verdict(with_bootstrap)["mistake"] == mistake.replace("next values", "the next row of values")


def test_what_may_be_returned():
    def lambda_returns(rewards, values, next_value, dones, gamma, lam):
        return textbook(rewards, values, next_value, dones, gamma, lam) + values

    def returns_first(rewards, values, next_value, dones, gamma, lam):
        advantages = textbook(rewards, values, next_value, dones, gamma, lam)
        return advantages + values, advantages

    def monte_carlo(rewards, values, next_value, dones, gamma, lam):
        advantages, to_the_end = (textbook(rewards, values, next_value, dones, gamma, k) for k in (lam, 1.0))
        return advantages, to_the_end + values

    assert verdict(lambda_returns, "f.py:compute_gae")["notes"][0] == "it returns lambda-returns"
    assert verdict(lambda_returns, "f.py:compute_advantages")["mistake"] == "lambda-returns are returned for advantages"
    assert verdict(returns_first)["notes"][0] == "it returns lambda-returns, advantages"
    assert verdict(monte_carlo)["notes"][0] == "it returns advantages, Monte Carlo returns"


# Nobody who is right is accused.

ALIASES = {
    "rewards": ["rewards", "reward", "r", "rews", "rewards_list", "batch_rewards"],
    "values": ["values", "v", "vals", "value_preds", "state_values"],
    "next_values": ["next_values", "next_state_values", "v_next"],
    "bootstrap": ["next_value", "last_value", "last_values", "bootstrap", "last_val", "bootstrap_value"],
    "terminations": ["terminations", "terminated", "terminateds", "terminals"],
    "truncations": ["truncations", "truncated", "truncateds", "timeouts"],
    "dones": ["dones", "done", "d"],
    "masks": ["masks", "mask", "nonterminals", "not_done"],
    "gamma": ["gamma", "discount", "discount_factor"],
    "gae_lambda": ["lam", "lambda_", "gae_lambda", "tau", "lmbda"],
}
ONE_OR_NO_FLAG = [["dones"], ["masks"], ["terminations"], ["truncations"], []]
BOTH_FLAGS = [["terminations", other] for other in ("dones", "truncations", "masks")] + [["dones", "truncations"]]


def recursion(deltas, decay):
    out, a = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        out[t] = a = deltas[t] + decay[t] * a
    return out


def definition(deltas, decay):
    weights = [np.cumprod(np.concatenate([np.ones_like(decay[:1]), decay[t:-1]]), axis=0) for t in range(len(deltas))]
    return np.stack([(w * deltas[t:]).sum(0) for t, w in enumerate(weights)])


def growing_list(deltas, decay):
    out = []
    for delta, d in zip(deltas[::-1], decay[::-1], strict=True):
        out.insert(0, delta + d * (out[0] if out else 0))
    return np.stack(out)


def in_container(container, one_env, outputs):
    if container == "torch":
        import torch

        return tuple(torch.as_tensor(np.array(o), dtype=torch.float32) for o in outputs)
    if container == "list":
        return tuple(o.tolist() if one_env else list(o) for o in outputs)
    return tuple(o.astype(np.float32) for o in outputs)


@st.composite
def correct_functions(draw):
    flags = draw(st.sampled_from(ONE_OR_NO_FLAG + BOTH_FLAGS))
    source = draw(st.sampled_from(["next_values", "bootstrap", "long values"]))
    roles = ["rewards", "values", *flags, "gamma", "gae_lambda"] + [source] * (source != "long values")
    names = {role: draw(st.sampled_from(ALIASES[role])) for role in roles}
    order = draw(st.permutations(list(names.values())))
    optional = [names[role] for role in ("gamma", "gae_lambda") if draw(st.booleans())]
    estimate = draw(st.sampled_from([recursion, definition, growing_list]))
    container = draw(st.sampled_from(["numpy", "list", "torch"]))
    one_env, returned = draw(st.booleans()), draw(st.sampled_from(["a", "ar", "ra", "r"]))

    def function(**arguments):
        given_types = {type(arguments[names["rewards"]]).__name__}
        if given_types != {{"numpy": "ndarray", "list": "list", "torch": "Tensor"}[container]}:
            raise TypeError(f"a {container} is wanted")
        x = {role: np.array([np.asarray(row) for row in arguments[name]]) if isinstance(arguments[name], list)
             else np.asarray(arguments[name]) for role, name in names.items()}  # fmt: skip
        if (x["rewards"].ndim == 1) != one_env:
            raise ValueError("wrong number of dimensions")
        values = x["values"]
        if len(values) != len(x["rewards"]) + (source == "long values"):
            raise IndexError("wrong number of rows")
        rows = values[: len(x["rewards"])]
        next_values = {"next_values": lambda: x["next_values"], "long values": lambda: values[1:],
                       "bootstrap": lambda: next_row(values, x["bootstrap"])}[source]()  # fmt: skip
        no = np.zeros(x["rewards"].shape, bool)
        terminated, truncated = (flag(x[role]) if role in x else no for role in ("terminations", "truncations"))
        done = flag(x["dones"]) if "dones" in x else ~flag(x["masks"]) if "masks" in x else terminated | truncated
        if "terminations" not in x:
            terminated = done & ~truncated
        deltas = x["rewards"] + float(x["gamma"]) * np.where(terminated, 0.0, next_values) - rows
        a = estimate(deltas, np.where(done, 0.0, float(x["gamma"]) * float(x["gae_lambda"])))
        outputs = in_container(container, one_env, [{"a": a, "r": a + rows}[letter] for letter in returned])
        return outputs if len(outputs) == 2 else outputs[0]

    function = with_parameters(function, order, optional)
    function.description = f"{order}, {container}, one_env {one_env}, {source}, returns {returned}, {estimate.__name__}"
    return function


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(function=correct_functions(), seed=st.integers(0, 2**16))
def test_a_correct_function_is_never_accused(function, seed):
    report = verdict(function, seed=seed)
    assert report["verdict"] == "correct", f"{function.description}: {report}"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(bug=st.sampled_from(sorted(NAMES)), seed=st.integers(0, 2**16))
def test_a_name_does_not_depend_on_luck(bug, seed):
    def mutant(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        return full(rewards, values, next_values, terminations, dones, gamma, gae_lambda, bug)

    assert verdict(mutant, seed=seed)["mistake"] == NAMES[bug]


# The conventions of well-known code, each written here in its shape.


def test_bad_masks_that_drop_the_truncated_step():
    torch = pytest.importorskip("torch")

    def returns(rewards, value_preds, masks, bad_masks, gamma, gae_lambda):
        out, a = torch.zeros_like(rewards), 0
        for t in reversed(range(rewards.size(0))):
            delta = rewards[t] + gamma * value_preds[t + 1] * masks[t + 1] - value_preds[t]
            a = (delta + gamma * gae_lambda * masks[t + 1] * a) * bad_masks[t + 1]
            out[t] = a + value_preds[t]
        return out

    assert verdict(returns)["mistake"] == "a truncated step gets the advantage 0"


def test_lists_that_grow():
    def gae(next_value, rewards, masks, values, gamma=0.99, tau=0.95):
        values, a, out = values + [next_value], 0, []
        for t in reversed(range(len(rewards))):
            a = rewards[t] + gamma * values[t + 1] * masks[t] - values[t] + gamma * tau * masks[t] * a
            out.insert(0, a + values[t])
        return out

    report = verdict(gae)
    assert report["verdict"] == "correct" and "lists" in report["called_with"]


def test_tensors_with_boolean_flags_and_a_wide_bootstrap():
    torch = pytest.importorskip("torch")

    def gae(rewards, values, terminated, truncated, next_value, gamma, lam):
        values = torch.cat([values, next_value])
        out, a = torch.zeros_like(rewards), torch.zeros(rewards.shape[1])
        for t in reversed(range(len(rewards))):
            delta = rewards[t] + gamma * values[t + 1] * ~terminated[t] - values[t]
            out[t] = a = delta + gamma * lam * ~(terminated[t] | truncated[t]) * a
        return out

    assert verdict(gae)["verdict"] == "correct"


def test_tensors_whose_flags_are_numbers():
    torch = pytest.importorskip("torch")

    def gae(rewards, values, dones, next_value, next_done, gamma, gae_lambda):
        advantages, advantage = torch.zeros_like(rewards), 0
        for t in reversed(range(len(rewards))):
            is_last = t == len(rewards) - 1
            goes_on, value = (1 - next_done, next_value) if is_last else (1 - dones[t + 1], values[t + 1])
            delta = rewards[t] + gamma * value * goes_on - values[t]
            advantages[t] = advantage = delta + gamma * gae_lambda * goes_on * advantage
        return advantages, advantages + values

    assert verdict(gae)["verdict"] == "correct"


def test_episode_starts_beside_terminations():
    def gae(rewards, values, next_values, terminated, episode_starts, last_done, gamma, lam):
        dones = flag(next_row(episode_starts, last_done))
        return loop_gae(rewards, values, next_values, flag(terminated), dones, gamma, lam)

    assert verdict(gae)["verdict"] == "correct"


def test_done_may_mean_terminated_beside_truncated():
    def gae(rewards, values, next_values, done, truncated, gamma, lam):
        return loop_gae(rewards, values, next_values, flag(done), flag(done) | flag(truncated), gamma, lam)

    report = verdict(gae)
    assert report["verdict"] == "correct" and "must be the terminations alone" in " ".join(report["notes"])


def test_next_value_may_have_a_row_for_every_step():
    def gae(rewards, values, next_value, dones, gamma, lam):
        deltas = rewards + gamma * next_value * (1 - dones) - values
        return recursion(deltas, gamma * lam * (1 - dones))

    assert verdict(gae)["verdict"] == "correct"


def test_one_whole_episode_without_flags_and_bootstrap():
    def gae(rewards, values, gamma, lam):
        deltas = rewards + gamma * np.concatenate([values[1:], np.zeros_like(values[:1])]) - values
        return recursion(deltas, np.full_like(deltas, gamma * lam))

    report = verdict(gae)
    assert report["verdict"] == "correct" and "terminates, and for no other" in " ".join(report["notes"])


def test_episode_starts_without_the_last_done():
    def gae(rew, new, vpred, nextvpred, gamma, lam):
        goes_on = 1.0 - np.concatenate([new[1:], np.zeros_like(new[:1])])
        return recursion(rew + gamma * next_row(vpred, nextvpred) * goes_on - vpred, gamma * lam * goes_on)

    assert verdict(gae)["verdict"] == "correct"


def test_environments_first():
    def gae(rewards, values, last_value, dones, gamma, lam):
        advantages, advantage = np.zeros(rewards.shape), 0.0
        for t in reversed(range(rewards.shape[1])):
            next_value = last_value if t == rewards.shape[1] - 1 else values[:, t + 1]
            delta = rewards[:, t] + gamma * next_value * (1 - dones[:, t]) - values[:, t]
            advantages[:, t] = advantage = delta + gamma * lam * (1 - dones[:, t]) * advantage
        return advantages

    report = verdict(gae)
    assert report["verdict"] == "correct" and "(N, T)" in report["called_with"]


def test_right_for_one_environment_only():
    def gae(rewards, values, last_value, dones, gamma, lam):
        """Episode by episode, as Spinning Up does: of (T, N), it takes the indices of the flat array for times."""
        deltas = rewards + gamma * next_row(values, last_value) * (1 - dones) - values
        parts = np.split(deltas, np.flatnonzero(dones) + 1)
        return np.concatenate([recursion(part, np.full_like(part, gamma * lam)) for part in parts if len(part)])

    report = verdict(gae)
    assert report["verdict"] == "correct" and report["notes"][0] == "on (T, N) it is wrong without an error"
    assert gae_check.describe(report).startswith("f: correct on (T,)\n")


@pytest.mark.parametrize("numbers", ["advantages", "lambda-returns"])
def test_environments_that_are_mixed(numbers):
    """Right for one environment, as one has nothing to be mixed with."""

    def any_done(rewards, values, last_value, dones, gamma, lam):
        deltas = rewards + gamma * next_row(values, last_value) * (1 - dones) - values
        goes_on = np.array([0.0 if np.any(row) else 1.0 for row in dones])
        advantages = recursion(deltas, gamma * lam * goes_on.reshape(-1, *[1] * (rewards.ndim - 1)))
        return advantages + values * (numbers == "lambda-returns")

    report = verdict(any_done)
    assert (report["verdict"], report["mistake"]) == ("mistake", "environments are mixed")
    x = report["rollout"]
    assert np.shape(x["rewards"])[1] == 2 and report["expected"] == x["expected"][report["t"]][report["env"]]


def test_next_values_are_no_bootstrap_where_they_work():
    def next_row_at_a_truncation(rewards, values, next_values, terminated, truncated, gamma, lam):
        last = next_values[-1] if np.ndim(next_values) == np.ndim(rewards) else next_values
        dones = flag(terminated) | flag(truncated)
        return loop_gae(rewards, values, next_row(values, last), flag(terminated), dones, gamma, lam)

    assert verdict(next_row_at_a_truncation)["mistake"] == "bootstraps from the next episode's first state"


def test_what_t_rows_and_t_plus_1_rows_can_both_mean():
    def one_episode(rewards, values, gamma, lam):
        advantages, advantage = np.zeros_like(rewards), 0.0
        for t in reversed(range(len(rewards))):
            next_value = values[t + 1] if t < len(rewards) - 1 else 0.0
            advantages[t] = advantage = rewards[t] + gamma * next_value - values[t] + gamma * lam * advantage
        return advantages

    def starts(rewards, values, episode_starts, next_value, gamma, lam):
        goes_on = np.ones_like(rewards)
        goes_on[:-1] = 1.0 - np.asarray(episode_starts)[1 : len(rewards)]
        return recursion(rewards + gamma * next_row(values, next_value) * goes_on - values, gamma * lam * goes_on)

    assert "terminates, and for no other" in " ".join(verdict(one_episode)["notes"])
    report = verdict(starts)
    assert report["verdict"] == "correct" and "not told whether the last step" in " ".join(report["notes"])


def test_discounts_beside_gamma_are_masks():
    def gae(rewards, discounts, values, gamma, lam):
        deltas = rewards + gamma * discounts * values[1:] - values[:-1]
        return recursion(deltas, gamma * discounts * lam)

    assert verdict(gae)["verdict"] == "correct"


def test_lambda_returns_need_no_values():
    def lambda_returns(rewards, next_values, terminated, truncated, gamma, lam):
        returns, future = np.zeros_like(rewards), next_values[-1]
        for t in reversed(range(len(rewards))):
            future = np.where(flag(truncated)[t], next_values[t], (1 - lam) * next_values[t] + lam * future)
            returns[t] = future = rewards[t] + gamma * np.where(flag(terminated)[t], 0.0, future)
        return returns

    report = verdict(lambda_returns)
    assert report["verdict"] == "correct" and "it returns lambda-returns" in report["notes"]


def test_wrong_returns_are_compared_with_returns():
    def next_row_added(rewards, values, last_value, dones, gamma, lam):
        return textbook(rewards, values, last_value, dones, gamma, lam) + next_row(values, last_value)

    def in_reverse(rewards, values, last_value, dones, gamma, lam):
        return (textbook(rewards, values, last_value, dones, gamma, lam) + values)[::-1]

    def lambda_cubed(rewards, values, last_value, dones, gamma, lam):
        deltas = rewards + gamma * next_row(values, last_value) * (1 - dones) - values
        return recursion(deltas, gamma * lam**3 * (1 - dones)) + values

    assert verdict(next_row_added)["mistake"] == "the returns are advantages + the next row of values"
    assert verdict(in_reverse)["mistake"] == "the advantages come out in reverse"
    report = verdict(lambda_cubed)
    assert report["verdict"] == "unknown mistake" and "its returns" in report["mistake"]
    assert report["notes"] == ["expected and got are lambda-returns"]


def one_episode(rewards, values, last_value, last_done, gamma, lam):
    """Its one flag tells whether the last step has ended the episode."""
    no = np.zeros(np.shape(rewards), bool)
    last_value = last_value * (1 - np.asarray(last_done, float))
    return loop_gae(rewards, values, next_row(values, last_value), no, no, gamma, lam)


def test_a_flag_of_the_last_step_alone():
    def ignored(rewards, values, last_value, last_done, gamma, lam):
        return one_episode(rewards, values, last_value, 0 * last_done, gamma, lam)

    def wrong_way_round(rewards, values, last_value, last_done, gamma, lam):
        return one_episode(rewards, values, last_value, 1 - last_done, gamma, lam)

    report = verdict(one_episode)
    assert report["verdict"] == "correct" and report["notes"][0].startswith("within one episode")
    assert verdict(ignored)["mistake"] == "bootstraps past a termination"
    assert verdict(wrong_way_round)["mistake"] == "done flag inverted"


def test_masks_may_be_of_t_rows_or_of_t_plus_1():
    def masks_of_t_rows(rewards, value_preds, next_value, masks, gamma, gae_lambda):
        deltas = [rewards[t] + gamma * value_preds[t + 1] * masks[t] - value_preds[t] for t in range(len(rewards))]
        return recursion(np.array(deltas), gamma * gae_lambda * masks[: len(rewards)])

    report = verdict(masks_of_t_rows)
    assert report["verdict"] == "correct" and "masks of T + 1 rows" in report["notes"][-1]
    assert "masks of T + 1 rows" not in " ".join(verdict(kostrikov)["notes"])


def test_what_only_some_flags_or_long_rollouts_show_is_noted():
    def takes_the_type_of_dones(rewards, values, next_value, dones, gamma, lam):
        advantages = np.zeros_like(dones)
        advantages[:] = textbook(rewards, values, next_value, dones, gamma, lam)
        return advantages

    def stops_early(rewards, values, next_value, dones, gamma, lam):
        advantages = textbook(rewards, values, next_value, dones, gamma, lam)
        advantages[512:] = 0.0
        return advantages

    report = verdict(takes_the_type_of_dones)
    assert report["verdict"] == "correct" and "flags that are booleans" in report["notes"][-1]
    report = verdict(stops_early)
    assert report["verdict"] == "correct" and "a rollout of 1,024 steps" in report["notes"][-1]


def test_a_function_that_fails_after_some_calls_is_judged_all_the_same():
    calls = []

    def tires(rewards, values, next_value, dones, gamma, lam):
        calls.append(None)
        if len(calls) > 7:
            raise RuntimeError("tired")
        return textbook(rewards, values, next_value, dones, gamma, lam)

    report = verdict(tires)
    assert report["verdict"] == "correct" and "goes wrong with" in report["notes"][-1]


def test_a_result_that_is_squeezed_is_noted():
    def squeezed(rewards, values, last_value, dones, gamma, lam):
        return textbook(rewards, values, last_value, dones, gamma, lam).squeeze()

    assert "goes wrong with a rollout of one step; one environment" in " ".join(verdict(squeezed)["notes"])


def test_what_is_returned_comes_before_what_is_raised_for_other_containers():
    def as_dict(rewards, values, last_value, dones, gamma, lam):
        return {"advantages": rewards.detach()}  # an array has no detach

    assert "returns a dict" in verdict(as_dict)["mistake"]


def test_two_parameters_of_one_meaning_are_asked_for():
    def baselines(mb_rewards, mb_values, mb_dones, last_values, dones, gamma, lam):
        raise AssertionError("is not called")

    with pytest.raises(gae_check.UsageError, match=r"what is meant by .*dones \(dones\)"):
        verdict(baselines)


def test_rewards_are_asked_for_even_beside_next_values():
    def gae(values, next_values, dones, gamma, lam):
        raise AssertionError("is not called")

    with pytest.raises(gae_check.UsageError, match="are the rewards"):
        verdict(gae)


def test_monte_carlo_returns_in_spite_of_a_lambda():
    def returns(rewards, values, last_value, dones, gamma, lam):
        deltas = rewards + gamma * next_row(values, last_value) * (1 - dones) - values
        return recursion(deltas, gamma * (1 - dones)) + values

    assert verdict(returns)["cure"] == "subtract the values; A_{t+1} is multiplied by gamma lambda (1 - done)"


def test_fixed_discounts_are_asked_for():
    def gae(rewards, values, next_value, dones):
        return textbook(rewards, values, next_value, dones, 0.9, 0.8)

    assert verdict(gae, gamma=0.9, gae_lambda=0.8)["verdict"] == "correct"
    report = verdict(gae)
    assert report["verdict"] != "correct"
    assert "(--gamma)" in report["notes"][0] and "(--gae-lambda)" in report["notes"][1]


def test_notes_on_what_it_does_not_stand():
    def fragile(rewards, values, next_value, dones, gamma, lam):
        advantages = np.zeros_like(rewards)
        a, rewards[-1] = 0.0, rewards[-1] + gamma * next_value * (1 - dones[-1])
        for t in reversed(range(len(rewards))):
            next_v = values[t + 1] * (1 - dones[t]) if t + 1 < len(values) else 0.0
            advantages[t] = a = rewards[t] + gamma * next_v - values[t] + gamma * lam * (1 - dones[t]) * a
        return advantages

    def truncation_wins(rewards, values, next_values, terminated, truncated, gamma, lam):
        ends = flag(terminated) & ~flag(truncated)
        return loop_gae(rewards, values, next_values, ends, flag(terminated) | flag(truncated), gamma, lam)

    notes = " ".join(verdict(fragile)["notes"])
    assert "writes to its input rewards" in notes and "integer rewards" in notes
    assert "both terminated and truncated" in " ".join(verdict(truncation_wins)["notes"])
    assert not verdict(compute_gae)["notes"]


@pytest.mark.parametrize("values, bootstrap", [("vf", "last_r"), ("values", "final_value")])
def test_names_that_other_libraries_use_are_known(values, bootstrap):
    def gae(rewards, dones, gamma, lam, **named):
        deltas = rewards + gamma * next_row(named[values], named[bootstrap]) * (1 - dones) - named[values]
        return recursion(deltas, gamma * lam * (1 - dones))

    names = ["rewards", values, "dones", bootstrap, "gamma", "lam"]
    assert verdict(with_parameters(gae, names))["verdict"] == "correct"


def test_a_flag_of_the_step_before_the_rollout_is_not_used():
    def rolled(rewards, values, episode_starts, last_value, gamma, lam):
        mask = 1 - np.roll(episode_starts, -1, axis=0)
        return recursion(rewards + gamma * next_row(values, last_value) * mask - values, gamma * lam * mask)

    def first_cut(rewards, values, dones, next_value, next_done, gamma, lam):
        mask = 1 - next_row(dones, next_done)
        a = recursion(rewards + gamma * next_row(values, next_value) * mask - values, gamma * lam * mask)
        return a * (1 - np.concatenate([dones[:1], np.zeros_like(dones[1:])]))

    def late(rewards, values, dones, next_value, next_done, gamma, lam):
        mask = 1 - np.concatenate([dones[:-1], next_done[None]])
        return recursion(rewards + gamma * next_row(values, next_value) * mask - values, gamma * lam * mask)

    def ended(rewards, values, episode_starts, last_value, gamma, lam):
        mask = 1 - np.append(episode_starts[1:], np.ones_like(episode_starts[:1]), axis=0)[: len(rewards)]
        return recursion(rewards + gamma * next_row(values, last_value) * mask - values, gamma * lam * mask)

    def going_on(rewards, values, episode_starts, last_value, gamma, lam):
        mask = 1 - np.append(episode_starts[1:], np.zeros_like(episode_starts[:1]), axis=0)[: len(rewards)]
        return recursion(rewards + gamma * next_row(values, last_value) * mask - values, gamma * lam * mask)

    wrong = "given T rows of episode starts, it is wrong without an error: no bootstrap at the end of the rollout"
    assert wrong in verdict(ended)["notes"]
    assert "given T rows of episode starts, it is right if the last step ends no episode" in verdict(going_on)["notes"]
    report = verdict(first_cut)
    assert report["verdict"] == "unknown mistake"
    assert "begins an episode" in gae_check.describe(report) and "right is A_t = delta_t" in gae_check.describe(report)
    assert verdict(rolled)["mistake"] == "the last step's termination is ignored"
    assert verdict(late)["mistake"] == "done flag one step late"


# What cannot be judged, or has no name.


def test_an_unknown_mistake_comes_with_the_smallest_rollout():
    def cubed_trace(rewards, values, next_value, dones, gamma, lam):
        decay = (gamma * lam) ** 3 * (1 - dones)
        return recursion(rewards + gamma * next_row(values, next_value) * (1 - dones) - values, decay)

    report = verdict(cubed_trace)
    assert (report["verdict"], report["cure"]) == ("unknown mistake", None)
    x = report["rollout"]
    assert np.shape(x["rewards"]) == (2, 1) and not np.any(x["dones"])  # a trace needs two steps, and no more
    assert (report["t"], report["env"]) == (0, 0)
    arrays = [np.array(x[key]) for key in ("rewards", "values", "next_values")]
    deltas = (arrays[0] + 0.5 * arrays[2] - arrays[1][:-1])[:, 0]
    assert report["expected"] == pytest.approx(deltas[0] + 0.4 * deltas[1])
    assert report["got"] == pytest.approx(deltas[0] + 0.064 * deltas[1])
    assert (arrays[0] == arrays[0].round()).all() and arrays[0].max() < 10


def test_an_unknown_mistake_is_shown_in_the_layout_in_which_most_is_right():
    def cubed_trace(rewards, values, next_values, terminated, truncated, gamma, lam):
        if rewards.ndim == 1:
            raise ValueError("(N, T) is wanted")
        deltas = rewards + gamma * next_values * (1 - terminated) - values
        return recursion(deltas.T, gamma * lam**3 * (1 - np.maximum(terminated, truncated)).T).T

    report = verdict(cubed_trace)
    assert report["verdict"] == "unknown mistake" and "(N, T)" in report["called_with"]
    assert np.shape(report["rollout"]["rewards"]) == (2, 1)


def test_an_error_says_which_shapes_were_tried():
    def flat_only(rewards, values, next_value, dones, gamma, lam):
        num_steps, num_envs, one = rewards.shape

    report = verdict(flat_only)
    assert report["verdict"] == "error" and "wrap it in a function of yours" in report["notes"][0]


def test_a_mistake_between_environments_needs_two_of_them():
    def mixing(rewards, values, next_value, dones, gamma, lam):
        advantages = textbook(rewards, values, next_value, dones, gamma, lam)
        if advantages.ndim == 1:
            raise ValueError("(T, N) is wanted")
        return advantages + 1e-2 * (rewards[:, :1] - rewards)

    report = verdict(mixing)
    assert report["mistake"] == "environments are mixed" and report["env"] == 1
    assert np.shape(report["rollout"]["rewards"]) == (1, 2)


def test_an_environment_that_begins_with_the_sum_of_another():
    def environment_by_environment(rewards, values, next_value, dones, gamma, lam):
        num_steps, num_envs = rewards.shape
        deltas = rewards + gamma * next_row(values, next_value) * (1 - dones) - values
        a, advantages = 0.0, np.zeros_like(deltas)
        for env in range(num_envs):
            for t in reversed(range(num_steps)):
                a = advantages[t, env] = deltas[t, env] + gamma * lam * (1 - dones[t, env]) * a
        return advantages

    def joined(rewards, values, next_value, dones, gamma, lam):
        num_steps, num_envs = rewards.shape
        deltas = rewards + gamma * next_row(values, next_value) * (1 - dones) - values
        return recursion(deltas.ravel(), gamma * lam * (1 - dones).ravel()).reshape(rewards.shape)

    def flags_added_up(rewards, values, next_values, terminated, truncated, gamma, lam):
        deltas = rewards + gamma * next_values * (1 - terminated) - values
        return recursion(deltas, gamma * lam * ((1 - terminated) + (1 - truncated)))

    assert verdict(environment_by_environment)["mistake"] == "environments are mixed"
    assert verdict(joined)["mistake"] == "environments are mixed"
    report = verdict(flags_added_up)  # which mixes them only if it is handed (N, T)
    assert report["verdict"] == "unknown mistake" and report["layout"] != "(N, T)"


@pytest.mark.parametrize(
    "change",
    [
        lambda a, deltas, trace: np.clip(a, -10, 10),
        lambda a, deltas, trace: np.stack([recursion(deltas[t : t + 16], trace[t : t + 16])[0] for t in range(len(a))]),
        lambda a, deltas, trace: np.stack([recursion(deltas[t : t + 64], trace[t : t + 64])[0] for t in range(len(a))]),
        lambda a, deltas, trace: np.concatenate([a[:100], 0 * a[100:]]),
    ],
    ids=["clips large numbers", "looks 16 steps ahead", "looks 64 steps ahead", "ends after 100 steps"],
)
def test_what_only_large_numbers_or_long_rollouts_show_is_a_mistake(change):
    def gae(rewards, values, next_value, dones, gamma, lam):
        deltas = rewards + gamma * next_row(values, next_value) * (1 - dones) - values
        trace = gamma * lam * (1 - dones)
        return change(recursion(deltas, trace), deltas, trace)

    report = verdict(gae)
    assert report["verdict"] in ("mistake", "unknown mistake")
    assert len(gae_check.describe(report).splitlines()) < 20  # of a long rollout, it shows what is near


def test_numbers_that_depend_on_chance_or_on_earlier_calls():
    rng, carried = np.random.default_rng(0), [0.0]

    def noisy(rewards, values, next_value, dones, gamma, lam):
        return textbook(rewards, values, next_value, dones, gamma, lam) + 0.01 * rng.normal(size=rewards.shape)

    def carries_over(rewards, values, next_value, dones, gamma, lam):
        advantages = textbook(rewards, values, next_value, dones, gamma, lam)
        advantages[-1] += carried[0] * (1 - dones[-1])
        carried[0] += 1.0
        return advantages

    for function in (noisy, carries_over):
        report = verdict(function)
        assert report["verdict"] == "error" and "once more" in report["mistake"]


def test_a_buffer_that_is_used_again_is_no_mistake():
    buffer = np.zeros((4096, 3))

    def in_place(rewards, values, next_value, dones, gamma, lam):
        rows = buffer[: len(rewards), : rewards.shape[1]]
        rows[:] = textbook(rewards, values, next_value, dones, gamma, lam)
        return rows

    assert verdict(in_place)["verdict"] == "correct"


def test_a_change_in_the_number_of_results_is_said():
    def gae(rewards, values, next_value, dones, gamma, lam):
        advantages = textbook(rewards, values, next_value, dones, gamma, lam)
        return (advantages, advantages + values) if len(rewards) < 100 else advantages

    numbers, num_rollouts = itertools.count(), 2 * len(gae_check.ROLLOUTS)

    def of_one_environment(rewards, values, next_value, dones, gamma, lam):
        assert rewards.ndim == 1
        advantages = textbook(rewards, values, next_value, dones, gamma, lam)
        return (advantages, advantages + values) if next(numbers) % 2 else advantages

    def at_the_repetition(rewards, values, next_value, dones, gamma, lam):
        advantages = textbook(rewards, values, next_value, dones, gamma, lam)
        return advantages if next(numbers) % (num_rollouts + 1) == num_rollouts else (advantages, advantages + values)

    for function in (gae, of_one_environment, at_the_repetition):
        numbers = itertools.count()
        report = verdict(function)
        assert report["verdict"] == "error" and "one result at times" in report["mistake"]


def test_a_pair_of_a_wrong_shape_is_told_so():
    def gae(rewards, values, next_value, dones, gamma, lam):  # its rollouts have 9 steps, whatever it gets
        advantages = textbook(rewards[:9], values[:9], next_value, dones[:9], gamma, lam)
        return advantages, advantages + values[:9]

    report = verdict(gae)
    assert report["verdict"] == "error" and "shape" in report["mistake"], report["mistake"]


def test_gamma_1_is_tried():
    def effective(rewards, values, next_value, dones, gamma, lam):
        return textbook(rewards, values, next_value, dones, min(gamma, 0.99), lam)

    assert "it goes wrong with gamma 1" in verdict(effective)["notes"][-1]


def test_fixed_discounts_of_a_function_that_takes_none_are_asked_for():
    def gae(rewards, values, next_value, dones):
        return textbook(rewards, values, next_value, dones, 0.98, 0.95)

    assert "--gamma" in verdict(gae)["cure"] and verdict(gae, gamma=0.98)["verdict"] == "correct"


def test_half_precision_of_torch_is_read():
    torch = pytest.importorskip("torch")

    def gae(rewards, values, next_value, dones, gamma, lam):
        advantages = textbook(*map(np.asarray, (rewards, values, next_value, dones)), gamma, lam)
        return torch.as_tensor(advantages).bfloat16()

    assert verdict(gae)["verdict"] == "unknown mistake"  # NumPy has no such numbers: they were an error


def test_parameters_without_a_keyword():
    def gae(rewards, values, next_value, dones, /, γ, λ):  # noqa: PLC2401
        return textbook(rewards, values, next_value, dones, γ, λ)

    assert verdict(gae)["verdict"] == "correct"


def test_what_is_left_at_its_default_is_named():
    def gae(rewards, values, next_value, dones, gamma, lam, over=None):
        return textbook(rewards, values, next_value, dones if over is None else over, gamma, lam)

    report = verdict(gae)
    assert report["verdict"] == "correct" and "left at its default, so not judged: over" in report["notes"][0]
    assert verdict(gae, given=[("over", "truncations")])["verdict"] != "correct"


def test_a_flag_with_is_before_its_name_is_passed():
    def inverted(rewards, values, gamma, lam, next_value, is_done=None):
        return textbook(rewards, values, next_value, 0 * rewards if is_done is None else 1 - is_done, gamma, lam)

    assert verdict(inverted)["mistake"] == "done flag inverted"


@pytest.mark.parametrize("name, default", [("mask", None), ("first", None), ("first", True), ("end", None)])
def test_an_optional_flag_may_mean_another_thing_beside_one_that_tells_the_same(name, default):
    """Such as a mask of padding beside dones; dones themselves must be passed even if they could be left out."""
    text = """def gae(rewards, values, next_value, dones, gamma, lam, {}={}):
        advantages = textbook(rewards, values, next_value, {}, gamma, lam)
        return advantages if {} is {} else 0.5 * advantages"""
    names = {"textbook": textbook}
    exec(text.format(name, default, "dones", name, default), names)
    report = verdict(names["gae"])
    assert report["verdict"] == "correct" and f"left at its default, so not judged: {name}" in " ".join(report["notes"])
    assert (f"given {name}, too, it is wrong" in report["notes"]) == (name == "mask")
    exec(text.format(name, default, "0 * dones", name, default), names)
    assert verdict(names["gae"])["verdict"] != "correct"


@pytest.mark.parametrize("name", ["dones", "terminated"])
def test_an_only_flag_is_passed_even_if_optional(name):
    def gae(rewards, values, next_value, gamma, lam, flag=None):
        return textbook(rewards, values, next_value, 0 * rewards, gamma, lam)

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = list(inspect.signature(gae).parameters.values())[:-1]
    parameters.append(inspect.Parameter(name, kind, default=None))

    def renamed(*args, **kwargs):
        return gae(*args, **{"flag" if key == name else key: value for key, value in kwargs.items()})

    renamed.__signature__ = inspect.Signature(parameters)
    assert verdict(renamed)["mistake"] == "the ends of episodes are ignored"


def test_all_unknown_parameters_are_asked_for_at_once():
    def gae(rewards, values, this, that, gamma, lam):
        raise AssertionError("is not called")

    with pytest.raises(gae_check.UsageError, match="meant by this, that.*--map this=ROLE --map that=ROLE"):
        verdict(gae)


def test_whole_episodes_that_are_zipped():
    """T + 1 values are out of step with T rewards, without an error: it is for T."""

    def gae(rewards, values, dones, gamma, lam):
        advantages, advantage, next_value = [], 0.0, 0.0
        for reward, value, done in zip(rewards[::-1], values[::-1], dones[::-1]):
            advantage = reward + gamma * next_value * (1 - done) - value + gamma * lam * (1 - done) * advantage
            advantages.append(advantage)
            next_value = value
        return advantages[::-1]

    report = verdict(gae)
    assert report["mistake"] == "no bootstrap at the end of the rollout" and "unless it always" in report["cure"]


@pytest.mark.parametrize(
    "nonsense",
    [lambda rewards, **_: rewards, lambda values, **_: 2 * values, lambda rewards, **_: rewards.cumsum(0)],
)
def test_no_two_mistakes_are_made_up(nonsense):
    """Two at once explain a lot, but not what is no GAE at all."""
    function = with_parameters(nonsense, ["rewards", "values", "next_values", "terminated", "dones", "gamma", "lam"])
    assert verdict(function)["verdict"] == "unknown mistake"


def test_unknown_returns():
    def doubled(rewards, values, next_value, dones, gamma, lam):
        advantages = textbook(rewards, values, next_value, dones, gamma, lam)
        return advantages, 2 * (advantages + values)

    report = verdict(doubled)
    assert report["verdict"] == "unknown mistake" and "its returns" in report["mistake"]
    assert report["got"] == pytest.approx(2 * report["expected"])


@pytest.mark.parametrize(
    "body, message",
    [
        (lambda rewards, **_: rewards / undefined, "NameError"),  # noqa: F821
        (lambda rewards, **_: rewards[:-1], "returns the shape (8, 3) for rewards of the shape (9, 3)"),
        (lambda rewards, **_: rewards.sum(), "returns the shape ()"),
        (lambda rewards, **_: None, "returns a NoneType"),
        (lambda rewards, **_: "text", "returns a str"),
        (lambda rewards, **_: {"advantages": rewards}, "returns a dict"),
        (lambda rewards, **_: sys.exit(), "raises SystemExit"),
        (lambda rewards, **_: rewards * np.nan, "not finite"),
    ],
)
def test_what_cannot_be_judged_is_said(body, message):
    report = verdict(with_parameters(body, ["rewards", "values", "next_value", "dones", "gamma", "lam"]))
    assert report["verdict"] == "error"
    assert message in report["mistake"]


# Bias and variance.


def test_exact_figures_by_another_formula():
    """The law of total variance, Var A(s) = Var(delta + c m(s')) + c^2 E Var A(s'), summed up as a series."""
    probs, true_values = gae_check.corridor()
    num_states, gamma = gae_check.NUM_STATES, gae_check.GAMMA
    critic = np.append(true_values + gae_check.CRITIC_ERROR, 0.0)
    series = sum(gamma**k * np.linalg.matrix_power(probs[:, :-1], k).sum(1) for k in range(2000))
    assert np.allclose(series, true_values)
    for gae_lambda in (0.0, 0.5, 0.9, 1.0):
        c = gamma * gae_lambda
        powers = [np.linalg.matrix_power(probs[:, :-1], k) for k in range(2000)]
        deltas = 1.0 + gamma * critic[None, :] - critic[:-1, None]
        mean_delta = (probs * deltas).sum(1)
        m = np.append(sum(c**k * power @ mean_delta for k, power in enumerate(powers)), 0.0)
        total = deltas + c * m
        own = 1.0 + (probs * total**2).sum(1) - (probs * total).sum(1) ** 2
        variance = sum(c ** (2 * k) * power @ own for k, power in enumerate(powers))
        bias = critic[:-1] + m[:num_states] - true_values
        assert np.allclose(gae_check.exact_bias_and_variance(probs, true_values, gae_lambda), (bias[0], variance[0]))


def test_lambda_0_and_1_by_hand():
    probs, true_values = gae_check.corridor()
    going_on = probs[0, :-1].sum()
    bias, variance = gae_check.exact_bias_and_variance(probs, true_values, 0.0)
    assert bias == pytest.approx(gae_check.GAMMA * going_on * gae_check.CRITIC_ERROR)
    values = np.append(true_values + gae_check.CRITIC_ERROR, 0.0)
    spread = probs[0] @ values**2 - (probs[0] @ values) ** 2
    assert variance == pytest.approx(1.0 + gae_check.GAMMA**2 * spread)
    assert gae_check.exact_bias_and_variance(probs, true_values, 1.0)[0] == pytest.approx(0.0, abs=1e-12)


def test_sampled_figures_lie_in_their_intervals_as_often_as_they_should():
    inside = []
    for seed in range(60):
        for row in gae_check.bias_variance(seed, num_episodes=2000):
            for exact, _, low, high in (row["squared_bias"], row["variance"]):
                inside.append(low - 1e-9 <= exact <= high + 1e-9)
    assert 0.90 < np.mean(inside) < 0.99


def test_claims_hold_and_can_fail(monkeypatch, capsys):
    assert all(gae_check.claims(gae_check.bias_variance(1)).values())
    assert gae_check.main(["--bias-variance"]) == 0
    exact = gae_check.exact_bias_and_variance
    monkeypatch.setattr(gae_check, "exact_bias_and_variance", lambda *a: (exact(*a)[0], exact(*a)[1] * 1.1))
    assert gae_check.main(["--bias-variance"]) == 1
    monkeypatch.setattr(gae_check, "exact_bias_and_variance", exact)
    monkeypatch.setattr(gae_check, "compute_gae", lambda *a: loop_gae(*a, bug="no lambda"))
    assert gae_check.main(["--bias-variance"]) == 1


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    assert gae_check.main(["--bias-variance", "--plot", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


# The command line, in an empty folder.

GOOD = """
print("noise from the file")
def gae(rewards, values, next_value, dones, gamma, lam):
    import numpy as np
    advantages, advantage = np.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        value = next_value if t == len(rewards) - 1 else values[t + 1]
        delta = rewards[t] + gamma * value * (1 - dones[t]) - values[t]
        advantages[t] = advantage = delta + gamma * lam * (1 - dones[t]) * advantage
    return advantages
"""


@pytest.fixture
def alone(tmp_path):
    """Run the script where nothing else is: alone(arguments...) -> the finished process."""
    shutil.copy(ROOT / "gae_check.py", tmp_path)
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(GOOD.replace("gamma * lam * (1 - dones[t])", "gamma * lam"))
    (tmp_path / "odd.py").write_text(GOOD.replace("rewards", "xs"))
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_there\n")

    def run(*arguments, **environment):
        command = [sys.executable, "gae_check.py", *arguments]
        environment = os.environ | environment
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)

    return run


def test_cli_proof(alone):
    process = alone()
    assert process.returncode == 0 and process.stderr == ""
    assert process.stdout.count("e-1") + process.stdout.count("0.0e+00") == 7
    errors = json.loads(alone("--json").stdout)["errors"]
    assert len(errors) == 7 and max(errors.values()) < 1e-12


@pytest.mark.parametrize("target", ["good.py:gae", "good:gae"])
def test_cli_correct(alone, target):
    process = alone(target)
    assert process.returncode == 0
    assert process.stdout.startswith(f"{target}: correct\n")
    report = json.loads(alone(target, "--json").stdout)  # what the file prints is not in the way
    assert report["verdict"] == "correct" and report["mistake"] is None


def test_cli_file_that_imports_its_neighbour_and_reads_the_command_line(alone, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "neighbour.py").write_text(GOOD)
    (tmp_path / "folder" / "mine.py").write_text("import sys\nfrom neighbour import gae\nassert len(sys.argv) == 1\n")
    assert alone("folder/mine.py:gae").returncode == 0


def test_cli_mistake(alone):
    process = alone("bad.py:gae")
    assert process.returncode == 1
    first, second, third = process.stdout.splitlines()[:3]
    assert first == "bad.py:gae: mistake: the sum is not cut at the end of an episode"
    assert second.startswith("  first at t = 0, env = 0: expected ")
    assert third.startswith("  cure: ")
    process = alone("bad.py:gae", "--json")
    assert process.returncode == 1
    assert set(json.loads(process.stdout)) == {
        "function", "verdict", "mistake", "cure", "t", "env", "expected", "got", "rollout", "called_with", "layout",
        "notes",
    }  # fmt: skip


def test_cli_map(alone):
    process = alone("odd.py:gae")
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("gae_check.py: what is meant by xs? --map xs=ROLE")
    assert alone("odd.py:gae", "--map", "xs=rewards").returncode == 0
    assert alone("odd.py:gae", "--map", "xs=rewards", "--map", "lam=gae_lambda").returncode == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent.py:gae"], "no file absent.py"),
        (["good.py"], "good.py: write path/to/file.py:function"),
        (["good.py:absent"], "good.py has no function absent"),
        (["absent:gae"], "loading it raises ModuleNotFoundError"),
        (["broken.py:gae"], "loading it raises ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        (["good.py:gae", "--map", "absent=rewards"], "parameters: rewards, values"),
        (["good.py:gae", "--map", "lam=absent"], "roles: rewards, values"),
        (["good.py:gae", "--map", "lam"], "--map lam="),
        (["--map", "lam=gae_lambda"], "--map goes with a function"),
        (["--plot", "x.png"], "--plot with --bias-variance"),
        (["good.py:gae", "--bias-variance"], "not together"),
        (["good.py:gae", "--seed", "-1"], "--seed must be at least 0"),
        (["--bias-variance", "--plot", "absent/x.png"], "--plot absent/x.png: "),
    ],
)
def test_cli_usage_errors(alone, arguments, message):
    process = alone(*arguments)
    assert process.returncode == 2 and process.stdout == ""
    assert message in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


def test_cli_unknown_flag_is_a_usage_error(alone):
    assert alone("--no-such-flag").returncode == 2


def test_cli_without_matplotlib(alone, tmp_path):
    (tmp_path / "hidden" / "matplotlib").mkdir(parents=True)
    (tmp_path / "hidden" / "matplotlib" / "__init__.py").write_text("raise ImportError('hidden')")
    process = alone("--bias-variance", "--plot", "x.png", PYTHONPATH=str(tmp_path / "hidden"))
    assert process.returncode == 2
    assert process.stderr == "gae_check.py: --plot needs matplotlib: pip install matplotlib\n"


def test_cli_bias_variance(alone):
    process = alone("--bias-variance", "--json")
    report = json.loads(process.stdout)
    assert process.returncode == 0 and all(report["claims"].values())
    assert [report["rows"][i]["lambda"] for i in (0, -1)] == [0.0, 1.0]


def test_cli_help_warns_that_the_file_is_run(alone):
    assert "RUN" in alone("--help").stdout


def test_the_scripts_beside_it_are_checked(alone, tmp_path):
    source = inspect.getsource(compute_gae)
    (tmp_path / "ppo.py").write_text(f"import a_package_that_is_not_there\n\n\n{source}\n\ndef train():\n    pass\n")
    assert "ppo.py:compute_gae: correct" in alone().stdout
    (tmp_path / "a2c.py").write_text(source.replace("np.where(terminations, ", "np.where(dones, "))
    process = alone()
    assert process.returncode == 1
    assert "a2c.py:compute_gae: mistake: truncation treated as termination" in process.stdout


@pytest.mark.parametrize("script", ["ppo.py", "a2c.py", "a3c.py"])
def test_compute_gae_is_the_same_text_everywhere(script):
    if not (ROOT / script).is_file():
        pytest.skip(f"there is no {script}")
    assert f"\n\n\n{inspect.getsource(compute_gae)}\n\n" in (ROOT / script).read_text()


def test_the_rollouts_are_what_they_say():
    rng = np.random.default_rng(0)
    for next_step in (False, True):
        x = gae_check.make_rollout(rng, rng.normal, ("terminated", "truncated"), next_step, 0.9, 0.8, num_steps=200)
        before = np.concatenate([np.zeros_like(x.dones[:1]), x.dones[:-1]])
        assert (x.resets == (before & next_step)).all() and not (x.resets & x.dones).any()
        assert (x.terminations & ~x.truncations).any() and (x.truncations & ~x.terminations).any()
        same = x.next_values == x.values[1:]
        assert same[~x.dones].all() and (same.all() if next_step else not same[:-1][x.dones[:-1]].any())
        assert not x.rewards[x.resets].any()
        assert (x.values[-1] == x.next_values[-1]).all()


def backward(rewards, values, next_values, cut, trace, discount):
    """A plain backward loop; `cut` (T, ...) multiplies the trace."""
    advantages, advantage = [], 0.0
    for t in reversed(range(len(rewards))):
        advantage = rewards[t] + discount[t] * next_values[t] - values[t] + trace * cut[t] * advantage
        advantages.insert(0, advantage)
    return np.array(advantages)


def test_a_function_that_adds_a_last_value_of_0_is_not_right():
    """NumPy adds 0 to each of T + 1 values; to a list, + appends it."""

    def gae(rewards, values, dones, gamma, lam):
        values = values + [0]
        not_done = [1.0 - done for done in dones]
        return backward(rewards, values, values[1:], not_done, gamma * lam, [gamma * mask for mask in not_done])

    report = verdict(gae)
    assert report["mistake"] == "no bootstrap at the end of the rollout" and "lists" in report["called_with"]
    assert "given T + 1 rows of values, it is right" in report["notes"]


def test_a_function_that_does_without_a_last_value():
    def gae(rewards, values, gamma, lam):
        next_values = [values[t + 1] if t + 1 < len(values) else 0.0 for t in range(len(rewards))]
        ones = np.ones(len(rewards))
        return backward(rewards, values, next_values, ones, gamma * lam, gamma * ones)

    report = verdict(gae)
    assert report["verdict"] == "correct"
    assert "given T rows of values, it is right for an episode that terminates, and for no other" in report["notes"]


def test_a_function_that_knows_no_last_value_is_told_nothing_of_it():
    def gae(rewards, values, gamma, lam):
        ones, next_values = np.ones(len(rewards)), np.concatenate([values[1:], 0.0 * values[:1]])
        return backward(rewards, values, next_values + 0.0 * rewards, ones, gamma * lam, gamma * ones)

    notes = verdict(gae)["notes"]
    assert "without V(s_T) it is right for an episode that terminates, and for no other" in notes
    assert not any("V(s_T) being 0" in note for note in notes)


def test_a_function_that_starts_from_the_last_of_its_values():
    """Right with T + 1; with T, the last step would bootstrap from its own value."""

    def gae(rewards, values, dones, gamma, lam):
        not_done = 1.0 - np.array(dones, float)
        next_values = np.concatenate([values[1 : len(rewards)], values[-1:]])
        return backward(rewards, values, next_values, not_done, gamma * lam, gamma * not_done)

    report = verdict(gae)
    assert report["verdict"] == "correct" and "values of T + 1 rows" in report["called_with"]
    assert "given T rows of values, it is wrong without an error: bootstraps from V(s_t)" in report["notes"]


@pytest.mark.parametrize("right", [True, False])
def test_masks_of_the_step_before(right):
    """torch-ac stores 1 - done with the observation after it, and the last one apart."""

    def gae(rewards, values, masks, next_value, next_mask, gamma, lam):
        after = np.concatenate([masks[1:], [next_mask]]) if right else np.array(masks)
        next_values = np.concatenate([values[1:], [next_value]])
        return backward(rewards, values, next_values, after, gamma * lam, gamma * after)

    report = verdict(gae)
    assert (report["verdict"] == "correct") == right
    note = "it is right if masks[t] is about the end of step t itself: --map masks=not_dones"
    assert (note in report["notes"]) != right
    mapped = verdict(gae, given=[("masks", "masks")])
    assert (mapped["verdict"] == "correct") != right


@pytest.mark.parametrize("ignores_the_last", [False, True])
def test_starts_that_are_used_as_dones(ignores_the_last):
    """That is right if they are dones, and of all steps: else to say so would lead to the next mistake."""

    def gae(rewards, values, episode_starts, next_value, gamma, lam):
        after = 1.0 - np.array(episode_starts, float)[: len(rewards)]
        after[-1] = 1.0 if ignores_the_last else after[-1]
        next_values = np.concatenate([values[1:], [next_value]])
        return backward(rewards, values, next_values, after, gamma * lam, gamma * after)

    report = verdict(gae)
    note = "it is right if episode_starts[t] is about the end of step t itself: --map episode_starts=dones"
    assert report["mistake"] == "done flag one step late" and (note in report["notes"]) != ignores_the_last
    mapped = verdict(gae, given=[("episode_starts", "dones")])
    assert (mapped["verdict"] == "correct") != ignores_the_last


def test_dones_of_their_own_step_beside_the_last_one():
    """Read as starts, they would cut the first step of an episode."""

    def gae(rewards, values, dones, next_value, last_done, gamma, lam):
        not_done = 1.0 - np.array(dones, float)
        next_values = np.concatenate([values[1:], [next_value * (1.0 - last_done)]])
        return backward(rewards, values, next_values, not_done, gamma * lam, gamma * not_done)

    notes = verdict(gae)["notes"]
    assert "it is right if dones[t] is about the end of step t itself: --map dones=dones" in notes
    assert ONE_EPISODE not in notes
    assert verdict(gae, given=[("dones", "dones")])["verdict"] == "correct"


def test_a_mask_of_terminations_beside_one_of_dones():
    def gae(rewards, undones, values, next_values, unterminated, gamma, lam):
        return backward(rewards, values, next_values, undones, gamma * lam, gamma * unterminated)

    def swapped(rewards, unterminated, values, next_values, undones, gamma, lam):
        return gae(rewards, unterminated, values, next_values, undones, gamma, lam)

    assert verdict(gae)["verdict"] == "correct"
    assert verdict(swapped)["mistake"] == "terminations and truncations swapped"


def test_the_only_flag_is_that_of_every_step():
    def gae(rewards, values, next_values, next_done, gamma, lam):
        not_done = 1.0 - next_done
        return backward(rewards, values, next_values, not_done, gamma * lam, gamma * not_done)

    assert verdict(gae)["verdict"] == "correct"


def test_a_mask_of_padding():
    def gae(rewards, values, response_mask, gamma, lam):
        next_values = np.concatenate([values[1:], 0.0 * values[:1]])
        return response_mask * backward(rewards, values, next_values, response_mask, gamma * lam, gamma * response_mask)

    report = verdict(gae)
    assert report["verdict"] == "correct"
    assert "response_mask is 1 on every transition: padding is not judged" in report["notes"]


def test_a_mask_of_valid_rows_leaves_out_the_resets():
    seen = []

    def gae(rewards, values, next_values, terminated, truncated, valid, gamma, lam):
        dones = terminated | truncated
        seen.append((np.array(dones, bool), np.array(valid, bool)))
        return compute_gae(rewards, values[: len(rewards)], next_values, terminated, dones, gamma, lam)

    assert verdict(gae)["verdict"] == "correct"
    assert any(not valid.all() for _, valid in seen)
    assert all(dones[:-1][~valid[1:]].all() and valid[0].all() for dones, valid in seen if dones.ndim == 2)


def test_a_discount_beside_gamma_is_no_termination_that_tells_the_same():
    def gae(rewards, values, next_values, terminated, gamma, lam, discounts=None):
        not_done = 1.0 - terminated
        return backward(rewards, values, next_values, not_done, gamma * lam, gamma * not_done)

    assert verdict(gae)["mistake"] == "the sum is not cut at a truncation"


def test_names_with_lambda():
    def only(rewards, values, next_value, dones, gamma, lamda_tradeoff):
        return textbook(rewards, values, next_value, dones, gamma, lamda_tradeoff)

    def beside(rewards, values, next_value, dones, gamma, lam, lambda_entropy=0.01, lambda_value=1.0):
        return textbook(rewards, values, next_value, dones, gamma, lam)

    def switch(rewards, values, next_value, dones, gamma, use_lambda=True):
        return textbook(rewards, values, next_value, dones, gamma, 0.95 if use_lambda is True else 0.0)

    def two(rewards, values, next_value, dones, gamma, lambda_critic=0.95, lambda_actor=0.5):
        return textbook(rewards, values, next_value, dones, gamma, lambda_critic)

    for function in (only, beside, switch, two):
        assert verdict(function)["verdict"] == "correct"

    def discount_of_the_lambda_return(rewards, values, next_value, dones, lambda_discount):
        return textbook(rewards, values, next_value, dones, lambda_discount, 0.95)

    assert verdict(discount_of_the_lambda_return, given=[("lambda_discount", "gamma")])["verdict"] == "correct"


def test_a_last_done_is_no_switch():
    def gae(rewards, values, dones, next_value, gamma, lam, next_done=False):
        return cleanrl(rewards, values, dones, next_value, next_done, gamma, lam)

    assert verdict(gae)["verdict"] == "correct"


def test_a_switch_is_left_as_it_is():
    def gae(rewards, values, next_value, gamma=0.99, lam=0.95, episode_end=False):
        no = 0.0 * rewards
        return textbook(rewards, values, 0.0 * next_value if episode_end else next_value, no, gamma, lam)

    report = verdict(gae)
    assert report["verdict"] == "correct" and "not judged: episode_end" in " ".join(report["notes"])


def test_gamma_1_inside():
    def gae(rewards, values, next_values, terminated, truncated):
        ones = np.ones(len(rewards))[:, None]
        return backward(rewards, values, next_values, 1.0 - (terminated | truncated), 0.95, ones - terminated)

    assert verdict(gae)["mistake"] == "gamma or lambda fixed inside"
    assert verdict(gae, gamma=1.0)["verdict"] == "correct"


ONE_EPISODE = "it is right if each call holds one episode, or a part of one, with no end before the last row"
ZEROED = "it is right if what it gets as V(s_{t+1}) is 0 after a termination"


def test_a_mistake_is_none_on_narrower_terms():
    def uncut(rewards, values, next_values, terminated, truncated, gamma, lam):
        return backward(rewards, values, next_values, 1.0 + 0.0 * rewards, gamma * lam, gamma * (1.0 - terminated))

    def unmasked(rewards, values, next_values, terminated, truncated, gamma, lam):
        not_done = 1.0 - (terminated | truncated)
        return backward(rewards, values, next_values, not_done, gamma * lam, gamma * np.ones(len(rewards)))

    def truncated_is_terminated(rewards, values, next_values, terminated, truncated, gamma, lam):
        not_done = 1.0 - (terminated | truncated)
        return backward(rewards, values, next_values, not_done, gamma * lam, gamma * not_done)

    def clipped(rewards, values, next_values, terminated, truncated, gamma, lam):
        dones = terminated | truncated
        return compute_gae(rewards.clip(-10, 10), values, next_values, terminated, dones, gamma, lam)

    def any_end(rewards, values, next_value, dones, gamma, lam):
        return textbook(rewards, values, next_value, dones.any(-1, keepdims=True) + 0 * dones, gamma, lam)

    def one_lambda(rewards, values, next_values, terminated, truncated, gamma, lam):
        return compute_gae(rewards, values, next_values, terminated, terminated | truncated, gamma, 0.8)

    functions = uncut, unmasked, truncated_is_terminated, clipped, any_end, one_lambda
    notes = {f: verdict(f)["notes"] for f in functions}
    assert [f for f, found in notes.items() if ONE_EPISODE in found] == [uncut]
    assert [f for f, found in notes.items() if ZEROED in found] == [unmasked]


def test_the_line_that_raises_in_what_has_no_code():
    class Gae:
        def __call__(self, rewards, values, dones, gamma, lam):
            raise KeyError("boom")

    line = Gae.__call__.__code__.co_firstlineno + 1
    assert verdict(Gae())["mistake"] == f"it raises KeyError in line {line}: 'boom'"


def test_parameters_that_mean_the_same_only_together():
    def gae(rewards, values, episode_starts, dones, last_done, last_value, gamma, lam):
        raise AssertionError("is not called")

    with pytest.raises(gae_check.UsageError, match=r"what is meant by .*dones \(dones\), last_done"):
        verdict(gae)


def test_the_line_that_raises_is_of_the_function_not_of_what_is_round_it():
    torch = pytest.importorskip("torch")

    @torch.no_grad()
    def gae(rewards, values, dones, gamma, lam):
        import torch

        torch.cumsum(rewards, 0)  # it takes no array: that would be another error
        raise AssertionError

    line = inspect.unwrap(gae).__code__.co_firstlineno + 5
    assert verdict(gae)["mistake"] == f"it raises AssertionError in line {line}: raise AssertionError"
