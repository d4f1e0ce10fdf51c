"""What a distillation takes for given, and whether it fits together: teacher, VAE, text encoder, data, reward.

Everything a user names is read and compared here before the first step: weights with the preset, the VAE and the data
with the weights, a cache with the VAE and text encoder it was made by. The student and its average begin as copies of
the teacher, or of `--student`, the fake score always as the teacher. What all this will hold in memory is said before
it is held, so that a run too large for its GPUs tells.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import common
import distributed
import lrm as lrms
import rewards
from adapters import Adapted
from cogvideox import below, load_vae_of, read_dit_about, read_dit_config, read_dit_weights
from common import UserError
from data import PRESETS as CLIPS
from data import Ahead, Folder, LatentCache, Shapes, fingerprint, report
from distributed import STEP
from dit import PRESETS as SIZES
from dit import DiT
from generate import check_base, load_network
from losses import GRID
from schedule import Schedule, timesteps
from text import load_encoder
from vae3d import VAE3D
from world.judge import Judge
from world.shapes import held_out

COMPARED = 192  # prompts of the small world on which student and teacher are compared at the end
BUFFER_SIZE, BUFFER_BYTES = 4096, 2**28  # samples that an LRM's buffer keeps on a rank, or as many as fit
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
        named = {"student": self.student, "ema": self.ema, "fake": self.fake, "lrm": self.lrm}
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


@dataclass
class Source:
    """Where a network's weights come from: a file of ours, or a CogVideoX folder."""

    name: str  # as the user named it
    config: DiT.Config
    tensors: Callable  # () -> a file, or pairs (name, tensor), for distributed.load_sharded; read anew by each network
    about: dict  # what it says of itself


def check(cfg, ranks):
    """What can be wrong with a command before anything is read. cfg: train.py's Config."""
    common.check_flags(cfg)
    learns = cfg.beta_vsd or cfg.beta_cd or cfg.reward != "none"
    for wrong, what in (
        (cfg.m >= len(GRID), f"--m: at most {len(GRID) - 1}, the steps of CD's grid"),
        (cfg.global_batch % (cfg.batch * ranks.size), "--global-batch is no multiple of --batch times the ranks"),
        (not learns, "nothing to learn: --beta-vsd and --beta-cd are 0, and there is no --reward"),
        (
            cfg.resume and not any(Path(cfg.out).glob(f"checkpoints/{STEP}")),
            f"{cfg.out} holds no checkpoint: leave out --resume to start",
        ),
    ):
        if wrong:
            raise UserError(what)
    result = "adapter.safetensors" if cfg.rank else "student.safetensors"
    common.check_spared(Path(cfg.out, result), cfg.student, cfg.teacher)
    needed = ["data", "teacher"]
    needed += [] if is_cache(cfg.data) else ["vae", "text"]
    needed += ["vae"] if cfg.reward != "none" else []
    for name in needed:
        if not getattr(cfg, name):
            raise UserError(f"--{name} is needed: the preset {cfg.preset} has no {name} of its own")


def is_cache(data):
    return (Path(data) / "index.json").exists()


def build(cfg, ranks) -> Nets:
    """Lines 1 and 4 of Algorithm 1: theta <- theta', theta_fake <- theta'. cfg: train.py's Config.

    From a cache, training needs no text encoder, and the VAE for rewards and pictures alone; what is named of them is
    compared with the cache's own. Raises UserError for what is missing or does not fit.
    """
    check(cfg, ranks)
    teacher = read_teacher(cfg)
    student = read_student(cfg, teacher)
    if cfg.student and cfg.rank and ranks.main:
        check_base(student.about, load_network(cfg.teacher)[0], cfg.student, cfg.teacher)
    vae = load_vae_of(cfg.teacher, teacher.config, cfg.vae, cfg.precision, ranks.device) if cfg.vae else None
    data, encoder = read_data(cfg, ranks, teacher.config, vae)
    check_text(cfg, encoder, teacher, student)
    cached = isinstance(data, LatentCache)
    latents = max(data.shapes, key=math.prod)[1:] if cached else SIZES[cfg.preset].latents  # (T, h, w)
    if ranks.main:
        print(memory(cfg, student.config, ranks, latents))

    latent_reward = buffer = judge = None
    if cfg.reward != "none":
        latent_reward, buffer = make_latent_reward(cfg, ranks, data, encoder, teacher.config, latents)
    teacher_net, student_net, ema, fake, frozen = networks(cfg, ranks, teacher, student)
    about = {"kind": "student", "w": teacher.about["w"], "timesteps": timesteps(cfg.steps)}
    about |= {"fps": data.made["fps"] if cached else CLIPS[cfg.preset]["fps"], "transition": cfg.transition}
    about |= {"latents": list(latents), "text_fingerprint": encoder.fingerprint}
    about |= {"rank": cfg.rank} if cfg.rank else {}
    if "weights_dtype" in teacher.about:
        about["weights_dtype"] = teacher.about["weights_dtype"]
    if vae and cached and not cfg.sample_every and cfg.reward == "none":
        vae = None  # nothing is decoded
    file = Path(cfg.vae).parent / "judge.safetensors"
    if cfg.data == "shapes" and cfg.text == "words" and file.exists():  # it judges held-out prompts of the small world
        judge = common.load_model(file, Judge, ranks.device)[0]
    if cached:
        prompts = [prompt for prompt in encoder.known if prompt]
    else:
        prompts = held_out(max(COMPARED, cfg.reward_samples))[1] if cfg.text == "words" else PROMPTS
    return Nets(
        teacher_net, student_net, fake, ema, vae, encoder, data, about, ranks.device, prompts, judge,
        latent_reward and latent_reward.lrm, latent_reward, buffer, frozen, cfg.precision,
    )  # fmt: skip


