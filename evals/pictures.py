"""Pictures of the runs of experiments.py: what their students draw, side by side, and their curves."""

import textwrap

import matplotlib.pyplot as plt

import common
from common import UserError
from evals import experiments
from evals.metrics import mean_error
from generate import Generator
from world.shapes import held_out

MOMENTS = (0, 7, 15)  # the frames of a clip that are shown


def sheet(table, out, prompts=4):
    """A row for each run of a table with seed 0: three frames of the first held-out prompts, all from the same noise.

    Needs the runs' weights in runs/experiments; bundled weights are there. Raises UserError where there are none.
    """
    words, drawn = held_out(prompts)[1], {}
    for label in experiments.rows(table):
        if (file := experiments.weights_of(table, label)).exists():
            generator = Generator.load(file, precision="fp32")
            steps = len(generator.trained) if generator.student else 50
            drawn[label] = generator.draw(words, range(prompts), steps)[:, :, MOMENTS]  # (prompts, 3, moments, H, W)
    if not drawn:
        raise UserError(f"runs/experiments has no student of the table {table}: python eval.py experiments {table}")
    height = 8 / (prompts * len(MOMENTS)) + 0.05  # of a row, in inches
    figure, axes = plt.subplots(
        len(drawn), squeeze=False, figsize=(12, height * len(drawn) + 0.6), layout="constrained"
    )
    figure.get_layout_engine().set(h_pad=0.01, hspace=0)
    for axis, (label, videos) in zip(axes[:, 0], drawn.items()):
        frames = videos.permute(3, 0, 2, 4, 1).flatten(1, 3)  # (H, prompts * moments * W, 3)
        axis.imshow((frames + 1) / 2, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        of_prompt = frames.shape[1] / prompts  # pixels
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
    places = [(i + 0.5) * of_prompt for i in range(prompts)]
    axes[0, 0].set_xticks(places, [textwrap.fill(prompt, 22) for prompt in words], fontsize=7)
    axes[0, 0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    save(figure, out)


def curves(table, out, names):
    """Of each of `names`, numbers of the log, a panel: a line for each row, the mean over its seeds and their error."""
    figure, axes = plt.subplots(1, len(names), squeeze=False, figsize=(4 * len(names), 3.2), layout="constrained")
    drawn = {}  # a line of each row, in one colour in all panels
    for i, label in enumerate(experiments.rows(table)):
        results = experiments.read(table, label, "results")
        runs = [result["training"]["curves"] for result in results if "training" in result]  # a teacher has none
        for axis, name in zip(axes[0], names):
            points = {}
            for step, value in (point for run in runs for point in run.get(name, [])):
                points.setdefault(step, []).extend([] if value is None else [value])
            points = {step: values for step, values in points.items() if values}  # a correlation may be NaN
            if points:
                scores = [mean_error(values) for values in points.values()]
                line = [score["mean"] for score in scores]
                errors = [score["error"] for score in scores]
                drawn[label] = axis.errorbar(list(points), line, errors, color=f"C{i}", label=label)
            axis.set(title=name.replace("_", " "), xlabel="update")
    if not drawn:
        raise UserError(f"results/ has none of {', '.join(names)} of the table {table}")
    figure.legend(drawn.values(), drawn, loc="outside right upper", fontsize=7)
    save(figure, out)


def save(figure, out):
    with common.atomic(out) as part:
        figure.savefig(part, dpi=100, format="png")
    plt.close(figure)
    print(f"wrote {out}")
