# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5,<2.14", "gymnasium>=1.4,<2", "numpy>=1.26,<3", "tyro>=1,<2", "wandb>=0.19", "tqdm>=4.66"]
# ///
"""Advantage Actor-Critic, the synchronous A3C (Mnih et al. 2016, https://arxiv.org/abs/1602.01783), in one file.

    python a2c.py                       # CartPole-v1, solved in seconds
    python a2c.py --env-id Acrobot-v1   # or any other Gymnasium environment with Discrete or Box actions
    python a2c.py --help                # every flag, its meaning and its default
    torchrun --nproc-per-node 2 a2c.py  # two processes, each with num_envs environments, average their gradients

A2C is PPO with a single minibatch, a single pass over it, and the advantages as they are (Huang et al. 2022,
https://arxiv.org/abs/2205.09123). With the same optimizer, as here, the two make the same updates, up to rounding:

    python a2c.py --optimizer adam
    python ppo.py --update-epochs 1 --num-minibatches 1 --no-norm-adv --num-envs 16 --num-steps 8 --gae-lambda 1

Read `train` first, whose four phases are the algorithm, then `compute_gae` and `Agent`.

Arrays are time-major: T is `num_steps`, N is `num_envs`, and (T, N) holds a number for each step of each environment.
The prefix b_ marks the flat batch of a rollout's transitions.
"""

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers.vector import RecordEpisodeStatistics, TransformAction
from torch.distributions import Categorical, Independent, Normal
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # Gymnasium id of the environment
    seed: int = 1  # seed of the environments, the initial weights, the actions and the minibatches
    total_timesteps: int = 200_000  # steps of all environments together, rounded down to whole rollouts
    num_envs: int = 16  # N, environments that step together
    num_steps: int = 8  # T, steps of each environment in a rollout
    vectorization_mode: Literal["sync", "async", "native"] | None = None  # None: native where it pays, else sync
    normalize_obs: bool = False  # standardize observations by their running mean and variance, and clip them to +-10
    normalize_reward: bool = False  # divide rewards by the running standard deviation of the discounted return
    clip_reward: float | None = None  # bound on |reward|, after any normalization: 10 goes with it, 1 with Atari
    log_std_init: float = 0.0  # initial log standard deviation of continuous actions

    optimizer: Literal["rmsprop", "adam"] = "rmsprop"  # RMSprop with alpha 0.99, as published, or Adam; eps 1e-5
    learning_rate: float = 3e-3  # step size of the optimizer
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.98  # discount factor
    gae_lambda: float = 1.0  # lambda of GAE: 0 is the one-step TD error, 1 the Monte Carlo return
    vf_coef: float = 0.5  # weight of the value loss, half the mean squared error
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # bound on the global norm of the gradient; inf turns it off

    run_dir: str | None = None  # folder of the log; None: runs/<env_id>__<script>__<seed>__<time>
    track: bool = False  # log to Weights & Biases, too
    wandb_project_name: str = "advanced-policy-optimization"  # project of --track
    wandb_entity: str | None = None  # team of --track
    cuda: bool = False  # train on the GPU, which pays for images and not for vectors
    torch_deterministic: bool = True  # have cuDNN choose deterministic algorithms


class ConfigError(Exception):
    """Settings that cannot be trained with; the message is one line that names the flag and the remedy."""