def read_teacher(cfg) -> Source:
    """What --teacher names; `about` has the w of its guidance. Raises UserError for what does not fit the preset."""
    if Path(cfg.teacher).is_dir():
        place = below(cfg.teacher, "transformer")
        config, about = read_dit_config(place), read_dit_about(place)

        def tensors():
            return read_dit_weights(place, config)

        about["weights_dtype"] = str(next(tensors())[1].dtype)
    else:
        about = common.read_metadata(cfg.teacher, "DiT")
        config, about["w"] = common.config_of(cfg.teacher, about, DiT), about.get("w", 2.0)

        def tensors():
            return cfg.teacher

    if about.get("kind", "teacher") != "teacher":
        raise UserError(f"--teacher {cfg.teacher} says that it is a {about['kind']}: name the teacher it was made from")
    for name in ("channels", "rotary"):
        there, here = getattr(config, name), getattr(SIZES[cfg.preset], name)
        if there != here:
            raise UserError(f"{cfg.teacher} has {name} = {there}, --preset {cfg.preset} {here}: choose its own preset")
    return Source(cfg.teacher, config, tensors, about)


def read_student(cfg, teacher) -> Source:
    """What the student begins as: the teacher, or what --student names. Raises UserError for what does not fit."""
    config = replace(teacher.config, prediction=cfg.prediction or teacher.config.prediction)
    if cfg.student:
        about = common.read_metadata(cfg.student, "Adapted" if cfg.rank else "DiT")
        config = common.config_of(cfg.student, about, DiT)
        if replace(config, prediction=teacher.config.prediction) != teacher.config:
            raise UserError(f"{cfg.student} is of another size or schedule than its teacher {cfg.teacher}")
        if about.get("kind") != "student":
            raise UserError(f"--student {cfg.student} is no student's file but a {about.get('kind', 'unknown')}'s")
        if cfg.rank and about.get("rank") != cfg.rank and config == teacher.config:
            raise UserError(f"{cfg.student} has adapters of rank {about.get('rank')}: say --rank {about.get('rank')}")
        if (about.get("timesteps"), config.prediction) != (timesteps(cfg.steps), cfg.prediction or config.prediction):
            want = f"--steps {len(about.get('timesteps') or [])} --prediction {config.prediction}"
            raise UserError(f"{cfg.student} was made with {want}: say so")
    if cfg.rank and config.prediction != teacher.config.prediction:
        raise UserError("--rank keeps the teacher's last layer, hence its prediction: leave out --prediction")
    if cfg.fake_pull and config.prediction != teacher.config.prediction:
        raise UserError("--fake-pull mixes networks of one prediction: leave out --prediction")
    if config.prediction == "epsilon" and Schedule(config.schedule, config.snr_shift).a[-1] == 0:
        raise UserError("--prediction epsilon cannot start from pure noise, where this teacher's schedule starts")
    return Source(cfg.student, config, lambda: cfg.student, about) if cfg.student else replace(teacher, config=config)


def read_data(cfg, ranks, config, vae):
    """D of Algorithm 1, and the text encoder. config: the teacher's. Raises UserError for what does not fit it."""
    cached, encoder = is_cache(cfg.data), None
    if cfg.text == "words" or (cfg.text and (ranks.main or not cached)):
        where = "cpu" if cached else ranks.device
        encoder = load_encoder(cfg.text, config.text_dim, config.text_length, where, cfg.precision)
    if cached:
        used = {"vae": vae and fingerprint(vae), "text": encoder and encoder.fingerprint}
        data = LatentCache(cfg.data, **{name: value for name, value in used.items() if value})
        check_cache(cfg, data, config)
        return data, CachedText(data)
    if cfg.data == "shapes":
        return Shapes(cfg.seed), encoder
    size = [CLIPS[cfg.preset][key] for key in ("frames", "height", "width", "fps")]
    folder = Folder(cfg.data, *size, cfg.seed)
    if ranks.main:
        report(cfg.data, len(folder), folder.left_out)
    for caption in folder.captions if cfg.text == "words" else ():
        encoder.encode([caption])  # an unknown word is found now, not in the middle
    return folder, encoder


