# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5,<2.14", "gymnasium>=1.4,<2", "numpy>=1.26,<3", "tyro>=1,<2", "wandb>=0.19", "tqdm>=4.66"]
# ///
"""Proximal Policy Optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) in one file.

    python ppo.py                       # CartPole-v1, solved in seconds
    python ppo.py --env-id Acrobot-v1   # or any other Gymnasium environment with Discrete or Box actions
    python ppo.py --help                # every flag, its meaning and its default
    torchrun --nproc-per-node 2 ppo.py  # two processes, each with num_envs environments, average their gradients

Read `train` first, whose four phases are the algorithm, then `compute_gae` and `Agent`. What stands below `train` keeps
the run going: checks of the arguments, processes, evaluation, checkpoints and the log.

Arrays are time-major: T is `num_steps`, N is `num_envs`, and (T, N) holds a number for each step of each environment.
The prefix b_ marks the flat batch of a rollout's transitions, mb_ a minibatch of it.
"""

import io
import json
import math
import multiprocessing
import os
import pickle
import random
import shlex
import signal
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers.vector import RecordEpisodeStatistics, RecordVideo, TransformAction
from torch.distributions import Categorical, Independent, Normal
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment
    seed: int = 1  # seed of the environments, the initial weights, the actions and the minibatches
    total_timesteps: int = 200_000  # steps of all environments together, rounded down to whole rollouts
    num_envs: int = 64  # N, environments that step together
    num_steps: int = 32  # T, steps of each environment in a rollout
    vectorization_mode: Literal["sync", "async", "native"] | None = None  # None: native where it pays, else sync
    env_kwargs: tuple[tuple[str, int | float | bool | str], ...] | None = None  # arguments of environments: NAME VALUE
    normalize_obs: bool = False  # standardize observations, as byte vectors always are, and clip them to +-10
    normalize_reward: bool = False  # divide rewards by the running standard deviation of the discounted return
    clip_reward: float | None = None  # bound on |reward|, after any normalization: 10 goes with it, 1 with Atari
    log_std_init: float = 0.0  # initial log standard deviation of continuous actions

    learning_rate: float = 3e-3  # step size of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.98  # discount factor
    final_gamma: float | None = None  # gamma goes linearly to this in the first half of the run; None: it stays
    gae_lambda: float = 0.9  # lambda of GAE: 0 is the one-step TD error, 1 the Monte Carlo return of the rollout
    update_epochs: int = 4  # K, passes over each rollout
    num_minibatches: int = 4  # minibatches, and so optimizer steps, in each pass
    recompute_advantages: bool = False  # estimate the advantages anew before each further pass
    norm_adv: bool = True  # standardize the advantages of each minibatch
    clip_coef: float = 0.2  # epsilon of the clipped objective; inf turns the clip off
    clip_vloss: bool = False  # clip the change of the value by clip_coef, too
    vf_coef: float = 0.5  # weight of the value loss, half the mean squared error; the paper's c_1 is vf_coef / 2
    ent_coef: float = 0.0  # c_2, weight of the entropy bonus
    kl_coef: float = 0.0  # initial beta of the KL penalty; 0 turns the penalty off
    target_kl: float | None = None  # KL that beta adapts to; without a penalty, the KL that ends an update early
    max_grad_norm: float = 0.5  # bound on the global norm of the gradient; inf turns it off

    run_dir: str | None = None  # folder of the log; None: runs/<env_id>__<script>__<seed>__<time>
    checkpoint_interval: int = 100  # iterations from one checkpoint.pt to the next; the end always writes one
    resume: str | None = None  # checkpoint.pt of a run to continue, with its settings, in its folder
    eval_episodes: int = 0  # episodes to evaluate the agent on in the end; alone with --resume and 0 total_timesteps
    eval_deterministic: bool = False  # evaluate the mode of the policy, not samples
    capture_video: bool = False  # record episodes of the first environment to videos/ in the run folder
    track: bool = False  # log to Weights & Biases, too, and end at once if that cannot start
    wandb_project_name: str = "advanced-policy-optimization"  # project of --track
    wandb_entity: str | None = None  # team of --track
    cuda: bool = False  # train on the GPU, which has not been tried
    torch_deterministic: bool = True  # have cuDNN choose deterministic algorithms


class ConfigError(Exception):
    """Settings that cannot be trained with; the message is one line that names the flag and the remedy."""


class RunError(Exception):
    """What ends a run besides its own errors: a full disk, a killed environment, an environment's sys.exit."""


