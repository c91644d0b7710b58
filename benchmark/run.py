"""Train what runs.txt lists with several seeds, keep what was logged, and print a table of it.

    python benchmark/run.py                       # every run, seeds 1 to 5, as many at once as there are cores
    python benchmark/run.py --only ppo-HalfCheetah --jobs 1
    python benchmark/run.py --jobs 0              # the table alone

A run leaves benchmark/results/<name>/<seed>/ with metrics.csv, thinned to 200 rows, and run.json: the command, the
summary line, the seconds, the versions and the processor. What is there is not run again, so the suite can be stopped
and continued at any time.
"""

import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "gymnasium", "numpy", "mujoco", "ale-py", "box2d", "stable-baselines3")


@dataclass
class Args:
    only: str = ""  # only the runs whose names begin so
    seeds: int = 5  # seeds 1 to this
    jobs: int = os.cpu_count() or 1  # processes at once


def read_runs():
    """The commands of runs.txt by the name of the run; a line `$name = flags` defines what `$name` stands for."""
    commands, variables = {}, {}
    for line in (HERE / "runs.txt").read_text().splitlines():
        if line.startswith("$"):
            name, value = line.split(" = ")
            variables[name] = value
        elif line and not line.startswith("#"):
            name, *command = line.split()
            commands[name] = [flag for word in command for flag in variables.get(word, word).split()]
    return commands


def thin(path, num_rows=200):
    """Merge the rows of metrics.csv at `path` to `num_rows`: returns become means over the episodes of all merged."""
    with open(path) as file:
        rows = list(csv.DictReader(file))
    group_size, last_episodes, thinned = -(-len(rows) // num_rows), 0, []
    for i in range(0, len(rows), group_size):
        group, total = rows[i : i + group_size], 0.0
        for row in group:
            total += (int(row["episodes"]) - last_episodes) * float(row["episodic_return"] or 0)
            last_episodes = int(row["episodes"])
        count = last_episodes - (int(thinned[-1]["episodes"]) if thinned else 0)
        thinned.append(group[-1] | {"episodic_return": total / count if count else ""})
    columns = ("global_step", "wall_time", "episodes", "episodic_return")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(thinned)


def train(name, command, seed):
    folder, command_line = HERE / "results" / name / str(seed), f"python {' '.join(command)} --seed {seed}"
    if folder.exists():
        if json.loads((folder / "run.json").read_text())["command"] != command_line:
            sys.exit(f"{folder} is of another command; move it away")
        return
    with tempfile.TemporaryDirectory(dir=HERE) as temporary:
        run_dir, start = Path(temporary, "run"), time.perf_counter()
        command = [HERE.parent / word if word.endswith(".py") else word for word in command]
        words = [sys.executable, *command, "--seed", str(seed), "--run-dir", run_dir]
        out, error = Path(temporary, "out"), Path(temporary, "error")
        with open(out, "w") as out_file, open(error, "w") as error_file:
            process = subprocess.Popen(words, stdout=out_file, stderr=error_file, cwd=temporary)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            print(f"{name}, seed {seed}: {error.read_text()[-500:]}", flush=True)
            return
        summary = out.read_text().strip().rpartition(",")[0]
        about = {
            "command": command_line,
            "summary": summary,
            "final_return": float(re.search(r"return (\S+),", summary)[1]),
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),  # of all its processes
            "packages": {package: version(package) for package in PACKAGES},
            "python": platform.python_version(),
            "processor": processor(),
            "date": time.strftime("%Y-%m-%d"),
        }
        thin(run_dir / "metrics.csv")
        for path in run_dir.iterdir():
            if path.name != "metrics.csv":
                path.unlink()
        (run_dir / "run.json").write_text(json.dumps(about, indent=2) + "\n")
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_dir.rename(folder)
        print(f"{name}, seed {seed}: {summary}", flush=True)


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def training_return(path):
    """The mean return over all of the training, each step counting alike: what a learner that is quick has more of."""
    total, last_step = 0.0, 0
    with open(path) as file:
        for row in csv.DictReader(file):
            if row["episodic_return"]:  # of the episodes that have ended since the last such row
                step = int(row["global_step"])
                total, last_step = total + (step - last_step) * float(row["episodic_return"]), step
    return total / last_step


def print_table(runs):
    """Mean ± deviation over seeds of the return of the last 100 episodes and of all training; median CPU seconds."""
    print(f"{'':30}{'last 100 episodes':>19}{'whole training':>19}{'seeds':>7}{'CPU s':>7}")
    for name in runs:
        paths = sorted((HERE / "results" / name).glob("*/run.json"))
        results = [json.loads(path.read_text()) for path in paths]
        if len(results) > 1:
            line = f"{name:30}"
            final = [result["final_return"] for result in results]
            for returns in final, [training_return(path.with_name("metrics.csv")) for path in paths]:
                line += f"{statistics.mean(returns):10.1f} ± {statistics.stdev(returns):<6.1f}"
            seconds = statistics.median(result["cpu_seconds"] for result in results)
            print(f"{line}{len(results):7}{seconds:7.0f}")


def main(args):
    runs = {name: command for name, command in read_runs().items() if name.startswith(args.only)}
    if args.jobs:
        jobs = [(name, command, seed) for seed in range(1, args.seeds + 1) for name, command in runs.items()]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(train, *zip(*jobs)))
    print_table(runs)


if __name__ == "__main__":
    main(tyro.cli(Args))
