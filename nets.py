"""What a distillation takes for given, and whether it fits together: teacher, VAE, text encoder, data, reward.

Everything a user names is read and compared here before the first step: weights with the preset, the VAE and the data
with the weights, a cache with the VAE and text encoder it was made by. The three trained networks begin as copies of
the teacher. What all this will hold in memory is said before it is held, so that a run too large for its GPUs tells.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import common
import distributed
import lrm as lrms
import rewards
from adapters import Adapted
from cogvideox import below, load_vae, read_dit_about, read_dit_config, read_dit_weights
from common import UserError
from data import PRESETS as CLIPS
from data import READERS, Ahead, Folder, LatentCache, Shapes, fingerprint, report
from distributed import every
from dit import PRESETS as SIZES
from dit import DiT
from losses import GRID
from schedule import Schedule, timesteps
from text import load_encoder
from vae3d import VAE3D
from world.judge import Judge
from world.shapes import held_out_prompts

JUDGED = 192  # prompts of the small world on which student and teacher are compared at the end
KEPT, KEPT_BYTES = 512, 2**28  # samples that an LRM's buffer keeps on a rank, or as many as fit
PROMPTS = [  # what pictures show where the data has no captions to lend
    "a red car drives along a road by the sea",
    "a cat walks over a wooden floor",
    "waves break on a beach at sunset",
    "a person plays the guitar in a park",
]


@dataclass
class Nets:
    """What Algorithm 1 takes for given and what it makes."""

    teacher: DiT
    student: DiT
    fake: DiT | None
    ema: DiT
    vae: VAE3D | None
    encoder: object  # of text.py, or CachedText
    data: object  # D: pairs of captions and clips, or of embeddings and latents
    about: dict  # what the student's file will say of itself
    device: torch.device
    prompts: list[str]  # for pictures, and for the judge
    judge: Judge | None = None
    lrm: torch.nn.Module | None = None
    latent_reward: lrms.LatentReward | None = None
    buffer: lrms.Buffer | None = None  # what the LRM has learned from lately
    frozen: DiT | None = None  # the student as it begins, where --beta-kl holds on to it
    precision: str = "auto"  # in which they compute, see common.py
    clips: Ahead | None = None  # the batches of data, made ahead

    def __post_init__(self):
        self.schedule = Schedule(self.teacher.config.schedule, self.teacher.config.snr_shift)
        self.null = self.encoder.encode([""]).to(self.device)  # (1, L, D)
        named = {"student": self.student, "ema": self.ema, "fake": self.fake, "lrm": self.lrm, "buffer": self.buffer}
        self.modules = {name: module for name, module in named.items() if module is not None}


class CachedText:
    """In a text encoder's place, what a cache kept of it: the embeddings of "" and of a few videos' captions."""

    def __init__(self, cache, n=16):
        largest = max(cache.shapes, key=math.prod)
        videos = [i for i, shape in enumerate(cache.shapes) if shape == largest]
        self.known = {cache.captions[i]: cache.batch([i])["text"][0] for i in videos[:n]} | {"": cache.null[0]}
        self.fingerprint = cache.made["text"]

    def encode(self, prompts):
        return torch.stack([self.known[prompt] for prompt in prompts])


def check(cfg, ranks):
    """What can be wrong with a command before anything is read. cfg: train.py's Config."""
    common.check_flags(cfg)
    least, largest = cfg.t_range if len(cfg.t_range) == 2 else (0, -1)
    learns = cfg.beta_vsd or cfg.beta_cd or cfg.reward != "none"
    for wrong, what in (
        (cfg.m >= len(GRID), f"--m: at most {len(GRID) - 1}, the steps of CD's grid"),
        (not 0 <= least <= largest <= 999, "--t-range: two steps, 0 <= least <= largest <= 999"),
        (len(cfg.betas) != 2, "--betas: two numbers"),
        (cfg.global_batch % (cfg.batch * ranks.size), "--global-batch is no multiple of --batch times the ranks"),
        (cfg.reward_samples % cfg.reward_repeats, "--reward-samples: a multiple of --reward-repeats"),
        (not learns, "nothing to learn: --beta-vsd and --beta-cd are 0, and there is no --reward"),
    ):
        if wrong:
            raise UserError(what)


