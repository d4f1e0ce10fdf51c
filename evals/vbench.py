"""VBench: its sixteen dimensions, its totals, and its rules for what is sampled and how files are called.

VBench (arXiv:2311.17982) scores a model by 16 numbers, each from its own prompts and its own network, and three totals
of them (`vbench_scores`). The networks are the package `vbench`'s, which is not required here: this file makes the
videos that it wants and reads the numbers that it gives. What one has to know for that:

- 946 prompts, 5 videos each, in one flat folder, named PROMPT-0.mp4 .. PROMPT-4.mp4. With long prompts a file is still
  named by its short one: the package finds the prompt of a file, and human action even its label, in the name.
- Temporal flickering has prompts of its own and takes 25 videos of each, of which a filter keeps the first 5 that stand
  still: where things move, a change from frame to frame is no flicker. The paper's 4,730 videos are 5 for these too.
- Two short prompts stand twice in the list (under appearance style and under overall consistency): 944 names. Sampled
  from the short prompts they are one video; their long prompts differ, and in one folder the second would overwrite the
  first. Here the second goes into a folder of its own, named like its dimension, and is the one that dimension sees.
- The frame rate in a file's header decides which frames dynamic degree compares. Clips of 5 seconds and more are meant
  for VBench-Long; the paper's 10.7 s were apparently scored as they are.
- The package counts what it finds: a missing file is a warning, an unreadable one ends the run. Here each dimension
  gets a folder of links to the files that are whole, and the others are named.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from common import UserError, atomic, read_json, read_prompts, read_text
from video import read_video, write_video

# dimension as in the paper's Table 2: (which total, minimum, maximum, weight); from VBench's scripts/constant.py
DIMENSIONS = {
    "Subject Consistency": ("quality", 0.1462, 1.0, 1.0),
    "Background Consistency": ("quality", 0.2615, 1.0, 1.0),
    "Temporal Flickering": ("quality", 0.6293, 1.0, 1.0),
    "Motion Smoothness": ("quality", 0.706, 0.9975, 1.0),
    "Aesthetic Quality": ("quality", 0.0, 1.0, 1.0),
    "Imaging Quality": ("quality", 0.0, 1.0, 1.0),
    "Dynamic Degree": ("quality", 0.0, 1.0, 0.5),
    "Object Class": ("semantic", 0.0, 1.0, 1.0),
    "Multiple Objects": ("semantic", 0.0, 1.0, 1.0),
    "Human Action": ("semantic", 0.0, 1.0, 1.0),
    "Color": ("semantic", 0.0, 1.0, 1.0),
    "Spatial Relationship": ("semantic", 0.0, 1.0, 1.0),
    "Scene": ("semantic", 0.0, 0.8222, 1.0),
    "Appearance Style": ("semantic", 0.0009, 0.2855, 1.0),
    "Temporal Style": ("semantic", 0.0, 0.364, 1.0),
    "Overall Consistency": ("semantic", 0.0, 0.364, 1.0),
}

# Table 2, the paper's own columns, in per cent and in the order of DIMENSIONS
# fmt: off
PAPER = {
    "paper: teacher, 50 steps": (
        83.99, 93.78, 96.42, 98.09, 61.21, 63.87, 99.44,
        85.79, 52.59, 99.6, 77.0, 51.4, 49.99, 24.83, 26.45, 27.89,
    ),
    "paper: DOLLAR (PickScore)": (
        93.77, 96.8, 96.3, 97.76, 63.8, 69.4, 75.83,
        91.63, 69.71, 99.0, 77.95, 68.56, 55.06, 24.45, 24.64, 26.93,
    ),
    "paper: DOLLAR (HPSv2)": (
        92.57, 96.14, 97.48, 98.59, 63.14, 65.61, 81.67,
        93.84, 72.21, 99.0, 74.78, 68.35, 52.72, 23.5, 25.23, 26.85,
    ),
}
# fmt: on


def vbench_scores(percent, dimensions=DIMENSIONS):
    """{dimension: score in per cent} -> {"quality", "semantic", "total"} in per cent, by VBench's formula.

    Each score is moved to 0..1 by its dimension's minimum and maximum (not clamped) and weighted; quality and semantic
    are weighted means, the total is (4 quality + semantic) / 5. Names as in the paper's Table 2, others are ignored.
    Raises ValueError for a dimension that is missing or not finite (VBench itself would count it as 0).
    """
    missing = [name for name in dimensions if not math.isfinite(percent.get(name, math.nan))]
    if missing:
        raise ValueError(f"no score for {', '.join(missing)}")
    sums, weights = {"quality": 0.0, "semantic": 0.0}, {"quality": 0.0, "semantic": 0.0}
    for name, (total, low, high, weight) in dimensions.items():
        sums[total] += weight * (percent[name] / 100 - low) / (high - low)
        weights[total] += weight
    quality, semantic = (100 * sums[total] / weights[total] for total in ("quality", "semantic"))
    return {"quality": quality, "semantic": semantic, "total": (4 * quality + semantic) / 5}


def key(dimension):
    """VBench's own name: Subject Consistency -> subject_consistency."""
    return dimension.lower().replace(" ", "_")


