"""Captioned clips from real files: a folder of videos and images, and a cache of their latents.

    python data.py look CLIPS --preset cogvideox-2b                 # a sheet of what training will see
    python data.py cache --preset cogvideox-2b --data CLIPS --vae FOLDER --text FOLDER --out CACHE

`Folder` reads files of any size, length and frame rate as clips of one size: `frames` frames at `fps` from a section
chosen by seed, the shorter side resized, the centre cut out. An image is a clip of one frame. `LatentCache` reads
what `cache` wrote: each clip's latents, its caption's embedding, and the reward of its decoded pixels, made once, so
that training holds neither VAE nor text encoder in memory.

A cache is a list of names (index.json), written first, and a numbered file a clip, which appears whole or not at all.
So a killed run goes on with the clips that are missing, and processes share the list without speaking to each other.

Both give samples in an order that is a function of (seed, position) alone: training remembers no more. A batch holds
clips of one shape, over all ranks; an incomplete one is filled from the shape's first.
"""

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
from tqdm import tqdm

import common
from captions import list_clips
from cogvideox import load_vae
from common import Machine, UserError, opt
from video import fit, info, is_image, load_clip, section, write_grid
from world import shapes

PRESETS = {
    "shapes": {"frames": 16, "height": 64, "width": 64, "fps": 8.0, "text_length": 20},
    "dollar": {"frames": 128, "height": 192, "width": 320, "fps": 12.0, "text_length": 256},
    "cogvideox-2b": {"frames": 49, "height": 480, "width": 720, "fps": 8.0, "text_length": 226},
    "cogvideox-5b": {"frames": 49, "height": 480, "width": 720, "fps": 8.0, "text_length": 226},
}
READERS = 4  # threads that read the clips of coming batches


class Samples:
    """Samples of several shapes, in an order without state. `shapes` has one hashable value a sample."""

    def __init__(self, shapes):
        self.shapes, self._last = shapes, (None, None)
        self.groups = {one: [i for i, shape in enumerate(shapes) if shape == one] for one in dict.fromkeys(shapes)}

    def __len__(self):
        return len(self.shapes)

    def order(self, seed, epoch, size=1):
        """The epoch's batches: lists of `size` indices of one shape; every sample is in at least one of them."""
        known, batches = self._last
        if known != (seed, epoch, size):
            rng, batches = random.Random(f"{seed}/{epoch}"), []
            for group in self.groups.values():
                group = rng.sample(group, len(group))
                full = group + group * math.ceil(size / len(group))
                batches += [full[i : i + size] for i in range(0, len(group), size)]
            rng.shuffle(batches)
            self._last = (seed, epoch, size), batches  # at once, for several threads ask
        return batches

    def at(self, seed, position, size):
        """Indices of the batch, over all ranks, at step `position` of training, counted from 0 over all epochs."""
        epoch, step = divmod(position, sum(math.ceil(len(group) / size) for group in self.groups.values()))
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
        words = [random.Random(f"caption {self.seed} {i}") for i in indices]
        return shapes.render_batch(clips), [shapes.caption(c, "train", w)[0] for c, w in zip(clips, words)]


