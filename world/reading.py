"""The small world as the judge reads it: is what is named there, does it look like the world, is it always the same?

The judge (judge.py) stands where large networks stand at full scale, so everything here is only as good as it is: its
own accuracy on rendered clips is kept beside every number. Prompts are captions of clips that nothing is trained on,
and leave much open; a factor counts only where the prompt names it.
"""

import contextlib
import math
import random
import time

import torch
from tqdm import tqdm

import common
import rewards
from common import UserError, autocast
from evals import vbench
from evals.metrics import frechet, jackknife, mean_error, neighbours, pm, vendi
from vae3d import VAE3D, psnr
from world import dimensions, shapes
from world.judge import Judge, slow_motion

MAIN = ("object", "object2", "colour", "action", "scene", "camera", "look")  # the factors that the headline averages
ELSEWHERE = shapes.HELD_OUT + 1  # seed of further clips that nothing is trained on


def held_out(n, seed=shapes.HELD_OUT, style="train"):
    """n clips that nothing is trained on, a prompt for each (style: of shapes.caption), and the factors it names."""
    clips = [shapes.Clip.make(seed, i) for i in range(n)]
    words = [shapes.caption(clip, style, random.Random(f"held out {i}")) for i, clip in enumerate(clips)]
    return clips, [prompt for prompt, _ in words], [named for _, named in words]


class Eye:
    """The evaluating judge. `about` is the metadata of its file: how it was made, and how well it reads."""

    def __init__(self, path, device="cpu", batch=64, precision="auto"):
        self.judge, self.about = common.load_model(path, Judge, device)
        self.judge.to(memory_format=torch.channels_last_3d)
        self.device, self.batch, self.precision = device, batch, precision

    @torch.no_grad()
    def __call__(self, video):
        """video (B, 3, F, H, W) -> {factor: probabilities (B, values)}, features (B, d), on the CPU."""
        video = video.to(self.device, memory_format=torch.channels_last_3d)
        with autocast(self.precision, self.device):
            logits, features = self.judge(video), self.judge.features(video)
        return {name: x.float().softmax(1).cpu() for name, x in logits.items()}, features.float().cpu()

    def keeps_its_object(self, video):
        """Whether the first and the last four frames, in slow motion, are read as the same object: (B,), 0 or 1."""
        first, last = (self(slow_motion(part))[0]["object"].argmax(1) for part in (video[:, :, :4], video[:, :, -4:]))
        return (first == last).float()

    def over(self, make, n, name, measure=None):
        """Look at videos 0..n-1; make(list of indices) -> (B, 3, F, H, W). A video that is not finite is left out.

        -> {"beliefs": {factor: (m, values)}, "features": (m, d), "index": which of the n these are, "broken": n - m,
        "measured": {name: (m,)} of measure(video), "seconds": of make alone, a video}
        """
        beliefs, features, measured, index, seconds = [], [], [], [], 0.0
        for i in tqdm(range(0, n, self.batch), desc=name, dynamic_ncols=True, leave=False):
            some, start = list(range(i, min(i + self.batch, n))), time.perf_counter()
            video = make(some)
            seconds += time.perf_counter() - start
            good = video.flatten(1).isfinite().all(1).cpu()
            if not good.any():
                continue
            video = video[good.to(video.device)]
            index += [j for j, fine in zip(some, good.tolist()) if fine]
            for kept, new in zip((beliefs, features), self(video)):
                kept.append(new)
            measured.append(measure(video) if measure else {})
        join = lambda parts: {k: torch.cat([p[k] for p in parts]) for k in parts[0]} if parts else {}
        looked = {"beliefs": join(beliefs), "measured": join(measured), "index": index, "broken": n - len(index)}
        return looked | {"features": torch.cat(features) if features else torch.zeros(0, 1), "seconds": seconds / n}


def readings(beliefs):
    """Most probable class index of every factor, (n, factors)."""
    return torch.stack([beliefs[factor].argmax(1) for factor in shapes.FACTORS], 1)


def accuracy(beliefs, named):
    """Share of right readings of every factor over the prompts that name it, and the mean of the main factors.

    beliefs {factor: (n, values)}; named: n dicts. -> {factor: {"mean", "error", "n"}}, "main" among them. The error of
    the mean over factors counts prompts, not answers: two factors of one prompt fail together.
    """
    truth = torch.tensor([[v.index(p[f]) if f in p else -1 for f, v in shapes.FACTORS.items()] for p in named])
    asked, right = truth >= 0, readings(beliefs) == truth
    scores, influence, means = {}, torch.zeros(len(named), dtype=torch.float64), []
    for i, factor in enumerate(shapes.FACTORS):
        scores[factor] = mean_error(right[asked[:, i], i].double())
        if factor in MAIN and scores[factor]["n"]:
            share = asked[:, i].double().mean()
            influence += (right[:, i].double() - scores[factor]["mean"]) * asked[:, i] / share
            means.append(scores[factor]["mean"])
    mean = sum(means) / len(means) if means else math.nan
    error = (influence / max(len(means), 1)).std().item() / math.sqrt(len(named))
    return scores | {"main": {"mean": mean, "error": error, "n": len(named)}}


def compare(features, reference):
    """Frechet distance with its sampling error, precision and coverage against the reference's features."""
    distance = {"mean": frechet(features, reference), "error": jackknife(frechet, features, reference)}
    return {"frechet": distance, **neighbours(reference, features)}


