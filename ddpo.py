"""Algorithm 2: tune a few-step student to a reward by policy gradient (DDPO); and two baselines by direct gradients.

    python ddpo.py --reward jpeg_compressibility                      # DDPO
    python ddpo.py --reward jpeg_compressibility --advantage raw      # as Algorithm 2 prints it
    python ddpo.py --reward agreement --method draft --truncate 1     # needs a differentiable reward

DDPO takes sampling for a game of a few moves. Each draws x_next from a Gaussian whose mean the student decides, so it
has a log-probability, and the reward of the clip at the end says which moves to make more probable (Eq. 26). Reward and
decoder need no gradient, and one network evaluation is in memory at a time: samples are drawn without gradient, then
the log-probability of each move is computed again with it.

A move needs a density. "renoise": the student predicts x_0 and noises it afresh, as when it samples: N(a' x_0, b'^2).
"posterior": q(x_next | x_t, x_0) of Eq. 27 (schedule.py has its misprint), also for a student that samples by DDIM,
whose moves have none; what is tuned samples as before. The last move ends at x_0 itself, where the std is 0: no
density, no gradient. Algorithm 2 counts it among its last N = 2; here these are the last N (--truncate) moves *that
have a std*: of four steps, 749 to 499 and 499 to 249.

Eq. 28 is summed over moves, and averaged over the elements of the latents (as in ddpo-pytorch): the sum, the true
log-density, is thousands of times larger, which AdamW does not see, but --clip and --beta-kl would. Algorithm 2 weights
each clip with its raw reward: unbiased but noisy, as a reward far from 0 moves all samples alike. By default it is
standardised over the iteration (--advantage).

ReFL (arXiv:2304.05977) takes the gradient of reward, decoder and the x_0 predicted at one of the last N steps, DRaFT-K
(arXiv:2309.17400) that of the sample through its last K = N steps. --beta-kl adds the mean squared distance to the
distilled student's x_0 at the same x_t, summed over the steps with gradient: for "renoise" it is, up to a factor a
step, the KL divergence of the moves. Several rewards are each standardised by their running moments (rewards.py).
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
from tqdm import tqdm

import common
import distributed
import rewards
import watch
from adapters import Adapted, merge
from cogvideox import load_vae
from common import Machine, UserError, autocast, open_log, opt, parse, read_prompts, run, uses_bfloat16
from dit import DiT
from evals.progress import PATIENCE, set_aside
from generate import Generator
from schedule import Schedule, denoise, log_prob, timesteps
from text import WordTable, load_encoder
from vae3d import VAE3D
from video import write_grid
from world import shapes

LARGEST = 5.0  # advantage, as in github.com/kvablack/ddpo-pytorch


@dataclass
class Config(Machine):
    weights: str = opt("weights/student.safetensors", "The student to tune, as train.py writes it.")
    vae: str = opt("weights/vae.safetensors", "Its VAE: a .safetensors file or a CogVideoX folder.")
    text: str = opt("words", "Its text encoder: words (the small world's table) or a T5 folder.")
    prompts: str = opt("shapes", "The prompts: shapes (captions of the small world) or a file, one a line.")
    out: str = opt("runs/ddpo", "The folder for checkpoints, log, pictures and the tuned student.")
    iterations: int = opt(200, "The sets of samples drawn and learned from.")
    batch: int = opt(16, "The number of clips a rank takes in one forward.")
    global_batch: int = opt(0, "The clips of an iteration, over all ranks. 0: batch x ranks, 7 times that below 16.")
    seed: int = opt(0, "The seed of prompts and noise.")
    resume: bool = opt(False, "The run goes on from the newest checkpoint in --out.")
    reward: str = opt("none", "The reward, one of rewards.py or a weighted sum: hpsv2=1,agreement=2.")
    reward_weights: str | None = opt(None, "The reward's file or folder of weights. Of a sum: NAME=PATH,NAME=PATH.")
    reward_frames: int | None = opt(None, "The number of frames an image reward looks at. None: all.")
    reward_every: int = opt(50, "The iterations between measurements of the reward on fresh samples (see watch.py).")
    reward_samples: int = opt(64, "The number of samples in a measurement.")
    method: Literal["ddpo", "refl", "draft"] = opt("ddpo", "The gradient: of the policy, or the reward's own (above).")
    truncate: int = opt(2, "The number of last steps with gradient: of ddpo, those whose move has a std.")
    transition: Literal["renoise", "posterior", "ddim"] | None = opt(
        None, "The way between steps. None: the student's; of ddpo with a student of ddim, posterior."
    )
    advantage: Literal["batch", "raw"] = opt(
        "batch", "The weight of log p: the reward, standardised over the iteration, or raw as in the paper."
    )
    beta_kl: float = opt(0.0, "The weight of the distance to the distilled student. 0 leaves it out.")
    rank: int = opt(0, "The rank of the adapters that learn. 0: the student itself learns.")
    lr: float = opt(2e-5, "The learning rate (AdamW).")
    clip: float = opt(1.0, "The largest gradient norm. A larger gradient is scaled down to it.")
    shard: Literal["full", "hybrid", "none"] = opt("full", "The sharding of the networks over ranks: distributed.py.")
    checkpoint_activations: bool = opt(False, "Activations are computed again in the backward, to save memory.")
    cpu_offload: bool = opt(False, "Weights and optimizer stay in CPU memory.")
    save_every: int = opt(50, "The iterations between checkpoints, and between pictures.")


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 2


@dataclass
class Policy:
    """What Algorithm 2 takes for given: the student, how it moves, and who judges where it arrives."""

    student: DiT
    frozen: DiT | None  # a copy of it, where --beta-kl holds on to it
    vae: VAE3D
    encoder: object  # of text.py
    about: dict  # what the student's file says
    prompts: list[str]
    reward: rewards.Reward
    moments: rewards.Moments
    steps: list[int]
    transition: str
    moves: list[int]  # indices of the steps that get gradient
    device: torch.device
    precision: str

    def __post_init__(self):
        self.config = self.student.config
        self.schedule = Schedule(self.config.schedule, self.config.snr_shift)

    def denoiser(self, model, text):
        """f(x_t, t) -> x_0."""

        def predict(x_t, t):
            with autocast(self.precision, self.device):
                return denoise(model, self.schedule, x_t, t, text, self.config.prediction)

        return predict

    def sample(self, captions, key, numbers, first=None, last=None):
        """Lines 5-8: text (B, L, D) and `walk`'s path. Noise follows from key and a sample's number alone."""
        text, shape = self.encoder.encode(captions).to(self.device), (self.config.channels, *self.config.latents)
        noise = lambda i: distributed.normal(shape, (*key, i), numbers, self.device)
        predict, start = self.denoiser(self.student, text), noise("start")
        return text, walk(predict, self.schedule, start, self.steps, noise, self.transition, first, last)

    def decode(self, x0):
        """Latents (B, C, T, h, w) -> video (B, 3, F, H, W) in [-1, 1]."""
        with autocast(self.precision, self.device):
            return self.vae.decode(x0).float().clamp(-1, 1)


@dataclass
class Clips:
    """What one forward has sampled on this rank: B clips, how they came about, and their reward."""

    numbers: list[int]  # among all clips of the iteration
    captions: list[str]
    text: torch.Tensor  # (B, L, D)
    path: list  # of `walk`
    reward: torch.Tensor  # (B,)


def algorithm_2(cfg, ranks, policy, optimizer, accumulate, first=0):
    """Lines 3-15, from iteration `first` on.

    Yields after every iteration: step, the numbers of its log, the rewards of all its clips (n,), and whether the
    update was made. The two baselines take lines 4-14 in one.
    """
    seed, batch, hold = cfg.seed, cfg.batch, {"beta_kl": cfg.beta_kl, "clip": cfg.clip}
    for step in range(first, cfg.iterations):  # 3
        if cfg.method == "ddpo":
            clips = [sample_clips(policy, ranks, step, i, seed, batch) for i in range(accumulate)]  # 4-11
            reward = of_all_ranks(clips, ranks)
            weight = advantages(cfg.advantage, reward) if reward.isfinite().all() else None
            numbers, made = policy_step(policy, ranks, optimizer, clips, weight, **hold)  # 12-14
        else:
            how = cfg.method, seed, batch
            reward, numbers, made = direct_step(policy, ranks, optimizer, step, accumulate, *how, **hold)
        yield step, numbers, reward, made  # 15


def sample_clips(policy, ranks, step, micro, seed, batch, first=None, last=None):
    """Lines 4-11, the part `micro` of an iteration: clips and their reward, with gradient from step `first` on."""
    numbers = [(micro * ranks.size + ranks.rank) * batch + i for i in range(batch)]
    choose = lambda number: distributed.randint(len(policy.prompts), (seed, step, "prompt", number))
    captions = [policy.prompts[choose(number)] for number in numbers]
    text, path = policy.sample(captions, (seed, step), numbers, first, last)  # 5-10
    differentiable, weights = first is not None, list(policy.reward.weights.values())
    with torch.set_grad_enabled(differentiable):
        scores = policy.reward.scores(policy.decode(path[-1][1]), captions, with_grad=differentiable)  # 11, (B, R)
        policy.moments.update(scores, ranks)
        reward = policy.moments.standardise(scores) if len(weights) > 1 else weights[0] * scores[:, 0]  # (B,)
    return Clips(numbers, captions, text, path, reward)


def policy_step(policy, ranks, optimizer, clips, weight, beta_kl, clip):
    """Lines 12-14: a descent on -sum over moves of log p times weight (n,), a move at a time.

    weight None: a reward is not finite, and nothing is learned. Returns the numbers of the log, and whether the descent
    was made.
    """
    parts = []
    for part in clips if weight is not None else []:
        for i in policy.moves:
            (x_t, _), (x_next, _) = part.path[i : i + 2]
            x0 = policy.denoiser(policy.student, part.text)(x_t, policy.steps[i])
            move = policy.steps[i], policy.steps[i + 1], policy.transition
            log_p = log_probability(policy.schedule, x_t, x0, x_next, *move)  # 9
            loss = policy_loss(log_p, weight[part.numbers].to(log_p))  # 13
            parts.append(backward(policy, loss, part.text, [(policy.steps[i], x_t, x0)], beta_kl, len(clips)))
    norm = distributed.gradient_descent(policy.student, optimizer, clip, ranks, weight is not None)  # 14
    return summed(parts, len(clips)) | {"grad_norm": norm}, math.isfinite(norm)


def direct_step(policy, ranks, optimizer, step, accumulate, method, seed, batch, beta_kl, clip):
    """ReFL: up the reward of the x_0 predicted at one of the last steps. DRaFT: of the sample, through the last steps.

    Returns the rewards of all clips (n,), the numbers of the log, and whether the descent was made.
    """
    parts, clips, moves = [], [], policy.moves
    for micro in range(accumulate):
        k = moves[distributed.randint(len(moves), (seed, step, "k", micro))]  # alike on all ranks
        first, last = (k, k) if method == "refl" else (moves[0], moves[-1])
        part = sample_clips(policy, ranks, step, micro, seed, batch, first, last)
        visited = [(policy.steps[i], *part.path[i]) for i in range(first, last + 1)]
        parts.append(backward(policy, -part.reward.mean(), part.text, visited, beta_kl, accumulate))
        clips.append(replace(part, path=[], reward=part.reward.detach()))  # without the graph
    reward = of_all_ranks(clips, ranks)
    finite = reward.isfinite().all().item()
    norm = distributed.gradient_descent(policy.student, optimizer, clip, ranks, finite)
    return reward, summed(parts, accumulate) | {"grad_norm": norm}, math.isfinite(norm)


def backward(policy, loss, text, visited, beta_kl, accumulate):
    """Backward of one of `accumulate` parts of the loss, with the distance to the distilled student at `visited`.

    visited: [(t, x_t, x_0)]. Returns {"loss", with --beta-kl "kl"}, tensors without dimensions.
    """
    info = {}
    for t, x_t, x0 in visited if policy.frozen else []:
        with torch.no_grad():
            before = policy.denoiser(policy.frozen, text)(x_t, t)
        info["kl"] = info.get("kl", 0.0) + (x0 - before).square().mean()
    total = loss + beta_kl * info.get("kl", 0.0)
    (total / accumulate).backward()
    return {"loss": total, **info}


def summed(parts, accumulate):
    """[{name: tensor}], a part each -> {name: the mean over `accumulate` of the sum over moves}."""
    names = parts[0] if parts else ()
    return {name: sum(part[name].item() / accumulate for part in parts) for name in names}


def of_all_ranks(clips, ranks):
    """The rewards (n,) float64 of all clips of an iteration, by number, alike on all ranks."""
    mine = [pair for part in clips for pair in zip(part.numbers, part.reward.tolist())]
    pairs = sorted(pair for part in distributed.every(mine, ranks) for pair in part)
    return torch.tensor([reward for _, reward in pairs], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# its mathematics


def transition(schedule, x_t, x0, t, t_next, how):
    """mean (B, ...) and std (float64, without dimensions) of x_next, given x_t and the x_0 predicted there; t ints."""
    if how == "posterior":
        return schedule.posterior(x_t, x0, t, t_next)  # Eq. 27
    if how == "renoise":
        a, b = schedule.ab(t_next, x0)
        return a * x0, b
    if how == "ddim":
        return schedule.ddim_step(x_t, x0, t, t_next), torch.zeros((), dtype=torch.float64)
    raise ValueError(f"unknown transition {how!r}: renoise, posterior or ddim")


def graded(schedule, steps, how, n):
    """The last n, or all there are, of the indices of steps whose move has a std: never the last, which ends at x_0."""
    x, moves = torch.zeros(1), zip(steps, [*steps[1:], -1])
    return [i for i, move in enumerate(moves) if transition(schedule, x, x, *move, how)[1] > 0][-n:]


def walk(predict, schedule, x, steps, noise, how, first=None, last=None):
    """Sample from x at steps[0] to step `last` (None: the end) -> a pair (x_t, x_0 predicted there) for each step.

    predict(x_t, t) -> x_0; noise(i): standard normal, spent on leaving step i. Gradient flows through the steps from
    `first` on, into the student and from step to step; None: nowhere.
    """
    path, last = [], len(steps) - 1 if last is None else last
    for i in range(last + 1):
        with torch.set_grad_enabled(first is not None and i >= first):
            path.append((x, predict(x, steps[i])))
            if i < last:
                mean, std = transition(schedule, *path[-1], steps[i], steps[i + 1], how)
                x = mean + std * noise(i) if std > 0 else mean
    return path


def log_probability(schedule, x_t, x0, x_next, t, t_next, how):
    """log p(x_next | x_t), Eq. 28, mean over the elements: (B,) float64. ValueError where the move has std 0."""
    mean, std = transition(schedule, x_t.double(), x0.double(), t, t_next, how)
    return log_prob(x_next.detach().double(), mean, std).flatten(1).mean(1)


def policy_loss(log_p, advantage):
    """Algorithm 2, line 13, of one move: -A log p, mean over the batch; log_p with gradient, advantage: (B,) each."""
    return -(advantage * log_p).mean()


def advantages(how, reward):
    """What each clip's log p is weighted with: reward (n,) float64 of a whole iteration -> (n,) float64.

    raw: the reward. batch: less its mean, divided by its std.
    """
    if how == "raw":
        return reward
    return ((reward - reward.mean()) / (reward.std(correction=0) + 1e-8)).clamp(-LARGEST, LARGEST)


# ---------------------------------------------------------------------------------------------------------------------
# a run


def load(cfg, ranks):
    """-> student, the same frozen (None without --beta-kl), VAE, text encoder, the student's metadata.

    With --rank what learns is adapters on the student, which is itself what is held on to.
    """
    about = common.read_metadata(cfg.weights, "DiT")
    if about.get("kind") != "student":
        raise UserError(f"{cfg.weights} is no few-step student (its kind: {about.get('kind')}): make one with train.py")
    config = DiT.Config(**about["config"])
    half = ranks.device.type == "cuda" and uses_bfloat16(cfg.precision, ranks.device)
    dtype = torch.bfloat16 if half else None

    place = lambda model, trainable: distributed.shard(model, ranks, cfg.shard, dtype, cfg.cpu_offload, trainable)

    def network(trainable):
        with torch.device("meta"):
            model = DiT(config)
        model.checkpoint_activations = cfg.checkpoint_activations and (trainable or cfg.rank > 0)
        return distributed.load_sharded(place(model, trainable), cfg.weights)

    student = network(cfg.rank == 0)
    frozen = None
    if cfg.beta_kl:
        frozen = student if cfg.rank else network(False)
    if cfg.rank:
        with torch.device("meta"):
            student = Adapted(student, cfg.rank)
        distributed.materialise(place(student, True), ranks, cfg.seed)

    vae = load_vae(cfg.vae)
    if vae.config.latent_channels != config.channels:
        raise UserError(f"{cfg.vae} decodes {vae.config.latent_channels} channels, {cfg.weights} has {config.channels}")
    vae = vae.to(ranks.device, memory_format=torch.channels_last_3d).eval().requires_grad_(False)
    encoder = load_encoder(cfg.text, config.text_dim, config.text_length, ranks.device, cfg.precision)
    if about.get("text_fingerprint", encoder.fingerprint) != encoder.fingerprint:
        raise UserError(f"{cfg.weights} was trained with another text encoder: name it with --text FOLDER")
    return student, frozen, vae, encoder, about


def captions(cfg):
    """D of Algorithm 2: a list of prompts. Raises UserError where there is none."""
    if cfg.prompts == "shapes":  # of the clips that data.py renders
        words = lambda i: random.Random(f"caption {cfg.seed} {i}")
        return [shapes.caption(shapes.Clip.make(cfg.seed, i), "train", words(i))[0] for i in range(4096)]
    return read_prompts(cfg.prompts)


def build(cfg, ranks, clips):
    """-> a Policy. clips: of an iteration. Raises UserError for what is missing or does not fit."""
    common.check_flags(cfg)
    ddpo = cfg.method == "ddpo"
    for wrong, what in (
        (cfg.reward_every < 1, "--reward-every: at least 1"),
        (
            cfg.global_batch not in (0, clips),
            f"--global-batch is no multiple of {cfg.batch * ranks.size}, --batch times the ranks",
        ),
        (ddpo and cfg.advantage == "batch" and clips < 2, "--advantage batch needs a --global-batch of 2 or more"),
        (cfg.reward == "none", f"--reward is needed, one of {', '.join(rewards.REWARDS)}"),
    ):
        if wrong:
            raise UserError(what)
    prompts, reward = captions(cfg), rewards.make(cfg.reward, cfg.reward_weights, cfg.reward_frames, ranks.device)
    if not (ddpo or reward.differentiable):
        raise UserError(f"{cfg.reward} has no gradient, which --method {cfg.method} needs: --method ddpo needs none")
    student, frozen, vae, encoder, about = load(cfg, ranks)
    for prompt in prompts if isinstance(encoder, WordTable) else []:
        encoder.encode([prompt])  # an unknown word is found now, not in the middle
    steps, how = about.get("timesteps") or timesteps(4), cfg.transition or about.get("transition", "renoise")
    if ddpo and how == "ddim" and not cfg.transition:
        how = "posterior"  # the same way with noise on it: a policy needs moves with a density
    schedule = Schedule(student.config.schedule, student.config.snr_shift)
    moves = graded(schedule, steps, how, cfg.truncate) if ddpo else [*range(len(steps))][-cfg.truncate :]
    if not moves:
        raise UserError(f"no move of {steps} by {how} has a density: DDPO needs two steps, and renoise or posterior")
    moments = rewards.Moments(reward.weights)
    given = student, frozen, vae, encoder, about, prompts, reward, moments, steps, how, moves
    return Policy(*given, ranks.device, cfg.precision)


def tune(cfg: Config, ranks) -> None:
    """What stands around Algorithm 2: resuming, the log, measurements, pictures, checkpoints, and an end in order."""
    out, forward = Path(cfg.out), cfg.batch * ranks.size  # clips
    accumulate = cfg.global_batch // forward if cfg.global_batch else 7 if forward < 16 else 1
    total = forward * accumulate
    policy = build(cfg, ranks, total)
    student, encoder, about = policy.student, policy.encoder, policy.about
    adam = torch.optim.AdamW(student.parameters(), cfg.lr, fused=True)
    saved = {"student": student}, {"adam": adam}
    going_on = cfg.resume or distributed.restarted(ranks)
    if not going_on:
        set_aside(out / "checkpoints", ranks)
    checkpoints, stopper = distributed.Checkpoints(out / "checkpoints"), distributed.Stopper(ranks)
    state = {"step": 0, "trained_s": 0.0, "reward_evaluations": 0, "skipped": 0}
    if going_on and (newest := checkpoints.newest()):
        state = checkpoints.load(newest, *saved)
        if not state.keys() >= {"moments", "reward_evaluations"}:
            raise UserError(f"{newest} is not of ddpo.py: take another --out")
        policy.moments = rewards.Moments(**state["moments"])
        if ranks.main:
            common.warn_of_precision(state.get("precision"), cfg.precision)
    elif cfg.resume:
        raise UserError(f"{out} holds no checkpoint: leave out --resume to start")

    def picture(step):
        shown = policy.prompts[:4]
        with torch.no_grad():
            _, path = policy.sample(shown, (cfg.seed, "picture"), range(len(shown)))
            videos = policy.decode(path[-1][1]).cpu()
        if ranks.main:
            write_grid(out / f"step{step:06d}.png", list(videos), shown)

    unseen = shapes.held_out_prompts(cfg.reward_samples) if isinstance(encoder, WordTable) else policy.prompts
    sampler = Generator(student, policy.vae, about, encoder, ranks.device, cfg.precision)
    first, in_a_row = state["step"], 0
    if first % cfg.save_every == 0:
        picture(first)
    iterations = algorithm_2(cfg, ranks, policy, adam, accumulate, first)
    bar = tqdm(iterations, initial=first, total=cfg.iterations, disable=not ranks.main)
    log = open_log(out / "log.jsonl", first) if ranks.main else None
    begun = time.time()
    for step, numbers, reward, made in bar:
        in_a_row = 0 if made else in_a_row + 1
        trained, evaluated = state["trained_s"] + time.time() - begun, state["reward_evaluations"] + total
        counts = {"trained_s": round(trained, 3), "reward_evaluations": evaluated}
        state |= {"step": step + 1, "skipped": state["skipped"] + (not made), **counts}
        state |= {"moments": asdict(policy.moments), "precision": cfg.precision}
        final = step + 1 == cfg.iterations
        if step % cfg.reward_every == 0 or final:
            how = len(policy.steps), cfg.reward_samples, cfg.batch
            numbers |= watch.measure(sampler, policy.reward, unseen, *how, ranks, moments=policy.moments)
        if ranks.main:
            numbers |= {"reward_mean": reward.mean().item(), "reward_std": reward.std(correction=0).item()}
            bar.set_postfix({name: f"{value:.3g}" for name, value in numbers.items()})
            line = {"step": step, **counts, **numbers, "skipped": state["skipped"]}
            print(json.dumps(line), file=log, flush=True)
        stuck, ending = in_a_row >= PATIENCE, stopper()
        if (step + 1) % cfg.save_every == 0 or final or stuck or ending:
            checkpoints.save(step + 1, *saved, state, wait=stuck or ending or final)
        if stuck:  # none of the skipped updates has touched the weights
            raise UserError(f"{in_a_row} iterations in a row were not finite: stopped, and saved the state in {out}")
        if ending:
            if ranks.main:
                print(f"stopped after step {step + 1}, saved: go on with --resume --out {out}")
            return
        if (step + 1) % cfg.save_every == 0 and not final:
            picture(step + 1)
        begun = time.time()
    picture(state["step"])
    weights = distributed.gather(student)
    if cfg.rank:
        weights = merge(distributed.gather(student.base), weights)
    if ranks.main:
        file = out / "student.safetensors"
        with torch.device("meta"):
            model = DiT(policy.config)
        model.load_state_dict(weights, assign=True)
        made = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "settings": asdict(cfg)}
        made |= {"reward_evaluations": state["reward_evaluations"]}
        common.save_model(file, model, torch.float16, **about | {"tuned": [*about.get("tuned", []), made]})
        print(f"wrote {file}: python sample.py --weights {file}")


def main():
    cfg = parse(Config, None, __doc__.splitlines()[0])
    common.start(cfg)
    ranks = distributed.start(cfg.device)
    tune(cfg, ranks)
    distributed.stop(ranks)


if __name__ == "__main__":
    run(main)
