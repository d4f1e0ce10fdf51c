"""What a run of train.py shows of itself and leaves behind: pictures, the judge's readings, the student as a file.

VSD's loss is no measure of progress. What is: the same prompts drawn again and again beside the teacher's fifty steps,
and in the small world the share of right readings by a judge that rewards nothing.
"""

import itertools
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import checkpoint
import cli
import distributed
from cli import UserError
from dit import DiT
from generate import Generator, save_diffusers
from metrics import frechet, jackknife, mean_error, pm
from nets import JUDGED
from shapes import HELD_OUT, Clip, render_batch
from video import write_grid, write_video_grid

PATIENCE = 5  # updates in a row that may be skipped because they are not finite
SOME = 32  # of the JUDGED prompts, read along with the pictures


def set_aside(folder, world):
    """Another run's checkpoints: a new run must neither go on from them nor, counting from 0 again, clean them up."""
    if world.main and any(folder.glob("step_*")):
        old = next(old for n in itertools.count(1) if not (old := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(old)
        print(f"the checkpoints of an earlier run are now in {old} (--resume would have gone on)")
    distributed.any_rank(False, world)  # wait for it


def read_extra(newest):
    """What a checkpoint says of its run, and the DiTConfig of its student. UserError where it does not."""
    try:
        said = json.loads((newest / "extra.json").read_text())
        return said, DiT.Config(**said["student"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"the checkpoint {newest} is damaged: it does not say what its student is ({e})") from e


def check_resumed(newest, cfg, nets, world):
    """UserError where a checkpoint is of another kind of student than this run's; says which other flags differ."""
    said, config = read_extra(newest)
    kind = lambda about: [about.get(k) for k in ("timesteps", "transition")]
    if config != nets.student.config or kind(said["about"]) != kind(nets.about):
        same = "--steps, --prediction and --transition"
        raise UserError(f"{newest} is of another student: repeat its {same}, or leave out --resume")
    now, old = asdict(cfg), said["config"]
    other = [
        f"--{k.replace('_', '-')} {now[k]} (was {old[k]})"
        for k in now
        if k not in ("resume", "precision") and old.get(k) != now[k]
    ]
    if world.main:
        cli.warn_of_precision(old.get("precision"), cfg.precision)
        if other:
            print(f"not as before: {', '.join(other)}")


def tensorboard(out):
    """The same numbers for TensorBoard, where it is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")


def look(nets, world, out, step, teachers, n, batch):
    """Draw the student in its n steps, beside it the teacher in 50, and have the judge read some of the student's.

    teachers: the teacher's videos, drawn once: empty before.
    """
    numbers, shown = {}, nets.prompts[:4]
    if nets.vae:
        teachers += [] if teachers else draw_videos(nets, "teacher", shown, 0, 50, batch)
        videos = draw_videos(nets, "student", shown, 0, n, batch)
        if world.main:
            words = [f"{who}: {prompt}" for prompt in shown for who in (f"student, {n}", "teacher, 50")]
            write_grid(out / f"step{step:06d}.png", [v for pair in zip(videos, teachers) for v in pair], words)
    if nets.judge:
        videos = draw_videos(nets, "student", nets.prompts[:SOME], 1, n, batch)
        numbers["judge"] = nets.judge.score(videos.to(nets.device), nets.prompts[:SOME]).mean().item()
    return numbers


def sampler(nets, who):
    """What draws as "teacher", or as "student": the student's average."""
    model = nets.ema if who == "student" else nets.teacher
    return Generator(model, nets.vae, nets.about | {"kind": who}, nets.encoder, nets.device, nets.precision)


def draw_videos(nets, who, prompts, seed, n, batch):
    """Videos (N, 3, F, H, W) of the student's average in its steps, or of the teacher by n steps of guided DDIM."""
    generator, videos = sampler(nets, who), []
    for i in range(0, len(prompts), batch):
        text = nets.encoder.encode(prompts[i : i + batch])
        latents = generator.latents(text, [seed + i + j for j in range(len(text))], n)
        videos.append(generator.decode(latents).cpu())
    return torch.cat(videos)


def write_student(out, config, weights, cfg, about):
    """student.safetensors for sample.py, and of a CogVideoX also a folder for diffusers. cfg: the run's, as a dict."""
    with torch.device("meta"):
        student = DiT(config)
    student.load_state_dict(weights, assign=True)
    made = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "settings": cfg}
    file = out / "student.safetensors"
    checkpoint.save_model(file, student, torch.float16, **about | made)
    print(f"wrote {file}")
    if Path(cfg["teacher"]).is_dir():
        print(save_diffusers(out / "diffusers", student, about | made))


def export(out):
    """The student of the newest checkpoint of a run, whatever number of ranks wrote it, in one process on the CPU."""
    if not (newest := max((out / "checkpoints").glob("step_*"), default=None)):
        raise UserError(f"{out} holds no checkpoint")
    checkpoints = distributed.Checkpoints(out / "checkpoints")
    said, config = read_extra(newest)
    with torch.device("meta"):
        student = DiT(config)
    student.to_empty(device="cpu")
    checkpoints.load(newest, {"ema": student}, {})
    write_student(out, config, student.state_dict(), said["config"], said["about"])


@torch.no_grad()
def compare(nets, n, batch):
    """What the judge sees in n steps of the teacher, in n of the student, and the gain: three rows.

    Both draw the same prompts from the same noise, so the errors of the gains are those of pairs: much of what makes a
    score uncertain, which prompts and which rendered clips, is common to both. A gain in Frechet distance is a fall.
    """
    features = lambda videos: nets.judge.features(videos.to(nets.device)).float().cpu()
    parts = [range(i, min(i + SOME, JUDGED)) for i in range(0, JUDGED, SOME)]  # videos are large
    rendered = torch.cat([features(render_batch([Clip.make(HELD_OUT, i) for i in part])) for part in parts])
    rows, reads, seen = [], [], []
    for who in ("teacher", "student"):
        found = []
        for part in parts:
            prompts = [nets.prompts[i] for i in part]
            videos = draw_videos(nets, who, prompts, 1 + part[0], n, batch)
            found.append((nets.judge.score(videos.to(nets.device), prompts), features(videos)))
        read, feature = (torch.cat(some) for some in zip(*found))
        distance = {"mean": frechet(feature, rendered), "error": jackknife(frechet, feature, rendered)}
        rows.append({"label": who, "steps": n, "named": mean_error(read.tolist()), "frechet": distance})
        reads.append(read)
        seen.append(feature)
    gain = lambda theirs, own, rendered: frechet(theirs, rendered) - frechet(own, rendered)
    distance = {"mean": gain(*seen, rendered), "error": jackknife(gain, *seen, rendered)}
    named = mean_error((reads[1] - reads[0]).tolist())
    return [*rows, {"label": "gain", "steps": "", "named": named, "frechet": distance}]


def finish(cfg, world, nets, out):
    """Write the student and what a person would look at; in the small world, say what the distillation has brought."""
    weights = distributed.gather(nets.ema)
    if world.main:
        write_student(out, nets.student.config, weights, asdict(cfg), nets.about)
    if not nets.vae or not cfg.sample_every:
        return
    shown, n = nets.prompts[:3], cfg.steps
    columns = [("teacher", 50), ("teacher", n), *(("student", k) for k in (4, 2, 1) if k <= n)]
    drawn = [draw_videos(nets, who, shown, 0, k, cfg.batch) for who, k in columns]
    compared = compare(nets, n, cfg.batch) if nets.judge else None
    if not world.main:
        return
    titles = [f"{who}, {k} step{'s' * (k > 1)}" for who, k in columns]
    rows, words = zip(*drawn), [f"{title}: {prompt}" for prompt in shown for title in titles]
    write_video_grid(out / "compare.mp4", [list(row) for row in zip(*drawn)], nets.about["fps"], titles=titles)
    write_grid(out / "compare.png", [video for row in rows for video in row], words)
    print(f"wrote {out}/compare.mp4 and compare.png: {'; '.join(titles)}")
    if compared:
        theirs, own, gain = compared
        sigmas = lambda what: f"{gain[what]['mean'] / max(gain[what]['error'], 1e-9):+.1f} standard errors"
        print(
            f"of what {own['named']['n']} prompts name, the judge reads {own['named']['mean']:.1%} in the student's "
            f"{n} steps and {theirs['named']['mean']:.1%} in the teacher's {n}: {sigmas('named')}"
        )
        print(
            f"Frechet distance from rendered clips, in the judge's features: {pm(own['frechet'], 1, 2)} and "
            f"{pm(theirs['frechet'], 1, 2)}: nearer by {sigmas('frechet')}"
        )
        import results  # here, since training needs none of it

        results.save(replace(cfg, out=str(out / "compare.json")), "compared", rows=compared)
