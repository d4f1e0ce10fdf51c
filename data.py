"""Captioned clips from real files: a folder of videos and images, and a cache of their latents.

    python data.py look --preset cogvideox-2b --data CLIPS --out look.png      # a sheet of what training will see
    python data.py cache --preset cogvideox-2b --data CLIPS --vae FOLDER --text FOLDER --out CACHE

`Folder` reads files of any size, length and frame rate as clips of one size: `frames` frames at `fps` from a section
chosen by seed, the shorter side resized, the centre cut out. An image is a clip of one frame. `LatentCache` reads
what `cache` wrote: each clip's latents, its caption's embedding, and the reward of its decoded pixels, made once, so
that training needs no text encoder in memory, and a VAE for rewards and pictures alone.

A cache is a list of names (index.json), written first, and a numbered file a clip, which appears whole or not at all.
So a killed run goes on with the clips that are missing, and processes share the list without speaking to each other.

Both give samples in an order that is a function of (seed, position) alone: training remembers no more. A batch holds
clips of one shape, over all ranks; an incomplete one is filled from the shape's first.
"""

import json
import math
import os
import random
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from tqdm import tqdm

import common
from captions import list_clips
from cogvideox import load_vae
from common import Machine, UserError, opt
from text import load_encoder
from video import is_image, load_clip, section, write_grid
from world import shapes

PRESETS = {
    "shapes": {"frames": 16, "height": 64, "width": 64, "fps": 8.0, "text_length": 20},
    "dollar": {"frames": 128, "height": 192, "width": 320, "fps": 12.0, "text_length": 256},
    "cogvideox-2b": {"frames": 49, "height": 480, "width": 720, "fps": 8.0, "text_length": 226},
}
PRESETS["cogvideox-5b"] = PRESETS["cogvideox-2b"]
READERS = 4  # threads that read the clips of coming batches


class Samples:
    """Samples of several shapes, in an order without state. `shapes` has one hashable value a sample."""

    def __init__(self, shapes):
        self.shapes, self.order = shapes, lru_cache(2)(self._order)
        self.groups = {one: [i for i, shape in enumerate(shapes) if shape == one] for one in dict.fromkeys(shapes)}

    def __len__(self):
        return len(self.shapes)

    def _order(self, seed, epoch, size=1):
        """The epoch's batches: lists of `size` indices of one shape; every sample is in at least one of them."""
        rng, batches = random.Random(f"{seed}/{epoch}"), []
        for group in self.groups.values():
            group = rng.sample(group, len(group))
            full = group + group * math.ceil(size / len(group))
            batches += [full[i : i + size] for i in range(0, len(group), size)]
        rng.shuffle(batches)
        return batches

    def at(self, seed, position, size):
        """Indices of the batch, over all ranks, at step `position` of training, counted from 0 over all epochs."""
        epoch, step = divmod(position, len(self.order(seed, 0, size)))  # all epochs are as long
        return self.order(seed, epoch, size)[step]


class Shapes:
    """Rendered clips of shapes.py, none of them twice: sample i is clip i of the world `seed`, with a caption."""

    sizes = ((shapes.FRAMES, shapes.SIZE, shapes.SIZE),)

    def __init__(self, seed=0):
        self.seed = seed

    def at(self, seed, position, size):
        """As in the sources below; here the order is that of the numbers."""
        return list(range(position * size, (position + 1) * size))

    def batch(self, indices, step=0):
        """-> video (B, 3, F, H, W) in [-1, 1], list of B captions."""
        clips = [shapes.Clip.make(self.seed, i) for i in indices]
        return shapes.render_batch(clips), [caption(self.seed, i) for i in indices]


def caption(seed, i):
    """The caption of the rendered clip (seed, i)."""
    return shapes.caption(shapes.Clip.make(seed, i), "train", random.Random(f"caption {seed} {i}"))[0]


