"""train.py trial: updates on random weights and clips, and what they took."""

import json
from dataclasses import replace

import pytest

import distributed
import train
from common import UserError
from evals import trial


def test_a_trial_makes_updates_of_the_preset_s_size_and_says_what_they_took(tmp_path, monkeypatch, capsys):
    """On the small world's sizes: the teacher's file has its shape, and as many updates are made as asked for."""
    made = []

    def build(cfg, ranks):
        made.append(nets := trial_build(cfg, ranks))
        return nets

    trial_build = trial.build
    monkeypatch.setattr(trial, "build", build)
    monkeypatch.setattr("sys.argv", ["./train.py", "trial"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as torchrun says
    out = tmp_path / "trial.json"
    cfg = replace(train.Config(), **train.PRESETS["shapes"] | {"batch": 2, "iterations": 2, "rank": 4, "out": str(out)})
    trial.trial(replace(cfg, device="cpu", precision="fp32"), distributed.start("cpu"))
    result = json.loads(out.read_text())
    assert result["command"] == "torchrun --nproc_per_node=2 train.py trial"
    (row,) = result["rows"]
    assert row["updates"] == 2 == len(row["all_seconds"]) and row["seconds"] == row["all_seconds"][1]
    assert row["rank"] == 4 and row["peak"] > 1e8 and "update 2:" in capsys.readouterr().out
    config = made[0].teacher.config
    assert config == trial.SIZES["shapes"] and list(made[0].data.shapes[0]) == [config.channels, *config.latents]


def test_a_trial_refuses_files_and_rewards():
    """Its weights and clips are random: what a flag names would not be tried."""
    cfg = replace(train.Config(), **train.PRESETS["shapes"] | {"student": "a.safetensors", "reward": "agreement"})
    with pytest.raises(UserError, match="leave out --student, --reward"):
        trial.trial(cfg, distributed.start("cpu"))
    cfg = replace(train.Config(), **train.PRESETS["shapes"] | {"out": "trial.txt"})
    with pytest.raises(UserError, match=r"a trial is kept in a file NAME\.json"):
        trial.trial(cfg, distributed.start("cpu"))
