"""In which precision a device computes is decided in one place (common.py), and every script asks there."""

import sys

import pytest
import torch
from conftest import config, fit

import common
import ddpo
import eval as evaluation
import pretrain
import sample
import train
from common import Machine, autocast, has_bfloat16, uses_bfloat16


@pytest.mark.parametrize(
    "architecture, capability, able, answer",
    [
        ("x86_64", "AVX512", {"avx512_bf16": True, "amx_bf16": False}, True),
        ("x86_64", "AVX512", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("x86_64", "AVX512", {"avx512_bf16": False, "amx_bf16": False}, False),
        ("x86_64", "AVX2", {"avx512_bf16": False, "amx_bf16": False}, False),
        ("x86_64", "AVX2", {"avx512_bf16": True, "amx_bf16": True}, False),  # ATEN_CPU_CAPABILITY=avx2
        ("aarch64", "DEFAULT", {"bf16": True}, True),
        ("aarch64", "DEFAULT", {"bf16": False}, False),
        ("ppc64le", "VSX", {}, False),
    ],
)
def test_the_cpu_is_asked_for_its_instructions(monkeypatch, architecture, capability, able, answer):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able | {"architecture": architecture})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert has_bfloat16() is answer
    assert uses_bfloat16("auto", "cpu") is answer
    for gpu in (True, False):  # a V100 and a T4 have none, and would emulate it
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, gpu=gpu: gpu)
        assert uses_bfloat16("auto", "cuda:0") is gpu
    for device in ("cpu", "cuda"):
        assert uses_bfloat16("bf16", device) and not uses_bfloat16("fp32", device)


def test_autocast_is_entered_where_it_computes_in_bfloat16():
    x = torch.ones(2, 2)
    with autocast("bf16", "cpu"):
        assert (x @ x).dtype == torch.bfloat16
    with autocast("fp32", "cpu"):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    "able, precision, said, chosen",
    [
        (True, "auto", "computing in bfloat16, for this CPU has instructions for bfloat16", "bf16"),
        (False, "auto", "computing in float32, for this CPU has no instructions for bfloat16", "fp32"),
        (True, "fp32", "computing in float32 as --precision says", "fp32"),
        (False, "bf16", "bfloat16 as --precision says: slow, for this CPU has no instructions for it", "bf16"),
    ],
)
def test_one_line_says_what_was_chosen_and_why(monkeypatch, capsys, able, precision, said, chosen):
    monkeypatch.setattr(common, "has_bfloat16", lambda: able)
    common.start(machine := Machine(device="cpu", precision=precision))
    printed = capsys.readouterr().out
    assert said in printed and len(printed.splitlines()) == 1 and machine.precision == chosen


def test_no_more_threads_than_cores(monkeypatch, capsys):
    monkeypatch.setattr(common.os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    before, used = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for asked in (0, 1, 2, 64):
        common.start(Machine(device="cpu", threads=asked))
    assert used == [2, 1, 2, 2] and "--threads 64: there are 2 cores" in capsys.readouterr().out
    monkeypatch.undo()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("able", [True, False])
def test_every_script_computes_as_the_cpu_can(able, tiny, tmp_path, monkeypatch, capsys):
    """No script enters an autocast region on a CPU without bfloat16, and each enters one on a CPU that has it."""
    entered, real = [], torch.autocast

    def spy(device, dtype=None, enabled=True, **more):
        entered.append(enabled)
        return real(device, dtype, enabled, **more)

    monkeypatch.setattr(torch, "autocast", spy)
    monkeypatch.setattr(common, "has_bfloat16", lambda: able)
    vae, judge, run = ["--vae", f"{tiny}/vae.safetensors"], f"{tiny}/judge.safetensors", tmp_path / "run"
    few = ["--iterations", "1", "--batch", "2"]
    student = ["--weights", f"{run}/student.safetensors", *vae]
    of_world = ["--prompts", "20", "--steps", "1", "--vendi-prompts", "0", "--judge", judge]
    teacher = ["--teacher", f"{tiny}/teacher.safetensors", *vae, "--out", str(run), "--sample-every", "0"]
    reward = ["--reward", "jpeg_compressibility", "--reward-samples", "3", "--global-batch", "2"]
    for module, words in (
        (train, [*teacher, *few, "--fake-updates", "1", "--m", "1"]),
        (sample, [*student, "--prompt", "a red star", "--out", str(tmp_path / "samples")]),
        (ddpo, [*student, *few, *reward, "--out", str(tmp_path / "ddpo")]),
        (evaluation, ["world", *student, *of_world, "--batch", "20"]),
        (pretrain, ["vae", *few, "--images", "1", "--held-out", "8", "--out", str(tmp_path / "vae")]),
        (pretrain, ["teacher", *few, *vae, "--clips", "2", "--stills", "2", "--out", str(tmp_path / "teacher")]),
        (pretrain, ["judge", *few, "--held-out", "32", "--out", str(tmp_path / "judge")]),
    ):
        entered.clear()
        monkeypatch.setattr(sys, "argv", [module.__name__, *words])
        module.main()
        assert any(entered) is able, (module.__name__, words[0])
        name = "bfloat16" if able else "float32"
        assert f"computing in {name}" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bits_repeat_in_each_precision(precision, tiny, tmp_path):
    runs = [fit(config(tiny, tmp_path / name, iterations=1, precision=precision))[0] for name in ("a", "b")]
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_another_precision_at_resume_is_said(tiny, tmp_path, capsys):
    fit(config(tiny, tmp_path, iterations=1))
    fit(config(tiny, tmp_path, iterations=2, resume=True, precision="bf16"))
    assert "warning: computed in fp32 until now, and in bf16 from here" in capsys.readouterr().out
    assert common.read_metadata(tmp_path / "student.safetensors", "DiT")["settings"]["precision"] == "bf16"


def test_an_unknown_precision_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--precision", "int8"])
    with pytest.raises(SystemExit) as left:
        common.run(train.main)
    said = capsys.readouterr().err
    assert left.value.code == 2 and "--precision" in said and len(said.splitlines()) == 1