# ---------------------------------------------------------------------------------------------------------------------
# the videos


def full_info():
    """Where the installed package keeps its list of prompts. It is found without being imported."""
    spec = importlib.util.find_spec("vbench")
    if spec is None or not spec.origin:
        raise UserError(
            "VBench's prompts are not here: pip install vbench, or name its VBench_full_info.json (or a text file with "
            "a prompt a line) with --prompts"
        )
    return Path(spec.origin).parent / "VBench_full_info.json"


def suite(prompts="", long=""):
    """What is sampled: [{"name": of the file, "prompt": as sampled, "dimensions": [...], "folder": mostly ""}].

    prompts: VBench_full_info.json (default: the installed package's), or a text file with a prompt a line; long: a text
    file with the long prompt of each. Raises UserError for a missing file, another number of lines, or a prompt that
    cannot be a file's name.
    """
    prompts = prompts or full_info()
    if Path(prompts).suffix == ".json":
        try:
            short = [(str(entry["prompt_en"]), entry["dimension"]) for entry in json.loads(read_text(prompts))]
        except (ValueError, TypeError, KeyError) as e:
            raise UserError(f"{prompts} is not a list of prompts as VBench's: {e!r}") from e
    else:
        short = [(prompt, []) for prompt in read_prompts(prompts)]
    if not short:
        raise UserError(f"{prompts} has no prompts")
    sampled = read_prompts(long) if long else [name for name, _ in short]
    if len(sampled) != len(short):
        raise UserError(
            f"{long} has {len(sampled)} prompts, {prompts} has {len(short)}: line by line they belong together"
        )
    entries, seen = {}, Counter()
    for (name, dimensions), prompt in zip(short, sampled):
        if "/" in name or not name or len(name.encode()) > 220:
            raise UserError(f"a file cannot be called like this prompt: {name!r}")
        if (name, prompt) in entries:  # the same video serves both
            entries[name, prompt]["dimensions"] += dimensions
            continue
        folder = (dimensions or [f"other{seen[name]}"])[0] if seen[name] else ""
        entries[name, prompt] = {"name": name, "prompt": prompt, "dimensions": list(dimensions), "folder": folder}
        seen[name] += 1
    return list(entries.values())


def files_of(entry, copies):
    """The files of a prompt's videos, `copies` for most prompts; where they are filtered, five times as many."""
    n = copies * (5 if "temporal_flickering" in entry["dimensions"] else 1)
    return [str(Path(entry["folder"], f"{entry['name']}-{copy}.mp4")) for copy in range(n)]


def plan(entries, copies, seed):
    """Every video of a suite: [{"file", "prompt", "seed"}]; each has its own seed, whoever samples it and when."""
    pairs = [(file, entry["prompt"]) for entry in entries for file in files_of(entry, copies)]
    own = lambda file: random.Random(f"vbench {seed} {file}").getrandbits(31)
    return [{"file": file, "prompt": prompt, "seed": own(file)} for file, prompt in pairs]


def readable(path):
    """Can every frame of this video be decoded?"""
    try:
        return len(read_video(path)[0]) > 0
    except UserError:
        return False


def read_plan(file):
    """What `begin` wrote. Raises UserError for a file that says something else."""
    try:
        plan = read_json(file)
        return plan | {"entries": plan["entries"], "copies": plan["copies"]}
    except (TypeError, KeyError) as e:
        raise UserError(f"{file} is not a plan of videos as eval.py videos writes it: {e!r}") from e


def begin(out, made):
    """Write out/videos.json, which says how the videos of the folder `out` are made: `made`, anything JSON can hold.

    Raises UserError where it says otherwise already: who draws into a folder that another model has begun would score a
    mixture.
    """
    plan, made = out / "videos.json", json.loads(json.dumps(made))
    if plan.exists():
        there = read_plan(plan)
        other = ", ".join(k for k in made if there.get(k) != made[k])
        if other:
            raise UserError(f"{out} holds videos of other settings ({other}): take another --out, or the same settings")
        return
    with atomic(plan) as part:
        part.write_text(json.dumps(made, indent=1, ensure_ascii=False))


def missing(jobs, out):
    """-> the jobs of `plan` whose files in the folder `out` are not there or broken, and how many are broken."""
    lacking, broken = [], 0
    for job in jobs:
        there = (out / job["file"]).exists()
        if not there or not readable(out / job["file"]):
            lacking.append(job)
            broken += there
    return lacking, broken


