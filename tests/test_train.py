"""Algorithm 1 as a program: it runs, resumes to the bit, stops cleanly, and says what is wrong in one line."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, config, fit
from PIL import Image

import cogvideox
import common
import dit
import nets
import train
from captions import write_caption
from common import UserError
from distributed import Ranks
from evals import progress, tables
from video import to_uint8, write_video
from world import shapes
from world.judge import Judge, JudgeConfig

SPEED = {"trained_s", "iteration_s", "samples_s", "peak_gib"}  # in the log, and never the same twice


def run(*args):
    return subprocess.run(
        [sys.executable, "train.py", *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def flags(cfg, **more):
    said = {k: getattr(cfg, k) for k in ("teacher", "vae", "out", "iterations", "batch", "fake_updates", "m")} | more
    return [word for k, v in said.items() for word in ("--" + k.replace("_", "-"), v)]


def test_the_defaults_are_the_papers():
    """Section 4.1, of the preset `dollar`."""
    cfg = train.settled(common.parse(train.Config, ["--preset", "dollar"], "", train.PRESETS))
    assert (cfg.steps, cfg.fake_updates, cfg.batch, cfg.iterations, cfg.m) == (4, 5, 1, 40000, 5)
    assert (cfg.w_vsd, cfg.w_cd, cfg.beta_vsd, cfg.beta_cd, cfg.beta_ft) == (3.5, 7.5, 1.0, 0.5, 1.0)
    assert (cfg.lr, cfg.fake_lr, cfg.checkpoint_activations, cfg.shard) == (2e-5, 2e-5, True, "full")
    assert (len(train.GRID) - 1, train.T_RANGE) == (50, (20, 980))


def test_the_program_draws_compares_and_exports(tiny, tmp_path, capsys, monkeypatch):
    words = flags(config(tiny, tmp_path / "run"), sample_every=2, precision="fp32")
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    monkeypatch.setattr(progress, "COMPARED", 20)
    train.main()
    said = capsys.readouterr().out
    assert "standard errors" in said and "compare.mp4" in said
    made = json.loads((tmp_path / "run/compare.json").read_text())
    assert [row["steps"] for row in made["rows"]] == [4, 4, 4, 2, 2, 2, 1, 1, 1]
    teacher, student, gain = made["rows"][:3]
    change = {what: student[what]["mean"] - teacher[what]["mean"] for what in ("named", "frechet")}
    assert gain["named"]["mean"] == pytest.approx(change["named"], abs=1e-4) and gain["named"]["n"] == 20
    assert gain["frechet"]["mean"] == pytest.approx(-change["frechet"], abs=1e-3)  # nearer is better
    assert tables.table([made]).count("\n") == 10
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"student.safetensors", "compare.mp4", "compare.png"}
    model, about = common.load_model(tmp_path / "run/student.safetensors", dit.DiT)
    assert about["kind"] == "student" and about["timesteps"] == [999, 749, 499, 249] and "train.py" in about["command"]
    assert model(torch.zeros(1, 12, 5, 8, 8), torch.tensor([999]), torch.zeros(1, 32, 128)).isfinite().all()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [0 <= line.get("judge", -1) <= 1 for line in lines] == [False, True, False]
    assert lines[1]["samples_s"] == pytest.approx(2 / lines[1]["iteration_s"], rel=0.05) and lines[1]["peak_gib"] > 0.1
    sheet = Image.open(tmp_path / "run/step000002.png")  # 4 prompts, a row for the student and one for the teacher
    assert sheet.height > 8 * 64 and sheet.width >= 8 * 64

    (tmp_path / "run/student.safetensors").rename(tmp_path / "first.safetensors")
    train.export(tmp_path / "run")
    assert "wrote" in capsys.readouterr().out
    (again, said), (first, _) = (
        common.load_tensors(tmp_path / f) for f in ("run/student.safetensors", "first.safetensors")
    )
    assert all(torch.equal(again[k], first[k]) for k in first) and said["timesteps"] == about["timesteps"]
    with pytest.raises(train.UserError, match="holds no checkpoint"):
        train.export(tmp_path)


def test_a_new_run_in_the_same_folder_sets_the_old_checkpoints_aside(tiny, tmp_path, monkeypatch):
    fit(config(tiny, tmp_path, iterations=2))
    fit(config(tiny, tmp_path, iterations=1))
    names = lambda folder: [p.name for p in sorted((tmp_path / folder).glob("step_*"))]
    assert names("checkpoints") == ["step_00000001"] and names("checkpoints.1") == ["step_00000001", "step_00000002"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun has started it again: it goes on
    *_, lines = fit(config(tiny, tmp_path, iterations=2))
    assert not (tmp_path / "checkpoints.2").exists() and len(lines) == 2
    assert names("checkpoints") == ["step_00000001", "step_00000002"]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    (tmp_path / "checkpoints.1").rename(tmp_path / "checkpoints.2")  # the first was deleted: no other is overwritten
    fit(config(tiny, tmp_path, iterations=1))
    assert names("checkpoints.1") == names("checkpoints.2") == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_vsd": 0.0},
        {"beta_cd": 0.0, "steps": 1, "vsd_weight": "score"},
        {"steps": 2, "generator_input": "data", "transition": "ddim", "cd_target": "student", "cd_loss": "mse"},
        {"prediction": "sample", "cd_target": "teacher"},
        {"reward": "jpeg_compressibility", "lrm_warmup": 1},
    ],
    ids=str,
)
def test_every_ablation_trains_and_repeats_to_the_bit(tiny, tmp_path, changes):
    first, about, lines = fit(config(tiny, tmp_path / "a", **changes))
    again, _, same = fit(config(tiny, tmp_path / "b", **changes))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(line.keys() >= SPEED for line in lines)
    assert [{k: v for k, v in x.items() if k not in SPEED} for x in lines] == [
        {k: v for k, v in x.items() if k not in SPEED} for x in same
    ]
    teacher, _ = common.load_tensors(f"{tiny}/teacher.safetensors")
    assert any((first[k].float() - teacher[k]).abs().max() > 1e-5 for k in first)
    assert all(t.isfinite().all() for t in first.values()) and len(lines) == 3
    assert ("vsd" in lines[0]) == ("fake" in lines[0]) == (changes.get("beta_vsd") != 0)
    assert ("cd" in lines[0]) == (changes.get("beta_cd") != 0)
    if "reward" in changes:
        assert "ft" not in lines[0] and "ft" in lines[1] and "lrm" in lines[0]
    if "prediction" in changes:
        assert about["config"]["prediction"] == "sample"


@pytest.mark.parametrize("reward", ["none", "jpeg_compressibility"])
def test_resume_continues_to_the_bit(tiny, tmp_path, reward):
    whole, _, lines = fit(config(tiny, tmp_path / "whole", iterations=4, reward=reward))
    fit(config(tiny, tmp_path / "parts", iterations=2, reward=reward))
    parts, _, more = fit(config(tiny, tmp_path / "parts", iterations=4, reward=reward, resume=True))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert [x["grad_norm"] for x in lines] == [x["grad_norm"] for x in more]


def test_resume_refuses_another_student_and_names_other_flags(tiny, tmp_path, capsys):
    fit(config(tiny, tmp_path, iterations=1, beta_vsd=0.0))
    for other in ({"steps": 2}, {"prediction": "sample"}, {"transition": "renoise"}):
        with pytest.raises(UserError, match="another student"):
            fit(config(tiny, tmp_path, iterations=2, beta_vsd=0.0, resume=True, **other))
    (tmp_path / "log.jsonl").write_text('{"step": 0, "cd": 1.0}\n{"step": 1, "c')  # killed while it wrote
    *_, lines = fit(config(tiny, tmp_path, iterations=2, beta_vsd=0.0, lr=1e-5, resume=True))
    assert "not as before: --iterations 2 (was 1), --lr 1e-05 (was 0.0001)\n" in capsys.readouterr().out
    assert [line["step"] for line in lines] == [0, 1] and lines[0]["cd"] == 1.0


def test_another_text_encoder_than_the_teachers_is_refused(tiny, tmp_path):
    model, about = common.load_model(tiny / "teacher.safetensors", dit.DiT)
    common.save_model(tmp_path / "t.safetensors", model, **about | {"text_fingerprint": "another"})
    with pytest.raises(UserError, match="another text encoder"):
        fit(config(tiny, tmp_path / "run", teacher=str(tmp_path / "t.safetensors")))


def test_a_student_of_the_opposite_velocity_begins_where_its_teacher_stands(tiny, tmp_path):
    """v = a eps - b x_0 and x_0 - eps point opposite ways: read as it is, the teacher's output would be noise added."""
    teacher, _ = common.load_model(tiny / "teacher.safetensors", dit.DiT)
    teacher.config = replace(teacher.config, prediction="velocity")
    common.save_model(tmp_path / "t.safetensors", teacher, kind="teacher", w=2.0)
    cfg = config(tiny, tmp_path / "run", teacher=str(tmp_path / "t.safetensors"), prediction="conjugate")
    made = nets.build(cfg, Ranks(0, 1, torch.device("cpu")))
    assert made.student.config.prediction == "conjugate" and made.teacher.config.prediction == "velocity"
    x, t, text = torch.randn(2, 12, 5, 8, 8), torch.tensor([300, 900]), torch.randn(2, 32, 128)
    with torch.no_grad():
        assert torch.allclose(made.student(x, t, text), -made.teacher(x, t, text), atol=1e-5)
        assert torch.allclose(made.ema(x, t, text), -made.teacher(x, t, text), atol=1e-5)


