"""Algorithm 2: tune a few-step student to a reward by policy gradient (DDPO); and two baselines by direct gradients.

    python ddpo.py --reward jpeg_compressibility                                   # DDPO as the paper has it
    python ddpo.py --reward agreement --advantage batch --variant is --updates 4   # several updates a set of samples
    python ddpo.py --reward agreement --method draft --truncate 1                  # needs a differentiable reward

DDPO takes sampling for a game of a few moves. Each draws x_next from a Gaussian whose mean the student decides, so it
has a log-probability, and the reward of the clip at the end says which moves to make more probable (Eq. 26). Reward and
decoder need no gradient, and one network evaluation is in memory at a time: samples are drawn without gradient, then
the log-probability of each move is computed again with it.

A move needs a density. "renoise": the student predicts x_0 and noises it afresh, as when it samples: N(a' x_0, b'^2).
"posterior": q(x_next | x_t, x_0) of Eq. 27 (schedule.py has its misprint; the tuned student samples as before). The
last move ends at x_0 itself, where the std is 0: no density, no gradient. Algorithm 2 counts it among its last N = 2;
here these are the last N (--truncate) moves *that have a std*: of four steps, 749 to 499 and 499 to 249.

Eq. 28 is summed over moves, and over the elements of the latents averaged ("mean", as in ddpo-pytorch) or summed
("sum", the true log-density, thousands of times larger). AdamW does not see the factor, but --clip, --beta-kl and
--clip-range do: a range of 1e-4 is for the mean. Each clip is weighted with its raw reward, as in Algorithm 2: unbiased
but noisy, as a reward far from 0 moves all samples alike. --advantage batch | prompt standardises it.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import cli
import distributed
import rewards
import shapes
import watch
from cli import Machine, UserError, autocast, open_log, opt, parse, read_prompts, run, uses_bfloat16
from dit import DiT
from generate import Generator
from progress import set_aside
from schedule import Schedule, denoise, log_prob, timesteps
from text import WordTable, load_encoder
from vae3d import VAE3D
from video import write_grid

# github.com/kvablack/ddpo-pytorch: rewards kept a prompt, how many make its own statistics, the largest advantage
BUFFER, LEAST, LARGEST = 16, 16, 5.0


@dataclass
class Config(Machine):
    weights: str = opt("weights/student.safetensors", "the student to tune, as train.py writes it")
    vae: str = opt("weights/vae.safetensors", "its VAE: a .safetensors file or a CogVideoX folder")
    text: str = opt("words", "its text encoder: words (the small world's table) or a T5 folder")
    prompts: str = opt("shapes", "shapes (captions of the small world) or a file, one a line")
    prompt_count: int = opt(0, "use the first so many prompts (0: all; of shapes 4096)")
    out: str = opt("runs/ddpo", "folder for checkpoints, log, pictures and the tuned student")
    iterations: int = opt(200, "sets of samples drawn and learned from")
    batch: int = opt(16, "clips a rank and forward")
    global_batch: int = opt(0, "clips an iteration over all ranks (0: batch x ranks, and x 7 if those are below 16)")
    seed: int = opt(0, "seed of prompts and noise")
    resume: bool = opt(False, "go on from the newest checkpoint in --out")
    reward: str = opt("none", "a reward of rewards.py, or several: hpsv2=1,agreement=2")
    reward_weights: str | None = opt(None, "file or folder of the reward's weights; of several NAME=PATH,NAME=PATH")
    reward_frames: int | None = opt(None, "frames an image reward looks at (none: all)")
    reward_every: int = opt(50, "iterations between measurements of the reward on fresh samples (see watch.py)")
    reward_samples: int = opt(64, "samples of a measurement")
    max_seconds: int = opt(0, "end after so many seconds of training, measurements left out (0: --iterations alone)")
    max_evaluations: int = opt(0, "end after so many evaluations of the reward (0: --iterations alone)")
    method: Literal["ddpo", "refl", "draft"] = opt("ddpo", "policy gradient, or the reward's own (see above)")
    truncate: int = opt(2, "ddpo: gradient on the last so many moves with a std; refl, draft: on the last steps")
    transition: Literal["renoise", "posterior", "ddim"] | None = opt(None, "between steps (none: the student's own)")
    log_p: Literal["mean", "sum"] = opt("mean", "ddpo: log-probability over the elements of the latents")
    advantage: Literal["raw", "batch", "prompt"] = opt("raw", "ddpo: raw, or standardised (prompt: needs few prompts)")
    variant: Literal["sf", "is"] = opt("sf", "ddpo: score function, or importance sampling with clipping")
    updates: int = opt(1, "ddpo, is: optimizer updates from one set of samples")
    clip_range: float = opt(1e-4, "ddpo, is: how far a ratio may leave 1")
    beta_kl: float = opt(0.0, "weight of the distance to the distilled student; 0 leaves it out")
    lr: float = opt(2e-5, "learning rate (AdamW)")
    clip: float = opt(1.0, "largest gradient norm")
    shard: Literal["full", "hybrid", "none"] = opt("full", "of the networks over the ranks (see distributed.py)")
    checkpoint_activations: bool = opt(False, "compute activations again in the backward, to save memory")
    cpu_offload: bool = opt(False, "keep weights and optimizer in CPU memory")
    save_every: int = opt(50, "iterations between checkpoints, and between pictures")
    patience: int = opt(5, "iterations in a row that may be skipped because they are not finite")


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


def log_probability(schedule, x_t, x0, x_next, t, t_next, how, over="mean"):
    """log p(x_next | x_t) (B,), Eq. 28. float64: a float32 sum is coarser than the clip range. ValueError: std 0."""
    mean, std = transition(schedule, x_t.double(), x0.double(), t, t_next, how)
    elements = log_prob(x_next.detach().double(), mean, std).flatten(1)
    return elements.mean(1) if over == "mean" else elements.sum(1)


def policy_loss(log_p, old, advantage, variant="sf", clip_range=1e-4):
    """Mean over the batch of one move's loss, and info; log_p with gradient, old as sampled, advantage: (B,) each.

    sf: -A log p (Algorithm 2, line 13). is: -A p / p_old, which gains nothing by a ratio beyond 1 +- clip_range.
    info: "approx_kl", half the mean square of log p / p_old; "clip_fraction", the share of ratios beyond the range.
    """
    change = log_p - old
    ratio = change.exp()
    if variant == "sf":
        loss = -advantage * log_p
    else:
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))
    beyond = ((ratio.detach() - 1).abs() > clip_range).double().mean()
    return loss.mean(), {"approx_kl": change.detach().square().mean() / 2, "clip_fraction": beyond}


def advantages(how, reward, prompts, memory):
    """What each clip's log p is weighted with: reward (n,) float64 of a whole iteration, n prompts -> (n,) float64.

    raw: the reward. batch: less its mean, divided by its std. prompt: the same with mean and std of the prompt's last
    BUFFER rewards, kept in `memory` {prompt: list}, once there are LEAST of them; until then those of the batch.
    """
    if how == "raw":
        return reward
    mean, std = torch.full_like(reward, reward.mean()), torch.full_like(reward, reward.std(correction=0))
    for prompt in dict.fromkeys(prompts) if how == "prompt" else []:
        mine = [i for i, p in enumerate(prompts) if p == prompt]
        memory[prompt] = (memory.get(prompt, []) + reward[mine].tolist())[-BUFFER:]
        if len(memory[prompt]) >= LEAST:
            known = reward.new_tensor(memory[prompt])
            mean[mine], std[mine] = known.mean(), known.std(correction=0)
    return ((reward - mean) / (std + (1e-8 if how == "batch" else 1e-6))).clamp(-LARGEST, LARGEST)


def load(cfg, world):
    """-> student, a frozen copy of it (None without --beta-kl), VAE, text encoder, the student's metadata."""
    about = checkpoint.metadata(cfg.weights, "DiT")
    if about.get("kind") != "student":
        raise UserError(f"{cfg.weights} is no few-step student (its kind: {about.get('kind')}): make one with train.py")
    config = DiT.Config(**about["config"])
    half = world.device.type == "cuda" and uses_bfloat16(cfg.precision, world.device)
    dtype = torch.bfloat16 if half else None

    def network(trainable):
        with torch.device("meta"):
            model = DiT(config)
        model.checkpoint_activations = cfg.checkpoint_activations and trainable
        model = distributed.shard(model, world, cfg.shard, dtype, cfg.cpu_offload, trainable)
        return distributed.load_sharded(model, cfg.weights)

    vae = VAE3D.load(cfg.vae)
    if vae.config.latent_channels != config.channels:
        raise UserError(f"{cfg.vae} decodes {vae.config.latent_channels} channels, {cfg.weights} has {config.channels}")
    vae = vae.to(world.device, memory_format=torch.channels_last_3d).eval().requires_grad_(False)
    encoder = load_encoder(cfg.text, config.text_dim, config.text_length, world.device, cfg.precision)
    if about.get("text_fingerprint", encoder.fingerprint) != encoder.fingerprint:
        raise UserError(f"{cfg.weights} was trained with another text encoder: name it with --text FOLDER")
    return network(True), network(False) if cfg.beta_kl else None, vae, encoder, about


