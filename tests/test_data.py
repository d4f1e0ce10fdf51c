"""data.py: real files become clips of one size; the cache survives being killed; batches follow (seed, position)."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import common
import data
from common import UserError
from data import Folder, LatentCache, Samples, cache, list_clips
from text import WordTable
from video import load_clip, section

HERE = Path(__file__).parents[1]
WORDS = "a red blue ball rolls picture of number zero one two three four five six seven eight nine".split()  # noqa: SIM905


def film(path, n=40, fps=20, height=40, width=60, step=6):
    """A clip whose frame i is grey of brightness step * i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, "yuv420p", {"crf": "8"}
        for i in range(n):
            grey = np.full((height, width, 3), step * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def picture(path, height=50, width=30, level=100):
    Image.fromarray(np.full((height, width, 3), level, np.uint8)).save(path)


@pytest.fixture
def clips(tmp_path):
    """Usable: three videos of different sizes and rates, two images. Not usable: five other files."""
    root = tmp_path / "clips"
    film(root / "a.mp4")
    film(root / "sub" / "b.webm.mp4", n=30, fps=10, height=64, width=48)
    film(root / "c.mkv", n=75, fps=29.97, height=90, width=160, step=3)
    picture(root / "d.png")
    picture(root / "E.JPG", level=200)
    film(root / "short.mp4", n=8)
    film(root / "silent.mp4")
    (root / "broken.mp4").write_bytes((root / "a.mp4").read_bytes()[:900])
    (root / "text.png").write_text("not a picture")
    (root / "notes.pdf").write_text("not a clip at all")
    rows = [("a.mp4", "A red ball"), ("sub/b.webm.mp4", "a blue ball"), ("d.png", "picture of\u2028a ball")]
    rows += [(name, "a ball") for name in ("short.mp4", "broken.mp4", "text.png", "gone.mp4")]
    lines = [json.dumps({"file_name": name, "text": text, "more": 1}, ensure_ascii=False) for name, text in rows]
    (root / "metadata.jsonl").write_text("\n".join([*lines, ""]))
    (root / "c.txt").write_text("A ball\n rolls\n")
    (root / "E.txt").write_text("picture of a red ball")
    return root


def test_clips_are_resampled_in_time(tmp_path):
    """At 8 fps from 20: the frames nearest to multiples of 1/8 s after the section's start."""
    path = film(tmp_path / "a.mp4")
    times_of, starts = lambda n, seed: section(path, n, 8.0, seed), set()
    for seed in range(8):
        times = times_of(8, seed)
        assert np.allclose(np.diff(times), 1 / 8) and times[0] >= 0 and times[-1] <= 39 / 20 + 1e-9
        x = load_clip(path, 8, 40, 60, 8.0, seed)
        assert x.shape == (3, 8, 40, 60)
        want = torch.tensor([6 * round(t * 20) / 127.5 - 1 for t in times])
        # a time may lie halfway between two frames
        assert ((x.mean((0, 2, 3)) - want).abs() < 9 / 127.5).all()
        starts.add(times[0])
    assert len(starts) == 8 and times_of(8, 3) == times_of(8, 3)
    assert times_of(16, 1)[0] < 0.1  # 16 frames fit in almost exactly
    slow = film(tmp_path / "slow.mp4", n=5, fps=2, step=50)  # fewer frames than are wanted: each is shown repeatedly
    levels = ((load_clip(slow, 16, 40, 60, 8.0).mean((0, 2, 3)) + 1) * 127.5).round()
    assert levels.diff().ge(-1).all() and len(levels.div(50).round().unique()) == 5


def test_too_short_a_clip_is_refused(tmp_path):
    path = film(tmp_path / "a.mp4", n=37)  # the last frame at 1.8 s, 15 / 8 = 1.875 s is needed
    with pytest.raises(UserError, match="too short for 16 frames at 8 fps"):
        load_clip(path, 16, 40, 60, 8.0)
    assert load_clip(film(tmp_path / "b.mp4", n=38), 16, 40, 60, 8.0).shape[1] == 16
    with pytest.raises(UserError, match="too short"):
        load_clip(film(tmp_path / "c.mp4", n=1), 2, 40, 60, 8.0)


@pytest.mark.parametrize("height, width", [(64, 64), (24, 80), (80, 24), (16, 16), (137, 90)])
def test_clips_are_resized_and_cropped_at_the_centre(tmp_path, height, width):
    """Against Pillow, which resizes the part of the picture that is in the middle, on a picture with structure."""
    gen = np.random.default_rng(0)
    small = Image.fromarray(gen.integers(0, 255, (6, 9, 3), dtype=np.uint8))
    small.resize((91, 61), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    x = load_clip(tmp_path / "a.png", 16, height, width, 8.0)
    assert x.shape == (3, 1, height, width) and x.min() >= -1 and x.max() <= 1
    scale = max(height / 61, width / 91)
    size = max(width, round(91 * scale)), max(height, round(61 * scale))
    want = np.array(Image.open(tmp_path / "a.png").resize(size, Image.Resampling.BICUBIC))
    top, left = round((size[1] - height) / 2), round((size[0] - width) / 2)
    got = (x[:, 0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(got - want[top : top + height, left : left + width]).max() <= 1.01


def test_a_circle_stays_round_and_in_the_middle(tmp_path):
    y, x = np.mgrid[:60, :100]
    disc = ((y - 29.5) ** 2 + (x - 49.5) ** 2 < 20**2)[..., None].repeat(3, 2)
    Image.fromarray((disc * 255).astype(np.uint8)).save(tmp_path / "a.png")
    inside = load_clip(tmp_path / "a.png", 1, 30, 30, 8.0)[0, 0] > 0
    rows, cols = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    assert rows.tolist() == cols.tolist() == list(range(5, 25))


def test_folder_says_what_it_uses_and_what_it_leaves_out(clips, capsys):
    (clips / "mute.mp4").write_bytes((clips / "a.mp4").read_bytes())
    folder = Folder(clips, 16, 32, 48, 8.0)
    data.report(clips, len(folder), folder.left_out)
    said = capsys.readouterr().out
    assert said.startswith(f"{clips}: 5 clips of 12 files are used; 2 left out, it has no caption (silent.mp4); ")
    assert said.count("\n") == 1 and said.count("1 left out") == 4
    left_out = {"mute.mp4", "silent.mp4", "gone.mp4", "notes.pdf", "short.mp4", "broken.mp4", "text.png"}
    assert folder.left_out.keys() == left_out
    assert folder.left_out["short.mp4"] == "it is too short for 16 frames at 8 fps"
    assert folder.left_out["broken.mp4"] == "Invalid data found when processing input"
    assert folder.names == ["E.JPG", "a.mp4", "c.mkv", "d.png", "sub/b.webm.mp4"] and len(folder) == 5
    assert folder.sizes == [(n, 32, 48) for n in (1, 16, 16, 1, 16)]
    video, captions = folder.batch([1, 4, 2])
    assert video.shape == (3, 3, 16, 32, 48) and video.dtype == torch.float32 and video.abs().max() <= 1
    assert captions == ["A red ball", "a blue ball", "A ball rolls"]
    assert torch.equal(video, folder.batch([1, 4, 2])[0]) and not torch.equal(video, folder.batch([1, 4, 2], step=1)[0])
    images, captions = folder.batch([0, 3])
    assert images.shape == (2, 3, 1, 32, 48) and captions[0] == "picture of a red ball"
    assert images[:, 0, 0, 5, 5] == pytest.approx([200 / 127.5 - 1, 100 / 127.5 - 1], abs=0.02)


def test_look_draws_clips_as_training_sees_them(clips, tmp_path):
    """A row a clip: its caption, and its frames, cut out and at the frame rate of training."""
    command = [sys.executable, "data.py", "look", "--frames", 4, "--fps", 2, "--height", 32, "--width", 48]
    command += ["--data", clips, "--out", tmp_path / "look.png"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    assert "5 clips of 11 files are used" in done.stdout
    sheet = np.array(Image.open(tmp_path / "look.png")).astype(int)
    height, width = 2 * 32 + 4 + 16, 2 * 48 + 4  # enlarged twice, a gap, a line for the caption
    assert sheet.shape == (20 + 5 * height, 4 + 4 * width, 3)
    folder, middles = Folder(clips, 4, 32, 48, 2.0), [4 + width * x + 48 for x in range(4)]
    for y, (i,) in enumerate(folder.order(0, 0)):
        frames = folder.batch([i])[0][0, 0, :, 16, 24]  # (4,) or (1,)
        want = ((frames + 1) * 127.5).round().tolist()
        assert sheet[36 + height * y + 32, middles[: len(want)], 0].tolist() == pytest.approx(want, abs=2)
    wrong = subprocess.run([*map(str, command[:3])], capture_output=True, text=True, cwd=HERE)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1


def test_batches_are_made_ahead_and_in_order():
    asked, made = [], []

    def make(k):
        time.sleep(0.01 * (k % 3))
        made.append(k)
        return 10 * k

    ahead = data.Ahead(make, 3, 9)
    for k in range(2, 9):
        asked.append(ahead(k))
        time.sleep(0.05)
        if k < 6:
            assert set(made) == set(range(2, k + 4))  # the next three are made while nobody waits
    assert asked == [10 * k for k in range(2, 9)] and sorted(made) == list(range(2, 9))  # each once, none beyond
    assert ahead.waited > 0
    with pytest.raises(ZeroDivisionError):
        data.Ahead(lambda k: 1 / 0, 2, 9)(0)
    assert data.Ahead(make, 0, 9)(4) == 40


def test_a_clip_costs_as_much_in_a_long_file_as_in_a_short_one(tmp_path):
    """In files of 4 s and of 10 minutes."""
    seconds = {}
    for name, n in (("short.mp4", 4 * 10), ("long.mp4", 600 * 10)):
        film(tmp_path / name, n=n, fps=10, height=64, width=96, step=0)
        taken = []
        for seed in range(9):
            begun = time.perf_counter()
            load_clip(tmp_path / name, 16, 64, 64, 8.0, seed)
            taken.append(time.perf_counter() - begun)
        seconds[name] = sorted(taken)[4]
    assert seconds["long.mp4"] < 4 * seconds["short.mp4"], seconds  # twice, and room for a busy machine


def test_folder_without_usable_clips(tmp_path, clips, capsys):
    with pytest.raises(UserError, match="no such folder"):
        Folder(tmp_path / "nowhere", 16, 32, 48, 8.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no usable clip"):
        Folder(tmp_path / "empty", 16, 32, 48, 8.0)
    for name in ("d.png", "E.JPG"):
        (clips / name).unlink()
    with pytest.raises(UserError, match="no usable clip"):
        Folder(clips, 1600, 32, 48, 8.0)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "0 clips of 10 files are used; 4 left out, it is too short for 1600 frames at 8 fps (" in said


def test_a_file_damaged_further_in_gives_way(clips, capsys):
    folder = Folder(clips, 16, 32, 48, 8.0)
    (clips / "a.mp4").write_bytes(b"spoiled since")
    capsys.readouterr()
    video, captions = folder.batch([1])
    assert captions == ["A ball rolls"] and video.shape[2] == 16
    assert capsys.readouterr().err == f"skipped: cannot read {clips}/a.mp4: Invalid data found when processing input\n"
    for name in ("c.mkv", "sub/b.webm.mp4"):
        (clips / name).unlink()
    with pytest.raises(UserError, match="no usable clip"):
        folder.batch([1])


# ---------------------------------------------------------------------------------------------------------------------
# order


def test_batches_have_one_shape_and_miss_nothing():
    s = Samples(["video"] * 11 + ["image"] * 5 + ["odd"])
    for size in (1, 2, 4, 16):
        batches = s.order(seed=3, epoch=0, size=size)
        assert all(len(b) == size and len({s.shapes[i] for i in b}) == 1 for b in batches)
        seen = [i for b in batches for i in b]
        assert set(seen) == set(range(17)) and len(batches) == -(-11 // size) + -(-5 // size) + 1
        # what fills up a batch is spread evenly
        counts = np.bincount(seen)
        assert counts[:11].max() - counts[:11].min() <= 1 and counts[11:16].max() - counts[11:16].min() <= 1
    assert sorted(i for b in s.order(3, 0) for i in b) == list(range(17))
    partners = [{frozenset(b) for b in s.order(3, epoch, size=2)} for epoch in (0, 1)]
    assert len(partners[0] & partners[1]) < 5  # each epoch puts others together


def test_order_is_a_function_of_seed_and_position():
    shapes = ["video"] * 11 + ["image"] * 5
    a, b = Samples(shapes), Samples(shapes)
    walk = [a.at(1, position, 2) for position in range(30)]
    assert [b.at(1, position, 2) for position in reversed(range(30))][::-1] == walk  # no state: any way round
    assert walk[:9] != walk[9:18] and {i for w in walk[9:18] for i in w} == set(range(16))  # 9 steps an epoch
    assert [a.at(2, position, 2) for position in range(9)] != walk[:9]


# ---------------------------------------------------------------------------------------------------------------------
# the cache


@dataclass
class ToyConfig:
    scale: float = 0.5


class ToyVAE(torch.nn.Module):
    """Mean colours of 8x8 blocks of every fourth frame, for speed: all that is asked of one."""

    def __init__(self, scale=0.5):
        super().__init__()
        self.config, self.weight = ToyConfig(scale), torch.nn.Parameter(torch.tensor([scale]))

    def check(self, frames, height, width):
        if frames > 16:
            raise ValueError(f"{frames} frames cannot be encoded")

    def encode(self, video):
        return torch.nn.functional.avg_pool3d(video[:, :, ::4], (1, 8, 8)) * self.weight

    def decode(self, latents):
        """Paler than what was encoded, so that the two can be told apart."""
        return 0.9 * (latents / self.weight).repeat_interleave(8, 3).repeat_interleave(8, 4)


VAE, TEXT = ToyVAE(), WordTable(WORDS, dim=32, length=8)
MADE = {"frames": 16, "height": 32, "width": 48, "fps": 8.0, "seed": 5, "reward": None, "vae": data.fingerprint(VAE)}


def test_cache_holds_what_the_encoders_give(clips, tmp_path, capsys):
    reward = lambda video, captions: video.square().mean((1, 2, 3, 4)) + len(captions[0])
    made = MADE | {"reward": "mean"}
    assert cache(clips, tmp_path / "cache", VAE, TEXT, made, reward) == 5
    said = capsys.readouterr()
    assert f"{clips}: 8 clips of 11 files are used; " in said.out  # none has been opened yet
    assert (
        f"skipped: broken.mp4: cannot read {clips}/broken.mp4: Invalid data found when processing input\n" in said.err
    )
    got = LatentCache(tmp_path / "cache", vae=MADE["vae"], text=TEXT.fingerprint)
    assert len(got) == 5 and sorted(got.captions) == sorted(
        list_clips(clips)[0][n] for n in Folder(clips, 16, 32, 48, 8).names
    )
    assert torch.equal(got.null, TEXT.encode([""]))
    names = {caption: name for name, caption in list_clips(clips)[0].items() if caption != "a ball"}
    for i, caption in enumerate(got.captions):
        batch = got.batch([i])
        video = load_clip(clips / names[caption], 16, 32, 48, 8.0, 5)[None]
        latents = VAE.encode(video)
        assert batch["latents"].dtype == batch["text"].dtype == torch.float32 and batch["captions"] == [caption]
        assert batch["latents"].shape == latents.shape and got.shapes[i] == tuple(latents.shape[1:])
        assert torch.equal(batch["latents"], latents.half().float())
        assert torch.equal(batch["text"], TEXT.encode([caption]))
        pixels = VAE.decode(latents.half().float())  # not the file's own: the samples it is compared with are decoded
        assert batch["reward"].item() == pytest.approx(pixels.square().mean().item() + len(caption), abs=1e-5)
    assert sorted(shape[1] for shape in got.shapes) == [1, 1, 4, 4, 4]  # images and videos, each with its own T
    pair = got.at(0, 0, 2)
    assert got.batch(pair)["latents"].shape[0] == 2 == got.batch(pair)["text"].shape[0]
    assert got.sizes == [(1 + 15 * (shape[1] > 1), 32, 48) for shape in got.shapes]


def test_cache_without_reward(clips, tmp_path):
    cache(clips, tmp_path / "cache", VAE, TEXT, MADE)
    assert LatentCache(tmp_path / "cache").batch([0])["reward"] is None


def test_words_that_the_encoder_does_not_know_skip_the_clip(clips, tmp_path, capsys):
    (clips / "c.txt").write_text("a purple ball")
    assert cache(clips, tmp_path / "cache", VAE, TEXT, MADE) == 4
    assert "skipped: c.mkv: unknown word 'purple'" in capsys.readouterr().err


def made_files(folder):
    """{name of a clip: its file} in a cache that may be unfinished, and the names of all that it will hold."""
    names, found = json.loads((folder / "index.json").read_text())["names"], {}
    for file in folder.glob("clip-*"):
        with safe_open(file, "pt") as f:
            name = f.metadata()["name"]
        assert name not in found
        found[name] = file
    return found, names


KILLED = """
import sys, time
sys.path[:0] = [{here!r}, {tests!r}]
import test_data as t
class Slow(t.ToyVAE):
    def encode(self, video):
        time.sleep(0.15)
        return super().encode(video)
t.cache({clips!r}, {out!r}, Slow(), t.TEXT, t.MADE)
"""


def test_a_killed_run_goes_on_and_no_clip_is_lost_or_doubled(tmp_path, capsys):
    clips, out = tmp_path / "clips", tmp_path / "cache"
    clips.mkdir()
    for i in range(16):
        picture(clips / f"{i:02d}.png", level=10 * i)
        (clips / f"{i:02d}.txt").write_text(f"picture of number {WORDS[8 + i % 10]}")
    program = KILLED.format(here=str(HERE), tests=str(HERE / "tests"), clips=str(clips), out=str(out))
    made = {}
    for target in (4, 8):  # killed twice, each time with a clip half done
        run = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
        while len(list(out.glob("clip-*.safetensors"))) < target and run.poll() is None:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        found, names = made_files(out)
        assert target <= len(found) < 16 == len(names)
        with pytest.raises(UserError, match=r"unfinished, \d+ of 16 clips are made: run data.py cache again"):
            LatentCache(out)
        made |= {file: file.stat().st_mtime_ns for file in found.values() if file not in made}
    picture(clips / "000.png")  # a clip that is new since is added, and moves none of the others
    (clips / "000.txt").write_text("a red ball")
    assert cache(clips, out, VAE, TEXT, MADE) == 17
    assert {p: p.stat().st_mtime_ns for p in made} == made  # what was finished is not made again
    capsys.readouterr()
    (clips / "03.txt").write_text("a blue ball")
    cache(clips, out, VAE, TEXT, MADE)
    assert "1 captions have changed since they were cached (03.png, ...)" in capsys.readouterr().out
    found, names = made_files(out)
    assert sorted(found) == sorted(names) == sorted(p.name for p in clips.glob("*.png"))
    got = LatentCache(out)
    for i, name in enumerate(names):
        want = VAE.encode(load_clip(clips / name, 16, 32, 48, 8.0, 5)[None])
        assert torch.equal(got.batch([i])["latents"], want.half().float())
    assert cache(clips, out, VAE, TEXT, MADE) == 17  # nothing left to do


def test_ranks_take_their_share(clips, tmp_path, capsys):
    out = tmp_path / "cache"
    first = cache(clips, out, VAE, TEXT, MADE, rank=1, ranks=3)
    with pytest.raises(UserError, match="unfinished"):
        LatentCache(out)
    assert 0 < first < 5
    cache(clips, out, VAE, TEXT, MADE, rank=0, ranks=3)
    assert cache(clips, out, VAE, TEXT, MADE, rank=2, ranks=3) == 5 == len(LatentCache(out))
    assert sorted(made_files(out)[0]) == sorted(made_files(out)[1])
    assert capsys.readouterr().out.count("files are used") == 1  # rank 0 says it


@pytest.mark.parametrize("key, value", [("vae", "of another VAE"), ("fps", 12.0), ("reward", "hpsv2")])
def test_mixing_is_refused(clips, tmp_path, key, value):
    cache(clips, tmp_path / "cache", VAE, TEXT, MADE)
    with pytest.raises(UserError, match=f"another {key}"):
        cache(clips, tmp_path / "cache", VAE, TEXT, MADE | {key: value})
    with pytest.raises(UserError, match=f"another {key}"):
        LatentCache(tmp_path / "cache", **{key: value})
    with pytest.raises(UserError, match="another text"):
        cache(clips, tmp_path / "cache", VAE, WordTable(WORDS, 32, 8, seed=1), MADE)


def test_fingerprint_of_a_model():
    a = data.fingerprint(ToyVAE())
    assert a == data.fingerprint(ToyVAE()) != data.fingerprint(ToyVAE(0.25))
    other = ToyVAE()
    other.weight.data += 1e-3
    assert a != data.fingerprint(other)


def test_damaged_caches(clips, tmp_path):
    out = tmp_path / "cache"
    with pytest.raises(UserError, match="not a cache"):
        LatentCache(clips)
    cache(clips, out, VAE, TEXT, MADE)
    damaged = data._file(out, 1)
    whole = damaged.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:-1], b""):
        damaged.write_bytes(cut)
        with pytest.raises(UserError, match=r"clip-000001\.safetensors is not a whole"):
            LatentCache(out)
    damaged.write_bytes(whole)
    LatentCache(out)
    (out / "null.safetensors").unlink()
    with pytest.raises(UserError, match="null"):
        LatentCache(out)
    (out / "index.json").write_text('{"made": {')
    with pytest.raises(UserError, match="not a cache"):
        LatentCache(out)


def test_nothing_to_cache(clips, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no usable clip"):
        cache(tmp_path / "empty", tmp_path / "cache", VAE, TEXT, MADE)
    assert not (tmp_path / "cache").exists()
    for name in ("d.png", "E.JPG"):
        (clips / name).unlink()
    assert cache(clips, tmp_path / "cache", VAE, TEXT, MADE | {"fps": 0.01}) == 0  # the films are too short
    with pytest.raises(UserError, match="holds no clip"):
        LatentCache(tmp_path / "cache")
    with pytest.raises(UserError, match="the VAE does not take such clips: 20 frames"):
        cache(clips, tmp_path / "other", VAE, TEXT, MADE | {"frames": 20, "fps": 12.0})
    with pytest.raises(UserError, match="cannot write"):
        cache(clips, clips / "a.mp4" / "cache", VAE, TEXT, MADE)


def test_the_command(clips, tmp_path, monkeypatch):
    """`python data.py cache` with a VAE from a file, the small world's words, and a reward; and its mistakes."""

    from rewards import jpeg_compressibility
    from vae3d import VAE3D, VAEConfig
    from world import shapes
    from world.judge import Judge, JudgeConfig

    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAE3D(
            VAEConfig((8, 8, 8), 4, layers_per_block=1, groups=4, patch=4, chunking="independent", chunk_frames=16)
        )
    common.save_model(tmp_path / "vae.safetensors", vae)
    (clips / "metadata.jsonl").unlink()
    for name in ("a", "c", "d"):
        (clips / f"{name}.txt").write_text("a red circle")
    (clips / "E.txt").write_text("no shape at all")

    def run(*more):
        command = [sys.executable, "data.py", "cache", "--data", clips, "--vae", tmp_path / "vae.safetensors"]
        command += ["--out", tmp_path / "cache", "--height", "32", "--width", "48", "--device", "cpu", *more]
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=HERE)

    done = run("--reward", "jpeg_compressibility")
    assert done.returncode == 0 and "3 clips" in done.stdout, done.stderr
    assert "clip/s" in done.stderr and "skipped: E.JPG: unknown word 'no'" in done.stderr
    words = WordTable(shapes.WORDS)
    vae = common.load_model(tmp_path / "vae.safetensors", VAE3D)[0]
    got = LatentCache(tmp_path / "cache", vae=data.fingerprint(vae), text=words.fingerprint)
    video = load_clip(clips / "a.mp4", 16, 32, 48, 8.0, 0)[None]
    with torch.no_grad():
        assert torch.allclose(got.batch([0])["latents"], vae.encode(video), atol=1e-2)
        decoded = vae.decode(got.batch([0])["latents"]).clamp(-1, 1)
    kept = got.batch([0])["reward"].item()
    assert kept == pytest.approx(jpeg_compressibility(decoded).item(), abs=1e-4)
    assert abs(kept - jpeg_compressibility(video).item()) > 0.1  # the file's own pixels are others
    assert torch.equal(got.batch([0])["text"], words.encode(["a red circle"]))
    judge = tmp_path / "judge.safetensors"
    common.save_model(judge, Judge(JudgeConfig(width=8)))
    done = run("--reward", "agreement", "--reward-weights", judge)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "the reward agreement reads 16 frames of 64x64; 4 of 4 clips have others" in done.stderr
    for out, said in (([], "another frames"), (["--out", tmp_path / "new"], "the VAE does not take such clips")):
        done = run("--frames", "20", *out)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ") and said in done.stderr
    assert not (tmp_path / "new").exists()  # which could not be begun anew with other frames
    for file in clips.glob("*.txt"):
        file.write_text("no shape at all")
    done = run("--out", tmp_path / "odd")
    assert done.returncode == 2 and "odd holds no clip: none could be encoded" in done.stderr
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("--out", tmp_path / "shared").returncode == 0  # what another rank finds, this one does not know


def test_presets_fit_the_models():
    import dit

    assert set(data.PRESETS) == set(dit.PRESETS)
    for name, config in dit.PRESETS.items():
        preset = data.PRESETS[name]
        assert preset["text_length"] == config.text_length
        assert (preset["height"] // 8, preset["width"] // 8) == config.latents[1:]
    assert WordTable(["a"]).dim == dit.PRESETS["shapes"].text_dim