def make_envs(args):
    """Make the N environments as one `gymnasium.vector.VectorEnv`, or raise a ConfigError.

    Rewards are raw, and so are the returns in the log. Continuous actions are clipped to their bounds here, on their
    way into the environment, and nowhere else.
    """
    env_id = "ale_py:" * args.env_id.startswith("ALE/") + args.env_id
    is_atari = env_id.startswith("ale_py:ALE/")
    mode = "vector_entry_point" if args.vectorization_mode == "native" else args.vectorization_mode  # Gymnasium's word
    if mode is None and args.num_envs == 1 and not is_atari:  # Atari's native one preprocesses, too
        mode = "sync"  # faster for a single one; None leaves it to Gymnasium: native where there is one, else sync
    kwargs = {"reward_clipping": False} if is_atari and mode in (None, "vector_entry_point") else {}
    if mode == "async":
        kwargs["wrappers"] = (set_apart,)
    if args.capture_video:
        kwargs["render_mode"] = "rgb_array"
    try:
        envs = gym.make_vec(env_id, args.num_envs, mode, **kwargs, **dict(args.env_kwargs or ()))
        if args.capture_video:
            import moviepy  # noqa: F401  RecordVideo needs it, later: here its absence is one line

            envs.reset()
            if not isinstance(frames := envs.render(), (list, tuple)) or np.ndim(frames[0]) != 3:
                raise ValueError("render() must return a list with an image, (H, W, 3), of each environment")
    except Exception as error:
        flag = f"--env-id {args.env_id}" + " --env-kwargs" * bool(args.env_kwargs)
        flag += f" --vectorization-mode {args.vectorization_mode}" * bool(args.vectorization_mode)
        flag += " --capture-video" * args.capture_video
        package = "moviepy" if getattr(error, "name", None) == "moviepy" else "ale-py" * is_atari
        hint = f" (pip install {package})" if package and isinstance(error, ImportError) else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{flag}: {reason}{hint}") from error
    obs_space, space = envs.single_observation_space, envs.single_action_space
    autoreset_mode = envs.metadata.get("autoreset_mode")
    if not isinstance(obs_space, Box):
        raise ConfigError(f"--env-id {args.env_id}: observations must be Box, not {obs_space}; try FlattenObservation")
    if not (isinstance(space, Discrete) or isinstance(space, Box) and space.dtype.kind == "f"):
        raise ConfigError(f"--env-id {args.env_id}: actions must be Discrete or a Box of floats, not {space}")
    if autoreset_mode != gym.vector.AutoresetMode.NEXT_STEP:
        raise ConfigError(f"--vectorization-mode: {autoreset_mode} of {args.env_id} is not NEXT_STEP; try sync")
    envs = RecordEpisodeStatistics(envs)
    if isinstance(space, Box):
        envs = TransformAction(envs, lambda x: x.clip(space.low, space.high).astype(space.dtype, copy=False))
    elif space.start != 0 or space.dtype != np.int64:
        envs = TransformAction(envs, lambda x: (x + space.start).astype(space.dtype))
    return envs


