"""The inputs of Algorithm 1: the autoencoder, the teacher (Eq. 4), and the judges that read what they draw.

    python pretrain.py vae      --out runs/vae       # the causal 3D VAE, on rendered clips
    python pretrain.py teacher  --out runs/teacher   # the teacher v_theta', on that VAE's latents
    python pretrain.py judge    --out runs/judge     # reads every factor; --kind attention: the rewarding one

All three run on the small world of shapes.py, in which data never ends. Each writes into --out: checkpoint.pt (what
--resume goes on from, to the bit), log.jsonl (a line every --log-every steps), a picture now and then, and at the end
one safetensors file that knows what it is and how it was made.
"""

import json
import math
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import dit
import vae3d
from common import (
    Machine,
    UserError,
    atomic,
    autocast,
    open_log,
    opt,
    parse,
    run,
    start,
    uses_bfloat16,
    warn_of_precision,
)
from data import fingerprint
from losses import conjugate_velocity_loss
from schedule import Schedule, ddim, denoise, timesteps
from text import WordTable
from video import write_grid
from world import shapes
from world.judge import Judge, JudgeConfig, slow_motion


@dataclass
class Config(Machine):
    out: str = opt("", "folder for checkpoints, logs and the final weights (default runs/NAME)")
    iterations: int = opt(0, "optimizer steps")
    batch: int = opt(0, "clips a step")
    lr: float = opt(0.0, "peak learning rate (Muon and AdamW; linear warm-up, cosine to zero)")
    warmup: int = opt(100, "steps of warm-up")
    seed: int = opt(0, "seed of weights, clips and noise")
    init: str = opt("", "weights to begin with (default: random ones)")
    resume: bool = opt(False, "go on from --out/checkpoint.pt")
    stop_at: int = opt(0, "leave after this step, to --resume later (0: at the end)")
    held_out: int = opt(0, "clips on which the result is measured")
    save_every: int = opt(200, "steps between checkpoints")
    log_every: int = opt(20, "steps between lines of log.jsonl")


@dataclass
class VAEConfig(Config):
    iterations: int = opt(3600, "optimizer steps")
    batch: int = opt(8, "clips a step")
    held_out: int = opt(256, "clips on which the result is measured")
    lr: float = opt(2e-3, "peak learning rate")
    images: int = opt(400, "first steps, on single frames alone: what is drawn before how it moves")
    kl: float = opt(0.01, "weight of the KL term in nats a pixel value, against the mean error of one")
    decoder_only: bool = opt(False, "leave the encoder of --init as it is: what was trained on its latents stays valid")
    object_weight: float = opt(4.0, "additional weight of the objects' pixels, fading to zero over the run")


@dataclass
class TeacherConfig(Config):
    vae: str = opt("weights/vae.safetensors", "the autoencoder")
    preset: str = opt("shapes", "size of the transformer, a name in dit.PRESETS")
    iterations: int = opt(12000, "optimizer steps")
    batch: int = opt(32, "clips a step")
    lr: float = opt(2e-3, "peak learning rate")
    clips: int = opt(16000, "clips encoded before training; their captions are drawn anew at every step")
    images: int = opt(2000, "first steps, on the middle frames of clips alone: what is drawn before how it moves")
    stills: int = opt(32000, "middle frames encoded before training")
    drop_text: float = opt(0.1, "share of captions left empty, for classifier-free guidance")
    ema: float = opt(0.999, "decay of the averaged weights, which are the ones kept")
    object_weight: float = opt(6.0, "additional weight of the objects' latents, fading to zero over the run")
    compile: bool = opt(False, "torch.compile the transformer: faster after a minute, needs a C++ compiler")


@dataclass
class JudgeRunConfig(Config):
    kind: Literal["conv", "attention"] = opt(
        "conv", "conv (the one that evaluates) or attention (the one that rewards)"
    )
    width: int = opt(16, "channels after the stem")
    iterations: int = opt(2200, "optimizer steps")
    batch: int = opt(32, "clips a step")
    held_out: int = opt(4096, "clips on which the result is measured")
    lr: float = opt(2e-3, "peak learning rate")


def clips(cfg: Config, step: int) -> list[shapes.Clip]:
    """The clips of one step: they follow from (seed, step) alone, so a resumed run sees what an unbroken one sees."""
    return [shapes.Clip.make(cfg.seed, step * cfg.batch + i) for i in range(cfg.batch)]


