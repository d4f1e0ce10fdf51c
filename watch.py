"""Watching a reward while it is optimised: what it says of fresh samples, and when it stops being what is learned.

While tuning, the student is judged by a latent reward model that learns beside it (Eq. 14-15), on the samples it trains
on. Whether that is worth anything shows elsewhere: on the samples a user would draw, in all steps, from noise that
training never sees and held-out prompts (a cache has none: sixteen of its captions), decoded and scored by the true
reward. Prompts and noise are the same each time, so that what changes is the student.

rank_correlation is Spearman's, of the LRM's estimates and the true rewards of these samples: 1 if it puts them in the
right order. Its gradient needs more than that: a prompt's samples in the right order. An LRM that knows only which
prompts are hard has a high correlation and nothing to teach, so rank_correlation_within is that of the deviations from
each prompt's mean. Over-optimisation (section 4.5) has two signs here. What the LRM thinks of the samples rises while
what is true of them falls: the student has found what the LRM is wrong about. Or, where the LRM keeps learning and so
is not wrong for long, it no longer tells better samples from worse: the student has left what it knows, or has made its
samples all alike, and follows noise.
"""

import html
import json
import math
from pathlib import Path

import torch
import torch.distributed as dist

from common import UserError, atomic

SEED = 77_000_000  # of the samples' noise, far from those of pictures and evaluation
WINDOW = 3  # measurements that are averaged before they are compared
BLIND = 0.2  # a rank correlation: by chance alone 48 samples have 0.15, a mean over 3 measurements of them hardly less


def placings(x):
    """The ranks 1..n of x (n,); equal values share the mean of their ranks."""
    _, which, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    return (last - (count - 1) / 2)[which].double()


