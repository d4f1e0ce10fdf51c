"""What was measured, on disk and in tables. Tables are made from files alone, so that no number is ever typed.

A result is a small JSON file in results/: its kind, its rows, and the command, date and settings (where they are not
the defaults) that made it. The table NAME is made of results/NAME.json and results/NAME-*.json, one under the other;
README.md and docs/ have its place between `<!-- table:NAME -->` and `<!-- /table -->`; `<!-- table:NAME/KIND -->` is
another view of the same files. A score is {"mean", "error", "n"}, its error one standard error.
"""

import re
from dataclasses import fields
from pathlib import Path

import common
from common import UserError, read_json
from evals import experiments, vbench
from evals.metrics import pm
from world.reading import MAIN
from world.shapes import FACTORS


def save(cfg, kind, **content):
    """Write a result to cfg.out, if it names a file. -> the result, as it would be read again"""
    said = {f.name: getattr(cfg, f.name) for f in fields(cfg) if getattr(cfg, f.name) != f.default}
    result = common.tidy({"kind": kind} | common.made_by(said) | content)
    if cfg.out and Path(cfg.out).suffix == ".json":
        common.write_json(cfg.out, result)
        print(f"wrote {cfg.out}")
    return result


def show(cfg, kind, **content):
    """`save` it and print its table."""
    result = save(cfg, kind, **content)
    print(table([result]))
    return result


def read(name, folder="results"):
    """The results results/NAME.json and results/NAME-*.json, in the order of their names."""
    files = sorted(f for f in Path(folder).glob(f"{name}*.json") if f.stem == name or f.stem.startswith(name + "-"))
    if not files:
        raise UserError(f"no {folder}/{name}.json nor {folder}/{name}-*.json: measure first (eval.py ... --out)")
    results = [read_json(file) for file in files]
    for file, result in zip(files, results):
        if "kind" not in result or "command" not in result:
            raise UserError(f"{file} is no result of eval.py")
    return results


def markdown(header, lines):
    """A Markdown table: the first column to the left, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *lines])


def _rows(results):
    return [row for result in results for row in result["rows"]]


def _world(results):
    """Shares in per cent; the rows of one model together, most steps first."""
    header = ["", "steps", "NFE", *FACTORS, f"mean of {len(MAIN)}", "Frechet"]
    header += ["precision", "coverage", "Vendi - 1", "object kept"]
    lines, rows = [], _rows(results)
    models = [row["label"] for row in rows]
    for row in sorted(rows, key=lambda row: (models.index(row["label"]), -(row["steps"] or 0))):
        scores = [pm(row[f], 100) for f in (*FACTORS, "main")] + [pm(row["frechet"], 1, 2)]
        scores += [f"{100 * row[k]:.1f}" for k in ("precision", "coverage")] + [pm(row.get("vendi"), 1, 3)]
        scores.append(pm(row.get("identity"), 100))
        lines.append([row["label"], row["steps"] or "", row["nfe"] or "", *scores])
    return header, lines


def _main(results):
    """The rows that matter most, and the columns, of results of kind "world"."""
    rows = {(row["label"], row["steps"]): row for row in _rows(results)}
    wanted = [("teacher", 50), *((name, n) for n in (4, 2, 1) for name in ("teacher", "student"))]
    lines = []
    for row in (rows[key] for key in wanted if key in rows):
        scores = [pm(row["main"], 100), pm(row["object"], 100), pm(row["frechet"], 1, 2), pm(row.get("vendi"), 1, 2)]
        lines.append([f"{row['label']}, {row['steps']}", row["nfe"], *scores])
    header = ["steps", "network evaluations", f"right, mean of {len(MAIN)} factors, %", "the object, %"]
    return [*header, "Frechet distance", "Vendi - 1"], lines


def _compared(results):
    """What a run of train.py ends by saying."""
    lines = [[r["label"], r["steps"], pm(r["named"], 100), pm(r.get("frechet"), 1, 2)] for r in _rows(results)]
    return ["", "steps", "of what prompts name, %", "Frechet"], lines


def _dimensions(results):
    """The sixteen, a column a model, in per cent; the totals below them."""
    rows = [row for row in _rows(results) if row.get("dimensions")]
    header = ["dimension (per cent)", *(f"{r['label']}{', ' + str(r['steps']) if r['steps'] else ''}" for r in rows)]
    lines = [[d, *(pm(r["dimensions"].get(d), 100) for r in rows)] for d in vbench.DIMENSIONS]
    for total in ("quality", "semantic", "total"):
        lines.append([f"**{total}**", *(f"{r['totals'][total]:.1f}" if r.get("totals") else "-" for r in rows)])
    return header, lines


def _time(results):
    """Table 4: per cent of the first row's total, mean ± standard deviation."""
    header = ["", "steps", "NFE", "text", "diffusion", "decoding", "total", "s"]
    header += ["faster (diffusion)", "not synchronised"]
    lines = []
    for result in results:
        whole = result["rows"][0]["synchronised"]["total"]["mean"]
        slow = result["rows"][0]
        for row in result["rows"]:
            share = lambda what: f"{100 * what['mean'] / whole:.2f} ± {100 * what['std'] / whole:.2f}"  # noqa: B023
            ratio = lambda kind: f"{slow[kind]['diffusion']['mean'] / row[kind]['diffusion']['mean']:.1f}x"  # noqa: B023
            phases = [share(row["synchronised"][p]) for p in ("text", "diffusion", "decoding", "total")]
            seconds = f"{row['synchronised']['total']['mean']:.3f}"
            ratios = [ratio("synchronised"), ratio("launched")]
            lines.append([row["label"], row["steps"], row["nfe"], *phases, seconds, *ratios])
    return header, lines