def noise_of(cfg: Config, step: int) -> torch.Generator:
    """The source of one step's noise: like its clips it follows from (seed, step) alone."""
    return torch.Generator().manual_seed(step + 1_000_000_000 * cfg.seed)


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights between layers, each as a matrix (out, in x kernel) that shares the memory of the parameter."""
    out = {}
    for name, p in trainable(model).items():
        hidden = any(part in name for part in ("blocks", "mid", "trunk", "mixer"))  # not the first and last layers
        if hidden and p.ndim > 1 and min(p.shape[0], p[0].numel()) >= 32:
            out[name] = as_matrix(p.data)
    return out


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    return (x if x.is_contiguous() else x.movedim(1, -1)).flatten(1)  # channels_last_3d has its channels in the end


def orthogonal(m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About U V^T where m = U S V^T: its singular values become 0.7 to 1.2, by five steps of Newton-Schulz in `dtype`.

    The coefficients are Keller Jordan's (Muon, 2024), made to lift small singular values as fast as can be.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m.to(dtype)
    x = x.T if m.shape[0] > m.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if m.shape[0] > m.shape[1] else x


class Optimizer:
    """Muon on the matrices, AdamW on all else.

    Muon steps along the nearest orthogonal matrix to the momentum, so that all directions of a weight learn alike, not
    just the strongest few. In its first 300 steps the small world's teacher needs about half as many as by AdamW alone.
    `torch.optim.Muon` does the same in bfloat16 alone, which is slow where there are no instructions for it. dtype: of
    the orthogonalisation.
    """

    def __init__(self, model: torch.nn.Module, lr: float, dtype: torch.dtype = torch.float32):
        self.named, self.matrices, self.dtype = trainable(model), matrices(model), dtype
        self.momentum = {name: torch.zeros_like(matrix) for name, matrix in self.matrices.items()}
        others = [p for name, p in self.named.items() if name not in self.matrices]
        self.adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for name, matrix in self.matrices.items():
            gradient, momentum = as_matrix(self.named[name].grad), self.momentum[name]
            momentum.lerp_(gradient, 0.05)
            direction = orthogonal(gradient.lerp(momentum, 0.95), self.dtype)  # Nesterov's
            matrix.mul_(1 - 0.01 * lr).add_(direction, alpha=-0.2 * lr * max(matrix.shape) ** 0.5)  # steps as AdamW's
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()

    def state_dict(self) -> dict:
        return {"momentum": self.momentum, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for name, momentum in self.momentum.items():
            momentum.copy_(state["momentum"][name])
        self.adamw.load_state_dict(state["adamw"])


def fit(cfg: Config, model: torch.nn.Module, loss_of, show, ema_decay: float = 0.0) -> torch.nn.Module:
    """Train `model` by loss_of(step) -> (loss, dict of numbers); show(model, step) now and then; returns the result.

    Exact resume: the state holds weights, average, optimizer and step, and all randomness follows from the step.
    """
    out = Path(cfg.out)
    if cfg.init:
        begun, _ = common.load_model(cfg.init, type(model))
        model.load_state_dict(begun.state_dict())
        model.config = begun.config
    optimizer = Optimizer(model, cfg.lr, torch.bfloat16 if uses_bfloat16(cfg.precision, cfg.device) else torch.float32)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first = 0
    state_file = out / "checkpoint.pt"
    if cfg.resume:
        if not state_file.exists():
            raise UserError(f"{state_file} does not exist: leave out --resume to start, or name the folder of a run")
        try:
            state = torch.load(state_file, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average, first = state["average"], state["step"]
            warn_of_precision(state["precision"], cfg.precision)
        except Exception as e:  # whatever half a file, or another network's, may bring about
            raise UserError(f"{state_file} is damaged or of another network ({str(e).splitlines()[0]})") from e

    def save(step):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
        state |= {"step": step, "precision": cfg.precision}
        with atomic(state_file) as part:
            torch.save(state, part)

    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, desc=out.name, dynamic_ncols=True)
    log, begun = open_log(out / "log.jsonl", first), time.time()
    for step in bar:
        rate = min(1.0, (step + 1) / cfg.warmup) * 0.5 * (1 + math.cos(math.pi * step / cfg.iterations))
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with autocast(cfg.precision, cfg.device):
            loss, numbers = loss_of(step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):  # of this step nothing is kept, the running statistics of a judge's norms neither
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            save(step)
            raise UserError(f"loss or gradient is not finite at step {step}: saved {state_file}, try a lower --lr")
        optimizer.step(cfg.lr * rate)
        with torch.no_grad():  # a short memory at first, or the average would keep the random beginning
            decay = min(ema_decay, (step + 1) / (step + 10)) if ema_decay else 0.0
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - decay) if v.is_floating_point() else average[k].copy_(v)
        if step % cfg.log_every == 0 or step == cfg.iterations - 1:
            numbers = {"loss": loss.item(), **numbers, "grad_norm": norm.item()}
            bar.set_postfix({k: f"{v:.3g}" for k, v in numbers.items()})
            log.write(json.dumps({"step": step, "seconds": round(time.time() - begun, 1), **numbers}) + "\n")
            log.flush()
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.stop_at:
            save(step + 1)
        if step + 1 == cfg.stop_at:
            print(f"stopped at step {cfg.stop_at}: go on with --resume --out {out}")
            sys.exit(0)
        if (step + 1) % (5 * cfg.save_every) == 0:
            model.eval()  # looking must leave no trace: a judge's norms would learn from what it is shown
            show(model, step + 1)
            model.train()
    save(cfg.iterations)
    model.load_state_dict(average)
    model.eval()
    show(model, cfg.iterations)
    return model


def made(cfg: Config) -> dict:
    """What a file of weights says of its own making."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "seed": cfg.seed,
        "steps_trained": cfg.iterations,
        "settings": asdict(cfg),
    }


