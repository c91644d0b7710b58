"""a3c.py: what it has in common with a2c.py, the shared update, its processes and their ends, and learning."""

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from test_a2c import definitions

import a2c
import a3c

ROOT = Path(a3c.__file__).parent
METHODS = ["fork", "spawn"] if sys.platform == "linux" else ["spawn"]
needs_fork = pytest.mark.skipif("fork" not in METHODS, reason="what a test replaces reaches the workers by fork")


@pytest.fixture(autouse=True)
def the_same_start_for_each_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def rows_of(run_dir):
    with open(Path(run_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def optimizers(monkeypatch):
    """The optimizers that the parent makes."""
    made, rmsprop = [], torch.optim.RMSprop

    def make(*args, **kwargs):
        made.append(rmsprop(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch.optim, "RMSprop", make)
    return made


# What is the same as in a2c.py.


def test_what_the_scripts_have_in_common_is_the_same_text():
    ours, theirs = definitions("a3c.py"), definitions("a2c.py")
    assert {name for name in theirs if ours.get(name) != theirs[name]} == {
        "Args", "RunError", "make_envs", "RunningStatistics", "train", "check_args", "set_apart", "gather",
        "sendable_errors", "average_over_processes", "env_parts", "get_process_state", "set_process_state", "Run",
    }  # fmt: skip
    assert list(ours.keys() - theirs.keys()) and ours.keys() - theirs.keys() == {"claim", "worker", "arrivals"}


def body(source, start, end):
    """The lines from the one with `start` to the one with a match of `end`, without indentation."""
    lines = [line.strip() for line in source.splitlines()]
    first = next(i for i, line in enumerate(lines) if start in line)
    return lines[first : next(i for i, line in enumerate(lines) if i > first and re.search(end, line))]


def test_a_worker_collects_and_learns_as_a2c_does():
    ours, theirs = definitions("a3c.py")["worker"], definitions("a2c.py")["train"]
    missing = []
    for start, end in (
        ("# Step t leads", r"last_rows =|# Gymnasium seeds"),
        ("# Collect a rollout.", r"theta\.grad \*="),
    ):
        our_lines = [line.replace("shared_agent", "agent") for line in body(ours, start, end)]
        their_lines = [line.replace(", device=device", "") for line in body(theirs, start, end)]
        missing += [line for line in their_lines if line not in our_lines]
    assert len(missing) < 8, missing  # steps and episodes are counted by the parent, and nothing is averaged


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id, flags",
    [
        ("CartPole-v1", {}),
        ("CartPole-v1", {"lock": True, "num_envs": 3, "gae_lambda": 0.95}),
        ("CartPole-v1", {"start_method": "spawn", "num_steps": 16}),
        ("MountainCarContinuous-v0", {"normalize_obs": True, "normalize_reward": True, "clip_reward": 1.0}),
        ("CartPole-v1", {"normalize_reward": True, "gae_lambda": 0.95, "final_gamma": 0.5}),
        ("Pendulum-v1", {"optimizer": "adam", "lock": True}),
    ],
)
def test_one_worker_is_a2c_to_the_last_bit(env_id, flags, tmp_path):
    common = {"env_id": env_id, "num_envs": 1, "num_steps": 32, "total_timesteps": 12_000, "ent_coef": 0.01} | flags
    ours = a3c.train(a3c.Args(num_workers=1, run_dir=str(tmp_path / "a3c"), **common))
    common = {name: value for name, value in common.items() if name not in ("lock", "start_method")}
    theirs = a2c.train(a2c.Args(run_dir=str(tmp_path / "a2c"), **common))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    rows, a2c_rows = rows_of(tmp_path / "a3c"), rows_of(tmp_path / "a2c")
    assert rows[-1]["global_step"] == a2c_rows[-1]["global_step"]
    assert rows[-1]["episodes"] == a2c_rows[-1]["episodes"]
    assert all(float(row["staleness_max"]) == 0 for row in rows)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no sched_setaffinity")
def test_there_are_as_many_workers_as_cores_that_the_process_may_use():
    """A batch system may allow a job few of the cores of a machine."""
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    code = f"import os; {one}; import a3c; print(a3c.Args().num_workers)"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(a3c.__file__).parent, capture_output=True, text=True)
    assert run.stdout == "1\n", run.stderr


def test_the_log_has_the_columns_of_a2c_and_the_staleness(tmp_path):
    a3c.train(a3c.Args(num_workers=1, num_steps=512, total_timesteps=2100, run_dir="a3c"))
    a2c.train(a2c.Args(num_steps=8, total_timesteps=128, run_dir="a2c"))
    ours, theirs = rows_of("a3c"), rows_of("a2c")
    assert set(ours[0]) == set(theirs[0]) | {"staleness_mean", "staleness_max"}
    assert [int(row["global_step"]) for row in ours] == [1024, 2048]
    assert json.loads(Path("a3c/args.json").read_text())["num_workers"] == 1


# The shared update.


@needs_fork
def test_the_gradients_1_2_3_4_are_applied_as_1_2_3_4(monkeypatch, tmp_path):
    def forward(self, obs):
        # The policy loss is -mean(log pi * A). With A = 1 and log pi = -k * (sum of the parameters), its gradient is k.
        total = sum(parameter.sum() for parameter in self.parameters())
        if torch.is_grad_enabled():
            self.updates = getattr(self, "updates", 0) + 1
        dist = torch.distributions.Categorical(logits=torch.zeros(*obs.shape[:-1], 2))
        dist.log_prob = lambda actions: -getattr(self, "updates", 0) * total.expand(actions.shape)
        return dist, 0 * total.expand(obs.shape[:-1])

    def step(self):
        gradient = self.param_groups[0]["params"][0].grad
        with open(tmp_path / "gradients", "a") as file:
            print(*gradient.unique().tolist(), file=file)
        self.state[self.param_groups[0]["params"][0]].setdefault("step", torch.zeros(()))

    monkeypatch.setattr(a3c.Agent, "forward", forward)
    monkeypatch.setattr(a3c, "compute_gae", lambda rewards, *args: np.ones_like(rewards))
    monkeypatch.setattr(torch.optim.RMSprop, "step", step)
    a3c.train(a3c.Args(num_workers=1, num_steps=8, total_timesteps=32, max_grad_norm=float("inf"), vf_coef=0.0))
    assert (tmp_path / "gradients").read_text().split() == ["0.0", "1.0", "2.0", "3.0", "4.0"]


@pytest.mark.parametrize("start_method", METHODS)
def test_the_state_of_the_optimizer_is_shared(start_method, optimizers):
    flags = {"num_workers": 2, "num_steps": 8, "start_method": start_method}
    agent = a3c.train(a3c.Args(total_timesteps=16, **flags))
    (state,) = optimizers[0].state.values()
    assert state["step"] == 2
    assert (state["square_avg"] > 0).float().mean() > 0.9
    assert all(parameter.is_shared() for parameter in agent.parameters())


@pytest.mark.parametrize("lock", [True, False])
def test_no_update_is_lost_with_a_lock_and_few_without(lock, optimizers):
    # Without a lock, two workers may read the count of steps at once, and write the same number.
    a3c.train(a3c.Args(num_workers=2, num_steps=4, total_timesteps=8000, lock=lock))
    (state,) = optimizers[0].state.values()
    assert state["step"] == 2000 if lock else 1900 < state["step"] <= 2000


def test_two_workers_share_the_observation_and_return_statistics():
    flags = {"num_workers": 2, "num_steps": 8, "total_timesteps": 640, "normalize_obs": True, "normalize_reward": True}
    agent = a3c.train(a3c.Args(**flags, run_dir="run"))
    transitions = 640 - sum(1 for _ in range(int(rows_of("run")[-1]["episodes"])))
    for statistics in (agent.obs_statistics, agent.return_statistics):
        assert transitions <= statistics.count <= transitions + 2  # a last episode's reset may not have come yet


def test_a_gradient_is_stale_by_the_updates_of_the_others():
    a3c.train(a3c.Args(num_workers=2, num_steps=4, total_timesteps=4096, run_dir="run"))
    rows = rows_of("run")
    assert 0.5 < np.mean([float(row["staleness_mean"]) for row in rows]) < 2
    assert all(float(row["staleness_max"]) >= float(row["staleness_mean"]) for row in rows)


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "Pendulum-v1"])
def test_images_and_box_actions_train(env_id):
    if env_id.startswith("ALE/"):
        pytest.importorskip("ale_py")
    agent = a3c.train(a3c.Args(env_id, num_workers=2, num_steps=8, total_timesteps=64))
    assert all(torch.isfinite(parameter).all() for parameter in agent.parameters())