def draw(generator, jobs, out, steps, w, fps, batch, quiet):
    """Draw the videos of `jobs` into the folder `out`; one that is not finite is named and not written."""
    begun = time.perf_counter()
    for i in tqdm(range(0, len(jobs), batch), desc="videos", dynamic_ncols=True, disable=quiet):
        some = jobs[i : i + batch]
        videos = generator.draw([job["prompt"] for job in some], [job["seed"] for job in some], steps, w)
        if i == 0 and (seconds := videos.shape[2] / fps) >= 5:
            print(f"these clips have {seconds:.1f} s: VBench is made for less than 5, VBench-Long for more")
        for job, video in zip(some, videos):
            if video.isfinite().all():
                write_video(out / job["file"], video, fps)
            else:
                print(f"{job['file']} is not finite and was not written")
    print(f"drew {len(jobs)} videos in {time.perf_counter() - begun:.0f} s")


# ---------------------------------------------------------------------------------------------------------------------
# the scores


def stage(videos, made, dimension, folder):
    """Fill `folder` with links to the files that `dimension` looks at. -> files that are missing or broken

    made: what videos.json says, the suite's "entries" and how many "copies" of each.
    """
    entries = [entry for entry in made["entries"] if key(dimension) in entry["dimensions"]]
    files = [file for entry in entries for file in files_of(entry, made["copies"])]
    left_out = [file for file in files if not readable(Path(videos, file))]
    for file in set(files).difference(left_out):
        Path(folder, Path(file).name).symlink_to(Path(videos, file).resolve())
    return left_out


def run_package(videos, made, dimension, info, out, device):
    """Let the package `vbench` score one dimension; writes out/DIMENSION_eval_results.json. -> files left out

    Raises UserError where the package is missing or fails (several dimensions need detectron2, which pip has not).
    """
    try:
        vbench = importlib.import_module("vbench")
    except ImportError as e:
        raise UserError(
            f"the package vbench cannot be used here ({e}): pip install vbench, or bring its results"
        ) from e
    with tempfile.TemporaryDirectory() as links, tempfile.TemporaryDirectory() as work:
        left_out = stage(videos, made, dimension, links)
        if not any(Path(links).iterdir()):
            raise UserError(f"{videos} has no readable video for {dimension}")
        try:
            folder = static(links, work, device) if dimension == "Temporal Flickering" else links
            judge = vbench.VBench(device, str(info), work)
            judge.evaluate(videos_path=folder, name=key(dimension), dimension_list=[key(dimension)])
        except Exception as e:  # whatever happens inside fifteen foreign networks, the other dimensions go on
            raise UserError(f"vbench failed on {dimension}: {type(e).__name__}: {e}") from e
        done = Path(out) / f"{key(dimension)}_eval_results.json"
        with atomic(done) as part:
            shutil.copy(Path(work) / done.name, part)
    return left_out


def static(videos, work, device):
    """VBench's own filter: of each prompt the first 5 videos that stand still, named PROMPT-0 .. -> their folder."""
    module = importlib.import_module("vbench.common.static_filter")
    module.DEVICE = device  # it would take a GPU in any case
    parser = argparse.ArgumentParser()
    module.register_subparsers(parser.add_subparsers())
    args = parser.parse_args(["static_filter", "--videos_path", str(videos), "--result_path", str(work)])
    args.func(args)
    if not any((folder := Path(work) / "filtered_videos").iterdir()):
        raise UserError("none of these videos stands still")
    return str(folder)


def read_package_results(folder):
    """VBench's *_eval_results.json below a folder -> ({dimension: per cent}, [what is wrong with them]).

    Raises UserError for a file that holds no results.
    """
    scores, complaints = {}, []
    for file in sorted(Path(folder).rglob("*_eval_results.json")):
        try:
            results = json.loads(file.read_text())
            scores |= {name: 100 * float(results[key(name)][0]) for name in DIMENSIONS if key(name) in results}
        except (ValueError, TypeError, LookupError) as e:
            raise UserError(f"{file} is not a result of vbench: {e!r}") from e
    for name in [name for name, score in scores.items() if not math.isfinite(score)]:
        complaints.append(f"{name}: the package's score is {scores.pop(name)}, since a video's is")
    return scores, complaints


def beside_paper(scores):
    """Header and lines of a table: each dimension of ours beside the paper's own columns, and the totals."""
    columns = {"here": scores} | {name: dict(zip(DIMENSIONS, values)) for name, values in PAPER.items()}
    for name, column in columns.items():
        with contextlib.suppress(ValueError):  # a dimension is missing: no totals
            columns[name] = column | {f"**{total}**": score for total, score in vbench_scores(column).items()}
    rows = [*DIMENSIONS, "**quality**", "**semantic**", "**total**"]
    lines = [[row, *(f"{c[row]:.2f}" if row in c else "-" for c in columns.values())] for row in rows]
    return ["dimension (per cent)", *columns], lines
