"""The small world as the judge reads it: is what is named there, does it look like the world, is it always the same?

The judge (judge.py) stands where large networks stand at full scale, so everything here is only as good as it is: its
own accuracy on rendered clips is kept beside every number. Prompts are captions of clips that nothing is trained on,
and leave much open; a factor counts only where the prompt names it.
"""

import contextlib
import math
import random
from dataclasses import replace

import torch
from tqdm import tqdm

import common
import rewards
from common import UserError, autocast
from evals import vbench
from evals.metrics import frechet, jackknife, mean_error, neighbours, pm, vendi
from generate import BUNDLED
from vae3d import VAE3D, psnr
from world import dimensions, shapes
from world.judge import Judge, slow_motion

MAIN = ("object", "object2", "colour", "action", "scene", "camera", "look")  # the factors that the headline averages
ELSEWHERE = shapes.HELD_OUT + 1  # seed of further clips that nothing is trained on


class Evaluator:
    """The evaluating judge. `about` is the metadata of its file: how it was made, and how well it reads."""

    def __init__(self, path, device="cpu", batch=64, precision="auto"):
        self.judge, self.about = common.load_model(path, Judge, device)
        if self.judge.config.kind != "conv":
            raise UserError(f"{path} is a judge that rewards: want the one that evaluates")
        self.judge.to(memory_format=torch.channels_last_3d)
        self.device, self.batch, self.precision = device, batch, precision

    @torch.no_grad()
    def __call__(self, video):
        """video (B, 3, F, H, W) -> {factor: probabilities (B, values)}, features (B, d), on the CPU."""
        video = video.to(self.device, memory_format=torch.channels_last_3d)
        with autocast(self.precision, self.device):
            tokens = self.judge.tokens(video)
            logits = self.judge.answers(tokens)
        return {name: x.softmax(1).cpu() for name, x in logits.items()}, tokens.float().mean(1).cpu()

    def keeps_its_object(self, video):
        """Whether the first and the last four frames, in slow motion, are read as the same object: (B,), 0 or 1."""
        first, last = (self(slow_motion(part))[0]["object"].argmax(1) for part in (video[:, :, :4], video[:, :, -4:]))
        return (first == last).float()

    def read(self, jobs, draw, name, measure=None):
        """Read the videos draw(some of the jobs) -> (B, 3, F, H, W) of all jobs. One that is not finite is left out.

        -> {"beliefs": {factor: (m, values)}, "features": (m, d), "jobs": the m that were read, "broken": n - m,
        "measured": {name: (m,)} of measure(video, its jobs)}. UserError if all are broken.
        """
        beliefs, features, measured, whole = [], [], [], []
        for i in tqdm(range(0, len(jobs), self.batch), desc=name, dynamic_ncols=True, leave=False):
            some = jobs[i : i + self.batch]
            video = draw(some)
            finite = video.flatten(1).isfinite().all(1)
            if not finite.any():
                continue
            video = video[finite]
            kept = [job for job, fine in zip(some, finite.tolist()) if fine]
            whole += kept
            belief, feature = self(video)
            beliefs.append(belief)
            features.append(feature)
            measured.append(measure(video, kept) if measure else {})
        if not whole:
            raise UserError(f"none of {len(jobs)} videos is finite: these weights are broken")
        read = {"features": torch.cat(features), "beliefs": joined(beliefs), "measured": joined(measured)}
        return read | {"jobs": whole, "broken": len(jobs) - len(whole)}


def joined(batches):
    """One dictionary of several with the same names, their tensors one after the other."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def accuracy(beliefs, named):
    """Share of right readings of every factor over the prompts that name it, and the mean of the main factors.

    beliefs {factor: (n, values)}; named: n dicts. -> {factor: {"mean", "error", "n"}}, "main" among them. The error of
    the mean over factors counts prompts, not answers: two factors of one prompt fail together.
    """
    scores, influence, means = {}, torch.zeros(len(named), dtype=torch.float64), []
    for factor, values in shapes.FACTORS.items():
        truth = torch.tensor([values.index(names[factor]) if factor in names else -1 for names in named])
        asked, right = truth >= 0, (beliefs[factor].argmax(1) == truth).double()
        scores[factor] = mean_error(right[asked])
        if factor in MAIN and scores[factor]["n"]:
            influence += (right - scores[factor]["mean"]) * asked / asked.double().mean()
            means.append(scores[factor]["mean"])
    mean = sum(means) / len(means) if means else math.nan
    error = (influence / max(len(means), 1)).std().item() / math.sqrt(len(named))
    return scores | {"main": {"mean": mean, "error": error, "n": len(named)}}


def likeness(features, reference):
    """Frechet distance with its sampling error, precision and coverage against the reference's features."""
    distance = {"mean": frechet(features, reference), "error": jackknife(frechet, features, reference)}
    return {"frechet": distance, **neighbours(reference, features)}


def diversity(features, prompts, copies=5):
    """Vendi - 1 of the judge's features of `copies` videos of each prompt, mean and error over prompts; 0 is collapse.

    features (m, d) of videos of `prompts`, their numbers; a prompt of which a video is missing is left out.
    """
    groups = {}
    for feature, i in zip(features, prompts):
        groups.setdefault(i, []).append(feature)
    return mean_error([vendi(torch.stack(group)) - 1 for group in groups.values() if len(group) == copies])


# ---------------------------------------------------------------------------------------------------------------------
# rows of a table; cfg is eval.py's WorldConfig, a job the number of a prompt and 0, or 1..4 for a further video of it


