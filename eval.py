"""How good is it? Every number that this repository prints about a model comes out of this script.

    python eval.py world --weights W --steps 4 2 1    # accuracy by the judge, Frechet distance, diversity, coverage
    python eval.py world --reference                  # the same of rendered clips, and of what the VAE makes of them
    python eval.py table NAME ...                     # results/NAME*.json as Markdown tables
    python eval.py readme                             # the same, between the markers in README.md

Results are small JSON files in results/, each with its command, date and seed; tables are made from them alone, so that
no number is ever typed. Every score has its sampling error beside it.
"""

import contextlib
import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import shapes
from cli import UserError, atomic, opt, parse, run
from generate import Generator
from judge import Judge
from metrics import frechet, jackknife, mean_error, neighbours, vendi, vendi_kernel
from vae3d import VAE3D

__all__ = ["vendi", "vendi_kernel"]

HELD_OUT = 1_000_000  # seed of the clips that nothing is trained on
MAIN = ("object", "colour", "action", "scene")  # the factors that the headline averages


@dataclass
class Config:
    vae: str = opt("weights/vae.safetensors", "the autoencoder")
    judge: str = opt("weights/judge.safetensors", "the judge that evaluates (never the one that rewards)")
    seed: int = opt(0, "seed of all noise")
    batch: int = opt(64, "videos at a time")
    threads: int = opt(0, "CPU threads (0: all)")
    device: str = opt("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")


@dataclass
class WorldConfig(Config):
    weights: str = opt("", "a teacher's or a student's file")
    reference: bool = opt(False, "measure rendered clips and their reconstruction instead: what can be reached at all")
    steps: tuple[int, ...] = opt((4,), "one or more numbers of steps, on the same prompts and noise")
    prompts: int = opt(2000, "held-out prompts")
    vendi_prompts: int = opt(100, "prompts drawn with 5 seeds each for diversity (0: none)")
    w: float | None = opt(None, "guidance of a teacher as in Eq. 9 (default: the teacher's own, or 2)")
    label: str = opt("", "name of the rows in tables (default: the file's name)")
    out: str = opt("", "JSON to write, e.g. results/student.json")


# ---------------------------------------------------------------------------------------------------------------------
# the small world


def held_out_prompts(n, seed=HELD_OUT):
    """n clips that no training sees, a prompt for each, and the factors that it names."""
    clips = [shapes.Clip.make(seed, i) for i in range(n)]
    words = [shapes.caption(clip, "train", random.Random(f"prompt {seed} {i}")) for i, clip in enumerate(clips)]
    return clips, [prompt for prompt, _ in words], [named for _, named in words]


class Eye:
    """The evaluating judge, fed in batches: class indices of every factor and features of each clip."""

    def __init__(self, cfg):
        self.judge, self.about = checkpoint.load_model(cfg.judge, Judge, cfg.device)
        self.judge.to(memory_format=torch.channels_last_3d)
        self.cfg = cfg

    @torch.no_grad()
    def __call__(self, video):
        """(B, 3, F, H, W) -> readings (B, factors), features (B, d), on the CPU."""
        video = video.to(self.cfg.device, memory_format=torch.channels_last_3d)
        with torch.autocast(torch.device(self.cfg.device).type, torch.bfloat16):
            return self.judge.read(video).cpu(), self.judge.features(video).float().cpu()

    def over(self, make, n, name):
        """Look at clips 0..n-1; make(list of indices) -> videos. -> readings (n, factors), features (n, d)."""
        parts = []
        for i in tqdm(range(0, n, self.cfg.batch), desc=name, dynamic_ncols=True, leave=False):
            parts.append(self(make(list(range(i, min(i + self.cfg.batch, n))))))
        return torch.cat([r for r, _ in parts]), torch.cat([f for _, f in parts])


def accuracy(readings, named):
    """Share of right readings of every factor over the prompts that name it, and of the mean of the main factors.

    readings (n, factors); named: n dicts. -> {factor: {"mean", "error", "n"}}. The error of the mean over factors
    counts prompts, not answers: two factors of one prompt fail together.
    """
    truth = torch.tensor([[v.index(p[f]) if f in p else -1 for f, v in shapes.FACTORS.items()] for p in named])
    asked, right = truth >= 0, readings == truth
    scores, influence, means = {}, torch.zeros(len(named), dtype=torch.float64), []
    for i, factor in enumerate(shapes.FACTORS):
        scores[factor] = mean_error(right[asked[:, i], i].double())
        if factor in MAIN and scores[factor]["n"]:
            share = asked[:, i].double().mean()
            influence += (right[:, i].double() - scores[factor]["mean"]) * asked[:, i] / share
            means.append(scores[factor]["mean"])
    mean = sum(means) / len(means) if means else float("nan")
    error = (influence / max(len(means), 1)).std().item() / math.sqrt(len(named))
    return scores | {"main": {"mean": mean, "error": error, "n": len(named)}}


