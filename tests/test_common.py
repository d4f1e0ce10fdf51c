"""common.py: flags from a dataclass, one-line errors with exit code 2, files that are whole or absent."""

import importlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from common import UserError, atomic, check_spared, claimed, made_by, opt, parse, read_json, read_prompts, writable


@dataclass
class Config:
    preset: Literal["small", "large"] = opt("small", "which sizes")
    batch_size: int = opt(4, "clips a step, 100% of them")
    lr: float = opt(1e-4, "learning rate")
    resume: bool = opt(False, "go on")
    grid: bool = True
    name: str = "a"
    limit: int | None = None
    kind: Literal["x", "y"] | None = None
    steps: tuple[int, ...] = (999, 499)
    prompts: tuple[str, ...] = opt(("one",), "texts")


PRESETS = {"small": {}, "large": {"lr": 2e-5, "batch_size": 64, "limit": 7}}


def read(*argv, presets=None):
    return parse(Config, list(argv), "test", presets)


def test_defaults_and_every_type():
    assert read() == Config()
    got = read(
        *["--batch-size", "8", "--lr", "2", "--resume", "--no-grid", "--name=b", "--limit", "5", "--kind", "y"],
        *["--steps", "9", "8", "--prompts", "a red, round thing", "b"],
    )
    assert got == Config(
        batch_size=8, lr=2.0, resume=True, grid=False, name="b", limit=5, kind="y", steps=(9, 8),
        prompts=("a red, round thing", "b"),
    )  # fmt: skip
    assert isinstance(got.lr, float) and read("--steps", "999,749", "4").steps == (999, 749, 4)
    assert read("--steps", "4", "--steps", "2", "1").steps == (4, 2, 1)  # none is lost without a word


def test_preset_stands_between_defaults_and_flags():
    assert read(presets=PRESETS) == Config()
    large = read("--preset", "large", presets=PRESETS)
    assert (large.lr, large.batch_size, large.limit, large.name, large.preset) == (2e-5, 64, 7, "a", "large")
    said = read("--preset", "large", "--batch-size", "4", presets=PRESETS)  # a flag wins even where it says the default
    assert (said.batch_size, said.lr) == (4, 2e-5)


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--batch-size", "x"], "--batch-size"),
        (["--batch", "3"], "--batch"),  # no abbreviations: a later flag would change what they mean
        (["--unknown"], "--unknown"),
        (["--kind", "z"], "--kind"),
        (["--preset", "huge"], "huge"),
        (["--steps", "1", "b"], "--steps"),
        (["--steps"], "--steps"),
        (["--limit", "five"], "int"),
    ],
)
def test_mistakes_are_user_errors(argv, word):
    with pytest.raises(UserError, match=word):
        read(*argv, presets=PRESETS)


def test_help_names_flags_texts_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(s in text for s in ("--batch-size", "100% of them", "(default: 4)", "--no-resume", "{small,large}"))
    with pytest.raises(SystemExit):
        read("--help", presets={"small": {"batch_size": 77}, "large": {"batch_size": 99}})
    assert "(default: 77)" in capsys.readouterr().out  # what a run without flags has


def script(raised):
    program = f"from common import *\ndef main():\n    {raised}\n    print('done')\nrun(main)"
    here = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=here)


