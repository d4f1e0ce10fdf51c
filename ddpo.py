"""Algorithm 2: tune a few-step student to a reward by policy gradient (DDPO); and two baselines by direct gradients.

    python ddpo.py --reward jpeg_compressibility                      # DDPO, with rewards standardised
    python ddpo.py --reward jpeg_compressibility --advantage raw      # as the paper has it
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

Eq. 28 is summed over moves and averaged over the elements of the latents, as in ddpo-pytorch: the paper does not say.
Algorithm 2 weights each clip with its raw reward: unbiased but noisy, as a reward far from 0 moves all samples alike.
By default it is standardised over the iteration (--advantage).

ReFL (arXiv:2304.05977) takes the gradient of reward, decoder and the x_0 predicted at one of the last N steps, DRaFT-K
(arXiv:2309.17400) that of the sample through its last K = N steps. --beta-kl adds the mean squared distance to the
distilled student's x_0 at the same x_t, summed over the steps with gradient: for "renoise" it is, up to a factor a
step, the KL divergence of the moves.
"""

import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import common
import distributed
import rewards
from adapters import merge
from cogvideox import load_vae_of
from common import Machine, UserError, autocast, open_log, opt, parse, read_prompts, run
from data import caption
from dit import DiT
from evals import watch
from evals.progress import PATIENCE, say_resumed, set_aside
from generate import Generator, load_network
from nets import Source, adapters_on, network
from schedule import denoiser, log_prob
from text import WordTable, load_encoder
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
    reward: str = opt("none", "The reward, a name of the table in docs/REWARDS.md.")
    reward_weights: str | None = opt(None, "The reward's file or folder of weights.")
    reward_frames: int | None = opt(None, "The number of frames an image reward looks at. None: all.")
    reward_every: int = opt(50, "The iterations between measurements of the reward. 0: one, at the end.")
    reward_samples: int = opt(64, "The number of samples in a measurement.")
    method: Literal["ddpo", "refl", "draft"] = opt("ddpo", "The gradient: of the policy (ddpo), or the reward's own.")
    truncate: int = opt(2, "The number of last steps with gradient: of ddpo, those whose move has a std.")
    transition: Literal["renoise", "posterior", "ddim"] | None = opt(
        None, "The way between steps. None: the student's; of ddpo with a student of ddim, posterior."
    )
    advantage: Literal["raw", "batch"] = opt("batch", "The weight of log p: the reward raw, or standardised.")
    beta_kl: float = opt(0.0, "The weight of the distance to the distilled student. 0 leaves it out.")
    rank: int = opt(0, "The rank of the adapters that learn. 0: the student itself learns.")
    lr: float = opt(2e-5, "The learning rate (AdamW).")
    clip: float = opt(1.0, "The largest gradient norm. A larger gradient is scaled down to it.")
    shard: Literal["full", "hybrid", "none"] = opt("full", "The networks are split: over all ranks, in a node, or not.")
    checkpoint_activations: bool = opt(False, "Activations are computed again in the backward, to save memory.")
    cpu_offload: bool = opt(False, "Weights and optimizer stay in CPU memory.")
    save_every: int = opt(50, "The iterations between checkpoints, and between pictures.")


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 2


@dataclass
class Policy:
    """What Algorithm 2 takes for given: the student, how it moves, and who judges where it arrives."""

    generator: Generator  # the student with its VAE and text encoder
    frozen: DiT | None  # a copy of the student, where --beta-kl holds on to it
    prompts: list[str]
    reward: rewards.Reward
    steps: list[int]
    transition: str
    moves: list[int]  # indices of the steps that get gradient
    ranks: distributed.Ranks
    seed: int
    batch: int  # clips of a forward on this rank
    accumulate: int  # forwards of an iteration
    beta_kl: float
    clip: float

    def __post_init__(self):
        self.student, self.schedule = self.generator.model, self.generator.schedule

    def denoiser(self, model, text):
        """f(x_t, t) -> x_0."""
        predict = denoiser(model, self.schedule, text)

        def cast(x_t, t):
            with autocast(self.generator.precision, self.ranks.device):
                return predict(x_t, t)

        return cast


@dataclass
class Clips:
    """What one forward has sampled on this rank: B clips, how they came about, and their reward."""

    numbers: list[int]  # among all clips of the iteration
    captions: list[str]
    text: torch.Tensor  # (B, L, D)
    path: list  # of `walk`
    reward: torch.Tensor  # (B,)


