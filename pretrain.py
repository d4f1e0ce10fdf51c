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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
import dit
import vae3d
from common import Machine, UserError, autocast, opt, parse, run
from data import fingerprint
from losses import conjugate_velocity_loss
from schedule import Schedule, ddim, denoise, timesteps
from text import WordTable
from video import write_grid
from world import shapes
from world.judge import Judge, JudgeConfig, slow_motion


@dataclass
class Config(Machine):
    out: str = opt("", "The folder of checkpoints, logs and the final weights. Empty: runs/NAME.")
    iterations: int = opt(0, "The number of optimizer steps.")
    batch: int = opt(0, "The clips of a step.")
    lr: float = opt(
        2e-3, "The peak learning rate of Muon and AdamW, after a linear warm-up; a cosine takes it to zero."
    )
    warmup: int = opt(100, "The steps of warm-up.")
    seed: int = opt(0, "The seed of weights, clips and noise.")
    init: str = opt("", "The file of weights to begin with. None: random ones.")
    resume: bool = opt(False, "The run goes on from --out/checkpoint.pt.")
    save_every: int = opt(200, "The steps between checkpoints.")
    log_every: int = opt(20, "The steps between lines of log.jsonl.")


@dataclass
class VAEConfig(Config):
    iterations: int = opt(3600, "The number of optimizer steps.")
    batch: int = opt(8, "The clips of a step.")
    held_out: int = opt(256, "The clips on which the result is measured.")
    images: int = opt(400, "The first steps, on single frames alone: what is drawn before how it moves.")
    kl: float = opt(0.01, "The weight of the KL term in nats a pixel value, against the mean error of one.")
    object_weight: float = opt(4.0, "The additional weight of the objects' pixels, fading to zero over the run.")


@dataclass
class TeacherConfig(Config):
    vae: str = opt("weights/vae.safetensors", "The autoencoder.")
    iterations: int = opt(12000, "The number of optimizer steps.")
    batch: int = opt(32, "The clips of a step, or half its pictures.")
    clips: int = opt(16000, "The clips encoded before training; their captions are new at every step.")
    images: int = opt(2000, "The first steps, on the middle frames of clips alone: what is drawn before how it moves.")
    stills: int = opt(32000, "The middle frames encoded before training.")
    drop_text: float = opt(0.1, "The share of captions left empty, for classifier-free guidance.")
    ema: float = opt(0.999, "The decay of the averaged weights, which are the ones kept.")
    object_weight: float = opt(6.0, "The additional weight of the objects' latents, fading to zero over the run.")


@dataclass
class JudgeRunConfig(Config):
    kind: Literal["conv", "attention"] = opt(
        "conv", "The judge that evaluates is conv, the one that rewards attention."
    )
    width: int = opt(16, "The channels after the stem.")
    iterations: int = opt(2200, "The number of optimizer steps.")
    batch: int = opt(32, "The clips of a step.")
    held_out: int = opt(4096, "The clips on which the result is measured.")


def clips(seed: int, step: int, n: int) -> list[shapes.Clip]:
    """The n clips of one step, which follow from (seed, step): so a resumed run sees what an unbroken one sees."""
    return [shapes.Clip.make(seed, step * n + i) for i in range(n)]