def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class RunningStatistics(nn.Module):
    """Mean and variance of all that was seen: buffers, so that whatever saves or sends the weights has them, too."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))

    def update(self, batch):
        """Merge the statistics of a batch, (B, *shape), of each process into those of all before it."""
        batch = torch.as_tensor(batch, dtype=torch.float64, device=self.mean.device)
        mean = batch.mean(0)
        batch_size = average_over_processes(mean, len(batch))
        var = (batch - mean).square().mean(0)
        average_over_processes(var, len(batch))
        self.count += batch_size
        weight = batch_size / self.count
        delta = mean - self.mean
        self.mean += weight * delta
        self.var += weight * (var - self.var + (1 - weight) * delta.square())


def make_mlp(num_inputs, num_outputs, std):
    """Two hidden layers of 64 tanh units: (..., num_inputs) -> (..., num_outputs)."""
    return nn.Sequential(
        layer_init(nn.Linear(num_inputs, 64)), nn.Tanh(),
        layer_init(nn.Linear(64, 64)), nn.Tanh(),
        layer_init(nn.Linear(64, num_outputs), std=std),
    )


class Agent(nn.Module):
    """Actor and critic: two MLPs for vectors, two heads on one NatureCNN (Mnih et al. 2015) for uint8 images.

    Observations have the shape (..., *observation shape); there is one distribution, or one value, for each of them.
    """

    def __init__(self, envs, log_std_init=0.0, normalize_obs=False, normalize_reward=False):
        super().__init__()
        obs_space, action_space = envs.single_observation_space, envs.single_action_space
        is_box, num_outputs = isinstance(action_space, Box), gym.spaces.flatdim(action_space)
        self.log_std = nn.Parameter(torch.full(action_space.shape, float(log_std_init))) if is_box else None
        self.obs_shape, is_uint8 = obs_space.shape, obs_space.dtype == np.uint8
        self.is_image = self.is_channels_last = False
        if is_uint8 and len(self.obs_shape) == 3:
            self.is_channels_last = self.obs_shape[2] < self.obs_shape[0]  # (H, W, C), not (C, H, W)
            channels, height, width = np.roll(self.obs_shape, self.is_channels_last).tolist()
            self.is_image = min(height, width) >= max(channels, 36)  # 36 is the least that the CNN takes
        normalize_obs = normalize_obs or is_uint8 and not self.is_image  # bytes that can mean anything, in any scale
        self.obs_statistics = RunningStatistics(self.obs_shape) if normalize_obs else None
        self.return_statistics = RunningStatistics(()) if normalize_reward else None
        if self.is_image:
            self.obs_max = 1 if normalize_obs else int(obs_space.high.max())
            self.encoder = nn.Sequential(
                layer_init(nn.Conv2d(channels, 32, 8, stride=4)), nn.ReLU(),
                layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(),
                layer_init(nn.Conv2d(64, 64, 3)), nn.ReLU(), nn.Flatten(),
            )
            num_features = self.encoder(torch.zeros(1, channels, height, width)).shape[1]
            self.encoder.extend((layer_init(nn.Linear(num_features, 512)), nn.ReLU()))
            self.actor = layer_init(nn.Linear(512, num_outputs), std=0.01)
            self.critic = layer_init(nn.Linear(512, 1), std=1.0)
        else:
            self.actor = make_mlp(math.prod(self.obs_shape), num_outputs, std=0.01)
            self.critic = make_mlp(math.prod(self.obs_shape), 1, std=1.0)

    def encode(self, obs):
        """Turn observations into features for the actor and the critic, (..., F)."""
        if self.is_image and obs.shape[:-3].numel() > 64:  # in parts: faster on the CPU
            parts = obs.reshape(-1, *self.obs_shape).split(64)
            return torch.cat([self.encode(part) for part in parts]).reshape(*obs.shape[:-3], -1)
        if self.obs_statistics is not None:
            obs = ((obs - self.obs_statistics.mean) / (self.obs_statistics.var + 1e-8).sqrt()).clamp(-10, 10)
        if not self.is_image:
            return obs.float().reshape(*obs.shape[: obs.ndim - len(self.obs_shape)], -1)
        if self.is_channels_last:
            obs = obs.movedim(-1, -3)  # (..., H, W, C) -> (..., C, H, W)
        images = obs.reshape(-1, *obs.shape[-3:]).contiguous(memory_format=torch.channels_last)  # faster on the CPU
        return self.encoder(images.float() / self.obs_max).reshape(*obs.shape[:-3], -1)

    def forward(self, obs):
        """The policy pi(. | s), as a distribution over actions, and the value V(s)."""
        features = self.encode(obs)
        return self.make_dist(self.actor(features)), self.critic(features).squeeze(-1)

    def get_dist(self, obs):
        return self.make_dist(self.actor(self.encode(obs)))

    def get_value(self, obs):
        return self.critic(self.encode(obs)).squeeze(-1)

    def make_dist(self, outputs):
        if self.log_std is None:
            return Categorical(logits=outputs, validate_args=False)
        mean, std = outputs.reshape(outputs.shape[:-1] + self.log_std.shape), self.log_std.exp()
        return Independent(Normal(mean, std, validate_args=False), std.ndim, validate_args=False)


class NumpyPolicy:
    """The policy of an agent until its next update, from NumPy to NumPy, for the actions of a rollout.

    With the few rows of a step, calling PyTorch takes longer than the arithmetic, so the MLP of `make_mlp` is computed
    here a second time; any other network is left to PyTorch. A change of `encode` or `make_dist` belongs here, too.
    """

    def __init__(self, agent):
        self.agent, statistics = agent, agent.obs_statistics
        self.weights = [parameter.numpy(force=True).T for parameter in agent.actor.parameters()]
        tanh_mlp = [nn.Sequential, nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
        self.is_mlp = [type(x) for x in agent.actor.modules()] == tanh_mlp and len(self.weights) == 6  # 3 with a bias
        if agent.log_std is not None:
            self.std = agent.log_std.exp().numpy(force=True)
        if statistics is not None:
            self.obs_mean = statistics.mean.numpy(force=True)
            self.obs_std = (statistics.var + 1e-8).sqrt().numpy(force=True)

    def sample(self, obs, rng):
        """Sample an action for each observation, (N, ...), as get_dist(obs).sample() would."""
        if not self.is_mlp:
            with torch.no_grad():
                features = self.agent.encode(torch.as_tensor(obs, device=next(self.agent.parameters()).device))
                outputs = self.agent.actor(features).numpy(force=True)
        else:
            if self.agent.obs_statistics is not None:
                obs = ((obs - self.obs_mean) / self.obs_std).clip(-10, 10)
            w1, b1, w2, b2, w3, b3 = self.weights
            hidden = np.tanh(obs.astype(np.float32).reshape(len(obs), -1) @ w1 + b1)
            outputs = np.tanh(hidden @ w2 + b2) @ w3 + b3
        if self.agent.log_std is None:
            return (outputs + rng.gumbel(size=outputs.shape)).argmax(-1)  # the Gumbel-max trick
        return outputs.reshape(-1, *self.std.shape) + self.std * rng.standard_normal((len(obs), *self.std.shape))


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


def train(args):
    """Train an Agent as `args` say, write its log and checkpoints to a run folder, and return the agent.

    Raises a ConfigError before it begins, a FloatingPointError as soon as something is not finite, a RunError if the
    disk is full, and a SystemExit after the iteration in which Ctrl-C or SIGTERM has come.
    """
    rank, world_size = 0, 1
    if torch.distributed.is_initialized():
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    checkpoint = load_checkpoint(args.resume) if args.resume else None
    check_args(args, world_size, checkpoint)
    numbers = {name: x.item() for name, x in vars(args).items() if isinstance(x, np.generic)}
    args = replace(args, **numbers)  # NumPy's would keep checkpoint.pt from being read as data
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.cuda else "cpu")
    seed = args.seed * world_size + rank
    torch.manual_seed(seed)
    random.seed(seed)  # this and the next are for environments that draw from them
    np.random.seed(seed % 2**32)
    global_step = checkpoint["global_step"] if checkpoint else 0
    rng = np.random.default_rng((seed, 1, global_step))  # with seed alone, it would repeat an environment's numbers
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if torch.cuda.is_available() and not args.cuda:
        print("A GPU is there and not used: --cuda trains on it.", file=sys.stderr)
    envs = make_envs(args)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would slow small networks down and, in layer_init, change the initial weights
    agent = Agent(envs, args.log_std_init, args.normalize_obs, args.normalize_reward).to(device)
    if agent.is_image:
        torch.set_num_threads(num_threads)
    parameters = list(agent.parameters())
    theta = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())  # faster than a dozen small tensors
    for parameter, data in zip(parameters, theta.data.split([parameter.numel() for parameter in parameters])):
        parameter.data = data.view_as(parameter)  # a view of theta from here on
    if world_size > 1:
        torch.distributed.broadcast(theta.data, src=0)
    optimizer = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, fused=True)

    # Step t leads from row t to row t + 1 of obs and dones, so their last row is the first of the next rollout.
    T, N = args.num_steps, args.num_envs
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    obs = np.zeros((T + 1, N, *obs_space.shape), np.uint8 if obs_space.dtype == np.uint8 else np.float32)
    dones = np.zeros((T + 1, N), bool)
    actions = np.zeros((T + 1, N, *action_space.shape), np.int64 if isinstance(action_space, Discrete) else np.float32)
    rewards = np.zeros((T, N), np.float32)
    terminations = np.zeros((T, N), bool)
    discounted_returns = np.zeros((T, N))  # of each episode so far, to scale rewards by
    last_rows = (obs[-1], dones[-1], discounted_returns[-1])  # all that one rollout hands on to the next

    rollout_size = T * N * world_size
    num_iterations, first_iteration = args.total_timesteps // rollout_size, global_step // rollout_size
    kl_coef = checkpoint["kl_coef"] if checkpoint else args.kl_coef
    # Gymnasium seeds environment i with seed + i; the factor N keeps new runs apart. Atari takes 31 bits.
    obs[-1], _ = envs.reset(seed=(seed * N + global_step) % (2**31 - N))
    check_finite(global_step, observation=obs[-1])
    note = ""
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        state = checkpoint["processes"].get(rank)  # None if the run ended in a rollout that failed
        if not (state and set_process_state(state, envs, rng, last_rows)):
            note = ", resumed with new episodes"

    has_log = rank == 0 and first_iteration < num_iterations
    with Run(args, envs, checkpoint, has_log, num_iterations * rollout_size, note) as run:
        for iteration in range(first_iteration, num_iterations):
            progress, gamma = iteration / num_iterations, args.gamma
            lr = args.learning_rate * (1 - progress) if args.anneal_lr else args.learning_rate
            optimizer.param_groups[0]["lr"] = lr
            if args.final_gamma is not None:
                gamma += min(2 * progress, 1) * (args.final_gamma - args.gamma)

            # Collect a rollout.
            obs[0], dones[0] = obs[-1], dones[-1]
            policy, new_episodes = NumpyPolicy(agent), []
            for step in range(T):
                actions[step] = policy.sample(obs[step], rng)
                obs[step + 1], rewards[step], terminations[step], truncations, infos = run.envs.step(actions[step])
                dones[step + 1] = terminations[step] | truncations
                global_step += N * world_size
                check_finite(global_step, observation=obs[step + 1], reward=rewards[step])
                if "episode" in infos:
                    ended = infos["_episode"]
                    new_episodes += zip(infos["episode"]["r"][ended].tolist(), infos["episode"]["l"][ended].tolist())
                if args.normalize_reward:
                    so_far = rewards[step] + gamma * discounted_returns[step - 1]  # row -1 is of the last rollout
                    discounted_returns[step] = np.where(dones[step], 0.0, so_far)

            # Estimate advantages and returns.
            is_transition = ~dones[:-1]  # the row after a done is a reset, where the environment ignored the action
            if args.normalize_reward:
                agent.return_statistics.update(discounted_returns[is_transition])
                rewards /= math.sqrt(agent.return_statistics.var + 1e-8)
            if args.clip_reward is not None:
                np.clip(rewards, -args.clip_reward, args.clip_reward, out=rewards)
            all_obs = torch.as_tensor(obs, device=device)
            with torch.no_grad():
                dist, values = agent(all_obs)
                logprobs = dist.log_prob(torch.as_tensor(actions, device=device))  # in row T of no action: not used
            values, logprobs = values.numpy(force=True), logprobs.numpy(force=True)  # (T + 1, N)
            advantages = compute_gae(rewards, values[:-1], values[1:], terminations, dones[1:], gamma, args.gae_lambda)
            b_obs, b_actions, b_logprobs, b_values, b_advantages, b_returns = (
                torch.as_tensor(x[is_transition], device=device)
                for x in (obs[:-1], actions[:-1], logprobs[:-1], values[:-1], advantages, advantages + values[:-1])
            )
            explained_variance = 1 - b_advantages.var(correction=0) / b_returns.var(correction=0)  # A = return - V

            # Update the policy and the value function.
            diagnostics, is_stopped = [], False
            for epoch in range(args.update_epochs):
                if args.recompute_advantages and epoch > 0:
                    with torch.no_grad():
                        values = agent.get_value(all_obs).numpy(force=True)
                    advantages = compute_gae(
                        rewards, values[:-1], values[1:], terminations, dones[1:], gamma, args.gae_lambda
                    )
                    b_advantages = torch.as_tensor(advantages[is_transition], device=device)
                    b_returns = b_advantages + torch.as_tensor(values[:-1][is_transition], device=device)
                batch = (b_obs, b_actions, b_logprobs, b_values, b_advantages, b_returns)
                for indices in torch.randperm(len(b_obs)).tensor_split(args.num_minibatches):
                    mb_obs, mb_actions, mb_logprobs, mb_values, mb_advantages, mb_returns = (x[indices] for x in batch)
                    dist, new_values = agent(mb_obs)
                    logratio = dist.log_prob(mb_actions) - mb_logprobs
                    ratio = logratio.exp()  # r_t(theta)
                    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                    if args.norm_adv:
                        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    policy_loss = -torch.min(ratio * mb_advantages, clipped_ratio * mb_advantages).mean()  # eq. 7

                    squared_error = (new_values - mb_returns).square()
                    if args.clip_vloss:
                        clipped_values = mb_values + (new_values - mb_values).clamp(-args.clip_coef, args.clip_coef)
                        squared_error = torch.max(squared_error, (clipped_values - mb_returns).square())
                    value_loss = 0.5 * squared_error.mean()

                    with torch.set_grad_enabled(args.ent_coef > 0):  # without a bonus, its gradient would be time lost
                        entropy = dist.entropy().mean()
                    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss  # eq. 9, negated
                    approx_kl = (ratio - 1 - logratio).mean()  # KL(old || new): unbiased, and each term is >= 0
                    if args.kl_coef > 0:
                        loss = loss + kl_coef * approx_kl  # with clip_coef inf, this makes it eq. 8

                    clipfrac = (clipped_ratio != ratio).float().mean()
                    diagnostics.append(torch.stack((policy_loss, value_loss, entropy, approx_kl, clipfrac)).detach())
                    if args.kl_coef == 0 and args.target_kl is not None:
                        kl = approx_kl.detach()
                        average_over_processes(kl, len(indices))
                        is_stopped = kl.item() > args.target_kl
                    if is_stopped:
                        break
                    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
                    theta.grad = torch.cat([gradient.flatten() for gradient in gradients])
                    average_over_processes(theta.grad, len(indices))
                    theta.grad *= (args.max_grad_norm / theta.grad.norm()).clamp(max=1)
                    run.state = None  # a failure from here on must not save half an update
                    optimizer.step()
                if is_stopped:
                    break
            if args.kl_coef > 0 and args.target_kl is not None:
                with torch.no_grad():
                    logratio = agent.get_dist(b_obs).log_prob(b_actions) - b_logprobs
                kl = (logratio.exp() - 1 - logratio).mean()
                average_over_processes(kl, len(b_obs))
                if kl < args.target_kl / 1.5:
                    kl_coef = max(kl_coef / 2, 1e-6)  # without bounds, it would be lost at 0 or at infinity
                elif kl > args.target_kl * 1.5:
                    kl_coef = min(kl_coef * 2, 1e6)
            if agent.obs_statistics is not None:  # only now: a rollout and its update see the same policy
                agent.obs_statistics.update(b_obs)

            # Log.
            means = torch.cat((torch.stack(diagnostics).mean(0), explained_variance[None]))
            average_over_processes(means, len(b_obs))
            *losses, explained_variance = means.tolist()
            metrics = dict(zip(("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"), losses))
            check_finite(global_step, **metrics, parameters=theta.numpy(force=True))
            metrics |= {"explained_variance": explained_variance, "kl_coef": kl_coef, "learning_rate": lr}
            episodes, signals = zip(*gather((new_episodes, run.signal)))
            stop_signal = next(filter(None, signals), None)  # the same for all processes
            if has_log:
                run.log(global_step, sum(episodes, []), metrics)
            # The statistics can change before the first step of the next update: until then, the rest is as it is here.
            statistics = {name: x.clone() for name, x in agent.state_dict().items() if "statistics" in name}
            learned = {"agent": agent.state_dict() | statistics, "optimizer": optimizer.state_dict()}
            run.state = learned | {"global_step": global_step, "world_size": world_size, "kl_coef": kl_coef}
            if stop_signal or (iteration + 1) % args.checkpoint_interval == 0 or iteration + 1 == num_iterations:
                processes = dict(enumerate(gather(get_process_state(envs, rng, last_rows))))
                if has_log:
                    run.save(processes)
            if stop_signal:
                run.signal = stop_signal
                break

    torch.set_num_threads(num_threads)
    if rank == 0 and args.eval_episodes > 0:
        evaluate(agent, args, run.dir)
    return agent


def check_args(args, world_size=1, checkpoint=None):
    """Raise a ConfigError for the first setting that is out of range, or does not fit the others or the checkpoint."""
    rollout_size = args.num_envs * args.num_steps * world_size
    fewest_steps = 2 if args.num_envs > 1 else 4  # two transitions, where every other row is a reset
    fewest_in_all = 0 if checkpoint else rollout_size
    most = args.num_envs * (args.num_steps // 2) // 2  # half the rows of a rollout can be resets
    words = {"true", "false", "yes", "no", "on", "off", "none"}  # as strings, they would all count as true
    strings = {value.lower() for value in dict(args.env_kwargs or ()).values() if isinstance(value, str)}
    rules = {
        "from 0 to 2147483647": (("seed",), lambda x: 0 <= x < 2**31),
        "at least 1": (("num_envs", "update_epochs", "checkpoint_interval"), lambda x: x >= 1),
        f"at least {fewest_steps} with so many environments": (("num_steps",), lambda x: x >= fewest_steps),
        f"at least one rollout, {rollout_size}": (("total_timesteps",), lambda x: x >= fewest_in_all),
        f"from 1 to {most}, so that each has two transitions": (("num_minibatches",), lambda x: 1 <= x <= most),
        "from -20 to 20": (("log_std_init",), lambda x: -20 <= x <= 20),
        "from 0 to 1": (("gamma", "gae_lambda"), lambda x: 0 <= x <= 1),
        "from 0 to 1, or left out": (("final_gamma",), lambda x: x is None or 0 <= x <= 1),
        "at least 0 and finite": (("learning_rate", "vf_coef", "ent_coef", "kl_coef"), lambda x: 0 <= x < math.inf),
        "above 0": (("clip_reward", "target_kl"), lambda x: x is None or x > 0),
        "above 0; inf turns it off": (("clip_coef", "max_grad_norm"), lambda x: x > 0),
        "at least 0": (("eval_episodes",), lambda x: x >= 0),
        "given booleans as True or False": (("env_kwargs",), lambda _: not words & strings),
        "off (--no-cuda) where PyTorch finds no GPU": (("cuda",), lambda x: not x or torch.cuda.is_available()),
    }
    for rule, (names, holds) in rules.items():
        for name in names:
            if not holds(getattr(args, name)):
                raise ConfigError(f"--{name.replace('_', '-')} must be {rule}, not {getattr(args, name)}")
    may_change = ("total_timesteps", "checkpoint_", "resume", "eval_", "capture_video", "track", "wandb_", "cuda")
    for name, value in vars(Args(**checkpoint["args"])).items() if checkpoint else ():
        if getattr(args, name) != value and not name.startswith(may_change):
            raise ConfigError(f"--{name.replace('_', '-')} is {value} in the checkpoint; leave it out")
    if checkpoint and checkpoint["world_size"] != world_size and args.total_timesteps > 0:
        raise ConfigError(f"--resume needs as many processes as before, {checkpoint['world_size']}, not {world_size}")
    is_done = checkpoint and args.total_timesteps // rollout_size <= checkpoint["global_step"] // rollout_size
    if is_done and args.eval_episodes == 0:
        raise ConfigError(f"--total-timesteps must be above the {checkpoint['global_step']} steps that are done")


def set_apart(env):
    """Have an environment in a process of its own leave Ctrl-C to the one that trains, and send it all its errors."""
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("reset", "step", "render"):
        setattr(env, name, sendable_errors()(getattr(env, name)))
    return env


@contextmanager
def sendable_errors():
    """Turn errors that Gymnasium could not send, or not make anew from one argument, into a RuntimeError."""
    try:
        yield
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(type(error)(error)))  # what Gymnasium sends, and then raises
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


def check_finite(global_step, **quantities):
    """Raise a FloatingPointError for the first quantity, given by name, that is NaN or infinite anywhere."""
    for name, value in quantities.items():
        if not np.isfinite(value).all():
            index = np.argwhere(~np.isfinite(value))[0].tolist()  # of an array (N, ...): the environment first
            raise FloatingPointError(f"{name}{index or ''} is {np.asarray(value)[tuple(index)]} at step {global_step}")


def gather(item):
    """The items of all processes that torchrun has started, in a list; without torchrun, that of this one."""
    items = [item]
    if torch.distributed.is_initialized():
        items = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(items, item)
    return items


def average_over_processes(mean, count):
    """Turn a mean over `count` rows, in place, into that over the rows of all processes, and return their number.

    The processes are those that torchrun has started. Without it, nothing happens.
    """
    if torch.distributed.is_initialized():
        sums = torch.cat((count * mean.flatten(), mean.new_tensor([count])))
        torch.distributed.all_reduce(sums)
        count = sums[-1].item()
        mean.copy_((sums[:-1] / count).view_as(mean))
    return count


def evaluate(agent, args, run_dir):
    """Play `eval_episodes` whole episodes with the agent as it is, print their mean return, and write eval.json.

    Each environment has its quota of them: the first so many to end, of all, would be the short ones.
    """
    num_episodes = args.eval_episodes
    N = min(args.num_envs, max(num_episodes, 2))  # at least 2 if training has: one alone is made differently
    envs = make_envs(replace(args, num_envs=N))
    if args.capture_video:
        envs = RecordVideo(envs, f"{run_dir}/videos", record_first_only=True, name_prefix="evaluation")
    quotas = [num_episodes // N + (i < num_episodes % N) for i in range(N)]
    returns = [[] for _ in range(N)]
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=int(np.random.default_rng((args.seed, 2)).integers(2**31 - N)))  # others than training's
    step, device = 0, next(agent.parameters()).device
    with tqdm(total=num_episodes, desc="evaluation", unit="episode", leave=False) as bar:
        while sum(map(len, returns)) < num_episodes:
            with torch.no_grad():
                dist = agent.get_dist(torch.as_tensor(obs, dtype=torch.float32, device=device))
                actions = dist.mode if args.eval_deterministic else dist.sample()
            obs, rewards, _, _, infos = envs.step(actions.numpy(force=True))
            step += N
            check_finite(step, evaluation_observation=obs, evaluation_reward=rewards)
            for i in np.flatnonzero(infos.get("_episode", False)):
                if len(returns[i]) < quotas[i]:
                    returns[i].append(infos["episode"]["r"][i].item())
                    bar.update()
    envs.close()
    returns = np.concatenate(returns)
    mean = returns.mean()
    results = {"mean": mean, "std": None, "interval_95": None, "returns": returns.tolist()}
    summary = f"evaluation: return {mean:.1f}"
    if num_episodes > 1:
        std = returns.std(ddof=1)
        samples = np.random.default_rng(0).standard_t(num_episodes - 1, 10**6)  # its quantile, without SciPy
        margin = np.quantile(np.abs(samples), 0.95) * std / num_episodes**0.5
        low, high = mean - margin, mean + margin
        results |= {"std": std, "interval_95": [low, high]}
        summary += f", std {std:.1f}, 95 % interval {low:.1f} to {high:.1f}"
    print(summary)
    try:
        (run_dir / "eval.json").write_text(json.dumps(results, indent=2))
    except OSError as error:
        raise RunError(f"{run_dir}/eval.json: {error.strerror}") from error


def env_parts(env):
    """An environment and all the wrappers and environments inside it, outermost first."""
    is_wrapper = isinstance(env, (gym.Wrapper, gym.vector.VectorWrapper))
    inside = [env.env] if is_wrapper else env.envs if isinstance(env, gym.vector.SyncVectorEnv) else ()
    return [env, *(part for inner in inside for part in env_parts(inner))]


def get_process_state(envs, rng, rows):
    """What the next rollout of this process starts from, as data without code.

    That includes the environments if they are Gymnasium's classic control in this process; others start afresh.
    """
    parts, arrays = env_parts(envs), (np.ndarray, np.generic, tuple)
    modules = ["envs.classic_control.", "vector.sync", "wrappers.common", "wrappers.vector."]
    modules = tuple(f"gymnasium.{name}" for name in modules)  # where no state hides in other objects
    state = {"torch_rng": torch.get_rng_state(), "rng": rng.bit_generator.state, "rows": None, "parts": None}
    if all(type(part).__module__.startswith(modules) for part in parts):
        state["rows"], state["parts"] = [torch.tensor(row) for row in rows], [{} for _ in parts]
        for part, values in zip(parts, state["parts"]):
            for name, x in vars(part).items():
                if isinstance(x, np.random.Generator):
                    values[name] = x.bit_generator.state
                elif isinstance(x, (int, float, np.ndarray, np.generic)) or name == "state":  # MountainCar's is a tuple
                    values[name] = torch.from_numpy(np.array(x)) if isinstance(x, arrays) else x
    return state


def set_process_state(state, envs, rng, rows):
    """Go on from what `get_process_state` returned; return whether the environments, reset before, do so, too."""
    torch.set_rng_state(state["torch_rng"])
    rng.bit_generator.state = state["rng"]
    for row, value in zip(rows, state["rows"] or ()):
        row[...] = value.numpy()
    for part, values in zip(env_parts(envs), state["parts"] or ()):
        for name, x in values.items():
            if name not in vars(part):
                raise ConfigError(f"--resume: {type(part).__name__} has no {name}")
            elif isinstance(x, dict):
                getattr(part, name).bit_generator.state = x
            else:
                setattr(part, name, x.numpy()[()] if isinstance(x, torch.Tensor) else x)
    return state["parts"] is not None


def load_checkpoint(path):
    """Read what `Run.save` wrote, or raise a ConfigError. It runs no code, but its env_id can import a module."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # the first part whose checksum is wrong
            raise ValueError("it is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if missing := {"script", "args", "global_step", "agent", "optimizer", "log", "processes"} - checkpoint.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if checkpoint["script"] != Path(__file__).stem:
            raise ValueError(f"{checkpoint['script']}.py wrote it")
        Args(**checkpoint["args"])
        return checkpoint
    except Exception as error:
        reason = " ".join(str(error).split()).rpartition("WeightsUnpickler error: ")[2] or type(error).__name__
        raise ConfigError(f"--resume {path} is no checkpoint of this script: {reason}") from error


class Run:
    """The folder of a run, with metrics.csv, checkpoint.pt and args.json, and the end of all that a run has started.

    Ctrl-C or SIGTERM sets `signal`, upon which `train` ends after the iteration; a second one acts at once. If a run
    fails while `state` is set, as it is in a rollout, that is saved.
    """

    def __init__(self, args, envs, checkpoint, has_log, total_timesteps, note):
        self.args, self.envs, self.has_log, self.note = args, envs, has_log, note
        self.summary = self.signal = self.state = self.wandb = None
        name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.dir = Path(args.resume).parent if args.resume else Path(args.run_dir or f"runs/{name}")
        self.global_step = checkpoint["global_step"] if checkpoint else 0
        if not has_log:
            return
        log = checkpoint["log"] if checkpoint else (0, [], 0.0, 0, None)
        self.num_episodes, self.last_returns, self.seconds, csv_size, self.wandb_id = log
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            if args.capture_video:
                prefix = f"training-from-{self.global_step}"
                self.envs = RecordVideo(envs, f"{self.dir}/videos", record_first_only=True, name_prefix=prefix)
                self.envs.has_autoreset = True  # the first step it sees begins an episode: the reset was before it
            self.csv = open(self.dir / "metrics.csv", "r+b" if checkpoint else "xb", buffering=0)
            if self.csv.seek(0, os.SEEK_END) < csv_size:
                raise ConfigError(f"{self.csv.name} is shorter than it was when {args.resume} was written")
            self.csv.seek(self.csv.truncate(csv_size))  # rows that were written after it are about to come again
            (self.dir / "args.json").write_text(json.dumps(vars(args), indent=2))
        except OSError as error:
            if not checkpoint and "csv" in vars(self):
                os.remove(self.csv.name)  # leaves the folder to the next try
            remedy = "a checkpoint needs its run folder" if checkpoint else "choose a new, writable --run-dir"
            raise ConfigError(f"{error.filename or self.dir}: {error.strerror}; {remedy}") from error
        self.num_videos = len(list(self.dir.glob("videos/*.mp4")))
        if args.track:
            info = {"name": self.dir.name, "id": self.wandb_id, "resume": "allow", "config": vars(args)}
            try:
                import wandb

                self.wandb = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, dir=self.dir, **info)
            except Exception as error:
                if not checkpoint:
                    os.remove(self.csv.name)
                remedy = "try pip install wandb, wandb login or WANDB_MODE=offline"
                raise ConfigError(f"--track: {' '.join(str(error).split())}; {remedy}") from error
            self.wandb_id, self.wandb_video = self.wandb.id, wandb.Video
        self.start_time = time.perf_counter() - self.seconds
        self.bar = tqdm(total=total_timesteps, initial=self.global_step, desc=args.env_id, unit="step", unit_scale=True)

    def __enter__(self):
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        handlers = {number: signal.getsignal(number) for number in signals}  # those that a shell has ignored stay so
        self.handlers = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}
        for number in self.handlers:
            signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        self.signal = number
        signal.signal(number, self.handlers[number])

    def log(self, global_step, new_episodes, update):
        """Log the episodes, (return, length), that have ended since the last call, and what the update came to."""
        self.num_episodes += len(new_episodes)
        self.last_returns = [*self.last_returns, *(r for r, _ in new_episodes)][-100:]
        self.seconds = time.perf_counter() - self.start_time
        mean_return, mean_length = np.mean(new_episodes, axis=0) if new_episodes else (None, None)
        metrics = {
            "global_step": global_step,
            "wall_time": round(self.seconds, 3),
            "sps": round(global_step / self.seconds),
            "episodes": self.num_episodes,
            "episodic_return": mean_return,
            "episodic_length": mean_length,
        } | update
        header = ",".join(metrics) + "\n" if self.csv.tell() == 0 else ""
        row = ",".join("" if value is None else str(value) for value in metrics.values())
        data = f"{header}{row}\n".encode()
        try:
            while data:  # unbuffered, a write can take a part of it
                data = data[self.csv.write(data) :]
        except OSError as error:
            raise RunError(f"{self.csv.name}: {error.strerror}") from error
        self.send(metrics)
        last_return = f"return {np.mean(self.last_returns):.1f}" if self.last_returns else "no episode has ended"
        self.summary = f"{self.args.env_id}: {last_return}, {global_step} steps in {self.seconds:.1f} s{self.note}"
        self.bar.set_postfix_str(last_return, refresh=False)
        self.bar.update(global_step - self.global_step)
        self.global_step = global_step

    def send(self, metrics, exit_code=None):
        """Send metrics and all whole videos to Weights & Biases; with an exit code, the newest, too, and finish."""
        if self.wandb is None:
            return
        try:
            end = -1 if exit_code is None else None
            videos = sorted(self.dir.glob("videos/*.mp4"), key=os.path.getmtime)[self.num_videos : end]
            media = {path.stem: self.wandb_video(str(path)) for path in videos}
            if media or exit_code is None:
                self.wandb.log(metrics | media, step=metrics["global_step"])
            self.num_videos += len(videos)
            if exit_code is not None:
                self.wandb.finish(exit_code=exit_code)
        except Exception as error:
            tqdm.write(f"--track: {error}; the run goes on without it", file=sys.stderr)
            self.wandb = None

    def save(self, processes=None):
        """Write checkpoint.pt such that a kill at any moment leaves a whole one, this or the one before."""
        buffer, path, temporary = io.BytesIO(), self.dir / "checkpoint.pt", self.dir / "checkpoint.tmp"
        log = (self.num_episodes, self.last_returns, self.seconds, self.csv.tell(), self.wandb_id)
        about = {"script": Path(__file__).stem, "args": vars(self.args), "log": log, "processes": processes or {}}
        torch.save(about | self.state, buffer)
        try:
            os.fsync(self.csv.fileno())
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            self.state = None if processes else self.state  # what fails from here on has nothing to add
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"{path}: {error.strerror}") from error

    def __exit__(self, kind, error, traceback):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        is_stopped = self.signal and not isinstance(error, (FloatingPointError, RunError))
        if self.has_log:
            self.bar.close()
            if self.state and error and not isinstance(error, RunError):  # a rollout failed: save what it began with
                try:
                    self.save()
                except RunError as failure:
                    print(failure, file=sys.stderr)  # what the run failed of comes first
            if self.csv.tell() == 0:
                Path(self.csv.name).unlink(missing_ok=True)  # leaves the folder to the next try
            self.csv.close()
            if self.summary and (is_stopped or not error):
                print(f"{self.summary}, {self.dir}", flush=True)  # before the environments close, which can hang
            is_done = self.global_step >= self.bar.total and not self.args.eval_episodes
            if is_stopped and (self.dir / "checkpoint.pt").exists() and not is_done:
                is_parallel = torch.distributed.is_initialized()
                command = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if is_parallel else "python"
                rest = shlex.join((os.path.relpath(__file__), "--resume", f"{self.dir}/checkpoint.pt"))
                print(f"go on: {command} {rest}", flush=True)
        processes = getattr(self.envs.unwrapped, "processes", ())
        try:
            if error or not all(process.is_alive() for process in processes):
                raise ConnectionError  # asked to close, a process that hangs or has died might never answer
            self.envs.close()
        except (EOFError, ConnectionError):  # or one dies when it is asked
            for process in processes:
                process.kill()
                process.join()
                self.envs.unwrapped.closed = True
            self.envs.close()
        self.send({"global_step": self.global_step}, exit_code=1 if error or is_stopped else 0)
        if is_stopped:
            sys.exit(128 + self.signal)
        if isinstance(error, SystemExit) and not error.code:  # which looks like success
            raise RunError("something in the environment has called sys.exit") from error
        is_own = error and any(isinstance(x, Exception) for x in error.args)  # Gymnasium passes on an environment's
        if processes and isinstance(error, (EOFError, ConnectionError)) and not is_own:
            raise RunError(f"a process of --vectorization-mode async has died: {error!r}") from error


if __name__ == "__main__":
    try:
        if torch.distributed.is_torchelastic_launched():  # by torchrun
            import torch.distributed.nn  # imported later, it would keep the process group and its threads to the end
            torch.distributed.init_process_group()
        args = tyro.cli(Args)
        if args.resume:  # flags that are not given stay as they were
            args = tyro.cli(Args, default=Args(**load_checkpoint(args.resume)["args"]))
        train(args)
    except (ConfigError, FloatingPointError, RunError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if torch.distributed.is_initialized():  # else a thread of it sometimes aborts the exit
            torch.distributed.destroy_process_group()
