"""ppo.py and a2c.py in several processes, as torchrun starts them."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

# An environment that does what its seed says, whatever the actions are, and has many short episodes; a policy and
# initial parameters that depend on nothing but the observations. So 2 x 2 environments live through what 1 x 4 do.
PRELUDE = """
import atexit, os, signal, sys
import gymnasium as gym, numpy as np, torch
import a2c, ppo

rank = int(os.environ.get("RANK", 0))
if torch.distributed.is_torchelastic_launched():
    import torch.distributed.nn

    torch.distributed.init_process_group()
    atexit.register(torch.distributed.destroy_process_group)

class Noise(gym.Env):
    observation_space, action_space = gym.spaces.Box(-9, 9, (3,)), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=3).clip(-9, 9).astype(np.float32), {}

    def step(self, action):
        obs, reward = self.np_random.normal(size=3).clip(-9, 9).astype(np.float32), self.np_random.normal()
        terminated, truncated = (self.np_random.random(2) < 0.15).tolist()
        return obs, reward, terminated, truncated, {}

gym.register("Noise-v0", Noise)

def act_by_observation(self, obs, rng):
    return (obs.sum(-1) > 0).astype(np.int64)

def start_at_the_same_point(parameters):
    size = sum(parameter.numel() for parameter in parameters)
    return 0.3 * torch.randn(size, generator=torch.Generator().manual_seed(0))

gradients = []

def record(average_over_processes):
    def record_gradients(mean, count):
        count = average_over_processes(mean, count)
        if mean.numel() > 1000:
            gradients.append(mean.clone())
        return count
    return record_gradients
"""


def execute(tmp_path, program, num_processes=0):
    """Run a program after PRELUDE, under torchrun or, with 0 processes, alone; return the finished process."""
    (tmp_path / "program.py").write_text(PRELUDE + program)
    command = (*TORCHRUN, str(num_processes)) if num_processes else (sys.executable,)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        (*command, "program.py"), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )


def rows_of(run_dir):
    with open(run_dir / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("wall_time", "sps")} for row in csv.DictReader(file)]


TRAIN = """
flags = dict(num_envs=4, num_steps=16, total_timesteps=16 * 8 * 4, normalize_obs=True, normalize_reward=True)
runs = {
    "penalty": (ppo, dict(kl_coef=1.0, target_kl=0.01, total_timesteps=16 * 8 * 60)),
    "early_end": (ppo, dict(target_kl=1e-4, update_epochs=2)),
    "recompute": (ppo, dict(recompute_advantages=True)),
    "a2c": (a2c, {}),
    "a2c_again": (a2c, {}),
}
for name, (module, more) in runs.items():
    agent = module.train(module.Args(**{**flags, **more}, run_dir=name))
    torch.save(agent.state_dict(), f"{name}.{rank}.pt")