def test_the_judge_reads_only_prompts_of_its_world(tiny, tmp_path, monkeypatch):
    """With another text encoder the pictures are of other prompts, few of them and in words that it does not know."""
    load = nets.load_encoder
    monkeypatch.setattr(nets, "load_encoder", lambda name, *rest: load("words", *rest))
    for text, judges in (("words", True), ("t5", False)):
        made = nets.build(config(tiny, tmp_path / "run", text=text), Ranks(0, 1, torch.device("cpu")))
        assert (made.judge is not None) == judges


def test_accumulation_equals_the_large_batch(tiny, tmp_path):
    *_, a = fit(config(tiny, tmp_path / "one", iterations=1, batch=4))
    *_, b = fit(config(tiny, tmp_path / "two", iterations=1, batch=1, global_batch=4))
    assert a[0]["grad_norm"] == pytest.approx(b[0]["grad_norm"], rel=1e-4)
    assert a[0]["cd"] == pytest.approx(b[0]["cd"], rel=1e-4) and a[0]["fake"] == pytest.approx(b[0]["fake"], rel=1e-4)


def test_first_step_of_vsd_compares_guided_with_unguided_teacher(tiny, tmp_path):
    """The fake score begins as the teacher: without guidance the two agree, and VSD has no gradient."""
    *_, lines = fit(config(tiny, tmp_path / "a", iterations=1, w_vsd=0.0, beta_cd=0.0))
    assert lines[0]["score_gap"] < 1e-6 and lines[0]["vsd"] < 1e-9
    *_, lines = fit(config(tiny, tmp_path / "b", iterations=1, w_vsd=2.0, beta_cd=0.0))
    assert lines[0]["score_gap"] > 1e-4


