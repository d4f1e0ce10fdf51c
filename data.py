"""Captioned clips from real files: a folder of videos and images, and a cache of their latents.

    python data.py look CLIPS --preset cogvideox-2b                 # a sheet of what training will see
    python data.py cache --preset cogvideox-2b --data CLIPS --vae FOLDER --text FOLDER --out CACHE

`Folder` reads files of any size, length and frame rate as clips of one size: `frames` frames at `fps` from a section
chosen by seed, the shorter side resized, the centre cut out. An image is a clip of one frame. `LatentCache` reads
what `cache` wrote: each clip's latents, its caption's embedding, and the reward of its decoded pixels, made once, so
that training holds neither VAE nor text encoder in memory.

A cache is a plan and shards. The plan (index.json) says which files stand in which shard, and is written first; a
shard is a safetensors file that appears whole or not at all. So a run that was killed goes on with the shards that are
missing, any number of processes can share the plan without speaking to each other, and no clip is lost or doubled.

Both give their samples in an order that is a function of (seed, position) alone, so position is all that training
must remember. A batch holds clips of one shape, over all ranks; an incomplete one is filled from the shape's first.
"""

import contextlib
import itertools
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from captions import list_clips
from cogvideox import load_vae
from common import Machine, UserError, atomic, opt, parse, run, start, uses_bfloat16
from video import IMAGES, LISTINGS, frames, listing, write_grid
from world import shapes

PRESETS = {
    "shapes": {"frames": 16, "height": 64, "width": 64, "fps": 8.0, "text_length": 20},
    "dollar": {"frames": 128, "height": 192, "width": 320, "fps": 12.0, "text_length": 256},
    "cogvideox-2b": {"frames": 49, "height": 480, "width": 720, "fps": 8.0, "text_length": 226},
    "cogvideox-5b": {"frames": 49, "height": 480, "width": 720, "fps": 8.0, "text_length": 226},
}


def section(path, n, fps, seed=0):
    """The times in seconds of n frames at `fps`, from a start chosen by seed; an image has the one time 0.

    Raises UserError where the file cannot be opened or is too short.
    """
    if Path(path).suffix.lower() in IMAGES:
        return [0.0]
    count, last, *_ = listing(path)
    room = last - (n - 1) / fps
    if room < -0.5 * last / max(1, count - 1) or count < min(n, 2):  # each needs a frame close by
        there = f"{count} frames in {last:.2f} s"
        raise UserError(f"cannot read {path}: it is too short, {there}, where {n} at {fps:g} fps are wanted")
    start = max(0.0, room) * random.Random(f"{seed}/{Path(path).name}").random()
    return [start + i / fps for i in range(n)]


def load_clip(path, n, height, width, fps, seed=0):
    """One file -> (3, F, H, W) in [-1, 1], F = n, or 1 for an image. Raises UserError as `section` and `frames` do."""
    return torch.stack([_fit(frame, height, width) for frame in frames(path, section(path, n, fps, seed))], 1)


def _fit(picture, height, width):
    """uint8 (h, w, 3) -> (3, H, W) in [-1, 1]: the largest centred part of that shape, resized with antialiasing."""
    h, w, _ = picture.shape
    scale = max(height / h, width / w)
    size = max(height, round(h * scale)), max(width, round(w * scale))
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()  # (1, 3, h, w)
    x = F.interpolate(x, size=size, mode="bicubic", antialias=True).clamp(0, 255)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return x[:, top : top + height, left : left + width] / 127.5 - 1


class _Samples:
    """Samples of several shapes, in an order without state. `shapes` has one hashable value a sample."""

    def __init__(self, shapes):
        self.shapes, self.groups, self._memo = shapes, {}, (None, None)
        for i, shape in enumerate(shapes):
            self.groups.setdefault(shape, []).append(i)

    def __len__(self):
        return len(self.shapes)

    def order(self, seed, epoch, size=1):
        """The epoch's batches: lists of `size` indices of one shape; every sample is in at least one of them."""
        known, batches = self._memo
        if known != (seed, epoch, size):
            draw, batches = random.Random(f"{seed}/{epoch}"), []
            for group in self.groups.values():
                group = draw.sample(group, len(group))
                full = group + group * math.ceil(size / len(group))
                batches += [full[i : i + size] for i in range(0, len(group), size)]
            draw.shuffle(batches)
            self._memo = (seed, epoch, size), batches  # at once, for several threads ask
        return batches

    def at(self, seed, position, size, rank=0, ranks=1):
        """Indices of this rank's batch at step `position` of training, counted from 0 over all epochs."""
        epoch, step = divmod(position, sum(math.ceil(len(g) / (size * ranks)) for g in self.groups.values()))
        return self.order(seed, epoch, size * ranks)[step][rank * size : (rank + 1) * size]


