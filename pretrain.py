"""The inputs of Algorithm 1: the VAE, the teacher (Eq. 4), and the judges that read what they draw.

    python pretrain.py vae      --out runs/vae       # the causal 3D VAE, on rendered clips
    python pretrain.py teacher  --out runs/teacher   # the teacher v_theta', on that VAE's latents
    python pretrain.py judge    --out runs/judge     # reads every factor; --kind attention: the rewarding one

All three run on the small world of world/shapes.py, in which data never ends. Each writes into --out: checkpoint.pt
(what --resume goes on from, to the bit), log.jsonl (a line a step), of VAE and teacher a picture now and then, and at
the end one safetensors file that knows what it is and how it was made.
"""

import json
import math
import pickle
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import common
import dit
import vae3d
from common import Machine, UserError, autocast, opt, parse, run
from data import Ahead
from generate import Generator
from losses import conjugate_velocity_loss
from schedule import Schedule
from text import WordTable
from video import write_grid
from world import shapes
from world.judge import Judge, JudgeConfig, slow_motion

WARMUP = 100  # steps
MAY_CHANGE = ("out", "resume", "device", "precision", "threads", "save_every")  # of a run that is resumed
DROP_TEXT = 0.1  # the share of captions left empty, for classifier-free guidance
KL = 0.01  # the weight of the KL term in nats a pixel value, against the mean error of one
GUIDANCE = 2.0  # the teacher's w, unless a user of it says another


@dataclass
class Config(Machine):
    out: str = opt("", "The folder of checkpoints, logs and the final weights. Empty: runs/NAME.")
    lr: float = opt(2e-3, "The peak learning rate, after a linear warm-up; a cosine takes it to zero.")
    seed: int = opt(0, "The seed of weights, clips and noise.")
    init: str = opt("", "The file of weights to begin with. Empty: random ones.")
    resume: bool = opt(False, "The run goes on from --out/checkpoint.pt.")
    save_every: int = opt(200, "The steps between checkpoints.")


@dataclass
class VAEConfig(Config):
    iterations: int = opt(3600, "The number of optimizer steps.")
    batch: int = opt(8, "The clips of a step.")
    held_out: int = opt(256, "The clips on which the result is measured.")
    images: int = opt(400, "The first steps, on single frames alone: what is drawn before how it moves.")
    object_weight: float = opt(4.0, "The additional weight of the objects' pixels, fading to zero over the run.")


@dataclass
class TeacherConfig(Config):
    vae: str = opt("weights/vae.safetensors", "The VAE.")
    prediction: Literal["conjugate", "velocity", "epsilon"] = opt(
        "conjugate", "What the network of a new teacher predicts (section 3.1). With --init the file says it."
    )
    iterations: int = opt(12000, "The number of optimizer steps.")
    batch: int = opt(32, "The clips of a step, or half its pictures.")
    clips: int = opt(16000, "The clips encoded before training; their captions are new at every step.")
    images: int = opt(2000, "The first steps, on the middle frames of clips alone: what is drawn before how it moves.")
    stills: int = opt(32000, "The middle frames encoded before training.")
    object_weight: float = opt(6.0, "The additional weight of the objects' latents, fading to zero over the run.")


@dataclass
class JudgeRunConfig(Config):
    kind: Literal["conv", "attention"] = opt(
        "conv", "The judge that evaluates is conv, the one that rewards attention."
    )
    iterations: int = opt(2200, "The number of optimizer steps.")
    batch: int = opt(32, "The clips of a step.")
    held_out: int = opt(4096, "The clips on which the result is measured.")


def clips(seed, step, n):
    """The n clips of one step, which follow from (seed, step): so a resumed run sees what an unbroken one sees."""
    return [shapes.Clip.make(seed, step * n + i) for i in range(n)]


def noise_of(seed, step):
    """The source of one step's noise: like its clips it follows from (seed, step) alone."""
    return torch.Generator().manual_seed(step + 1_000_000_000 * seed)