# Processes and their ends. The environments of this module note in a file which processes they live in.

ENVIRONMENTS = """
import os, random, signal, sys, time
import gymnasium as gym, numpy as np, torch

class Counter(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.steps = 0
        with open("processes", "a") as file:
            print(os.getpid(), torch.get_num_threads(), seed, file=file)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 100:
            self.fail()
        return np.zeros(2, np.float32), 1.0, False, False, {}

    def fail(self):
        pass

class Raises(Counter):
    def fail(self):
        raise ValueError("the environment is broken")

class Dies(Counter):
    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Leaves(Counter):
    def fail(self):
        if int(open("processes").readline().split()[0]) == os.getpid():  # of the workers, one leaves
            while os.path.getsize("run/metrics.csv") == 0:  # once the other has reported
                time.sleep(0.01)
            raise SystemExit

class Hangs(Counter):
    def fail(self):
        signal.pause()

class Closes(Raises):
    def close(self):
        with open("closed", "a") as file:
            print(os.getpid(), file=file)

class Draws(Counter):
    def step(self, action):
        with open("draws", "a") as file:
            print(random.random(), np.random.random(), file=file)
        return super().step(action)

class GivesNan(Counter):
    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float("nan") if self.steps == 100 else 1.0, *rest

for env in (Counter, Raises, Dies, Leaves, Hangs, Closes, Draws, GivesNan):
    gym.register(f"{env.__name__}-v0", env)
"""


