"""Checkpoints and resuming, signals, evaluation, faults, Weights & Biases and videos, in all three scripts."""

import csv
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections import namedtuple
from multiprocessing.util import _exit_function as end_multiprocessing
from pathlib import Path
from statistics import fmean, stdev

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.wrappers import FrameStackObservation
from tqdm import tqdm

import a2c
import a3c
import ppo

resource = pytest.importorskip("resource", reason="runs are forked and get the signals of POSIX")
ROOT = Path(ppo.__file__).parent
MODULES = {"ppo": ppo, "a2c": a2c, "a3c": a3c}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
each_script = pytest.mark.parametrize("script", MODULES)
the_exact_scripts = pytest.mark.parametrize("script", ["ppo", "a2c"])
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc, and started by fork")


@pytest.fixture(autouse=True)
def the_same_start_for_each_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


# Environments.


class Noise(gym.Env):
    """Random observations and rewards, episodes of 10 steps, and a `fault` in the 468th step, the 514th with resets."""

    observation_space, action_space = Box(-9, 9, (3,)), Discrete(2)

    def __init__(self, fault=lambda: 0.0):
        self.fault, self.num_steps = fault, 0

    def observe(self):
        return self.np_random.normal(size=3).clip(-9, 9).astype(np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count, self.num_steps = self.count + 1, self.num_steps + 1
        reward = self.np_random.normal() + (self.fault() if self.num_steps == 468 else 0.0)
        return self.observe(), reward, False, self.count == 10, {}


def broken():
    raise ValueError("the environment is broken")


def disconnected():
    raise ConnectionResetError("the simulator has gone")


def simulator():
    class SimulatorError(Exception):
        """Its class is where pickle does not find it."""

    raise SimulatorError("the simulator is broken")


def holder():
    raise LookupError("the simulator is broken", threading.Lock())


def blocked():
    Path("blocked").touch()
    while True:
        time.sleep(0.01)


class Unstartable(Noise):
    """In its 20th episode, it cannot be reset."""

    def reset(self, seed=None, options=None):
        return super().reset(seed=seed) if self.num_steps < 200 else simulator()


class Uneven(gym.Env):
    """One step is worth 1; an environment with an even seed lives for 20 steps, one with an odd seed for 2."""

    observation_space, action_space = Box(-9, 9, (3,)), Discrete(2)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.length = 2 if seed % 2 else 20
        self.count = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.zeros(3, np.float32), 1.0, self.count == self.length, False, {}


class Flawed(gym.Env):
    """Two bits, and episodes of 10 steps with a `flaw` in the last: NaN as its reward or its observation."""

    def __init__(self, flaw=None):
        self.observation_space = Box(0, 1, (2,), bool if flaw is None else np.float32)
        self.action_space, self.flaw = Discrete(2), flaw

    def observe(self, value=1):
        return np.full(2, value, self.observation_space.dtype)

    def reset(self, seed=None, options=None):
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        is_last = self.count == 10
        obs = self.observe(math.nan if is_last and self.flaw == "observation" else 1)
        return obs, math.nan if is_last and self.flaw == "reward" else 1.0, is_last, False, {}


class Owner(Noise):
    """It has attributes by the names that Gymnasium's wrappers have for what is inside them."""

    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)


class Unclosable(Noise):
    """Its end is that of a process that hangs in close and is killed: what is in a buffer by then is lost."""

    def close(self):
        os._exit(7)


class Endless(gym.Env):
    """One episode, whose frames are grey."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space, action_space = Box(-9, 9, (3,)), Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), 1.0, False, False, {}

    def render(self):
        return np.full((64, 64, 3), 128, np.uint8)


class PaysTheAction(gym.Env):
    """Ten steps, each of which is worth the action."""

    observation_space = Box(-9, 9, (3,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, seed=None, options=None):
        self.count = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.count += 1
        return np.zeros(3, np.float32), float(np.sum(action)), self.count == 10, False, {}


class Careless(gym.Env):
    """Its numbers are from the generators of Python and NumPy that a whole process shares."""

    observation_space, action_space = Box(-9, 9, (2,)), Discrete(2)

    def reset(self, seed=None, options=None):
        return np.array([random.random(), np.random.random()], np.float32), {}

    def step(self, action):
        return self.reset()[0], random.random(), np.random.random() < 0.1, False, {}


def make_vector(num_envs, **kwargs):
    return gym.vector.SyncVectorEnv([Noise] * num_envs)


def make_stacked(**kwargs):
    return FrameStackObservation(gym.make("CartPole-v1", **kwargs).unwrapped, 3)


for env_id, entry_point, kwargs in (
    ("Noise-v0", Noise, {}),
    ("Broken-v0", Noise, {"fault": broken}),
    ("Nan-v0", Noise, {"fault": lambda: math.nan}),
    ("Exit-v0", Noise, {"fault": sys.exit}),
    ("Disconnected-v0", Noise, {"fault": disconnected}),
    ("Simulator-v0", Noise, {"fault": simulator}),
    ("Holder-v0", Noise, {"fault": holder}),
    ("Unstartable-v0", Unstartable, {}),
    ("OwnsNothing-v0", Owner, {"env": None}),
    ("OwnsAnArray-v0", Owner, {"env": np.zeros(3)}),
    ("OwnsMany-v0", Owner, {"envs": {"a": 1}}),
    ("Blocked-v0", Noise, {"fault": blocked}),
    ("Uneven-v0", Uneven, {}),
    ("PaysDiscrete-v0", PaysTheAction, {"action_space": Discrete(2)}),
    ("PaysBox-v0", PaysTheAction, {"action_space": Box(-5, 5, (1,))}),
    ("Stacked-v0", make_stacked, {}),
    ("Bits-v0", Flawed, {}),
    ("Endless-v0", Endless, {}),
    ("Unclosable-v0", Unclosable, {}),
    ("Careless-v0", Careless, {}),
    ("FlawedReward-v0", Flawed, {"flaw": "reward"}),
    ("FlawedObservation-v0", Flawed, {"flaw": "observation"}),
):
    gym.register(env_id, entry_point, kwargs=kwargs, disable_env_checker=True)
gym.register("OnlyVector-v0", vector_entry_point=make_vector)


# Runs in this process, in a fork of it, and in a process of their own.


def small(script, rows, **flags):
    """Flags of a run with so many rows in its log, one for each iteration, which takes milliseconds."""
    size = {"num_envs": 4, "num_steps": 16} | ({"num_workers": 1, "num_steps": 256} if script == "a3c" else {})
    size |= {"num_minibatches": 2, "update_epochs": 2} if script == "ppo" else {}
    size |= flags
    return {"total_timesteps": rows * size["num_envs"] * size["num_steps"], "run_dir": "run"} | size


def train(script, **flags):
    return MODULES[script].train(MODULES[script].Args(**flags))


def load(script, run_dir="run"):
    return MODULES[script].load_checkpoint(f"{run_dir}/checkpoint.pt")


def iterations_done(checkpoint):
    return checkpoint["global_step"] // (checkpoint["args"]["num_envs"] * checkpoint["args"]["num_steps"])


def resume(script, run_dir="run", **flags):
    return train(script, **{**load(script, run_dir)["args"], "resume": f"{run_dir}/checkpoint.pt", **flags})


def interrupt(script, function, rows, number=signal.SIGTERM):
    """Call a function that trains, in which the signal comes after so many rows of the log."""
    run, written = MODULES[script].Run, []

    def log(self, *args):
        original(self, *args)
        written.append(args)
        if len(written) == rows:
            os.kill(os.getpid(), number)

    original = run.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "log", log)
        if number == signal.SIGKILL:
            pid = os.fork()
            if pid == 0:
                try:
                    function()
                finally:
                    os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        else:
            with pytest.raises(SystemExit) as caught:
                function()
            assert caught.value.code == 128 + number


Done = namedtuple("Done", "code out err messages")


class Process:
    """`python script.py ...` in a fork of this process, which has imported already what would take seconds."""

    def __init__(self, number, script, words, prepare):
        self.script, self.status = script, None
        self.paths = [Path(f"process{number}.{name}").absolute() for name in ("out", "err")]
        self.pid = os.fork()
        if self.pid == 0:
            self.execute(words, prepare)

    def execute(self, words, prepare):
        code = 1
        try:
            os.setsid()
            tqdm.set_lock(threading.RLock())  # the bars of all forks share one, which a killed one may never give back
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            for number, path in enumerate(self.paths, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            sys.argv = [f"{self.script}.py", *words]
            prepare()
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                end_multiprocessing()
            finally:
                os._exit(code or 0)

    def has_ended(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def finish(self, seconds=30):
        wait_until(self.has_ended, seconds)
        wait_until(lambda: not session(self.pid), 10)  # no process is left
        out, err = (path.read_text() for path in self.paths)
        messages = [line.strip() for line in re.split("[\r\n]", err) if line.strip() and "%|" not in line]  # no bars
        return Done(os.waitstatus_to_exitcode(self.status), out, err, messages)


def processes():
    """(process, parent, session) of all that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if state not in "ZX":
            found.append((int(path.parent.name), int(parent), int(session)))
    return found


