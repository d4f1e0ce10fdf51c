"""Algorithm 1: distil a guided many-step teacher into a few-step student, and tune it to a reward.

    python train.py                                                    # the small world, minutes on two CPU cores
    torchrun --nproc_per_node=8 train.py --preset dollar --teacher T --vae V --text T5 --data CACHE
    python train.py --resume --out runs/train                          # go on, to the bit
    python train.py export --out runs/train                            # the newest checkpoint's student as a file
    python train.py memory --preset dollar                             # what 1, 2, 4, 8 GPUs would hold
    python train.py trial --preset cogvideox-2b --rank 64 --iterations 20    # what it takes here, on random weights
    python train.py --rank 16                                          # student and fake score as adapters: one network
    python train.py --student weights/student.safetensors --reward jpeg_compressibility     # tune it to a reward

`algorithm_1` is the paper's listing; numbers after a hash are its lines. Three networks of one architecture take part:
the frozen teacher v_theta', the student G_theta and the fake score v_fake, both begun as copies of the teacher. The
student's average, a fourth, is what is exported. Every ablation of the paper is a flag. VSD's loss is no measure of
progress: look at score_gap (how far the two scores are apart on the student's samples), at the pictures, and in the
small world at what the judge reads.
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import common
import distributed
from common import Machine, UserError, autocast, open_log, opt, parse, run
from data import READERS, Ahead
from distributed import gradient_descent, sample_numbers
from dit import Prediction
from evals import tables
from evals.cost import so_far
from evals.progress import (
    PATIENCE,
    check_resumed,
    draw_teacher,
    export,
    finish,
    measure_reward,
    set_aside,
    show_progress,
    tensorboard,
)
from evals.trial import memory_table, trial
from losses import GRID, conjugate_velocity_loss, consistency_loss, lrm_loss, reward_loss, vsd_loss
from nets import build
from rewards import Moments
from schedule import denoiser, simulate, timesteps

T_RANGE = 20, 980  # the noise steps of VSD: 0.02 T to 0.98 T (section 3.3)
CLIP = 1.0  # the largest gradient norm; a larger gradient is scaled down to it
LRM_LR = 1e-3  # the learning rate of the latent reward model


@dataclass
class Config(Machine):
    preset: str = opt("shapes", "The defaults: shapes, dollar, cogvideox-2b or cogvideox-5b (PRESETS in train.py).")
    data: str = opt(
        "shapes", "The clips: shapes (rendered), a folder of captioned videos and images, or a cache made by data.py."
    )
    teacher: str = opt("weights/teacher.safetensors", "The teacher: a .safetensors file or a CogVideoX folder.")
    vae: str = opt(
        "weights/vae.safetensors", "Its VAE: a file or a CogVideoX folder. A cache asks for it with a reward."
    )
    text: str = opt("words", "Its text encoder: words (the small world's) or a T5 folder. A cache needs none.")
    out: str = opt("runs/train", "The folder for checkpoints, log, pictures and the student.")
    iterations: int = opt(40000, "The number of generator updates.")
    batch: int = opt(1, "The number of clips a rank takes in one forward.")
    global_batch: int = opt(
        0, "The clips of an update, over all ranks. 0: batch x ranks; with a reward, below 16, 7 times that."
    )
    seed: int = opt(0, "The seed of data and noise.")
    resume: bool = opt(False, "The run goes on from the newest checkpoint in --out.")
    # the objective, Eq. 16
    beta_vsd: float = opt(1.0, "The weight of variational score distillation (Eq. 10-13). 0 leaves it out.")
    beta_cd: float = opt(0.5, "The weight of consistency distillation (Eq. 6-7). 0 leaves it out.")
    beta_ft: float = opt(1.0, "The weight of the latent reward, standardised (Eq. 15), where there is a --reward.")
    ft_share: float = opt(1.0, "The reward's pull on a sample, as a share of VSD's. 0: beta_ft alone weighs it.")
    beta_kl: float = opt(0.0, "The weight of the distance to the student as it began (section 9). 0 leaves it out.")
    # the student
    student: str = opt("", "The student to go on from, as train.py wrote it. Empty: it begins as the teacher.")
    rank: int = opt(0, "The rank of the adapters that student and fake score are. 0: networks of their own.")
    steps: Literal[4, 2, 1] = opt(4, "The number of the student's sampling steps.")
    prediction: Prediction | None = opt(None, "The student's output. None: the teacher's.")  # noqa: RUF009
    generator_input: Literal["simulate", "data"] = opt("simulate", "Its input: its own samples, or noised data.")
    transition: Literal["renoise", "ddim"] = opt("renoise", "The way from one of its steps to the next.")
    ema: float = opt(0.999, "The decay of the student's average, which is what is exported. 0: the student itself.")
    lr: float | None = opt(None, "The learning rate of the student (AdamW). None: of LEARNING_RATES in train.py.")
    fake_lr: float | None = opt(None, "The learning rate of the fake score. None: the preset's.")
    # VSD
    w_vsd: float = opt(3.5, "The guidance of the real score (Eq. 9). Elsewhere guidance_scale = 1 + w.")
    vsd_weight: Literal["dmd", "score"] = opt("dmd", "The gradient's weight: normalised by sample, or the KL's own.")
    fake_updates: int = opt(5, "The number of fake-score updates a generator update.")
    fake_pull: float = opt(0.0, "The share of the student that the fake score takes over after these updates.")
    fake_warmup: int | None = opt(None, "The updates in which VSD waits for the fake score. None: 20 with --student.")
    # CD
    w_cd: float = opt(7.5, "The guidance of CD's teacher steps (Eq. 9).")
    m: int = opt(5, "The number of teacher steps between CD's two points.")
    cd_target: Literal["ema", "student", "teacher"] = opt("ema", "The network that gives CD's target, theta' of Eq. 6.")
    cd_loss: Literal["huber", "mse"] = opt("huber", "CD's distance.")
    # the reward
    reward: str = opt("none", "The reward: none, or a name of the table in docs/REWARDS.md.")
    reward_weights: str | None = opt(None, "The reward's file or folder of weights.")
    reward_frames: int | None = opt(None, "The number of frames an image reward looks at. None: all.")
    lrm_backbone: Literal["frames", "3d"] = opt("frames", "The backbone of a new LRM: a 2D CNN a frame, or a 3D CNN.")
    lrm_warmup: int = opt(25, "The iterations in which the LRM learns before the student listens to it.")
    lrm_labels: Literal["scalar", "parts"] | None = opt(
        None,
        "What the LRM learns: the reward, as in the paper, or its parts. None: parts, where there are any.",
    )
    lrm_updates: int = opt(16, "The LRM's updates an iteration: one on fresh labels, the others on kept ones.")
    reward_every: int = opt(100, "The iterations between measurements of the reward on fresh samples. 0: at the end.")
    reward_samples: int = opt(64, "The number of samples in a measurement.")
    # the machine
    shard: Literal["full", "hybrid", "none"] = opt("full", "The networks are split: over all ranks, in a node, or not.")
    checkpoint_activations: bool = opt(True, "Activations are computed again in the backward, to save memory.")
    cpu_offload: bool = opt(False, "Weights and optimizers stay in CPU memory.")
    save_every: int = opt(500, "The iterations between checkpoints, of which the newest two are kept.")
    sample_every: int = opt(500, "The iterations between pictures. 0: none, and no comparison at the end.")


# The field defaults are the paper's where it gives a value (section 4.1). The small world has some of its own: why of
# `transition`, `w_vsd` and `cd_target`, docs/RESULTS.md shows.
PRESETS = {
    "shapes": {
        "iterations": 130, "batch": 16, "ema": 0.95,
        "fake_updates": 2, "transition": "ddim", "w_vsd": 1.0, "w_cd": 2.0, "cd_target": "teacher",
        "checkpoint_activations": False, "save_every": 50, "sample_every": 50, "reward_every": 25,
    },
    **{name: {"teacher": "", "vae": "", "text": "", "data": ""} for name in ("dollar", "cogvideox-2b", "cogvideox-5b")},
}  # fmt: skip

# (student, fake score), of whole networks and of adapters. 2e-5 is the paper's; the adapters beside it have LightX2V's
# rates; the experiment `rank` compares those of the small world with others.
LEARNING_RATES = dict.fromkeys(PRESETS, ((2e-5, 2e-5), (1e-4, 2e-5))) | {"shapes": ((1e-4, 2e-4), (1e-3, 2e-3))}
BETAS = dict.fromkeys(PRESETS, (0.9, 0.999)) | {"shapes": (0.0, 0.99)}  # AdamW's, of student and fake score


def settled(cfg: Config) -> Config:
    """The flags, with those set whose default depends on others."""
    lr, fake_lr = LEARNING_RATES[cfg.preset][cfg.rank > 0]
    values = {"lr": lr, "fake_lr": fake_lr, "fake_warmup": 20 if cfg.student and cfg.beta_vsd else 0}
    return replace(cfg, **{name: value for name, value in values.items() if getattr(cfg, name) is None})


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def algorithm_1(cfg, ranks, nets, optimizers, accumulate=1, first=0):
    """Lines 5-20 (line 4 is `nets.build`), from iteration `first` on; a descent sums `accumulate` forwards.

    Yields after every iteration: step, the numbers of its log (this rank's means), whether every descent was made, and
    how many clips the true reward has scored on this rank.

    The listing descends twice for the student: lines 10-11 for VSD and CD, 18-19 for the reward. Here one backward of
    the weighted sum does both (Eq. 16), at half the forwards. It stands where the first of the two stands, so the
    student follows the LRM as the iteration before has left it, and the LRM's own update, lines 15-17, comes after.
    """
    of_batch, of_generator = flags_of(cfg, sample_batch), flags_of(cfg, generator_step)
    of_fake, of_lrm = flags_of(cfg, fake_score_step), flags_of(cfg, lrm_step)
    updates = range(cfg.fake_updates if nets.fake else 0)
    nets.clips = read_ahead(nets, ranks, accumulate, **flags_of(cfg, read_ahead))
    for step in range(first, cfg.iterations):  # 5
        batches = [sample_batch(nets, ranks, step, i, accumulate, **of_batch) for i in range(accumulate)]  # 6
        x_hats, numbers = generator_step(nets, ranks, optimizers, batches, step, **of_generator)  # 7-11, 18-19
        fakes = [fake_score_step(nets, ranks, optimizers, batches, x_hats, j, **of_fake) for j in updates]  # 12-14
        if cfg.fake_pull and nets.fake:  # not the paper's: LightX2V keeps the fake score near the student so
            average(nets.fake, nets.student, 1 - cfg.fake_pull)
        lrm, scored = lrm_step(nets, ranks, optimizers, batches, x_hats, **of_lrm) if nets.lrm else ({}, 0)  # 15-17
        made = all(finite(part) for part in (numbers, *fakes, lrm))
        fake = mean_of(fakes) | {"fake_norm": fakes[-1]["fake_norm"]} if fakes else {}
        yield step, numbers | fake | lrm, made, scored


def generator_step(
    nets, ranks, optimizers, batches, step, *, steps, generator_input, transition, beta_vsd, beta_cd, beta_ft, beta_kl,
    ft_share, w_vsd, vsd_weight, fake_warmup, w_cd, m, cd_target, cd_loss, lrm_warmup, ema,
):  # fmt: skip
    """Lines 7-11 and 18-19: one descent of theta on beta_vsd VSD + beta_cd CD + beta_ft FT (Eq. 16), and its average.

    Returns the student's samples, a batch of latents for each of `batches`, and the numbers of the log.
    """
    schedule, x_hats, parts = nets.schedule, [], []
    for batch in batches:
        x, text, losses, info = batch.x, batch.text, {}, {}
        student = denoiser(nets.student, schedule, text)
        with autocast(nets.precision, ranks.device):
            if nets.fake or nets.lrm or nets.frozen:
                x_hat, x_t, t = generate(nets, batch, 0, steps, generator_input, transition)  # 8
                x_hats.append(x_hat.detach())
            if nets.frozen:  # section 9: hold on to the student as it began
                with torch.no_grad():
                    before = denoiser(nets.frozen, schedule, text)(x_t, t)
                losses["kl"] = beta_kl * (x_hat - before).square().mean()
            if beta_vsd and step >= fake_warmup:  # 10: Eq. 10-13
                real = denoiser(nets.teacher, schedule, text, w_vsd, nets.null)
                fake = denoiser(nets.fake, schedule, text)
                t_vsd = batch.integers(*T_RANGE, "t")
                vsd, info = vsd_loss(x_hat, real, fake, schedule, t_vsd, batch.noise("vsd"), vsd_weight)
                losses["vsd"] = beta_vsd * vsd
            if beta_cd:  # 9-10: Eq. 6-7
                guided = denoiser(nets.teacher, schedule, text, w_cd, nets.null)
                theta = {"ema": nets.ema, "student": nets.student, "teacher": None}[cd_target]
                target = denoiser(theta, schedule, text) if theta else guided
                n = batch.integers(0, len(GRID) - 1 - m, "n")
                cd = consistency_loss(student, target, guided, schedule, x, n, batch.noise("cd"), m, loss=cd_loss)
                losses["cd"] = beta_cd * cd
            if nets.lrm and beta_ft and step >= max(lrm_warmup, fake_warmup):  # 19: Eq. 15
                estimate = partial(nets.latent_reward.estimate, text=text, captions=batch.captions)
                pull = None
                if "vsd" in losses:
                    vsd_pull = pulls(losses["vsd"], x_hat)  # (B,)
                    info["vsd_pull"] = vsd_pull.mean()
                    pull = ft_share * vsd_pull if ft_share else None
                losses["ft"] = beta_ft * reward_loss(estimate, x_hat, pull=pull)
                info["ft_pull"] = pulls(losses["ft"], x_hat).mean()
        if losses.keys() - {"kl"}:  # alone, the KL's gradient is rounding, of which AdamW would make full steps
            (sum(losses.values()) / len(batches)).backward()
        parts.append({name: value.item() for name, value in (losses | info).items()})
    numbers = mean_of(parts)
    norm = gradient_descent(nets.student, optimizers["student"], CLIP, ranks, finite(numbers))  # 11, 19
    if math.isfinite(norm):
        average(nets.ema, nets.student, ema)
    return x_hats, numbers | {"grad_norm": norm}


def fake_score_step(nets, ranks, optimizers, batches, x_hats, j, *, steps, generator_input, transition):
    """Lines 12-14: the fake score learns to denoise what the student makes, at whichever step, and without guidance.

    Section 4.1 has five of these for one of the student's. The first (j = 0) takes the generator's own samples x_hats,
    the others fresh ones. Returns the numbers of the log.
    """
    parts = []
    for batch, x_hat in zip(batches, x_hats):
        model = partial(nets.fake, text=batch.text)
        with autocast(nets.precision, ranks.device):
            if j:
                with torch.no_grad():
                    x_hat, *_ = generate(nets, batch, j, steps, generator_input, transition)
            t, eps = batch.integers(0, 999, "fake t", j), batch.noise("fake", j)  # 13
            prediction = nets.fake.config.prediction
            loss = conjugate_velocity_loss(model, nets.schedule, x_hat, t, eps, prediction)  # Eq. 4
        (loss / len(batches)).backward()
        parts.append({"fake": loss.item()})
    numbers = mean_of(parts)
    return numbers | {"fake_norm": gradient_descent(nets.fake, optimizers["fake"], CLIP, ranks, finite(numbers))}  # 14


def lrm_step(nets, ranks, optimizers, batches, x_hats, *, lrm_updates):
    """Lines 15-17: the latent reward model learns the true reward of decoded latents, real and generated (Eq. 14).

    Labels cost a decoding, so each is used again: of `lrm_updates` descents the first takes the fresh samples, the
    others what the buffer has kept. Returns the numbers of the log, and how many clips the true reward has scored: of a
    cache that keeps the rewards of its clips, the generated ones alone, where the LRM learns the number.
    """
    latent_reward, fresh, rewards, numbers, scored = nets.latent_reward, [], [], [], 0
    for batch, x_hat in zip(batches, x_hats):
        x, text = torch.cat([batch.x, x_hat]), torch.cat([batch.text, batch.text])  # 16: x~ = x u x^
        labels, means, found = label(nets, ranks, batch, x)
        nets.buffer.add(x, labels, text)
        fresh.append((x, labels, text))
        rewards.append(means)
        scored += found
    for j in range(lrm_updates):
        losses = []
        for i, batch in enumerate(batches):
            x, labels, text = fresh[i]
            if j and nets.buffer.count:
                seed = distributed.randint(2**62, (*batch.key, "kept", ranks.rank, i, j))
                x, labels, text = (kept.to(ranks.device) for kept in nets.buffer.sample(len(x), seed))
            loss = lrm_loss(nets.lrm, x, latent_reward.target(labels), text if latent_reward.reads_text else None)
            (loss / len(batches)).backward()
            losses.append({"lrm": loss.item()})
        loss = mean_of(losses)
        norm = gradient_descent(nets.lrm, optimizers["lrm"], CLIP, ranks, finite(loss))  # 17
        numbers.append(loss | {"lrm_norm": norm})
    norm = {"lrm_norm": mean_of(numbers)["lrm_norm"]}  # NaN where one of the descents was left out
    return numbers[0] | norm | mean_of(rewards), scored


def label(nets, ranks, batch, x):
    """The true reward of latents x, real and generated (2B, C, T, h, w), as the LRM learns it: labels (2B, n).

    Keeps the running moments up to date. Returns the labels, the mean reward of the generated and of the real ones in
    its own units, and how many clips the true reward has scored.
    """
    latent_reward, half = nets.latent_reward, len(batch.x)
    known = batch.reward is not None and not latent_reward.parts
    unknown, captions = (x[half:], batch.captions) if known else (x, batch.captions * 2)
    with torch.no_grad(), autocast(nets.precision, ranks.device):
        pixels = [nets.vae.decode(z).clamp(-1, 1) for z in unknown.split(half)]  # half at a time: this is large
    found = latent_reward.labels(torch.cat(pixels), captions)
    labels = torch.cat([batch.reward.to(found).view(half, -1), found]) if known else found  # (2B, n)
    scores = latent_reward.scores(labels, batch.captions * 2)
    latent_reward.moments.update(scores, ranks)
    means = {"reward": scores[half:].mean().item(), "reward_real": scores[:half].mean().item()}
    return labels, means, len(found)


# ---------------------------------------------------------------------------------------------------------------------
# what its lines call


def flags_of(cfg, function):
    """The flags that are called like arguments of a function."""
    return {name: value for name, value in vars(cfg).items() if name in signature(function).parameters}


@dataclass
class Batch:
    """This rank's part of a batch, and the random numbers that belong to it.

    They follow from (seed, step, what they are for, a sample's number in the global batch): any number of ranks has the
    same.
    """

    x: torch.Tensor  # (B, C, T, h, w), the clips' latents in float32
    text: torch.Tensor  # (B, L, D)
    captions: list[str]
    reward: torch.Tensor | None  # (B,), where a cache keeps it
    key: tuple[int, int]  # seed, step
    numbers: list[int]  # of the samples in the global batch

    def noise(self, *name):
        """Standard normal, like x."""
        return distributed.normal(self.x.shape[1:], (*self.key, *name), self.numbers, self.x.device)

    def integers(self, low, high, *name):
        """Uniform in low..high, both included: int64 (B,)."""
        count = high - low + 1
        values = [low + distributed.randint(count, (*self.key, *name, number)) for number in self.numbers]
        return torch.tensor(values, device=self.x.device)


def read_ahead(nets, ranks, accumulate, *, seed, batch, data, iterations):
    """Line 6's reading of clips, in other threads: part k = step * accumulate + micro of all parts of this rank."""

    def read(k):
        step, micro = divmod(k, accumulate)
        chosen = nets.data.at(seed, step, batch * ranks.size * accumulate)
        return nets.data.batch([chosen[n] for n in sample_numbers(ranks, micro, batch)], step)

    return Ahead(read, 0 if data == "shapes" else READERS, iterations * accumulate)  # a rendered clip waits for no file


def sample_batch(nets, ranks, step, micro, accumulate, *, seed, batch):
    """Line 6: (c, i) ~ D, x = Encoder(i); the part `micro` of `accumulate` of it."""
    clips = nets.clips(step * accumulate + micro)
    if isinstance(clips, tuple):  # not from a cache
        video, captions = clips
        with torch.no_grad(), autocast(nets.precision, ranks.device):
            latents = nets.vae.encode(video.to(ranks.device))
        clips = {"latents": latents, "text": nets.encoder.encode(captions), "captions": captions, "reward": None}
    x, text = clips["latents"].float().to(ranks.device), clips["text"].to(ranks.device)
    return Batch(x, text, clips["captions"], clips["reward"], (seed, step), sample_numbers(ranks, micro, batch))


def generate(nets, batch, j, steps, generator_input, transition):
    """Line 8: x_hat = G(c, eps), with gradient through one of the student's steps alone; and the x_t and t it began at.

    j: 0, 1, ... of the same batch have steps and noise of their own.
    """
    nodes = timesteps(steps)
    k = distributed.randint(len(nodes), (*batch.key, "k", j))  # alike on all ranks: it decides how many calls
    student, t = denoiser(nets.student, nets.schedule, batch.text), nodes[k]
    if generator_input == "data":
        x_t = nets.schedule.add_noise(batch.x, batch.noise("data", j), t)
    else:
        renoise = lambda i: batch.noise("renoise", j, i)
        x_t = simulate(student, nets.schedule, batch.noise("start", j), nodes, k, renoise, transition)
    return student(x_t, t), x_t, t


@torch.no_grad()
def average(ema, model, decay):
    """decay * ema + (1 - decay) * model, parameter by parameter."""
    old, new = (list(network.parameters()) for network in (ema, model))
    torch._foreach_lerp_(old, new, 1 - decay)


def pulls(loss, x):
    """The norm of a loss's gradient with respect to each sample of x: (B,)."""
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    return gradient.flatten(1).norm(dim=1)


def mean_of(parts):
    """[{name: number}, ...] -> {name: its mean}."""
    return {name: sum(part[name] / len(parts) for part in parts) for name in parts[0]}


def finite(numbers):
    return all(math.isfinite(number) for number in numbers.values())


# ---------------------------------------------------------------------------------------------------------------------
# a run


def train(cfg: Config, ranks) -> None:
    """What stands around Algorithm 1: resuming, the log, measurements, pictures, checkpoints, and an end in order."""
    cfg = settled(cfg)
    nets, out = build(cfg, ranks), Path(cfg.out)
    optimizers = adam(nets, cfg.lr, cfg.fake_lr, BETAS[cfg.preset])
    forward = cfg.batch * ranks.size  # clips
    usual = 7 if nets.lrm and forward < 16 else 1  # section 4.1
    accumulate = cfg.global_batch // forward or usual
    going_on = cfg.resume or distributed.restarted(ranks)
    if not going_on:
        set_aside(out / "checkpoints", ranks)
    checkpoints = distributed.Checkpoints(out / "checkpoints")
    stopper = distributed.Stopper(ranks)
    # seconds of training, evaluations of the reward, updates left out, measurements of the reward
    state = {"step": 0, "trained": 0.0, "evaluated": 0, "skipped": 0, "watched": []}
    if going_on and (newest := checkpoints.newest()):
        check_resumed(newest, asdict(cfg), nets, ranks)
        saved = checkpoints.load(newest, nets.modules, optimizers, nets.buffer)
        state = {name: saved[name] for name in state}
        if nets.lrm:
            nets.latent_reward.moments = Moments(**saved["moments"])

    def save(wait):
        about = {"config": asdict(cfg), "student": asdict(nets.student.config), "about": nets.about}
        about |= {"moments": nets.lrm and asdict(nets.latent_reward.moments), **state}
        checkpoints.save(state["step"], nets.modules, optimizers, about, wait, nets.buffer)

    first = state["step"]
    in_a_row = 0
    teacher_videos = draw_teacher(nets, cfg.batch) if cfg.sample_every else None  # a GPU too small for it tells now
    log, board = (open_log(out / "log.jsonl", first), tensorboard(out, first)) if ranks.main else (None, None)
    begun = last = time.time()
    iterations = algorithm_1(cfg, ranks, nets, optimizers, accumulate, first)
    bar = tqdm(iterations, initial=first, total=cfg.iterations, disable=not ranks.main, dynamic_ncols=True)
    for step, mine, made, scored in bar:
        numbers = distributed.means(mine, ranks)
        took, ending = time.time() - last, stopper()
        in_a_row = 0 if made else in_a_row + 1
        state["step"] = done = step + 1
        state["trained"] += took
        state["evaluated"] += scored * ranks.size
        state["skipped"] += not made
        final = done == cfg.iterations
        if nets.lrm and (final or (cfg.reward_every and step % cfg.reward_every == 0)):
            how = cfg.steps, cfg.reward_samples, cfg.batch, cfg.lrm_warmup
            numbers |= measure_reward(nets, ranks, state["watched"], step, *how)
        shown = cfg.sample_every and done % cfg.sample_every == 0 and not ending
        stuck = in_a_row >= PATIENCE
        leaving = stuck or ending or final
        if done % cfg.save_every == 0 or leaving:  # before the pictures, which may fail
            save(wait=shown or leaving)
        if shown:
            numbers |= show_progress(nets, ranks, out, done, teacher_videos, cfg.steps, cfg.batch)
        if ranks.main:
            numbers = {name: round(value, 6) for name, value in numbers.items()} | {"skipped": state["skipped"]}
            numbers |= {"reward_evaluations": state["evaluated"]} if nets.lrm else {}
            speed = {"iteration_s": took, "samples_s": forward * accumulate / took}
            speed |= {"trained_s": state["trained"], "peak_gib": so_far(ranks.device) / 2**30}
            speed = {name: round(value, 3) for name, value in speed.items()}
            bar.set_postfix({name: f"{v:.3g}" for name, v in (numbers | speed).items()})
            print(json.dumps({"step": step, **speed, **numbers}), file=log, flush=True)
            for name, value in (numbers | speed).items() if board else ():
                board.add_scalar(name, value, step)
        if leaving:
            bar.close()  # before anything is said below it
        if stuck:  # a descent that was not finite has not touched its network
            raise UserError(f"{in_a_row} updates in a row were not finite: stopped, and saved in {out}")
        if ending:
            if ranks.main:
                print(f"stopped after step {done}, saved: go on with --resume --out {out}")
            return
        last = time.time()
    if ranks.main:
        print(f"waited for clips in {nets.clips.waited / (time.time() - begun):.1%} of the time")
    rows = finish(nets, ranks, out, asdict(cfg), cfg.steps, cfg.batch, teacher_videos)
    if rows:
        tables.save(replace(cfg, out=str(out / "compare.json")), "compared", rows=rows)


def adam(nets, lr, fake_lr, betas):
    """An optimizer for each network that learns; fused, for with sharded parameters all else is slow."""
    fused = nets.device.type != "meta"  # where nothing is computed
    flags = {"student": (lr, betas), "fake": (fake_lr, betas), "lrm": (LRM_LR,)}
    made = {}
    for name, rates in flags.items():
        if name in nets.modules:
            made[name] = torch.optim.AdamW(nets.modules[name].parameters(), *rates, fused=fused)
    return made


def main():
    word = sys.argv[1] if sys.argv[1:2] in (["export"], ["memory"], ["trial"]) else ""
    cfg = parse(Config, sys.argv[1 + bool(word) :], __doc__, PRESETS)
    if word == "export":
        return export(Path(cfg.out))
    if word == "memory":
        return print(memory_table(cfg))
    common.start(cfg)
    ranks = distributed.start(cfg.device)
    if word == "trial":
        trial(cfg, ranks)
    else:
        with common.claimed(cfg.out) if ranks.main else contextlib.nullcontext():
            train(cfg, ranks)
    distributed.stop()


if __name__ == "__main__":
    run(main)