def _memory(results):
    """Peaks in MiB."""
    phases = ["weights", "text", "diffusion", "decoding"]
    lines = [
        [row["label"], row["steps"], *(f"{row[p] / 2**20:.0f}" if row[p] is not None else "-" for p in phases)]
        for row in _rows(results)
    ]
    return ["MiB", "steps", *phases], lines


def _sharding(results):
    """GiB on each GPU; how many rows of which tensor it holds is known beforehand, activations are estimated."""
    kinds = ["parameters", "gradients", "optimizer", "activations"]
    lines = []
    for row in _rows(results):
        gib = [row[kind] / 2**30 for kind in kinds]
        label = row["preset"] + (f", rank {row['rank']}" if row.get("rank") else "")
        lines.append([label, row["ranks"], *(f"{x:.2f}" for x in [*gib[:3], sum(gib[:3]), gib[3], sum(gib)])])
    header = ["GiB on each GPU", "GPUs", *kinds[:3], "sum", "activations (estimated)", "together"]
    return header, lines


def _trial(results):
    """Peak memory and time of an update, on random weights."""
    lines = []
    for row in _rows(results):
        label = row["preset"] + (f", rank {row['rank']}" if row["rank"] else "")
        peak, seconds = f"{row['peak'] / 2**30:.2f}", f"{row['seconds']:.1f}"
        lines.append([label, f"{row['ranks']} x {row['device']}", row["updates"], peak, seconds])
    return ["", "on", "updates", "peak, GiB", "seconds an update (median)"], lines


PAPER = {  # Tables 1 and 10: forward at 128 frames, backward at so many; in bytes
    "image LRM": (8.998e6, {128: 17.772e6}),
    "text-image LRM": (15.5e6, {128: 26.277e6}),
    "CLIP-H (HPSv2, PickScore)": (5.926e9, {12: 12.373e9, 24: 20.577e9, 64: 48.413e9}),
}