def orthogonal(m, dtype):
    """About U V^T where m = U S V^T: its singular values become 0.7 to 1.2, by five steps of Newton-Schulz in `dtype`.

    The coefficients are Keller Jordan's (Muon, 2024), made to lift small singular values as fast as can be.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = m.shape[0] > m.shape[1]
    x = m.T.to(dtype) if tall else m.to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def is_hidden(name, p):
    """Whether a parameter is a weight between layers, not of the first or last, and large as a matrix."""
    inside = any(part in name for part in ("blocks", "mid", "trunk", "mixer"))
    return inside and p.ndim > 1 and min(p.shape[0], p[0].numel()) >= 32


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix to the momentum: all directions of a weight learn alike.

    In its first 300 steps the small world's teacher needs about half as many as by AdamW alone. `torch.optim.Muon`
    takes no convolutions, and computes in bfloat16 alone, which is slow where there are no instructions for it.
    dtype: of the orthogonalisation.
    """

    def __init__(self, params, dtype=torch.float32):
        super().__init__(params, {"lr": 0.0})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            direction = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1), self.dtype)  # Nesterov's; (out, in x kernel)
            scale = 0.2 * max(direction.shape) ** 0.5  # steps as large as AdamW's
            p.mul_(1 - 0.01 * lr).add_(direction.reshape(p.shape), alpha=-lr * scale)