def session(pid):
    return [process for process, _, of in processes() if of == pid]


def children(pid):
    return [process for process, parent, _ in processes() if parent == pid]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """What the first run of a process imports, its forks have already."""
    folder = tmp_path_factory.mktemp("warm")
    for script in MODULES:
        train(script, **small(script, 1, run_dir=str(folder / script)))


@pytest.fixture
def start(warm):
    """Start a script with flags, given as on the command line or by name; what is left in the end is killed."""
    started = []

    def start(script, *words, prepare=lambda: None, **flags):
        for name, value in flags.items():
            flag = name.replace("_", "-")
            words += (f"--{'' if value else 'no-'}{flag}",) if isinstance(value, bool) else (f"--{flag}", str(value))
        started.append(Process(len(started), script, words, prepare))
        return started[-1]

    yield start
    for process in started:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
        wait_until(process.has_ended)


def wait_until(condition, seconds=30):
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.005)


def rows_of(run_dir="run"):
    """The rows of metrics.csv that are written in full."""
    lines = (Path(run_dir) / "metrics.csv").read_text().splitlines(keepends=True)
    return list(csv.DictReader(line for line in lines if line.endswith("\n")))


def wait_for_rows(count, run_dir="run"):
    wait_until(lambda: (Path(run_dir) / "metrics.csv").exists() and len(rows_of(run_dir)) >= count)


def log_of(run_dir):
    """metrics.csv as it is, but for the columns that tell the time."""
    lines = [line.split(",") for line in (Path(run_dir) / "metrics.csv").read_text().splitlines()]
    columns = [i for i, name in enumerate(lines[0]) if name not in ("wall_time", "sps")]
    return [[line[i] for i in columns] for line in lines]


def assert_no_gap(rows, script):
    step = 1024 if script == "a3c" else 64
    assert [int(row["global_step"]) for row in rows] == [step * (i + 1) for i in range(len(rows))]


def assert_same(ours, theirs):
    """Equal to the last bit, whatever is inside."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs):
            assert_same(*pair)
    else:
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def assert_saved(script, run_dir="run"):
    """The checkpoint is whole, goes on after the last row, and has nothing beside it that is half written."""
    checkpoint, rows = load(script, run_dir), rows_of(run_dir)
    assert checkpoint["global_step"] == int(rows[-1]["global_step"])
    assert checkpoint["log"][3] == (Path(run_dir) / "metrics.csv").stat().st_size
    assert not list(Path(run_dir).glob("*.tmp"))
    return checkpoint


def assert_refused(done, *parts):
    assert (done.code, done.out, len(done.messages)) == (2, "", 1), done
    assert all(part in done.messages[0] for part in parts), done.messages


def record_starts(monkeypatch, script):
    """Save with what the last rollout has begun, agent.pt, and with what the last step of the optimizer, optimizer.pt.

    In files, for the workers of a3c.py are other processes.
    """
    kind = torch.optim.Adam if script == "ppo" else torch.optim.RMSprop
    policy, step = MODULES[script].NumpyPolicy.__init__, kind.step

    def save_agent(self, agent):
        torch.save(agent.state_dict(), "agent.pt")
        policy(self, agent)

    def save_optimizer(self, *args):
        torch.save(self.state_dict(), "optimizer.pt")
        return step(self, *args)

    monkeypatch.setattr(MODULES[script].NumpyPolicy, "__init__", save_agent)
    monkeypatch.setattr(kind, "step", save_optimizer)


# The checkpoint.


@each_script
def test_a_checkpoint_is_written_each_interval_and_in_the_end(script, monkeypatch):
    module, saved = MODULES[script], []
    save = module.Run.save

    def note(self, *args):
        save(self, *args)
        assert_saved(script)
        saved.append(len(rows_of()))

    monkeypatch.setattr(module.Run, "save", note)
    train(script, **small(script, 8), checkpoint_interval=3)
    assert saved == [3, 6, 8]


@each_script
def test_a_checkpoint_holds_all_that_the_run_has_learned_and_was_told(script):
    flags = small(script, 6, normalize_obs=True, normalize_reward=True, gamma=0.9)
    agent = train(script, **flags)
    checkpoint = torch.load("run/checkpoint.pt", weights_only=True)
    assert_same(checkpoint["agent"], agent.state_dict())
    assert {"obs_statistics.mean", "obs_statistics.var", "return_statistics.count"} <= checkpoint["agent"].keys()
    steps, episodes = (int(rows_of()[-1][name]) for name in ("global_step", "episodes"))
    assert steps - episodes <= checkpoint["agent"]["obs_statistics.count"] <= steps - episodes + 4
    (state,) = checkpoint["optimizer"]["state"].values()
    assert state["step"] == (24 if script == "ppo" else 6)
    assert all((value != 0).float().mean() > 0.9 for name, value in state.items() if name != "step")
    assert checkpoint["global_step"] == steps and checkpoint["log"][0] == episodes
    assert checkpoint["args"] == vars(MODULES[script].Args(**flags)) == json.loads(Path("run/args.json").read_text())
    if script == "a3c":  # whose workers start afresh
        assert checkpoint["processes"] == {}
    else:
        (process,) = checkpoint["processes"].values()
        assert process["rng"]["bit_generator"] == "PCG64"
        assert torch.equal(process["torch_rng"], torch.get_rng_state())


@pytest.mark.parametrize("script", MODULES)
def test_settings_may_be_numbers_of_numpy(script):
    flags = small(script, 2) | {"learning_rate": np.float64(1e-3), "gamma": np.float32(0.5), "seed": np.int64(3)}
    flags |= {"ent_coef": np.float64(0.01), "anneal_lr": np.bool_(True)}
    train(script, **flags | ({"kl_coef": np.float64(0.5)} if script == "ppo" else {}))
    saved = load(script)["args"]
    assert saved == json.loads(Path("run/args.json").read_text())
    assert {name: saved[name] for name in ("learning_rate", "gamma", "seed")} == {
        "learning_rate": 1e-3, "gamma": 0.5, "seed": 3
    }  # fmt: skip
    resume(script, total_timesteps=small(script, 4)["total_timesteps"])
    assert len(rows_of()) == 4


class Exploit:
    def __reduce__(self):
        return Path.touch, (Path("was_run"),)


@each_script
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(script, legacy):
    train(script, **small(script, 1))
    torch.save(load(script) | {"agent": Exploit()}, "bad.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(MODULES[script].ConfigError, match="--resume bad.pt"):
        train(script, resume="bad.pt")
    assert not Path("was_run").exists()
    torch.load("bad.pt", weights_only=False)
    assert Path("was_run").exists()  # else this would test nothing


@needs_proc
@each_script
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint_and_log(script, start):
    moments = random.Random(script)
    more = {"num_workers": 2} if script == "a3c" else {}
    process, last_step = start(script, **small(script, 10**6, **more), checkpoint_interval=1), 0
    wait_until(Path("run/checkpoint.pt").exists)
    for i in range(18):
        if i % 3 == 0:  # in the middle of a start
            time.sleep(moments.uniform(0, 0.5))
        else:
            wait_until(lambda: load(script)["global_step"] > last_step)  # noqa: B023
            time.sleep(moments.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        assert process.finish().code == -signal.SIGKILL
        assert_no_gap(rows_of(), script)
        checkpoint = load(script)
        assert checkpoint["global_step"] >= last_step
        last_step = checkpoint["global_step"]
        log = Path("run/metrics.csv").read_bytes()[: checkpoint["log"][3]].decode()
        assert len(log.encode()) == checkpoint["log"][3] and log.endswith("\n")
        assert int(log.splitlines()[-1].split(",")[0]) == last_step
        process = start(script, resume="run/checkpoint.pt")
    wait_until(lambda: load(script)["global_step"] > last_step)
    os.kill(process.pid, signal.SIGTERM)
    assert process.finish().code == 143
    assert_no_gap(rows_of()[:-1] if script == "a3c" else rows_of(), script)  # the last may be of few rollouts
    assert_saved(script)


# Exact resuming.

HARD = {"normalize_obs": True, "normalize_reward": True, "clip_reward": 10.0, "final_gamma": 0.9}
HARD_PPO = {**HARD, "kl_coef": 1.0, "target_kl": 0.01}


@the_exact_scripts
@pytest.mark.parametrize(
    "env_id, number",
    [
        ("CartPole-v1", signal.SIGTERM),
        ("CartPole-v1", signal.SIGKILL),
        ("MountainCar-v0", signal.SIGKILL),
        ("Pendulum-v1", signal.SIGTERM),
        ("Acrobot-v1", signal.SIGINT),
    ],
)
def test_a_run_that_was_interrupted_is_the_uninterrupted_one_to_the_last_byte(script, env_id, number, capsys):
    flags = small(script, 16, env_id=env_id, num_steps=32, **(HARD_PPO if script == "ppo" else HARD))
    whole = train(script, **flags | {"run_dir": "whole"})
    if script == "ppo":
        assert len({row["kl_coef"] for row in rows_of("whole")}) > 1
    if env_id != "Acrobot-v1":
        assert int(rows_of("whole")[-1]["episodes"]) > 0
    if number == signal.SIGKILL:
        interrupt(script, lambda: train(script, **flags, checkpoint_interval=3), 11, number)
        assert len(rows_of()) == 11 and iterations_done(load(script)) == 9
    else:
        interrupt(script, lambda: train(script, **flags), 5, number)
        interrupt(script, lambda: resume(script), 6, number)
        assert 11 <= len(rows_of()) == iterations_done(load(script)) < 16  # a signal while it logs: one more iteration
    parts = resume(script)
    assert log_of("run") == log_of("whole")
    assert_same(parts.state_dict(), whole.state_dict())
    ours, theirs = load(script), load(script, "whole")
    for name in ("optimizer", "processes"):
        if name == "processes":
            for key in ("torch_rng", "rng", "rows"):
                assert_same(ours[name][0][key], theirs[name][0][key])
        else:
            assert_same(ours[name], theirs[name])
    assert "new episodes" not in capsys.readouterr().out


@the_exact_scripts
def test_a_wrapper_whose_state_is_not_saved_is_not_passed_over_in_silence(script, capsys):
    flags = small(script, 12, env_id="Stacked-v0")
    train(script, **flags | {"run_dir": "whole"})
    interrupt(script, lambda: train(script, **flags), 5)
    resume(script)
    assert log_of("run") == log_of("whole") or "resumed with new episodes" in capsys.readouterr().out


@each_script
@pytest.mark.parametrize("env_id, mode", [("Noise-v0", None), ("InvertedPendulum-v5", None), ("CartPole-v1", "async")])
def test_where_environments_start_afresh_all_that_was_learned_goes_on(script, env_id, mode, monkeypatch, capsys):
    if script == "a3c" and mode == "async":
        pytest.skip("a3c.py has workers in its place")
    if env_id == "InvertedPendulum-v5":
        pytest.importorskip("mujoco")
    flags = small(script, 10, env_id=env_id, vectorization_mode=mode, **HARD)
    flags |= {"kl_coef": 1.0, "target_kl": 0.01, "num_minibatches": 1, "update_epochs": 1} if script == "ppo" else {}
    interrupt(script, lambda: train(script, **flags), 4)
    checkpoint, before = load(script), rows_of()
    assert "resumed" not in capsys.readouterr().out
    record_starts(monkeypatch, script)
    step = checkpoint["global_step"]
    resume(script, total_timesteps=step + flags["num_envs"] * flags["num_steps"])  # one more iteration
    assert "resumed with new episodes" in capsys.readouterr().out
    assert_same(torch.load("agent.pt", weights_only=True), checkpoint["agent"])
    assert_same(torch.load("optimizer.pt", weights_only=True)["state"], checkpoint["optimizer"]["state"])
    *rows, last = rows_of()
    assert rows == before
    assert int(last["global_step"]) == step + flags["num_envs"] * flags["num_steps"]
    assert int(last["episodes"]) >= int(before[-1]["episodes"])
    assert float(last["wall_time"]) > float(before[-1]["wall_time"])
    if script == "ppo":
        assert float(last["kl_coef"]) / float(before[-1]["kl_coef"]) in (0.5, 1, 2)
        assert float(before[-1]["kl_coef"]) != 1.0


@each_script
def test_a_finished_run_goes_on_when_it_gets_more_steps(script):
    train(script, **small(script, 3), anneal_lr=False)
    resume(script, total_timesteps=small(script, 5)["total_timesteps"])
    assert len(rows_of()) == 5
    assert_no_gap(rows_of(), script)
    assert_saved(script)


TWO_PROCESSES = """
import os, signal, sys
import torch
import torch.distributed.nn
import a2c, ppo

