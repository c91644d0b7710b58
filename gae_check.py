# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26,<3", "tyro>=1,<2"]
# ///
"""Generalized advantage estimation (GAE): what it is, whether yours is right, and what its lambda trades.

    python gae_check.py                             # prove compute_gae, and check the scripts beside this file
    python gae_check.py path/to/file.py:function    # yours: "correct", or the name of its mistake and the cure
    python gae_check.py --bias-variance             # measure what lambda trades, beside the exact figures

Exit code 0: all is well; 1: a mistake was found, or an error; 2: the command makes no sense. Loading your file runs it.

Arrays are (T, N): T steps of N environments. An episode ends by termination (it has no future) or by truncation (it
has one, out of sight); a done is either. Two layouts are in use. Under NEXT_STEP autoreset the row after a done is the
reset, which is no transition, and values[t + 1] is always V of the state that step t led to. Under SAME_STEP autoreset
there is no such row, and after a done values[t + 1] is V of the next episode's first state.

Read `compute_gae` first, then the formulas below it, `bias_variance`, and `MISTAKES`.
"""

import contextlib
import functools
import importlib
import inspect
import itertools
import json
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import Positional, UseAppendAction


@dataclass
class Args:
    function: Positional[str | None] = None  # path/to/file.py:function or package.module:function, whose file is RUN
    map: UseAppendAction[tuple[str, ...]] = ()  # last_r=bootstrap: what a parameter means whose name is not known here
    gamma: float = 0.99  # discount inside a function that takes none
    gae_lambda: float = 0.95  # lambda inside a function that takes none
    bias_variance: bool = False  # measure bias and variance over a grid of lambda on a small Markov chain
    plot: str | None = None  # file for a picture of --bias-variance; needs matplotlib
    json: bool = False  # print one JSON object
    seed: int = 1  # seed of the random rollouts and episodes