def test_nan_stops_the_run_and_keeps_what_was_good(tiny, tmp_path, monkeypatch):
    real = train.vsd_loss
    broken = lambda *a: tuple(x * float("nan") if torch.is_tensor(x) else x for x in real(*a))
    monkeypatch.setattr(train, "vsd_loss", broken)
    monkeypatch.setattr(train, "PATIENCE", 2)
    with pytest.raises(train.UserError, match="2 updates in a row were not finite"):
        fit(config(tiny, tmp_path / "run", iterations=9))
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir()
    monkeypatch.setattr(train, "vsd_loss", real)
    tensors, *_ = fit(config(tiny, tmp_path / "run", iterations=3, resume=True))
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_checkpoint_is_older_than_the_pictures_of_its_step(tiny, tmp_path, monkeypatch):
    """They may not fit into a GPU; the teacher's are drawn before the first update, so that this is known early."""
    order, draw = [], progress.draw_videos

    def fails(*args):
        order.append("student")
        raise MemoryError

    monkeypatch.setattr(progress, "draw_videos", lambda nets, who, *args: order.append(who) or draw(nets, who, *args))
    monkeypatch.setattr(train, "show_progress", fails)
    with pytest.raises(MemoryError):
        fit(config(tiny, tmp_path / "run", sample_every=2, save_every=2))
    assert order == ["teacher", "student"]
    monkeypatch.undo()
    _, _, lines = fit(config(tiny, tmp_path / "run", sample_every=0, save_every=2, resume=True))
    assert [line["step"] for line in lines] == [0, 2]  # the log lacks what the failure has swallowed


