"""Pretraining as a program: VAE, teacher on that VAE, judge; exact resume; weights that say how they were made."""

import contextlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import common
import pretrain
from common import UserError
from dit import DiT
from vae3d import PRESETS, VAE3D, psnr
from world.judge import Judge, JudgeConfig

ROOT = Path(__file__).parent.parent
SMALL = ["--save-every", "2", "--threads", "1"]


def run(*args):
    return subprocess.run(
        [sys.executable, "pretrain.py", *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    out = tmp_path_factory.mktemp("vae")
    done = run("vae", "--out", out, "--iterations", 4, "--images", 2, "--batch", 1, "--held-out", 8, *SMALL)
    assert done.returncode == 0, done.stderr
    return out


def test_vae_has_latents_of_unit_variance_and_says_how_it_was_made(vae):
    model, about = common.load_model(vae / "vae.safetensors", VAE3D)
    assert about["settings"]["iterations"] == 4 and about["command"].startswith("python pretrain.py vae")
    assert set(about["results"]) == {"psnr"}
    video = pretrain.shapes.render_batch([pretrain.shapes.Clip.make(pretrain.shapes.HELD_OUT, i) for i in range(8)])
    assert model.encode(video).std().item() == pytest.approx(1, rel=0.02)
    assert len((vae / "log.jsonl").read_text().splitlines()) == 4 and (vae / "step000004.png").exists()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_every_weight_moves_in_either_layout(layout):
    model = VAE3D(PRESETS["shapes"]).to(memory_format=layout)
    optimizers, before = pretrain.optimizers(model), [p.clone() for p in model.parameters()]
    assert any(p.ndim == 5 for p in optimizers[0].param_groups[0]["params"])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_muon_is_that_of_torch():
    """The same weights as `torch.optim.Muon`, which computes in bfloat16, to its rounding; in float32 nearly so."""
    shapes = [(48, 96), (96, 40), *[(8, 8)] * 12]  # of the last, more than they are wide
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    ours = {}
    for dtype in (torch.bfloat16, torch.float32):
        weights = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = pretrain.Muon(weights, dtype)
        optimizer.param_groups[0]["lr"] = 0.02
        for step in range(3):
            for i, p in enumerate(weights):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            optimizer.step()
        ours[dtype] = [p.detach() for p in weights]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    muon = torch.optim.Muon(theirs, 0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        for i, p in enumerate(theirs):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        muon.step()
    for i, p in enumerate(theirs):
        moved = (p - start[i]).norm()
        assert (ours[torch.bfloat16][i] - p).norm() < 0.05 * moved  # their order of rounding is another
        assert (ours[torch.float32][i] - p).norm() < 0.05 * moved


def test_orthogonal_has_singular_values_about_one():
    for shape in ((48, 96), (96, 40)):
        m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        s = torch.linalg.svdvals(pretrain.orthogonal(m, torch.float32))
        assert s.min() > 0.6 and s.max() < 1.25


def test_psnr_is_that_of_its_definition():
    copies = torch.full((2, 3, 1, 4, 4), 0.2)  # an error of 0.1 of the range of pixels in [0, 1]
    torch.testing.assert_close(psnr(copies, torch.zeros_like(copies)), torch.tensor([20.0, 20.0]))


def stopped_and_resumed(monkeypatch, train, cfg, step):
    """Train until the checkpoint of `step`, be killed at it, and resume."""
    save, saves = torch.save, []

    def die(state, file):
        save(state, file)
        saves.append(state["step"])
        if saves == list(range(cfg.save_every, step + 1, cfg.save_every)):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", die)
        patch.setattr(common, "atomic", contextlib.nullcontext)  # what is written is written
        Path(cfg.out).mkdir(parents=True)
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    train(replace(cfg, resume=True))


@pytest.mark.parametrize("prediction", ["conjugate", "velocity", "epsilon"])
def test_teacher_resumes_to_the_bit(vae, tmp_path, monkeypatch, prediction):
    cfg = pretrain.TeacherConfig(out=str(tmp_path / "unbroken"), vae=f"{vae}/vae.safetensors", iterations=4, batch=2)
    cfg = replace(cfg, clips=6, stills=6, images=1, save_every=2, prediction=prediction)
    pretrain.train_teacher(cfg)
    stopped_and_resumed(monkeypatch, pretrain.train_teacher, replace(cfg, out=str(tmp_path / "resumed")), 2)
    files = [common.load_tensors(tmp_path / out / "teacher.safetensors") for out in ("unbroken", "resumed")]
    assert all(torch.equal(files[0][0][k], files[1][0][k]) for k in files[0][0])
    model, about = common.load_model(tmp_path / "unbroken/teacher.safetensors", DiT)
    assert about["kind"] == "teacher" and model.config.prediction == prediction
    logs = [(tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("unbroken", "resumed")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    with pytest.raises(UserError, match="was made with another --iterations"):  # hence another cosine
        pretrain.train_teacher(replace(cfg, resume=True, iterations=8))


def test_judge_resumes_to_the_bit(tmp_path, monkeypatch):
    """Its norms keep running statistics, which a checkpoint holds too."""
    monkeypatch.setattr(pretrain, "WARMUP", 1)
    cfg = pretrain.JudgeRunConfig(out=str(tmp_path / "unbroken"), batch=2, held_out=32, iterations=4, save_every=1)
    pretrain.train_judge(cfg)
    stopped_and_resumed(monkeypatch, pretrain.train_judge, replace(cfg, out=str(tmp_path / "resumed")), 3)
    files = [common.load_tensors(tmp_path / out / "judge.safetensors")[0] for out in ("unbroken", "resumed")]
    assert all(torch.equal(files[0][k], files[1][k]) for k in files[0])


def test_a_step_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    model = Judge(JudgeConfig("conv", 8))
    cfg = pretrain.JudgeRunConfig(out=str(tmp_path), iterations=2, lr=0.1, save_every=1, device="cpu")
    video, truth = torch.zeros(2, 3, 16, 64, 64), torch.zeros(2, len(pretrain.shapes.FACTORS)).long()
    with pytest.raises(UserError, match="not finite at step 1"):
        pretrain.fit(cfg, model, lambda step: {"loss": model.loss(video + (math.nan if step else 0.0), truth)})
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 1 and all(x.isfinite().all() for x in saved["model"].values())


def test_latent_mask_is_where_a_latent_cell_shows_the_object():
    mask = torch.zeros(1, 1, 16, 64, 64)
    mask[0, 0, 0, 8, 15] = 0.5  # the first frame is a latent by itself, and one of the next one's four
    mask[0, 0, 7, 63, 0] = 1.0  # in the eighth frame, the last one of the third latent frame
    small = pretrain.latent_mask(mask)
    assert small.shape == (1, 1, 5, 8, 8) and small.sum() == 2.0
    assert small[0, 0, 0, 1, 1] == small[0, 0, 1, 1, 1] == 0.5 and small[0, 0, 2, 7, 0] == 1.0
    clip = next(c for i in range(100) if (c := pretrain.shapes.Clip.make(0, i)).action == "left")
    mask = pretrain.shapes.render([clip])[1]
    cells, covered = pretrain.latent_mask(mask) > 0, mask[0, :, 0].amax(0) > 0
    assert torch.equal(cells[0, 0, 0], covered.unfold(0, 8, 8).unfold(1, 8, 8).flatten(2).any(2))


def test_noise_steps_are_half_uniform_and_half_where_words_decide():
    t = pretrain.noise_steps(40000, torch.Generator().manual_seed(0)).double()
    uniform, middle = t.chunk(2)
    share = torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64)
    torch.testing.assert_close(uniform.quantile(share), 1000 * share, atol=2, rtol=0)
    normal = torch.distributions.Normal(1.0, 1.0).icdf(share)
    torch.testing.assert_close(middle.quantile(share), 1000 * torch.sigmoid(normal), atol=2, rtol=0)
    assert t.min() >= 0 and t.max() <= 999
    few = pretrain.noise_steps(5, torch.Generator().manual_seed(0))
    assert few.dtype == torch.int64 and [int(t) * 3 // 1000 for t in few[:3]] == [0, 1, 2] and few[3] < 732 < few[4]


@pytest.mark.parametrize("n", [2, 5, 32])
def test_small_batches_leave_out_no_noise_step(n):
    """Many small batches have the distribution of a large one: no step between the parts is never drawn."""
    source = torch.Generator().manual_seed(0)
    drawn = torch.cat([pretrain.noise_steps(n, source) for _ in range(200_000 // n)]).double()
    uniform = 1 - n // 2 / n
    edges = torch.linspace(0, 1, 51, dtype=torch.float64)  # bins of 20 steps, one around each of 50 DDIM steps
    normal = torch.distributions.Normal(1.0, 1.0).cdf(torch.logit(edges))
    want = uniform * edges.diff() + (1 - uniform) * normal.diff()
    got = torch.histogram(drawn, bins=50, range=(0.0, 1000.0)).hist / len(drawn)
    torch.testing.assert_close(got, want, rtol=0.12, atol=0)


def test_the_objects_weigh_more_and_fade(vae, tmp_path, monkeypatch):
    """The loss is linear in --object-weight; at the second of two steps the weight has fallen to half."""
    losses, masks, encode = [], [], pretrain.encode_world

    def kept(*args):
        encoded = encode(*args)
        masks.append(encoded[1])
        return encoded

    monkeypatch.setattr(pretrain, "encode_world", kept)
    for weight in (0.0, 1.0, 2.0):
        small = {"vae": f"{vae}/vae.safetensors", "iterations": 2, "batch": 2, "clips": 2, "lr": 0.0}
        small |= {"stills": 2, "images": 0}
        pretrain.train_teacher(pretrain.TeacherConfig(out=str(tmp_path / str(weight)), object_weight=weight, **small))
        log = (tmp_path / str(weight) / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    plain, once, twice = torch.tensor(losses)
    torch.testing.assert_close(twice - plain, 2 * (once - plain), rtol=1e-3, atol=1e-5)
    assert (once > plain).all()
    covered = masks[0].float()
    assert covered.amax() == 1 and 0 < covered.mean() < 1  # with random weights the error is about alike everywhere
    share = (once - plain) / plain / covered.mean()
    assert 0.5 < share[0] < 2 and 0.25 < share[1] < 0.75, share


def test_judge(tmp_path):
    done = run("judge", "--out", tmp_path, "--iterations", 2, "--batch", 2, "--held-out", 32, *SMALL)
    assert done.returncode == 0, done.stderr
    _, about = common.load_model(tmp_path / "judge.safetensors", Judge)
    assert set(about["results"]) == set(pretrain.shapes.FACTORS)


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "vae|teacher|judge"),
        (["dog"], "vae|teacher|judge"),
        (["teacher", "--vae", "nowhere.safetensors"], "nowhere.safetensors"),
        (["vae", "--resume", "--out", "nowhere"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(args, said):
    done = run(*args)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_earlier_run_is_neither_lost_nor_gone_on_from_in_pieces(vae, tmp_path):
    before = {file.name: file.read_bytes() for file in vae.iterdir()}
    done = run("vae", "--out", vae, "--seed", 5, "--iterations", 1, "--batch", 1, "--held-out", 8, *SMALL)
    assert done.returncode == 2 and "of an earlier run: go on with --resume" in done.stderr
    assert {file.name: file.read_bytes() for file in vae.iterdir()} == before
    (tmp_path / "vae.safetensors").write_bytes(before["vae.safetensors"])
    done = run("vae", "--out", tmp_path, "--init", tmp_path / "vae.safetensors")
    assert done.returncode == 2 and "written over by the result" in done.stderr
    (tmp_path / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:1000])
    done = run("vae", "--out", tmp_path, "--resume", "--iterations", 4, "--images", 2, "--batch", 1, *SMALL)
    assert done.returncode == 2 and "checkpoint.pt is damaged" in done.stderr and "Traceback" not in done.stderr
    common.save_model(tmp_path / "small.safetensors", Judge(JudgeConfig("conv", 8)))
    done = run("judge", "--out", tmp_path / "new", "--init", tmp_path / "small.safetensors", *SMALL)
    assert done.returncode == 2 and "is of another size" in done.stderr and "Traceback" not in done.stderr


def test_noise_follows_from_seed_and_step():
    draw = lambda seed, step: torch.randn(4, generator=pretrain.noise_of(seed, step))
    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(0, 2)) and not torch.equal(draw(1, 2), draw(1, 3))