torch.distributed.init_process_group()
rank = torch.distributed.get_rank()
for name, module, flags in (("ppo", ppo, {ppo}), ("a2c", a2c, {a2c})):
    module.train(module.Args(**flags | {{"run_dir": name + "-whole"}}))
    policy, made = module.NumpyPolicy.__init__, []

    def init(self, agent):
        policy(self, agent)
        made.append(agent)
        if rank == 1 and len(made) == 5:  # one process gets the signal, and both stop
            os.kill(os.getpid(), signal.SIGTERM)

    module.NumpyPolicy.__init__ = init
    try:
        module.train(module.Args(**flags | {{"run_dir": name}}))
    except SystemExit as error:
        assert error.code == 143, error.code
    else:
        assert False
    assert len(made) == 5, len(made)
    module.NumpyPolicy.__init__ = policy
    torch.distributed.barrier()
    path = name + "/checkpoint.pt"
    module.train(module.Args(**module.load_checkpoint(path)["args"] | {{"resume": path}}))
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_torchrun_go_on_exactly(tmp_path):
    flags = {script: small(script, 12, **HARD) for script in ("ppo", "a2c")}
    flags["ppo"] |= HARD_PPO
    for each in flags.values():
        each["total_timesteps"] *= 2
    (tmp_path / "program.py").write_text(TWO_PROCESSES.format(**flags))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run((*TORCHRUN, "program.py"), env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for script in ("ppo", "a2c"):
        assert len(rows_of(script)) == 12
        assert int(rows_of(script)[-1]["episodes"]) > 10
        assert log_of(script) == log_of(f"{script}-whole")
        assert_same(load(script, script)["agent"], load(script, f"{script}-whole")["agent"])
        assert len(load(script, script)["processes"]) == 2
        with pytest.raises(MODULES[script].ConfigError, match="--resume needs as many processes as before, 2, not 1"):
            resume(script, script)
    assert "new episodes" not in done.stdout


# What a checkpoint may be resumed with, and what is none.


@needs_proc
@each_script
@pytest.mark.parametrize(
    "flag, value", [("gamma", 0.98), ("num-envs", 16), ("seed", 2), ("env-id", "Acrobot-v1"), ("normalize-obs", None)]
)
def test_a_flag_that_conflicts_with_the_checkpoint_is_refused_by_name(script, flag, value, start):
    train(script, **small(script, 1, gamma=0.9))
    before = Path("run/checkpoint.pt").read_bytes()
    assert value != 0.98 or MODULES[script].Args.gamma == value  # the default, but not the checkpoint's
    words = (f"--{flag}",) if value is None else (f"--{flag}", str(value))
    assert_refused(start(script, "--resume", "run/checkpoint.pt", *words).finish(), f"--{flag} ", "checkpoint")
    assert Path("run/checkpoint.pt").read_bytes() == before


@needs_proc
@each_script
def test_flags_that_may_change_do_and_one_that_is_repeated_is_no_conflict(script, start, wandb):
    train(script, **small(script, 2, gamma=0.9))
    total = small(script, 5)["total_timesteps"]
    flags = {"total_timesteps": total, "checkpoint_interval": 2, "track": True, "gamma": 0.9}
    done = start(script, resume="run/checkpoint.pt", **flags).finish()
    assert (done.code, done.messages) == (0, [])
    assert len(rows_of()) == 5
    args = assert_saved(script)["args"]
    assert {name: args[name] for name in flags} == flags
    assert wandb.told("init")[0]["project"] == args["wandb_project_name"]


@needs_proc
@each_script
def test_keyword_arguments_of_the_environment_are_those_of_the_whole_run(script, start):
    words = ("--env-kwargs", "sutton_barto_reward", "True")  # the return is -1, however long the episode
    flags = small(script, 8, eval_episodes=2)
    done = start(script, *words, **flags).finish()
    assert done.code == 0, done
    checkpoint = load(script)
    assert checkpoint["args"]["env_kwargs"] == (("sutton_barto_reward", True),)
    assert json.loads(Path("run/eval.json").read_text())["returns"] == [-1.0, -1.0]
    longer = {"resume": "run/checkpoint.pt", "total_timesteps": 2 * flags["total_timesteps"]}
    assert start(script, **longer).finish().code == 0
    returns = [float(row["episodic_return"]) for row in rows_of() if row["episodic_return"]]
    assert len(returns) > 1 and set(returns) == {-1.0}
    assert_refused(start(script, *words[:2], "False", **longer).finish(), "--env-kwargs ", "True", "checkpoint")


@each_script
def test_a_checkpoint_of_no_keyword_arguments_is_not_resumed_with_one(script):
    train(script, **small(script, 1))
    checkpoint = load(script)
    del checkpoint["args"]["env_kwargs"]  # as those written before there was the flag
    torch.save(checkpoint, "run/checkpoint.pt")
    total = small(script, 2)["total_timesteps"]
    with pytest.raises(MODULES[script].ConfigError, match="--env-kwargs .* in the checkpoint"):
        resume(script, total_timesteps=total, env_kwargs=(("sutton_barto_reward", True),))
    resume(script, total_timesteps=total)


@needs_proc
@each_script
def test_a_word_that_would_be_true_whatever_it_says_is_refused(script, start):
    done = start(script, "--env-kwargs", "sutton_barto_reward", "false").finish()
    assert_refused(done, "--env-kwargs must be given booleans as True or False", "'false'")


@needs_proc
@each_script
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_keyword_argument_that_the_environment_does_not_have_is_refused(script, env_id, start):
    words = ("--env-id", env_id, "--env-kwargs", "lenght", "2")
    assert_refused(start(script, *words).finish(), f"--env-id {env_id} --env-kwargs: ", "lenght")


def damage(kind, script):
    whole = Path("run/checkpoint.pt").read_bytes()
    if kind == "flipped":
        middle = len(whole) // 2
        whole = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    elif kind == "other":
        other = "a2c" if script == "ppo" else "ppo"
        train(other, **small(other, 1, run_dir="other"))
        whole = Path("other/checkpoint.pt").read_bytes()
    elif kind in ("weights", "model"):
        torch.save({"weights": torch.zeros(1)} if kind == "weights" else torch.nn.Linear(1, 1), "bad.pt")
        return
    contents = {"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": random.Random(0).randbytes(10_000)}
    if kind == "folder":
        Path("bad.pt").mkdir()
    elif kind != "missing":
        Path("bad.pt").write_bytes(contents.get(kind, whole))


@needs_proc
@each_script
@pytest.mark.parametrize("kind", "truncated empty garbage flipped other missing folder weights model".split())
def test_a_file_that_is_no_checkpoint_of_the_script_gives_one_line(script, kind, start):
    train(script, **small(script, 1))
    damage(kind, script)
    reasons = {"other": "a2c.py" if script == "ppo" else "ppo.py", "missing": "No such file"}
    reasons |= {"weights": "it lacks agent, args, ", "model": "no checkpoint of this script: Unsupported global: "}
    done = start(script, "--resume", "bad.pt").finish()
    assert_refused(done, f"{script}.py: --resume bad.pt", reasons.get(kind, "no checkpoint"))


def test_no_bit_can_flip_and_no_end_be_cut_off_without_notice():
    train("a2c", **small("a2c", 1))
    whole, checkpoint, rng = Path("run/checkpoint.pt").read_bytes(), load("a2c"), random.Random(0)
    refused = 0
    for _ in range(150):
        position = rng.choice([rng.randrange(len(whole)), rng.randrange(3000), len(whole) - 1 - rng.randrange(3000)])
        bad = bytearray(whole)
        bad[position] ^= 1 << rng.randrange(8)
        Path("bad.pt").write_bytes(bad)
        try:
            # Padding and the like may differ: then what is loaded must be the same.
            assert_same(a2c.load_checkpoint("bad.pt"), checkpoint)
        except a2c.ConfigError:
            refused += 1
    assert refused > 50
    for _ in range(20):
        Path("bad.pt").write_bytes(whole[: rng.randrange(len(whole))])
        with pytest.raises(a2c.ConfigError):
            a2c.load_checkpoint("bad.pt")


# Signals.


def assert_stopped_and_goes_on(script, start, process, number):
    """The run has ended in the way of a signal that was heeded; the command that it printed continues it."""
    done = process.finish()
    assert done.code == 128 + number, done
    assert done.messages == []
    checkpoint = assert_saved(script)
    *summary, command = done.out.splitlines() or [""]
    step = checkpoint["global_step"]
    assert summary == [] or re.fullmatch(rf"\S+: .*, {step} steps in \S+ s, run", summary[0])
    go_on, path, *flags = command.rsplit(" ", 3)
    assert (go_on, *flags) == ("go on: python", "--resume", "run/checkpoint.pt")
    assert Path(path).resolve() == ROOT / f"{script}.py"
    more = {"total_timesteps": step + 10 * small(script, 1)["total_timesteps"]}
    assert start(script, *shlex.split(command)[4:], **more).finish().code == 0
    rows = [int(row["global_step"]) for row in rows_of()]
    assert rows == sorted(set(rows)) and rows[-1] > step
    if script != "a3c":
        assert_no_gap(rows_of(), script)


@needs_proc
@each_script
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kill, mode", [(os.kill, "native"), (os.killpg, "native"), (os.killpg, "async")])
def test_sigterm_and_ctrl_c_end_a_run_that_can_go_on(script, number, mode, kill, start):
    if script == "a3c" and mode == "async":
        pytest.skip("a3c.py has workers in its place")
    more = {"num_workers": 2} if script == "a3c" else {}
    process = start(script, **small(script, 10**6, vectorization_mode=mode, **more), checkpoint_interval=10**6)
    wait_for_rows(3)
    kill(process.pid, number)  # or all processes in its group, as a terminal does
    assert_stopped_and_goes_on(script, start, process, number)


@needs_proc
@each_script
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_second_ctrl_c_ends_a_run_at_once(script, mode, start):
    if script == "a3c" and mode == "async":
        pytest.skip("a3c.py has workers in its place")
    flags = small(script, 10**6, env_id="Blocked-v0", vectorization_mode=mode)
    process = start(script, **flags, checkpoint_interval=10**6)
    wait_until(Path("blocked").exists)
    wait_for_rows(2)
    os.kill(process.pid, signal.SIGINT)
    with pytest.raises(AssertionError):  # the first asks for the end of an iteration, which never comes
        wait_until(process.has_ended, 1)
    os.kill(process.pid, signal.SIGINT)
    done = process.finish(20)
    assert done.code == 130, done
    assert "Traceback" not in done.err
    assert_saved(script)


@needs_proc
def test_the_printed_command_is_one_for_the_shell(start):
    process = start("ppo", **small("ppo", 10**6, run_dir=Path("a run").absolute()))
    wait_for_rows(2, "a run")
    os.kill(process.pid, signal.SIGINT)
    command = process.finish().out.splitlines()[-1].removeprefix("go on: python ")
    step = load("ppo", "a run")["global_step"]
    command = f"{shlex.quote(sys.executable)} {command} --total-timesteps {step + 64}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert load("ppo", "a run")["global_step"] == step + 64


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory):
    """What two processes of ppo.py leave when torchrun gets SIGTERM: the folder, the exit code and the output."""
    folder = tmp_path_factory.mktemp("torchrun")
    flags = ("--num-envs", "4", "--num-steps", "16", "--total-timesteps", "1000000000", "--run-dir", "run")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen((*TORCHRUN, ROOT / "ppo.py", *flags), cwd=folder, **pipes)
    try:
        wait_for_rows(3, folder / "run")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return folder, process.returncode, out