def spearman(a, b):
    """Spearman's rank correlation of a and b (n,), -1..1; NaN where one of them is constant or not finite."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    if len(a) < 2 or not (a.isfinite().all() and b.isfinite().all()):
        return math.nan
    a, b = ((r := placings(x)) - r.mean() for x in (a, b))
    return (a @ b / (a.norm() * b.norm())).item()


@torch.no_grad()
def measure(generator, reward, prompts, n, samples, batch, ranks, estimate=None, moments=None, repeats=1):
    """The true reward of fresh samples in n steps, and what the LRM says of them, alike on all ranks.

    generator: of generate.py; reward: of rewards.py; estimate(x, text, captions) -> (B,): what an LRM says.
    Each prompt is drawn `repeats` times (after the last they begin anew), each sample from noise of its own.
    -> {"true_reward", "true_error" (a standard error)}, in the reward's own units (of several, in those of the first;
    without moments their plain weighted sum), each of several as "true_NAME";
    with an LRM also "lrm_estimate" and "rank_correlation", with repeats "rank_correlation_within" prompts.
    """
    if samples < 2 or repeats < 1 or samples % repeats:
        raise UserError(f"--reward-samples: at least 2, and a multiple of --reward-repeats, not {samples}")
    per_rank, rows = -(-samples // ranks.size), []  # all ranks make the same number of calls
    numbers = range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)
    for part in (numbers[i : i + batch] for i in range(0, per_rank, batch)):
        captions = [prompts[i // repeats % len(prompts)] for i in part]
        text = generator.encoder.encode(captions).to(generator.device)
        x = generator.latents(text, [SEED + i for i in part], n)
        scores = reward.scores(generator.decode(x), captions).double().cpu()  # (B, R)
        estimates = estimate(x, text, captions).double().cpu() if estimate else scores.new_zeros(len(x))
        rows += torch.cat([estimates[:, None], scores], 1).tolist()
    if ranks.size > 1:
        dist.all_gather_object(parts := [None] * ranks.size, rows)
        rows = [row for part in parts for row in part]
    table = torch.tensor(rows[:samples], dtype=torch.float64)  # (n, 1 + R)
    estimates, scores = table[:, 0], table[:, 1:]
    if moments and moments.count:
        true, estimates = moments.natural(moments.standardise(scores)), moments.natural(estimates)
    else:
        true = scores @ scores.new_tensor(list(reward.weights.values()))
    found = {"true_reward": true.mean().item(), "true_error": (true.std() / len(true) ** 0.5).item()}
    if scores.shape[1] > 1:
        found |= {f"true_{name}": value.item() for name, value in zip(reward.weights, scores.mean(0))}
    if estimate:
        found |= {"lrm_estimate": estimates.mean().item(), "rank_correlation": spearman(estimates, true)}
    if estimate and repeats > 1:
        less_the_prompt = lambda x: (x.view(-1, repeats) - x.view(-1, repeats).mean(1, keepdim=True)).flatten()
        found["rank_correlation_within"] = spearman(less_the_prompt(estimates), less_the_prompt(true))
    return found


def overoptimised(history, window=WINDOW):
    """Which sign of over-optimisation the last measurements show, in words; "" if none.

    history: what `measure` has found, oldest first. The mean of the last `window` measurements is compared with that of
    the `window` before them, since a single one is noisy; with fewer there is no verdict yet.
    """
    if len(history) < 2 * window:
        return ""
    before, after = history[-2 * window : -window], history[-window:]
    mean = lambda name, part: sum(found[name] for found in part) / window
    rise = mean("lrm_estimate", after) - mean("lrm_estimate", before)
    fall = mean("true_reward", before) - mean("true_reward", after)
    if rise > 0 and fall > mean("true_error", after):
        return "the LRM's estimate rises while the true reward falls"
    # samples of one and the same reward have no order (NaN): the LRM tells none of them from the others
    ordered = lambda found: found["rank_correlation"] if math.isfinite(found["rank_correlation"]) else 0.0
    correlation = lambda part: sum(map(ordered, part)) / window
    if correlation(before) > BLIND > correlation(after):
        return "the LRM no longer tells better samples from worse"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# curves


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


def panels(runs, only=()):
    """What `draw_curves` shows of the logs of runs (folders NAME-SEED): what has been logged, or of it `only` these.

    Or, of a single file .json in their place, what `eval.py curves --out FILE.json` has kept of such runs.
    """
    if len(runs) == 1 and Path(runs[0]).suffix == ".json":
        number = lambda y: math.nan if y is None else y
        try:
            rows = json.loads(Path(runs[0]).read_text())["rows"]
            return [
                (
                    row["title"],
                    row["axis"],
                    {k: [[(x, number(y)) for x, y in c] for c in v] for k, v in row["curves"].items()},
                )
                for row in rows
            ]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"cannot read curves in {runs[0]}: {getattr(e, 'strerror', None) or e}") from e
    wanted = [
        ("rank correlation of LRM and reward", "iteration", "step", "rank_correlation"),
        ("the same within prompts", "iteration", "step", "rank_correlation_within"),
        ("squared error of the LRM", "iteration", "step", "lrm"),
        ("true reward of fresh samples", "iteration", "step", "true_reward"),
        ("what the LRM says of them", "iteration", "step", "lrm_estimate"),
        ("true reward of fresh samples", "seconds of training", "trained_s", "true_reward"),
        ("true reward of fresh samples", "evaluations of the reward", "reward_evaluations", "true_reward"),
    ]
    logs, found = [(name_and_seed(run)[0], read_log(run)) for run in runs], []
    for title, axis, x, y in (w for w in wanted if not only or w[-1] in only):
        curves = {}
        for label, log in logs:
            points = [(line[x], line[y]) for line in log if x in line and y in line]
            part = max(1, len(points) // 100)  # of what is logged every iteration, means
            means = [tuple(sum(v) / len(v) for v in zip(*points[i : i + part])) for i in range(0, len(points), part)]
            if means:
                curves.setdefault(label, []).append(means)
        if curves:
            found.append((title, axis, curves))
    return found


COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")


def draw_curves(path, panels, width=420, height=260, columns=3):
    """Write an SVG: panels, each (title, name of the x axis, {label: [curve]}), a curve [(x, y), ...].

    Curves of one label (the seeds of one method) share its colour. What is not finite is left out.
    """
    labels = list(dict.fromkeys(label for *_, curves in panels for label in curves))
    colour = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    parts, left, top, right, bottom = [], 52, 26, 20, 40
    for i, (title, name, curves) in enumerate(panels):
        kept = {k: [[p for p in c if math.isfinite(p[0] + p[1])] for c in some] for k, some in curves.items()}
        points = [p for some in kept.values() for c in some for p in c] or [(0, 0)]
        (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points))
        x1, y0, y1 = x1 + (x1 == x0), y0 - 0.05 * (y1 - y0 or 1), y1 + 0.05 * (y1 - y0 or 1)
        # the corner where the axes meet
        begin, low = i % columns * width + left, i // columns * height + height - bottom
        across = lambda x, x0=x0, x1=x1, begin=begin: begin + (x - x0) / (x1 - x0) * (width - left - right)
        up = lambda y, y0=y0, y1=y1, low=low: low - (y - y0) / (y1 - y0) * (height - top - bottom)
        words = lambda x, y, text, anchor="middle", fill="#333": parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{html.escape(text)}</text>'
        )
        middle = begin + (width - left - right) / 2
        words(middle, low - height + bottom + 15, title), words(middle, low + 32, name)
        for k in range(5):
            x, y = x0 + k * (x1 - x0) / 4, y0 + k * (y1 - y0) / 4
            ends = f'x1="{across(x0):.1f}" x2="{across(x1):.1f}" y1="{up(y):.1f}" y2="{up(y):.1f}"'
            parts.append(f'<line {ends} stroke="#ddd"/>')
            words(across(x0) - 5, up(y) + 4, f"{y:.3g}", "end"), words(across(x), low + 14, f"{x:.4g}")
        for label, some in kept.items():
            for curve in some:
                line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in curve)
                parts.append(f'<polyline points="{line}" fill="none" stroke="{colour[label]}" stroke-width="1.5"/>')
    whole = -(-len(panels) // columns) * height
    for i, label in enumerate(labels):
        parts.append(f'<text x="{left + 130 * i}" y="{whole + 12}" fill="{colour[label]}">{html.escape(label)}</text>')
    size = f'width="{max(width * min(columns, len(panels)), left + 130 * len(labels))}" height="{whole + 20}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    with atomic(path) as part:
        part.write_text("\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"]) + "\n")
