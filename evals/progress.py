"""What a run of train.py shows of itself and leaves behind: pictures, the judge's readings, the student as a file.

VSD's loss is no measure of progress. What is: the same prompts drawn again and again beside the teacher's fifty steps,
and in the small world the share of right readings by a judge that rewards nothing.
"""

import itertools
import json
import math
from pathlib import Path

import torch

import common
import distributed
from adapters import Adapted, merge
from cogvideox import save_lora, save_pipeline
from common import UserError
from dit import DiT
from evals import watch
from evals.metrics import frechet, jackknife, mean_error, pm
from generate import Generator, load_network, save_adapters
from nets import COMPARED
from video import write_grid, write_video_grid
from world.shapes import HELD_OUT, Clip, render_batch

PATIENCE = 5  # updates in a row that may be skipped because they are not finite
SHOWN = 4  # prompts, in pictures on the way
READ_AT_ONCE = 32  # videos that the judge reads along with the pictures, and at the end at a time: they are large


def set_aside(folder, ranks):
    """Another run's checkpoints, and its log: a new run must neither go on from them nor, counting from 0 again, clean
    them up."""
    if ranks.main and any(folder.glob(distributed.STEP)):
        old = next(old for n in itertools.count(1) if not (old := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(old)
        if (log := folder.with_name("log.jsonl")).exists():
            log.rename(old / log.name)
        print(f"the checkpoints of an earlier run are now in {old} (--resume would have gone on)")
    distributed.any_rank(False, ranks)  # wait for it


def read_extra(newest):
    """What a checkpoint says of its run, and the DiTConfig of its student. UserError where it does not."""
    try:
        said = json.loads((newest / "extra.json").read_text())
        return said, DiT.Config(**said["student"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"the checkpoint {newest} is not one of train.py, or damaged: it names no student") from e


def check_resumed(newest, settings, nets, ranks):
    """`say_resumed`; UserError where the checkpoint is of another kind of student than this run's."""
    said, config = read_extra(newest)
    same = all(said["about"].get(key) == nets.about.get(key) for key in ("timesteps", "transition", "rank"))
    if config != nets.student.config or not same:
        flags = "--steps, --prediction, --transition and --rank"
        raise UserError(f"{newest} is of another student: repeat its {flags}, or leave out --resume")
    if ranks.main:
        say_resumed(newest, said["config"], settings)


def say_resumed(newest, old, settings):
    """Say that a run goes on, and with which other flags than its checkpoint's."""
    settings = json.loads(json.dumps(settings))  # a checkpoint's lists were tuples
    other = [
        f"--{flag.replace('_', '-')} {value} (was {old.get(flag)})"
        for flag, value in settings.items()
        if flag not in ("resume", "precision") and old.get(flag) != value
    ]
    print(f"going on from {newest}")
    if (before := old["precision"]) != (now := settings["precision"]):
        print(f"warning: computed in {before} until now, and in {now} from here: an unbroken run would differ")
    if other:
        print(f"not as before: {', '.join(other)}")


def tensorboard(out, first):
    """The same numbers for TensorBoard, where it is installed, without those of steps >= first."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard", purge_step=first)


def draw_teacher(nets, batch):
    """The teacher's videos (N, 3, F, H, W) in 50 steps, which stand in all pictures of a run. None without a VAE."""
    return draw_videos(nets, "teacher", nets.prompts[:SHOWN], 0, 50, batch) if nets.vae else None


def show_progress(nets, ranks, out, step, teacher_videos, n, batch):
    """Draw the student in its n steps, beside it the teacher's videos, and have the judge read some of the student's.

    Returns {"judge": share of right readings} where there is a judge.
    """
    prompts = nets.prompts[:SHOWN]
    if teacher_videos is not None:
        videos = draw_videos(nets, "student", prompts, 0, n, batch)
        if ranks.main:
            words = [f"{who}: {prompt}" for prompt in prompts for who in (f"student, {n}", "teacher, 50")]
            write_grid(out / f"step{step:06d}.png", [v for pair in zip(videos, teacher_videos) for v in pair], words)
    if not nets.judge:
        return {}
    prompts = nets.prompts[:READ_AT_ONCE]
    videos = draw_videos(nets, "student", prompts, 1, n, batch)
    return {"judge": nets.judge.score(videos.to(nets.device), prompts).mean().item()}


def sampler(nets, who):
    """What draws as "teacher", or as "student": the student's average."""
    model = nets.ema if who == "student" else nets.teacher
    return Generator(model, nets.vae, nets.about | {"kind": who}, nets.encoder, nets.device, nets.precision)


def draw_videos(nets, who, prompts, seed, n, batch):
    """Videos (N, 3, F, H, W) of the student's average in its steps, or of the teacher by n steps of guided DDIM."""
    generator, videos = sampler(nets, who), []
    for i in range(0, len(prompts), batch):
        some = prompts[i : i + batch]
        videos.append(generator.draw(some, range(seed + i, seed + i + len(some)), n))
    return torch.cat(videos)


def measure_reward(nets, ranks, watched, step, steps, samples, batch, lrm_warmup):
    """Measure the true reward of fresh samples (evals/watch.py), add it to `watched`, and warn of over-optimisation."""
    generator, after_warmup = sampler(nets, "student"), lambda: [w for w in watched if w["step"] >= lrm_warmup]
    before = watch.overoptimised(after_warmup())
    how = nets.prompts, steps, samples, batch
    found = watch.measure(generator, nets.latent_reward.reward, *how, ranks, nets.latent_reward)
    watched.append({"step": step} | found)
    sign = watch.overoptimised(after_warmup())
    best = max(watched, key=lambda w: w["true_reward"] if math.isfinite(w["true_reward"]) else -math.inf)
    if sign and not before and ranks.main:
        print(
            f"over-optimised at step {step}: {sign}. The true reward is {found['true_reward']:.4g}; "
            f"it was {best['true_reward']:.4g} at step {best['step']}"
        )
    return found


def write_student(out, config, weights, settings, about):
    """student.safetensors for sample.py, and of a CogVideoX also a folder for diffusers. settings: the run's flags.

    weights: the student's state dict, of a DiT, or with --rank of adapters on the teacher: these are written as they
    are, adapter.safetensors, and merged with the teacher's own file, which is finer than what a GPU has of it.
    """
    made = common.made_by(settings)
    if settings["rank"]:
        teacher, _ = load_network(settings["teacher"])
        save_adapters(out / "adapter.safetensors", weights, teacher, **about | made)
        print(f"wrote {out / 'adapter.safetensors'}")
        if Path(settings["teacher"]).is_dir():
            print(save_lora(out / "lora", weights))
        weights = merge(teacher.state_dict(), weights)
    with torch.device("meta"):
        student = DiT(config)
    student.load_state_dict(weights, assign=True)
    file = out / "student.safetensors"
    common.save_model(file, student, torch.float16, **about | made)
    print(f"wrote {file}")
    if Path(settings["teacher"]).is_dir():
        print(save_pipeline(out / "diffusers", student, about | made))


def export(out):
    """The student of the newest checkpoint of a run, whatever number of ranks wrote it, in one process on the CPU."""
    if not (newest := max((out / "checkpoints").glob(distributed.STEP), default=None)):
        raise UserError(f"{out} holds no checkpoint")
    checkpoints = distributed.Checkpoints(out / "checkpoints")
    said, config = read_extra(newest)
    rank = said["config"]["rank"]
    with torch.device("meta"):
        student = Adapted(DiT(config), rank) if rank else DiT(config)
    student.to_empty(device="cpu")
    checkpoints.load(newest, {"ema": student}, {})
    write_student(out, config, student.state_dict(), said["config"], said["about"])


@torch.no_grad()
def compare_with_teacher(nets, steps, batch):
    """What the judge sees of the teacher, of the student, and the gain: three rows for each number of `steps`.

    Both draw the same prompts from the same noise, so the errors of the gains are those of pairs: much of what makes a
    score uncertain, which prompts and which rendered clips, is common to both. A gain in Frechet distance is a fall.
    """
    parts = [range(i, min(i + READ_AT_ONCE, COMPARED)) for i in range(0, COMPARED, READ_AT_ONCE)]

    def features_of(videos):
        return nets.judge.features(videos.to(nets.device)).float().cpu()

    def read(who, n):
        """The share of right readings of each prompt (COMPARED,), and the judge's features (COMPARED, d)."""
        shares, features = [], []
        for part in parts:
            prompts = [nets.prompts[i] for i in part]
            videos = draw_videos(nets, who, prompts, 1 + part[0], n, batch)
            shares.append(nets.judge.score(videos.to(nets.device), prompts))
            features.append(features_of(videos))
        return torch.cat(shares), torch.cat(features)

    def row(label, n, shares, measure, *features):
        distance = {"mean": measure(*features), "error": jackknife(measure, *features)}
        return {"label": label, "steps": n, "named": mean_error(shares), "frechet": distance}

    def fall(teacher, student, rendered):
        return frechet(teacher, rendered) - frechet(student, rendered)

    rendered = torch.cat([features_of(render_batch([Clip.make(HELD_OUT, i) for i in part])) for part in parts])
    rows = []
    for n in steps:
        (theirs, of_teacher), (ours, of_student) = read("teacher", n), read("student", n)
        rows.append(row("teacher", n, theirs, frechet, of_teacher, rendered))
        rows.append(row("student", n, ours, frechet, of_student, rendered))
        rows.append(row("gain", n, ours - theirs, fall, of_teacher, of_student, rendered))
    return rows


def finish(nets, ranks, out, settings, n, batch, teacher_videos):
    """Write the student and, beside the teacher's videos, if there are any, what a person would look at; in the small
    world, say what it has gained.

    settings: the run's flags, for the student's file. Returns the rows of `compare_with_teacher`, [] without a judge.
    """
    weights = distributed.gather(nets.ema)
    if ranks.main:
        write_student(out, nets.student.config, weights, settings, nets.about)
    if teacher_videos is None:
        return []
    prompts = nets.prompts[:3]
    few = [k for k in (4, 2, 1) if k <= n]
    columns = [("teacher", n), *(("student", k) for k in few)]
    videos = [teacher_videos[:3], *(draw_videos(nets, who, prompts, 0, k, batch) for who, k in columns)]
    compared = compare_with_teacher(nets, few, batch) if nets.judge else []
    if not ranks.main:
        return []
    titles = [f"{who}, {k} step{'s' * (k > 1)}" for who, k in [("teacher", 50), *columns]]
    rows, words = list(zip(*videos)), [f"{title}: {prompt}" for prompt in prompts for title in titles]
    write_video_grid(out / "compare.mp4", [list(row) for row in rows], nets.about["fps"], titles=titles)
    write_grid(out / "compare.png", [video for row in rows for video in row], words)
    print(f"wrote {out}/compare.mp4 and compare.png: {'; '.join(titles)}")
    for teacher, student, gain in zip(compared[::3], compared[1::3], compared[2::3]):
        print(in_words(teacher, student, gain))
    return compared


def in_words(teacher, student, gain):
    """Three rows of `compare_with_teacher` as a sentence."""
    sigmas = {what: f"{gain[what]['mean'] / max(gain[what]['error'], 1e-9):+.1f}" for what in ("named", "frechet")}
    return (
        f"{student['steps']} step{'s' * (student['steps'] > 1)}: of what {student['named']['n']} prompts name, the "
        f"student has {student['named']['mean']:.1%} right, the teacher {teacher['named']['mean']:.1%} "
        f"({sigmas['named']} standard errors); Frechet distance from rendered clips {pm(student['frechet'], 1, 2)} and "
        f"{pm(teacher['frechet'], 1, 2)} (nearer by {sigmas['frechet']} standard errors)"
    )