def test_sigterm_to_torchrun_saves_what_all_processes_need(under_torchrun):
    folder, code, out = under_torchrun
    assert code != 0
    assert len(assert_saved("ppo", folder / "run")["processes"]) == 2
    assert out.count("steps in") == 1


def test_the_command_printed_under_torchrun_starts_as_many_processes(under_torchrun):
    _, _, out = under_torchrun
    command = out.splitlines()[-1]
    assert "--resume run/checkpoint.pt" in command
    assert "torchrun" in command and re.search(r"--nproc[-_]per[-_]node[= ]2", command), command


# Evaluation.


@each_script
def test_an_evaluation_writes_what_it_prints_and_learns_nothing(script, capsys):
    flags = small(script, 4, normalize_obs=True, eval_episodes=6)
    agent = train(script, **flags)
    assert_same(agent.state_dict(), load(script)["agent"])
    results = json.loads(Path("run/eval.json").read_text())
    returns = results["returns"]
    assert len(returns) == 6
    assert results["mean"] == pytest.approx(fmean(returns)) and results["std"] == pytest.approx(stdev(returns))
    summary, line = capsys.readouterr().out.splitlines()
    mean, std, low, high = map(float, re.findall(r"-?\d+\.\d", line))
    assert line == f"evaluation: return {mean}, std {std}, 95 % interval {low} to {high}"
    assert (mean, std) == pytest.approx((results["mean"], results["std"]), abs=0.06)
    assert [low, high] == pytest.approx(results["interval_95"], abs=0.06)