def optimizers(model, dtype=torch.float32):
    """Muon for the weights between layers, AdamW for all else."""
    named = list(model.named_parameters())
    muon = Muon([p for name, p in named if is_hidden(name, p)], dtype)
    others = [p for name, p in named if not is_hidden(name, p)]
    return muon, torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def fit(cfg, model, loss_of, pictures=None, ema_decay=0.0):
    """Train `model` by loss_of(step) -> {"loss", other numbers}; at the end its weights are their moving average.

    pictures(): videos (3, F, H, W) and their captions, drawn now and then for who looks on.
    Exact resume: the state holds weights, average, optimizer and step, and all randomness follows from the step.
    """
    out = Path(cfg.out)
    print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters")
    half = common.uses_bfloat16(cfg.precision, cfg.device)
    muon, adamw = optimizers(model, torch.bfloat16 if half else torch.float32)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True)
    parts = {"model": model, "muon": muon, "adamw": adamw, "average": average}
    first, state_file = 0, out / "checkpoint.pt"
    settings = {name: value for name, value in asdict(cfg).items() if name not in MAY_CHANGE}
    if cfg.resume:
        try:
            state = torch.load(state_file, weights_only=True, map_location=cfg.device)
        except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as e:
            raise UserError(f"{state_file} is damaged: remove it to start anew") from e
        other = [name for name, value in settings.items() if state.get("settings", {}).get(name) != value]
        if other:
            raise UserError(f"{state_file} was made with another --{other[0].replace('_', '-')}: repeat its flags")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]

    def draw(step):
        if pictures:
            with torch.no_grad(), autocast(cfg.precision, cfg.device):
                videos, captions = pictures()
            write_grid(out / f"step{step:06d}.png", videos, captions)

    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, desc=out.name, dynamic_ncols=True)
    log, begun = common.open_log(out / "log.jsonl", first), time.time()
    for step in bar:
        rate = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / cfg.iterations))
        with autocast(cfg.precision, cfg.device):
            numbers = loss_of(step)
        model.zero_grad()
        numbers["loss"].backward()
        numbers["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        numbers = {name: x.item() for name, x in numbers.items()}
        if not math.isfinite(numbers["grad_norm"]):
            raise UserError(f"the gradient is not finite at step {step}: try a lower --lr, from the last checkpoint")
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = cfg.lr * rate
            optimizer.step()
        average.update_parameters(model)
        done = step + 1
        bar.set_postfix(loss=f"{numbers['loss']:.3g}")
        log.write(json.dumps({"step": step, "seconds": round(time.time() - begun, 1), **numbers}) + "\n")
        log.flush()
        if done % cfg.save_every == 0 or done == cfg.iterations:
            state = {name: part.state_dict() for name, part in parts.items()} | {"step": done, "settings": settings}
            with common.atomic(state_file) as file:
                torch.save(state, file)
        if done % (5 * cfg.save_every) == 0:
            draw(done)
    model.load_state_dict(average.module.state_dict())
    model.eval()
    draw(cfg.iterations)


def initialise(cfg, model):
    """Fill `model` with the weights of --init, before the work. Raises UserError for those of another size."""
    if cfg.init:
        other, _ = common.load_model(cfg.init, type(model))
        try:
            model.load_state_dict(other.state_dict())
        except RuntimeError as e:
            raise UserError(f"--init {cfg.init} is of another size") from e
        model.config = other.config  # a VAE's scaling factor is part of it


def save(cfg, model, name, **about):
    """--out/NAME.safetensors, which says how it was made."""
    file = Path(cfg.out) / f"{name}.safetensors"
    common.save_model(file, model, torch.float16, **about | common.made_by(asdict(cfg)))
    print(f"wrote {file}")


def object_weight(cfg, step, mask):
    """The weight of every element's error: more where `mask` shows an object, fading to 1 over the run."""
    return 1 + cfg.object_weight * (1 - step / cfg.iterations) * mask


def train_vae(cfg):
    torch.manual_seed(cfg.seed)
    model = vae3d.VAE3D(vae3d.PRESETS["shapes"]).to(cfg.device, memory_format=torch.channels_last_3d)
    initialise(cfg, model)

    def loss_of(step):
        frame, n = None, cfg.batch
        if step < cfg.images or step % 8 == 0:  # many frames of as many clips cost what a few clips do
            frame, n = random.Random(f"frame {cfg.seed} {step}").randrange(shapes.FRAMES), 6 * cfg.batch
        video, mask = shapes.render(clips(cfg.seed, step, n), frame, cfg.device)
        mean, logvar = model.posterior(video)
        noise = torch.randn(mean.shape, generator=noise_of(cfg.seed, step)).to(cfg.device)
        z = mean + (0.5 * logvar).exp() * noise
        copy = model.decode(z * model.config.scaling_factor).float()
        error = copy - video
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).float().sum() / video.numel()  # nats a pixel value
        loss = (object_weight(cfg, step, mask) * (error**2 + 0.1 * error.abs())).mean() + KL * kl
        return {"loss": loss, "psnr": vae3d.psnr(copy, video).mean(), "kl": kl}

    def pictures():
        originals = shapes.render(clips(shapes.HELD_OUT, 0, 6), None, cfg.device)[0]
        pairs = torch.stack([originals, model.decode(model.encode(originals))], 1)
        return pairs.flatten(0, 1).cpu(), None

    fit(cfg, model, loss_of, pictures)
    scores, latents = [], []
    with torch.no_grad():
        for i in range(math.ceil(cfg.held_out / 8)):
            video = shapes.render(clips(shapes.HELD_OUT, i, 8), None, cfg.device)[0]
            latents.append(model.encode(video))
            scores.append(vae3d.psnr(model.decode(latents[-1]), video))
    # latents of unit variance are what the noise schedule expects; the factor is part of the weights from here on
    model.config.scaling_factor = model.config.scaling_factor / torch.cat(latents).std().item()
    results = {"psnr": torch.cat(scores).mean().item()}
    print(f"held-out clips: {common.tidy(results)}")
    save(cfg, model, "vae", results=results)


def latent_mask(mask):
    """A clip's mask (B, 1, F, H, W) on its latents' grid (B, 1, 1 + F/4, H/8, W/8): the most that a cell's pixels show.

    The VAE's first latent frame is the first frame alone, each of the others stands for four frames.
    """
    first = F.max_pool3d(mask[:, :, :1], (1, 8, 8))
    if mask.shape[2] == 1:
        return first
    return torch.cat([first, F.max_pool3d(mask, (4, 8, 8))], 2)