class Folder(Samples):
    """Clips (F, H, W) = (n, height, width) at `fps` of a folder's videos and images, decoded when asked for.

    Attributes: `names`, `captions` and `sizes` (frames, height, width) of the clips, `left_out` {name: why}. Raises
    UserError if no clip is left.
    """

    def __init__(self, folder, n, height, width, fps, seed=0):
        self.folder, self.how, self.seed = Path(folder), (n, height, width, fps), seed
        captions, self.left_out = list_clips(folder)
        for name in tqdm(captions, "opening the files", leave=False, disable=None):
            try:
                section(self.folder / name, n, fps)
            except UserError as e:
                self.left_out[name] = str(e).rpartition(": ")[2]  # without the file's name
        self.names = [name for name in captions if name not in self.left_out]
        self.captions = [captions[name] for name in self.names]
        if not self.names:
            report(folder, 0, self.left_out)
            raise UserError(f"no usable clip in {folder}: it needs videos or images with captions")
        self.sizes = sizes_of(self.names, n, height, width)
        super().__init__(self.sizes)

    def batch(self, indices, step=0):
        """-> video (B, 3, F, H, W) in [-1, 1], list of B captions. Each step shows other sections of the files.

        A file that turns out to be damaged further in is named and gives way to the next of its shape.
        """
        loaded = [self._load(i, f"{self.seed}/{step}") for i in indices]
        return torch.stack([video for video, _ in loaded]), [caption for _, caption in loaded]

    def _load(self, index, seed):
        same = self.groups[self.shapes[index]]
        place = same.index(index)
        for i in same[place:] + same[:place]:
            try:
                return load_clip(self.folder / self.names[i], *self.how, seed), self.captions[i]
            except UserError as e:
                print(f"skipped: {e}", file=sys.stderr)
        raise UserError(f"no usable clip in {self.folder}")


def sizes_of(names, n, height, width):
    """(frames, height, width) of each file's clip."""
    return [(1 if is_image(name) else n, height, width) for name in names]


def report(folder, used, left_out):
    """Say in a line how many clips are used, and how many files {name: why} are left out for which reasons."""
    example = {why: name for name, why in left_out.items()}
    said = f"{folder}: {used} clips of {used + len(left_out)} files are used"
    for why, count in Counter(left_out.values()).most_common(5):
        said += f"; {count} left out, {why} ({example[why]})"
    print(said)


class Ahead:
    """Makes the batches that come next in other threads, so that no update waits for a file.

    make(k) gives batch k < end from k alone. With 0 workers it is made when asked for. `waited`: seconds, so far.
    """

    def __init__(self, make, workers, end):
        self.make, self.workers, self.end, self.coming, self.waited = make, workers, end, {}, 0.0
        self.pool = ThreadPoolExecutor(workers) if workers else None

    def __call__(self, k):
        begun = time.perf_counter()
        for j in range(k, min(k + self.workers + 1, self.end)) if self.workers else ():
            if j not in self.coming:
                self.coming[j] = self.pool.submit(self.make, j)
        batch = self.coming.pop(k).result() if self.workers else self.make(k)
        self.waited += time.perf_counter() - begun
        return batch


