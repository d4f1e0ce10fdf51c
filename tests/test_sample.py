"""sample.py with a tiny random teacher, student and VAE; only the first run is a process of its own, for speed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cogvideox
import common
import generate
import sample
from captions import list_clips
from common import run
from dit import DiT, DiTConfig
from generate import Generator
from schedule import Schedule, timesteps
from vae3d import VAE3D, VAEConfig
from video import read_video
from world import shapes

SCRIPT = Path(sample.__file__)
FRAMES, HEIGHT, WIDTH = 16, 16, 32
PROMPT = "a red star springs at night"


def perturb(model, seed, size=0.2):
    """No layer may stay at zero, or neither words nor steps would change anything."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=noise)
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with student.safetensors, teacher.safetensors and vae.safetensors."""
    folder = tmp_path_factory.mktemp("weights")
    config = DiTConfig(
        channels=4, width=32, depth=1, heads=2, text_dim=32, text_length=16, time_dim=16, latents=(5, 2, 4)
    )
    model = perturb(DiT(config), 1)
    common.save_model(folder / "teacher.safetensors", model, kind="teacher", w=2.0)
    common.save_model(folder / "student.safetensors", model, kind="student", timesteps=[999, 749, 499, 249])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = VAE3D(VAEConfig((8, 8, 8), 4, 1, 4, patch=4, chunking="independent", chunk_frames=16, scaling_factor=1.0))
    common.save_model(folder / "vae.safetensors", vae)
    return folder


@pytest.fixture
def call(weights, tmp_path, monkeypatch, capsys):
    """call(*flags) -> (exit code, stdout, stderr), on a clone whose bundled weights are the tiny ones."""
    monkeypatch.setattr(sample, "BUNDLED", weights)
    monkeypatch.setattr(generate, "BUNDLED", weights)
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        code = 0
        try:
            run(lambda: sample.main([str(f) for f in flags]))
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def seen(monkeypatch):
    """The t (B,) of every network call, in order."""
    steps, forward = [], DiT.forward

    def spy(self, x, t, text):
        steps.append(t.tolist())
        return forward(self, x, t, text)

    monkeypatch.setattr(DiT, "forward", spy)
    return steps


@pytest.fixture
def drawn(monkeypatch):
    """The videos that are written one by one, before any codec has touched them."""
    videos, write = [], sample.write_video
    monkeypatch.setattr(sample, "write_video", lambda path, video, fps: (videos.append(video), write(path, video, fps)))
    return videos


def test_alone_as_a_process_and_again(weights, tmp_path):
    there, again = tmp_path / "elsewhere", tmp_path / "again"
    flags = ["--steps", 4, "--weights", weights / "student.safetensors", "--vae", weights / "vae.safetensors"]
    for folder in (there, again):  # both in processes of their own: the number of threads can change the last bit
        folder.mkdir()
        command = [sys.executable, str(SCRIPT), *map(str, flags)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
    assert "4 network evaluations a video, 32 in all" in done.stdout and "samples/student4-seed0.png" in done.stdout
    files = sorted((there / "samples").iterdir())
    assert [f.suffix for f in files].count(".mp4") == len(sample.PROMPTS)
    assert list(list_clips(there / "samples")[0].values()) == sample.PROMPTS
    for file in files:
        if file.suffix == ".mp4":
            frames, fps = read_video(file)
            assert frames.shape == (FRAMES, HEIGHT, WIDTH, 3) and fps == pytest.approx(8)
    for file in files:  # the same command: the same bits
        assert file.read_bytes() == (again / "samples" / file.name).read_bytes()


def test_own_prompts_are_of_the_world():
    named = [shapes.parse(prompt) for prompt in sample.PROMPTS]
    for prompt, n in zip(sample.PROMPTS, named):
        assert set(prompt.split()) <= set(shapes.WORDS)
        assert not {n.get("colour"), n.get("colour2")} & shapes.SCENE_COLOURS.get(n.get("scene"), set())
        assert "size" not in n or ("relation" not in n and n.get("action") not in ("grows", "shrinks"))
    for factor, least in (("scene", 5), ("object", 8), ("action", 4), ("relation", 1), ("camera", 2), ("look", 2)):
        assert len({n[f] for n in named for f in (factor, factor + "2") if f in n}) >= least


def test_seed_and_neighbours(call, drawn):
    other = "a blue square moves left"
    for flags in (
        ["--prompt", PROMPT],
        ["--prompt", PROMPT, other, PROMPT],
        ["--prompt", PROMPT, "--seed", 1],
    ):
        assert call(*flags)[0] == 0
    alone, first, _, third, seeded = drawn
    assert torch.equal(alone, first)  # neighbours change nothing
    for another in (third, seeded):  # also the same prompt twice is two videos
        assert not torch.allclose(alone, another, atol=1e-2)
    assert call("--prompt", other)[0] == 0
    assert not torch.allclose(alone, drawn[-1], atol=1e-2)  # the words are heard


@pytest.mark.parametrize(
    "flags, steps",
    [
        ([], [999, 749, 499, 249]),
        (["--steps", 2], [999, 499]),
        (["--steps", 1], [999]),
        (["--timesteps", "999,249"], [999, 249]),
        (["--timesteps", 749, 499, "--steps", 2], [749, 499]),
    ],
)
def test_student_steps(call, seen, flags, steps):
    code, out, _ = call("--prompt", PROMPT, *flags)
    assert code == 0 and seen == [[t] for t in steps]
    assert f"{len(steps)} network evaluations a video, {len(steps)} in all" in out


def test_teacher_is_guided_ddim(call, seen, weights):
    flags = ["--prompt", PROMPT, "--weights", weights / "teacher.safetensors"]
    code, out, _ = call(*flags)
    assert code == 0 and seen == [[t, t] for t in timesteps(50)] and "100 network evaluations a video" in out
    seen.clear()
    code, out, _ = call(*flags, "--steps", 3)
    assert code == 0 and seen == [[t, t] for t in timesteps(3)] and "guided with w = 2: 6 network evaluations" in out
    generator = Generator.load(weights / "teacher.safetensors", weights / "vae.safetensors")
    text = generator.encoder.encode([PROMPT])
    own, same, other = (generator.latents(text, [0], 3, w) for w in (None, 2, -1))  # 2 is what the weights say
    assert torch.equal(own, same) and not torch.allclose(own, other, atol=1e-2)
    seen.clear()
    generator.latents(text, [0], 3, 0)
    assert seen == [[t] for t in timesteps(3)]


@pytest.mark.parametrize("kind, transition", [("student", "renoise"), ("student", "ddim"), ("teacher", None)])
def test_a_perfect_network_draws_what_it_knows(call, drawn, weights, monkeypatch, kind, transition):
    """The exact conjugate velocity towards one clip of latents leads there from any noise, and the VAE decodes it."""
    schedule = Schedule("ddpm")
    goal = torch.randn(1, 4, 5, 2, 4, generator=torch.Generator().manual_seed(3))

    def exact(self, x, t, text):
        a, b = schedule.ab(t, x)
        return (goal - (x.double() - a * goal) / b).float()  # x_0 - eps

    monkeypatch.setattr(DiT, "forward", exact)
    model, about = common.load_model(weights / f"{kind}.safetensors", DiT)
    common.save_model("weights.safetensors", model, **about | ({"transition": transition} if transition else {}))
    flags = ["--weights", "weights.safetensors", "--precision", "fp32"]
    assert call("--prompt", PROMPT, *flags, "--steps", 4)[0] == 0
    vae, _ = common.load_model(weights / "vae.safetensors", VAE3D)
    with torch.no_grad():
        assert torch.allclose(drawn[0], vae.decode(goal)[0].clamp(-1, 1), atol=1e-4)


def test_several_prompts_in_one_file_are_tiled(call, drawn, tmp_path, monkeypatch):
    tiles, write = [], sample.write_video_grid
    monkeypatch.setattr(sample, "write_video_grid", lambda *given: (tiles.append(given), write(*given)))
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\n  a blue ring  \n", encoding="utf-8")
    assert call("--prompts", "prompts.txt", "--prompt", "a star", "--out", "new/all.gif", "--steps", 1)[0] == 0
    assert call("--prompt", "a star", "--out", "new/one.GIF", "--steps", 1)[0] == 0
    _, rows, _, captions = tiles[0]
    assert captions == [f"a star | {PROMPT}", "a blue ring"] and torch.equal(rows[0][0], drawn[0])
    tiled, fps = read_video("new/all.gif")
    assert len(tiled) == FRAMES and fps == pytest.approx(8, rel=0.05)
    assert tiled.shape[1] > 2 * HEIGHT and tiled.shape[2] > 2 * WIDTH  # 2 x 2 with one empty
    assert read_video("new/one.GIF")[0].shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert sorted(p.name for p in Path("new").iterdir()) == ["all.gif", "one.GIF"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--prompt", "a red starr"], ["starr", "star"]),
        (["--prompt", PROMPT, " "], ["empty prompt"]),
        (["--prompt", "..."], ["empty prompt"]),
        (["--prompt"], ["--prompt", "expected"]),
        (["--prompts", "none.txt"], ["none.txt"]),
        (["--prompts", "blank.txt"], ["blank.txt", "empty"]),
        (["--steps", 3], ["[999, 749, 499, 249]", "3"]),
        (["--steps", 0], ["0"]),
        (["--timesteps", 999, 500], ["749", "500"]),
        (["--timesteps", 499, 999], ["descend"]),
        (["--timesteps", 999, 499, "--steps", 4], ["--steps"]),
        (["--timesteps", 999, "--weights", "teacher.safetensors"], ["a teacher takes --steps"]),
        (["--device", "abacus"], ["abacus"]),
        (["--weights", "none.safetensors"], ["none.safetensors"]),
        (["--weights", "cut.safetensors"], ["cut.safetensors"]),
        (["--weights", "folder"], ["transformer/"]),
        (["--weights", "vae.safetensors"], ["vae.safetensors"]),
        (["--vae", "none.safetensors"], ["none.safetensors"]),
        (["--vae", "cut.safetensors"], ["cut.safetensors"]),
        (["--vae", "other.safetensors"], ["other.safetensors", "--vae"]),
        (["--weights", "t5.safetensors"], ["t5.safetensors", "--text"]),
        (["--out", "film.avi"], [".mp4", ".gif"]),
        (["--out", "film.mp4.txt"], [".mp4", ".gif"]),
        (["--out", "blank.txt/film.mp4"], ["cannot write"]),
        (["--out", "plain/deeper"], ["cannot write"]),
        (["--out", "folder.mp4"], ["folder.mp4"]),
    ],
)
def test_bad_input(call, seen, weights, tmp_path, flags, words):
    """Exit code 2, one line, no network call, and nothing new on the disk."""
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "plain").write_text("a file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    whole = (weights / "student.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in ("vae.safetensors", "teacher.safetensors"):
        (tmp_path / name).write_bytes((weights / name).read_bytes())
    if "other.safetensors" in flags:
        other = VAE3D(VAEConfig((8, 8, 8), 8, 1, 4, patch=4, chunking="independent", chunk_frames=16))
        common.save_model("other.safetensors", other)
    if "t5.safetensors" in flags:
        student, _ = common.load_model(weights / "student.safetensors", DiT)
        common.save_model("t5.safetensors", student, kind="student", text_fingerprint="another")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(
        *(["--prompt", PROMPT] if "--prompt" not in flags and "--prompts" not in flags else []), *flags
    )
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert seen == [] and sorted(tmp_path.rglob("*")) == before


def test_broken_weights_leave_nothing(call, weights, tmp_path):
    tensors, about = common.load_tensors(weights / "student.safetensors")
    tensors["out.bias"].fill_(float("nan"))
    common.save_tensors("nan.safetensors", tensors, about)
    code, _, err = call("--prompt", PROMPT, "--weights", "nan.safetensors", "--out", "film.mp4")
    assert code == 2 and "not finite" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.safetensors"]


def test_a_cogvideox_folder(call, seen, tmp_path):
    """diffusers' layout is a teacher with T5, until its config.json says that it is a student."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "panda": 3}, "<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained("all/tokenizer")
    config = DiTConfig(4, 32, 1, 2, text_dim=16, text_length=5, time_dim=16, latents=(3, 2, 4), norm_eps=1e-5)
    with torch.random.fork_rng():
        t5 = T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        T5EncoderModel(t5).save_pretrained("all/text_encoder")
        cogvideox.save_vae(VAE3D(VAEConfig((8, 8, 8, 8), 4, 1, 4)), "all/vae")
    cogvideox.save_dit(DiT(replace(config, prediction="velocity", schedule="cogvideox")), "all/transformer")
    flags = ["--weights", "all", "--prompt", "panda", "--steps", 2, "--out"]
    code, out, err = call(*flags, "panda.mp4")
    assert code == 0 and seen == [[999, 999], [499, 499]] and "teacher, 2 steps guided with w = 5" in out, err
    assert read_video("panda.mp4")[0].shape == (9, 16, 32, 3)
    file = tmp_path / "all" / "transformer" / "config.json"
    said = json.loads(file.read_text())
    said["_dollar"] |= {"kind": "student", "timesteps": [999, 499], "fps": 12}
    file.write_text(json.dumps(said))
    seen.clear()
    assert call(*flags, "student.mp4")[0] == 0 and seen == [[999], [499]]
    assert read_video("student.mp4")[1] == pytest.approx(12)
    assert call(*flags, "student.mp4", "--vae", "nothing")[0] == 2
    Path("all/vae").rename("vae")
    assert "all has no VAE: name one with --vae" in call(*flags, "student.mp4")[2]
    Path("vae").rename("all/vae")
    # published weights in half precision, of a DiT that autocast to bfloat16 could not mix with its activations
    cogvideox.save_dit(cogvideox.load_dit(Path("all/transformer")).half(), "half/transformer")
    cogvideox.save_vae(cogvideox.load_vae("all").half(), "half/vae")
    drawn = {}
    for precision, dtype in (("bf16", torch.float16), ("fp32", torch.float32)):
        model = Generator.load("half", device="cpu", text="all", precision=precision)
        assert {p.dtype for p in model.vae.parameters()} == {dtype}
        drawn[precision] = model.decode(model.latents(model.encoder.encode(["panda"]), [0], 2))
    torch.testing.assert_close(drawn["bf16"], drawn["fp32"], rtol=0, atol=0.1)