@needs_proc
@each_script
def test_an_evaluation_alone_leaves_the_run_as_it_was(script, start):
    train(script, **small(script, 4, normalize_obs=True, normalize_reward=True, eval_episodes=7))
    expected = json.loads(Path("run/eval.json").read_text())
    Path("run/eval.json").unlink()
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert before.keys() == {"metrics.csv", "checkpoint.pt", "args.json"}
    done = start(script, resume="run/checkpoint.pt", total_timesteps=0, eval_episodes=7).finish()
    assert (done.code, done.messages) == (0, [])
    assert re.fullmatch(r"evaluation: .*\n", done.out)
    assert json.loads(Path("run/eval.json").read_text()) == expected  # by the same agent, in the same episodes
    Path("run/eval.json").unlink()
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    done = start(script, resume="run/checkpoint.pt", total_timesteps=0, eval_episodes=3, eval_deterministic=True)
    assert done.finish().code == 0
    assert len(json.loads(Path("run/eval.json").read_text())["returns"]) == 3


@each_script
@pytest.mark.parametrize(
    "num_episodes, quotas", [(10, [3, 3, 2, 2]), (4, [1, 1, 1, 1]), (3, [1, 1, 1]), (1, [1]), (64, [16] * 4)]
)
def test_each_environment_has_its_quota_of_the_evaluation(script, num_episodes, quotas):
    train(script, **small(script, 1, env_id="Uneven-v0", eval_episodes=num_episodes))
    returns = json.loads(Path("run/eval.json").read_text())["returns"]
    first, second = (2, 20) if returns[0] == 2 else (20, 2)
    assert returns == [r for quota, r in zip(quotas, (first, second) * 2) for _ in range(quota)]
    if num_episodes % 2 == 0:
        assert fmean(returns) == 11  # the first ten to end would have a mean below 4


def evaluate(script, env_id, num_episodes, edit=lambda agent: None, **flags):
    module = MODULES[script]
    args = module.Args(env_id, num_envs=4, eval_episodes=num_episodes, **flags)
    agent = module.Agent(module.make_envs(args), args.log_std_init, args.normalize_obs)
    with torch.no_grad():
        edit(agent)
    module.evaluate(agent, args, Path())
    return json.loads(Path("eval.json").read_text())


@each_script
def test_the_mode_of_the_policy_is_evaluated_if_one_asks_for_it(script):
    def make_unsure(agent):
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.copy_(torch.tensor([0.4, 0.6]).log() if agent.log_std is None else torch.tensor([0.5]))

    assert set(evaluate(script, "PaysDiscrete-v0", 20, make_unsure, eval_deterministic=True)["returns"]) == {10}
    assert evaluate(script, "PaysDiscrete-v0", 20, make_unsure)["mean"] == pytest.approx(6, abs=1)
    assert evaluate(script, "PaysBox-v0", 20, make_unsure, eval_deterministic=True)["returns"] == [5] * 20
    sampled = evaluate(script, "PaysBox-v0", 20, make_unsure)
    assert sampled["mean"] == pytest.approx(5, abs=3) and 1 < sampled["std"] < 6


@each_script
def test_the_statistics_are_used_and_not_changed_by_an_evaluation(script):
    agents = []

    def shift(agent):
        agents.append(agent)
        agent.obs_statistics.mean.fill_(-100.0)  # all observations become 10, whence the first unit and the action 1
        for layer in list(agent.actor)[::2]:
            layer.weight.zero_()
            layer.bias.zero_()
        agent.actor[0].weight[0] = agent.actor[2].weight[0, 0] = 1.0
        agent.actor[4].weight[1, 0] = 1.0

    flags = {"normalize_obs": True, "eval_deterministic": True}
    assert evaluate(script, "PaysDiscrete-v0", 8, shift, **flags)["returns"] == [10] * 8
    statistics = agents[0].obs_statistics
    assert (statistics.count, statistics.mean.unique(), statistics.var.unique()) == (0, -100, 1)


@each_script
@pytest.mark.parametrize("num_episodes, t", [(5, 2.776), (10, 2.262), (30, 2.045)])
def test_the_interval_is_that_of_student(script, num_episodes, t):
    results = evaluate(script, "Noise-v0", num_episodes)
    returns, (low, high) = results["returns"], results["interval_95"]
    half = t * stdev(returns) / num_episodes**0.5
    assert (low + high) / 2 == pytest.approx(fmean(returns))
    assert (high - low) / 2 == pytest.approx(half, rel=0.03)


@each_script
def test_an_evaluation_takes_the_observations_that_training_takes(script):
    train(script, **small(script, 4, env_id="Bits-v0", normalize_obs=True, eval_episodes=4))
    assert json.loads(Path("run/eval.json").read_text())["returns"] == [10] * 4


@each_script
@pytest.mark.parametrize("quantity", ["reward", "observation"])
def test_an_evaluation_stops_at_what_is_not_finite(script, quantity):
    with pytest.raises(FloatingPointError, match=rf"evaluation_{quantity}\[0.*\] is nan at step 40"):
        evaluate(script, f"Flawed{quantity.title()}-v0", 4)
    assert not Path("eval.json").exists()


@each_script
@pytest.mark.parametrize("env_id, counted", [("Noise-v0", 6), ("FlawedReward-v0", 0)])
def test_an_evaluation_counts_its_episodes_in_a_bar_which_also_a_failure_removes(script, env_id, counted, monkeypatch):
    module, ended = MODULES[script], []

    class Bar(module.tqdm):
        def close(self):
            ended.append((self.total, self.n, self.leave))
            super().close()

    args = module.Args(env_id=env_id, num_envs=4, eval_episodes=6)
    agent = module.Agent(module.make_envs(args))
    monkeypatch.setattr(module, "tqdm", Bar)
    if counted:
        module.evaluate(agent, args, Path("."))
    else:
        with pytest.raises(FloatingPointError) as failure:  # which holds the bar: forgotten, it would be closed anyway
            module.evaluate(agent, args, Path("."))
        assert "evaluation_reward" in str(failure.value)
    assert (6, counted, False) in ended


@each_script
def test_an_evaluation_that_cannot_be_written_says_so(script):
    Path("eval.json").mkdir()
    with pytest.raises(MODULES[script].RunError, match=r"eval\.json: "):
        evaluate(script, "Noise-v0", 2)


@each_script
def test_one_episode_has_no_spread(script, capsys):
    results = evaluate(script, "Noise-v0", 1)
    assert results["std"] is None and results["interval_95"] is None
    assert capsys.readouterr().out == f"evaluation: return {results['mean']:.1f}\n"


# Faults.


@the_exact_scripts
def test_a_signal_that_comes_after_the_processes_have_agreed_ends_the_next_iteration(script, monkeypatch):
    module, sent = MODULES[script], []
    log = module.Run.log

    def log_and_interrupt(self, *args):
        log(self, *args)
        if len(rows_of()) == 3:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(module.Run, "log", log_and_interrupt)
    with pytest.raises(SystemExit) as stop:
        train(script, **small(script, 50))
    assert stop.value.code == 143 and len(sent) == 1
    assert len(rows_of()) == iterations_done(load(script)) == 4


def test_a_reward_that_breaks_the_gradient_of_a_worker_does_not_reach_the_shared_parameters():
    gym.register("Huge-v0", lambda: Huge())
    with pytest.raises(Exception, match="is (nan|inf) at step"):
        train("a3c", **small("a3c", 50, env_id="Huge-v0"), checkpoint_interval=1)
    assert all(torch.isfinite(value).all() for value in load("a3c")["agent"].values())