def diversity(features, index, copies=5):
    """Vendi - 1 of the judge's features of `copies` videos of each prompt, mean and error over prompts; 0 is collapse.

    features (m, d) of videos `index`, numbered prompt by prompt; a prompt of which a video is missing is left out.
    """
    groups = {}
    for feature, i in zip(features, index):
        groups.setdefault(i // copies, []).append(feature)
    return mean_error([vendi(torch.stack(g)) - 1 for g in groups.values() if len(g) == copies])


# ---------------------------------------------------------------------------------------------------------------------
# rows of a table; cfg is eval.py's WorldConfig


def model_rows(cfg, label, eye, reference, generator, prompts, named):
    """One row for every number of steps, all on the same prompts and the same noise."""
    text, rows = generator.encoder.encode(prompts), []  # (n, L, D)
    several = [(i, copy) for i in range(min(cfg.vendi_prompts, cfg.prompts)) for copy in range(1, 5)]
    for steps in cfg.steps:

        def draw(jobs, steps=steps):
            seeds = [(cfg.seed * 8 + copy) * 10_000_000 + i for i, copy in jobs]
            return generator.decode(generator.latents(text[[i for i, _ in jobs]], seeds, steps, cfg.w))

        row = {"label": label, "steps": steps, "nfe": generator.evaluations(steps, cfg.w)}
        first = lambda some, draw=draw: draw([(i, 0) for i in some])
        more = lambda some, draw=draw: draw([several[i] for i in some])
        rows.append(row | look(cfg, eye, reference, first, named, more, [5 * i + copy for i, copy in several]))
        print(in_words(rows[-1]), flush=True)
    return rows


def reference_rows(cfg, eye, reference):
    """Other rendered clips, and what the VAE makes of them: two rows."""
    vae = common.load_model(cfg.vae, VAE3D, cfg.device)[0].to(memory_format=torch.channels_last_3d)
    clips, _, named = held_out(cfg.prompts, ELSEWHERE, cfg.captions)  # a clip must not be compared with itself
    groups = {}  # further clips that the same prompt describes
    for i, fixed in enumerate(named[: cfg.vendi_prompts]):
        with contextlib.suppress(ValueError):  # a prompt that names very much has too few clips to be found
            groups |= {5 * i + copy: shapes.Clip.make(ELSEWHERE + copy, i, **fixed) for copy in range(1, 5)}
    psnrs, rows = [], []

    @torch.no_grad()
    def copied(video):
        video = video.to(cfg.device, memory_format=torch.channels_last_3d)
        with autocast(cfg.precision, cfg.device):
            drawn = vae.decode(vae.encode(video)).float().clamp(-1, 1)
        psnrs.append(psnr(drawn, video).cpu())
        return drawn

    for label, through in (("rendered clips", lambda video: video), ("the VAE's copies", copied)):
        first = lambda some, through=through: through(shapes.render_batch([clips[i] for i in some]))
        others = list(groups.values())
        more = lambda some, through=through: through(shapes.render_batch([others[i] for i in some]))  # noqa: B023
        row = {"label": label, "steps": None, "nfe": None}
        rows.append(row | look(cfg, eye, reference, first, named, more, list(groups)) | {"seconds": None})
        if psnrs:
            scores = torch.cat(psnrs).sort().values
            worst = scores[: max(1, len(scores) // 10)].mean().item()
            rows[-1] |= {"psnr": scores.mean().item(), "psnr_worst_tenth": worst}
        print(in_words(rows[-1]), flush=True)
    return rows


def look(cfg, eye, reference, first, named, more, numbers):
    """All that is measured of videos 0..n-1, one a prompt, and of further videos `numbers` (5 * prompt + copy)."""
    quality = (lambda video: dimensions.quality(eye, video)) if cfg.dimensions else lambda video: {}
    flow = rewards.make("dynamic_degree")  # of the most moving twentieth of the pixels; VBench's threshold is 1
    also = lambda video: {"identity": eye.keeps_its_object(video), "motion": flow(video.cpu())}
    measure = lambda video: also(video) | quality(video)
    looked = eye.over(first, cfg.prompts, "drawing and looking", measure)
    index, seen = looked["index"], [named[i] for i in looked["index"]]
    if len(index) < 20:
        raise UserError(f"{looked['broken']} of {cfg.prompts} videos are not finite: these weights are broken")
    row = {"seconds": looked["seconds"], "broken": looked["broken"]}
    row |= accuracy(looked["beliefs"], seen) | compare(looked["features"], reference)
    single = torch.tensor(["relation" not in names for names in seen])
    row["identity"] = mean_error(looked["measured"].pop("identity")[single].double())
    row["motion"] = mean_error(looked["measured"].pop("motion").double())
    if numbers:
        others = eye.over(more, len(numbers), "diversity")
        features = torch.cat([looked["features"], others["features"]])
        row["vendi"] = diversity(features, [5 * i for i in index] + [numbers[i] for i in others["index"]])
    if cfg.dimensions:
        raw = looked["measured"] | dimensions.semantic(looked["beliefs"], seen)
        row["dimensions"] = {d: mean_error(raw[d]) for d in vbench.DIMENSIONS}
        with contextlib.suppress(ValueError):  # too few prompts for some dimension
            row["totals"] = vbench.vbench_scores(
                {d: 100 * s["mean"] for d, s in row["dimensions"].items()}, dimensions.RANGES
            )
    return row


def in_words(row):
    """One row in a line, printed while the next is being drawn."""
    scores = " ".join(f"{f} {pm(row[f], 100)}" for f in (*MAIN, "main"))
    more = f", vendi-1 {pm(row['vendi'], 1, 3)}" if "vendi" in row else ""
    more += f", total {row['totals']['total']:.1f}" if "totals" in row else ""
    more += f", {row['broken']} videos are broken and left out" if row["broken"] else ""
    return f"{row['label']} {row['steps'] or ''}: {scores}, frechet {pm(row['frechet'], 1, 2)}{more}"