def check_cache(cfg, data, config):
    """UserError for a cache of latents that the network does not take, or of rewards other than --reward's."""
    if any(s[0] != config.channels or s[2] % config.patch or s[3] % config.patch for s in data.shapes):
        raise UserError(f"{cfg.data} holds latents {data.shapes[0]} (C, T, H, W) that {cfg.teacher} does not take")
    if cfg.reward == "none" or not data.made["reward"]:
        return
    here = {"reward": cfg.reward, "reward_frames": cfg.reward_frames}
    for key, value in (here | {"reward_weights": Path(cfg.reward_weights or "").name}).items():
        if (there := data.made.get(key)) != value:
            raise UserError(f"{cfg.data} keeps the {key.replace('_', ' ')} {there}, not {value}: make a new cache")


def check_text(cfg, encoder, *sources):
    """UserError for another text encoder than the weights were trained with."""
    for source in sources:
        if (width := encoder.encode([""]).shape[2]) != source.config.text_dim:
            there = f"{source.name} takes {source.config.text_dim}"
            raise UserError(f"the text of {cfg.text or cfg.data} is {width} wide, {there}")
        if source.about.get("text_fingerprint", encoder.fingerprint) != encoder.fingerprint:
            raise UserError(f"{source.name} was trained with another text encoder than {cfg.text or cfg.data}")


def make_latent_reward(cfg, ranks, data, encoder, config, latents):
    """The LRM of --reward, and the buffer of what it learns from. config: the teacher's; latents: (T, h, w)."""
    reward = rewards.make(cfg.reward, cfg.reward_weights, cfg.reward_frames, ranks.device)
    reward.check(data.sizes)
    parts = reward.has_parts if cfg.lrm_labels is None else cfg.lrm_labels == "parts"
    if parts and not reward.has_parts:
        raise UserError(f"{cfg.reward} is not made of parts: --lrm-labels scalar")
    kind, sizes = lrms.VideoLRM, {"channels": config.channels, "backbone": cfg.lrm_backbone}
    if parts:
        sizes |= {"outputs": reward.size_of_parts, "stride": 1 if min(latents[1:]) < 24 else 4}
        moves = reward.size is not None  # it sees motion, in clips of one length
        sizes |= {"apart": latents[0] if moves and cfg.lrm_backbone == "frames" else 0}
    elif reward.text:
        kind, sizes = lrms.TextVideoLRM, sizes | {"text_dim": config.text_dim}
    lrm = kind(seed=cfg.seed, **sizes).to(ranks.device)
    latent_reward = lrms.LatentReward(lrm, reward, rewards.Moments(), parts)
    text = tuple(encoder.encode([""]).shape[1:]) if latent_reward.reads_text else (0, 0)
    kept = min(BUFFER_SIZE, BUFFER_BYTES // (2 * (config.channels * math.prod(latents) + math.prod(text))))  # in half
    labels = reward.size_of_parts if parts else 1
    return latent_reward, lrms.Buffer(kept, (config.channels, *latents), labels, text)


def networks(cfg, ranks, teacher, student):
    """Teacher, student, its average, fake score (None without VSD), and the student as it begins (None without KL).

    teacher, student: their Sources. With --rank all but the teacher are adapters on the teacher's weights, of which
    there is one copy.
    """
    base = network(cfg, ranks, teacher, trainable=False)

    def role(source, trainable=True):
        if not cfg.rank:
            return network(cfg, ranks, source, trainable)
        return adapters_on(base, cfg, ranks, source if source.name == cfg.student else None, trainable)

    own, average = role(student), role(student).requires_grad_(False)
    if not cfg.student and {student.config.prediction, teacher.config.prediction} == {"conjugate", "velocity"}:
        for p in (*own.out.parameters(), *average.out.parameters()):  # x_0 - eps and a eps - b x_0: nearly opposites
            distributed.local(p).data.neg_()
    # a diffusion model of the teacher's kind, whatever the student predicts
    fake = role(teacher) if cfg.beta_vsd else None
    frozen = None
    if cfg.beta_kl:
        frozen = role(student, trainable=False) if cfg.student else base
    return base, own, average, fake, frozen


def network(cfg, ranks, source, trainable):
    """A DiT with the weights of a Source, sharded as the flags of a run say (train.py's or ddpo.py's)."""
    with torch.device("meta"):
        model = DiT(source.config)
    model.checkpoint_activations = cfg.checkpoint_activations and (trainable or cfg.rank > 0)
    return distributed.load_sharded(shard(model, cfg, ranks, trainable), source.tensors())


def adapters_on(base, cfg, ranks, source=None, trainable=True):
    """Adapters of --rank on a DiT, likewise; source: a file that has them, None: new ones."""
    with torch.device("meta"):
        model = Adapted(base, cfg.rank)
    model = shard(model, cfg, ranks, trainable)
    if source:
        return distributed.load_sharded(model, source.tensors())
    return distributed.materialise(model, cfg.seed)


def shard(model, cfg, ranks, trainable):
    half = ranks.device.type == "cuda" and common.uses_bfloat16(cfg.precision, ranks.device)
    return distributed.shard(model, ranks, cfg.shard, torch.bfloat16 if half else None, cfg.cpu_offload, trainable)


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