torch.save(ppo.gather(("item of", rank)), f"gathered.{rank}.pt")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    done = execute(folder, TRAIN, num_processes=2)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.parametrize("name", ["penalty", "early_end", "recompute", "a2c"])
def test_all_processes_end_with_the_same_bytes(trained, name):
    folder, _ = trained
    ours, theirs = (torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_process_gathers_the_items_of_all_in_the_same_order(trained):
    folder, _ = trained
    for rank in (0, 1):
        assert torch.load(folder / f"gathered.{rank}.pt", weights_only=True) == [("item of", 0), ("item of", 1)]


def test_the_same_seed_gives_the_same_bytes(trained):
    folder, _ = trained
    assert rows_of(folder / "a2c") == rows_of(folder / "a2c_again")
    ours, theirs = (torch.load(folder / f"{name}.0.pt", weights_only=True) for name in ("a2c", "a2c_again"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_steps_and_episodes_are_those_of_all_processes_and_one_of_them_logs(trained):
    folder, done = trained
    rows = rows_of(folder / "recompute")
    assert [int(row["global_step"]) for row in rows] == [128, 256, 384, 512]
    steps = sum(int(new) * float(row["episodic_length"] or 0) for new, row in new_episodes(rows))
    # CartPole, every step but those of resets and of the 8 unfinished episodes: more than one process could count.
    assert 256 < steps + int(rows[-1]["episodes"]) <= 512
    assert done.stdout.count("steps in") == 5


def new_episodes(rows):
    return [(int(row["episodes"]) - int(last["episodes"]), row) for last, row in zip([{"episodes": 0}, *rows], rows)]


GRADIENTS = """
module, more = (ppo, dict(update_epochs=2, num_minibatches=1, norm_adv=False)) if "ppo" == {name!r} else (a2c, {{}})
module.NumpyPolicy.sample, torch.nn.utils.parameters_to_vector = act_by_observation, start_at_the_same_point
module.average_over_processes = record(module.average_over_processes)
args = module.Args(
    env_id="Noise-v0", num_envs=2 if torch.distributed.is_initialized() else 4, num_steps=8, total_timesteps=32 * 5,
    ent_coef=0.1, normalize_obs=True, normalize_reward=True, clip_reward=10.0, run_dir={name!r}, **more,
)
agent = module.train(args)
torch.save((gradients, agent.state_dict()), f"{{rank}}.pt")
"""


@pytest.mark.parametrize("script", ["ppo", "a2c"])
def test_two_processes_of_two_environments_make_the_gradients_of_one_of_four(tmp_path, script):
    results = []
    for num_processes in (0, 2):
        folder = tmp_path / str(num_processes)
        folder.mkdir()
        done = execute(folder, GRADIENTS.format(name=script), num_processes)
        assert done.returncode == 0, done.stderr
        results.append((*torch.load(folder / "0.pt", weights_only=True), rows_of(folder / script)))
    (expected, agent, rows), (gradients, parallel_agent, parallel_rows) = results
    assert len(expected) == len(gradients) == (10 if script == "ppo" else 5)
    for ours, theirs in zip(gradients, expected):
        # The first gradients differ by the order of float32 sums, and the later ones by what became of that.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    for key in agent:
        torch.testing.assert_close(parallel_agent[key], agent[key], rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(parallel_rows, rows, strict=True):
        for name in ("global_step", "episodes", "episodic_return", "policy_loss", "value_loss", "entropy"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-4), name


KILL = """
compute_gae, calls = ppo.compute_gae, []

def die_at_the_third_rollout(*args):
    calls.append(rank)
    if rank == 1 and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute_gae(*args)

open(f"pid.{rank}", "w").write(str(os.getpid()))
ppo.compute_gae = die_at_the_third_rollout
ppo.train(ppo.Args(total_timesteps=10**9, num_envs=4, run_dir="run"))
"""


def test_a_killed_process_ends_the_job(tmp_path):
    start = time.perf_counter()
    done = execute(tmp_path, KILL, num_processes=2)
    assert done.returncode != 0
    assert time.perf_counter() - start < 60
    assert len(rows_of(tmp_path / "run")) == 2
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid.{rank}").read_text()), 0)


FAIL = """
sample, calls = {script}.NumpyPolicy.sample, []

def fail_in_the_third_rollout(*args):
    calls.append(rank)
    if rank == {rank} and len(calls) == 90:
        raise MemoryError
    return sample(*args)

{script}.NumpyPolicy.sample = fail_in_the_third_rollout
flags = dict(num_envs=4, num_steps=32, total_timesteps=10**9, checkpoint_interval=10**9)
flags |= dict(normalize_reward={normalize_reward}, run_dir="run")
{script}.train({script}.Args(**flags))
"""


@pytest.mark.parametrize(
    "script, rank, normalize_reward", [("ppo", 0, True), ("ppo", 1, True), ("ppo", 1, False), ("a2c", 1, True)]
)
def test_whichever_process_fails_in_a_rollout_what_it_began_with_is_saved(tmp_path, script, rank, normalize_reward):
    program = FAIL.format(script=script, rank=rank, normalize_reward=normalize_reward)
    done = execute(tmp_path, program, num_processes=2)
    assert done.returncode != 0 and "MemoryError" in done.stderr
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 2 and checkpoint["global_step"] == int(rows[-1]["global_step"])
    (state,) = checkpoint["optimizer"]["state"].values()
    assert state["step"] == 2 * (4 * 4 if script == "ppo" else 1)
    if normalize_reward:
        transitions = 2 * 2 * 4 * 32 - int(rows[-1]["episodes"])  # less the resets, of which the last may be to come
        assert transitions <= checkpoint["agent"]["return_statistics.count"] <= transitions + 8


STATISTICS = """
statistics = ppo.RunningStatistics((2,))
for batch in np.load("batches.npz").values():
    statistics.update(np.split(batch, [3])[rank])
torch.save(statistics.state_dict(), f"{rank}.pt")
"""


def test_statistics_are_merged_over_processes_with_as_many_rows_as_each_has(tmp_path):
    batches = [np.random.default_rng(i).normal(1e3, 1 + i, (10, 2)) for i in range(3)]
    np.savez(tmp_path / "batches.npz", *batches)
    done = execute(tmp_path, STATISTICS, num_processes=2)
    assert done.returncode == 0, done.stderr
    everything = np.concatenate(batches)
    for rank in (0, 1):
        merged = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert merged["count"] == 30
        np.testing.assert_allclose(merged["mean"], everything.mean(0), rtol=1e-12)
        np.testing.assert_allclose(merged["var"], everything.var(0), rtol=1e-9)


def test_a_budget_under_one_rollout_of_all_processes_is_refused(tmp_path):
    done = execute(tmp_path, "ppo.train(ppo.Args(num_envs=4, num_steps=8, total_timesteps=63))", num_processes=2)
    assert done.returncode != 0
    assert "--total-timesteps must be at least one rollout, 64, not 63" in done.stderr


def test_the_script_itself_runs_under_torchrun(tmp_path):
    command = (*TORCHRUN, "2", ROOT / "a2c.py", "--total-timesteps", "512", "--run-dir", "run")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"CartPole-v1: return \S+, 512 steps in \S+ s, run\n", done.stdout)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc lists the threads")
@pytest.mark.parametrize("script", ["ppo.py", "a2c.py"])
def test_no_thread_of_the_process_group_outlives_the_script(tmp_path, script):
    """One that is still at work when the interpreter ends aborts the process: "terminate called without ..."."""
    program = f"""
import pathlib, runpy, sys
sys.argv = [{script!r}, "--total-timesteps", "4096", "--run-dir", "run"]
runpy.run_path({str(ROOT / script)!r}, run_name="__main__")
print("threads:", *{{task.read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*/comm")}})
"""
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run((*TORCHRUN, "2", "program.py"), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads:") == 2
    assert "gloo" not in done.stdout