class Shapes:
    """Rendered clips of shapes.py, none of them twice: sample i is clip i of the world `seed`, with a caption."""

    sizes = ((shapes.FRAMES, shapes.SIZE, shapes.SIZE),)

    def __init__(self, seed=0):
        self.seed = seed

    def at(self, seed, position, size, rank=0, ranks=1):
        """As in the sources below; here the order is that of the numbers."""
        first = (position * ranks + rank) * size
        return list(range(first, first + size))

    def batch(self, indices, step=0):
        """-> video (B, 3, F, H, W) in [-1, 1], list of B captions."""
        clips = [shapes.Clip.make(self.seed, i) for i in indices]
        words = [random.Random(f"caption {self.seed} {i}") for i in indices]
        return shapes.render_batch(clips), [shapes.caption(c, "train", w)[0] for c, w in zip(clips, words)]


class Folder(_Samples):
    """Clips (F, H, W) = (n, height, width) at `fps` of a folder's videos and images, decoded when asked for.

    What is used and what is left out is said in a few lines; raises UserError if no clip is left. column: the captions'
    in tables. workers: files opened at a time. Of several ranks each opens its part of the files, and share(mine) gives
    the list of what all ranks have found.
    """

    def __init__(self, folder, n, height, width, fps, seed=0, column="text", workers=1, rank=0, ranks=1, share=None):
        self.folder, self.how, self.seed, self.damaged = Path(folder), (n, height, width, fps), seed, set()
        captions, skipped = list_clips(folder, column)
        mine = (*probe(folder, list(captions)[rank::ranks], n, fps, workers), LISTINGS)
        filmed = {}
        for sizes, bad, listings in share(mine) if share else [mine]:
            filmed |= sizes
            skipped |= bad
            LISTINGS.update(listings)
        self.captions = {name: caption for name, caption in captions.items() if name in filmed}
        self.names = list(self.captions)
        self.sizes = sizes_of(self.names, n, height, width)
        if rank == 0:
            report(folder, self.sizes, skipped, filmed.values())
        if not self.names:
            raise UserError(f"no usable clip in {folder}: it needs videos or images with captions")
        super().__init__([frames for frames, *_ in self.sizes])

    def batch(self, indices, step=0):
        """-> video (B, 3, F, H, W) in [-1, 1], list of B captions. Each step shows other sections of the files.

        A file that turns out to be damaged further in is named once and gives way to the next of its shape.
        """
        videos, captions = [], []
        for i in indices:
            same = self.groups[self.shapes[i]]
            for name in [self.names[j] for j in same[same.index(i) :] + same[: same.index(i)]]:
                try:
                    videos.append(load_clip(self.folder / name, *self.how, f"{self.seed}/{step}"))
                    captions.append(self.captions[name])
                    break
                except UserError as e:
                    if name not in self.damaged:
                        print(f"skipped: {e}", file=sys.stderr)
                    self.damaged.add(name)
            else:
                raise UserError(f"no usable clip in {self.folder}")
        return torch.stack(videos), captions


def sizes_of(names, n, height, width):
    """(frames, height, width) of each file's clip."""
    return [(1 if Path(name).suffix.lower() in IMAGES else n, height, width) for name in names]


def probe(folder, names, n, fps, workers=1):
    """Look at each file's length and first frame -> {name: (width, height) as filmed}, {name: why it is not used}."""

    def one(name):
        path = Path(folder) / name
        try:
            section(path, n, fps)  # is it long enough?
            height, width, _ = next(frames(path, [0.0])).shape
            return width, height
        except UserError as e:
            return str(e).removeprefix(f"cannot read {path}: ")

    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = list(tqdm(pool.map(one, names), "opening the files", len(names), unit="file", leave=False))
    filmed = {name: value for name, value in zip(names, found) if not isinstance(value, str)}
    return filmed, {name: value for name, value in zip(names, found) if isinstance(value, str)}


def report(folder, sizes, skipped, filmed=()):
    """Say how many clips of which sizes are used, and how many files are left out, by reason, with an example each.

    sizes: (frames, height, width) of each clip; skipped: {name: why}; filmed: (width, height) of each file.
    """
    count = lambda words: ", ".join(f"{word} ({k})" for word, k in Counter(words).most_common(5))
    print(f"{folder}: {len(sizes)} clips of {len(sizes) + len(skipped)} files are used")
    if sizes:
        print(f"  as {count(f'{f} x {w}x{h}' for f, h, w in sizes)}")
    if filmed:
        print(f"  filmed in {count(f'{w}x{h}' for w, h in filmed)}")
    reasons = {}
    for name, why in skipped.items():
        reasons.setdefault(re.split("[,:('\"]", why)[0].strip(), []).append(f"{name} ({why})")  # without its details
    for names in sorted(reasons.values(), key=len, reverse=True):
        print(f"  left out: {len(names)}, e.g. {names[0]}")


