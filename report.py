"""One page about a model, to be read by a person: tables, curves, moving pictures, and the commands that made them.

The page holds everything itself, videos and charts too, so it can be sent anywhere. report.md has the same tables.
"""

import base64
import html
import json
import re
from pathlib import Path

import benchmark
import results
from cli import atomic

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem 1.5rem; max-width: 75rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
td, th { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8885; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; }
video { max-width: 100%; image-rendering: pixelated; }
svg { max-width: 32rem; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; }
pre { white-space: pre-wrap; font-size: .8rem; background: #8881; padding: .6rem; }
"""
INK = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5")


def write(out, cfg, worlds, clock, peaks, about, films):
    """OUT/index.html and OUT/report.md.

    worlds: results of kind "world"; clock, peaks: of kinds "time" and "memory"; about: the model's metadata;
    films: video files to show.
    """
    judge = ", ".join(f"{f} {100 * a:.1f}%" for f, a in (worlds[0].get("judge") or {}).items()) or "not known"
    rows = [row for result in worlds for row in result["rows"]]
    parts = [  # (heading, what it says, results, view)
        (
            "What the judge sees",
            f"Per cent of right readings where a prompt names the factor, over {cfg.prompts} held-out prompts, ± one "
            "standard error; Frechet distance, precision, coverage and Vendi - 1 in the judge's features. The judge "
            f"itself reads rendered clips like this: {judge}.",
            worlds, "world",
        ),
        (
            "VBench's sixteen dimensions, in the small world",
            "The counterparts of dimensions.py; their networks are not VBench's, so the paper's columns below are no "
            "rivals of these numbers, only their measure of what a distilled student may lose or win.",
            worlds, "dimensions",
        ),
        (
            "Time", f"Per cent of the first row's total, mean ± standard deviation, on {clock['device']}. NFE counts "
            "network evaluations; guidance doubles them.", [clock], "time",
        ),
        ("Memory", "Peak of each phase; on a CPU, of the whole process.", [peaks], "memory"),
    ]  # fmt: skip
    paper = {name: dict(zip(benchmark.DIMENSIONS, column)) for name, column in benchmark.PAPER.items()}
    totals = {name: benchmark.vbench_scores(column) for name, column in paper.items()}
    lines = [[d, *(f"{column[d]:.2f}" for column in paper.values())] for d in benchmark.DIMENSIONS]
    lines += [[f"**{t}**", *(f"{totals[name][t]:.2f}" for name in paper)] for t in ("quality", "semantic", "total")]
    theirs = ["dimension (per cent)", *paper], lines

    commands = list(dict.fromkeys(r["command"] for r in (*worlds, clock, peaks)))
    made = json.dumps({k: about.get(k) for k in ("kind", "timesteps", "command", "date", "settings")}, indent=1)
    title = f"{cfg.name()}: a report"
    text, page = [f"# {title}", ""], [f"<h1>{html.escape(title)}</h1>"]
    for film in films:
        coded = base64.b64encode(Path(film).read_bytes()).decode()
        page.append(f'<p><video muted loop autoplay playsinline src="data:video/mp4;base64,{coded}"></video></p>')
        text += [f"Video: [{Path(film).name}]({Path(film).name})", ""]
    for heading, words, some, kind in parts:
        table = results.TABLES[kind](some)
        page += [f"<h2>{heading}</h2><p>{html.escape(words)}</p>", as_html(*table)]
        text += [f"## {heading}", "", words, "", results.markdown(*table), ""]
        if kind == "world":
            page += [curves(rows, "main", 100, "mean of what prompts name, per cent"), curves(rows, "frechet", 1, "Frechet distance")]
    page += ["<h2>The paper's Table 2</h2>", as_html(*theirs)]
    page += ["<h2>Made by</h2>", f"<pre>{html.escape(chr(10).join(commands))}\n\n{html.escape(made)}</pre>"]
    text += ["## The paper's Table 2", "", results.markdown(*theirs), ""]
    text += ["## Made by", "", "```", *commands, "", made, "```", ""]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    with atomic(Path(out) / "index.html") as part:
        part.write_text(f"{head}{view}<style>{STYLE}</style>\n" + "\n".join(page) + "\n", encoding="utf-8")
    with atomic(Path(out) / "report.md") as part:
        part.write_text("\n".join(text), encoding="utf-8")


def as_html(header, lines):
    bold = lambda value: re.sub(r"[*]{2}(.*?)[*]{2}", r"<b>\1</b>", html.escape(str(value)))
    row = lambda tag, values: "<tr>" + "".join(f"<{tag}>{bold(v)}</{tag}>" for v in values) + "</tr>"
    body = "\n".join(row("td", line) for line in lines)
    return f'<div class="wide"><table>{row("th", header)}\n{body}</table></div>'


def curves(rows, score, scale, title):
    """An SVG chart of a score against network evaluations, a line a model; rows without steps are level lines."""
    lines, levels = {}, []
    for row in rows:
        mean = row[score]["mean"]
        if mean is None:
            continue
        if row["steps"] is None:
            levels.append((row["label"], scale * mean))
        else:
            error = row[score]["error"] or 0.0
            lines.setdefault(row["label"], []).append((row["nfe"], scale * mean, scale * error))
    points = [p for line in lines.values() for p in line]
    if not points:
        return ""
    stops = sorted({p[0] for p in points})  # evenly apart, whatever the numbers: 1, 2, 4, 100
    top = 1.1 * max([p[1] + p[2] for p in points] + [v for _, v in levels]) or 1.0
    x = lambda n: 60 + (stops.index(n) + 0.5) * 320 / len(stops)
    y = lambda v: 210 - 180 * v / top
    shapes = [f'<text x="60" y="16">{html.escape(title)}, by network evaluations</text>']
    for i in range(5):
        v = top * i / 4
        shapes.append(f'<path d="M60 {y(v):.1f}H380" stroke="#8885"/>')
        shapes.append(f'<text x="54" y="{y(v) + 4:.1f}" text-anchor="end">{v:.3g}</text>')
    shapes += [f'<text x="{x(n):.1f}" y="228" text-anchor="middle">{n}</text>' for n in stops]
    for label, v in levels:
        shapes.append(f'<path d="M60 {y(v):.1f}H380" stroke="currentColor" stroke-dasharray="4 4"/>')
        shapes.append(f'<text x="386" y="{y(v) + 4:.1f}">{html.escape(label)}</text>')
    for i, (label, line) in enumerate(lines.items()):
        ink, line = INK[i % len(INK)], sorted(line)
        path = "L".join(f"{x(n):.1f} {y(v):.1f}" for n, v, _ in line)
        shapes.append(f'<path d="M{path}" fill="none" stroke="{ink}" stroke-width="2"/>')
        for n, v, e in line:
            shapes.append(f'<path d="M{x(n):.1f} {y(v - e):.1f}V{y(v + e):.1f}" stroke="{ink}" stroke-width="2"/>')
            shapes.append(f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="4" fill="{ink}"/>')
        shapes.append(f'<text x="{60 + 110 * i}" y="248" style="fill:{ink}">{html.escape(label)}</text>')
    return f'<svg viewBox="0 0 520 256" role="img" aria-label="{html.escape(title)}">{"".join(shapes)}</svg>'