def test_run_turns_a_user_error_into_one_line_and_code_2():
    done = script("raise UserError('no such file:\\n  x')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no such file: x\n")
    done = script("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "")
    done = script("pass")
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_reader_that_leaves_is_no_mistake():
    program = (
        f"{sys.executable} -c 'from common import *; run(lambda: print(\"a line\\n\" * 100_000, flush=True))' | head -1"
    )
    here = Path(__file__).parents[1]
    done = subprocess.run(program, shell=True, capture_output=True, text=True, cwd=here)
    assert (done.stdout, done.stderr) == ("a line\n", "")


def test_our_own_mistakes_keep_their_traceback():
    done = script("raise ValueError('ours')")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_atomic_writes_whole_or_nothing(tmp_path):
    path = tmp_path / "new" / "folder" / "x.txt"
    with atomic(path) as part:
        assert part.parent == path.parent and part.suffix == ".txt"
        part.write_text("first")
        assert not path.exists()
    assert path.read_text() == "first"
    with open(path) as reader:
        with atomic(path) as part:
            part.write_text("second")
        assert reader.read() == "first"  # renamed, not copied over: who is reading goes on with the old file
    assert path.read_text() == "second"
    with pytest.raises(RuntimeError), atomic(path) as part:
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "second"
    assert [p.name for p in path.parent.iterdir()] == ["x.txt"]


def test_atomic_unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file" / "x.txt", tmp_path, "/proc/no/such/place.txt"):
        with pytest.raises(UserError, match="cannot write"), atomic(bad):
            raise AssertionError("the body must not run: hours of work may stand in it")
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic(tmp_path / "x.txt"):
        (tmp_path / "elsewhere").read_text()  # another file's error is not called ours


def test_atomic_full_disk(tmp_path):
    with pytest.raises(UserError, match="No space"), atomic(tmp_path / "x.txt") as part, open("/dev/full", "w") as full:
        assert part
        full.write("x" * 100_000)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("train.Config --batch 0", "--batch: at least 1, not 0"),
        ("train.Config --lr -1", "--lr: at least 0"),
        ("train.Config --fake-pull 2", "--fake-pull: at most 1"),
        ("train.Config --ema 1.5", "--ema: at most 1"),
        ("train.Config --w-vsd nan", "--w-vsd: a finite number"),
        ("train.Config --iterations 0", "--iterations: at least 1"),
        ("train.Config --threads -1", "--threads: at least 0"),
        ("train.Config --device banana", "--device banana cannot be used here"),
        ("ddpo.Config --reward-samples 1", "--reward-samples: at least 3"),
        ("pretrain.JudgeRunConfig --kind banana", "banana"),
        ("data.Config --frames 0", "--frames: at least 1"),
        ("eval.WorldConfig --batch 0", "--batch: at least 1"),
        ("eval.RewardMemoryConfig --frames 4 0", "--frames: at least 1, not 0"),
        ("sample.Config --device meta", "--device meta cannot be used here"),
        (f"train.Config --seed {'9' * 400}", "--seed: at most 2147483647"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(flags, said):
    config, *words = flags.split()
    module, name = config.split(".")
    module = importlib.import_module(module)
    with pytest.raises(UserError) as e:
        parse(getattr(module, name), words, "", getattr(module, "PRESETS", None))
    assert said in str(e.value)


def test_limits_let_pass_what_may_be():
    import train

    cfg = parse(train.Config, ["--w-cd", "-1", "--ema", "0", "--global-batch", "0"], "", train.PRESETS)
    assert (cfg.w_cd, cfg.ema, cfg.global_batch) == (-1, 0, 0)


def test_writable_leaves_what_is_there(tmp_path):
    (tmp_path / "a.json").write_text("kept")
    writable(tmp_path / "a.json"), writable(tmp_path / "new/b.json")
    assert (tmp_path / "a.json").read_text() == "kept" and not list((tmp_path / "new").iterdir())
    with pytest.raises(UserError, match="cannot write"):
        writable("/proc/nothing/a.json")


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    with claimed(tmp_path / "run"):
        with pytest.raises(UserError, match="another run is writing into"), claimed(tmp_path / "run"):
            pass
        with claimed(tmp_path / "other"):
            pass
    with claimed(tmp_path / "run"):  # it is free again
        pass
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="cannot write"), claimed(tmp_path / "file"):
        pass


def test_a_result_spares_its_inputs(tmp_path):
    check_spared(tmp_path / "a/student.safetensors", "", tmp_path / "b/student.safetensors")
    with pytest.raises(UserError, match="written over"):
        check_spared(tmp_path / "a/student.safetensors", "", f"{tmp_path}/b/../a/student.safetensors")


def test_files_of_json(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [')
    with pytest.raises(UserError, match=r"a\.json is no JSON"):
        read_json(tmp_path / "a.json")


def test_files_of_prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("a café\n\n  a cat \r\n", encoding)
        assert read_prompts(file) == ["a café", "a cat"]
    for content, said in (
        (b" \n", "is empty"),
        ("été".encode("utf-16"), "no text in UTF-8"),
        (b"a\0b\0", "zero bytes"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_prompts(file)
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.txt: No such file"):
        read_prompts(tmp_path / "nowhere.txt")


def test_files_say_by_which_command_they_were_made(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some where/train.py", "--out", "my folder"])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert made_by({"seed": 3})["command"] == "python train.py --out 'my folder'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert made_by({})["command"] == "torchrun --nproc_per_node=8 train.py --out 'my folder'"