class Ahead:
    """Makes the batches that come next in other threads, so that no update waits for a file.

    make(k) gives batch k < end from k alone. With 0 workers it is made when asked for. `waited`: seconds, so far.
    """

    def __init__(self, make, workers, end):
        self.make, self.workers, self.end, self.coming, self.waited = make, workers, end, {}, 0.0
        self.pool = ThreadPoolExecutor(workers) if workers else None

    def __call__(self, k):
        begun = time.perf_counter()
        try:
            if not self.workers:
                return self.make(k)
            for j in range(k, min(k + self.workers + 1, self.end)):
                if j not in self.coming:
                    self.coming[j] = self.pool.submit(self.make, j)
            return self.coming.pop(k).result()
        finally:
            self.waited += time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def fingerprint(model, dtype=torch.float64):
    """A model's identity: its configuration and the first values of every weight, rounded to `dtype`."""
    some = {name: w.flatten()[:16].to(dtype).tolist() for name, w in model.state_dict().items()}
    return sha256(json.dumps([asdict(model.config), some], sort_keys=True).encode()).hexdigest()


def cache(data, out, vae, text, made, reward=None, shard=64, rank=0, ranks=1, device="cpu", column="text", workers=1):
    """Encode every clip of the folder `data` once into the folder `out`; goes on where an earlier run stopped.

    vae and text as in vae3d.py and text.py; `reward(video (1, 3, F, H, W), [caption]) -> (1,)`, of the decoded latents.
    `made` says how, and must be the same each time: frames, height, width, fps, seed, vae (its fingerprint), reward
    (its name or None), reward_frames, reward_weights (the file's name). Files that are new in `data` since the last run
    are added. Of `ranks` processes each makes its share of the shards, and the first says what all of them will use.
    column, workers: as in `Folder`. Returns how many clips the finished shards hold. Raises UserError for a cache that
    was made otherwise, and where no clip is usable.
    """
    data, out, made = Path(data), Path(out), made | {"text": text.fingerprint}
    captions, skipped = list_clips(data, column)
    shards = _plan(out, made)["shards"] if (out / "index.json").exists() else []
    new = sorted(set(captions).difference(*shards))
    shards += [new[i : i + shard] for i in range(0, len(new), shard)]
    todo = [k for k in range(len(shards)) if not _shard(out, k).exists()]
    size, said = [made[key] for key in ("frames", "height", "width", "fps", "seed")], {}
    if rank == 0:
        heads = [_head(_shard(out, k)) for k in range(len(shards)) if k not in todo]
        names = [name for k in todo for name in shards[k] if name in captions]
        filmed, said = probe(data, names, made["frames"], made["fps"], workers)
        for _, left_out in heads:
            skipped |= left_out
        used = [sample["name"] for samples, _ in heads for sample in samples] + list(filmed)
        report(data, sizes_of(used, *size[:3]), skipped | said, filmed.values())
        if not used:
            raise UserError(f"no usable clip in {data}: it needs videos or images with captions")
    with atomic(out / "null.safetensors") as part:
        save_file({"text": text.null.to("cpu", text.dtype)}, part)
    with atomic(out / "index.json") as part:  # every process writes the same
        part.write_text(json.dumps({"made": made, "shards": shards}))

    mine = range(rank, len(shards), ranks)
    todo = [k for k in mine if k in todo]
    total, names = sum(len(shards[k]) for k in mine), [name for k in todo for name in shards[k]]
    clips, number = Ahead(lambda i: load_clip(data / names[i], *size), workers, len(names)), itertools.count()
    with tqdm(total=total, initial=total - len(names), unit="clip", disable=rank > 0) as bar:
        for k in todo:
            tensors, samples, bad = {}, [], {}
            for name in shards[k]:
                try:
                    video = clips(next(number))[None].to(device)  # (1, 3, F, H, W)
                    if (caption := captions.get(name)) is None:
                        raise UserError("its caption is gone")
                    embedding = text.encode([caption])  # (1, L, D)
                except UserError as e:
                    bad[name] = str(e).removeprefix(f"cannot read {data / name}: ")
                    if name not in said:
                        bar.write(f"skipped: {name} ({bad[name]})", sys.stderr)
                else:
                    try:
                        with torch.no_grad():
                            latents = vae.encode(video).half()  # (1, C, T, h, w)
                    except ValueError as e:  # it knows which sizes it takes
                        raise UserError(f"the VAE does not take such clips: {e}") from e
                    sample = {"latents": latents, "text": embedding.to(text.dtype)}
                    if reward is not None:
                        with torch.no_grad():  # of what the latents hold, as training scores its samples (Eq. 14)
                            pixels = vae.decode(latents.float()).float().clamp(-1, 1)
                        sample["reward"] = reward(pixels, [caption]).detach().float()
                    tensors |= {f"{len(samples)}.{key}": x[0].cpu().contiguous() for key, x in sample.items()}
                    samples.append({"name": name, "caption": caption, "shape": list(latents.shape[1:])})
                bar.update()
            with atomic(_shard(out, k)) as part:
                save_file(tensors, part, {"samples": json.dumps(samples), "skipped": json.dumps(bad)})

    finished = [_shard(out, k) for k in range(len(shards)) if _shard(out, k).exists()]
    usable = sum(len(_head(file)[0]) for file in finished)
    if len(finished) == len(shards):
        for junk in out.glob(".shard-*.tmp*"):  # what was half written when a run was killed
            junk.unlink(missing_ok=True)
        if not usable:
            raise UserError(f"no usable clip in {data}: it needs videos or images with captions")
    return usable