def sample_clips(policy, step, micro, first=None, last=None):
    """Lines 4-11, the part `micro` of an iteration: clips and their reward, with gradient from step `first` on."""
    generator, device = policy.generator, policy.ranks.device
    numbers = distributed.sample_numbers(policy.ranks, micro, policy.batch)
    keys = [(policy.seed, step, "prompt", number) for number in numbers]
    captions = [policy.prompts[distributed.randint(len(policy.prompts), key)] for key in keys]
    text = generator.encoder.encode(captions).to(device)  # (B, L, D)

    def noise(i):  # follows from the seed, the step and a sample's number alone
        return distributed.normal(generator.shape, (policy.seed, step, i), numbers, device)

    predict, start = policy.denoiser(policy.student, text), noise("start")
    path = walk(predict, policy.schedule, start, policy.steps, noise, policy.transition, first, last)  # 5-10
    differentiable = first is not None
    with torch.set_grad_enabled(differentiable):
        reward = policy.reward(generator.decode(path[-1][1]), captions, with_grad=differentiable)  # 11, (B,)
    return Clips(numbers, captions, text, path, reward)


def policy_step(policy, optimizer, step, advantage):
    """Lines 4-14: descent on -sum over moves of log p times the clip's weight, a move at a time. As `descend`."""
    clips = [sample_clips(policy, step, micro) for micro in range(policy.accumulate)]  # 4-11
    reward, parts = of_all_ranks([part.reward for part in clips], policy.ranks), []
    weight = advantages(advantage, reward)
    for part in clips if reward.isfinite().all() else []:
        for i in policy.moves:
            (x_t, _), (x_next, _) = part.path[i : i + 2]
            x0 = policy.denoiser(policy.student, part.text)(x_t, policy.steps[i])
            log_p = log_probability(policy.schedule, x_t, x0, x_next, *policy.steps[i : i + 2], policy.transition)  # 9
            loss = policy_loss(log_p, weight[part.numbers].to(log_p))  # 13
            parts.append(backward(policy, loss, part.text, [(policy.steps[i], x_t, x0)]))
    return descend(policy, optimizer, reward, parts)  # 14


def direct_step(policy, optimizer, step, method):
    """ReFL: up the reward of the x_0 predicted at one of the last steps. DRaFT: of the sample, through the last steps.

    As `descend`.
    """
    parts, reward, moves = [], [], policy.moves
    k = moves[distributed.randint(len(moves), (policy.seed, step, "k"))]  # alike on all ranks
    first, last = (k, k) if method == "refl" else (moves[0], moves[-1])
    for micro in range(policy.accumulate):
        clips = sample_clips(policy, step, micro, first, last)
        visited = [(policy.steps[i], *clips.path[i]) for i in range(first, last + 1)]
        parts.append(backward(policy, -clips.reward.mean(), clips.text, visited))
        reward.append(clips.reward.detach())
    return descend(policy, optimizer, of_all_ranks(reward, policy.ranks), parts)


def backward(policy, loss, text, visited):
    """Backward of a part of the loss, with the distance to the distilled student at `visited`.

    visited: [(t, x_t, x_0)]. Returns {"loss", with --beta-kl "kl"}, tensors without dimensions.
    """
    info = {}
    for t, x_t, x0 in visited if policy.frozen else []:
        with torch.no_grad():
            before = policy.denoiser(policy.frozen, text)(x_t, t)
        info["kl"] = info.get("kl", 0.0) + (x0 - before).square().mean()
    total = loss + policy.beta_kl * info.get("kl", 0.0)
    (total / policy.accumulate).backward()
    return {"loss": total, **info}


def descend(policy, optimizer, reward, parts):
    """Line 14, left out where a reward or the gradient is not finite.

    Returns the rewards of all clips (n,), the numbers of the log (of `parts` the mean over forwards of the sum over
    moves), and whether the descent was made.
    """
    finite = reward.isfinite().all().item()
    norm = distributed.gradient_descent(policy.student, optimizer, policy.clip, policy.ranks, finite)
    names = parts[0] if parts else ()
    numbers = {name: sum(part[name].item() / policy.accumulate for part in parts) for name in names}
    return reward, distributed.means(numbers, policy.ranks) | {"grad_norm": norm}, math.isfinite(norm)


def of_all_ranks(parts, ranks):
    """The rewards of an iteration's clips in the order of their numbers, (n,) float64; parts: this rank's (B,) each."""
    everyone = distributed.every(torch.stack(parts).tolist(), ranks)
    return torch.tensor(everyone, dtype=torch.float64).transpose(0, 1).flatten()  # by forward, rank and clip


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
    """log p(x_next | x_t) (B,), Eq. 28, the mean over elements, float64. ValueError where the std is 0."""
    mean, std = transition(schedule, x_t.double(), x0.double(), t, t_next, how)
    return log_prob(x_next.detach().double(), mean, std).flatten(1).mean(1)