def start(tmp_path, env, *flags):
    (tmp_path / "environments.py").write_text(ENVIRONMENTS)
    command = [sys.executable, ROOT / "a3c.py", "--env-id", f"environments:{env}-v0", "--num-workers", "2"]
    command += ["--total-timesteps", "1000000000", "--run-dir", "run", *flags]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, seconds=30):
    out, error = process.communicate(timeout=seconds)
    for line in Path("processes").read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[0]), 0)
    return process.returncode, out, error


@pytest.mark.parametrize("start_method", METHODS)
@pytest.mark.parametrize(
    "env, message",
    [("Raises", "ValueError: the environment is broken"), ("Dies", "SIGKILL"), ("GivesNan", "reward[0] is nan")],
)
def test_a_worker_that_fails_ends_the_run(tmp_path, env, message, start_method):
    code, out, error = finish(start(tmp_path, env, "--start-method", start_method), seconds=120)  # with the imports
    assert code == 1
    assert error.count(message) == 1
    assert error.count("Traceback") == (env == "Raises")
    assert out == ""


def test_a_worker_that_fails_closes_its_environments(tmp_path):
    code, _, error = finish(start(tmp_path, "Closes"))
    assert code == 1 and "the environment is broken" in error
    closed = Path("closed").read_text().split()
    assert set(closed) & {line.split()[0] for line in Path("processes").read_text().splitlines()}


def test_a_second_sigterm_ends_workers_that_hang(tmp_path):
    process = start(tmp_path, "Hangs")
    wait_for(lambda: Path("processes").exists() and len(Path("processes").read_text().splitlines()) == 2)
    time.sleep(1)  # until the hundredth step
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for them
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 143


def test_a_signal_is_heeded_though_reports_come_faster_than_they_are_logged():
    counter, run = multiprocessing.Value("q", 0), types.SimpleNamespace(signal=None)
    reports = types.SimpleNamespace(empty=lambda: counter.value == 9, get=lambda: "a report")  # without an end
    workers = types.SimpleNamespace(processes=[], join=lambda timeout: counter.value == 9)
    arrivals = a3c.arrivals(workers, reports, run, counter, 9)
    assert [next(arrivals) for _ in range(100)] == ["a report"] * 100
    run.signal = signal.SIGTERM
    assert len(list(arrivals)) <= 1


def test_the_number_of_workers_and_the_lock_may_change():
    checkpoint = {"args": {"num_workers": 8, "lock": True}, "global_step": 1000}
    a3c.check_args(a3c.Args(num_workers=2, lock=False, total_timesteps=2000), checkpoint=checkpoint)