class Folder(Samples):
    """Clips (F, H, W) = (n, height, width) at `fps` of a folder's videos and images, decoded when asked for.

    What is used and what is left out is said in a few lines; raises UserError if no clip is left. column: the captions'
    in tables. workers: files opened at a time. Of several ranks each opens its part of the files, and share(mine) gives
    the list of what all ranks have found.
    """

    def __init__(self, folder, n, height, width, fps, seed=0, column="text", workers=1, rank=0, ranks=1, share=None):
        self.folder, self.how, self.seed, self.damaged = Path(folder), (n, height, width, fps), seed, set()
        captions, skipped = list_clips(folder, column)
        mine, self.known = probe(folder, list(captions)[rank::ranks], n, fps, workers), {}
        for known, bad in share(mine) if share else [mine]:
            self.known |= known
            skipped |= bad
        self.captions = {name: caption for name, caption in captions.items() if name in self.known}
        self.names = list(self.captions)
        self.sizes = sizes_of(self.names, n, height, width)
        if rank == 0:
            report(folder, self.sizes, skipped, self.known)
        if not self.names:
            raise UserError(f"no usable clip in {folder}: it needs videos or images with captions")
        super().__init__(self.sizes)

    def batch(self, indices, step=0):
        """-> video (B, 3, F, H, W) in [-1, 1], list of B captions. Each step shows other sections of the files.

        A file that turns out to be damaged further in is named once and gives way to the next of its shape.
        """
        loaded = [self._load(i, f"{self.seed}/{step}") for i in indices]
        return torch.stack([video for video, _ in loaded]), [caption for _, caption in loaded]

    def _load(self, index, seed):
        same = self.groups[self.shapes[index]]
        place = same.index(index)
        for name in [self.names[i] for i in same[place:] + same[:place]]:
            try:
                return load_clip(self.folder / name, *self.how, seed, self.known[name]), self.captions[name]
            except UserError as e:
                if name not in self.damaged:
                    print(f"skipped: {e}", file=sys.stderr)
                self.damaged.add(name)
        raise UserError(f"no usable clip in {self.folder}")


def sizes_of(names, n, height, width):
    """(frames, height, width) of each file's clip."""
    return [(1 if is_image(name) else n, height, width) for name in names]