class Huge(gym.Env):
    """Pays a reward whose square is no float32, once, in the fifth rollout."""

    observation_space, action_space = Box(-9, 9, (3,)), Discrete(2)
    num_steps = 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.num_steps += 1
        return np.ones(3, np.float32), 3e38 if self.num_steps == 4500 else 1.0, self.num_steps % 10 == 0, False, {}


@pytest.mark.parametrize("script", ["ppo", "a2c"])  # in a3c.py, a worker has failed then
@pytest.mark.parametrize("is_interrupted", [False, True])
def test_the_last_lines_come_before_what_can_hang_or_fail_at_the_close(script, is_interrupted, start):
    def write_to_a_file():
        sys.stdout = open(1, "w", closefd=False)  # with a buffer

    rows = 10**6 if is_interrupted else 2
    process = start(script, prepare=write_to_a_file, **small(script, rows, env_id="Unclosable-v0"))
    if is_interrupted:
        wait_for_rows(3)
        os.kill(process.pid, signal.SIGINT)
    done = process.finish()
    assert done.code == 7 and "Unclosable-v0: return" in done.out
    assert ("go on: python" in done.out) == is_interrupted


@each_script
def test_an_environment_that_raises_leaves_what_the_last_iteration_has_learned(script, monkeypatch):
    record_starts(monkeypatch, script)
    flags = small(script, 10**4, env_id="Broken-v0", checkpoint_interval=7, normalize_obs=True)
    with pytest.raises(Exception, match="the environment is broken"):
        train(script, **flags)
    checkpoint = assert_saved(script)
    iterations = 514 // flags["num_steps"]
    assert_same(checkpoint["agent"], torch.load("agent.pt", weights_only=True))
    (state,) = checkpoint["optimizer"]["state"].values()
    assert state["step"] == iterations * (4 if script == "ppo" else 1)
    assert iterations_done(checkpoint) == len(rows_of()) == iterations


@the_exact_scripts
@pytest.mark.parametrize("interval", [1, 100])
def test_an_error_after_a_rollout_does_not_reach_what_the_last_iteration_has_learned(script, interval, monkeypatch):
    record_starts(monkeypatch, script)
    compute_gae, calls = MODULES[script].compute_gae, []

    def fail(*args):
        calls.append(args)
        if len(calls) == 5:
            raise MemoryError
        return compute_gae(*args)

    monkeypatch.setattr(MODULES[script], "compute_gae", fail)
    with pytest.raises(MemoryError):
        train(script, **small(script, 10, normalize_obs=True, normalize_reward=True), checkpoint_interval=interval)
    assert iterations_done(assert_saved(script)) == 4
    assert_same(load(script)["agent"], torch.load("agent.pt", weights_only=True))


@the_exact_scripts
def test_an_error_after_a_step_of_the_optimizer_leaves_the_last_checkpoint(script, monkeypatch):
    gather, calls = MODULES[script].gather, []

    def fail(item):
        calls.append(item)
        if len(calls) == 6:  # twice in the third iteration, which saves
            raise MemoryError
        return gather(item)

    monkeypatch.setattr(MODULES[script], "gather", fail)
    with pytest.raises(MemoryError):
        train(script, **small(script, 10, normalize_obs=True, normalize_reward=True), checkpoint_interval=3)
    assert iterations_done(load(script)) == 3 and len(rows_of()) == 4


def test_an_error_after_an_update_without_a_step_saves_what_the_last_iteration_has_learned(monkeypatch):
    starts, policy, average = [], ppo.NumpyPolicy.__init__, ppo.average_over_processes

    def note(self, agent):
        starts.append(agent.obs_statistics.count.item())
        policy(self, agent)

    def stop_the_update_or_fail(mean, count):
        if len(starts) == 4 and mean.shape == ():
            mean.fill_(1.0)  # the KL
        if len(starts) == 4 and mean.shape == (6,):  # the means for the log
            raise MemoryError
        return average(mean, count)

    monkeypatch.setattr(ppo.NumpyPolicy, "__init__", note)
    monkeypatch.setattr(ppo, "average_over_processes", stop_the_update_or_fail)
    with pytest.raises(MemoryError):
        train("ppo", **small("ppo", 10, normalize_obs=True), target_kl=0.5, checkpoint_interval=100)
    assert iterations_done(assert_saved("ppo")) == 3
    assert load("ppo")["agent"]["obs_statistics.count"] == starts[3]


@needs_proc
@each_script
def test_the_error_of_an_environment_is_shown_and_the_run_can_go_on(script, start, tmp_path):
    done = start(script, **small(script, 10**4, env_id="Broken-v0")).finish()
    assert done.code == 1 and done.out == ""
    assert done.err.count("ValueError: the environment is broken") == 1
    step = assert_saved(script)["global_step"]
    total = step + small(script, 1)["total_timesteps"]
    done = start(script, resume="run/checkpoint.pt", total_timesteps=total).finish()
    assert done.code == 0 and "resumed with new episodes" in done.out


@needs_proc
@each_script
def test_a_reward_that_is_nan_ends_a_run_that_can_go_on(script, start):
    done = start(script, **small(script, 10**4, env_id="Nan-v0")).finish()
    assert done.code == 1 and done.out == ""
    assert done.err.count("reward[0] is nan at step ") == 1
    if script != "a3c":  # which shows where in a worker it was
        assert len(done.messages) == 1
    checkpoint = assert_saved(script)
    assert all(torch.isfinite(value).all() for value in checkpoint["agent"].values())


@each_script
def test_the_error_of_an_environment_comes_before_that_of_a_full_disk(script, monkeypatch):
    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Exception, match="the environment is broken"):
        train(script, **small(script, 10**4, env_id="Broken-v0", checkpoint_interval=10**6))
    assert not multiprocessing.active_children()


@the_exact_scripts
def test_a_signal_does_not_hide_what_a_run_has_failed_of(script):
    with pytest.MonkeyPatch.context() as patch:
        log = MODULES[script].Run.log

        def interrupt_and_log(self, *args):
            log(self, *args)
            if len(rows_of()) == 514 // 64:  # the next rollout holds the reward that is NaN
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(MODULES[script].Run, "log", interrupt_and_log)
        with pytest.raises(FloatingPointError, match="reward"):
            train(script, **small(script, 10**4, env_id="Nan-v0", num_envs=1, num_steps=64))