def train_vae(cfg: VAEConfig) -> None:
    torch.manual_seed(cfg.seed)
    model = vae3d.VAE3D(vae3d.PRESETS["shapes"]).to(cfg.device, memory_format=torch.channels_last_3d)
    if cfg.decoder_only:
        if not cfg.init:
            raise UserError("--decoder-only needs the weights whose encoder is kept: name them with --init")
        model.encoder.requires_grad_(False)
    print(f"VAE: {sum(p.numel() for p in model.parameters()):,} parameters")

    def loss_of(step):
        if step < cfg.images or step % 8 == 0:  # many frames of as many clips cost what a few clips do
            frame = random.Random(f"frame {cfg.seed} {step}").randrange(shapes.FRAMES)
            video, mask = shapes.render(clips(replace(cfg, batch=6 * cfg.batch), step), frame, cfg.device)
        else:
            video, mask = shapes.render(clips(cfg, step), None, cfg.device)
        video = video.to(memory_format=torch.channels_last_3d)
        mean, logvar = model.moments(video)
        noise = torch.randn(mean.shape, generator=noise_of(cfg, step)).to(cfg.device)
        z = mean + (0.5 * logvar).exp() * noise
        error = model.decode(z * model.config.scaling_factor).float() - video
        weight = 1 + cfg.object_weight * (1 - step / cfg.iterations) * mask
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).float().sum() / video.numel()  # nats a pixel value
        loss = (weight * (error**2 + 0.1 * error.abs())).mean() + cfg.kl * kl
        return loss, {"psnr": psnr(error).mean().item(), "kl": kl.item()}

    held_out = shapes.render_batch([shapes.Clip.make(shapes.HELD_OUT, i) for i in range(6)])

    def show(model, step):
        with torch.no_grad():
            drawn = model.decode(model.encode(held_out.to(cfg.device))).cpu()
        rows = [v for pair in zip(held_out, drawn) for v in pair]
        write_grid(Path(cfg.out) / f"step{step:06d}.png", rows, frames=8)

    model = fit(cfg, model, loss_of, show)
    scores, latents = [], []
    with torch.no_grad():
        for i in range(max(1, cfg.held_out // 8)):
            video = shapes.render_batch([shapes.Clip.make(shapes.HELD_OUT, i * 8 + j) for j in range(8)]).to(cfg.device)
            latents.append(model.encode(video))
            scores.append(psnr(model.decode(latents[-1]) - video))
    scores = torch.cat(scores).sort().values
    # latents of unit variance are what the noise schedule expects; the factor is part of the weights from here on
    if not cfg.decoder_only:
        model.config.scaling_factor = model.config.scaling_factor / torch.cat(latents).std().item()
    results = {"psnr": scores.mean().item(), "psnr_worst_tenth": scores[: max(1, len(scores) // 10)].mean().item()}
    print(f"held-out clips: {results}")
    common.save_model(Path(cfg.out) / "vae.safetensors", model, torch.float16, **made(cfg), results=results)


def psnr(error: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise ratio in dB of each clip; error (B, 3, F, H, W) of pixels in [-1, 1]."""
    return -10 * ((error.float() / 2) ** 2).mean((1, 2, 3, 4)).log10()


def latent_mask(mask: torch.Tensor) -> torch.Tensor:
    """A clip's mask (B, 1, F, H, W) on its latents' grid (B, 1, 1 + F/4, H/8, W/8): the most that a cell's pixels show.

    The VAE's first latent frame is the first frame alone, each of the others stands for four frames.
    """
    if mask.shape[2] == 1:
        return F.max_pool3d(mask, (1, 8, 8))
    return torch.cat([F.max_pool3d(mask[:, :, :1], (1, 8, 8)), F.max_pool3d(mask, (4, 8, 8))], 2)


@torch.no_grad()
def encode_world(cfg: TeacherConfig, vae: vae3d.VAE3D) -> dict[str, torch.Tensor]:
    """What the teacher learns from, in bfloat16: "clips" (N, C, T, h, w) and "stills", middle frames (M, C, 1, h, w),
    of the clips 0..N-1 and 0..M-1, and "clips_mask", "stills_mask", those of their objects (., 1, T, h, w).

    They are kept beside the run, so that a resume has them.
    """
    file = Path(cfg.out) / "latents.safetensors"
    identity = {"vae": fingerprint(vae), "clips": cfg.clips, "stills": cfg.stills, "seed": cfg.seed}
    if file.exists():
        tensors, metadata = common.load_tensors(file)
        if metadata == identity:
            return tensors
    tensors = {}
    for name, n, frame, batch in (("clips", cfg.clips, None, 16), ("stills", cfg.stills, shapes.MIDDLE, 128)):
        latents, masks = [], []
        for i in tqdm(range(0, n, batch), desc=f"encoding {name}", dynamic_ncols=True):
            some = [shapes.Clip.make(cfg.seed, j) for j in range(i, min(i + batch, n))]
            video, mask = shapes.render(some, frame, cfg.device)
            with autocast(cfg.precision, cfg.device):
                latents.append(vae.encode(video.to(memory_format=torch.channels_last_3d)).to("cpu", torch.bfloat16))
            masks.append(latent_mask(mask).to("cpu", torch.bfloat16))
        tensors |= {name: torch.cat(latents), f"{name}_mask": torch.cat(masks)}
    common.save_tensors(file, tensors, identity)
    return tensors


def noise_steps(n: int, generator: torch.Generator) -> torch.Tensor:
    """Steps 0..999 of a batch (n,): half of them uniform, half about step 730, where words decide what is drawn.

    The second half is logit-normal (Esser et al. 2024). Each half takes one step from every equal part of its
    distribution: so the losses of batches differ less.
    """
    spread = lambda n: (torch.arange(n) + torch.rand(n, generator=generator)) / n
    where = torch.cat([spread(n - n // 2), torch.sigmoid(torch.special.ndtri(spread(n // 2)) + 1.0)])
    return (1000 * where).long().clamp(max=999)


def train_teacher(cfg: TeacherConfig) -> None:
    if cfg.preset not in dit.PRESETS:
        raise UserError(f"unknown --preset {cfg.preset!r}: choose from {', '.join(dit.PRESETS)}")
    vae, _ = common.load_model(cfg.vae, vae3d.VAE3D, cfg.device)
    vae = vae.to(memory_format=torch.channels_last_3d)
    world = {name: tensor.to(cfg.device) for name, tensor in encode_world(cfg, vae).items()}
    truth = [shapes.Clip.make(cfg.seed, i) for i in range(max(cfg.clips, cfg.stills))]
    model = dit.DiT(dit.PRESETS[cfg.preset])
    model.init_weights(cfg.seed)
    model.to(cfg.device)
    print(f"teacher: {sum(p.numel() for p in model.parameters()):,} parameters")
    words = WordTable(shapes.WORDS, model.config.text_dim, model.config.text_length)
    schedule, prediction = Schedule(model.config.schedule, model.config.snr_shift), model.config.prediction
    forward = torch.compile(model, dynamic=False) if cfg.compile else model

    def loss_of(step):
        rng, noise = random.Random(f"caption {cfg.seed} {step}"), noise_of(cfg, step)
        still = step < cfg.images or step % 8 == 0  # pictures stay in the mixture to the end
        name, batch = ("stills", 2 * cfg.batch) if still else ("clips", cfg.batch)
        index = torch.randint(len(world[name]), (batch,), generator=noise)
        prompts = [shapes.caption(truth[i], "train", rng, still)[0] for i in index]
        prompts = ["" if rng.random() < cfg.drop_text else p for p in prompts]
        index = index.to(cfg.device)
        x0 = world[name][index].float()
        t = noise_steps(batch, noise).to(cfg.device)
        eps = torch.randn(x0.shape, generator=noise).to(cfg.device)
        text = words.encode(prompts).to(cfg.device)
        weight = 1 + cfg.object_weight * (1 - step / cfg.iterations) * world[f"{name}_mask"][index].float()
        predict = lambda x, t: forward(x, t, text)
        return conjugate_velocity_loss(predict, schedule, x0, t, eps, prediction, weight), {}

    held_out = [shapes.Clip.make(shapes.HELD_OUT, i) for i in range(8)]
    prompts = [shapes.caption(c, "long")[0] for c in held_out]

    def show(model, step):
        text, null = words.encode(prompts).to(cfg.device), words.encode([""]).to(cfg.device)
        x = torch.randn(len(prompts), *world["clips"].shape[1:], generator=torch.Generator().manual_seed(0)).to(
            cfg.device
        )
        with torch.no_grad(), autocast(cfg.precision, cfg.device):
            predict = lambda x, t: denoise(model, schedule, x, t, text, prediction, w=2.0, null=null)
            video = vae.decode(ddim(predict, schedule, x, timesteps(25))).float().cpu()
        write_grid(Path(cfg.out) / f"step{step:06d}.png", list(video), prompts, frames=8)

    model = fit(cfg, model, loss_of, show, cfg.ema)
    about = {"kind": "teacher", "w": 2.0, "fps": shapes.FPS, "latents": list(world["clips"].shape[2:])}
    about |= {"text_fingerprint": words.fingerprint} | made(cfg)
    common.save_model(Path(cfg.out) / "teacher.safetensors", model, torch.float16, **about)


def train_judge(cfg: JudgeRunConfig) -> None:
    torch.manual_seed(cfg.seed)
    model = Judge(JudgeConfig(cfg.kind, cfg.width)).to(cfg.device, memory_format=torch.channels_last_3d)
    print(f"judge: {sum(p.numel() for p in model.parameters()):,} parameters")

    def loss_of(step):
        batch = clips(cfg, step)
        video = shapes.render_batch(batch).to(cfg.device, memory_format=torch.channels_last_3d)
        # a trace of noise and of blur: what it will judge comes out of a decoder, not out of the renderer
        noise = noise_of(cfg, step)
        strength = 0.04 * torch.rand(len(video), 1, 1, 1, 1, generator=noise)
        video = video + strength.to(cfg.device) * torch.randn(video.shape, generator=noise).to(cfg.device)
        blurred = F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        blur = (torch.rand(len(video), 1, 1, 1, 1, generator=noise) < 0.25).to(cfg.device)
        truth = torch.tensor([c.truth() for c in batch])
        for i in range(0, len(batch), 4):  # a quarter in slow motion, so that parts of a clip can be read as well
            first = int(torch.randint(0, shapes.FRAMES - 3, (), generator=noise))
            video[i] = slow_motion(video[i : i + 1, :, first : first + 4])[0]
            truth[i, [list(shapes.FACTORS).index(name) for name in ("size", "action", "camera")]] = -1
        truth = truth.to(cfg.device)
        return model.loss(torch.where(blur, blurred, video), truth), {}

    def accuracy(model, n):
        right = torch.zeros(len(shapes.FACTORS))
        asked = torch.zeros(len(shapes.FACTORS))
        for i in range(0, n, 32):
            batch = [shapes.Clip.make(shapes.HELD_OUT, j) for j in range(i, i + 32)]
            truth = torch.tensor([c.truth() for c in batch])
            with autocast(cfg.precision, cfg.device):
                read = model.read(shapes.render_batch(batch).to(cfg.device)).cpu()
            right += (read == truth).sum(0)
            asked += (truth >= 0).sum(0)
        return {name: round((r / a).item(), 4) for name, r, a in zip(shapes.FACTORS, right, asked)}

    model = fit(
        cfg, model, loss_of, lambda model, step: tqdm.write(f"{step} {accuracy(model, min(256, cfg.held_out))}"), 0.995
    )
    results = accuracy(model, cfg.held_out)
    print(f"held-out clips: {results}")
    common.save_model(Path(cfg.out) / "judge.safetensors", model, torch.float16, **made(cfg), results=results)


def main():
    jobs = {
        "vae": (VAEConfig, train_vae),
        "teacher": (TeacherConfig, train_teacher),
        "judge": (JudgeRunConfig, train_judge),
    }
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        raise UserError(f"say what to train: python pretrain.py {'|'.join(jobs)} (each has --help)")
    config, job = jobs[sys.argv[1]]
    cfg = parse(config, sys.argv[2:], __doc__)
    cfg.out = cfg.out or f"runs/{sys.argv[1]}"
    start(cfg)
    job(cfg)


if __name__ == "__main__":
    run(main)
