"""Prompts in, videos out: a student in 4, 2 or 1 steps without guidance, a teacher by guided DDIM in any number.

    python sample.py --steps 4                                     # a few prompts of its own, into samples/
    python sample.py --prompt "a red star springs at night" --out star.mp4
    python sample.py --prompts prompts.txt --weights weights/teacher.safetensors --steps 50 --out teacher
    python sample.py --prompt "a panda plays the guitar" --weights CogVideoX-2b --out panda.mp4

Weights say of themselves what they are and how they want to be sampled, so nothing need be known to draw from them.
The noise of a video follows from --seed and the place of its prompt in the list, and from nothing else: the same
command gives the same bits, further prompts leave the first ones as they are, and other steps or weights start from
the same noise. What can be wrong with a command is found before the first step is taken.
"""

import math
import random
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import common
from common import Machine, UserError, opt, parse, run, start
from generate import Generator
from schedule import timesteps
from text import T5
from video import write_grid, write_video, write_video_grid
from world import shapes

WEIGHTS = Path(__file__).parent / "weights"
PROMPTS = [  # every scene and every object once, and most of the other things this world can show
    "a red star",
    "a heart grows at sea",
    "a yellow ring at night camera pans left",
    "a small white cross springs in a meadow",
    "a purple triangle moves up in a desert zoom in",
    "a pink moon in neon style",
    "a green square left of an orange circle on a checkerboard",
    "a small circle moves right monochrome",
]
ON_GRID = 16  # videos on the sheet of a folder; a sheet of hundreds shows nothing


@dataclass
class Config(Machine):
    prompt: tuple[str, ...] = opt((), "One or more texts, a video each. Empty, without --prompts: a few of its own.")
    prompts: str = opt("", "A file of prompts, one a line.")
    steps: int | None = opt(None, "The steps of a video: a student's own, or 2 or 1 of its 4; any for a teacher (50).")
    timesteps: tuple[int, ...] = opt((), "The steps themselves, e.g. 999 499, out of a student's own.")
    seed: int = opt(0, "The seed of all noise.")
    out: str = opt("samples", "FILE.mp4 or FILE.gif (several prompts are tiled in it) or a folder (a file for each).")
    weights: str = opt("", "A .safetensors file, or a CogVideoX folder of diffusers. Empty: the bundled student.")
    adapter: str = opt("", "A student's adapters on these weights, as train.py --rank writes them.")
    vae: str = opt("", "The autoencoder, file or folder. Empty: the bundled one, or the one in the weights' folder.")
    text: str = opt("", "The folder of a T5 encoder. Empty: the world's words, or the one in the weights' folder.")
    w: float | None = opt(
        None, "A teacher's guidance as in Eq. 9, the usual scale minus 1. None: what its weights say."
    )
    transition: Literal["renoise", "ddim"] | None = opt(
        None, "The way between a student's steps. None: as in training."
    )
    batch: int = opt(1, "The videos at a time; 1 makes a video's bits independent of its neighbours.")


def read_prompts(cfg):
    """The prompts of a command, in order: --prompt, then the lines of --prompts; its own if there is neither."""
    prompts = [*cfg.prompt, *(common.read_prompts(cfg.prompts) if cfg.prompts else [])] or PROMPTS
    if not all(re.search(r"\w", prompt) for prompt in prompts):
        raise UserError('an empty prompt: say what to draw, e.g. --prompt "a red star springs at night"')
    return prompts


def check_out(name):
    """(path, whether it is one file). UserError where nothing can be written; leaves nothing behind."""
    path = Path(name)
    one_file = path.suffix.lower() in (".mp4", ".gif")
    if path.suffix and one_file == path.is_dir():
        raise UserError(f"--out {name}: want a file that ends in .mp4 or .gif, or a folder, which has no suffix")
    try:
        there = next(p for p in [path, *path.parents][one_file:] if p.exists())
        tempfile.TemporaryFile(dir=there).close()  # asking for permission would not find every reason
    except OSError as e:
        raise UserError(f"cannot write to {name}: {e.strerror}") from e
    return path, one_file