def model_rows(cfg, label, evaluator, reference, generator, prompts, named):
    """One row for every number of steps, all on the same prompts and the same noise."""
    text, rows = generator.encoder.encode(prompts), []  # (n, L, D)
    further = [(i, copy) for i in range(min(cfg.vendi_prompts, cfg.prompts)) for copy in range(1, 5)]
    for steps in cfg.steps:

        def draw(jobs, steps=steps):
            seeds = [(cfg.seed * 8 + copy) * 10_000_000 + i for i, copy in jobs]
            return generator.decode(generator.latents(text[[i for i, _ in jobs]], seeds, steps, cfg.w))

        row = {"label": label, "steps": steps, "nfe": generator.evaluations(steps, cfg.w)}
        rows.append(measurements(row, cfg, evaluator, reference, draw, further, prompts, named))
    return rows


def reference_rows(cfg, evaluator, reference, clips, prompts, named):
    """Other rendered clips of the same prompts, and what the VAE makes of them: two rows.

    The first is what a perfect model has. The reference's own clips will not do: their distance from it is 0.
    """
    file = cfg.vae or BUNDLED / "vae.safetensors"
    vae = common.load_model(file, VAE3D, cfg.device)[0].to(memory_format=torch.channels_last_3d)
    further = [(i, copy) for i in range(min(cfg.vendi_prompts, cfg.prompts)) for copy in range(1, 5)]
    jobs = [*((i, 0) for i in range(cfg.prompts)), *further]
    others = {(i, copy): another(clips[i], named[i], cfg.captions, ELSEWHERE + copy, i) for i, copy in jobs}
    psnrs = []

    def render(jobs):
        return shapes.render_batch([others[job] for job in jobs])

    @torch.no_grad()
    def encode_and_decode(jobs):
        video = render(jobs).to(cfg.device, memory_format=torch.channels_last_3d)
        with autocast(cfg.precision, cfg.device):
            copies = vae.decode(vae.encode(video)).clamp(-1, 1)
        psnrs.append(psnr(copies, video).cpu())
        return copies

    rows, style = [], "" if cfg.captions == "train" else f", {cfg.captions}"
    for label, draw in (("rendered clips", render), ("the VAE's copies", encode_and_decode)):
        row = {"label": label + style, "steps": None, "nfe": None}
        rows.append(measurements(row, cfg, evaluator, reference, draw, further, prompts, named))
    scores = torch.cat(psnrs).sort().values
    rows[1] |= {"psnr": scores.mean().item(), "psnr_worst_tenth": scores[: max(1, len(scores) // 10)].mean().item()}
    return rows


def another(clip, named, style, seed, index):
    """A further clip that the caption of `clip` describes, which names the factors `named`, {factor: value}.

    Captions of style "train" name factors at random. The others name certain factors wherever they are seen: there
    silence says something too, and the further clip must have the same caption.
    """
    rng = random.Random(f"another {seed} {index}")
    if named == clip.visible():  # all but where the scene's texture begins
        return replace(clip, offset=rng.choice(shapes.OFFSETS))
    while True:
        other = shapes.Clip.at_random(rng)
        if other.relation and "object2" in named:  # any two objects go with the rest: no need to wait for both
            other = replace(other, object=named["object"], object2=named["object2"])
        shown = named.items() <= other.visible().items()
        if shown and (style == "train" or shapes.caption(other, style)[1] == named):
            return other


def measurements(row, cfg, evaluator, reference, draw, further, prompts, named):
    """The row and all that is measured of its videos draw(jobs), one a prompt; for the diversity also of `further`."""
    flow = rewards.make("dynamic_degree")  # of the most moving twentieth of the pixels; VBench's threshold is 1
    asked = {name: rewards.make(name, device=cfg.device) for name in cfg.rewards}

    def measure(video, jobs):
        measured = {"identity": evaluator.keeps_its_object(video), "motion": flow(video.cpu())}
        captions = [prompts[i] for i, _ in jobs]
        measured |= {name: reward(video, captions).cpu() for name, reward in asked.items()}
        return measured | (dimensions.quality(evaluator, video) if cfg.dimensions else {})

    read = evaluator.read([(i, 0) for i in range(cfg.prompts)], draw, "drawing and reading", measure)
    named, measured = [named[i] for i, _ in read["jobs"]], read["measured"]
    if len(named) < 20:
        raise UserError(f"{read['broken']} of {cfg.prompts} videos are not finite: these weights are broken")
    row |= {"broken": read["broken"]} | accuracy(read["beliefs"], named) | likeness(read["features"], reference)
    single = torch.tensor(["relation" not in names for names in named])
    row["identity"] = mean_error(measured["identity"][single])
    row["motion"] = mean_error(measured["motion"])
    row["rewards"] = {name: mean_error(measured[name]) for name in asked}
    if further:
        others = evaluator.read(further, draw, "diversity")
        features = torch.cat([read["features"], others["features"]])
        row["vendi"] = diversity(features, [i for i, _ in read["jobs"] + others["jobs"]])
    if cfg.dimensions:
        raw = measured | dimensions.semantic(read["beliefs"], named)
        row["dimensions"] = {d: mean_error(raw[d]) for d in vbench.DIMENSIONS}
        percent = {d: 100 * score["mean"] for d, score in row["dimensions"].items()}
        with contextlib.suppress(ValueError):  # too few prompts for some dimension
            row["totals"] = vbench.vbench_scores(percent, dimensions.RANGES)
    print(summary(row), flush=True)  # while the next is being drawn
    return row


def summary(row):
    """One row in a line."""
    scores = " ".join(f"{factor} {pm(row[factor], 100)}" for factor in (*MAIN, "main"))
    broken = f", {row['broken']} videos are not finite and left out" if row["broken"] else ""
    rewards = "".join(f", {name} {pm(score, 1, 3)}" for name, score in row["rewards"].items())
    return f"{row['label']} {row['steps'] or ''}: {scores}, frechet {pm(row['frechet'], 1, 2)}{rewards}{broken}"
