"""Curves of runs over their iterations, from log.jsonl: rewards, and what an LRM knows of them (Fig. 8, 10, 11)."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from common import UserError, atomic

PANELS = [  # title, name of the x axis, x and y in the log
    ("rank correlation of LRM and reward", "iteration", "step", "rank_correlation"),
    ("the same within prompts", "iteration", "step", "rank_correlation_within"),
    ("squared error of the LRM", "iteration", "step", "lrm"),
    ("true reward of fresh samples", "iteration", "step", "true_reward"),
    ("what the LRM says of them", "iteration", "step", "lrm_estimate"),
    ("true reward of fresh samples", "seconds of training", "trained_s", "true_reward"),
    ("true reward of fresh samples", "evaluations of the reward", "reward_evaluations", "true_reward"),
]
POINTS = 100  # of a curve: of what is logged every iteration, means


def read_log(folder):
    """The lines of a run's log.jsonl, as dicts. UserError where there is none."""
    file = Path(folder) / "log.jsonl"
    try:
        return [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {file}: {getattr(e, 'strerror', None) or e}") from e


def name_and_seed(folder):
    """A run's folder NAME-SEED -> (NAME, SEED); of another name (its name, 0)."""
    name, _, seed = Path(folder).name.rpartition("-")
    return (name, int(seed)) if name and seed.isdigit() else (Path(folder).name, 0)


def points(log, x, y):
    """[(x, y), ...] of the lines that have both, at most POINTS of them."""
    found = [(line[x], line[y]) for line in log if x in line and y in line]
    size = max(1, len(found) // POINTS)
    parts = [found[i : i + size] for i in range(0, len(found), size)]
    return [tuple(sum(values) / len(part) for values in zip(*part)) for part in parts]


def draw(path, runs, only=()):
    """Draw what the runs (folders NAME-SEED) have logged, or of it `only` these; seeds of one name share a colour.

    Returns the titles. UserError where nothing of it has been logged.
    """
    logs = [(name_and_seed(run)[0], read_log(run)) for run in runs]
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in logs))}
    wanted = [panel for panel in PANELS if not only or panel[-1] in only]
    shown = [panel for panel in wanted if any(points(log, *panel[2:]) for _, log in logs)]
    if not shown:
        raise UserError("name the folders of runs with a --reward: eval.py curves RUNS... --out FILE.png")
    figure, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3), squeeze=False, layout="constrained")
    for axis, (title, name, x, y) in zip(axes[0], shown):
        for label, log in logs:
            if curve := points(log, x, y):
                axis.plot(*zip(*curve), color=colours[label], label=label)
        axis.set(title=title, xlabel=name)
        handles, labels = axis.get_legend_handles_labels()
        axis.legend(*zip(*{label: (handle, label) for handle, label in zip(handles, labels)}.values()))
    with atomic(path) as part:
        figure.savefig(part, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    plt.close(figure)
    return [f"{title} over {name}" for title, name, *_ in shown]
