"""Draw the learning curves of benchmark/results: a panel for each environment, a line for each script.

    python benchmark/plot.py                                # the eight environments of the README
    python benchmark/plot.py --only HalfCheetah-v5 --scripts ppo sb3-ppo --out cheetah.png

A line is the mean over seeds of the mean return of the last 100 training episodes. Its band is the 95 % bootstrap
interval of that mean, which draws seeds again for each environment and script; with five seeds it is too narrow, and
holds the mean of normal returns in some 83 % of cases.
"""

import csv
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter

HERE = Path(__file__).resolve().parent
LABELS = {
    "ppo": ("ppo.py", "#0072b2"),
    "ppo-rising": ("ppo.py, README's flags", "#56b4e9"),
    "ppo-unsticky": ("ppo.py, no sticky actions", "#009e73"),
    "a2c": ("a2c.py", "#009e73"),
    "a3c": ("a3c.py", "#cc79a7"),
    "sb3-ppo": ("PPO of SB3", "#d55e00"),
    "sb3-a2c": ("A2C of SB3", "#e69f00"),
}
CLASSIC = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "LunarLander-v3")
MUJOCO = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")


@dataclass
class Args:
    only: tuple[str, ...] = CLASSIC + MUJOCO + ("Pong-v5",)  # environments to draw
    scripts: tuple[str, ...] = tuple(LABELS)  # lines to draw
    out: Path = HERE / "learning.png"  # the picture


def read_curve(path, grid):
    """The mean return of the last 100 episodes at each step of the grid; NaN before the first 20 have ended."""
    steps, means, counts, returns = [], [], [], np.empty(0)
    with open(path) as file:
        for row in csv.DictReader(file):
            num_new = int(row["episodes"]) - (counts[-1] if counts else 0)
            if num_new:
                returns = np.append(returns, np.full(num_new, float(row["episodic_return"])))[-100:]
            steps.append(int(row["global_step"]))
            counts.append(int(row["episodes"]))
            means.append(returns.mean() if counts[-1] >= 20 else np.nan)
    return np.interp(grid, steps, means, right=np.nan)


def main(args):
    curves = {}  # by environment and script
    for name in sorted(path.name for path in (HERE / "results").iterdir()):
        script, env_id = re.fullmatch(r"(.*?)-([A-Z].*)", name).groups()
        if script in args.scripts and env_id in args.only:
            paths = sorted((HERE / "results" / name).glob("*/metrics.csv"))
            last_steps = [int(path.read_text().splitlines()[-1].split(",")[0]) for path in paths]
            grid = np.linspace(0, max(last_steps), 200)
            curves.setdefault(env_id, {})[script] = grid, np.array([read_curve(path, grid) for path in paths])

    num_columns = min(len(curves), 4)
    num_rows = -(-len(curves) // num_columns)
    figure, panels = plt.subplots(
        num_rows, num_columns, figsize=(3.6 * num_columns, 2.8 * num_rows), squeeze=False, layout="constrained"
    )
    rng = np.random.default_rng(0)
    for panel, env_id in zip(panels.flat, (env_id for env_id in args.only if env_id in curves)):
        others = itertools.cycle(("#d55e00", "#009e73", "#cc79a7", "#e69f00"))
        for script in (script for script in args.scripts if script in curves[env_id]):
            grid, seeds = curves[env_id][script]
            resampled = seeds[rng.integers(len(seeds), size=(1000, len(seeds)))].mean(1)
            low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
            label, color = LABELS.get(script) or (script, next(others))
            panel.plot(grid, seeds.mean(0), color=color, label=f"{label} ({len(seeds)})", linewidth=1.6)
            panel.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)
        panel.set_title(env_id, fontsize=11)
        panel.locator_params(axis="x", nbins=5)
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7, title="(seeds)", title_fontsize=7)
    for panel in panels.flat[len(curves) :]:
        panel.axis("off")
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel("mean return of the last 100 episodes", fontsize=10)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Args))
