"""evals/experiments.py: every row is a command that parses, what has run is not run again, and tables are means."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import common
import ddpo
import train
from common import UserError
from evals import experiments, tables
from evals.experiments import SEEDS, TABLES, chosen, commands, file_of


def test_every_row_is_a_command_of_its_script(tmp_path):
    seen = set()
    for table, label, seed in chosen(["all"]):
        made, measured = commands(table, label, seed, tmp_path)
        config, presets = (train.Config, train.PRESETS) if made[1] == "train.py" else (ddpo.Config, None)
        cfg = common.parse(config, made[2:], "", presets)
        assert cfg.seed == seed and cfg.out == str(tmp_path)
        assert measured[measured.index("--label") + 1] == label and int(measured[measured.index("--steps") + 1]) in (
            1,
            2,
            4,
        )
        seen.add(file_of(table, label, seed))
    assert len(seen) == len(SEEDS) * sum(map(len, TABLES.values())) and len(SEEDS) >= 3  # no two share a file


def test_a_stopped_run_goes_on(tmp_path):
    assert "--resume" not in commands("ablation", "VSD", 0, tmp_path)[0]
    (tmp_path / "checkpoints/step_00000050").mkdir(parents=True)
    assert "--resume" in commands("ablation", "VSD", 0, tmp_path)[0]


def test_what_is_missing_is_run_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    file_of("ablation", "VSD", 1).write_text("{}")
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(command) or SimpleNamespace(returncode=0))
    experiments.run(["ablation/VSD"])
    assert [command[1] for command in ran] == ["train.py", "eval.py"] * 2
    assert all(command[0] == sys.executable for command in ran)
    assert [command[command.index("--seed") + 1] for command in ran[::2]] == ["0", "2"]
    assert all("--beta-cd" in command for command in ran[::2])
    monkeypatch.setattr(subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    with pytest.raises(UserError, match="this failed"):
        experiments.run(["steps"])
    with pytest.raises(UserError, match="no experiment is called"):
        experiments.run(["nothing"])


def test_the_budget_ends_between_two_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clock, ran = iter([0.0, 0.0, 3000.0, 4000.0]), []
    monkeypatch.setattr(experiments.time, "time", lambda: next(clock))
    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(command) or SimpleNamespace(returncode=0))
    experiments.run(["all"], hours=1.0)
    assert len(ran) == 4 and "hours are over" in capsys.readouterr().out


def test_a_table_has_means_over_seeds_and_says_what_has_not_run(tmp_path):
    score = lambda x: {"mean": x, "error": 9.0, "n": 5}
    for seed, x in ((0, 0.5), (2, 0.7)):
        row = {"steps": 4, "main": score(x), "frechet": score(1.0), "vendi": score(2.0), "identity": score(1.0)}
        (tmp_path / file_of("rank", "rank 8", seed).name).write_text(json.dumps({"rows": [row]}))
    text = tables.block("experiments/rank", tmp_path)
    assert "| rank 8 | 4 | 2 | 60.0±10.0 | 1.00±0.00 | 2.00±0.00 | 100.0±0.0 |" in text
    assert text.count("not run") == len(TABLES["rank"]) - 1
    assert text.endswith("    python eval.py experiments rank")
