"""README.md and benchmark/ say what is true of the scripts: equations and their lines, lengths, commands, results."""

import json
import os
import re
import runpy
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

import a2c
import a3c
import ppo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
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