def _reward_memory(results):
    """Peaks with weights, a row a model, and the paper's below it, where it has the model."""
    size = lambda b: "" if b is None else f"{b / 1e6:.3f} MB" if b < 1e9 else f"{b / 1e9:.3f} GB"
    frames, lines = sorted({row["frames"] for row in _rows(results)}), []
    for result in results:
        for label in dict.fromkeys(row["label"] for row in result["rows"]):
            row = {r["frames"]: r for r in result["rows"] if r["label"] == label}
            last = row[max(row)]
            peaks = [size(last["forward"]), *(size(row[n]["backward"]) if n in row else "" for n in frames)]
            lines.append([f"{label}, {result['device']}", f"{last['parameters']:,}", *peaks])
            if label in PAPER:
                forward, backward = PAPER[label]
                forward = forward if frames[-1] == 128 else None
                lines.append(["the paper", "", size(forward), *(size(backward.get(n)) for n in frames)])
    return ["", "parameters", f"forward, {frames[-1]} frames", *(f"backward, {n}" for n in frames)], lines


def _vendi(results):
    """Eq. 17: mean ± standard deviation over prompts, as in the paper's Table 3."""
    lines = []
    for row in _rows(results):
        spread = [f"{row[k]['mean']:.2f} ± {row[k]['std']:.2f}" if row.get(k) else "-" for k in ("pixel", "inception")]
        lines.append([row["label"], row["prompts"], *spread])
    return ["", "prompts", "Vendi (pixel)", "Vendi (Inception)"], lines


def _votes(results):
    lines = []
    for row in _rows(results):
        rate = (
            "-" if row["rate"] is None else f"{100 * row['rate']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
        )
        models = f"{row['models'][0]} against {row['models'][1]}"
        lines.append([models, row["rater"] or "all", row["question"], rate, row["a"], row["equal"], row["b"]])
    return ["", "rater", "question", "wins without ties, % [95%]", "wins", "equal", "losses"], lines


def _vbench(results):
    return vbench.beside_paper({d: v for result in results for d, v in result["scores"].items()})


TABLES = {
    "world": _world, "main": _main, "compared": _compared, "dimensions": _dimensions,
    "time": _time, "memory": _memory, "reward_memory": _reward_memory,
    "sharding": _sharding, "trial": _trial, "vendi": _vendi, "votes": _votes, "vbench": _vbench,
}  # fmt: skip


def table(results, kind=""):
    """Results of one kind as a Markdown table. kind: another view of them (the dimensions of a world result)."""
    kinds = {kind or result["kind"] for result in results}
    if len(kinds) > 1 or not kinds <= set(TABLES):
        raise UserError(f"results of kinds {sorted(kinds)} do not fit into one table")
    return markdown(*TABLES[kinds.pop()](results))


def block(name, folder="results"):
    """The table NAME and below it the commands that made it, or NAME/KIND, another view; experiments/NAME: of these,
    experiments/NAME/gains: what its rows have more than the first.
    """
    name, _, kind = name.partition("/")
    if name == "experiments" and kind.endswith("/gains"):
        return markdown(*experiments.gains_of(kind.removesuffix("/gains"), folder))
    if name == "experiments":
        return f"{markdown(*experiments.rows_of(kind, folder))}\n\n    python eval.py experiments {kind}"
    results = read(name, folder)
    if kind:  # the commands stand where the table itself does
        return table(results, kind)
    commands = "\n".join(dict.fromkeys(f"    {result['command']}" for result in results))
    return f"{table(results)}\n\n{commands}"


PAGES = ("README.md", "docs/*.md")


def page(path, folder="results"):
    """A page's text with every block between `<!-- table:NAME -->` and `<!-- /table -->` made anew."""
    pattern = re.compile(r"(<!-- table:([\w/-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    text = Path(path).read_text(encoding="utf-8")
    return pattern.sub(lambda m: f"{m[1]}{block(m[2], folder)}\n{m[3]}", text)


def write_pages():
    """Write the tables of README.md and docs/ anew; -> the pages that have any."""
    pages = [p for name in PAGES for p in sorted(Path().glob(name)) if "<!-- table:" in p.read_text("utf-8")]
    if not pages:
        raise UserError("there are no pages here: run this in the repository's folder")
    for path, text in [(path, page(path)) for path in pages]:  # all of them, or none
        with common.atomic(path) as part:
            part.write_text(text, encoding="utf-8")
    return pages