@torch.no_grad()
def encode_world(cfg, vae, n, frame):
    """What the teacher learns from: of the clips 0..n-1, or of one frame of each, the latents (n, C, T, h, w) and the
    masks of their objects (n, 1, T, h, w), in bfloat16. A resumed run encodes them again, to the same bits."""
    latents, masks, batch = [], [], 512 if frame else 64
    for i in tqdm(range(0, n, batch), desc="encoding stills" if frame else "encoding clips", dynamic_ncols=True):
        some = [shapes.Clip.make(cfg.seed, j) for j in range(i, min(i + batch, n))]
        video, mask = shapes.render(some, frame, cfg.device)
        with autocast(cfg.precision, cfg.device):
            latents.append(vae.encode(video).bfloat16())
        masks.append(latent_mask(mask).bfloat16())
    return torch.cat(latents), torch.cat(masks)


def noise_steps(n, generator):
    """Steps 0..999 of a batch (n,): half of them uniform, half about step 730, where words decide what is drawn.

    The second half is logit-normal (Esser et al. 2024). Each half takes one step from every equal part of its
    distribution: so the losses of batches differ less.
    """

    def one_of_each_part(n):
        return (torch.arange(n) + torch.rand(n, generator=generator)) / n

    uniform, normal = one_of_each_part(n - n // 2), torch.special.ndtri(one_of_each_part(n // 2))
    return (1000 * torch.cat([uniform, torch.sigmoid(normal + 1.0)])).long().clamp(max=999)


def train_teacher(cfg):
    vae, _ = common.load_model(cfg.vae, vae3d.VAE3D, cfg.device)
    vae = vae.to(memory_format=torch.channels_last_3d)
    model = dit.DiT(replace(dit.PRESETS["shapes"], prediction=cfg.prediction))
    model.init_weights(cfg.seed)
    model.to(cfg.device)
    initialise(cfg, model)
    world_clips = encode_world(cfg, vae, cfg.clips, None)
    world_stills = encode_world(cfg, vae, cfg.stills, shapes.MIDDLE)
    truth = clips(cfg.seed, 0, max(cfg.clips, cfg.stills))
    words = WordTable(shapes.WORDS, model.config.text_dim, model.config.text_length)
    schedule = Schedule(model.config.schedule, model.config.snr_shift)
    about = {"kind": "teacher", "w": GUIDANCE, "fps": shapes.FPS, "latents": list(world_clips[0].shape[2:])}

    def batch_of(step):
        rng, noise = random.Random(f"caption {cfg.seed} {step}"), noise_of(cfg.seed, step)
        still = step < cfg.images or step % 8 == 0  # pictures stay in the mixture to the end
        (latents, masks), n = (world_stills, 2 * cfg.batch) if still else (world_clips, cfg.batch)
        index = torch.randint(len(latents), (n,), generator=noise)
        prompts = [shapes.caption(truth[i], "train", rng, still)[0] for i in index.tolist()]
        prompts = ["" if rng.random() < DROP_TEXT else prompt for prompt in prompts]
        t, eps = noise_steps(n, noise), torch.randn(n, *latents.shape[1:], generator=noise)
        return latents, masks, index, words.encode(prompts), t, eps

    # a GPU has done a step's work before Python has said it: what can be said beforehand is said in other threads
    batches = Ahead(batch_of, 0 if torch.device(cfg.device).type == "cpu" else 2, cfg.iterations)

    def loss_of(step):
        latents, masks, *rest = batches(step)
        index, text, t, eps = (part.to(cfg.device) for part in rest)

        def predict(x_t, t):
            return model(x_t, t, text)

        weight = object_weight(cfg, step, masks[index].float())
        x0 = latents[index].float()
        return {"loss": conjugate_velocity_loss(predict, schedule, x0, t, eps, model.config.prediction, weight)}

    def pictures():
        prompts = [shapes.caption(clip, "long")[0] for clip in clips(shapes.HELD_OUT, 0, 8)]
        generator = Generator(model, vae, about, words, cfg.device, cfg.precision)
        return generator.draw(prompts, range(8), 25), prompts

    fit(cfg, model, loss_of, pictures, ema_decay=0.999)
    save(cfg, model, "teacher", **about, text_fingerprint=words.fingerprint)


def train_judge(cfg):
    torch.manual_seed(cfg.seed)
    model = Judge(JudgeConfig(cfg.kind)).to(cfg.device, memory_format=torch.channels_last_3d)
    initialise(cfg, model)
    hidden_in_parts = [list(shapes.FACTORS).index(name) for name in ("size", "action", "camera")]

    def loss_of(step):
        batch, noise = clips(cfg.seed, step, cfg.batch), noise_of(cfg.seed, step)
        video = shapes.render(batch)[0]
        truth = torch.tensor([clip.truth() for clip in batch])
        # a trace of noise and of blur: what it will judge comes out of a decoder, not out of the renderer
        strength = 0.04 * torch.rand(len(video), 1, 1, 1, 1, generator=noise)
        video = video + strength * torch.randn(video.shape, generator=noise)
        blurred = F.avg_pool3d(video, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        video = torch.where(torch.rand(len(video), 1, 1, 1, 1, generator=noise) < 0.25, blurred, video)
        for i in range(0, len(batch), 4):  # a quarter in slow motion, so that parts of a clip can be read as well
            start = int(torch.randint(-4, shapes.FRAMES + 1, (), generator=noise))
            start = min(max(start, 0), shapes.FRAMES - 4)  # often the first or the last four frames
            video[i] = slow_motion(video[i : i + 1, :, start : start + 4])[0]
            truth[i, hidden_in_parts] = -1
        return {"loss": model.loss(video.to(cfg.device), truth.to(cfg.device))}

    fit(cfg, model, loss_of, ema_decay=0.995)
    held_out = clips(shapes.HELD_OUT, 0, cfg.held_out)
    truth, read = torch.tensor([clip.truth() for clip in held_out]), []
    for i in range(0, cfg.held_out, 32):
        with autocast(cfg.precision, cfg.device):
            read.append(model.read(shapes.render(held_out[i : i + 32], None, cfg.device)[0]).cpu())
    shares = (torch.cat(read) == truth).sum(0) / (truth >= 0).sum(0)
    results = {name: round(share, 4) for name, share in zip(shapes.FACTORS, shares.tolist())}
    print(f"held-out clips: {common.tidy(results)}")
    save(cfg, model, "judge", results=results)


def main():
    jobs = {
        "vae": (VAEConfig, train_vae),
        "teacher": (TeacherConfig, train_teacher),
        "judge": (JudgeRunConfig, train_judge),
    }
    if sys.argv[1:2] in (["-h"], ["--help"]):
        return print(__doc__)
    if len(sys.argv) < 2 or sys.argv[1] not in jobs:
        raise UserError(f"say what to train: python pretrain.py {'|'.join(jobs)} (each has --help)")
    config, train = jobs[sys.argv[1]]
    cfg = parse(config, sys.argv[2:], __doc__)
    cfg.out = cfg.out or f"runs/{sys.argv[1]}"
    state_file = Path(cfg.out) / "checkpoint.pt"
    if cfg.resume and not state_file.exists():
        raise UserError(f"{state_file} does not exist: leave out --resume, or name a run's --out")
    if state_file.exists() and not cfg.resume:
        raise UserError(f"{state_file} is of an earlier run: go on with --resume, name another --out, or remove it")
    common.check_spared(Path(cfg.out, f"{sys.argv[1]}.safetensors"), cfg.init, getattr(cfg, "vae", ""))
    common.start(cfg)
    with common.claimed(cfg.out):
        try:
            train(cfg)
        except KeyboardInterrupt:
            if state_file.exists():
                print(f"stopped: go on from the last checkpoint with the same flags and --resume --out {cfg.out}")
            raise


if __name__ == "__main__":
    run(main)