def build(cfg, ranks) -> Nets:
    """Lines 1 and 4 of Algorithm 1: theta <- theta', theta_fake <- theta'. cfg: train.py's Config.

    From a cache, training needs no text encoder, and the VAE for rewards and pictures alone; what is named of them is
    compared with the cache's own. Raises UserError for what is missing or does not fit.
    """
    check(cfg, ranks)
    cached = (Path(cfg.data) / "index.json").exists()
    for name in ("data", "teacher", *(() if cached else ("vae", "text")), *(("vae",) if cfg.reward != "none" else ())):
        if not getattr(cfg, name):
            raise UserError(f"--{name} is needed: the preset {cfg.preset} has no {name} of its own")
    if folder := Path(cfg.teacher).is_dir():
        place = below(cfg.teacher, "transformer")  # read anew by each network: no rank holds a whole one
        config, texts, said = read_dit_config(place), {}, read_dit_about(place)
        w = 5.0  # published weights are made for a guidance scale of 6
        weights = lambda: read_dit_weights(place, config)
    else:
        said = common.read_metadata(cfg.teacher, "DiT")
        config, w, weights = DiT.Config(**said["config"]), said.get("w", 2.0), lambda: cfg.teacher
        texts = {cfg.teacher: said.get("text_fingerprint")}
    if said.get("kind", "teacher") != "teacher":
        raise UserError(f"--teacher {cfg.teacher} says that it is a {said['kind']}: name the teacher it was made from")
    for name in ("channels", "rotary"):
        there, here = getattr(config, name), getattr(SIZES[cfg.preset], name)
        if there != here:
            raise UserError(f"{cfg.teacher} has {name} = {there}, --preset {cfg.preset} {here}: choose its own preset")
    own, begin = replace(config, prediction=cfg.prediction or config.prediction), weights
    if cfg.student:
        said, begin = common.read_metadata(cfg.student, "Adapted" if cfg.rank else "DiT"), lambda: cfg.student
        own, texts[cfg.student] = DiT.Config(**said["config"]), said.get("text_fingerprint")
        if replace(own, prediction=config.prediction) != config:
            raise UserError(f"{cfg.student} is of another size or schedule than its teacher {cfg.teacher}")
        if said.get("kind") != "student":
            raise UserError(f"--student {cfg.student} is no student's file but a {said.get('kind', 'unknown')}'s")
        if said.get("rank", 0) != cfg.rank and own == config:
            raise UserError(f"{cfg.student} has adapters of rank {said.get('rank')}: say --rank {said.get('rank')}")
        if (said.get("timesteps"), own.prediction) != (timesteps(cfg.steps), cfg.prediction or own.prediction):
            want = f"--steps {len(said.get('timesteps') or [])} --prediction {own.prediction}"
            raise UserError(f"{cfg.student} was made with {want}: say so")
    if cfg.rank and own.prediction != config.prediction:
        raise UserError("--rank keeps the teacher's last layer, hence its prediction: leave out --prediction")
    if own.prediction == "epsilon" and Schedule(config.schedule, config.snr_shift).a[-1] == 0:
        raise UserError("--prediction epsilon cannot start from pure noise, where this teacher's schedule starts")

    vae = load_vae(cfg.vae) if cfg.vae else None
    if vae and vae.config.latent_channels != config.channels:
        there = vae.config.latent_channels
        raise UserError(f"{cfg.vae} makes {there} latent channels, {cfg.teacher} takes {config.channels}")
    encoder = None
    if cfg.text == "words" or (cfg.text and (ranks.main or not cached)):
        where = "cpu" if cached else ranks.device
        encoder = load_encoder(cfg.text, config.text_dim, config.text_length, where, cfg.precision)
    latents, fps = SIZES[cfg.preset].latents, CLIPS[cfg.preset]["fps"]
    prompts = held_out_prompts(max(JUDGED, cfg.reward_samples)) if cfg.text == "words" else PROMPTS
    if cached:
        used = {"vae": vae and fingerprint(vae), "text": encoder and encoder.fingerprint}
        data = LatentCache(cfg.data, **{name: value for name, value in used.items() if value})
        if any(s[0] != config.channels or s[2] % config.patch or s[3] % config.patch for s in data.shapes):
            raise UserError(f"{cfg.data} holds latents {data.shapes[0]} (C, T, H, W) that {cfg.teacher} does not take")
        if ranks.main:
            report(cfg.data, data.sizes, data.left_out)
        here = {"reward_frames": cfg.reward_frames, "reward_weights": Path(cfg.reward_weights or "").name}
        for key, value in ({"reward": cfg.reward} | here).items() if cfg.reward != "none" else ():
            if data.made["reward"] and (there := data.made.get(key)) != value:
                raise UserError(f"{cfg.data} keeps the {key.replace('_', ' ')} {there}, not {value}: make a new cache")
        vae = vae if cfg.sample_every or cfg.reward != "none" else None
        encoder, latents, fps = CachedText(data), max(data.shapes, key=math.prod)[1:], data.made["fps"]
        prompts = [prompt for prompt in encoder.known if prompt]
    elif cfg.data == "shapes":
        data = Shapes(cfg.seed)
    else:
        size = CLIPS[cfg.preset]
        size, share = [size[key] for key in ("frames", "height", "width", "fps")], lambda mine: every(mine, ranks)
        data = Folder(cfg.data, *size, cfg.seed, cfg.caption_column, READERS, ranks.rank, ranks.size, share)
    if (width := encoder.encode([""]).shape[2]) != config.text_dim:
        raise UserError(f"the text of {cfg.text or cfg.data} is {width} wide, {cfg.teacher} takes {config.text_dim}")
    for file, known in texts.items():
        if known not in (None, encoder.fingerprint):
            raise UserError(f"{file} was trained with another text encoder than {cfg.text or cfg.data}")
    if ranks.main:
        print(memory(cfg, own, ranks, latents))

    teacher, student, ema, fake, frozen = networks(cfg, ranks, config, weights, own, begin)
    about = {"kind": "student", "w": w, "fps": fps, "timesteps": timesteps(cfg.steps), "transition": cfg.transition}
    about |= {"latents": list(latents), "text_fingerprint": encoder.fingerprint}
    about |= {"rank": cfg.rank} if cfg.rank else {}
    if folder:
        about["weights_dtype"] = str(next(weights())[1].dtype)
    if vae:
        vae = vae.to(ranks.device, memory_format=torch.channels_last_3d).eval().requires_grad_(False)
    lrm = latent_reward = buffer = judge = None
    if cfg.reward != "none":
        reward = rewards.make(cfg.reward, cfg.reward_weights, cfg.reward_frames, ranks.device)
        reward.check(data.sizes)
        parts = reward.has_parts if cfg.lrm_labels is None else cfg.lrm_labels == "parts"
        if parts and not reward.has_parts:
            raise UserError(f"{cfg.reward} is not made of parts: --lrm-labels scalar")
        make = lrms.TextVideoLRM if reward.text and not parts else lrms.VideoLRM
        sizes = {"channels": config.channels, "backbone": cfg.lrm_backbone}
        if parts:
            moves = any(part.size for part in reward.each_reward)  # it sees motion, in clips of one length
            sizes |= {"outputs": reward.size_of_parts, "stride": 1 if min(latents[1:]) < 24 else 4}
            sizes |= {"apart": latents[0] if moves and cfg.lrm_backbone == "frames" else 0}
        elif reward.text:
            sizes["text_dim"] = config.text_dim
        lrm, moments = make(seed=cfg.seed, **sizes).to(ranks.device), rewards.Moments(reward.weights)
        latent_reward = lrms.LatentReward(lrm, reward, moments, parts)
        text = tuple(encoder.encode([""]).shape[1:]) if latent_reward.reads_text else (0, 0)
        kept = min(KEPT, KEPT_BYTES // (2 * config.channels * math.prod(latents)))
        labels = reward.size_of_parts if parts else len(reward.weights)
        buffer = lrms.Buffer(kept, (config.channels, *latents), labels, text)
    if cfg.data == "shapes" and (file := Path(cfg.vae).parent / "judge.safetensors").exists():
        judge = common.load_model(file, Judge, ranks.device)[0]
    rest = {"judge": judge, "lrm": lrm, "latent_reward": latent_reward, "buffer": buffer, "frozen": frozen}
    rest["precision"] = cfg.precision
    return Nets(teacher, student, fake, ema, vae, encoder, data, about, ranks.device, prompts, **rest)


def networks(cfg, ranks, config, weights, own, begin):
    """Teacher, student, its average, fake score (None without VSD), and the student as it begins (None without KL).

    config, weights: the teacher's DiTConfig and what gives its tensors; own, begin: those of the student as it begins.
    With --rank all but the teacher are adapters on the teacher's weights, of which there is one copy.
    """
    half = ranks.device.type == "cuda" and common.uses_bfloat16(cfg.precision, ranks.device)
    dtype = torch.bfloat16 if half else None

    def full(trainable, config=config, weights=weights):
        with torch.device("meta"):
            model = DiT(config)
        model.checkpoint_activations = cfg.checkpoint_activations and (trainable or cfg.rank > 0)
        model = distributed.shard(model, ranks, cfg.shard, dtype, cfg.cpu_offload, trainable)
        return distributed.load_sharded(model, weights())

    def adapted(trainable, begin=None):
        with torch.device("meta"):
            model = Adapted(teacher, cfg.rank)
        model = distributed.shard(model, ranks, cfg.shard, dtype, cfg.cpu_offload, trainable)
        return distributed.load_sharded(model, begin()) if begin else distributed.materialise(model, ranks, cfg.seed)

    teacher = full(False)
    if cfg.rank:
        students = lambda trainable: adapted(trainable, begin if cfg.student else None)
        fakes = adapted
    else:
        students, fakes = lambda trainable: full(trainable, own, begin), full
    student, ema = students(True), students(True).requires_grad_(False)
    if not cfg.student and {own.prediction, config.prediction} == {"conjugate", "velocity"}:
        for p in (*student.out.parameters(), *ema.out.parameters()):  # x_0 - eps and a eps - b x_0: nearly opposites
            distributed.local(p).data.neg_()
    fake = fakes(True) if cfg.beta_vsd else None  # a diffusion model of the teacher's kind, whatever ours predicts
    frozen = None
    if cfg.beta_kl:
        frozen = students(False) if cfg.student else teacher
    return teacher, student, ema, fake, frozen


def held(cfg, config, shards, latents, half=True):
    """Bytes that each of `shards` ranks holds of networks shared by all of them: ({network: (of parameters, gradients,
    optimizer)}, of activations, estimated). config: a DiTConfig; latents: (T, h, w); half: frozen weights and
    activations in bfloat16.
    """
    per_rank = lambda model: sum(math.ceil(len(p) / shards) * p[0].numel() for p in model.parameters())  # as FSDP cuts
    with torch.device("meta"):
        base = DiT(config)
        n = per_rank(base)
        m = per_rank(Adapted(base, cfg.rank)) if cfg.rank else n  # of what learns
    frozen = 2 if half else 4  # bytes
    learning = (4 * m, 4 * m, 8 * m)  # AdamW's, in float32
    networks = {"teacher": (frozen * n, 0, 0), "student and its optimizer": learning, "its average": (4 * m, 0, 0)}
    if cfg.beta_vsd:
        networks["fake score and its optimizer"] = learning
    if cfg.beta_kl and cfg.student:
        networks["the student as it began"] = (frozen * m, 0, 0)
    # a block stores about 20 tensors of all tokens; checkpointed, its input, and the 20 while it is computed again
    tokens = cfg.batch * (config.text_length + math.prod(latents) // config.patch**2)
    blocks = config.depth + 20 if cfg.checkpoint_activations else 20 * config.depth
    passes = bool(cfg.beta_vsd or cfg.reward != "none") + bool(cfg.beta_cd)  # of the student, until the backward
    return networks, passes * blocks * tokens * config.width * (2 if half else 4)


def memory(cfg, config, ranks, latents):
    """One line: GiB that each GPU (or process) will hold. config: a DiTConfig; latents: (T, h, w)."""
    parts = {"full": ranks.size, "hybrid": int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size)), "none": 1}[cfg.shard]
    half = ranks.device.type == "cuda" and common.uses_bfloat16(cfg.precision, ranks.device)
    networks, activations = held(cfg, config, parts, latents, half)
    sizes = {name: sum(kinds) for name, kinds in networks.items()} | {"activations (estimated)": activations}
    said = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
    where = f"{'GPU' if ranks.device.type == 'cuda' else 'process'}, of {ranks.size}"
    with torch.device("meta"):
        n = sum(p.numel() for p in DiT(config).parameters())
    return f"GiB on each {where}: {said}, together {sum(sizes.values()) / 2**30:.2f} ({n:,} parameters a network)"


def memory_table(cfg):
    """A Markdown table of what each GPU of 1, 2, 4 and 8 will hold; to cfg.out as well, if that is a .json file."""
    from evals import tables  # here, since training needs none of it

    rows, config = [], SIZES[cfg.preset]
    for size in (1, 2, 4, 8):
        networks, activations = held(cfg, config, size if cfg.shard != "none" else 1, config.latents)
        kinds = dict(zip(("parameters", "gradients", "optimizer"), map(sum, zip(*networks.values()))))
        rows.append({"preset": cfg.preset, "rank": cfg.rank, "ranks": size, **kinds, "activations": activations})
    return tables.table([tables.save(cfg, "sharding", rows=rows)])