def policy_loss(log_p, advantage):
    """Algorithm 2, line 13, for one move: the mean over the batch of -A log p, (B,) each."""
    return -(advantage * log_p).mean()


def advantages(how, reward):
    """What each clip's log p is weighted with: the reward (n,) of an iteration, or less its mean, over its std."""
    if how == "raw":
        return reward
    return ((reward - reward.mean()) / (reward.std(correction=0) + 1e-8)).clamp(-LARGEST, LARGEST)


# ---------------------------------------------------------------------------------------------------------------------
# a run


def load(cfg, ranks):
    """-> a Generator of the student, and the same student frozen (None without --beta-kl).

    With --rank what learns is adapters on the student, which is itself what is held on to.
    """
    about = common.read_metadata(cfg.weights, "DiT")
    if about.get("kind") != "student":
        raise UserError(f"{cfg.weights} is no few-step student (its kind: {about.get('kind')}): make one with train.py")
    config = common.config_of(cfg.weights, about, DiT)
    source = Source(cfg.weights, config, lambda: cfg.weights, about)
    student, frozen = network(cfg, ranks, source, trainable=cfg.rank == 0), None
    if cfg.beta_kl:
        frozen = student if cfg.rank else network(cfg, ranks, source, trainable=False)
    if cfg.rank:
        student = adapters_on(student, cfg, ranks)

    vae = load_vae_of(cfg.weights, config, cfg.vae, cfg.precision, ranks.device)
    encoder = load_encoder(cfg.text, config.text_dim, config.text_length, ranks.device, cfg.precision)
    if about.get("text_fingerprint", encoder.fingerprint) != encoder.fingerprint:
        raise UserError(f"{cfg.weights} was trained with another text encoder: name it with --text FOLDER")
    return Generator(student, vae, about, encoder, ranks.device, cfg.precision), frozen


def captions(prompts, seed):
    """D of Algorithm 2: a list of prompts. Raises UserError where there is none."""
    if prompts != "shapes":
        return read_prompts(prompts)
    return [caption(seed, i) for i in range(4096)]


def build(cfg, ranks):
    """-> a Policy. Raises UserError for what is missing or does not fit."""
    common.check_flags(cfg)
    ddpo, forward = cfg.method == "ddpo", cfg.batch * ranks.size  # clips
    if cfg.global_batch % forward:
        raise UserError(f"--global-batch is no multiple of {forward}, --batch times the ranks")
    if cfg.reward == "none":
        raise UserError(f"--reward is needed, one of {', '.join(rewards.REWARDS)}")
    accumulate = cfg.global_batch // forward or (7 if forward < 16 else 1)
    if ddpo and cfg.advantage == "batch" and forward * accumulate < 2:
        raise UserError("--advantage batch needs a --global-batch of 2 or more")
    common.check_spared(Path(cfg.out, "student.safetensors"), cfg.weights)
    prompts = captions(cfg.prompts, cfg.seed)
    reward = rewards.make(cfg.reward, cfg.reward_weights, cfg.reward_frames, ranks.device)
    if not (ddpo or reward.differentiable):
        raise UserError(f"{cfg.reward} has no gradient, which --method {cfg.method} needs: --method ddpo needs none")
    generator, frozen = load(cfg, ranks)
    about = generator.about
    for prompt in prompts if isinstance(generator.encoder, WordTable) else []:
        generator.encoder.encode([prompt])  # an unknown word is found now, not in the middle
    steps, how = generator.trained, cfg.transition or about.get("transition", "renoise")
    if ddpo and how == "ddim" and not cfg.transition:
        how = "posterior"  # the same way with noise on it: a policy needs moves with a density
    moves = graded(generator.schedule, steps, how, cfg.truncate) if ddpo else [*range(len(steps))][-cfg.truncate :]
    if not moves:
        raise UserError(f"no move of {steps} by {how} has a density: DDPO needs two steps, and renoise or posterior")
    return Policy(
        generator, frozen, prompts, reward, steps, how, moves,
        ranks, cfg.seed, cfg.batch, accumulate, cfg.beta_kl, cfg.clip,
    )  # fmt: skip