def fingerprint(model, dtype=torch.float64):
    """A model's identity: its configuration and the first values of every weight, rounded to `dtype`."""
    some = {name: w.flatten()[:16].to(dtype).tolist() for name, w in model.state_dict().items()}
    return sha256(json.dumps([asdict(model.config), some], sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def cache(data, out, vae, text, made, reward=None, rank=0, ranks=1, device="cpu"):
    """Encode every clip of the folder `data` once into the folder `out`; goes on where an earlier run stopped.

    vae and text as in vae3d.py and text.py; `reward(video (1, 3, F, H, W), [caption]) -> (1,)`, of the decoded latents.
    `made` says how, and must be the same each time: frames, height, width, fps, seed, vae (its fingerprint), reward
    (its name or None), reward_frames, reward_weights (the file's name). Files that are new in `data` are added. Of
    `ranks` processes each makes its share. A file that cannot be used is named and left out for good.
    Returns how many clips there are. Raises UserError for a cache that was made otherwise, and for an empty folder.
    """
    data, out, made = Path(data), Path(out), made | {"text": text.fingerprint}
    size = [made[key] for key in ("frames", "height", "width", "fps", "seed")]
    captions, left_out = list_clips(data)
    names = _index(out, made)["names"] if (out / "index.json").exists() else []
    names += sorted(set(captions).difference(names))
    if not names:
        raise UserError(f"no usable clip in {data}: it needs videos or images with captions")
    try:
        vae.check(*size[:3])  # before a cache has begun, which remembers how it was made
    except ValueError as e:
        raise UserError(f"the VAE does not take such clips: {e}") from e
    common.save_tensors(out / "null.safetensors", {"text": text.encode([""]).to(text.dtype)})
    with common.atomic(out / "index.json") as part:  # every process writes the same
        part.write_text(json.dumps({"made": made, "names": names}))
    if rank == 0:
        report(data, len(captions), left_out)

    mine = [i for i in range(rank, len(names), ranks) if not _file(out, i).exists()]

    def read(k):
        if names[mine[k]] not in captions:
            raise UserError("its caption is gone")
        return load_clip(data / names[mine[k]], *size)

    clips = Ahead(read, READERS, len(mine))
    for k, i in enumerate(tqdm(mine, unit="clip", disable=rank > 0)):
        about = {"class": "clip", "name": names[i], "caption": captions.get(names[i], "")}
        try:
            video = clips(k)[None].to(device)  # (1, 3, F, H, W)
            tensors = {"text": text.encode([about["caption"]])[0].to(text.dtype)}  # (L, D)
        except UserError as e:
            tqdm.write(f"skipped: {names[i]}: {e}", sys.stderr)
            common.save_tensors(_file(out, i), {}, about)  # so that it is not tried again
            continue
        latents = vae.encode(video).half()  # (1, C, T, h, w)
        if reward:  # of what the latents hold, as training scores its samples (Eq. 14)
            pixels = vae.decode(latents.float()).clamp(-1, 1)
            tensors["reward"] = reward(pixels, [about["caption"]])[0].float()
        tensors["latents"] = latents[0]
        common.save_tensors(_file(out, i), tensors, about | {"shape": list(latents[0].shape)})
    heads = [common.read_metadata(file, "clip") for file in sorted(out.glob("clip-*"))]
    changed = [head["name"] for head in heads if captions.get(head["name"], head["caption"]) != head["caption"]]
    if changed and rank == 0:
        print(f"{len(changed)} captions have changed since they were cached ({changed[0]}, ...): make a new cache")
    return sum("shape" in head for head in heads)


def _file(folder, i):
    return Path(folder) / f"clip-{i:06d}.safetensors"


def _index(folder, made):
    """Read index.json; what `made` says must agree with it."""
    try:
        index = json.loads((Path(folder) / "index.json").read_text())
        found, _ = index["made"], index["names"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder} is not a cache that data.py made: {e!r}") from e
    for key, value in made.items():
        if found.get(key) != value:
            raise UserError(f"{folder} was made with another {key} ({found.get(key)}, not {value}): make a new cache")
    return index


class LatentCache(Samples):
    """What `cache` wrote: latents, text embeddings and rewards, read clip by clip from the disk.

    Keywords such as vae=FINGERPRINT are compared with how the cache was made. Attributes: `made`, `captions`, `sizes`
    (frames, height, width) of the clips, `null` (1, L, D). Raises UserError for another maker, a cache that is
    unfinished, or a damaged file.
    """

    def __init__(self, folder, **made):
        index, files = _index(folder, made), sorted(Path(folder).glob("clip-*"))
        if len(files) < len(index["names"]):
            some = f"{len(files)} of {len(index['names'])} clips are made"
            raise UserError(f"the cache {folder} is unfinished, {some}: run data.py cache again")
        heads = [(file, common.read_metadata(file, "clip")) for file in files]
        used = [(file, head) for file, head in heads if "shape" in head]  # the others could not be read
        if not used:
            raise UserError(f"the cache {folder} holds no clip")
        self.made = index["made"]
        self.files, self.captions = [file for file, _ in used], [head["caption"] for _, head in used]
        self.null = common.load_tensors(Path(folder) / "null.safetensors")[0]["text"].float()
        super().__init__([tuple(head["shape"]) for _, head in used])
        self.sizes = [(self.made["frames"] if t > 1 else 1, 8 * h, 8 * w) for _, t, h, w in self.shapes]

    def batch(self, indices, step=0):
        """Samples of one shape -> dict: latents (B, C, T, h, w), text (B, L, D), float32; captions; reward (B,) if one
        was cached, or None.
        """
        clips = [common.load_tensors(self.files[i])[0] for i in indices]
        tensors = {key: torch.stack([clip[key].float() for clip in clips]) for key in clips[0]}
        return {"reward": None} | tensors | {"captions": [self.captions[i] for i in indices]}


@dataclass
class Config(Machine):
    preset: str = opt("shapes", "The size of the clips: shapes, dollar, cogvideox-2b or cogvideox-5b.")
    data: str = opt("", "The folder of videos and images with captions.")
    vae: str = opt("weights/vae.safetensors", "The VAE: a file of ours, or a pipeline's folder (or its vae/).")
    text: str = opt("words", "The text encoder: a T5 folder, or `words`, the small world's word table.")
    out: str = opt("", "The folder of the cache, or the file of the sheet (.png).")
    frames: int = opt(16, "The frames of a clip.")
    height: int = opt(64, "Its height in pixels.")
    width: int = opt(64, "Its width in pixels.")
    fps: float = opt(8.0, "Its frames a second.")
    text_length: int = opt(20, "The tokens of a prompt.")
    reward: str | None = opt(None, "A reward of the decoded clips that is kept too (see rewards.py).")
    reward_weights: str | None = opt(None, "The reward's weights, a file or folder.")
    reward_frames: int | None = opt(None, "The frames an image reward looks at (none: all).")
    seed: int = opt(0, "It chooses the section of a longer video, and the clips of the sheet.")


def look(cfg):
    """Draw a sheet of eight clips as training sees them, at most 256 pixels wide and high: the crop, the frames."""
    if not cfg.out.endswith(".png"):
        raise UserError(f"--out {cfg.out}: want a file NAME.png")
    common.writable(cfg.out)
    shrink = min(1, 256 / max(cfg.height, cfg.width))
    folder = Folder(cfg.data, cfg.frames, round(cfg.height * shrink), round(cfg.width * shrink), cfg.fps, cfg.seed)
    report(cfg.data, len(folder), folder.left_out)
    videos, captions = zip(*[folder.batch(chosen) for chosen in folder.order(cfg.seed, 0)[:8]])
    write_grid(cfg.out, [video[0] for video in videos], [caption for (caption,) in captions])
    print(f"wrote {cfg.out}: {len(videos)} clips")


def encode(cfg):
    """Fill the cache cfg.out; torchrun's processes share the work."""
    import rewards  # here, since whoever only reads a cache or a folder needs none

    common.start(cfg)
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cfg.device == "cuda" else cfg.device
    text = load_encoder(cfg.text, length=cfg.text_length, device=device, precision=cfg.precision)
    half = common.uses_bfloat16(cfg.precision, device)
    vae = load_vae(cfg.vae, None if half else torch.float32)  # published ones may be in half precision
    reward = None
    if cfg.reward:
        reward = rewards.make(cfg.reward, cfg.reward_weights, cfg.reward_frames, device)
        reward.check(sizes_of(list_clips(cfg.data)[0], cfg.frames, cfg.height, cfg.width))
    made = {k: getattr(cfg, k) for k in ("frames", "height", "width", "fps", "seed", "reward", "reward_frames")}
    made |= {"vae": fingerprint(vae), "reward_weights": Path(cfg.reward_weights or "").name}
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    vae = vae.to(device, memory_format=torch.channels_last_3d).eval()
    n = cache(cfg.data, cfg.out, vae, text, made, reward, rank, ranks, device)
    if not n and ranks == 1:  # else others may be at work
        raise UserError(f"{cfg.out} holds no clip: none could be encoded")
    if rank == 0:
        print(f"{cfg.out}: {n} clips")


def main():
    command, *words = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        return print(__doc__)
    cfg = common.parse(Config, words, "Draw captioned clips as training sees them, or encode them once.", PRESETS)
    if command not in ("look", "cache") or not cfg.data or not cfg.out:
        raise UserError(
            "say what to do: data.py look --data CLIPS --out SHEET.png, or data.py cache --data CLIPS --out CACHE"
        )
    if cfg.height % 8 or cfg.width % 8 or not cfg.fps:  # found now: a cache that has begun remembers how it was made
        raise UserError("--height and --width are multiples of 8 (a latent's pixels), and --fps is above 0")
    look(cfg) if command == "look" else encode(cfg)


if __name__ == "__main__":
    common.run(main)
