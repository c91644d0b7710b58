"""README.md and benchmark/ say what is true of the scripts: equations and their lines, lengths, commands, results."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev

import pytest

import a2c
import a3c
import ppo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARK = (ROOT / "benchmark" / "README.md").read_text()
SCRIPTS = {"GAE": ("ppo.py", "a2c.py", "a3c.py", "gae_check.py"), "PPO": ("ppo.py",)}
SCRIPTS |= {"A2C, A3C": ("a2c.py", "a3c.py"), "A3C": ("a3c.py",)}


def equations():
    section = README.split("## The equations")[1].split("\n## ")[0]
    return re.findall(r"^\| (GAE|PPO|A2C, A3C|A3C)(?:, [^|]*)? \| [^|]* \| `(.*)` \|$", section, re.M)


def test_the_map_of_the_equations_covers_every_paper():
    assert {paper for paper, _ in equations()} == set(SCRIPTS)
    assert len(equations()) == README.split("## The equations")[1].split("\n## ")[0].count("\n| ") - 1


@pytest.mark.parametrize("paper, line", equations())
def test_each_equation_of_the_map_is_a_line_of_its_scripts(paper, line):
    for script in SCRIPTS[paper]:
        lines = [text.split("  #")[0].strip() for text in (ROOT / script).read_text().splitlines()]
        assert lines.count(line) == 1, script


@pytest.mark.parametrize("script", ["ppo.py", "a2c.py", "a3c.py", "gae_check.py"])
def test_the_table_has_the_length_of_each_script(script):
    (length,) = re.findall(rf"^\| `{script}` .* \| (\d+) \|$", README, re.M)
    assert int(length) == len((ROOT / script).read_text().splitlines())


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(r"(ppo|a2c|a3c)\.py", line)]


@pytest.mark.parametrize("command", commands())
def test_the_flags_of_each_command_are_flags_of_the_script(command):
    words = shlex.split(command, comments=True)
    index = next(i for i, word in enumerate(words) if re.fullmatch(r"(ppo|a2c|a3c)\.py", word))
    names = {field.name for field in fields({"ppo.py": ppo, "a2c.py": a2c, "a3c.py": a3c}[words[index]].Args)}
    for word in words[index:]:
        if word.startswith("--"):
            assert word.removeprefix("--").removeprefix("no-").replace("-", "_") in names


def test_the_environment_that_readme_wraps_can_be_trained_on(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "lake.py").write_text(block)
    shutil.copy(ROOT / "ppo.py", tmp_path)
    command = [sys.executable, "ppo.py", "--env-id", "lake:Lake-v0", "--total-timesteps", "4096"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("lake:Lake-v0: return"), run.stderr


def benchmark_runs():
    return runpy.run_path(str(ROOT / "benchmark" / "run.py"))["read_runs"]()


@pytest.mark.parametrize("name, command", benchmark_runs().items())
def test_each_run_of_the_benchmark_has_flags_of_its_script(name, command):
    start = next(i for i, word in enumerate(command) if word.endswith(".py"))  # what is before it is torchrun's
    words = command[start + command[start].endswith("sb3.py") :]
    names = {field.name for field in fields({"ppo": ppo, "a2c": a2c, "a3c": a3c}[words[0].split(".")[0]].Args)}
    flags = [word.removeprefix("--").removeprefix("no-") for word in words[1:] if word.startswith("--")]
    assert {flag.replace("-", "_") for flag in flags} <= names, name


RESULTS = ROOT / "benchmark" / "results"


@pytest.mark.parametrize("result", sorted(str(p.parent.relative_to(RESULTS)) for p in RESULTS.glob("*/*/run.json")))
def test_each_result_is_of_the_command_that_its_run_lists(result):
    name, seed = result.split(os.sep)
    command = " ".join(benchmark_runs()[name])
    assert json.loads((RESULTS / result / "run.json").read_text())["command"] == f"python {command} --seed {seed}"
    assert (RESULTS / result / "metrics.csv").exists()


CLASSIC = (None, "ppo", "sb3-ppo", "a2c", "sb3-a2c", "a3c")  # the columns after the first, by the names of the runs
ROBOTS = ("ppo-rising", "ppo", "sb3-ppo")


def returns_in_readme():
    for line in README.splitlines():
        env_id, *cells = line.strip("| ").split(" | ")
        if re.fullmatch(r"\w+-v\d", env_id):
            columns = zip(ROBOTS if "±" in cells[0] else CLASSIC, cells)
            yield from ((f"{name}-{env_id}", cell) for name, cell in columns if "±" in cell)
    for env_id, cell in re.findall(r"^\| (\w+-v\d) \| ([^|]+) \|", BENCHMARK, re.MULTILINE):
        yield f"ppo-unseen-{env_id}", cell
    yield from (("ppo-patient-Swimmer-v5", cell) for cell in re.findall(r"--gae-lambda 0\.98` \((.+?)\)", README))
    yield from (("ppo-unseen-Ant-v5", cell) for cell in re.findall(r"Ant has (.+?), or", README))
    yield from (("ppo-contactless-Ant-v5", cell) for cell in re.findall(r", or (\S+ ± \S+) without", README))
    yield from (("ppo-contactless-Ant-v5", cell) for cell in re.findall(r"contactless.*` has (.+?), by", BENCHMARK))


def test_the_returns_in_readme_are_found():
    assert len(list(returns_in_readme())) == 18 + 9 + 6 + 1 + 3


@pytest.mark.parametrize("name, cell", list(returns_in_readme()))
def test_each_return_in_readme_is_the_mean_of_the_results_and_their_deviation(name, cell):
    returns = [json.loads(path.read_text())["final_return"] for path in RESULTS.glob(f"{name}/*/run.json")]
    digits = 1 if "." in cell else 0
    expected = f"{mean(returns):,.{digits}f} ± {stdev(returns):,.{digits}f}"
    assert cell == expected + f" ({len(returns)})" * (len(returns) != 5)


def test_the_seconds_to_solve_are_those_that_were_measured():
    measured = re.findall(r"seconds to solve +([\d.]+)", (ROOT / "benchmark" / "speed.txt").read_text())
    assert re.findall(r"\| ([\d.]+) s \|", README) == measured