def _shard(out, k):
    return Path(out) / f"shard-{k:05d}.safetensors"


def _plan(folder, made):
    """Read index.json; what `made` says must agree with it."""
    try:
        plan = json.loads((Path(folder) / "index.json").read_text())
        found = plan["made"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not a cache (no index.json that can be read): make one, data.py cache") from None
    for key, value in made.items():
        if found.get(key) != value:
            there, here = str(found.get(key))[:12], str(value)[:12]
            raise UserError(f"{folder} was made with another {key} ({there}, not {here}): make a new cache")
    return plan


@contextlib.contextmanager
def _opened(path):
    """Open a safetensors file. It is compared with its own header, so one that was cut off is found here."""
    try:
        with safe_open(path, "pt") as f:
            yield f
    except (OSError, SafetensorError, TypeError, KeyError) as e:  # the last two: a file without our metadata and names
        raise UserError(f"{path} is missing or damaged: delete it and run data.py cache again ({e})") from None


def _head(path):
    with _opened(path) as f:
        return [json.loads(f.metadata()[key]) for key in ("samples", "skipped")]


class LatentCache(_Samples):
    """What `cache` wrote: latents, text embeddings and rewards, read sample by sample from the disk.

    Keywords such as vae=FINGERPRINT, text=FINGERPRINT are compared with how the cache was made. Attributes: `made`,
    `captions`, `null` (1, L, D). Raises UserError for another maker, a cache that is unfinished, or a damaged shard.
    """

    def __init__(self, folder, **made):
        plan = _plan(folder, made)
        self.folder, self.made = Path(folder), plan["made"]
        files = [_shard(folder, k) for k in range(len(plan["shards"]))]
        if missing := [file.name for file in files if not file.exists()]:
            some = f"{len(missing)} of {len(files)} shards are missing, first {missing[0]}"
            raise UserError(f"the cache {folder} is unfinished, {some}: run data.py cache again")
        samples = [(file, i, sample) for file in files for i, sample in enumerate(_head(file)[0])]
        if not samples:
            raise UserError(f"the cache {folder} holds no clip")
        self.places = [(file, i) for file, i, _ in samples]
        self.captions = [sample["caption"] for *_, sample in samples]
        with _opened(self.folder / "null.safetensors") as f:
            self.null = f.get_tensor("text").float()
        super().__init__([tuple(sample["shape"]) for *_, sample in samples])
        self.sizes = [(self.made["frames"] if t > 1 else 1, 8 * h, 8 * w) for _, t, h, w in self.shapes]
        self.left_out = {name: why for file in files for name, why in _head(file)[1].items()}

    def batch(self, indices, step=0):
        """-> dict: latents (B, C, T, h, w), text (B, L, D), float32; captions; reward (B,) if one was cached, or None.
        A weighted sum of rewards was cached as its R parts: (B, R).

        Raises ValueError for samples of several shapes.
        """
        if len({self.shapes[i] for i in indices}) != 1:
            raise ValueError("a batch holds samples of one shape; see `order`")
        batch = {"latents": [], "text": []} | ({"reward": []} if self.made["reward"] else {})
        for file, number in (self.places[i] for i in indices):
            with _opened(file) as f:
                for key, values in batch.items():
                    values.append(f.get_tensor(f"{number}.{key}").float())
        batch = {key: torch.stack(values) for key, values in batch.items()}
        return {"reward": None} | batch | {"captions": [self.captions[i] for i in indices]}


@dataclass
class Config(Machine):
    preset: Literal["shapes", "dollar", "cogvideox-2b", "cogvideox-5b"] = opt("shapes", "size of the clips")
    data: str = opt("", "folder of videos and images with captions")
    vae: str = opt("weights/vae.safetensors", "the VAE: a file of ours, or a pipeline's folder (or its vae/)")
    text: str = opt("words", "the text encoder: a T5 folder, or `words`, the small world's word table")
    out: str = opt("", "folder of the cache")
    frames: int = opt(16, "frames of a clip")
    height: int = opt(64, "pixels")
    width: int = opt(64, "pixels")
    fps: float = opt(8.0, "frames a second")
    text_length: int = opt(20, "tokens of a prompt")
    reward: str | None = opt(None, "also keep this reward of the decoded clips (see rewards.py)")
    reward_weights: str | None = opt(None, "the reward's weights, file or folder")
    reward_frames: int | None = opt(None, "frames an image reward looks at (none: all)")
    shard: int = opt(64, "clips a shard")
    seed: int = opt(0, "which section of a longer video is taken, and which clips are looked at")
    caption_column: str = opt("text", "the captions' column in metadata.jsonl, .csv or .parquet")
    workers: int = opt(4, "threads that open files and decode clips ahead")


def look(cfg):
    """Draw a sheet of eight clips with their captions as training sees them: the crop, the frames, their times."""
    size, clips, captions = (cfg.frames, cfg.height, cfg.width, cfg.fps), [], []
    folder = Folder(cfg.data, *size, cfg.seed, cfg.caption_column, cfg.workers)
    for chosen in folder.order(cfg.seed, 0)[:8]:
        video, (caption,) = folder.batch(chosen)
        small = [max(1, side * 256 // max(256, cfg.height, cfg.width)) for side in size[1:3]]
        clips.append(F.interpolate(video[0].transpose(0, 1), small, mode="area").transpose(0, 1))
        captions.append(caption)
    write_grid(out := cfg.out or "look.png", clips, captions, fps=cfg.fps)
    print(f"wrote {out}: {len(clips)} clips, each as frames at the times above them")


def main():
    words = sys.argv[2:]
    if sys.argv[1:2] not in (["cache"], ["look"]):
        raise UserError("say what to do: data.py look CLIPS, or data.py cache --data CLIPS --out CACHE (see --help)")
    if sys.argv[1] == "look":
        words = ["--data", *words] if words and not words[0].startswith("-") else words
        return look(parse(Config, words, look.__doc__, PRESETS))
    cfg = parse(Config, words, "Encode a folder of captioned clips once, for training.", PRESETS)
    if not cfg.data or not cfg.out:
        raise UserError("--data and --out are required")
    if cfg.height % 8 or cfg.width % 8 or not cfg.fps:  # found now: a cache that has begun remembers how it was made
        raise UserError("--height and --width are multiples of 8 (a latent's pixels), and --fps is above 0")
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cfg.device == "cuda" else cfg.device
    # here, since whoever only reads a cache or a folder needs none of these
    import rewards
    from text import load_encoder

    start(cfg)
    text = load_encoder(cfg.text, length=cfg.text_length, device=device, precision=cfg.precision)
    vae = load_vae(cfg.vae)
    vae = vae if uses_bfloat16(cfg.precision, device) else vae.float()  # published ones may be in half precision
    reward = rewards.make(cfg.reward, cfg.reward_weights, cfg.reward_frames, device) if cfg.reward else None
    if reward:
        reward.check(sizes_of(list_clips(cfg.data, cfg.caption_column)[0], cfg.frames, cfg.height, cfg.width))
    made = {k: getattr(cfg, k) for k in ("frames", "height", "width", "fps", "seed", "reward", "reward_frames")}
    made |= {"vae": fingerprint(vae), "reward_weights": Path(cfg.reward_weights or "").name}
    score = reward and (reward.scores if len(reward.weights) > 1 else reward)  # of a sum, each by itself
    files = cfg.caption_column, cfg.workers
    n = cache(cfg.data, cfg.out, vae.eval().to(device), text, made, score, cfg.shard, rank, ranks, device, *files)
    print(f"{cfg.out}: {n} clips" + (f" of rank {rank}" if ranks > 1 else ""))


if __name__ == "__main__":
    run(main)