def tune(cfg: Config, ranks) -> None:
    """Algorithm 2, line 3: the loop, and around it resuming, the log, measurements, pictures and checkpoints."""
    out, policy = Path(cfg.out), build(cfg, ranks)
    student = policy.student
    adam = torch.optim.AdamW(student.parameters(), cfg.lr, fused=True)
    saved = {"student": student}, {"adam": adam}
    going_on = cfg.resume or distributed.restarted(ranks)
    if not going_on:
        set_aside(out / "checkpoints", ranks)
    checkpoints, stopper = distributed.Checkpoints(out / "checkpoints"), distributed.Stopper(ranks)
    state = {"step": 0, "trained_s": 0.0, "reward_evaluations": 0, "skipped": 0}
    if going_on and (newest := checkpoints.newest()):
        state = checkpoints.load(newest, *saved)
        if "method" not in (old := state.pop("config", {})):
            raise UserError(f"{newest} is not of ddpo.py: name another --out")
        if ranks.main:
            say_resumed(newest, old, asdict(cfg))
    elif cfg.resume:
        raise UserError(f"{out} holds no checkpoint: leave out --resume to start")

    def picture(step):
        shown = policy.prompts[:4]
        # as who samples from the student, not as the policy moves
        videos = policy.generator.draw(shown, range(len(shown)), len(policy.steps))
        if ranks.main:
            write_grid(out / f"step{step:06d}.png", list(videos), shown)

    words = isinstance(policy.generator.encoder, WordTable)
    unseen = shapes.held_out(cfg.reward_samples)[1] if words else policy.prompts
    first, in_a_row = state["step"], 0
    if first % cfg.save_every == 0:
        picture(first)
    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, disable=not ranks.main)
    log = open_log(out / "log.jsonl", first) if ranks.main else None
    for step in bar:  # 3
        begun = time.time()
        if cfg.method == "ddpo":
            reward, numbers, made = policy_step(policy, adam, step, cfg.advantage)
        else:
            reward, numbers, made = direct_step(policy, adam, step, cfg.method)
        in_a_row = 0 if made else in_a_row + 1
        trained, evaluated = state["trained_s"] + time.time() - begun, state["reward_evaluations"] + len(reward)
        counts = {"trained_s": round(trained, 3), "reward_evaluations": evaluated}
        state |= {"step": step + 1, "skipped": state["skipped"] + (not made), **counts}
        final = step + 1 == cfg.iterations
        if final or (cfg.reward_every and step % cfg.reward_every == 0):
            how = len(policy.steps), cfg.reward_samples, cfg.batch
            numbers |= watch.measure(policy.generator, policy.reward, unseen, *how, ranks)
        if ranks.main:
            numbers |= {"reward_mean": reward.mean().item(), "reward_std": reward.std(correction=0).item()}
            bar.set_postfix({name: f"{value:.3g}" for name, value in numbers.items()})
            line = {"step": step, **counts, **numbers, "skipped": state["skipped"]}
            print(json.dumps(line), file=log, flush=True)
        stuck, ending, saving = in_a_row >= PATIENCE, stopper(), final or (step + 1) % cfg.save_every == 0
        if saving or stuck or ending:
            checkpoints.save(step + 1, *saved, state | {"config": asdict(cfg)}, wait=stuck or ending or final)
        if stuck or ending or final:
            bar.close()  # before anything is said below it
        if stuck:  # none of the skipped updates has touched the weights
            raise UserError(f"{in_a_row} iterations in a row were not finite: stopped, and saved the state in {out}")
        if ending:
            if ranks.main:
                print(f"stopped after step {step + 1}, saved: go on with --resume --out {out}")
            return
        if saving:
            picture(step + 1)
    write_student(policy, out / "student.safetensors", cfg, state["reward_evaluations"])


def write_student(policy, file, cfg, evaluations):
    """Write the tuned student, adapters merged into it; its metadata say how it was tuned."""
    weights = distributed.gather(policy.student)
    if not policy.ranks.main:
        return
    if cfg.rank:
        weights = merge(load_network(cfg.weights)[0].state_dict(), weights)
    with torch.device("meta"):
        model = DiT(policy.generator.config)
    model.load_state_dict(weights, assign=True)
    about = policy.generator.about
    tuned = [*about.get("tuned", []), common.made_by(asdict(cfg)) | {"reward_evaluations": evaluations}]
    common.save_model(file, model, torch.float16, **about | {"tuned": tuned})
    print(f"wrote {file}")


def main():
    cfg = parse(Config, None, __doc__)
    common.start(cfg)
    ranks = distributed.start(cfg.device)
    with common.claimed(cfg.out) if ranks.main else contextlib.nullcontext():
        tune(cfg, ranks)
    distributed.stop()


if __name__ == "__main__":
    run(main)