def check_args(args, world_size=1):
    """Raise a ConfigError for the first setting that is out of range or does not fit the others."""
    batch_size = args.num_envs * args.num_steps * world_size
    rules = {
        "--seed must be from 0 to 2147483647": 0 <= args.seed < 2**31,
        "--num-envs must be at least 1": args.num_envs >= 1,
        "--num-steps must be at least 2, or 4 with one environment": args.num_steps >= (2 if args.num_envs > 1 else 4),
        f"--total-timesteps must be at least one rollout, {batch_size}": args.total_timesteps >= batch_size,
        "--clip-reward must be above 0": args.clip_reward is None or args.clip_reward > 0,
        "--log-std-init must be from -20 to 20": -20 <= args.log_std_init <= 20,
        "--learning-rate must be at least 0 and finite": 0 <= args.learning_rate < math.inf,
        "--gamma must be from 0 to 1": 0 <= args.gamma <= 1,
        "--gae-lambda must be from 0 to 1": 0 <= args.gae_lambda <= 1,
        "--vf-coef must be at least 0 and finite": 0 <= args.vf_coef < math.inf,
        "--ent-coef must be at least 0 and finite": 0 <= args.ent_coef < math.inf,
        "--max-grad-norm must be above 0; inf turns the bound off": args.max_grad_norm > 0,
        "--cuda needs a GPU, and PyTorch finds none; leave it out": not args.cuda or torch.cuda.is_available(),
    }
    for rule, holds in rules.items():
        if not holds:
            raise ConfigError(rule)


def check_finite(global_step, **quantities):
    """Raise a FloatingPointError for the first quantity, given by name, that is NaN or infinite anywhere."""
    for name, value in quantities.items():
        if not np.isfinite(value).all():
            index = np.argwhere(~np.isfinite(value))[0].tolist()  # of an array (N, ...): the environment first
            raise FloatingPointError(f"{name}{index or ''} is {np.asarray(value)[tuple(index)]} at step {global_step}")


def make_envs(args):
    """Make the N environments as one `gymnasium.vector.VectorEnv`, or raise a ConfigError.

    Rewards are raw, and so are the returns in the log. Continuous actions are clipped to their bounds here, on their
    way into the environment, and nowhere else.
    """
    env_id = args.env_id.removeprefix("ale_py:")
    is_atari = env_id.startswith("ALE/")
    mode = args.vectorization_mode or ("sync" if args.num_envs == 1 and not is_atari else None)
    mode = "vector_entry_point" if mode == "native" else mode
    kwargs = {"reward_clipping": False} if is_atari and mode in (None, "vector_entry_point") else {}
    try:
        envs = gym.make_vec(f"ale_py:{env_id}" if is_atari else env_id, args.num_envs, mode, **kwargs)
    except (gym.error.Error, ImportError) as error:
        hint = " (pip install ale-py)" if is_atari and isinstance(error, ImportError) else ""
        raise ConfigError(f"--env-id {args.env_id}: {' '.join(str(error).split())}{hint}") from error
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    autoreset_mode = envs.metadata.get("autoreset_mode")
    if not isinstance(obs_space, Box):
        raise ConfigError(f"--env-id {args.env_id}: observations must be a Box, not {obs_space}; wrap the environment")
    if not (isinstance(action_space, Discrete) or isinstance(action_space, Box) and action_space.dtype.kind == "f"):
        raise ConfigError(f"--env-id {args.env_id}: actions must be Discrete or a Box of floats, not {action_space}")
    if autoreset_mode != gym.vector.AutoresetMode.NEXT_STEP:
        raise ConfigError(f"--vectorization-mode: {autoreset_mode} of {args.env_id} is not NEXT_STEP; try sync")
    envs = RecordEpisodeStatistics(envs)
    if isinstance(action_space, Box):
        envs = TransformAction(envs, partial(np.clip, a_min=action_space.low, a_max=action_space.high))
    elif action_space.start != 0:
        envs = TransformAction(envs, partial(np.add, action_space.start))
    return envs


class RunLog:
    """The run folder, with args.json and metrics.csv; with --track, Weights & Biases gets the same metrics."""

    def __init__(self, args):
        name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.dir, self.wandb = Path(args.run_dir or f"runs/{name}"), None
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.csv = open(self.dir / "metrics.csv", "x", buffering=1)
            (self.dir / "args.json").write_text(json.dumps(vars(args), indent=2))
        except OSError as error:
            raise ConfigError(f"--run-dir {self.dir}: {error.strerror}; choose a new, writable folder") from error
        if args.track:
            import wandb

            self.wandb, project = wandb, args.wandb_project_name
            try:
                wandb.init(project=project, entity=args.wandb_entity, name=name, config=vars(args), dir=self.dir)
            except wandb.Error as error:
                raise ConfigError(f"--track: {error} Or set WANDB_MODE=offline.") from error

    def write(self, metrics):
        if self.csv.tell() == 0:
            print(*metrics, sep=",", file=self.csv)
        print(*("" if value is None else value for value in metrics.values()), sep=",", file=self.csv)
        if self.wandb:
            self.wandb.log(metrics, step=metrics["global_step"])

    def close(self):
        self.csv.close()
        if self.wandb:
            self.wandb.finish()