def choose_steps(cfg, generator):
    """The list of time steps that --steps or --timesteps asks for; UserError where these weights cannot take it."""
    student, asked = generator.student, list(cfg.timesteps)
    own = (generator.about.get("timesteps") or timesteps(4)) if student else timesteps(50)
    if not asked:
        return generator.steps(len(own) if cfg.steps is None else cfg.steps)
    if asked != sorted(set(asked), reverse=True) or cfg.steps not in (None, len(asked)):
        raise UserError(f"--timesteps {asked} must descend, and be as many as --steps if that is given")
    if student and not set(asked) <= set(own):
        raise UserError(f"this student was trained at the steps {own}: --timesteps must be some of them, not {asked}")
    if not student and asked != generator.steps(len(asked)):
        raise UserError(f"a teacher's steps are evenly spaced: --steps {len(asked)}, not --timesteps {asked}")
    generator.about["timesteps"] = asked
    return asked


def draw(generator, text, n, cfg, clock):
    """Yield the video (3, F, H, W) in [-1, 1] of every row of text (N, L, D), in order; seconds are added to clock."""
    for first in range(0, len(text), cfg.batch):
        part = text[first : first + cfg.batch]  # (B, L, D)
        seeds = [random.Random(f"sample {cfg.seed} {first + i}").getrandbits(63) for i in range(len(part))]
        begun = now(cfg.device)
        latents = generator.latents(part, seeds, n, cfg.w)  # (B, C, T, h, w)
        drawn = now(cfg.device)
        videos = [generator.decode(x[None])[0].cpu() for x in latents]  # one by one: pixels are what is large
        clock["drawing"] += drawn - begun
        clock["decoding"] += now(cfg.device) - drawn
        if not all(video.isfinite().all() for video in videos):
            raise UserError("what these weights draw is not finite: they are broken, or overflow in half precision")
        yield from videos


def now(device):
    """Seconds. A GPU only queues what it is told: without waiting for it, this would time the telling."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(argv=None):
    cfg = parse(Config, argv, __doc__.splitlines()[0])
    prompts = read_prompts(cfg)
    out, one_file = check_out(cfg.out)
    weights = cfg.weights or WEIGHTS / "student.safetensors"
    vae = cfg.vae or ("" if Path(weights).is_dir() else WEIGHTS / "vae.safetensors")
    generator = Generator.load(weights, vae, cfg.device, cfg.text, cfg.precision, cfg.adapter)
    steps, w, fps = choose_steps(cfg, generator), generator.guidance(cfg.w), generator.about.get("fps", shapes.FPS)
    kind = "student" if generator.student else "teacher"
    misplaced = cfg.w if generator.student else cfg.transition
    if misplaced:
        raise UserError(f"these weights are a {kind}'s: --w guides a teacher alone, --transition is a student's")
    if cfg.transition:
        generator.about["transition"] = cfg.transition
    text = torch.cat([generator.encoder.encode(prompts[i : i + 16]).cpu() for i in range(0, len(prompts), 16)])
    start(cfg)
    if isinstance(generator.encoder, T5):
        generator.encoder.close()  # it is larger than all that follows
    name = f"{kind}{len(steps)}-seed{cfg.seed}"  # runs that one would compare do not overwrite each other
    clock, kept, total = {"drawing": 0.0, "decoding": 0.0}, [], len(prompts) * generator.evaluations(len(steps), cfg.w)
    with tqdm(total=total, desc=name, unit="evaluation", dynamic_ncols=True, leave=False) as bar:
        generator.model.register_forward_pre_hook(lambda _, args: bar.update(len(args[0])) and None)
        for i, (prompt, video) in enumerate(zip(prompts, draw(generator, text, len(steps), cfg, clock))):
            if one_file or i < ON_GRID:
                kept.append(video)
            if not one_file:
                words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:50].strip("-")
                write_video(out / f"{name}-{i:02d}-{words}.mp4", video, fps)
    if one_file and len(kept) == 1:
        write_video(out, kept[0], fps)
    elif one_file:
        columns = math.ceil(math.sqrt(len(kept)))
        rows = [slice(i, i + columns) for i in range(0, len(kept), columns)]
        write_video_grid(out, [kept[row] for row in rows], fps, [" | ".join(prompts[row]) for row in rows])
    else:
        write_grid(out / f"{name}.png", kept, prompts[: len(kept)])
    print(out if one_file else f"{out / name}-*.mp4 and, to look at them together, {out / name}.png")
    how = f"{kind}, {len(steps)} steps" + (f" guided with w = {w:g}" if w else "")
    print(f"{how}: {bar.n // len(prompts)} network evaluations a video, {bar.n} in all")
    spent = f"{clock['drawing']:.2f} s to draw, {clock['decoding']:.2f} s to decode"
    print(f"{len(prompts)} videos, (channels, frames, height, width) = {tuple(video.shape)}: {spent}")


if __name__ == "__main__":
    run(main)
