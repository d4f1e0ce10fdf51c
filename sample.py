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
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import common
from captions import write_caption
from common import Machine, UserError, opt, parse, run, start
from generate import BUNDLED, Generator
from video import write_grid, write_video, write_video_grid
from world import shapes

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
ON_SHEET = 16  # videos on the sheet of a folder; a sheet of hundreds shows nothing


@dataclass
class Config(Machine):
    prompt: tuple[str, ...] = opt((), "One or more texts, a video each. Empty, without --prompts: a few of its own.")
    prompts: str = opt("", "A file of prompts, one a line.")
    steps: int | None = opt(
        None, "The number of steps. A student: its own, or 2 or 1 of its 4. A teacher: any, 50 unless said."
    )
    timesteps: tuple[int, ...] = opt((), "The steps themselves, e.g. 999 499, out of a student's own.")
    seed: int = opt(0, "The seed of all noise.")
    out: str = opt("samples", "FILE.mp4 or FILE.gif (several prompts are tiled in it) or a folder (a file for each).")
    weights: str = opt("", "A .safetensors file, or a CogVideoX folder of diffusers. Empty: the bundled student.")
    adapter: str = opt("", "A student's adapters on these weights, as train.py --rank writes them.")
    vae: str = opt("", "The VAE, file or folder. Empty: the bundled one, or the one in the weights' folder.")
    text: str = opt("", "The folder of a T5 encoder. Empty: the world's words, or the one in the weights' folder.")


def read_prompts(cfg):
    """The prompts of a command, in order: --prompt, then the lines of --prompts; its own if there is neither."""
    prompts = [*cfg.prompt, *(common.read_prompts(cfg.prompts) if cfg.prompts else [])] or PROMPTS
    if not all(re.search(r"\w", prompt) for prompt in prompts):
        raise UserError('an empty prompt: say what to draw, e.g. --prompt "a red star springs at night"')
    return prompts


def choose_steps(cfg, generator):
    """The list of time steps that --steps or --timesteps asks for; UserError where these weights cannot take it."""
    if not cfg.timesteps:
        usual = len(generator.trained) if generator.student else 50
        return generator.steps(usual if cfg.steps is None else cfg.steps)
    if not generator.student:
        raise UserError("--timesteps are a student's: a teacher takes --steps")
    asked, own = list(cfg.timesteps), generator.trained
    if asked != sorted(set(asked), reverse=True) or not set(asked) <= set(own) or cfg.steps not in (None, len(asked)):
        raise UserError(f"--timesteps {asked}: want some of a student's own {own}, descending, as many as --steps")
    generator.about["timesteps"] = asked
    return asked


def draw(generator, text, n, seed):
    """Yield the video (3, F, H, W) in [-1, 1] of every row of text (N, L, D) in n steps, in order."""
    for i in range(len(text)):  # one by one: so its neighbours cannot change a video's last bits
        own = random.Random(f"sample {seed} {i}").getrandbits(63)
        video = generator.decode(generator.latents(text[i : i + 1], [own], n))[0].cpu()
        if not video.isfinite().all():
            raise UserError("what these weights draw is not finite: they are broken, or overflow in half precision")
        yield video


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    prompts, out = read_prompts(cfg), Path(cfg.out)
    one_file = out.suffix.lower() in (".mp4", ".gif")
    if out.suffix and one_file == out.is_dir():
        raise UserError(f"--out {out}: want a file that ends in .mp4 or .gif, or a folder, which has no suffix")
    weights = cfg.weights or BUNDLED / "student.safetensors"
    generator = Generator.load(weights, cfg.vae, cfg.device, cfg.text, cfg.precision, cfg.adapter)
    steps, w, fps = choose_steps(cfg, generator), generator.guidance(), generator.about.get("fps", shapes.FPS)
    text = torch.cat([generator.encoder.encode([prompt]).cpu() for prompt in prompts])  # (N, L, D)
    kind = "student" if generator.student else "teacher"
    name = f"{kind}{len(steps)}-seed{cfg.seed}"  # runs that one would compare do not overwrite each other
    sheet = out / f"{name}.png"
    common.writable(out if one_file else sheet)  # find out now, not after the work
    start(cfg)
    generator.encoder = None  # a T5 is as large as the transformer
    videos, total = [], len(prompts) * generator.evaluations(len(steps))
    calls, begun = [], time.perf_counter()

    def count(_, args):  # a bar can be switched off
        calls.append(len(args[0]))
        bar.update(len(args[0]))

    with tqdm(total=total, desc=name, unit="evaluation", dynamic_ncols=True, leave=False) as bar:
        generator.model.register_forward_pre_hook(count)
        for i, (prompt, video) in enumerate(zip(prompts, draw(generator, text, len(steps), cfg.seed))):
            if one_file or i < ON_SHEET:
                videos.append(video)
            if not one_file:
                words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:50].strip("-")
                file = out / f"{name}-{i:02d}-{words}.mp4"
                write_video(file, video, fps)
                write_caption(file, prompt)  # the name has no room for all of a prompt
    seconds = time.perf_counter() - begun
    if one_file:
        if len(videos) == 1:
            write_video(out, videos[0], fps)
        else:
            columns = math.ceil(math.sqrt(len(videos)))
            rows = [slice(i, i + columns) for i in range(0, len(videos), columns)]
            write_video_grid(out, [videos[row] for row in rows], fps, [" | ".join(prompts[row]) for row in rows])
        print(out)
    else:
        write_grid(sheet, videos, prompts[: len(videos)])
        print(f"{out / name}-*.mp4 and, to look at them together, {sheet}")
    how = f"{kind}, {len(steps)} step{'s' * (len(steps) > 1)}" + (f" guided with w = {w:g}" if w else "")
    print(f"{how}: {sum(calls) // len(prompts)} network evaluations a video, {sum(calls)} in all, {seconds:.1f} s")
    print(f"{len(prompts)} videos, (channels, frames, height, width) = {tuple(video.shape)}")


if __name__ == "__main__":
    run(main)