def layer_init(layer, std=2**0.5, bias=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias)
    return layer


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


class MLP(nn.Sequential):
    """Two hidden layers of 64 tanh units: (..., num_inputs) -> (..., num_outputs)."""

    def __init__(self, num_inputs, num_outputs, std):
        super().__init__(
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
        is_discrete = isinstance(action_space, Discrete)
        num_outputs = int(action_space.n) if is_discrete else math.prod(action_space.shape)
        self.log_std = None if is_discrete else nn.Parameter(torch.full(action_space.shape, log_std_init))
        self.obs_shape, self.is_uint8 = obs_space.shape, obs_space.dtype == np.uint8
        self.obs_statistics = RunningStatistics(self.obs_shape) if normalize_obs else None
        self.return_statistics = RunningStatistics(()) if normalize_reward else None
        self.is_image = self.is_uint8 and len(self.obs_shape) == 3 and sorted(self.obs_shape)[1] >= 36  # for the CNN
        if self.is_image:
            channels, height, width = sorted(self.obs_shape)  # which side is the height makes no difference here
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
            self.actor = MLP(math.prod(self.obs_shape), num_outputs, std=0.01)
            self.critic = MLP(math.prod(self.obs_shape), 1, std=1.0)

    def encode(self, obs):
        """Turn observations into features for the actor and the critic, (..., F)."""
        if self.obs_statistics is not None:
            obs = ((obs - self.obs_statistics.mean) / (self.obs_statistics.var + 1e-8).sqrt()).clamp(-10, 10)
        elif self.is_uint8:
            obs = obs / 255
        obs = obs.float()
        if not self.is_image:
            return obs.reshape(*obs.shape[: obs.ndim - len(self.obs_shape)], -1)
        if obs.shape[-1] < obs.shape[-3]:
            obs = obs.movedim(-1, -3)  # (..., H, W, C) -> (..., C, H, W)
        images = obs.reshape(-1, *obs.shape[-3:]).contiguous(memory_format=torch.channels_last)  # faster on the CPU
        return self.encoder(images).reshape(*obs.shape[:-3], -1)

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
        mean = outputs.reshape(*outputs.shape[:-1], *self.log_std.shape)
        return Independent(Normal(mean, self.log_std.exp(), validate_args=False), self.log_std.ndim)


class NumpyPolicy:
    """The policy of an agent as it is now, from NumPy to NumPy, for the actions of a rollout.

    For a few rows a time, calling PyTorch takes longer than the arithmetic; only images are worth it.
    """

    def __init__(self, agent):
        self.agent, statistics = agent, agent.obs_statistics
        self.weights = [parameter.numpy(force=True).T for parameter in agent.actor.parameters()]
        if agent.log_std is not None:
            self.std = agent.log_std.exp().numpy(force=True)
        if statistics is not None:
            self.obs_mean = statistics.mean.numpy(force=True)
            self.obs_std = (statistics.var + 1e-8).sqrt().numpy(force=True)

    def sample(self, obs, rng):
        """Sample an action for each observation, (N, ...), as get_dist(obs).sample() would."""
        if self.agent.is_image:
            with torch.no_grad():
                features = self.agent.encode(torch.as_tensor(obs, device=self.agent.critic.weight.device))
                outputs = self.agent.actor(features).numpy(force=True)
        else:
            if self.agent.obs_statistics is not None:
                obs = ((obs - self.obs_mean) / self.obs_std).clip(-10, 10)
            elif self.agent.is_uint8:
                obs = obs / 255
            w1, b1, w2, b2, w3, b3 = self.weights
            hidden = np.tanh(obs.astype(np.float32).reshape(len(obs), -1) @ w1 + b1)
            outputs = np.tanh(hidden @ w2 + b2) @ w3 + b3
        if self.agent.log_std is None:
            return (outputs + rng.gumbel(size=outputs.shape)).argmax(-1)  # the Gumbel-max trick
        return outputs.reshape(-1, *self.std.shape) + self.std * rng.standard_normal((len(obs), *self.std.shape))


def flatten_parameters(agent):
    """Lay all parameters out in one vector, theta, and all gradients in theta.grad, of which they become views.

    One vector is faster to clip and to step along than a dozen small tensors. Clear the gradient with
    `theta.grad.zero_()`; to set it to None, as `optimizer.zero_grad` does, would cut the views off.
    """
    parameters = list(agent.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    theta = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    theta.grad = torch.zeros_like(theta)
    for parameter, data, grad in zip(parameters, theta.data.split(sizes), theta.grad.split(sizes)):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return theta


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


def accumulate_rewards(rewards, resets, start, gamma):
    """Sum the discounted rewards of each episode so far, (T, N), from `start`, (N,), on: what rewards are scaled by.

    It is 0 at a reset, from where the next episode's begins.
    """
    discounted_returns, discounted_return = np.zeros_like(rewards), start
    for t in range(len(rewards)):
        discounted_returns[t] = discounted_return = np.where(resets[t], 0.0, rewards[t] + gamma * discounted_return)
    return discounted_returns


def train(args):
    """Train an Agent as `args` say, write its log to a run folder, and return the agent.

    Raises a ConfigError before it begins, and a FloatingPointError as soon as something is not finite.
    """
    is_parallel, rank, world_size = torch.distributed.is_initialized(), 0, 1
    if is_parallel:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    check_args(args, world_size)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.cuda else "cpu")
    seed = args.seed * world_size + rank
    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 1))  # with seed alone, it would repeat the numbers of an environment
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if torch.cuda.is_available() and not args.cuda:
        print("A GPU is there and not used: --cuda trains on it, which pays for images.", file=sys.stderr)
    envs = make_envs(args)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more threads would slow small networks down
    agent = Agent(envs, args.log_std_init, args.normalize_obs, args.normalize_reward).to(device)
    if agent.is_image:
        torch.set_num_threads(num_threads)
    theta = flatten_parameters(agent)
    if is_parallel:
        torch.distributed.broadcast(theta.data, src=0)
    if args.optimizer == "rmsprop":
        optimizer = torch.optim.RMSprop([theta], lr=args.learning_rate, alpha=0.99, eps=1e-5)
    else:
        optimizer = torch.optim.Adam([theta], lr=args.learning_rate, eps=1e-5, fused=True)

    log = RunLog(args) if rank == 0 else None

    # Step t leads from row t to row t + 1 of obs and dones, so their last row is the first of the next rollout.
    T, N = args.num_steps, args.num_envs
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    obs_dtype = np.uint8 if obs_space.dtype == np.uint8 else np.float32
    action_dtype = np.int64 if isinstance(action_space, Discrete) else np.float32
    obs = np.zeros((T + 1, N, *obs_space.shape), obs_dtype)
    dones = np.zeros((T + 1, N), bool)
    actions = np.zeros((T, N, *action_space.shape), action_dtype)
    rewards = np.zeros((T, N), np.float32)
    terminations = np.zeros((T, N), bool)
    discounted_returns = np.zeros((T, N))
    # Gymnasium seeds environment i with seed + i. So spaced, neighbouring runs share none; Atari takes 31 bits.
    obs[-1], _ = envs.reset(seed=seed * N % (2**31 - N))
    check_finite(0, observation=obs[-1])

    num_iterations = args.total_timesteps // (T * N * world_size)
    total_timesteps = num_iterations * T * N * world_size
    global_step, episodes = 0, []  # episodes: (return, length) of each that has ended
    bar = tqdm(total=total_timesteps, desc=args.env_id, unit="step", unit_scale=True, disable=rank > 0)
    start_time = time.perf_counter()
    for iteration in range(num_iterations):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / num_iterations)

        # Collect a rollout.
        obs[0], dones[0] = obs[-1], dones[-1]
        policy, new_episodes = NumpyPolicy(agent), []
        for step in range(T):
            actions[step] = policy.sample(obs[step], rng)
            obs[step + 1], rewards[step], terminations[step], truncations, infos = envs.step(actions[step])
            dones[step + 1] = terminations[step] | truncations
            global_step += N * world_size
            check_finite(global_step, observation=obs[step + 1], reward=rewards[step])
            if "episode" in infos:
                ended = infos["_episode"]
                new_episodes += zip(infos["episode"]["r"][ended].tolist(), infos["episode"]["l"][ended].tolist())

        # Estimate advantages and returns.
        is_transition = ~dones[:-1]  # the row after a done is a reset, where the environment ignored the action
        if args.normalize_reward:
            discounted_returns = accumulate_rewards(rewards, dones[:-1], discounted_returns[-1], args.gamma)
            agent.return_statistics.update(discounted_returns[is_transition])
            rewards /= math.sqrt(agent.return_statistics.var + 1e-8)
        if args.clip_reward is not None:
            np.clip(rewards, -args.clip_reward, args.clip_reward, out=rewards)
        all_obs = torch.as_tensor(obs, device=device)
        with torch.no_grad():
            values = agent.get_value(all_obs).numpy(force=True)  # (T + 1, N)
        advantages = compute_gae(rewards, values[:-1], values[1:], terminations, dones[1:], args.gamma, args.gae_lambda)
        b_obs, b_actions, b_values, b_advantages, b_returns = (
            torch.as_tensor(x[is_transition], device=device)
            for x in (obs[:-1], actions, values[:-1], advantages, advantages + values[:-1])
        )
        explained_variance = 1 - (b_returns - b_values).var(correction=0) / b_returns.var(correction=0)

        # Update the policy and the value function.
        dist, new_values = agent(b_obs)
        policy_loss = -(dist.log_prob(b_actions) * b_advantages).mean()
        value_loss = 0.5 * (new_values - b_returns).square().mean()
        entropy = dist.entropy().mean()
        loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
        theta.grad.zero_()
        loss.backward()
        average_over_processes(theta.grad, len(b_obs))
        nn.utils.clip_grad_norm_(theta, args.max_grad_norm)
        optimizer.step()
        if args.normalize_obs:
            agent.obs_statistics.update(b_obs)

        # Log.
        if is_parallel:
            gathered = [None] * world_size
            torch.distributed.all_gather_object(gathered, new_episodes)
            new_episodes = sum(gathered, [])
        episodes += new_episodes
        names = ("policy_loss", "value_loss", "entropy")
        means = torch.stack((policy_loss, value_loss, entropy)).detach()
        average_over_processes(means, len(b_obs))
        average_over_processes(explained_variance, len(b_obs))
        seconds = time.perf_counter() - start_time
        mean_return, mean_length = np.mean(new_episodes, axis=0) if new_episodes else (None, None)
        metrics = {
            "global_step": global_step,
            "wall_time": round(seconds, 3),
            "sps": round(global_step / seconds),
            "episodes": len(episodes),
            "episodic_return": mean_return,
            "episodic_length": mean_length,
            **dict(zip(names, means.tolist())),
            "explained_variance": explained_variance.item(),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        check_finite(global_step, **{name: metrics[name] for name in names})
        if rank == 0:
            log.write(metrics)
        last_return = f"return {fmean(r for r, _ in episodes[-100:]):.1f}" if episodes else "no episode has ended"
        bar.set_postfix_str(last_return, refresh=False)
        bar.update(T * N * world_size)

    bar.close()
    envs.close()
    torch.set_num_threads(num_threads)
    if rank == 0:
        log.close()
        print(f"{args.env_id}: {last_return}, {global_step} steps in {seconds:.1f} s, {log.dir}")
    return agent


if __name__ == "__main__":
    try:
        if torch.distributed.is_torchelastic_launched():  # by torchrun
            torch.distributed.init_process_group()
        train(tyro.cli(Args))
    except ConfigError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
