"""Algorithm 1: distil a guided many-step teacher into a few-step student, and tune it to a reward.

    python train.py                                                    # the small world, minutes on two CPU cores
    torchrun --nproc_per_node=8 train.py --preset dollar --teacher T --vae V --text T5 --data CACHE
    python train.py --resume --out runs/train                          # go on, to the bit
    python train.py export --out runs/train                            # the newest checkpoint's student as a file
    python train.py memory --preset dollar                             # what 1, 2, 4, 8 GPUs would hold
    python train.py --student weights/student.safetensors --reward jpeg_compressibility     # tune it to a reward
    python train.py --tune teacher --reward jpeg_compressibility                            # or its teacher (7.2)

The loop in `train` stands beside the paper's listing, line by line. Three networks of one architecture take part: the
frozen teacher v_theta', the student G_theta and the fake score v_fake, both begun as copies of the teacher. Every
ablation of the paper is a flag. VSD's loss is no measure of progress: look at score_gap (how far the two scores are
apart on the student's samples), at the pictures, and in the small world at what the judge reads.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import checkpoint
import cli
import distributed
import watch
from cli import Machine, UserError, open_log, opt, parse, run
from cost import so_far
from data import Ahead, fingerprint
from dit import Prediction
from losses import GRID, conjugate_velocity_loss, consistency_loss, lrm_loss, reward_loss, vsd_loss
from nets import Nets, build, memory_table
from progress import check_resumed, export, few, finish, look, sampler, set_aside, tensorboard, write_student
from rewards import Moments
from schedule import denoise, simulate, timesteps


@dataclass
class Config(Machine):
    preset: str = opt("shapes", "the values of one world")
    data: str = opt("shapes", "shapes (rendered), a folder of captioned videos and images, or a cache made by data.py")
    caption_column: str = opt("text", "of a folder: the captions' column in metadata.jsonl, .csv or .parquet")
    workers: int = opt(4, "threads that decode or render the clips of the coming batches (0: none ahead)")
    teacher: str = opt("weights/teacher.safetensors", "the teacher: a .safetensors file or a CogVideoX folder")
    vae: str = opt("weights/vae.safetensors", "its VAE: a file or a CogVideoX folder; with a cache for pictures alone")
    text: str = opt("words", "its text encoder: words (the small world's) or a T5 folder; with a cache to compare")
    out: str = opt("runs/train", "folder for checkpoints, logs, pictures and the student")
    iterations: int = opt(40000, "generator updates")
    batch: int = opt(1, "clips a rank and forward")
    global_batch: int = opt(0, "clips an update over all ranks, by accumulation (0: batch x ranks, with a reward x 7)")
    seed: int = opt(0, "seed of data and noise")
    resume: bool = opt(False, "go on from the newest checkpoint in --out")
    # the objective, Eq. 16
    beta_vsd: float = opt(1.0, "weight of variational score distillation (Eq. 10-13); 0 leaves it out")
    beta_cd: float = opt(0.5, "weight of consistency distillation (Eq. 6-7); 0 leaves it out")
    beta_ft: float = opt(1.0, "weight of the latent reward, standardised (Eq. 15), where there is a --reward")
    beta_kl: float = opt(0.0, "weight of the distance to the student as it began (section 9); 0 leaves it out")
    # the student
    tune: Literal["student", "teacher"] = opt("student", "teacher: with Eq. 4 in place of VSD and CD (section 7.2)")
    student: str = opt("", "go on from this student, as train.py wrote it (none: begin as the teacher)")
    steps: Literal[4, 2, 1] = opt(4, "sampling steps of the student")
    prediction: Prediction | None = opt(None, "the student's output (none: the teacher's)")  # noqa: RUF009
    generator_input: Literal["simulate", "data"] = opt("simulate", "its input: its own samples, or noised data")
    transition: Literal["renoise", "ddim"] = opt("renoise", "from one of the student's steps to the next")
    ema: float = opt(0.999, "decay of the student's average: CD's target, and what is exported (0: the student itself)")
    lr: float = opt(2e-5, "learning rate of the student (AdamW)")
    fake_lr: float = opt(2e-5, "learning rate of the fake score")
    lrm_lr: float = opt(1e-3, "learning rate of the latent reward model")
    beta1: float = opt(0.9, "AdamW's first beta, of student and fake score")
    beta2: float = opt(0.999, "AdamW's second beta")
    clip: float = opt(1.0, "largest gradient norm")
    # VSD
    w_vsd: float = opt(3.5, "guidance of the real score (Eq. 9); elsewhere guidance_scale = 1 + w")
    vsd_weight: Literal["dmd", "score"] = opt("dmd", "normalise each sample, or the KL's own weight a^2/b^2")
    t_min: int = opt(20, "least noise step of the scores")
    t_max: int = opt(980, "largest noise step of the scores")
    fake_updates: int = opt(5, "fake-score updates a generator update")
    fake_warmup: int = opt(0, "iterations in which the fake score learns before the student listens to it")
    # CD
    w_cd: float = opt(7.5, "guidance of CD's teacher steps")
    m: int = opt(5, "teacher steps between CD's two points")
    cd_target: Literal["ema", "student", "teacher"] = opt("ema", "who gives CD's target: theta' of Eq. 6")
    cd_loss: Literal["huber", "mse"] = opt("huber", "CD's distance")
    # reward
    reward: str = opt("none", "a reward of rewards.py, or several: hpsv2=1,agreement=2")
    reward_weights: str | None = opt(None, "file or folder of the reward's weights; of several NAME=PATH,NAME=PATH")
    reward_frames: int | None = opt(None, "frames an image reward looks at (none: all)")
    lrm_warmup: int = opt(0, "iterations in which the LRM learns before the student listens to it")
    lrm: str = opt("", "begin with this LRM, the lrm.safetensors of a run with the same reward")
    lrm_frozen: bool = opt(False, "and leave it as it is")
    lrm_backbone: Literal["frames", "3d"] = opt("frames", "of a new LRM: frame by frame, or a 3D CNN for motion")
    reward_every: int = opt(100, "iterations between measurements of the reward on fresh samples (0: at the end)")
    reward_samples: int = opt(64, "samples of a measurement")
    reward_repeats: int = opt(1, "of these, samples of each prompt; from 2 on LRMs are also compared within prompts")
    stop_on_overoptimisation: bool = opt(False, "save and stop at a sign of over-optimisation (see watch.py)")
    # the machine
    max_seconds: int = opt(0, "end after so many seconds of training, measurements left out (0: --iterations alone)")
    max_evaluations: int = opt(0, "end after so many evaluations of the reward (0: --iterations alone)")
    shard: Literal["full", "hybrid", "none"] = opt("full", "of the networks over the ranks (see distributed.py)")
    checkpoint_activations: bool = opt(True, "compute activations again in the backward, to save memory")
    cpu_offload: bool = opt(False, "keep weights and optimizers in CPU memory")
    save_every: int = opt(500, "iterations between checkpoints")
    keep_last: int = opt(2, "newest checkpoints kept")
    keep_every: int = opt(0, "also keep those of every so many iterations")
    sample_every: int = opt(500, "iterations between pictures (0: no pictures, not even at the end)")
    patience: int = opt(5, "updates in a row that may be skipped because they are not finite")
    judged: int = opt(0, "prompts on which the end compares student and teacher (the small world)")


PRESETS = {  # the field defaults are the paper's (section 4.1); the small world's were measured, see README
    "shapes": {
        "iterations": 130, "batch": 16, "lr": 1e-4, "fake_lr": 2e-4, "beta1": 0.0, "beta2": 0.99, "ema": 0.95,
        "fake_updates": 2, "w_vsd": 2.0, "w_cd": 2.0, "checkpoint_activations": False, "save_every": 50,
        "sample_every": 50, "judged": 640, "reward_every": 25,
    },
    **{name: {"teacher": "", "vae": "", "text": "", "data": ""} for name in ("dollar", "cogvideox-2b", "cogvideox-5b")},
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def iterate(cfg: Config, world, nets: Nets, optimizers, step, accumulate):
    """One iteration, lines 5-20. Returns the numbers for the log, and whether every update was finite and made."""
    student, teacher, fake, lrm, schedule = nets.student, nets.teacher, nets.fake, nets.lrm, nets.schedule
    numbers, drawn, total = {}, [], cfg.batch * world.size * accumulate

    def generate(x, text, draw, whole, j):
        """x_hat = G(c, eps), line 8, with gradient through one of the student's steps alone; and its x_t and t."""
        steps = timesteps(cfg.steps)
        k = distributed.randint(len(steps), (cfg.seed, step, "k", j))  # alike on all ranks: it decides how many calls
        predict, t = denoiser(student, schedule, text), steps[k]
        if cfg.tune == "teacher":  # at any step, each sample at its own, as it was trained
            t = whole(0, 999, "t", j)
        if cfg.tune == "teacher" or cfg.generator_input == "data":
            x_t = schedule.add_noise(x, draw("data", j), t)
        else:
            noise = lambda i: draw("renoise", j, i)
            x_t = simulate(predict, schedule, draw("start", j), steps, k, noise, cfg.transition)
        return predict(x_t, t), x_t, t

    def update(name, loss_is_fine):
        """One optimizer step, on all ranks or on none."""
        distributed.average_gradients(nets.modules[name], world)
        norm = distributed.clip_gradients(nets.modules[name], cfg.clip)
        fine = not distributed.any_rank(not (loss_is_fine and math.isfinite(norm)), world)
        if fine:
            optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        return norm, fine

    # Update the generator with distillation and latent reward: one backward of the weighted sum (Eq. 16)
    for micro in range(accumulate):
        x, text, batch, draw, whole = batch_of(cfg, world, nets, step, micro, total)  # line 6
        loss = {}
        with cli.autocast(cfg.precision, world.device):
            drawing = cfg.beta_vsd or lrm or nets.frozen
            x_hat, x_t, t = generate(x, text, draw, whole, 0) if drawing else (x, x, 0)  # line 8
            if cfg.tune == "teacher":  # what it was trained with, Eq. 4
                some = torch.where(whole(0, 9, "drop")[:, None, None] > 0, text, nets.null)  # as in pretrain.py
                model = lambda x, t, text=some: student(x, t, text)
                loss["own"] = conjugate_velocity_loss(model, schedule, x, t, draw("data", 0), student.config.prediction)
            if nets.frozen:  # section 9
                with torch.no_grad():
                    before = denoiser(nets.frozen, schedule, text)(x_t, t)
                loss["kl"] = cfg.beta_kl * (x_hat - before).square().mean()
            if cfg.beta_vsd and step >= cfg.fake_warmup:  # Eq. 10-13
                real = denoiser(teacher, schedule, text, cfg.w_vsd, nets.null)
                t, fake_score = whole(cfg.t_min, cfg.t_max, "t"), denoiser(fake, schedule, text)
                vsd, info = vsd_loss(x_hat, real, fake_score, schedule, t, draw("vsd"), cfg.vsd_weight)
                loss["vsd"] = cfg.beta_vsd * vsd
                add(numbers, accumulate, score_gap=info["score_gap"], dropped=info["dropped"] * accumulate * world.size)
            if cfg.beta_cd:  # line 9, Eq. 6-7
                target = {"ema": nets.ema, "student": student, "teacher": teacher}[cfg.cd_target]
                guided = denoiser(teacher, schedule, text, cfg.w_cd, nets.null)
                goal = guided if target is teacher else denoiser(target, schedule, text)
                n, ours = whole(0, len(GRID) - 1 - cfg.m, "n"), denoiser(student, schedule, text)
                cd = consistency_loss(ours, goal, guided, schedule, x, n, draw("cd"), cfg.m, loss=cfg.cd_loss)
                loss["cd"] = cfg.beta_cd * cd
            if lrm and cfg.beta_ft and step >= cfg.lrm_warmup:  # line 19, Eq. 15
                loss["ft"] = cfg.beta_ft * reward_loss(lrm, x_hat, text if nets.reward.text else None)
        if loss.keys() - {"kl"}:  # alone, the KL's gradient is rounding, of which AdamW would make full steps
            (sum(loss.values()) / accumulate).backward()
        add(numbers, accumulate, **loss)
        drawn.append((x_hat.detach(), x, text, batch, draw, whole))
    numbers["grad_norm"], fine = update("student", all(math.isfinite(v) for v in numbers.values()))
    if fine:
        average(nets.ema, student, cfg.ema)

    # Update the fake score on the student's samples (lines 13-14, Eq. 4), section 4.1: five times
    for j in range(cfg.fake_updates if cfg.beta_vsd else 0):
        for x_hat, x, text, _, draw, whole in drawn:
            with cli.autocast(cfg.precision, world.device):
                if j:  # the first update takes the generator's own samples, the others fresh ones
                    with torch.no_grad():
                        x_hat = generate(x, text, draw, whole, j)[0]
                t, eps = whole(0, 999, "fake t", j), draw("fake", j)
                model = lambda x, t, text=text: fake(x, t, text)
                loss = conjugate_velocity_loss(model, schedule, x_hat, t, eps, fake.config.prediction)
            (loss / accumulate).backward()
            add(numbers, accumulate * cfg.fake_updates, fake=loss)
        numbers["fake_norm"], made = update("fake", math.isfinite(loss.item()))
        fine = made and fine

    # Train the latent reward model on real and generated latents (lines 16-17, Eq. 14)
    learns = lrm and not cfg.lrm_frozen
    for x_hat, x, text, batch, *_ in drawn if learns else []:
        with torch.no_grad(), cli.autocast(cfg.precision, world.device):
            both, known = torch.cat([x, x_hat]), batch["reward"]  # x~ = x u x^
            parts = (x_hat if known is not None else both).split(cfg.batch)  # pixels are what is large
            video = torch.cat([nets.vae.decode(part).float().clamp(-1, 1) for part in parts])
        each = nets.reward.each(video, batch["captions"] * (len(video) // len(x)))  # (2 B or B, R)
        add(numbers, 1, evaluations=len(each) * world.size)
        each = torch.cat([known.to(each).view(len(x), -1), each]) if known is not None else each
        nets.moments.update(each, world)
        true, words = nets.moments.standardise(each), torch.cat([text, text]) if nets.reward.text else None
        loss = lrm_loss(lrm, both, true, words)
        (loss / accumulate).backward()
        add(numbers, accumulate, lrm=loss, reward=nets.moments.natural(true[len(x) :]).mean())
    if learns:
        numbers["lrm_norm"], made = update("lrm", math.isfinite(loss.item()))
        fine = made and fine
    return numbers, fine


def train(cfg: Config, world) -> None:
    if cfg.tune == "teacher":
        if cfg.reward == "none" or cfg.student or cfg.prediction:
            raise UserError("--tune teacher needs a --reward, and no --student or --prediction")
        cfg = replace(cfg, beta_vsd=0.0, beta_cd=0.0)
    nets, out = build(cfg, world), Path(cfg.out)
    each = cfg.batch * world.size
    accumulate = cfg.global_batch // each if cfg.global_batch else 7 if nets.reward and each < 16 else 1
    optimizers, modules = adam(cfg, nets), nets.modules
    restarted = distributed.restarted(world)
    if not (cfg.resume or restarted):
        set_aside(out / "checkpoints", world)
    checkpoints = distributed.Checkpoints(out / "checkpoints", cfg.keep_last, cfg.keep_every)
    stopper, first, skipped, in_a_row = distributed.Stopper(world), 0, 0, 0
    trained, evaluated, watched = 0.0, 0, []  # seconds, evaluations of the reward, its measurements
    if cfg.resume or restarted:
        if newest := checkpoints.newest():
            check_resumed(newest, cfg, nets, world)
            extra = checkpoints.load(newest, modules, optimizers)
            first, trained, evaluated, skipped = (extra[k] for k in ("step", "trained", "evaluated", "skipped"))
            watched = extra["watched"]
            nets.moments = nets.reward and Moments(**extra["moments"])
            if world.main:
                print(f"going on from {newest}")
        elif cfg.resume:
            raise UserError(f"{out} holds no checkpoint: leave out --resume to start")

    def save(step, wait=False):
        about = {"config": asdict(cfg), "student": asdict(nets.student.config), "about": nets.about}
        about |= {"step": step, "trained": trained, "evaluated": evaluated, "skipped": skipped, "watched": watched}
        about["moments"] = nets.moments and asdict(nets.moments)
        checkpoints.save(step, modules, optimizers, about, wait)

    log, board = (open_log(out / "log.jsonl", first), tensorboard(out)) if world.main else (None, None)
    teachers = [None]  # its pictures are drawn once
    begun = last = time.time()
    every = range(first, cfg.iterations)
    bar = tqdm(every, initial=first, total=cfg.iterations, disable=not world.main, dynamic_ncols=True)
    for step in bar:
        numbers, fine = iterate(cfg, world, nets, optimizers, step, accumulate)
        numbers = distributed.means(numbers, world)
        in_a_row, skipped = (0, skipped) if fine else (in_a_row + 1, skipped + 1)
        took, ending = time.time() - last, stopper()
        trained, evaluated = trained + took, evaluated + int(numbers.pop("evaluations", 0))
        spent = 0 < cfg.max_seconds <= trained or 0 < cfg.max_evaluations <= evaluated
        final = step + 1 == cfg.iterations or distributed.any_rank(spent, world)
        if nets.reward and (final or (cfg.reward_every and step % cfg.reward_every == 0)):
            over = look_at_reward(cfg, world, nets, out, step, watched)
            numbers |= {name: value for name, value in watched[-1].items() if name != "step"}
            final = final or (over and cfg.stop_on_overoptimisation)
        if cfg.sample_every and (step + 1) % cfg.sample_every == 0 and not ending:
            numbers |= look(cfg, world, nets, out, step + 1, teachers)
        if world.main:
            numbers = {k: round(v, 6) for k, v in numbers.items()} | {"skipped": skipped}
            numbers |= {"reward_evaluations": evaluated} if nets.reward else {}
            speed = {"seconds": time.time() - begun, "iteration_s": took, "samples_s": each * accumulate / took}
            speed |= {"trained_s": trained, "peak_gib": so_far(world.device) / 2**30}
            speed = {k: round(v, 3) for k, v in speed.items()}
            bar.set_postfix({k: f"{v:.3g}" for k, v in (numbers | speed).items() if k != "seconds"})
            print(json.dumps({"step": step, **speed, **numbers}), file=log, flush=True)
            for name, value in (numbers | speed).items() if board else ():
                board.add_scalar(name, value, step)
        if in_a_row >= cfg.patience:
            save(step + 1, wait=True)  # none of the skipped updates has touched the weights
            raise UserError(
                f"{in_a_row} updates in a row were not finite: stopped, and saved the state before them in {out}"
            )
        if (step + 1) % cfg.save_every == 0 or ending or final:
            save(step + 1, wait=ending or final)
        if ending:
            if world.main:
                print(f"stopped after step {step + 1}, saved: go on with --resume --out {out}")
            return
        if final:
            break
        last = time.time()
    if world.main and nets.clips:
        print(f"waited for clips in {nets.clips.waited / (time.time() - begun):.1%} of the time")
    if nets.lrm and world.main:
        about = {"reward": cfg.reward, "moments": asdict(nets.moments), "vae": fingerprint(nets.vae)}
        checkpoint.save_model(out / "lrm.safetensors", nets.lrm, **about, text_fingerprint=nets.encoder.fingerprint)
    finish(cfg, world, nets, out)


# ---------------------------------------------------------------------------------------------------------------------
# its parts


def look_at_reward(cfg, world, nets, out, step, watched):
    """Measure the true reward of fresh samples (watch.py), keep the best state. -> the sign of over-optimisation."""
    who, heeded = sampler(cfg, nets, "student"), lambda: [w for w in watched if w["step"] >= cfg.lrm_warmup]
    some = nets.prompts, few(cfg), cfg.reward_samples, cfg.batch
    before = watch.overoptimised(heeded())
    found = watch.measure(who, nets.reward, *some, world, nets.lrm, nets.moments, cfg.reward_repeats)
    watched.append({"step": step} | found)
    over, best = watch.overoptimised(heeded()), max(watched, key=watch.worth)
    weights = distributed.gather(nets.ema) if best is watched[-1] else None
    if weights and world.main:
        write_student(out / "best", nets.student.config, weights, asdict(cfg), nets.about | {"step": step + 1})
    if over and not before and world.main:
        print(
            f"over-optimised at step {step}: {over}. The true reward is {watched[-1]['true_reward']:.4g}; "
            f"it was {best['true_reward']:.4g} at step {best['step']}: see {out}/best"
        )
    return over


def batch_of(cfg, world, nets, step, micro, total):
    """This rank's part of a batch. A sample's noise follows from (seed, step, its number in the global batch)."""
    accumulate = total // (cfg.batch * world.size)
    numbers_of = lambda micro: [(micro * world.size + world.rank) * cfg.batch + i for i in range(cfg.batch)]

    def make(k):  # in another thread, ahead of its update
        step, micro = divmod(k, accumulate)
        chosen = nets.data.at(cfg.seed, step, total)
        return nets.data.batch([chosen[i] for i in numbers_of(micro)], step)

    if nets.clips is None:  # rendered clips wait for no file
        nets.clips = Ahead(make, 0 if cfg.data == "shapes" else cfg.workers, cfg.iterations * accumulate)
    batch, numbers = nets.clips(step * accumulate + micro), numbers_of(micro)
    if isinstance(batch, tuple):  # not from a cache
        video, captions = batch
        with torch.no_grad(), cli.autocast(cfg.precision, world.device):
            x = nets.vae.encode(video.to(world.device))
        batch = {"latents": x, "text": nets.encoder.encode(captions), "captions": captions, "reward": None}
    shape = batch["latents"].shape[1:]  # of this batch: a cache has images too
    draw = lambda *key: distributed.normal(shape, (cfg.seed, step, *key), numbers, world.device)
    whole = lambda low, high, *key: torch.tensor(
        [low + distributed.randint(high - low + 1, (cfg.seed, step, *key, i)) for i in numbers], device=world.device
    )
    return batch["latents"].float().to(world.device), batch["text"].to(world.device), batch, draw, whole


def adam(cfg, nets):
    """An optimizer for each network that learns; fused where it can be: for sharded parameters all else is slow."""
    fused, betas = nets.device.type in ("cpu", "cuda"), (cfg.beta1, cfg.beta2)
    make = lambda name, lr, *betas: torch.optim.AdamW(nets.modules[name].parameters(), lr, *betas, fused=fused)
    hows = {"student": (cfg.lr, betas), "fake": (cfg.fake_lr, betas), "lrm": (cfg.lrm_lr,)}
    return {name: make(name, *how) for name, how in hows.items() if name in nets.modules}


def denoiser(model, schedule, text, w=0.0, null=None):
    """A network as the losses and samplers want it: f(x_t, t) -> x_0."""
    return lambda x, t: denoise(model, schedule, x, t, text, model.config.prediction, w, null)


def add(numbers, parts, **values):
    for name, value in values.items():
        numbers[name] = numbers.get(name, 0.0) + torch.as_tensor(value).detach().item() / parts


@torch.no_grad()
def average(ema, model, decay):
    ours, theirs = (list(m.parameters()) for m in (ema, model))
    torch._foreach_lerp_(ours, theirs, 1 - decay)


def main():
    word = sys.argv[1] if sys.argv[1:2] in (["export"], ["memory"]) else ""
    cfg = parse(Config, sys.argv[1 + bool(word) :], __doc__.splitlines()[0], PRESETS)
    if word:
        return export(Path(cfg.out)) if word == "export" else print(memory_table(cfg))
    cli.start(cfg)
    world = distributed.start(cfg.device)
    train(cfg, world)
    distributed.stop(world)


if __name__ == "__main__":
    run(main)