def noise_of(seed: int, step: int) -> torch.Generator:
    """The source of one step's noise: like its clips it follows from (seed, step) alone."""
    return torch.Generator().manual_seed(step + 1_000_000_000 * seed)


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights between layers, each as a matrix (out, in x kernel) that shares the memory of the parameter."""
    out = {}
    for name, p in model.named_parameters():
        hidden = any(part in name for part in ("blocks", "mid", "trunk", "mixer"))  # not the first and last layers
        if hidden and p.ndim > 1 and min(p.shape[0], p[0].numel()) >= 32:
            out[name] = as_matrix(p.data)
    return out


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
        self.named, self.matrices, self.dtype = dict(model.named_parameters()), matrices(model), dtype
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


def fit(cfg: Config, model: torch.nn.Module, loss_of, pictures=None, ema_decay: float = 0.0) -> None:
    """Train `model` by loss_of(step) -> (loss, dict of numbers); at the end its weights are their moving average.

    pictures(): videos (3, F, H, W) and their captions, drawn now and then for who looks on.
    Exact resume: the state holds weights, average, optimizer and step, and all randomness follows from the step.
    """
    out = Path(cfg.out)
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters")
    if cfg.init:
        begun, _ = common.load_model(cfg.init, type(model))
        model.load_state_dict(begun.state_dict())
        model.config = begun.config  # a VAE's scaling factor is part of it
    half = common.uses_bfloat16(cfg.precision, cfg.device)
    optimizer = Optimizer(model, cfg.lr, torch.bfloat16 if half else torch.float32)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    first, state_file = 0, out / "checkpoint.pt"
    if cfg.resume:
        try:
            state = torch.load(state_file, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average, first = state["average"], state["step"]
            common.warn_of_precision(state["precision"], cfg.precision)
        except FileNotFoundError:
            raise UserError(f"{state_file} does not exist: leave out --resume, or name a run's --out") from None
        except Exception as e:  # whatever half a file, or another network's, may bring about
            raise UserError(f"{state_file} is damaged or of another network ({str(e).splitlines()[0]})") from e

    def show(step):
        if pictures:
            with torch.no_grad(), autocast(cfg.precision, cfg.device):
                videos, captions = pictures()
            write_grid(out / f"step{step:06d}.png", videos, captions, frames=8)

    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, desc=out.name, dynamic_ncols=True)
    log, begun = common.open_log(out / "log.jsonl", first), time.time()
    for step in bar:
        rate = min(1.0, (step + 1) / cfg.warmup) * 0.5 * (1 + math.cos(math.pi * step / cfg.iterations))
        with autocast(cfg.precision, cfg.device):
            loss, numbers = loss_of(step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise UserError(
                f"loss or gradient is not finite at step {step}: try a lower --lr, from the last checkpoint"
            )
        optimizer.step(cfg.lr * rate)
        with torch.no_grad():  # a short memory at first, or the average would keep the random beginning
            decay = min(ema_decay, (step + 1) / (step + 10)) if ema_decay else 0.0
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - decay) if v.is_floating_point() else average[k].copy_(v)
        done = step + 1
        if step % cfg.log_every == 0 or done == cfg.iterations:
            numbers = {"loss": loss.item(), **numbers, "grad_norm": norm.item()}
            bar.set_postfix({k: f"{v:.3g}" for k, v in numbers.items()})
            log.write(json.dumps({"step": step, "seconds": round(time.time() - begun, 1), **numbers}) + "\n")
            log.flush()
        if done % cfg.save_every == 0 or done == cfg.iterations:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            with common.atomic(state_file) as part:
                torch.save(state | {"step": done, "precision": cfg.precision}, part)
        if done % (5 * cfg.save_every) == 0:
            show(done)
    model.load_state_dict(average)
    model.eval()
    show(cfg.iterations)


def save(cfg: Config, model: torch.nn.Module, name: str, **about) -> None:
    """--out/NAME.safetensors, which says how it was made."""
    made = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "settings": asdict(cfg)}
    common.save_model(Path(cfg.out) / f"{name}.safetensors", model, torch.float16, **about | made)


def train_vae(cfg: VAEConfig) -> None:
    torch.manual_seed(cfg.seed)
    model = vae3d.VAE3D(vae3d.PRESETS["shapes"]).to(cfg.device, memory_format=torch.channels_last_3d)

    def loss_of(step):
        if step < cfg.images or step % 8 == 0:  # many frames of as many clips cost what a few clips do
            frame = random.Random(f"frame {cfg.seed} {step}").randrange(shapes.FRAMES)
            video, mask = shapes.render(clips(cfg.seed, step, 6 * cfg.batch), frame, cfg.device)
        else:
            video, mask = shapes.render(clips(cfg.seed, step, cfg.batch), None, cfg.device)
        video = video.to(memory_format=torch.channels_last_3d)
        mean, logvar = model.posterior(video)
        noise = torch.randn(mean.shape, generator=noise_of(cfg.seed, step)).to(cfg.device)
        z = mean + (0.5 * logvar).exp() * noise
        copy = model.decode(z * model.config.scaling_factor).float()
        error = copy - video
        weight = 1 + cfg.object_weight * (1 - step / cfg.iterations) * mask
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).float().sum() / video.numel()  # nats a pixel value
        loss = (weight * (error**2 + 0.1 * error.abs())).mean() + cfg.kl * kl
        return loss, {"psnr": vae3d.psnr(copy, video).mean().item(), "kl": kl.item()}

    def pictures():
        originals = shapes.render_batch(clips(shapes.HELD_OUT, 0, 6)).to(cfg.device)
        return [v.cpu() for pair in zip(originals, model.decode(model.encode(originals))) for v in pair], None

    fit(cfg, model, loss_of, pictures)
    scores, latents = [], []
    with torch.no_grad():
        for i in range(math.ceil(cfg.held_out / 8)):
            video = shapes.render_batch(clips(shapes.HELD_OUT, i, 8)).to(cfg.device)
            latents.append(model.encode(video))
            scores.append(vae3d.psnr(model.decode(latents[-1]), video))
    scores = torch.cat(scores).sort().values
    # latents of unit variance are what the noise schedule expects; the factor is part of the weights from here on
    model.config.scaling_factor = model.config.scaling_factor / torch.cat(latents).std().item()
    results = {"psnr": scores.mean().item(), "psnr_worst_tenth": scores[: max(1, len(scores) // 10)].mean().item()}
    print(f"held-out clips: {results}")
    save(cfg, model, "vae", results=results)


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
    vae, _ = common.load_model(cfg.vae, vae3d.VAE3D, cfg.device)
    vae = vae.to(memory_format=torch.channels_last_3d)
    world = {name: tensor.to(cfg.device) for name, tensor in encode_world(cfg, vae).items()}
    truth = clips(cfg.seed, 0, max(cfg.clips, cfg.stills))
    model = dit.DiT(dit.PRESETS["shapes"])
    model.init_weights(cfg.seed)
    model.to(cfg.device)
    words = WordTable(shapes.WORDS, model.config.text_dim, model.config.text_length)
    schedule, prediction = Schedule(model.config.schedule, model.config.snr_shift), model.config.prediction

    def loss_of(step):
        rng, noise = random.Random(f"caption {cfg.seed} {step}"), noise_of(cfg.seed, step)
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
        predict = lambda x, t: model(x, t, text)
        return conjugate_velocity_loss(predict, schedule, x0, t, eps, prediction, weight), {}

    prompts = [shapes.caption(clip, "long")[0] for clip in clips(shapes.HELD_OUT, 0, 8)]

    def pictures():
        text, null = words.encode(prompts).to(cfg.device), words.null.to(cfg.device)
        x = torch.randn(8, *world["clips"].shape[1:], generator=torch.Generator().manual_seed(0)).to(cfg.device)
        predict = lambda x, t: denoise(model, schedule, x, t, text, prediction, w=2.0, null=null)
        return list(vae.decode(ddim(predict, schedule, x, timesteps(25))).float().cpu()), prompts

    fit(cfg, model, loss_of, pictures, cfg.ema)
    about = {"kind": "teacher", "w": 2.0, "fps": shapes.FPS, "latents": list(world["clips"].shape[2:])}
    save(cfg, model, "teacher", **about, text_fingerprint=words.fingerprint)


def train_judge(cfg: JudgeRunConfig) -> None:
    torch.manual_seed(cfg.seed)
    model = Judge(JudgeConfig(cfg.kind, cfg.width)).to(cfg.device, memory_format=torch.channels_last_3d)

    def loss_of(step):
        batch = clips(cfg.seed, step, cfg.batch)
        video = shapes.render_batch(batch).to(cfg.device, memory_format=torch.channels_last_3d)
        # a trace of noise and of blur: what it will judge comes out of a decoder, not out of the renderer
        noise = noise_of(cfg.seed, step)
        strength = 0.04 * torch.rand(len(video), 1, 1, 1, 1, generator=noise)
        video = video + strength.to(cfg.device) * torch.randn(video.shape, generator=noise).to(cfg.device)
        blurred = F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        blur = (torch.rand(len(video), 1, 1, 1, 1, generator=noise) < 0.25).to(cfg.device)
        truth = torch.tensor([c.truth() for c in batch])
        for i in range(0, len(batch), 4):  # a quarter in slow motion, so that parts of a clip can be read as well
            start = torch.randint(-4, shapes.FRAMES + 1, (), generator=noise)
            first = int(start.clamp(0, shapes.FRAMES - 4))  # often the first or the last four frames
            video[i] = slow_motion(video[i : i + 1, :, first : first + 4])[0]
            truth[i, [list(shapes.FACTORS).index(name) for name in ("size", "action", "camera")]] = -1
        truth = truth.to(cfg.device)
        return model.loss(torch.where(blur, blurred, video), truth), {}

    fit(cfg, model, loss_of, ema_decay=0.995)
    held_out = clips(shapes.HELD_OUT, 0, cfg.held_out)
    truth, read = torch.tensor([clip.truth() for clip in held_out]), []
    for i in range(0, cfg.held_out, 32):
        with autocast(cfg.precision, cfg.device):
            read.append(model.read(shapes.render_batch(held_out[i : i + 32]).to(cfg.device)).cpu())
    shares = (torch.cat(read) == truth).sum(0) / (truth >= 0).sum(0)
    results = {name: round(share, 4) for name, share in zip(shapes.FACTORS, shares.tolist())}
    print(f"held-out clips: {results}")
    save(cfg, model, "judge", results=results)


def main():
    jobs = {"vae": (VAEConfig, train_vae), "teacher": (TeacherConfig, train_teacher)}
    jobs |= {"judge": (JudgeRunConfig, train_judge)}
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        raise UserError(f"say what to train: python pretrain.py {'|'.join(jobs)} (each has --help)")
    config, job = jobs[sys.argv[1]]
    cfg = parse(config, sys.argv[2:], __doc__)
    cfg.out = cfg.out or f"runs/{sys.argv[1]}"
    common.start(cfg)
    job(cfg)


if __name__ == "__main__":
    run(main)