@pytest.mark.parametrize(
    "words, said",
    [
        (["--teacher", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--preset", "huge"], "huge"),
        (["--reward", "beauty"], "beauty"),
        (["--resume"], "no checkpoint"),
        (["--data", "nowhere"], "nowhere"),
        (["--preset", "dollar"], "--data is needed"),
    ],
)
def test_bad_input_is_one_line(tiny, tmp_path, words, said):
    done = run(*flags(config(tiny, tmp_path / "run")), *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unknown_word_among_the_captions_is_found_before_the_first_step(tiny, tmp_path):
    for name, caption in (("a", "a red star"), ("b", "a zebra")):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        write_caption(tmp_path / f"{name}.png", caption)
    with pytest.raises(UserError, match="unknown word 'zebra'"):
        nets.build(config(tiny, tmp_path / "run", data=str(tmp_path)), Ranks(0, 1, torch.device("cpu")))


def test_what_cannot_be_meant_is_refused(tiny, tmp_path):
    for changes, said in (
        ({"m": 51}, "--m: at most 50"),
        ({"save_every": 0}, "--save-every: at least 1, not 0"),
        ({"batch": 0}, "--batch: at least 1"),
        ({"fake_pull": 0.03, "prediction": "sample"}, "--fake-pull mixes networks of one prediction"),
        ({"batch": 2, "global_batch": 3}, "no multiple"),
        ({"beta_vsd": 0.0, "beta_cd": 0.0}, "nothing to learn"),
    ):
        with pytest.raises(UserError, match=said):
            fit(config(tiny, tmp_path / "run", **changes))
    with pytest.raises(UserError, match="--device cuda cannot be used here"):
        train.distributed.start("cuda") if not torch.cuda.is_available() else pytest.skip("there is a GPU")


def test_what_is_exported_is_the_average(tiny, tmp_path):
    """Of one update from the teacher: with a decay of 0 the student itself, else so much of the teacher is in it."""
    one = {"iterations": 1, "lr": 0.1}
    (itself, *_), (average, *_) = (fit(config(tiny, tmp_path / str(e), ema=e, **one)) for e in (0.0, 0.75))
    teacher, _ = common.load_tensors(tiny / "teacher.safetensors")
    for name, tensor in average.items():
        torch.testing.assert_close(
            tensor.float(), 0.75 * teacher[name] + 0.25 * itself[name].float(), rtol=0, atol=2e-3
        )
    assert any((itself[name] - teacher[name]).abs().max() > 0.05 for name in teacher)


def test_the_optimizers_are_the_presets(tiny, tmp_path, monkeypatch):
    seen, adam = [], train.adam
    monkeypatch.setattr(train, "adam", lambda nets, *rates: seen.append(rates) or adam(nets, *rates))
    monkeypatch.setitem(train.BETAS, "shapes", (0.3, 0.6))
    fit(config(tiny, tmp_path / "run", iterations=1, lr=None, fake_lr=3e-4))
    assert seen == [(train.LEARNING_RATES["shapes"][0][0], 3e-4, (0.3, 0.6))]


@pytest.fixture
def folder(tmp_path):
    """Clips of a user: four videos and two images of the small world's size."""
    clips = shapes.render_batch([shapes.Clip.make(5, i) for i in range(4)])
    for i, clip in enumerate(clips):
        write_video(tmp_path / f"clips/v{i}.mp4", clip, 8)
        (tmp_path / f"clips/v{i}.txt").write_text("a red star")
    for i in range(2):
        Image.fromarray(to_uint8(clips[i])[0]).save(tmp_path / f"clips/i{i}.png")
        (tmp_path / f"clips/i{i}.txt").write_text("a blue ring")
    return tmp_path / "clips"


def test_clips_decoded_ahead_are_the_same_clips(tiny, tmp_path, folder, capsys, monkeypatch):
    made = []
    for readers in (0, 3):
        monkeypatch.setattr(train, "READERS", readers)
        made.append(fit(config(tiny, tmp_path / f"{readers}", data=str(folder)))[0])
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    said = capsys.readouterr().out
    assert f"{folder}: 6 clips of 6 files are used\n" in said
    assert "waited for clips in" in said


def test_weights_that_are_something_else_are_refused(tiny, tmp_path):
    model = common.load_model(tiny / "teacher.safetensors", dit.DiT)[0]
    common.save_model(tmp_path / "s.safetensors", model, kind="student", timesteps=[999, 749, 499, 249])
    with pytest.raises(UserError, match=r"s\.safetensors says that it is a student"):
        fit(config(tiny, tmp_path / "run", teacher=f"{tmp_path}/s.safetensors"))
    published = dit.DiT(replace(dit.PRESETS["cogvideox-2b"], width=64, depth=1, heads=1))
    cogvideox.save_dit(published, tmp_path / "s/transformer", kind="student")
    paths = {name: str(tmp_path / "s") for name in ("teacher", "vae", "text", "data")}
    with pytest.raises(UserError, match="s says that it is a student"):
        fit(train.Config(preset="cogvideox-2b", **paths))


def test_a_reward_that_reads_clips_refuses_images_before_the_first_step(tiny, tmp_path, folder):
    common.save_model(tmp_path / "judge.safetensors", Judge(JudgeConfig(width=8)))
    cfg = config(
        tiny, tmp_path / "run", data=str(folder), reward="agreement", reward_weights=f"{tmp_path}/judge.safetensors"
    )
    with pytest.raises(UserError, match="reads 16 frames of 64x64; 2 of 6 clips"):
        fit(cfg)
    assert not (tmp_path / "run").exists()
    for image in folder.glob("*.png"):
        image.unlink()
    fit(replace(cfg, iterations=1, reward_samples=3, global_batch=2))


def test_tensorboard_gets_what_the_log_gets(tiny, tmp_path, monkeypatch):
    """Where it is installed; in its place here stands what keeps all that is written."""
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder = folder
            assert purge_step == 0  # of a resumed run, the steps from there on are written again

        def add_scalar(self, name, value, step):
            written.append((self.folder, step, name, value))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    _, _, lines = fit(config(tiny, tmp_path, iterations=2))
    assert {folder for folder, *_ in written} == {tmp_path / "tensorboard"}
    for line in lines:
        assert {name: value for _, step, name, value in written if step == line["step"]} == {
            name: value for name, value in line.items() if name != "step"
        }
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    written.clear()
    fit(config(tiny, tmp_path / "without", iterations=1))
    assert not written


@pytest.mark.parametrize(
    "flags, rates",
    [
        ([], (1e-4, 2e-4)),
        (["--rank", "8"], (1e-3, 2e-3)),
        (["--rank", "8", "--lr", "3e-5"], (3e-5, 2e-3)),
        (["--preset", "cogvideox-2b"], (2e-5, 2e-5)),
        (["--preset", "cogvideox-2b", "--rank", "64"], (1e-4, 2e-5)),
    ],
)
def test_learning_rates_are_the_presets_unless_said(flags, rates):
    cfg = train.settled(common.parse(train.Config, flags, "", train.PRESETS))
    assert (cfg.lr, cfg.fake_lr) == rates and cfg.fake_warmup == 0