class UsageError(Exception):
    """The command makes no sense: one line on stderr, exit code 2."""


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16) by its backward recursion.

        A_t = delta_t + gamma lambda A_{t+1},    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)

    The two flags have two jobs. After a termination there is no future, so V(s_{t+1}) counts as 0. After a done,
    by termination or truncation, A_{t+1} belongs to another episode, so the sum stops. A truncated step therefore
    still bootstraps from V(s_{t+1}), the value of the state that it really led to, not of the reset state after it.

    All arrays have the shape (T, N) or (T,), and so has the result. `advantages + values` is the lambda-return.
    """
    deltas = rewards + gamma * np.where(terminations, 0.0, next_values) - values
    advantages, advantage = np.zeros_like(deltas), 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + np.where(dones[t], 0.0, gamma * gae_lambda * advantage)
    return advantages


@dataclass
class Rollout:
    """What N environments did in T steps, with everything that an implementation could ask for."""

    rewards: np.ndarray  # (T, N)
    values: np.ndarray  # (T + 1, N), V of the observations in the order seen; row T: of what the last step led to
    next_values: np.ndarray  # (T, N), V of the state that the step really led to, also where an episode ends
    terminations: np.ndarray  # (T, N)
    truncations: np.ndarray  # (T, N)
    dones: np.ndarray  # (T, N)
    resets: np.ndarray  # (T, N), rows that are no transition: an advantage means nothing there and is not compared
    begins: np.ndarray  # (1, N), whether row 0 begins an episode: episode_starts[0] of SB3, dones[0] of CleanRL
    gamma: float
    gae_lambda: float


def make_rollout(rng, draw, ends, next_step, gamma, gae_lambda, last="any", num_steps=9, num_envs=3):
    """Some episodes with numbers from `draw` and the given kinds of `ends`; `last` rules how the last row ends."""
    shape = (num_steps, num_envs)
    rewards, final_values, values = (draw(size=(rows, num_envs)) for rows in (num_steps, num_steps, num_steps + 1))
    chance = min(0.25, 2.25 / num_steps)  # long rollouts have long episodes
    terminations = (rng.random(shape) < chance) & ("terminated" in ends)
    truncations = (rng.random(shape) < chance) & ("truncated" in ends) & ~terminations
    if last != "any":
        chance = {"terminated": 1.0, "either": 0.5, "running": 0.0}[last]
        terminations[-1], truncations[-1] = rng.random(num_envs) < chance, False
    dones = terminations | truncations
    for t in range(1, num_steps if next_step else 0):
        dones[t] &= ~dones[t - 1]  # the row after a done is the reset
    terminations, truncations, resets = terminations & dones, truncations & dones, shift(dones & next_step, -1, "zero")
    next_values = values[1:] if next_step else np.where(dones, final_values, values[1:])
    values = np.concatenate([values[:-1], next_values[-1:]])
    rewards = np.where(resets, 0.0, rewards)
    begins = (np.arange(num_envs)[None] + num_steps) % 2 == 0
    return Rollout(rewards, values, next_values, terminations, truncations, dones, resets, begins, gamma, gae_lambda)


def gae(x):
    return compute_gae(x.rewards, x.values[:-1], x.next_values, x.terminations, x.dones, x.gamma, x.gae_lambda)


def tails(x):
    """For every transition (t, env): the rewards (L,) from there to the end of its episode or of the rollout, and the
    values (L + 1,) along the way. The last one is the bootstrap: V of the state led to, or 0 after a termination."""
    for t, env in np.argwhere(~x.resets):
        ends = np.flatnonzero(x.dones[t:, env])
        end = t + ends[0] + 1 if len(ends) else len(x.dones)
        bootstrap = 0.0 if x.terminations[end - 1, env] else x.next_values[end - 1, env]
        yield (t, env), x.rewards[t:end, env], np.append(x.values[t:end, env], bootstrap)


def definition(rewards, values, gamma, gae_lambda):
    """A_0 = sum over k of (gamma lambda)^k delta_k,    delta_k = r_k + gamma V(s_{k+1}) - V(s_k)."""
    deltas = rewards + gamma * values[1:] - values[:-1]
    return sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas))


def n_step_advantage(rewards, values, gamma, n):
    """A^(n) = r_0 + gamma r_1 + ... + gamma^(n-1) r_{n-1} + gamma^n V(s_n) - V(s_0)."""
    return sum(gamma**k * reward for k, reward in enumerate(rewards[:n])) + gamma**n * values[n] - values[0]


def mixture(rewards, values, gamma, gae_lambda):
    """A_0 = (1 - lambda) [A^(1) + lambda A^(2) + ... + lambda^(L-2) A^(L-1)] + lambda^(L-1) A^(L).

    In an endless episode A^(n) has the weight (1 - lambda) lambda^(n-1). After L steps nothing more is known: every
    later A^(n) equals A^(L), and their weights add up to lambda^(L-1).
    """
    *shorter, longest = (n_step_advantage(rewards, values, gamma, n) for n in range(1, len(rewards) + 1))
    weighted = (gae_lambda**k * advantage for k, advantage in enumerate(shorter))
    return (1 - gae_lambda) * sum(weighted) + gae_lambda ** len(shorter) * longest


def return_minus_baseline(rewards, values, gamma):
    """lambda 1: G_0 - V(s_0), with G_k = r_k + gamma G_{k+1} and the bootstrap as G_L."""
    return functools.reduce(lambda g, reward: reward + gamma * g, rewards[::-1], values[-1]) - values[0]


def cut_and_mended(x, k):
    """Advantages (T, N) from two rollouts that meet before row k. All that row t < k loses by the cut is
    (gamma lambda)^(k-t) A_k, and nothing if its episode ends before: only a bootstrap moves with the boundary."""
    columns = (x.rewards, x.values[:-1], x.next_values, x.terminations, x.dones)
    early = compute_gae(*(column[:k] for column in columns), x.gamma, x.gae_lambda)
    late = compute_gae(*(column[k:] for column in columns), x.gamma, x.gae_lambda)
    same_episode = np.cumprod(~x.dones[:k][::-1], axis=0)[::-1]  # (k, N)
    decay = (x.gamma * x.gae_lambda) ** np.arange(k, 0, -1)[:, None]  # (k, 1)
    return np.concatenate([early + same_episode * decay * late[0], late])


def identities(x):
    """Yield (what is compared, compute_gae's number, the other formula's)."""
    advantages, lambda_0, lambda_1 = (gae(replace(x, gae_lambda=g)) for g in (x.gae_lambda, 0.0, 1.0))
    for at, rewards, values in tails(x):
        discounts = x.gamma, x.gae_lambda
        yield "definition: the sum of (gamma lambda)^k delta", advantages[at], definition(rewards, values, *discounts)
        yield "(1 - lambda)-weighted n-step advantages", advantages[at], mixture(rewards, values, *discounts)
        yield "lambda 0: the TD error", lambda_0[at], n_step_advantage(rewards, values, x.gamma, 1)
        yield "lambda 1: return minus baseline", lambda_1[at], return_minus_baseline(rewards, values, x.gamma)
        for n in range(1, len(rewards) + 1):
            no = np.zeros(n, bool)
            n_steps = compute_gae(rewards[:n], values[:n], values[1 : n + 1], no, no, x.gamma, 1.0)[0]
            yield "lambda 1 over n steps: n-step advantage", n_steps, n_step_advantage(rewards, values, x.gamma, n)
    for k in range(1, len(advantages)):
        yield "the rollout's boundary moved to any row", advantages, cut_and_mended(x, k)
    disturbed = gae(replace(x, rewards=x.rewards + 100.0 * x.resets))
    yield "reset rows reach no transition", advantages[~x.resets], disturbed[~x.resets]


def prove(seed):
    """The largest error of each identity over random rollouts in both layouts, with lambda from 0 to 1."""
    rng, errors = np.random.default_rng(seed), {}
    for next_step, gae_lambda in itertools.product((False, True), (0.0, 0.5, 0.95, 1.0)):
        draw = functools.partial(rng.normal, 0.0, 10.0)
        x = make_rollout(rng, draw, ("terminated", "truncated"), next_step, 0.97, gae_lambda, num_steps=24)
        for name, ours, other in identities(x):
            errors[name] = max(errors.get(name, 0.0), float(np.abs(ours - other).max(initial=0.0)))
    return errors


GAMMA, NUM_STATES, CRITIC_ERROR = 0.9, 5, 2.5


def corridor():
    """(P, v): transition probabilities (S, S + 1), of which the last column is the end, and the true values (S,).

    A walk begins in state 0 and terminates behind state S - 1. It goes one state on with probability 0.6, one back with
    0.2 (in state 0: nowhere), nowhere with 0.2, and each step pays 1 plus unit Gaussian noise. So v = 1 + gamma P v.
    """
    stay, on, back = (np.eye(NUM_STATES, NUM_STATES + 1, k) for k in (0, 1, -1))
    back[0, 0] = 1.0
    probs = 0.2 * stay + 0.6 * on + 0.2 * back
    return probs, np.linalg.solve(np.eye(NUM_STATES) - GAMMA * probs[:, :-1], np.ones(NUM_STATES))


def exact_bias_and_variance(probs, true_values, gae_lambda):
    """Of the lambda-return of the first state. With c = gamma lambda, A = delta + c A' where A' belongs to s', so

        m = E[delta] + c P m                                      m(s) = E[A]
        q = E[delta^2] + 2 c E[delta m(s')] + c^2 P q             q(s) = E[A^2]
    """
    c, critic = GAMMA * gae_lambda, np.append(true_values + CRITIC_ERROR, 0.0)
    deltas = 1.0 + GAMMA * critic - critic[:-1, None]  # (S, S + 1), without the noise
    m = np.linalg.solve(np.eye(NUM_STATES) - c * probs[:, :-1], (probs * deltas).sum(1))
    squares = probs * (deltas**2 + 1.0 + 2 * c * deltas * np.append(m, 0.0))
    q = np.linalg.solve(np.eye(NUM_STATES) - c**2 * probs[:, :-1], squares.sum(1))
    return (critic[:-1] + m - true_values)[0], (q - m**2)[0]


def bias_variance(seed, num_episodes=20_000):
    """Squared bias and variance of the lambda-return A + V(s) as an estimate of the first state's true value v(s), for
    each lambda: [exact, sampled, and the ends of a 95 % interval]. The critic is V = v + CRITIC_ERROR in every state.

    The advantage A is the lambda-return less V(s). That is the same for all actions: it adds no variance, and its error
    leads no policy astray. What else the critic's error does to A is what this shows. lambda 0 asks the critic after
    one step: least noise, most error. lambda 1 waits for all the rewards and never asks it: no error, all the noise.
    That is so of an error that is the same everywhere; one that differs from state to state is noise, too.
    """
    rng, (probs, true_values) = np.random.default_rng(seed), corridor()
    cumulative = np.vstack([probs, np.eye(1, NUM_STATES + 1, NUM_STATES)]).cumsum(1)[:, :-1]  # the end stays the end
    path = [np.zeros(num_episodes, int)]  # a state is drawn by its index: how many cumulative probabilities are passed
    while (path[-1] < NUM_STATES).any():
        path.append((rng.random((num_episodes, 1)) >= cumulative[path[-1]]).sum(1))
    states = np.array(path)  # (T + 1, N), an episode in each column
    rewards = np.where(states[:-1] < NUM_STATES, rng.normal(1.0, 1.0, states[:-1].shape), 0.0)
    values, ended = np.append(true_values + CRITIC_ERROR, 0.0)[states], states[1:] == NUM_STATES
    rows = []
    for gae_lambda in (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1.0):
        exact = exact_bias_and_variance(probs, true_values, gae_lambda)
        advantages = compute_gae(rewards, values[:-1], values[1:], ended, ended, GAMMA, gae_lambda)
        errors = (advantages + values[:-1])[0] - true_values[0]
        samples = np.stack([errors, (errors - errors.mean()) ** 2])
        means, standard_errors = samples.mean(1), samples.std(1) / num_episodes**0.5
        low, high = means - 1.96 * standard_errors, means + 1.96 * standard_errors
        bias_ends = np.clip(0.0, low[0], high[0]), max(-low[0], high[0])  # the smallest and the largest |bias|
        rows.append({
            "lambda": gae_lambda,
            "squared_bias": [float(bias) ** 2 for bias in (exact[0], means[0], *bias_ends)],
            "variance": [float(variance) for variance in (exact[1], means[1], low[1], high[1])],
            "standard_errors_off": float(max(np.abs(means - exact) / standard_errors)),
        })
    return rows


def claims(rows):
    """What the theory says of these rows, and whether it holds."""
    bias, variance = (np.array([row[key][0] for row in rows]) for key in ("squared_bias", "variance"))
    return {
        "lambda 0 has the largest bias and the smallest variance": bool(bias.argmax() == variance.argmin() == 0),
        "with lambda the bias falls and the variance grows": bool(np.diff(bias).max() < 0 < np.diff(variance).min()),
        "lambda 1 has no bias, however wrong the critic": bool(bias[-1] < 1e-12),
        "every sampled figure is within 5 standard errors": max(row["standard_errors_off"] for row in rows) < 5,
    }


def plot(rows, path):
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install matplotlib") from None
    grid = np.linspace(0.0, 1.0, 101)
    bias, variance = np.array([exact_bias_and_variance(*corridor(), gae_lambda) for gae_lambda in grid]).T
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for key, exact, color in (("squared_bias", bias**2, "tab:blue"), ("variance", variance, "tab:orange")):
        _, sampled, low, high = np.array([row[key] for row in rows]).T
        axes.plot(grid, exact, color=color, label=key.replace("_", " "))
        bars = [sampled - low, high - sampled]
        axes.errorbar([row["lambda"] for row in rows], sampled, bars, fmt="o", ms=4, capsize=3, color=color)
    axes.plot(grid, bias**2 + variance, "--", color="black", label="their sum, the mean squared error")
    axes.set(xlabel="lambda", ylabel="error of the lambda-return", ylim=(0, None))
    axes.set_title("lines: exact; points: sampled, with 95 % confidence intervals", fontsize="medium")
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=150, facecolor="white")
    except (OSError, ValueError) as error:  # of the folder, or of the kind of file
        raise UsageError(f"--plot {path}: {error}") from None


def shift(array, by, fill, outside=0):
    """Row t takes row t + by. Outside the rollout is `outside`, or it wraps round, or the last row keeps its own."""
    moved = np.roll(array, -by, axis=0)
    if fill != "wrap":
        moved[-1 if by > 0 else 0] = outside
    if fill == "own":
        moved[-1] = array[-1]
    return moved


def shifted(by, *names):
    fills = ("zero", "wrap", "own")
    return [lambda x, fill=fill: {name: shift(getattr(x, name), by, fill) for name in names} for fill in fills]


def with_last(array, value):
    return np.concatenate([array[:-1], np.broadcast_to(value, array[-1:].shape)])


def without_delta(x, rows):
    """r_t = V(s_t) and no future make delta_t 0 in these rows."""
    return {"rewards": np.where(rows, x.values[:-1], x.rewards), "terminations": x.terminations | rows}


def normalised(advantages, axis=None, ddof=0):
    return (advantages - advantages.mean(axis)) / (advantages.std(axis, ddof=ddof) + 1e-8)


def finished(*functions):
    return [lambda x, function=function: {"finish": function} for function in functions]


DELTA, TRACE = "delta_t = r_t + gamma V(s_{t+1}) - V(s_t)", "A_{t+1} is multiplied by gamma lambda (1 - done)"
FLAG, REWARD = "step t takes the done flag that it returned itself", "step t takes the reward that it returned itself"
NO_MASK = "the ends of episodes are ignored"  # two mistakes in one, and so no half of a pair
NO_BOOTSTRAP = "no bootstrap at the end of the rollout"
ONE_TERMINATED = "it is right for an episode that terminates, and for no other"
# Name, cure, and changes. A change takes a Rollout and gives new values to some of its fields, with which compute_gae
# returns what the mistake does. Two keys are no fields: "trace" stands for gamma lambda, but leaves the gamma in delta;
# "finish" is done to the output. Where several mistakes give the same numbers, the first is named.
MISTAKES = [
    ("truncation treated as termination", "only a termination zeroes V(s_{t+1}); a truncation just stops the sum",
     [lambda x: {"terminations": x.dones}]),
    ("bootstraps from V(s_t)", "bootstrap from V of the state that the step led to",
     [lambda x: {"next_values": np.where(x.truncations, x.values[:-1], x.next_values)},
      lambda x: {"next_values": x.values[:-1]},
      lambda x: {"next_values": with_last(x.next_values, x.values[-2])}]),
    ("bootstraps past a termination", "V(s_{t+1}) counts as 0 after a termination, here or already in what is passed",
     [lambda x: {"terminations": x.dones & False}]),
    ("bootstraps from the next episode's first state",
     "after a done, values[t + 1] is another episode's: use V of the true last observation, 0 after a termination",
     [lambda x: {"next_values": x.values[1:]},
      lambda x: {"next_values": x.values[1:], "terminations": x.dones & False}]),
    ("bootstraps every step from V(s_T)", "in a backward loop, V(s_t) is the next value of step t - 1",
     [lambda x: {"next_values": x.values[-1:] + 0.0 * x.next_values}]),
    ("bootstraps the last step from V(s_0)", "np.roll wraps round: the last step needs V(s_T)",
     [lambda x: {"next_values": with_last(x.next_values, x.values[0])}]),
    ("the bootstrap counts twice", "gamma V(s_{t+1}) belongs to the reward or to delta_t, not to both",
     [lambda x: {"rewards": x.rewards + x.gamma * x.next_values * with_last(x.dones & False, ~x.terminations[-1])},
      lambda x: {"rewards": x.rewards + x.gamma * x.next_values * x.truncations}]),
    ("the sum is not cut at the end of an episode", TRACE, [lambda x: {"dones": x.dones & False}]),
    ("the sum is not cut at a truncation", TRACE + "; truncated is done, too", [lambda x: {"dones": x.terminations}]),
    (NO_MASK, "V(s_{t+1}) counts as 0 after a termination, and " + TRACE,
     [lambda x: {"terminations": x.dones & False, "dones": x.dones & False},
      lambda x: {"terminations": x.dones & False, "dones": x.dones & False, "next_values": x.values[1:]}]),
    ("done flag one step early", FLAG + ", not that of step t + 1",
     shifted(+1, "terminations", "dones") + shifted(+1, "dones") + shifted(+1, "terminations")),
    ("done flag one step late", FLAG + ", not that of step t - 1",
     shifted(-1, "terminations", "dones") + shifted(-1, "dones") + shifted(-1, "terminations")
     + [lambda x: {"terminations": with_last(x.terminations, x.terminations[-2])}]
     + [lambda x, fill=fill: dict.fromkeys(("terminations", "dones"), shift(x.dones, -1, fill, x.begins))
        for fill in ("outside", "own")]),  # of one flag, as episode starts are
    ("terminations and truncations swapped", "only a termination zeroes V(s_{t+1})",
     [lambda x: {"terminations": x.truncations}, lambda x: {"terminations": x.dones, "dones": x.terminations}]),
    ("a truncated step gets the advantage 0",
     "bootstrap it from V of its true last observation, or leave it out of the loss",
     [lambda x: without_delta(x, x.truncations)]),
    ("a terminated step gets the advantage 0", "there, too, delta_t = r_t - V(s_t) counts",
     [lambda x: without_delta(x, x.terminations)]),
    ("V(s_t) is not subtracted at a terminated step", "there, too, delta_t = r_t - V(s_t)",
     [lambda x: {"rewards": x.rewards + x.values[:-1] * x.terminations},
      lambda x: {"rewards": x.rewards + x.values[:-1] * x.dones, "terminations": x.dones}]),
    ("the last step of every episode gets the advantage 0", "there, too, delta_t counts, with V(s_{t+1}) if truncated",
     [lambda x: without_delta(x, x.dones)]),
    ("the reward of a terminated step is dropped", "only V(s_{t+1}) counts as 0 after a termination",
     [lambda x: {"rewards": x.rewards * ~x.terminations},
      lambda x: {"rewards": x.rewards * ~x.dones, "terminations": x.dones}]),
    (NO_BOOTSTRAP,
     "unless it always ends an episode, the last step needs gamma V(s_T), as a parameter or as row T of values",
     [lambda x: {"next_values": with_last(x.next_values, 0.0)}]),
    ("the lambda-return starts from 0", "it starts from G_T = V(s_T)",
     [lambda x: {"next_values": with_last(
         x.next_values, x.next_values[-1] * np.where(x.dones[-1], 1.0, 1.0 - x.gae_lambda))}]),
    ("the last step's termination is ignored", "V(s_T), too, counts as 0 after a termination; np.roll would wrap round",
     [lambda x: {"terminations": with_last(x.terminations, False)},
      lambda x: {"terminations": with_last(x.terminations, x.begins)}]),
    ("done flag inverted", "a mask is 1 - done",
     [lambda x: {"terminations": ~x.terminations, "dones": ~x.dones},
      lambda x: {"terminations": with_last(x.terminations, ~x.terminations[-1])}]),
    ("the last step is left out", "begin with t = T - 1",
     [lambda x: without_delta(x, with_last(x.dones & False, True))]),
    ("the first step is left out", "end with t = 0: range(T - 1, -1, -1)",
     finished(lambda advantages: np.concatenate([0.0 * advantages[:1], advantages[1:]]))),
    ("lambda missing in the trace", TRACE, [lambda x: {"trace": x.gamma}]),
    ("gamma missing in the trace", TRACE, [lambda x: {"trace": x.gae_lambda}]),
    ("gamma and lambda missing in the trace", TRACE, [lambda x: {"trace": 1.0}]),
    ("gamma or lambda squared in the trace", TRACE,
     [lambda x: {"trace": x.gamma * x.gae_lambda**2}, lambda x: {"trace": x.gamma**2 * x.gae_lambda},
      lambda x: {"trace": (x.gamma * x.gae_lambda) ** 2}]),
    ("1 - lambda in the trace", TRACE, [lambda x: {"trace": x.gamma * (1.0 - x.gae_lambda)}]),
    ("no trace, only the TD error", TRACE, [lambda x: {"trace": 0.0}]),
    ("the TD error with the next lambda-return for V(s_{t+1})", "A_t is the lambda-return of s_t, less V(s_t)",
     [lambda x: {"next_values": x.next_values + shift(gae(x), +1, "zero") * ~x.dones, "trace": 0.0}]),
    ("gamma or lambda fixed inside", "use those that are passed; if none are, say which it has: --gamma, --gae-lambda",
     [lambda x, g=g: {"gamma": g, "trace": g * x.gae_lambda} for g in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)]
     + [lambda x, g=g: {"gamma": g} for g in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)]
     + [lambda x, g=g: {"trace": x.gamma * g} for g in (0.9, 0.95, 0.97, 0.98)]
     + [lambda x: {"gamma": 0.99, "trace": 0.99 * 0.95}]),
    ("gamma and lambda swapped", DELTA, [lambda x: {"gamma": x.gae_lambda}]),
    ("gamma missing in delta", DELTA,
     [lambda x: {"gamma": 1.0}, lambda x: {"next_values": x.next_values / np.where(x.truncations, x.gamma, 1.0)}]),
    ("a sign is wrong in delta", DELTA, [lambda x: {"values": -x.values}, lambda x: {"next_values": -x.next_values}]),
    ("lambda in delta", DELTA, [lambda x: {"gamma": x.gamma * x.gae_lambda}]),
    ("gamma multiplies the reward", DELTA, [lambda x: {"rewards": x.gamma * x.rewards}]),
    ("gamma or lambda multiplies delta_t", "the sum begins with delta_t: its weights are (gamma lambda)^k, k >= 0",
     [lambda x: {"finish": lambda advantages: x.gamma * x.gae_lambda * advantages},
      lambda x: {"finish": lambda advantages: x.gamma * advantages}]),
    ("1 - lambda multiplies the sum", "that factor is of the average of n-step advantages, and of no sum of delta_t",
     [lambda x: {"finish": lambda advantages: (1.0 - x.gae_lambda) * advantages}]),
    ("the baseline V(s_t) is not subtracted", DELTA, [lambda x: {"values": 0.0 * x.values}]),
    ("V(s_{t+1}) is subtracted for V(s_t)", DELTA,
     [lambda x: {"values": np.concatenate([x.next_values, x.values[-1:]])}]),
    ("reward one step early", REWARD, shifted(+1, "rewards")),
    ("reward one step late", REWARD, shifted(-1, "rewards")),
    ("advantages normalised inside", "normalise where the loss is made: returns are made of the advantages as they are",
     finished(*(functools.partial(normalised, axis=axis, ddof=ddof) for axis in (None, 0) for ddof in (0, 1)),
              lambda advantages: advantages - advantages.mean(), lambda advantages: advantages / advantages.std())),
    ("rewards normalised inside", "normalise them before, by statistics that outlast a rollout",
     [lambda x, axis=axis, ddof=ddof: {"rewards": normalised(x.rewards, axis, ddof)}
      for axis in (None, 0) for ddof in (0, 1)]),
    ("numbers are clipped inside", "clip, if at all, what goes in or what the loss takes",
     [lambda x, c=c: {"finish": lambda advantages: advantages.clip(-c, c)} for c in (1.0, 5.0, 10.0)]
     + [lambda x, c=c: {"rewards": x.rewards.clip(-c, c)} for c in (1.0, 5.0, 10.0)]
     + [lambda x: {"rewards": np.sign(x.rewards)}]),
    ("the advantages are rounded", "keep them in an array of float32 or float64",
     finished(np.trunc, lambda advantages: advantages.astype(np.float16))),
    ("all advantages are 0", "store A_t in the array that is returned: in JAX, x.at[t].set(a) leaves x as it is",
     finished(np.zeros_like)),
    ("every step gets the advantage of the first", "append a copy: what is changed in place is one array in all places",
     finished(lambda advantages: np.broadcast_to(advantages[:1], advantages.shape))),
    ("the advantages are a step early or late", "store A_t in row t, after it is computed",
     finished(lambda advantages: shift(advantages, +1, "zero"), lambda advantages: shift(advantages, -1, "zero"))),
    ("the sign is reversed", "an advantage is what came minus what was expected", finished(np.negative)),
    ("the advantages come out in reverse", "reverse what a backward loop appends",
     [*finished(np.flipud),
      lambda x: {"finish": lambda advantages: np.flipud(advantages + x.values[:-1]) - x.values[:-1]}]),
    ("the loop runs forward", "A_t needs A_{t+1}: loop over reversed(range(T))",
     [lambda x: {name: getattr(x, name)[::-1] for name in ("rewards", "next_values", "terminations", "dones")}
      | {"values": np.roll(x.values[::-1], -1, axis=0), "finish": np.flipud}]),
]  # fmt: skip


def wrong_gae(x, changes):
    trace, finishes = x.gamma * x.gae_lambda, []
    for change in changes:
        inputs = change(x)
        trace = inputs.pop("trace", trace)
        finishes.append(inputs.pop("finish", np.asarray))
        x = replace(x, **inputs)
    advantages = gae(replace(x, gae_lambda=trace / x.gamma))
    return functools.reduce(lambda result, finish: finish(result), finishes, advantages)


def plus_values(estimate):
    return lambda x: estimate(x) + x.values[:-1]


def rewards_to_go(x):
    return gae(replace(x, values=0.0 * x.values, next_values=0.0 * x.next_values, gae_lambda=1.0))


RIGHT = {  # what a function may return
    "advantages": gae,
    "lambda-returns": plus_values(gae),
    "Monte Carlo returns": plus_values(lambda x: gae(replace(x, gae_lambda=1.0))),
    "TD targets": plus_values(lambda x: gae(replace(x, gae_lambda=0.0))),
}
WRONG_RETURNS = {
    "the returns are advantages + next values": lambda x: gae(x) + x.next_values,
    "the returns are advantages + the next row of values": lambda x: gae(x) + x.values[1:],
    "the returns are the advantages": gae,
    "the returns are advantages + rewards": lambda x: gae(x) + x.rewards,
    "the returns are normalised advantages + values": plus_values(lambda x: normalised(gae(x))),
    "the returns have no bootstrap": rewards_to_go,
    "the returns run on into the next episode": lambda x: rewards_to_go(replace(x, dones=x.dones & False)),
}


class Fault(Exception):
    """Why a call of the user's function left nothing to judge."""


ROLES = {  # what a parameter can mean: the names by which it is known; "not_" stands for 1 - flag
    "rewards": "reward rewards rew rews r rs token_level_rewards",
    "values": "value values val vals v vs v_s value_pred value_preds v_pred v_preds vpred vpreds vf_pred vf_preds "
    "vf baselines state_value state_values state_vals old_values value_estimates",
    "next_values": "next_values next_vals next_v v_next value_next v_prime v_s_ v_s_prime next_v_pred next_v_preds "
    "next_state_value next_state_values final_values v_tp1 value_tp1",
    "bootstrap": "next_value next_val nextvpred last_value last_values last_val last_v last_vpred vpred_last last_r "
    "final_value bootstrap bootstrap_value bootstrap_values",
    "terminations": "termination terminations terminated terminateds terminal terminals term terms",
    "not_terminations": "unterminated unterminateds",
    "truncations": "truncation truncations truncated truncateds trunc truncs timeout timeouts time_out time_outs",
    "not_truncations": "bad_mask bad_masks",
    "dones": "done dones d ds end ends end_flag end_flags episode_end episode_ends fdones",
    "not_dones": "mask masks done_mask not_done not_dones non_terminal non_terminals nonterminal nonterminals "
    "undone undones",
    "episode_starts": "episode_start episode_starts starts first firsts new news",
    "not_episode_starts": "",
    "last_done": "next_done last_done last_dones",  # beside it, dones[t] says that s_t begins an episode
    "not_last_done": "next_mask last_mask",
    "discounts": "discounts discount_t discount_tp1",  # gamma (1 - done)
    "gamma": "gamma γ g discount discounting discount_factor",
    "gae_lambda": "lam λ lambda lambd lamda lamb lmbda gae_lambda gae_lam td_lambda lambda_coefficient tau l",
    "valid": "valid response_mask action_mask loss_mask attention_mask padding_mask",  # 1: the row is a transition
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}
OR_ELSE = {"bootstrap": "next_values", "next_values": "bootstrap"}
ROLLOUTS = (0.9, 0.7, 9, 1.0), (0.6, 0.8, 9, 100.0), (0.99, 0.95, 160, 1.0)  # gamma, lambda, steps, size of the numbers
PLAIN, TENSORS = ("NumPy arrays", "lists"), ("tensors", "lists of tensors")
FLAGS = {"terminations", "discounts"}, {"dones", "episode_starts"}, {"truncations"}  # those of one set tell the same


def base(role):
    return role.removeprefix("not_")


def readings(function, given):
    """Every {parameter: role} that the names of the parameters allow, the likeliest first."""
    try:
        parameters, roles = inspect.signature(function).parameters, {}
    except (TypeError, ValueError):
        raise UsageError("its parameters have no names: wrap it in a function of yours") from None
    given = {name: role if role in ROLES else ROLE_OF.get(role, role) for name, role in given.items()}
    for name, role in given.items():
        if name not in parameters or role not in ROLES:
            raise UsageError(f"--map {name}={role}: parameters: {', '.join(parameters)}; roles: {', '.join(ROLES)}")
    for name, parameter in parameters.items():
        core = re.sub(r"^(batch|b|mb|traj|is)_|(_list|_arr|_array|_batch|_buf|_buffer|_tensor|_t|_)$", "", name.lower())
        role = ROLE_OF.get(name.lower()) or ROLE_OF.get(core)
        is_switch = isinstance(parameter.default, bool) and role != "last_done"
        if name in given or (role and not is_switch):
            roles[name] = given.get(name, role)
    lambdas = [name for name in parameters.keys() - roles.keys()
               if re.search("lamb?da", name.lower()) and not isinstance(parameters[name].default, bool)]
    if "gae_lambda" not in roles.values() and len(lambdas) == 1:
        roles |= dict.fromkeys(lambdas, "gae_lambda")
    if "gamma" in roles.values():  # beside it, a discount is 1 - done
        roles |= {name: "not_dones" for name, role in roles.items() if role == "discounts" and name not in given}
    needed = [name for name, p in parameters.items() if p.default is p.empty and "VAR" not in p.kind.name]
    if unknown := [name for name in needed if name not in roles]:
        maps = " ".join(f"--map {name}=ROLE" for name in unknown)
        raise UsageError(f"what is meant by {', '.join(unknown)}? {maps}; roles: {', '.join(ROLES)}; "
                         "if none fits, wrap it in a function of yours")
    for role in ("rewards",) if "next_values" in roles.values() else ("rewards", "values"):  # lambda-returns need none
        if role not in roles.values():
            raise UsageError(f"which of its parameters are the {role}? --map PARAMETER={role}: {', '.join(parameters)}")
    # A flag that may be left out, beside one that tells the same, can be something else: a mask of padding, say.
    optional = [name for name in roles if name not in given and parameters[name].default is None]
    shorter = [{name: role for name, role in roles.items() if name != left_out} for left_out in optional]
    found = [reading for some in (roles, *shorter) if told(some) == told(roles) for reading in meanings(some, given)]
    if not found:
        meant = [f"{name} ({role})" for name, role in roles.items()]
        same = [one for one, role in zip(meant, roles.values()) if [*roles.values()].count(role) > 1]
        raise UsageError(f"what is meant by {', '.join(same or meant)}? --map NAME=ROLE for one of them; "
                         f"roles: {', '.join(ROLES)}")
    return found


def told(roles):
    """What a function knows from these parameters: their roles, or one of them for all flags that tell the same."""
    return {next((min(names) for names in FLAGS if role in names), role) for role in map(base, roles.values())}


def meanings(roles, given):
    """Every {parameter: role} of these parameters."""
    # CleanRL and Stable-Baselines3 store a done with the observation after it, and the last one apart.
    has = {*map(base, roles.values())}
    dones = "last_done" if "episode_starts" in has else "episode_starts" if "last_done" in has else "dones"
    change = {"dones": dones, "not_dones": f"not_{dones}"}
    roles = {name: role if name in given else change.get(role, role) for name, role in roles.items()}
    or_else = OR_ELSE | ({"dones": "terminations"} if "truncations" in has else {})
    or_else |= {} if has & set().union(*FLAGS) else {"last_done": "dones", "not_last_done": "not_dones"}
    choices = [[role] if name in given else [role, or_else.get(role, role)] for name, role in roles.items()]
    found = [choice for choice in dict.fromkeys(itertools.product(*choices)) if len(set(choice)) == len(choice)]
    return [dict(zip(roles, choice, strict=True)) for choice in found]


@dataclass
class Call:
    """One way to call the user's function, the rollouts that it is judged on, and what it returned for them."""

    function: Callable
    roles: dict[str, str]  # parameter -> what it means
    layout: str
    long_values: bool  # T + 1 rows
    long_flags: bool  # T + 1 rows, of which row t + 1 is about step t
    container: str
    bool_flags: bool
    wide_bootstrap: bool  # (1, N) instead of (N,)
    rollouts: list[Rollout] = field(default_factory=list)
    outputs: list[list[np.ndarray]] = field(default_factory=list)

    def __post_init__(self):
        """What its parameters let the function know, which is all that it may be judged on."""
        self.has, self.signature = {*map(base, self.roles.values())}, inspect.signature(self.function)
        flags = [names for names in FLAGS if self.has & names]
        # One flag cannot tell them apart, and is right for one of them at most.
        of_one_flag = ["truncated"] if "truncations" in self.has else ["terminated"] if flags else []
        self.ends = ["terminated", "truncated"] if len(flags) > 1 else of_one_flag
        # Without next_values, V of a truncated episode's last observation is known from the reset row alone.
        self.same_step_ends = [end for end in self.ends if "next_values" in self.has or end == "terminated"]
        no_bootstrap = not self.long_values and not self.has & {"bootstrap", "next_values"}
        no_last_done = "episode_starts" in self.has and "last_done" not in self.has and not self.long_flags
        self.last = "running" if no_last_done else "any"
        if not self.ends:  # one episode, or a part of it
            self.last = "terminated" if no_bootstrap else "either" if "last_done" in self.has else "any"

    def rollout(self, args, rng, draw, next_step, gamma=0.5, gae_lambda=0.8, **size):
        gamma = gamma if self.has & {"gamma", "discounts"} else args.gamma
        gae_lambda = gae_lambda if "gae_lambda" in self.has else args.gae_lambda
        ends = self.ends if next_step else self.same_step_ends
        return make_rollout(rng, draw, ends, next_step, gamma, gae_lambda, self.last, **size)

    def arguments(self, x, env):
        """The arguments for one environment of a rollout, or for a slice of them."""
        flags = [np.concatenate([x.begins, flag]) for flag in (x.terminations, x.truncations, x.dones)]  # (T + 1, N)
        terminations, truncations, dones = flags if self.long_flags else (flag[1:] for flag in flags)
        meaning = {
            "rewards": x.rewards, "values": x.values if self.long_values else x.values[:-1],
            "next_values": x.next_values, "bootstrap": x.values[-1],
            "terminations": terminations, "truncations": truncations, "dones": dones,
            "episode_starts": np.concatenate([x.begins, x.dones])[: len(dones)], "last_done": x.dones[-1],
            "discounts": x.gamma * ~terminations, "gamma": x.gamma, "gae_lambda": x.gae_lambda, "valid": ~x.resets,
        }  # fmt: skip
        return {name: self.packed(meaning[base(role)], role, env) for name, role in self.roles.items()}

    def packed(self, array, role, env):
        if not isinstance(array, np.ndarray):
            return array
        array = np.array(~array[..., env] if role != base(role) else array[..., env])
        is_row = base(role) in ("bootstrap", "last_done")
        if array.dtype == bool and not self.bool_flags:
            array = array.astype(float)
        if is_row and self.wide_bootstrap:
            array = array[None]
        if self.layout == "(N, T)":
            array = array.T
        if "tensors" in self.container:
            torch = importlib.import_module("torch")
            array = torch.as_tensor(array, dtype=torch.bool if array.dtype == bool else torch.float32)
        elif array.ndim == 0 or (array.ndim == 1 and self.container == "lists" and not is_row):
            return array.tolist()
        return list(array) if "lists" in self.container and not is_row else array

    def run(self, arguments):
        bound = inspect.BoundArguments(self.signature, arguments)  # some parameters have no keyword
        return self.function(*bound.args, **bound.kwargs)

    def __call__(self, x):
        """One or two arrays (T, N), or a Fault."""
        columns = []
        for env in range(x.rewards.shape[1]) if self.layout == "(T,)" else [slice(None)]:
            resets = x.resets[..., env].T if self.layout == "(N, T)" else x.resets[..., env]
            try:
                result = self.run(self.arguments(x, env))
            except (Exception, SystemExit) as error:
                file = getattr(getattr(inspect.unwrap(self.function), "__code__", None), "co_filename", None)
                frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file or not file][-1:]
                where, line = (f" in line {frames[-1].lineno}", frames[-1].line) if frames else ("", "")
                raise Fault(f"it raises {type(error).__name__}{where}: {str(error) or line}") from None
            try:
                is_pair = isinstance(result, (tuple, list)) and len(result) == 2 and np.shape(result[0]) == resets.shape
                columns.append([to_numpy(part) for part in (result if is_pair else [result])])
            except (TypeError, ValueError):
                raise Fault(f"it returns a {type(result).__name__}, neither an array nor a pair of them") from None
            for part in columns[-1]:
                if part.shape != resets.shape:
                    raise Fault(f"it returns the shape {part.shape} for rewards of the shape {resets.shape}")
                if not np.isfinite(part[~resets]).all():
                    raise Fault("it returns numbers that are not finite")
            if len(columns[-1]) != len((self.outputs or columns)[0]):
                raise Fault("it returns one result at times, and two at others")
        if self.layout == "(T,)":
            return [np.stack(parts, axis=1) for parts in zip(*columns, strict=True)]
        return [part.T if self.layout == "(N, T)" else part for part in columns[0]]

    def __str__(self):
        names = []
        for name, role in self.roles.items():
            is_long = self.long_values if role == "values" else self.long_flags and base(role) in set().union(*FLAGS)
            names.append(name + f" ({role})" * (name != role) + " of T + 1 rows" * is_long)
        return f"{self.container} {self.layout}: {', '.join(names)}"

    def cases(self, i, estimate):
        """Yield (rollout, the estimate, what output i is)."""
        for x, outputs in zip(self.rollouts, self.outputs, strict=True):
            yield x, estimate(x), outputs[i]

    def is_explained(self, i, estimate):
        """Whether output i is this estimate on every rollout."""
        return all(agree(*case) for case in self.cases(i, estimate))

    def is_right(self, x, i, label):
        """Whether output i for this rollout is what the label says, or None if the function fails."""
        with contextlib.suppress(Fault):
            return bool(agree(x, RIGHT[label](x), self(x)[i]))
        return None

    def num_right(self, i, label):
        """How many numbers of output i are, at their place, what this label says."""
        cases = self.cases(i, RIGHT[label])
        return sum((np.isclose(expected, got, 1e-4, 1e-4) & ~x.resets).sum() for x, expected, got in cases)

    def labels(self):
        """What each output rightly is, or None."""
        outputs = range(len(self.outputs[0]))
        return [next((label for label in RIGHT if self.is_explained(i, RIGHT[label])), None) for i in outputs]


def to_numpy(data):
    """Floats from an array, a tensor, a number, or a list of those."""
    if isinstance(data, (list, tuple)):
        return np.array([to_numpy(row) for row in data])
    if data is None:
        raise TypeError("no number")
    data = data.detach().cpu().double() if hasattr(data, "detach") else data
    return np.asarray(data, dtype=float).copy()  # the function may use its buffer again


def agree(x, expected, got):
    """Whether they are equal, up to float32, wherever there was a transition."""
    expected, got = expected[~x.resets], got[~x.resets]
    return np.abs(expected - got).max(initial=0.0) <= 1e-4 * (1.0 + np.abs(expected).max(initial=0.0))


def calls_that_run(function, given, args, faults):
    """For every reading of the parameters and every layout: the first way to call the function that works.

    Two ways are tried where a function can mean either: T + 1 values, or T, if it takes no bootstrap; T + 1 episode
    starts, or T, if it is not told the last done.
    """
    uses_torch = "torch" in getattr(getattr(inspect.unwrap(function), "__code__", None), "co_names", ())
    ran = []
    for containers in (TENSORS, PLAIN) if uses_torch else (PLAIN, TENSORS):
        for roles, layout in itertools.product(readings(function, given), ("(T, N)", "(T,)", "(N, T)")):
            if any(roles[name] == "bootstrap" and before[name] == "next_values" for before in ran for name in roles):
                continue  # what works on next values, as its name says, is judged on them
            has = {*map(base, roles.values())}
            has_flags, has_bootstrap = has & set().union(*FLAGS), has & {"bootstrap", "next_values"}
            starts_only = "episode_starts" in has and "last_done" not in has
            long_values = (False, True) if has_bootstrap else (True, False)
            long_flags = (True, False) if starts_only else (False, True) if has_flags else (False,)
            lengths = list(itertools.product(long_values, long_flags))
            # Forms that mean the same come first, and one that runs is enough. The rest may mean another thing.
            same = 1 if starts_only else len(lengths) if has_bootstrap else len(lengths) // 2
            for some in (lengths[:same], lengths[same:]):
                if call := first_that_runs(function, roles, layout, some, containers, args, faults):
                    ran.append(roles)
                    yield call
        if ran:
            break


def first_that_runs(function, roles, layout, lengths, containers, args, faults):
    """A Call of the first of these forms that works, or None. What gives other numbers when called again does not."""
    forms = itertools.product(lengths, containers, (False, True), (False, True))
    for (long_values, long_flags), container, bool_flags, wide_bootstrap in forms:
        call = Call(function, roles, layout, long_values, long_flags, container, bool_flags, wide_bootstrap)
        rng = np.random.default_rng(args.seed)
        try:
            for (*discounts, num_steps, size), next_step in itertools.product(ROLLOUTS, (False, True)):
                draw = functools.partial(rng.normal, 0.0, size)
                x = call.rollout(args, rng, draw, next_step, *discounts, num_steps=num_steps)
                call.rollouts.append(x)
                call.outputs.append(call(x))
            x = call.rollouts[0]
            if not all(agree(x, one, other) for one, other in zip(call.outputs[0], call(x), strict=True)):
                raise Fault("called once more with the same arguments, it returns other numbers")
        except Fault as fault:
            faults.append((str(fault), str(call)))
        else:
            return call
    return None


def in_other_form(call, args, **changes):
    """The call with other roles or lengths, or None if it does not work so."""
    call, containers = replace(call, **changes), PLAIN if call.container in PLAIN else TENSORS
    lengths = [(call.long_values, call.long_flags)]
    return first_that_runs(call.function, call.roles, call.layout, lengths, containers, args, [])


def mixes_environments(call):
    """What the unexplained output rightly is as long as all environments do the same as any one of them, or None."""
    i, twins, num_envs = call.labels().index(None), [], call.rollouts[0].rewards.shape[1]
    for x, env in itertools.product(call.rollouts, range(num_envs)):
        twins.append(replace(x, **{k: v[:, [env] * num_envs] for k, v in vars(x).items() if isinstance(v, np.ndarray)}))
    labels = "advantages", "lambda-returns"
    return next((label for label in labels if all(call.is_right(x, i, label) for x in twins)), None)


MIXED = "environments are mixed", "each environment has a sum of its own: nothing may reduce or join the axis N"


def depends_on_others(call):
    """Whether what an environment gets changes with the rewards of the others."""
    x, i = call.rollouts[0], call.labels().index(None)
    for kept in np.eye(x.rewards.shape[1]):
        others_changed = replace(x, rewards=np.where(kept, x.rewards, -2.0 * x.rewards))
        with contextlib.suppress(Fault):
            if not agree(x, kept * call.outputs[0][i], kept * call(others_changed)[i]):
                return True
    return False


def blame(call, num_mistakes):
    """(mistake, cure, output, what it should be) if so many mistakes at once give the numbers returned, else None."""
    labels = call.labels()
    if None not in labels and "advantages" not in labels:
        cure = "subtract the values" + ("; " + TRACE) * ("gae_lambda" in call.has and labels != ["lambda-returns"])
        return f"{labels[0]} are returned for advantages", cure, 0, "advantages"
    i = 1 - labels.index("advantages") if "advantages" in labels else labels.index(None)
    names = [name for name, estimate in WRONG_RETURNS.items() if call.is_explained(i, estimate)]
    wrong_returns = (names[0], "returns = advantages + values", i, "lambda-returns") if names else None
    if "advantages" in labels:
        return wrong_returns
    if num_mistakes == 1 and (right := mixes_environments(call)):
        return *MIXED, i, right
    known = [entry for entry in MISTAKES if entry[0] != NO_MASK or num_mistakes == 1]
    single = [(name, cure, change) for name, cure, changes in known for change in changes]
    # A function that cannot know V of the true successor may take the next row's, and err with that.
    knows_all = "next_values" in call.has and len(call.ends) == 2
    views = [[]] if knows_all else [[], [lambda x: {"next_values": x.values[1:]}]]
    for view, mistakes in itertools.product(views, itertools.combinations(single, num_mistakes)):
        names, cures, changes = zip(*mistakes, strict=True)
        wrong = functools.partial(wrong_gae, changes=[*view, *changes])
        for right, estimate in (("advantages", wrong), ("lambda-returns", plus_values(wrong))):
            if len(set(names)) == num_mistakes and call.is_explained(i, estimate):
                return " and ".join(names), "; ".join(dict.fromkeys(cures)), i, right
    return wrong_returns


def smallest(call, i, right, args):
    """(rollout, expected, got) where output i is wrong: the shortest one, of plain numbers, with the fewest dones."""
    rng = np.random.default_rng(args.seed)
    envs = (1,) if call.layout == "(T,)" else (1, 2)
    for num_steps, size, num_envs in itertools.product((*range(1, 8), 20, 160), (1.0, 20.0, 0.3), envs):
        cases, discounts = [], (0.99, 0.95) if num_steps > 9 else (0.5, 0.8)
        for next_step in [False, True] * 20:
            whole = functools.partial(rng.choice, size * np.arange(1.0, 10.0))
            x = call.rollout(args, rng, whole, next_step, *discounts, num_steps=num_steps, num_envs=num_envs)
            with contextlib.suppress(Fault):
                cases.append((x, RIGHT[right](x), call(x)[i]))
        if wrong := [case for case in cases if not agree(*case)]:
            return min(wrong, key=lambda case: case[0].dones.sum())
    return next(case for case in call.cases(i, RIGHT[right]) if not agree(*case))


def remarks(call, args):
    """What a correct function returns, what it cannot know, and what it cannot take."""
    labels, rng = call.labels(), np.random.default_rng(args.seed)
    x = call.rollout(args, rng, rng.normal, False)
    env = 0 if call.layout == "(T,)" else slice(None)
    arguments, untouched = call.arguments(x, env), call.arguments(x, env)
    with contextlib.suppress(Exception, SystemExit):
        call.run(arguments)
    written = [name for name in arguments if repr(arguments[name]) != repr(untouched[name])]
    hard = {
        "lambda 0": replace(x, gae_lambda=0.0) if "gae_lambda" in call.has else x,
        "lambda 1": replace(x, gae_lambda=1.0) if "gae_lambda" in call.has else x,
        "gamma 1": replace(x, gamma=1.0) if call.has & {"gamma", "discounts"} else x,
        "integer rewards": replace(x, rewards=np.rint(4.0 * x.rewards).astype(int)),
        "a step both terminated and truncated": replace(x, truncations=x.dones) if len(call.ends) == 2 else x,
        "a rollout of one step": call.rollout(args, rng, rng.normal, False, num_steps=1),
        "one environment": call.rollout(args, rng, rng.normal, False, num_envs=1),
        "a rollout of 1,024 steps": call.rollout(args, rng, rng.normal, False, 0.99, 0.95, num_steps=1024),
    }
    fails = [name for name, x in hard.items() if not call.is_right(x, 0, labels[0])]
    numbers = "flags that are numbers" if call.bool_flags else "flags that are booleans"
    others = {numbers: replace(call, bool_flags=not call.bool_flags)}
    if call.long_values and "not_dones" in call.roles.values() and not call.long_flags:
        others["masks of T + 1 rows, as its values have"] = replace(call, long_flags=True)
    for name, other in others.items():  # only an error that nobody would see is worth a note
        if other.is_right(other.rollout(args, rng, rng.normal, False), 0, labels[0]) is False:
            fails.append(name)
    called_dones = [k for k, role in call.roles.items() if role == "terminations" and ROLE_OF.get(k) == "dones"]
    notes = [
        (f"it returns {', '.join(labels)}", labels not in (["advantages"], ["advantages", "lambda-returns"])),
        ("its one flag cannot tell truncation from termination: add gamma V(s_{t+1}) to the reward of a truncated step "
         "before the call, or let it take both flags", call.ends == ["terminated"]),
        ("its one flag cannot tell termination from truncation: it knows no termination", call.ends == ["truncated"]),
        ("beside truncations, its done flag must be the terminations alone", called_dones),
        ("within one episode, to which alone its done flag applies, it is right", call.last == "either"),
        ("without a done flag it is right within one episode, V(s_T) being 0 if that terminated",
         not call.ends and call.last not in ("either", "terminated")),
        ("without V(s_T) " + ONE_TERMINATED, call.last == "terminated"),
        ("V(s_{t+1}) from the next row of values is right under NEXT_STEP autoreset; under SAME_STEP, a truncated step "
         "needs next_values", call.ends != call.same_step_ends),
        ("not told whether the last step ended an episode, it is right if that did not", call.last == "running"),
        (f"it writes to its input {', '.join(written)}", written),
        (f"it goes wrong with {'; '.join(fails)}", fails),
    ]  # fmt: skip
    return assumptions(call, args) + [note for note, holds in notes if holds]


def narrower_terms(call, i, right, args):
    """Yield what would have to hold for a function with a mistake to be right."""
    rng, episodes, zeroed = np.random.default_rng(args.seed), [], []
    knows_starts = call.has & {"episode_starts", "last_done"}  # of which an episode has one in its first row
    kinds = [{"terminated": "terminations", "truncated": "truncations"}[end] for end in call.ends]
    for *discounts, num_steps, size in ROLLOUTS * 3 if kinds and not knows_starts else ():
        x = call.rollout(args, rng, functools.partial(rng.normal, 0.0, size), False, *discounts, num_steps=num_steps)
        ended, no = rng.integers(len(kinds) + 1, size=x.dones.shape[1]), x.dones & False  # 0: it runs on
        last = {kind: with_last(no, ended == k) for k, kind in enumerate(kinds, start=1)}
        episodes.append(replace(x, next_values=x.values[1:], dones=with_last(no, ended > 0), **last))
    for x in call.rollouts:
        next_values = np.where(x.terminations, 0.0, x.next_values)
        zeroed.append(replace(x, next_values=next_values, values=with_last(x.values, next_values[-1])))
    terms = {
        "each call holds one episode, or a part of one, with no end before the last row": episodes,
        "what it gets as V(s_{t+1}) is 0 after a termination": zeroed,
    }
    for term, rollouts in terms.items():
        if rollouts and all(call.is_right(x, i, right) for x in rollouts):
            yield f"it is right if {term}"
    for name, role in call.roles.items():
        if "episode_starts" in role:
            roles = call.roles | {name: role.replace("episode_starts", "dones")}
            other = in_other_form(call, args, roles=roles, long_flags=False)
            if other and other.labels()[i] == right:
                yield f"it is right if {name}[t] is about the end of step t itself: --map {name}={roles[name]}"


def assumptions(call, args):
    """What is taken for granted of a function, right or wrong, because its parameters do not say."""
    names = [name for name, parameter in call.signature.parameters.items() if "VAR" not in parameter.kind.name]
    default = ", ".join(name for name in names if name not in call.roles)
    valid = next((name for name, role in call.roles.items() if role == "valid"), None)
    notes = [
        (f"left at its default, so not judged: {default} (--map NAME=ROLE passes an array; wrap it to set a switch)",
         default),
        (f"{valid} is 1 on every transition: padding is not judged", valid),
        (f"it takes no gamma: {args.gamma} is expected inside (--gamma)", not call.has & {"gamma", "discounts"}),
        (f"it takes no lambda: {args.gae_lambda} is expected inside, not the 1 of returns minus values (--gae-lambda)",
         "gae_lambda" not in call.has),
    ]  # fmt: skip
    return [note for note, holds in notes if holds]


def judge(function, name, given, args):
    """The verdict on a function, as the dict that --json prints."""
    report = {"function": name, "verdict": "correct", "mistake": None, "cure": None, "t": None, "env": None}
    report |= {"expected": None, "got": None, "rollout": None, "called_with": None, "layout": None, "notes": []}
    faults, wrong, terms = [], [], []
    for call in calls_that_run(function, given, args, faults):
        labels = call.labels()
        only_returns = labels == ["lambda-returns"] and "adv" not in name.rpartition(":")[2].lower()
        if only_returns or ("advantages" in labels and None not in labels and len(set(labels)) == len(labels)):
            # A layout that is wrong because environments are mixed in it is what the author meant: report that one.
            others = [other for other in wrong if other.roles == call.roles and other.layout != call.layout]
            fuller = [other.roles.keys() - call.roles.keys() for other in wrong if other.layout == call.layout]
            wrong = [other for other in others if None in other.labels() and mixes_environments(other)]
            # T + 1 rows of values may be right by themselves, and hide that nothing is added to T rows.
            short = call.long_values and in_other_form(call, args, long_values=False)
            blamed = blame(short, 1) if short and None in short.labels() else None
            if not wrong and blamed and blamed[0] == NO_BOOTSTRAP:
                wrong, terms = [short], ["given T + 1 rows of values, it is right"]
            if not wrong:
                notes = [f"on {other.layout} it is wrong without an error" for other in others]
                notes += [f"given {name}, too, it is wrong" for name in sorted(set().union(*fuller))]
                few = call.long_flags and "episode_starts" in call.has and in_other_form(call, args, long_flags=False)
                going_on = "it is right if the last step ends no episode"
                for rows, other, right in (("values", short, ONE_TERMINATED), ("episode starts", few, going_on)):
                    if other and None in other.labels():
                        mistake = f": {blamed[0]}" if (blamed := blame(other, 1)) else ""
                        notes += [f"given T rows of {rows}, it is wrong without an error{mistake}"]
                    elif other:
                        notes += [f"given T rows of {rows}, {right}"]
                report |= {"called_with": str(call), "layout": call.layout}
                return report | {"notes": notes + remarks(call, args)}
            break
        wrong.append(call)
    if not wrong:
        mistake, called_with = min(faults, key=lambda fault: fault[0].startswith("it raises"))  # of those, the first
        notes = ["it was tried with (T, N), (T,) and (N, T): if it takes another shape, wrap it in a function of yours"]
        return report | {"verdict": "error", "mistake": mistake, "called_with": called_with, "notes": notes}
    for num_mistakes, call in itertools.product((1, 2), wrong):
        if blamed := blame(call, num_mistakes):
            mistake, cure, i, right = blamed
            break
    else:
        possible = itertools.product(wrong, ("advantages", "lambda-returns"))
        nameless = [(call, call.labels().index(None), label) for call, label in possible if label not in call.labels()]
        unmixed = [one for one in nameless if not depends_on_others(one[0])]
        call, i, right = max(unmixed or nameless, key=lambda one: one[0].num_right(*one[1:]))
        unknown = f"its {right.split('-')[-1]} are wrong, by no mistake known here", None
        mistake, cure = unknown if unmixed else MIXED
    x, expected, got = smallest(call, i, right, args)
    t, env = np.argwhere(~np.isclose(got, expected, 1e-4, 1e-4) & ~x.resets)[0].tolist()
    rollout = vars(x) | {"expected": expected, "got": got}
    return report | {
        "verdict": "mistake" if cure else "unknown mistake", "mistake": mistake, "cure": cure, "t": t, "env": env,
        "expected": float(expected[t, env]), "got": float(got[t, env]), "called_with": str(call), "layout": call.layout,
        "notes": [*terms, *narrower_terms(call, i, right, args), *assumptions(call, args)]
        + ["expected and got are lambda-returns"] * (right == "lambda-returns"),
        "rollout": {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in rollout.items()},
    }  # fmt: skip


def describe(report):
    where = f" on {report['layout']}" * (report["verdict"] == "correct" and report["layout"] != "(T, N)")
    lines = [": ".join(filter(None, [report["function"], report["verdict"] + where, report["mistake"]]))]
    if x := report["rollout"]:
        lines += ["  first at t = {t}, env = {env}: expected {expected:.6g}, got {got:.6g}".format(**report)]
        right = f"right is A_t = delta_t + gamma lambda (1 - done) A_{{t+1}} with {DELTA}"
        lines += [f"  cure: {report['cure']}" if report["cure"] else f"  {right}"]
        first, part = report["t"], "part of " * (len(x["rewards"]) > 9)  # it takes a long one: what matters is near
        rows = [at for at in np.ndindex(np.shape(x["rewards"])) if not part or first <= at[0] < first + 9]
        lines += [f"  {part}the smallest rollout that shows it, with gamma {x['gamma']} and lambda {x['gae_lambda']}:"]
        lines += ["    t env    reward     value  next value  expected       got"]
        for t, env in rows:
            numbers = [x[key][t][env] for key in ("rewards", "values", "next_values", "expected", "got")]
            ends = {"terminations": "terminated", "truncations": "truncated", "resets": "reset row"}
            begins = t == 0 and x["begins"][0][env] and "episode_starts" in report["called_with"]
            end = ", ".join(["begins an episode"] * begins + [word for key, word in ends.items() if x[key][t][env]])
            lines += ["  {:3} {:3} {:9.4g} {:9.4g} {:11.4g} {:9.4g} {:9.4g}  {}".format(t, env, *numbers, end).rstrip()]
    lines += [f"  called with {report['called_with']}", *(f"  note: {note}" for note in report["notes"])]
    return "\n".join(lines)


def load(target):
    """The function that path/to/file.py:function or package.module:function names. The file is run to find it."""
    place, _, name = target.rpartition(":")
    is_file, argv = place.endswith(".py"), sys.argv
    if not place or (is_file and not Path(place).is_file()):
        raise UsageError(f"no file {place}" if place else f"{target}: write path/to/file.py:function")
    sys.path.insert(0, str(Path(place).resolve().parent) if is_file else "")
    sys.argv = [place]
    try:
        names = runpy.run_path(place, run_name="checked_file") if is_file else vars(importlib.import_module(place))
    except (Exception, SystemExit) as error:
        raise UsageError(f"{place}: loading it raises {type(error).__name__}: {error}") from None
    finally:
        sys.argv = argv
    if not callable(names.get(name)):
        own = [k for k, v in names.items() if inspect.isfunction(v) and v.__module__ == names["__name__"]]
        raise UsageError(f"{place} has no function {name}; it has {', '.join(own) or 'none, so wrap a method in one'}")
    return names[name]


def check_function(args):
    given = dict(pair.partition("=")[::2] for pair in args.map)
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():  # what the file prints is not our answer
        warnings.simplefilter("ignore")
        report = judge(load(args.function), args.function, given, args)
    return report["verdict"] == "correct", report, describe(report)


def check_bias_variance(args):
    rows = bias_variance(args.seed)
    held = claims(rows)
    if args.plot:
        plot(rows, args.plot)
    lines = [
        f"The lambda-return as an estimate of v(s): {NUM_STATES} states, gamma {GAMMA}, V = v + {CRITIC_ERROR}.\n",
        "lambda  squared bias  sampled [95 % interval]    variance  sampled [95 % interval]         sum",
    ]
    for row in rows:
        bias, variance = ("{:8.4f}  {:8.4f} [{:.4f}, {:.4f}]".format(*row[key]) for key in ("squared_bias", "variance"))
        total = row["squared_bias"][0] + row["variance"][0]
        lines += [f"{row['lambda']:6.2f}      {bias}{variance:>38}{total:12.4f}"]
    lines += ["", *(f"{'yes' if holds else 'NO':3}  {claim}" for claim, holds in held.items())]
    return all(held.values()), {"rows": rows, "claims": held}, "\n".join(lines)


def check_scripts(args):
    errors, reports = prove(args.seed), []
    for path in (Path(__file__).with_name(name) for name in ("ppo.py", "a2c.py", "a3c.py")):
        if path.is_file():  # only the function's text is run: the script may need packages that are not installed
            names = {"np": np}
            exec("".join(re.findall(r"^def compute_gae.*?(?=^\S|\Z)", path.read_text(), re.M | re.S)), names)
            if "compute_gae" not in names:
                raise UsageError(f"{path} has no compute_gae")
            reports.append(judge(names["compute_gae"], f"{path.name}:compute_gae", {}, args))
    lines = [f"{'compute_gae against':45}  largest error"]
    lines += [f"{name:45}  {error:13.1e}" for name, error in errors.items()]
    wrong = [report for report in reports if report["verdict"] != "correct"]
    lines += [describe(report) if report in wrong else f"{report['function']}: correct" for report in reports]
    return max(errors.values()) < 1e-10 and not wrong, {"errors": errors, "scripts": reports}, "\n".join(lines)


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        lonely = (args.map and not args.function) or (args.plot and not args.bias_variance)
        if lonely or (args.function and args.bias_variance):
            raise UsageError("--map goes with a function, --plot with --bias-variance, and those two not together")
        if args.seed < 0:
            raise UsageError(f"--seed must be at least 0, not {args.seed}")
        check = check_function if args.function else check_bias_variance if args.bias_variance else check_scripts
        right, report, text = check(args)
    except UsageError as error:
        print(f"gae_check.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report) if args.json else text)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