def test_the_environments_of_two_workers_draw_different_numbers(tmp_path, monkeypatch):
    (tmp_path / "environments.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(tmp_path)
    a3c.train(a3c.Args("environments:Draws-v0", num_workers=2, num_steps=8, total_timesteps=160))
    draws = [line.split() for line in Path("draws").read_text().splitlines()]
    assert len(draws) == 160
    assert all(len(set(column)) == 160 for column in zip(*draws))


def test_a_start_method_may_change_and_must_be_one_of_the_system(monkeypatch):
    args = a3c.Args(start_method="spawn", total_timesteps=2000)
    checkpoint = {"args": {"start_method": "fork"}, "global_step": 1000}
    a3c.check_args(args, checkpoint=checkpoint)
    monkeypatch.setattr(a3c.mp, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(a3c.ConfigError, match="--start-method must be spawn on this system, not fork"):
        a3c.check_args(a3c.Args(start_method="fork"))
    a3c.check_args(args, checkpoint=checkpoint)


@pytest.mark.parametrize("start_method", METHODS)
def test_a_worker_that_leaves_ends_the_run_which_keeps_what_it_has_learned(tmp_path, start_method):
    code, out, error = finish(start(tmp_path, "Leaves", "--start-method", start_method), seconds=120)
    assert (code, out) == (1, "")
    assert error.count("a3c.py: a worker has left") == 1 and "Traceback" not in error
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == int(rows_of("run")[-1]["global_step"])


def test_rollouts_are_claimed_as_long_as_the_parent_lives(monkeypatch):
    parent = types.SimpleNamespace(is_alive=lambda: True, pid=os.getppid())
    monkeypatch.setattr(a3c.mp, "parent_process", lambda: parent)
    counter = multiprocessing.Value("q", 3)
    rollouts = a3c.claim(counter, 9)
    assert [next(rollouts), next(rollouts)] == [3, 4]
    parent.pid = 1 << 30  # an orphan has another parent, though a sibling may still hold what is_alive looks at
    assert list(rollouts) == []
    assert [*a3c.claim(counter, 9)] == []
    parent.pid = os.getppid()
    assert [*a3c.claim(counter, 9)] == [5, 6, 7, 8]


def test_a_checkpoint_is_written_from_memory_that_no_worker_can_change(monkeypatch):
    """The checksum is of what is in memory before it is written: if that changes, the file cannot be read again."""
    save, shared = torch.save, []

    def spy(checkpoint, file):
        shared.append([value.is_shared() for value in checkpoint["agent"].values()])
        shared[-1] += [value.is_shared() for value in checkpoint["optimizer"]["state"][0].values()]
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", spy)
    a3c.train(a3c.Args(num_workers=2, total_timesteps=20_000, checkpoint_interval=1, run_dir="run"))
    *while_they_work, _ = shared  # in the end, none works
    assert len(while_they_work) > 10 and not any(map(any, while_they_work))


@pytest.mark.parametrize("start_method", METHODS)
@pytest.mark.parametrize("to_all", [True, False])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_the_run_and_keep_its_log(tmp_path, number, code, to_all, start_method):
    if to_all and number == signal.SIGTERM:
        pytest.skip("a terminal sends Ctrl-C to all of its processes, and nobody sends them SIGTERM")
    process = start(tmp_path, "Counter", "--start-method", start_method)
    wait_for_rows(5)
    if to_all:
        for line in Path("processes").read_text().splitlines():
            os.kill(int(line.split()[0]), number)
    process.send_signal(number)
    assert finish(process)[0] == code
    assert len(rows_of("run")) >= 5


def wait_for(condition, seconds=120):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.05)


def wait_for_rows(count):
    wait_for(lambda: Path("run/metrics.csv").exists() and len(rows_of("run")) >= count)


def test_a_worker_killed_from_outside_ends_the_run(tmp_path):
    process = start(tmp_path, "Counter")
    wait_for_rows(2)
    os.kill(int(Path("processes").read_text().splitlines()[-1].split()[0]), signal.SIGKILL)
    code, _, error = finish(process)
    assert code == 1 and "SIGKILL" in error


def test_each_worker_has_one_thread_and_a_seed_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "environments.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(tmp_path)
    for seed in (1, 2):
        a3c.train(a3c.Args("environments:Counter-v0", seed, num_workers=2, num_steps=8, total_timesteps=64))
    processes, threads, seeds = zip(*(line.split() for line in Path("processes").read_text().splitlines()))
    assert len(set(processes)) == len(set(seeds)) == 4
    assert set(threads) == {"1"}


def shared_files():
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


def test_twenty_runs_in_a_row_leave_no_process_and_no_shared_memory_behind():
    before = shared_files()
    for _ in range(20):
        a3c.train(a3c.Args(num_workers=2, num_steps=8, total_timesteps=16))
    assert multiprocessing.active_children() == []
    assert {name for name in shared_files() - before if name.startswith(("torch", "sem", "psm", "pym"))} == set()


def test_a_number_of_workers_below_one_is_refused():
    with pytest.raises(a3c.ConfigError, match="--num-workers must be at least 1"):
        a3c.train(a3c.Args(num_workers=0))


# Learning.


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_default_flags_solve_cartpole(seed, capsys):
    a3c.train(a3c.Args(seed=seed, num_workers=2))
    assert float(capsys.readouterr().out.split("return ")[1].split(",")[0]) >= 475
