"""The policy cliff: what a step too far along one update does to the surrogate, to the KL and to the true return.

    python benchmark/cliff.py               # a minute or two; prints the figures, and writes benchmark/cliff.png

An agent that has learned CartPole-v1 for a while collects a rollout, and makes an update of ten passes over it by the
surrogate alone: without a clip, a penalty, a value loss or a bound on the gradient, and with a new Adam at the rate at
which ppo.py begins. Along the line from the old parameters (0) through the new ones (1) and beyond, the table has the
surrogate E[r A], its clipped form, the KL divergence from the old policy, all on the rollout, and the true mean return.
Its 95 % interval is that of the episodes; another --seed is another agent, rollout and update.
"""

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch.nn.utils import parameters_to_vector, vector_to_parameters

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import ppo  # noqa: E402


@dataclass
class Args:
    seed: int = 1  # seed of all that is random
    total_timesteps: int = 40_960  # steps that the agent learns before
    num_steps: int = 128  # length of the rollout of 64 environments
    update_epochs: int = 10  # passes of the update
    max_scale: float = 2.0  # how far along the update to look, in its own length
    eval_episodes: int = 256  # episodes behind each true return
    out: Path = HERE / "cliff.png"  # the picture


def collect(agent, args):
    """A rollout's observations, actions and standardized advantages, without the rows of resets."""
    envs, rng = ppo.make_envs(args), np.random.default_rng(args.seed)
    obs, dones = [envs.reset(seed=10_000 + args.seed)[0]], [np.zeros(args.num_envs, bool)]
    actions, rewards, terminations, policy = [], [], [], ppo.NumpyPolicy(agent)
    for _ in range(args.num_steps):
        actions.append(policy.sample(obs[-1], rng))
        next_obs, reward, terminated, truncated, _ = envs.step(actions[-1])
        obs.append(next_obs.copy())
        rewards.append(reward)
        terminations.append(terminated)
        dones.append(terminated | truncated)
    envs.close()
    obs, dones = torch.tensor(np.array(obs)), np.array(dones)
    with torch.no_grad():
        values = agent.get_value(obs).numpy()
    advantages = ppo.compute_gae(
        np.array(rewards), values[:-1], values[1:], np.array(terminations), dones[1:], args.gamma, args.gae_lambda
    )
    is_transition = ~dones[:-1]
    advantages = torch.tensor(advantages[is_transition], dtype=torch.float32)
    standardized = (advantages - advantages.mean()) / advantages.std()
    return obs[:-1][is_transition], torch.tensor(np.array(actions)[is_transition]), standardized


def true_return(agent, args, folder):
    with contextlib.redirect_stdout(None):
        ppo.evaluate(agent, args, folder)
    results = json.loads((folder / "eval.json").read_text())
    return results["mean"], *results["interval_95"]


def main(options):
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        args = ppo.Args(seed=options.seed, total_timesteps=options.total_timesteps, run_dir=f"{folder}/run")
        with contextlib.redirect_stdout(nowhere):
            agent = ppo.train(args)
        obs, actions, advantages = collect(agent, replace(args, num_steps=options.num_steps))
        optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
        old = parameters_to_vector(agent.parameters()).detach()
        with torch.no_grad():
            old_dist = agent.get_dist(obs)
            logprobs = old_dist.log_prob(actions)
        for _ in range(options.update_epochs):
            for rows in torch.randperm(len(obs)).tensor_split(args.num_minibatches):
                ratio = (agent.get_dist(obs[rows]).log_prob(actions[rows]) - logprobs[rows]).exp()
                optimizer.zero_grad()
                (-(ratio * advantages[rows]).mean()).backward()
                optimizer.step()
        direction, lines = parameters_to_vector(agent.parameters()).detach() - old, []
        args = replace(args, eval_episodes=options.eval_episodes)
        print(f"{'scale':>6}{'E[r A]':>10}{'clipped':>10}{'KL':>10}{'return':>10}   95 % interval")
        for scale in np.linspace(0, options.max_scale, 33):
            vector_to_parameters(old + scale * direction, agent.parameters())
            with torch.no_grad():
                dist = agent.get_dist(obs)
            ratio = (dist.log_prob(actions) - logprobs).exp()
            clipped = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean().item()
            kl = torch.distributions.kl_divergence(old_dist, dist).mean().item()
            line = (scale, (ratio * advantages).mean().item(), clipped, kl, *true_return(agent, args, Path(folder)))
            lines.append(line)
            print("{:6.2f}{:10.3f}{:10.3f}{:10.4f}{:10.1f}   {:.1f} to {:.1f}".format(*line), flush=True)

    scale, surrogate, clipped, kl, mean, low, high = np.array(lines).T
    figure, panels = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    panels[0].plot(scale, surrogate, color="#d55e00", label="E[r A]")
    panels[0].plot(scale, clipped, color="#0072b2", label="clipped, epsilon 0.2")
    panels[0].set_title("surrogate on the rollout", fontsize=11)
    panels[0].legend(frameon=False, fontsize=9)
    panels[1].plot(scale, kl, color="#0072b2")
    panels[1].set_title("KL(old, new)", fontsize=11)
    panels[2].plot(scale, mean, color="#0072b2")
    panels[2].fill_between(scale, low, high, color="#0072b2", alpha=0.2, linewidth=0)
    panels[2].set_title("true return", fontsize=11)
    for panel in panels:
        panel.axvline(1, color="gray", linewidth=0.8, linestyle=":")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step along one update without clip or penalty (1: the update)", fontsize=10)
    figure.savefig(options.out, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Args))