def captions(cfg):
    """D of Algorithm 2: a list of prompts. Raises UserError where there is none."""
    if cfg.prompts == "shapes":  # of the clips that data.py renders
        words = lambda i: random.Random(f"caption {cfg.seed} {i}")
        clips = range(cfg.prompt_count or 4096)
        return [shapes.caption(shapes.Clip.make(cfg.seed, i), "train", words(i))[0] for i in clips]
    return read_prompts(cfg.prompts)[: cfg.prompt_count or None]


def tune(cfg: Config, world) -> None:
    cli.check(cfg)
    ddpo, out, each = cfg.method == "ddpo", Path(cfg.out), cfg.batch * world.size
    accumulate = cfg.global_batch // each if cfg.global_batch else 7 if each < 16 else 1
    total = each * accumulate
    for wrong, what in (
        (cfg.reward_every < 1, "--reward-every: at least 1"),
        (cfg.global_batch not in (0, total), f"--global-batch is no multiple of {each}, --batch times the ranks"),
        (cfg.updates > 1 and (not ddpo or cfg.variant == "sf"), "several --updates need --method ddpo --variant is"),
        (ddpo and cfg.advantage == "batch" and total < 2, "--advantage batch needs a --global-batch of 2 or more"),
        (cfg.reward == "none", f"--reward is needed, one of {', '.join(rewards.REWARDS)}"),
    ):
        if wrong:
            raise UserError(what)
    prompts, reward = captions(cfg), rewards.make(cfg.reward, cfg.reward_weights, cfg.reward_frames, world.device)
    if not (ddpo or reward.differentiable):
        raise UserError(f"{cfg.reward} has no gradient, which --method {cfg.method} needs: --method ddpo needs none")
    student, frozen, vae, encoder, about = load(cfg, world)
    for text in prompts if isinstance(encoder, WordTable) else []:
        encoder.encode([text])  # an unknown word is found now, not in the middle
    config, steps = student.config, about.get("timesteps") or timesteps(4)
    how, schedule = cfg.transition or about.get("transition", "renoise"), Schedule(config.schedule, config.snr_shift)
    moves = graded(schedule, steps, how, cfg.truncate) if ddpo else range(len(steps))[-cfg.truncate :]
    if not moves:
        raise UserError(f"no move of {steps} by {how} has a density: DDPO needs two steps, and renoise or posterior")
    adam = torch.optim.AdamW(student.parameters(), cfg.lr, fused=True)
    saved = {"student": student}, {"adam": adam}
    going_on = cfg.resume or distributed.restarted(world)
    if not going_on:
        set_aside(out / "checkpoints", world)
    checkpoints, stopper = distributed.Checkpoints(out / "checkpoints"), distributed.Stopper(world)
    state = {"step": 0, "trained_s": 0.0, "reward_evaluations": 0, "skipped": 0, "memory": {}}
    moments, weights = rewards.Moments(reward.weights), list(reward.weights.values())
    if going_on and (newest := checkpoints.newest()):
        state = checkpoints.load(newest, *saved)
        if not state.keys() >= {"moments", "memory"}:
            raise UserError(f"{newest} is not of ddpo.py: take another --out")
        moments = rewards.Moments(**state["moments"])
        if world.main:
            cli.warn_of_precision(state.get("precision"), cfg.precision)
    elif cfg.resume:
        raise UserError(f"{out} holds no checkpoint: leave out --resume to start")

    def call(network, *inputs):
        with autocast(cfg.precision, world.device):
            return network(*inputs)

    denoiser = lambda model, text: lambda x, t: call(denoise, model, schedule, x, t, text, config.prediction)
    video = lambda x0: call(vae.decode, x0).float().clamp(-1, 1)

    def sample(texts, key, numbers, *span):
        """-> text, walk. The noise of a sample follows from the seed, the key and its number alone."""
        shape, text = (config.channels, *config.latents), encoder.encode(texts).to(world.device)
        draw = lambda i: distributed.normal(shape, (cfg.seed, key, i), numbers, world.device)
        return text, walk(denoiser(student, text), schedule, draw("start"), steps, draw, how, *span)

    def learn(loss, text, seen, **info):
        """Backward of a part of the loss; seen [(t, x_t, x_0)]: where --beta-kl holds on to the distilled student."""
        for t, x_t, x0 in seen if frozen else []:
            with torch.no_grad():
                theirs = denoiser(frozen, text)(x_t, t)
            info["kl"] = info.get("kl", 0.0) + (x0 - theirs).square().mean()
        loss = loss + cfg.beta_kl * info.get("kl", 0.0)
        (loss / accumulate).backward()
        for name, value in {"loss": loss, **info}.items():
            numbers[name] = numbers.get(name, 0.0) + value.item() / accumulate / cfg.updates

    def picture(step):
        texts = prompts[:4]
        with torch.no_grad():
            shown = video(sample(texts, "picture", range(len(texts)))[1][-1][1]).cpu()
        if world.main:
            write_grid(out / f"step{step:06d}.png", list(shown), texts)

    unseen = shapes.held_out_prompts(cfg.reward_samples) if isinstance(encoder, WordTable) else prompts
    sampler = Generator(student, vae, about, encoder, world.device, cfg.precision)
    first, in_a_row = state["step"], 0
    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, disable=not world.main)
    log = open_log(out / "log.jsonl", first) if world.main else None
    for step in bar:
        if step % cfg.save_every == 0:
            picture(step)
        begun = time.time()
        numbers, games, scored = {}, [], []
        for micro in range(accumulate):
            mine = [(micro * world.size + world.rank) * cfg.batch + i for i in range(cfg.batch)]  # of the total
            texts = [prompts[distributed.randint(len(prompts), (cfg.seed, step, "prompt", i))] for i in mine]
            k = moves[distributed.randint(len(moves), (cfg.seed, step, "k", micro))]  # alike on all ranks
            # ReFL: the reward of one predicted x_0; DRaFT: of the sample, through its last steps; DDPO: lines 4-11
            span = {"ddpo": (), "refl": (k, k), "draft": (moves[0], moves[-1])}[cfg.method]
            text, path = sample(texts, step, mine, *span)
            with torch.set_grad_enabled(not ddpo):
                each_reward = reward.each(video(path[-1][1]), texts, with_grad=not ddpo)  # (B, R)
                moments.update(each_reward, world)
                score = moments.standardise(each_reward) if len(weights) > 1 else weights[0] * each_reward[:, 0]
            if ddpo:
                games += [(mine, text, *path[i], (path[i + 1][0], *steps[i : i + 2], how, cfg.log_p)) for i in moves]
            else:
                learn(-score.mean(), text, [(steps[i], *path[i]) for i in range(span[0], span[1] + 1)])
            scored += zip(mine, texts, score.tolist())
        parts = [scored]
        if world.size > 1:
            dist.all_gather_object(parts := [None] * world.size, scored)
        scored = sorted(row for part in parts for row in part)  # by number, alike on all ranks
        score = torch.tensor([r for *_, r in scored], dtype=torch.float64)
        fine = finite = score.isfinite().all().item()
        if ddpo and finite:
            weight = advantages(cfg.advantage, score, [words for _, words, _ in scored], state["memory"])
        for _ in range(cfg.updates):
            for mine, text, x_t, x0_old, move in games if finite else []:  # lines 12-13, a move at a time
                x0, old = denoiser(student, text)(x_t, move[1]), log_probability(schedule, x_t, x0_old, *move)
                log_p = log_probability(schedule, x_t, x0, *move)
                loss, info = policy_loss(log_p, old, weight[mine].to(log_p), cfg.variant, cfg.clip_range)
                learn(loss, text, [(move[1], x_t, x0)], **{name: value / len(moves) for name, value in info.items()})
            distributed.average_gradients(student, world)
            norm = distributed.clip_gradients(student, cfg.clip) if finite else math.nan
            if distributed.any_rank(not math.isfinite(norm), world):  # an update on all ranks or on none
                fine = False
            else:
                adam.step()  # line 14
            adam.zero_grad(set_to_none=True)
        in_a_row = 0 if fine else in_a_row + 1
        trained, evaluated = state["trained_s"] + time.time() - begun, state["reward_evaluations"] + total
        counts = {"trained_s": round(trained, 3), "reward_evaluations": evaluated}
        state |= {"step": step + 1, "skipped": state["skipped"] + (not fine), **counts, "moments": asdict(moments)}
        state["precision"] = cfg.precision
        spent = 0 < cfg.max_seconds <= trained or 0 < cfg.max_evaluations <= evaluated
        final = step + 1 == cfg.iterations or distributed.any_rank(spent, world)
        if step % cfg.reward_every == 0 or final:
            many = len(steps), cfg.reward_samples, cfg.batch
            numbers |= watch.measure(sampler, reward, unseen, *many, world, moments=moments)
        if world.main:
            numbers |= {"reward_mean": score.mean().item(), "reward_std": score.std(correction=0).item()}
            bar.set_postfix({key: f"{value:.3g}" for key, value in numbers.items()})
            line = {"step": step, **counts, **numbers, "grad_norm": norm, "skipped": state["skipped"]}
            print(json.dumps(line), file=log, flush=True)
        stuck, ending = in_a_row >= cfg.patience, stopper()
        if (step + 1) % cfg.save_every == 0 or final or stuck or ending:
            checkpoints.save(step + 1, *saved, state, wait=stuck or ending or final)
        if stuck:  # none of the skipped updates has touched the weights
            raise UserError(f"{in_a_row} iterations in a row were not finite: stopped, and saved the state in {out}")
        if ending:
            if world.main:
                print(f"stopped after step {step + 1}, saved: go on with --resume --out {out}")
            return
        if final:
            break
    picture(state["step"])
    weights = distributed.gather(student)
    if world.main:
        file = out / "student.safetensors"
        with torch.device("meta"):
            model = DiT(config)
        model.load_state_dict(weights, assign=True)
        made = {"command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"), "settings": asdict(cfg)}
        made |= {"reward_evaluations": state["reward_evaluations"]}
        checkpoint.save_model(file, model, torch.float16, **about | {"tuned": [*about.get("tuned", []), made]})
        print(f"wrote {file}: python sample.py --weights {file}")


def main():
    cfg = parse(Config, None, __doc__.splitlines()[0])
    cli.start(cfg)
    world = distributed.start(cfg.device)
    tune(cfg, world)
    distributed.stop(world)


if __name__ == "__main__":
    run(main)
