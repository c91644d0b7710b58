"""Train with Stable-Baselines3 as a command of ours says, and log what it learns as ours does.

    python benchmark/sb3.py ppo --env-id Acrobot-v1 --total-timesteps 300000 --seed 1
    python benchmark/sb3.py a2c --env-id CartPole-v1

The flags are those of ppo.py or a2c.py, whose settings are turned into those of Stable-Baselines3; flags of the
algorithm without a counterpart there are refused. What still differs: its learning rate falls one update ahead of ours,
its running statistics change with each step, its resets are no steps, and it steps CartPole's environments one by one.
"""

import csv
import math
import sys
import time
from pathlib import Path
from statistics import fmean

import stable_baselines3
import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import a2c  # noqa: E402
import ppo  # noqa: E402


class Log(BaseCallback):
    """Writes a row of metrics.csv at the end of each rollout, with the episodes that have ended in it."""

    def __init__(self, path):
        super().__init__()
        self.file, self.returns, self.new_returns, self.start = open(path, "w"), [], [], time.perf_counter()
        self.writer = csv.writer(self.file)
        self.writer.writerow(("global_step", "wall_time", "episodes", "episodic_return"))

    def _on_step(self):
        self.new_returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _on_rollout_end(self):
        self.returns += self.new_returns
        mean_return = fmean(self.new_returns) if self.new_returns else ""
        seconds = round(time.perf_counter() - self.start, 3)
        self.writer.writerow((self.num_timesteps, seconds, len(self.returns), mean_return))
        self.new_returns = []


def train(name, args):
    for flag in ("recompute_advantages", "clip_vloss", "kl_coef", "env_kwargs", "clip_reward", "final_gamma"):
        is_given = getattr(args, flag, None) != getattr(type(args), flag, None)
        if is_given and not (flag == "clip_reward" and args.normalize_reward):
            sys.exit(f"--{flag.replace('_', '-')} has no counterpart in Stable-Baselines3")
    torch.set_num_threads(1)
    env_kwargs = {"render_mode": None}  # SB3's own, rgb_array, has LunarLander simulate ever more particles
    envs = make_vec_env(args.env_id, args.num_envs, env_kwargs=env_kwargs)
    if args.normalize_obs or args.normalize_reward:
        flags = {"norm_obs": args.normalize_obs, "norm_reward": args.normalize_reward, "gamma": args.gamma}
        envs = VecNormalize(envs, **flags, clip_reward=args.clip_reward or math.inf)
    settings = {
        "learning_rate": (lambda left: args.learning_rate * left) if args.anneal_lr else args.learning_rate,
        "n_steps": args.num_steps,
        "gamma": args.gamma,
        "gae_lambda": args.gae_lambda,
        "ent_coef": args.ent_coef,
        "vf_coef": args.vf_coef / 2,  # our value loss has a factor 1/2
        "max_grad_norm": args.max_grad_norm,
        "policy_kwargs": {"log_std_init": args.log_std_init},
    }
    if name == "a2c":
        settings |= {"use_rms_prop": args.optimizer == "rmsprop", "rms_prop_eps": 1e-5**0.5}  # its own is 1e-5
    else:
        settings |= {
            "batch_size": args.num_envs * args.num_steps // args.num_minibatches,
            "n_epochs": args.update_epochs,
            "normalize_advantage": args.norm_adv,
            "clip_range": args.clip_coef,
            "target_kl": args.target_kl and args.target_kl / 1.5,  # an update ends at 1.5 times it
        }
    model = getattr(stable_baselines3, name.upper())("MlpPolicy", envs, seed=args.seed, device="cpu", **settings)
    envs.seed(1000 * args.seed)  # the model has seeded environment i with seed + i, which neighbouring seeds share
    run_dir = Path(args.run_dir or f"runs/{args.env_id}__sb3-{name}__{args.seed}")
    run_dir.mkdir(parents=True)
    log = Log(run_dir / "metrics.csv")
    rollout_size = args.num_envs * args.num_steps
    model.learn(args.total_timesteps // rollout_size * rollout_size, callback=log)
    log.file.close()
    seconds = time.perf_counter() - log.start
    last_return = fmean(log.returns[-100:])
    print(f"{args.env_id}: return {last_return:.1f}, {log.num_timesteps} steps in {seconds:.1f} s, {run_dir}")


if __name__ == "__main__":
    name = sys.argv.pop(1)
    train(name, tyro.cli({"ppo": ppo.Args, "a2c": a2c.Args}[name]))