def test_a_signal_before_the_first_report_of_a3c_has_nothing_to_save(monkeypatch):
    def arrivals(workers, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        for process in workers.processes:
            process.kill()
            process.join()
        yield from ()

    monkeypatch.setattr(a3c, "arrivals", arrivals)
    with pytest.raises(SystemExit) as stop:
        train("a3c", **small("a3c", 50))
    assert stop.value.code == 143 and stop.value.__context__ is None and not Path("run/checkpoint.pt").exists()


@the_exact_scripts
def test_a_signal_in_the_last_iteration_prints_no_command_that_would_be_refused(script, capsys):
    interrupt(script, lambda: train(script, **small(script, 6)), 6)
    assert re.fullmatch(r"CartPole-v1: .*\n", capsys.readouterr().out)
    interrupt(script, lambda: train(script, **small(script, 6) | {"run_dir": "evaluated"}, eval_episodes=2), 6)
    assert "go on: python" in capsys.readouterr().out


@needs_proc
@the_exact_scripts
def test_a_killed_process_of_async_environments_ends_a_run_with_one_line(script, start):
    process = start(script, **small(script, 10**6, vectorization_mode="async"), checkpoint_interval=10**6)
    wait_for_rows(3)
    workers = children(process.pid)
    assert len(workers) == 4
    os.kill(workers[1], signal.SIGKILL)
    done = process.finish()
    assert done.code == 1 and done.out == ""
    assert len(done.messages) == 1 and "async has died: " in done.messages[0], done.messages
    assert_saved(script)


@needs_proc
@the_exact_scripts
def test_an_error_of_the_connection_of_async_environments_themselves_is_told_as_it_is(script):
    with pytest.raises(ConnectionResetError, match="the simulator has gone"):
        train(script, **small(script, 100, env_id="Disconnected-v0"), vectorization_mode="async")


@needs_proc
@the_exact_scripts
@pytest.mark.parametrize("env_id", ["Simulator-v0", "Holder-v0", "Unstartable-v0"])
def test_an_error_that_cannot_be_sent_from_an_async_environment_arrives_as_text(script, env_id, start):
    done = start(script, **small(script, 10**4, env_id=env_id, vectorization_mode="async")).finish()
    assert done.code == 1 and done.out == ""
    kind = "LookupError" if env_id == "Holder-v0" else "SimulatorError"
    assert re.match(rf"RuntimeError: {kind}: .*the simulator is broken", done.messages[-1])
    assert_saved(script)


@needs_proc
@the_exact_scripts
def test_an_error_that_cannot_be_sent_from_an_async_environment_that_renders_arrives_as_text(script, start, rendering):
    flags = small(script, 1, env_id="Endless-v0", vectorization_mode="async", capture_video=True)
    done = start(script, **flags, prepare=lambda: setattr(Endless, "render", lambda self: simulator())).finish()
    assert done.code == 2 and "--capture-video: SimulatorError: the simulator is broken" in done.messages[-1]


@needs_proc
@the_exact_scripts
def test_a_process_that_dies_as_it_is_asked_to_close_is_no_error(script, monkeypatch):
    close_extras, calls = gym.vector.AsyncVectorEnv.close_extras, []

    def kill_and_close(self, **kwargs):
        calls.append(self)
        self.processes[1].kill()
        self.processes[1].join()
        close_extras(self, **kwargs)

    monkeypatch.setattr(gym.vector.AsyncVectorEnv, "close_extras", kill_and_close)
    train(script, **small(script, 2), vectorization_mode="async")
    assert len(calls) == 1 and not multiprocessing.active_children()


@the_exact_scripts
def test_an_environment_that_leaves_is_no_success(script):
    with pytest.raises(MODULES[script].RunError, match="sys.exit"):
        train(script, **small(script, 100, env_id="Exit-v0"))
    assert_saved(script)


@each_script
def test_an_environment_may_have_attributes_by_the_names_of_those_of_wrappers(script):
    for env_id in ("OwnsNothing-v0", "OwnsAnArray-v0", "OwnsMany-v0"):
        flags = small(script, 2, env_id=f"{__name__}:{env_id}", run_dir=env_id)
        train(script, **flags)
        resume(script, env_id, total_timesteps=2 * flags["total_timesteps"])


@each_script
def test_a_signal_that_is_ignored_stays_so(script, monkeypatch):
    log = MODULES[script].Run.log
    monkeypatch.setattr(MODULES[script].Run, "log", lambda *a: (os.kill(os.getpid(), signal.SIGINT), log(*a)))
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what runs in the background
    try:
        train(script, **small(script, 6))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(rows_of()) == 6


def test_torchrun_is_refused_by_a3c(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(a3c.ConfigError, match="--num-workers"):
        train("a3c", **small("a3c", 1))


def limit_file_size(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@needs_proc
@each_script
@pytest.mark.parametrize("file, size, interval", [("metrics.csv", 16 * 1024, 10**6), ("checkpoint.pt", 64 * 1024, 5)])
def test_a_file_that_cannot_grow_ends_a_run_with_one_line(script, file, size, interval, start):
    if script == "a3c" and file == "metrics.csv":
        pytest.skip("its shared memory needs files of that size, too; the next test has no such limit")
    train(script, **small(script, 2))
    flags = {"total_timesteps": small(script, 10**4)["total_timesteps"], "checkpoint_interval": interval}
    before = Path("run/checkpoint.pt").read_bytes()
    assert len(before) > size or file == "metrics.csv"
    done = start(script, resume="run/checkpoint.pt", prepare=limit_file_size(size), **flags).finish()
    assert (done.code, done.out) == (1, "")
    assert len(done.messages) == 1 and file in done.messages[0] and "File too large" in done.messages[0], done.err
    assert not list(Path("run").glob("*.tmp"))
    if file == "checkpoint.pt":
        assert Path("run/checkpoint.pt").read_bytes() == before
    more = {"total_timesteps": small(script, 10)["total_timesteps"]}
    assert start(script, resume="run/checkpoint.pt", **more).finish().code == 0
    assert_no_gap(rows_of(), script)


@pytest.fixture
def disk(tmp_path):
    """A file system of 600 KB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", path]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("to mount a small file system takes root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@needs_proc
@each_script
@pytest.mark.parametrize("file, interval", [("metrics.csv", 10**6), ("checkpoint.pt", 1)])
def test_a_full_disk_ends_a_run_with_one_line(script, file, interval, start, disk):
    train(script, **small(script, 2, run_dir=str(disk / "run")))
    flags = {"total_timesteps": small(script, 10**4)["total_timesteps"], "checkpoint_interval": interval}
    with pytest.raises(OSError), open(disk / "rest", "wb", buffering=0) as rest:
        while True:
            rest.write(bytes(4096))
    done = start(script, resume=disk / "run/checkpoint.pt", **flags).finish()
    assert (done.code, done.out) == (1, "")
    assert len(done.messages) == 1 and file in done.messages[0] and "No space left" in done.messages[0], done.err
    (disk / "rest").unlink()
    load(script, disk / "run")
    more = {"total_timesteps": small(script, 20)["total_timesteps"]}
    assert start(script, resume=disk / "run/checkpoint.pt", **more).finish().code == 0
    assert_no_gap(rows_of(disk / "run"), script)
    assert len(rows_of(disk / "run")) == 20


@each_script
def test_a_folder_that_cannot_be_written_is_refused(script, tmp_path, warm):
    folder = tmp_path / "read_only"
    folder.mkdir(0o555)
    is_root = os.geteuid() == 0
    if is_root:  # who may write everywhere
        os.seteuid(65534)
    try:
        with pytest.raises(MODULES[script].ConfigError, match="read_only/run: Permission denied.*--run-dir"):
            train(script, **small(script, 1, run_dir=str(folder / "run")))
    finally:
        if is_root:
            os.seteuid(0)


@needs_proc
@each_script
def test_a_folder_in_a_file_and_the_folder_of_another_run_are_refused(script, start):
    Path("file").touch()
    assert_refused(start(script, run_dir="file/run").finish(), f"{script}.py: file/run: Not a directory", "--run-dir")
    train(script, **small(script, 1))
    log = Path("run/metrics.csv").read_bytes()
    assert_refused(start(script, run_dir="run").finish(), f"{script}.py: run/metrics.csv: File exists", "--run-dir")
    assert Path("run/metrics.csv").read_bytes() == log


@each_script
def test_a_run_that_fails_before_its_first_row_leaves_the_folder_to_the_next_try(script):
    flags = small(script, 1, env_id="FlawedReward-v0", num_steps=500)
    with pytest.raises(FloatingPointError, match="reward"):
        train(script, **flags)
    train(script, **{**flags, "env_id": "Noise-v0"})
    assert len(rows_of()) == 1


@needs_proc
@each_script
def test_two_runs_started_at_once_get_two_folders(script, start):
    flags = small(script, 2)
    del flags["run_dir"]
    for process in [start(script, **flags) for _ in range(2)]:
        assert process.finish().code == 0
    folders = list(Path("runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert folder.name.startswith(f"CartPole-v1__{script}__1__")
        assert len(rows_of(folder)) == 2
        assert_saved(script, folder)


@each_script
def test_an_evaluation_of_one_episode_has_environments_as_training_has(script, capsys):
    train(script, **small(script, 2), env_id="OnlyVector-v0", eval_episodes=1)
    assert "evaluation: return" in capsys.readouterr().out
    assert len(json.loads(Path("run/eval.json").read_text())["returns"]) == 1


@each_script
def test_the_same_seed_is_the_same_for_environments_that_draw_from_global_generators(script):
    for run_dir in ("one", "two"):
        random.seed(), np.random.seed()
        train(script, **small(script, 3, run_dir=run_dir), env_id="Careless-v0")
    one, two = ([{**row, "wall_time": 0, "sps": 0} for row in rows_of(run_dir)] for run_dir in ("one", "two"))
    assert one == two and one[0]["episodic_return"] != one[1]["episodic_return"]


@each_script
def test_a_signal_between_the_two_handlers_is_no_error(script, monkeypatch):
    install = signal.signal

    def interrupt_at_once(number, handler):
        old = install(number, handler)
        if number == signal.SIGINT and getattr(handler, "__name__", "") == "receive":
            os.kill(os.getpid(), number)
        return old

    monkeypatch.setattr(signal, "signal", interrupt_at_once)
    with pytest.raises(SystemExit) as caught:
        train(script, **small(script, 10**6))
    assert caught.value.code == 130


# Weights & Biases, of which there is none here, but what it is told is noted in a file.


class Wandb(types.SimpleNamespace):
    class Error(Exception):
        pass

    class Video(str):
        def __new__(cls, path):
            return super().__new__(cls, f"video {path} {os.path.getsize(path)}")

    fails_to_start, fails_at, fails_to_finish = False, None, False

    def note(self, what, **how):
        with open("wandb.jsonl", "a") as file:
            print(json.dumps([what, how], default=str), file=file)

    def told(self, what):
        path = Path("wandb.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return [how for kind, how in map(json.loads, lines) if kind == what]

    def init(self, **how):
        if self.fails_to_start:
            raise self.Error("No API key configured. Use `wandb login` to log in.")
        self.note("init", **how)
        return types.SimpleNamespace(id=how.get("id") or f"id{len(self.told('init'))}", log=self.log, finish=self.end)

    def log(self, metrics, **how):
        self.note("log", **metrics)
        if self.fails_at == len(self.told("log")):
            raise self.Error("the service has gone away")

    def end(self, **how):
        self.note("finish", **how)
        if self.fails_to_finish:
            raise OSError("the disk of the service is full")

    def videos(self):
        return [v for metrics in self.told("log") for v in metrics.values() if str(v).startswith("video ")]


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    return sys.modules["wandb"]


@needs_proc
@each_script
def test_wandb_without_a_login_is_refused_at_the_start(script, start, wandb):
    wandb.fails_to_start = True
    done = start(script, **small(script, 2), track=True).finish()
    assert_refused(done, f"{script}.py: --track: No API key configured", "WANDB_MODE=offline")
    assert not Path("run/checkpoint.pt").exists()


@each_script
def test_without_wandb_tracking_is_refused_and_leaves_the_folder_to_the_next_try(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MODULES[script].ConfigError, match="^--track: .*wandb.*; try pip install wandb, "):
        train(script, **small(script, 1), track=True)
    train(script, **small(script, 1))


@each_script
def test_wandb_gets_all_rows_and_a_resumed_run_has_the_same_id(script, wandb):
    interrupt(script, lambda: train(script, **small(script, 10**6), track=True), 2)
    resume(script, total_timesteps=load(script)["global_step"] + 3 * small(script, 1)["total_timesteps"])
    first, second = wandb.told("init")
    assert first.get("id") is None and first["config"]["track"]
    assert second["id"] == "id1" and second["resume"] in ("must", "allow")
    logged = [metrics["global_step"] for metrics in wandb.told("log") if metrics]
    assert logged == [int(row["global_step"]) for row in rows_of()]
    assert wandb.told("finish") == [{"exit_code": 1}, {"exit_code": 0}]
    assert first["name"] == second["name"] == "run"


@each_script
def test_wandb_that_fails_in_the_end_takes_neither_the_summary_nor_the_evaluation(script, wandb, capsys):
    wandb.fails_to_finish = True
    train(script, **small(script, 2), track=True, eval_episodes=2)
    out, err = capsys.readouterr()
    assert "steps in" in out and "evaluation: return" in out
    assert err.count("--track: the disk of the service is full") == 1


@each_script
def test_wandb_that_fails_half_way_says_so_once_and_training_goes_on(script, wandb, capsys):
    wandb.fails_at = 3
    train(script, **small(script, 6), track=True)
    out, err = capsys.readouterr()
    assert err.count("--track: the service has gone away") == 1
    assert "steps in" in out
    assert len(rows_of()) == 6
    assert len(wandb.told("log")) == 3
    assert_saved(script)


@each_script
def test_a_run_that_wandb_has_failed_in_is_resumed_under_its_id(script, wandb):
    wandb.fails_at = 2
    interrupt(script, lambda: train(script, **small(script, 10**6), track=True), 4)
    resume(script, total_timesteps=load(script)["global_step"] + 3 * small(script, 1)["total_timesteps"])
    assert [how.get("id") for how in wandb.told("init")] == [None, "id1"]


# Videos.


def videos(run_dir="run"):
    return sorted(str(path) for path in Path(run_dir).glob("videos/*.mp4"))


@pytest.fixture
def rendering():
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")


@each_script
def test_videos_of_training_and_evaluation_are_left_in_the_folder(script, rendering):
    rows = 1 if script == "a3c" else 6
    train(script, **small(script, rows), capture_video=True, eval_episodes=1)
    assert {"run/videos/training-from-0-episode-0.mp4", "run/videos/evaluation-episode-0.mp4"} <= set(videos())
    assert all(os.path.getsize(path) > 1000 for path in videos())


@each_script
def test_the_first_video_is_of_the_first_episode(script, rendering):
    env_id = f"{__name__}:Endless-v0"  # which a spawned worker of a3c.py has to import
    train(script, **small(script, 1, env_id=env_id), capture_video=True)
    assert videos() == ["run/videos/training-from-0-episode-0.mp4"]


@each_script
def test_an_environment_that_shows_nothing_is_refused(script, rendering, monkeypatch):
    monkeypatch.setattr(Endless, "render", lambda self: None)
    with pytest.raises(MODULES[script].ConfigError, match="^--env-id Endless-v0 --capture-video: ."):
        train(script, **small(script, 1, env_id="Endless-v0"), capture_video=True)
    monkeypatch.setattr(Endless, "render", lambda self: np.zeros((64, 64), np.uint8))
    with pytest.raises(MODULES[script].ConfigError, match="--capture-video: .*image"):
        train(script, **small(script, 1, env_id="Endless-v0"), capture_video=True)
    monkeypatch.delattr(Endless, "render")  # what is left raises an error without a text
    with pytest.raises(MODULES[script].ConfigError, match="--capture-video: NotImplementedError$"):
        train(script, **small(script, 1, env_id="Endless-v0"), capture_video=True)


@each_script
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_a_disk_that_is_full_at_the_start_is_named(script):
    Path("run").mkdir()
    Path("run/args.json").symlink_to("/dev/full")
    with pytest.raises(MODULES[script].ConfigError, match="^run: No space left on device; "):
        train(script, **small(script, 1))
    Path("run/args.json").unlink()
    train(script, **small(script, 1))


@the_exact_scripts
@pytest.mark.parametrize("before, after", [(True, True), (False, True), (True, False)])
def test_a_run_with_videos_goes_on_exactly_too(script, before, after, rendering):
    flags = small(script, 6)
    train(script, **flags | {"run_dir": "whole"})
    interrupt(script, lambda: train(script, **flags, capture_video=before), 3)
    resume(script, capture_video=after)
    assert log_of("run") == log_of("whole")


@the_exact_scripts
def test_videos_that_cannot_be_written_are_refused_and_leave_the_folder_to_the_next_try(script, rendering):
    Path("run").mkdir()
    Path("run/videos").touch()
    with pytest.raises(MODULES[script].ConfigError, match="videos"):
        train(script, **small(script, 2), capture_video=True)
    assert os.listdir("run") == ["videos"]


@needs_proc
@each_script
def test_without_moviepy_videos_are_refused(script, start, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    done = start(script, **small(script, 2), capture_video=True).finish()
    assert_refused(done, "--capture-video", "pip install moviepy")
    assert not Path("run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="there is no fork")
def test_videos_are_not_of_forks_of_a_process_that_has_rendered(monkeypatch, rendering):
    asked, start = [], a3c.mp.start_processes

    def spy(*args, start_method, **kwargs):
        asked.append(start_method)
        return start(*args, start_method=start_method, **kwargs)

    monkeypatch.setattr(a3c.mp, "start_processes", spy)
    for capture_video in (False, True):
        flags = small("a3c", 1, run_dir=f"run{capture_video}", start_method="fork", env_id="CartPole-v1")
        train("a3c", **flags, capture_video=capture_video)
    assert asked == ["fork", "spawn"]


@needs_proc
@each_script
def test_videos_of_the_native_environments_of_atari_are_refused(script, start, rendering):
    pytest.importorskip("ale_py")
    done = start(script, env_id="ALE/Pong-v5", num_envs=2, num_steps=8, total_timesteps=32, capture_video=True).finish()
    assert_refused(done, "--capture-video", "ALE/Pong-v5")


@each_script
def test_wandb_gets_each_video_once_and_whole(script, wandb, rendering):
    more, rows = ({"num_workers": 2}, 3) if script == "a3c" else ({}, 12)
    flags = small(script, 10**6, env_id="CartPole-v1", capture_video=True, track=True, **more)
    interrupt(script, lambda: train(script, **flags), rows)
    assert len(wandb.videos()) > 0
    step = load(script)["global_step"]
    resume(script, total_timesteps=step + rows * small(script, 1)["total_timesteps"])
    assert any(f"training-from-{step}-" in path for path in videos())
    assert sorted(wandb.videos()) == [f"video {path} {os.path.getsize(path)}" for path in videos()]