def probe(folder, names, n, fps, workers=1):
    """Open each file: is it long enough? -> {name: its VideoInfo}, {name: why it is not used}."""

    def one(name):
        path = Path(folder) / name
        try:
            section(path, known := info(path), n, fps)
            return known
        except UserError as e:
            return str(e).removeprefix(f"cannot read {path}: ")

    known, bad = {}, {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        opened = tqdm(pool.map(one, names), "opening the files", len(names), unit="file", leave=False)
        for name, found in zip(names, opened):
            (bad if isinstance(found, str) else known)[name] = found
    return known, bad


def report(folder, sizes, skipped, known=None):
    """Say which sizes (frames, height, width) are used, which {name: VideoInfo} known and {name: why} skipped."""
    count = lambda words: ", ".join(f"{word} ({k})" for word, k in Counter(words).most_common(5))
    print(f"{folder}: {len(sizes)} clips of {len(sizes) + len(skipped)} files are used")
    if sizes:
        print(f"  as {count(f'{f} x {w}x{h}' for f, h, w in sizes)}")
    if known:
        print(f"  filmed in {count(f'{file.width}x{file.height}' for file in known.values())}")
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


def cache(data, out, vae, text, made, reward=None, rank=0, ranks=1, device="cpu", column="text", workers=1):
    """Encode every clip of the folder `data` once into the folder `out`; goes on where an earlier run stopped.

    vae and text as in vae3d.py and text.py; `reward(video (1, 3, F, H, W), [caption]) -> (1,)`, of the decoded latents.
    `made` says how, and must be the same each time: frames, height, width, fps, seed, vae (its fingerprint), reward
    (its name or None), reward_frames, reward_weights (the file's name). Files that are new in `data` are added. Of
    `ranks` processes each makes its share, and the first says what all will use. column, workers: as in `Folder`.
    Returns how many clips there are. Raises UserError for a cache that was made otherwise, and where none is usable.
    """
    data, out, made = Path(data), Path(out), made | {"text": text.fingerprint}
    captions, skipped = list_clips(data, column)
    names = _index(out, made)["names"] if (out / "index.json").exists() else []
    names += sorted(set(captions).difference(names))
    todo = [i for i in range(len(names)) if not _file(out, i).exists()]
    size, said = [made[key] for key in ("frames", "height", "width", "fps", "seed")], {}
    if rank == 0:
        print(f"{out}: {len(names) - len(todo)} files are done already")
        known, said = probe(
            data, [names[i] for i in todo if names[i] in captions], made["frames"], made["fps"], workers
        )
        report(data, sizes_of(known, *size[:3]), skipped | said, known)
        if len(todo) == len(names) and not known:
            raise UserError(f"no usable clip in {data}: it needs videos or images with captions")
    common.save_tensors(out / "null.safetensors", {"text": text.null.to(text.dtype)})
    with common.atomic(out / "index.json") as part:  # every process writes the same
        part.write_text(json.dumps({"made": made, "names": names}))

    mine = [i for i in todo if i % ranks == rank]
    clips = Ahead(lambda k: load_clip(data / names[mine[k]], *size), workers, len(mine))
    for k, i in enumerate(tqdm(mine, unit="clip", disable=rank > 0)):
        name, tensors, about = names[i], {}, {"class": "clip", "name": names[i]}
        try:
            video = clips(k)[None].to(device)  # (1, 3, F, H, W)
            if name not in captions:
                raise UserError("its caption is gone")
            embedding = text.encode([captions[name]])  # (1, L, D)
        except UserError as e:
            about["skipped"] = str(e).removeprefix(f"cannot read {data / name}: ")
            if name not in said:
                tqdm.write(f"skipped: {name} ({about['skipped']})", sys.stderr)
        else:
            tensors = _encode(video, captions[name], vae, reward) | {"text": embedding[0].to(text.dtype)}
            about |= {"caption": captions[name], "shape": list(tensors["latents"].shape)}
        common.save_tensors(_file(out, i), tensors, about)
    return sum("shape" in _read_head(file) for file in out.glob("clip-*"))


@torch.no_grad()
def _encode(video, caption, vae, reward):
    """One clip (1, 3, F, H, W) -> its latents (C, T, h, w) and reward, if one is asked for."""
    try:
        latents = vae.encode(video).half()
    except ValueError as e:  # it knows which sizes it takes
        raise UserError(f"the VAE does not take such clips: {e}") from e
    if reward is None:
        return {"latents": latents[0]}
    # of what the latents hold, as training scores its samples (Eq. 14)
    pixels = vae.decode(latents.float()).float().clamp(-1, 1)
    return {"latents": latents[0], "reward": reward(pixels, [caption])[0].float()}


def _file(folder, i):
    return Path(folder) / f"clip-{i:06d}.safetensors"


def _read_head(file):
    """What a clip's file says of itself: its name, its caption and shape, or why it was skipped."""
    try:
        return common.read_metadata(file, "clip")
    except UserError as e:
        raise UserError(f"{e}: delete it and run data.py cache again") from e


def _index(folder, made):
    """Read index.json; what `made` says must agree with it."""
    try:
        index = json.loads((Path(folder) / "index.json").read_text())
        found, _ = index["made"], index["names"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is not a cache (no index.json that can be read): make one, data.py cache") from None
    for key, value in made.items():
        if found.get(key) != value:
            there, here = str(found.get(key))[:12], str(value)[:12]
            raise UserError(f"{folder} was made with another {key} ({there}, not {here}): make a new cache")
    return index


class LatentCache(Samples):
    """What `cache` wrote: latents, text embeddings and rewards, read clip by clip from the disk.

    Keywords such as vae=FINGERPRINT are compared with how the cache was made. Attributes: `made`, `captions`, `sizes`
    (frames, height, width) of the clips, `left_out` {name: why}, `null` (1, L, D). Raises UserError for another maker,
    a cache that is unfinished, or a damaged file.
    """

    def __init__(self, folder, **made):
        index = _index(folder, made)
        self.made, files = index["made"], [_file(folder, i) for i in range(len(index["names"]))]
        if missing := sum(not file.exists() for file in files):
            some = f"{missing} of {len(files)} clips are missing"
            raise UserError(f"the cache {folder} is unfinished, {some}: run data.py cache again")
        heads = [_read_head(file) for file in files]
        self.left_out = {head["name"]: head["skipped"] for head in heads if "skipped" in head}
        used = [(file, head) for file, head in zip(files, heads) if "shape" in head]
        if not used:
            raise UserError(f"the cache {folder} holds no clip")
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
    preset: Literal["shapes", "dollar", "cogvideox-2b", "cogvideox-5b"] = opt("shapes", "The size of the clips.")
    data: str = opt("", "The folder of videos and images with captions.")
    vae: str = opt("weights/vae.safetensors", "The VAE: a file of ours, or a pipeline's folder (or its vae/).")
    text: str = opt("words", "The text encoder: a T5 folder, or `words`, the small world's word table.")
    out: str = opt("", "The folder of the cache, or the sheet's file (look.png).")
    frames: int = opt(16, "The frames of a clip.")
    height: int = opt(64, "Its height in pixels.")
    width: int = opt(64, "Its width in pixels.")
    fps: float = opt(8.0, "Its frames a second.")
    text_length: int = opt(20, "The tokens of a prompt.")
    reward: str | None = opt(None, "A reward of the decoded clips that is kept too (see rewards.py).")
    reward_weights: str | None = opt(None, "The reward's weights, a file or folder.")
    reward_frames: int | None = opt(None, "The frames an image reward looks at (none: all).")
    seed: int = opt(0, "It chooses the section of a longer video, and the clips of the sheet.")
    caption_column: str = opt("text", "The captions' column in metadata.jsonl, .csv or .parquet.")
    workers: int = opt(READERS, "The threads that open files and decode clips ahead.")


def look(folder, out="look.png", fps=8.0, seed=0):
    """Draw a sheet of eight clips of a Folder as training sees them: the crop, the frames, their times, captions."""
    clips, captions = [], []
    for chosen in folder.order(seed, 0)[:8]:
        video, (caption,) = folder.batch(chosen)
        _, _, height, width = video[0].shape
        shrink = max(1, max(height, width) / 256)
        clips.append(fit(video[0], round(height / shrink), round(width / shrink)).clamp(-1, 1))
        captions.append(caption)
    write_grid(out, clips, captions, fps=fps)
    print(f"wrote {out}: {len(clips)} clips, each as frames at the times above them")


def main():
    command, *words = sys.argv[1:] or [""]
    if command not in ("cache", "look"):
        raise UserError("say what to do: data.py look CLIPS, or data.py cache --data CLIPS --out CACHE (see --help)")
    if command == "look" and words and not words[0].startswith("-"):
        words = ["--data", *words]
    cfg = common.parse(Config, words, "Draw captioned clips as training sees them, or encode them once.", PRESETS)
    if not cfg.data or not (cfg.out or command == "look"):
        raise UserError("--data and, for a cache, --out are required")
    size = cfg.frames, cfg.height, cfg.width
    if command == "look":
        folder = Folder(cfg.data, *size, cfg.fps, cfg.seed, cfg.caption_column, cfg.workers)
        return look(folder, cfg.out or "look.png", cfg.fps, cfg.seed)
    if cfg.height % 8 or cfg.width % 8 or not cfg.fps:  # found now: a cache that has begun remembers how it was made
        raise UserError("--height and --width are multiples of 8 (a latent's pixels), and --fps is above 0")
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cfg.device == "cuda" else cfg.device
    # here, since whoever only reads a cache or a folder needs none of these
    import rewards
    from text import load_encoder

    common.start(cfg)
    text = load_encoder(cfg.text, length=cfg.text_length, device=device, precision=cfg.precision)
    vae = load_vae(cfg.vae)
    vae = vae if common.uses_bfloat16(cfg.precision, device) else vae.float()  # published ones may be in half precision
    score = None
    if cfg.reward:
        reward = rewards.make(cfg.reward, cfg.reward_weights, cfg.reward_frames, device)
        reward.check(sizes_of(list_clips(cfg.data, cfg.caption_column)[0], *size))
        score = reward
    made = {k: getattr(cfg, k) for k in ("frames", "height", "width", "fps", "seed", "reward", "reward_frames")}
    made |= {"vae": fingerprint(vae), "reward_weights": Path(cfg.reward_weights or "").name}
    vae, how = vae.eval().to(device), (cfg.caption_column, cfg.workers)
    n = cache(cfg.data, cfg.out, vae, text, made, score, rank, ranks, device, *how)
    print(f"{cfg.out}: {n} clips")


if __name__ == "__main__":
    common.run(main)