def compare(features, reference):
    """Frechet distance with its sampling error, precision, recall and coverage against the reference's features."""
    distance = {"mean": frechet(features, reference), "error": jackknife(frechet, features, reference)}
    return {"frechet": distance, **neighbours(reference, features)}


def diversity(groups):
    """Vendi - 1 over judge features of the videos of one prompt, mean and error over the prompts: 0 is collapse."""
    return mean_error([vendi(group) - 1 for group in groups])


def reference_rows(cfg, eye, reference):
    """What can be reached at all: other rendered clips, and what the VAE makes of them. -> 2 rows"""
    vae = checkpoint.load_model(cfg.vae, VAE3D, cfg.device)[0].to(memory_format=torch.channels_last_3d)
    clips, _, named = held_out_prompts(cfg.prompts, HELD_OUT + 1)  # a clip must not be compared with itself
    groups = []  # of clips that one prompt describes
    for i, fixed in enumerate(named[: cfg.vendi_prompts]):
        with contextlib.suppress(ValueError):  # a prompt that names very much has too few clips to be found
            groups.append([shapes.Clip.make(HELD_OUT + 2 + copy, i, **fixed) for copy in range(5)])
    psnrs, rows = [], []

    @torch.no_grad()
    def reconstruct(video):
        video = video.to(cfg.device)
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16):
            drawn = vae.decode(vae.encode(video.to(memory_format=torch.channels_last_3d))).float().clamp(-1, 1)
        psnrs.append(-10 * ((drawn - video) / 2).square().mean((1, 2, 3, 4)).log10().cpu())
        return drawn

    for label, pass_on in (("rendered clips", lambda video: video), ("the VAE's reconstruction", reconstruct)):
        make = lambda some: pass_on(shapes.render_batch([clips[i] for i in some]))  # noqa: B023
        readings, features = eye.over(make, cfg.prompts, label)
        row = {"label": label, "steps": None, "nfe": 0} | accuracy(readings, named) | compare(features, reference)
        if psnrs:
            psnr = torch.cat(psnrs).sort().values
            row |= {"psnr": psnr.mean().item(), "psnr_worst_tenth": psnr[: max(1, len(psnr) // 10)].mean().item()}
        if groups:
            make = lambda some: pass_on(shapes.render_batch([groups[i // 5][i % 5] for i in some]))  # noqa: B023
            row["vendi"] = diversity(eye.over(make, 5 * len(groups), "diversity")[1].view(len(groups), 5, -1))
        rows.append(row)
        print(world_line(row), flush=True)
    return rows


def model_rows(cfg, eye, reference, generator, prompts, named):
    """One row for every number of steps, all on the same prompts and the same noise."""
    text, rows = generator.encoder.encode(prompts), []  # (n, L, D)
    label = cfg.label or Path(cfg.weights).stem
    several = [(i, copy) for i in range(min(cfg.vendi_prompts, cfg.prompts)) for copy in range(1, 5)]
    for steps in cfg.steps:

        def draw(jobs):
            seeds = [(cfg.seed * 8 + copy) * 10_000_000 + i for i, copy in jobs]
            return generator.decode(generator.latents(text[[i for i, _ in jobs]], seeds, steps, cfg.w))  # noqa: B023

        start = time.perf_counter()
        readings, features = eye.over(lambda some: draw([(i, 0) for i in some]), cfg.prompts, f"{label} {steps}")
        seconds = (time.perf_counter() - start) / cfg.prompts
        row = {"label": label, "steps": steps, "nfe": generator.evaluations(steps, cfg.w), "seconds": seconds}
        row |= accuracy(readings, named) | compare(features, reference)
        if several:
            others = eye.over(lambda some: draw([several[i] for i in some]), len(several), "diversity")[1]
            first = features[: len(several) // 4, None]
            groups = torch.cat([first, others.unflatten(0, (-1, 4))], 1)  # (prompts, 5, d)
            row["vendi"] = diversity(groups)
        rows.append(row)
        print(world_line(row), flush=True)
    return rows


def world(cfg):
    """Accuracy, Frechet distance, precision, coverage and diversity of a model, or of the world itself."""
    if not cfg.reference and not cfg.weights:
        raise UserError("name the weights to measure with --weights, or ask for --reference")
    if cfg.prompts < 20:
        raise UserError(f"--prompts {cfg.prompts} is too few to say anything: at least 20")
    generator = None if cfg.reference else Generator.load(cfg.weights, cfg.vae, cfg.device)
    for steps in [] if cfg.reference else cfg.steps:
        generator.steps(steps)  # refuse before the work, not after it
    eye = Eye(cfg)
    clips, prompts, named = held_out_prompts(cfg.prompts)
    _, reference = eye.over(lambda some: shapes.render_batch([clips[i] for i in some]), cfg.prompts, "reference")
    if cfg.reference:
        rows = reference_rows(cfg, eye, reference)
    else:
        rows = model_rows(cfg, eye, reference, generator, prompts, named)
    model = {k: generator.about.get(k) for k in ("kind", "timesteps", "command", "date")} if generator else None
    save(cfg, "world", rows=rows, judge=eye.about.get("results"), model=model)


def world_line(row):
    """One row in words, as it is printed while others are still being drawn."""
    scores = " ".join(f"{f} {pm(row[f], 100)}" for f in (*MAIN, "main"))
    more = f" vendi-1 {pm(row['vendi'], 1, 3)}" if "vendi" in row else ""
    return f"{row['label']} {row['steps'] or ''}: {scores} | frechet {pm(row['frechet'], 1, 2)}{more}"


def pm(score, scale=1.0, digits=1):
    """A score and its standard error: 91.2±0.6."""
    if score is None or score["mean"] != score["mean"]:
        return "-"
    return f"{scale * score['mean']:.{digits}f}±{scale * score['error']:.{digits}f}"


# ---------------------------------------------------------------------------------------------------------------------
# results and tables


def save(cfg, kind, **content):
    """Write what was measured, with all that is needed to measure it again, to cfg.out (nothing without it)."""
    made = {
        "kind": kind,
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "settings": asdict(cfg),
    }
    if cfg.out:
        with atomic(cfg.out) as part:
            part.write_text(to_json(tidy(made | content)))
        print(f"wrote {cfg.out}")


def to_json(result):
    """JSON with a line for each field and for each row: small, and readable in a diff."""
    rows = lambda value: "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
    lines = [f' "{k}": {rows(v) if k == "rows" else json.dumps(v)}' for k, v in result.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def tidy(value):
    """Floats to 5 significant digits, NaN to None: small files, valid JSON."""
    if isinstance(value, dict):
        return {k: tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def read_results(name, folder="results"):
    """The files results/NAME.json and results/NAME-*.json, in the order of their names."""
    files = sorted(f for f in Path(folder).glob(f"{name}*.json") if f.stem == name or f.stem.startswith(name + "-"))
    if not files:
        raise UserError(f"no {folder}/{name}.json nor {folder}/{name}-*.json: measure first (eval.py world --out ...)")
    try:
        return [json.loads(f.read_text()) for f in files]
    except ValueError as e:
        raise UserError(f"a file of {folder}/{name}*.json is no JSON: {e}") from e


def markdown(header, lines):
    """A Markdown table: the first column to the left, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *lines])


def world_table(results):
    """Rows of one or more `world` results; shares in per cent, ± one standard error."""
    header = ["", "steps", "NFE", *MAIN, "mean of 4", "Frechet", "precision", "coverage", "Vendi - 1", "s/video"]
    lines = []
    for row in (row for result in results for row in result["rows"]):
        share = [f"{100 * row[k]:.1f}" for k in ("precision", "coverage")]
        scores = [pm(row[f], 100) for f in (*MAIN, "main")]
        seconds = f"{row['seconds']:.2f}" if row.get("seconds") else ""
        scores += [pm(row["frechet"], 1, 2), *share, pm(row.get("vendi"), 1, 3), seconds]
        lines.append([row["label"], row["steps"] or "", row["nfe"] or "", *scores])
    return markdown(header, lines)


TABLES = {"world": world_table}


def table(name, folder="results"):
    """results/NAME*.json as Markdown, and below it the commands that made it."""
    results = read_results(name, folder)
    kinds = {result["kind"] for result in results}
    if len(kinds) > 1 or not kinds <= set(TABLES):
        raise UserError(f"{folder}/{name}*.json holds results of kinds {sorted(kinds)}: a table has one kind")
    commands = "\n".join(dict.fromkeys(f"    {result['command']}" for result in results))
    return f"{TABLES[kinds.pop()](results)}\n\n{commands}"


def readme(path="README.md", folder="results"):
    """Rewrite what stands between `<!-- table:NAME -->` and `<!-- /table -->` in README.md. -> the new text"""
    text = Path(path).read_text()
    block = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
    if not block.search(text):
        raise UserError(f"{path} has no block <!-- table:NAME --> ... <!-- /table -->")
    return block.sub(lambda m: f"{m[1]}{table(m[2], folder)}\n{m[3]}", text)


def main():
    command, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if command == "world":
        cfg = parse(WorldConfig, words, world.__doc__)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        world(cfg)
    elif command == "table":
        print("\n\n".join(table(name) for name in words or sorted({f.stem for f in Path("results").glob("*.json")})))
    elif command == "readme":
        text = readme()
        with atomic("README.md") as part:
            part.write_text(text)
    else:
        raise UserError("say what to do: python eval.py world|table|readme (world has --help)")


if __name__ == "__main__":
    run(main)
