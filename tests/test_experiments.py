"""evals/experiments.py: every row is a command that parses, what has run is not run again, and tables are means."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes

import common
import ddpo
import eval as evaluation
import nets
import pretrain
import train
from common import UserError
from distributed import Ranks
from evals import experiments, pictures, tables
from evals.experiments import SEEDS, TABLES, chosen, commands, file_of
from world.reading import MAIN


def test_every_row_is_a_command_of_its_script(tmp_path):
    runs = {}
    for table, label, seed in chosen(["all"]):
        *made, measured = commands(table, label, seed, tmp_path)
        cfg = common.parse(evaluation.WorldConfig, measured[3:], "")
        assert cfg.label == experiments.first_of(table, label)[1] and set(cfg.steps) <= {50, 4, 2, 1}
        assert cfg.out == str(tmp_path / "measured.json") and cfg.precision == "fp32"
        if not made:  # bundled weights
            assert cfg.weights.startswith("weights/") and cfg.seed == seed
            continue
        if made[0][1:3] == ["pretrain.py", "teacher"]:
            trained = common.parse(pretrain.TeacherConfig, made[0][3:], "")
            assert trained.seed == seed and trained.out == str(tmp_path) and trained.precision == "fp32"
            assert cfg.weights == f"{tmp_path}/teacher.safetensors" and cfg.steps == (50,)
            assert trained.prediction == label and experiments.weights_of(table, label).name == "teacher.safetensors"
            continue
        config, presets = (train.Config, train.PRESETS) if made[0][1] == "train.py" else (ddpo.Config, None)
        trained = common.parse(config, made[0][2:], "", presets)
        assert trained.seed == seed and cfg.seed == 0  # all students are measured on one noise
        assert trained.out == str(tmp_path) and cfg.weights == f"{tmp_path}/student.safetensors"
        updates = int(label.split()[0]) if table == "updates" else 100
        assert (trained.iterations, trained.batch, trained.global_batch, trained.precision) == (updates, 8, 8, "fp32")
        assert max(cfg.steps) == getattr(trained, "steps", 4)
        flags = str(replace(trained, seed=0))
        assert runs.setdefault((file_of(table, label, seed), flags), flags) == flags
    assert len(SEEDS) >= 3
    files, flags = zip(*runs)
    assert len(set(files)) == len(files)  # a file is of one run
    assert len(set(flags)) * len(SEEDS) == len(runs)  # and no two rows make the same run twice


def test_what_begins_with_the_bundled_student_fits_it(tmp_path):
    alone, seen = Ranks(0, 1, torch.device("cpu")), 0
    for table, label, _ in chosen(["all"])[: sum(map(len, TABLES.values()))]:
        made = commands(table, label, 0, tmp_path)[0]
        if made[1] == "train.py" and "--student" in made:
            cfg = common.parse(train.Config, made[2:], "", train.PRESETS)
            assert nets.build(cfg, alone).student.config.prediction == "conjugate"
            seen += 1
    assert seen >= 7


def test_a_stopped_run_goes_on(tmp_path):
    assert "--resume" not in commands("ablation", "VSD", 0, tmp_path)[0]
    (tmp_path / "checkpoints/step_00000050").mkdir(parents=True)
    assert "--resume" in commands("ablation", "VSD", 0, tmp_path)[0]
    assert "--resume" not in commands("velocity", "epsilon", 0, tmp_path / "teacher")[0]
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/checkpoint.pt").touch()
    assert "--resume" in commands("velocity", "epsilon", 0, tmp_path / "teacher")[0]


def test_an_interrupted_training_is_given_the_time_to_save(tmp_path):
    training = """if True:
        import pathlib, signal, sys, time
        def save(*_):
            time.sleep(1)
            pathlib.Path("saved").touch()
            sys.exit()
        signal.signal(signal.SIGINT, save)
        pathlib.Path("begun").touch()
        time.sleep(60)
    """
    begin = f"from evals.experiments import call; call({[sys.executable, '-c', training]!r})"
    there = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(Path(experiments.__file__).parents[1])}}
    run = subprocess.Popen([sys.executable, "-c", begin], **there, start_new_session=True, stderr=subprocess.DEVNULL)
    while not (tmp_path / "begun").exists():
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    assert run.wait() and (tmp_path / "saved").exists()


def test_what_is_missing_is_run_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    file_of("ablation", "VSD", 1).write_text("{}")
    ran = []

    def ran_well(command):
        """What the two scripts leave behind."""
        ran.append(command)
        out = Path(command[command.index("--out") + 1])
        if command[1] == "train.py":
            log = (
                {"step": 0, "cd": 1, "true_reward": 0.5},
                {"step": 9, "cd": 3},
                {"step": 10, "cd": 5, "trained_s": 2},
            )
            (out / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
            (out / "student.safetensors").write_bytes(bytes(7))
        else:
            out.write_text('{"rows": []}')
        return 0

    monkeypatch.setattr(experiments, "call", ran_well)
    experiments.run(["ablation/VSD"])
    assert [command[1] for command in ran] == ["train.py", "eval.py"] * 2
    assert all(command[0] == sys.executable for command in ran)
    assert [command[command.index("--seed") + 1] for command in ran[::2]] == ["0", "2"]
    assert all("--beta-cd" in command for command in ran[::2])
    training = json.loads(file_of("ablation", "VSD", 2).read_text())["training"]
    assert training["curves"] == {"true_reward": [[0, 0.5]], "cd": [[0, 2.0], [10, 5.0]]}
    assert training["log"] == {"step": 10, "cd": 5.0, "true_reward": 0.5, "trained_s": 2.0}  # the last of each
    assert training["bytes"] == {"student.safetensors": 7}
    assert training["command"].startswith(f"python train.py {experiments.BASE} {experiments.SHORT} --beta-cd 0")
    assert "--seed 2" in training["command"]
    monkeypatch.setattr(experiments, "call", lambda command: 1)
    with pytest.raises(UserError, match="this failed"):
        experiments.run(["steps"])
    with pytest.raises(UserError, match="no experiment is called"):
        experiments.run(["nothing"])
    held = Path("runs/experiments/ablation-cd--from-the-teacher-0")
    held.mkdir(parents=True)
    with open(held / "lock", "w") as lock:  # as another process does that makes this row
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(experiments, "SEEDS", (0,))
        experiments.run(["ablation/CD, from the teacher"])
    assert not file_of("ablation", "CD, from the teacher", 0).exists()


def test_the_command_lists_the_rows_and_makes_the_named_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "experiments"])
    evaluation.main()
    assert len(capsys.readouterr().out.splitlines()) == len(experiments.ROWS)
    made = []
    monkeypatch.setattr(experiments, "run", lambda names, hours: made.append((names, hours)))
    monkeypatch.setattr(sys, "argv", ["eval.py", "experiments", "steps", "rank/full", "--budget", "2"])
    evaluation.main()
    assert made == [(("steps", "rank/full"), 2.0)]


def test_the_budget_ends_between_two_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clock, ran = iter([0.0, 0.0, 3000.0, 4000.0]), []
    monkeypatch.setattr(experiments.time, "time", lambda: next(clock))
    monkeypatch.setattr(experiments, "make", lambda lines, out: ran.append(out) or {})
    experiments.run(["all"], hours=1.0)
    assert len(ran) == 2 and "hours are over" in capsys.readouterr().out


def test_a_table_has_means_over_seeds_and_says_what_has_not_run(tmp_path):
    score = lambda x: {"mean": x, "error": 9.0, "n": 5}

    def write(table, label, seed, x, steps=4, **training):
        measured = {"jpeg_compressibility": score(3 * x), "agreement": score(0.9)}
        row = {"steps": steps, "main": score(x), "frechet": score(1.0), "vendi": score(2.0), "identity": score(1.0)}
        rows = {"rows": [row | {"motion": score(x), "rewards": measured}], "training": training}
        (tmp_path / file_of(table, label, seed).name).write_text(json.dumps(rows))

    sizes = {"student.safetensors": 7_000_000, "adapter.safetensors": 2_000_000}
    for seed, x in ((0, 0.5), (2, 0.7)):
        write("rank", "rank 8", seed, x, bytes=sizes, log={"trained_s": 60.0})
        curves = {"true_reward": [[0, x], [20, 2 * x]]}
        write("rewards", "dynamic degree", seed, x, curves=curves)
        write("troubles", "guidance of 10", seed, x, curves={"fake": [[0, 9.0], [10, x]]}, log={"fake": 8.0})
    text = tables.block("experiments/troubles", tmp_path)
    (line,) = (line for line in text.splitlines() if line.startswith("| guidance of 10 |"))
    assert "| fake loss |" in text and line.endswith("| 0.60±0.10 |")  # of the last updates, not of the very last
    text = tables.block("experiments/rewards", tmp_path)
    assert "| jpeg_compressibility |" in text and "| 1.800±0.300 |" in text and "agreement" not in text
    text = tables.block("experiments/rank", tmp_path)
    assert "| rank 8 | 4 | 2 | 60.0±10.0 | 1.00±0.00 | 2.00±0.00 | 100.0±0.0 | 2.0±0.0 |" in text
    assert "| Vendi - 1 | object kept, % | MB |" in text  # no column of motion without the teacher's
    assert text.count("not run") == len(TABLES["rank"]) - 1
    assert text.endswith("    python eval.py experiments rank")
    row = json.loads((tmp_path / file_of("rank", "rank 8", 0).name).read_text())["rows"][0]
    both = json.dumps({"rows": [row, row | {"steps": 2}]})
    (tmp_path / file_of("rank", "full", 0).name).write_text(both)  # the run of ablation's first row
    assert "| full | 2 |" not in tables.block("experiments/rank", tmp_path)
    assert "| VSD + CD | 2 |" in tables.block("experiments/ablation", tmp_path)
    write("ablation", "teacher", 0, 1.2, steps=50)
    assert "| 100.0±0.0 | 50±8 | 2.0±0.0 |" in tables.block("experiments/rank", tmp_path)


def test_gains_are_of_pairs_of_one_seed(tmp_path):
    def write(table, label, seed, x, reward):
        row = {what: {"mean": x} for what in ("main", *MAIN, "identity", "frechet", "vendi")}
        row |= {"steps": 4, "camera": {"mean": x + reward}}
        row |= {"rewards": {name: {"mean": reward} for name in ("agreement", "object_kept")}}
        (tmp_path / file_of(table, label, seed).name).write_text(json.dumps({"rows": [row]}))

    for seed, base, more in ((0, 0.5, 0.1), (1, 0.7, 0.3), (2, 0.9, None)):  # the seeds differ more than the gains
        write("agreement", "VSD + CD", seed, base, 0.0)
        if more:
            write("agreement", "VSD + CD + LRM, parts, pulling as VSD does", seed, base + more, 0.2)
            write("tuning", "KL + ReFL", seed, base + more, 0.2)
    text = tables.block("experiments/agreement/gains", tmp_path)
    assert text.count("\n") == 2 and "| VSD + CD + LRM, parts, pulling as VSD does | 2 | 20.0±10.0 |" in text
    # camera, look, object kept, reward, Frechet, Vendi
    assert "| 40.0±10.0 | 20.0±10.0 | 20.0±10.0 | 0.200±0.000 | 0.200±0.100 | 0.200±0.100 |" in text
    for seed, x in enumerate((0.4, 0.9)):  # bundled weights: on the noise of the students, seed 0's
        write("tuning", "the student", seed, x, 0.1)
    text = tables.block("experiments/tuning/gains", tmp_path)
    assert text.count("\n") == 2 and "| KL + ReFL | 2 | 40.0±20.0 |" in text and "| 0.100±0.000 |" in text


def test_rows_of_the_same_flags_are_one_run():
    assert file_of("rank", "full", 1) == file_of("choices", "as it is", 1) == file_of("ablation", "VSD + CD", 1)
    assert commands("rank", "full", 1, Path()) == commands("ablation", "VSD + CD", 1, Path())
    assert file_of("rank", "rank 8", 1) != file_of("rank", "rank 16", 1)


def test_curves_are_means_over_the_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    for seed, x in ((0, 1.0), (1, 3.0)):
        training = {"curves": {"true_reward": [[0, x], [10, 2 * x], [20, None]]}}  # None: it was not finite
        file_of("overoptimised", "LRM alone", seed).write_text(json.dumps({"rows": [], "training": training}))
    file_of("overoptimised", "LRM and KL", 0).write_text('{"rows": []}')  # measured as it is, not trained
    drawn = []
    draw = Axes.errorbar

    def spy(*what, label, color):
        drawn.append((*what[1:], label, color))
        return draw(*what, label=label, color=color)

    monkeypatch.setattr(Axes, "errorbar", spy)
    pictures.curves("overoptimised", "curves.png", ["lrm_estimate", "true_reward"])
    assert drawn == [([0, 10], [2.0, 4.0], [1.0, 2.0], "LRM alone", "C1")]  # the second row's colour, in every panel
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="has none of cd"):
        pictures.curves("overoptimised", "other.png", ["cd"])


def test_a_sheet_has_a_row_for_each_student_there_is(tmp_path, monkeypatch):
    weights = Path(experiments.__file__).parent.parent / "weights"
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(weights)
    with pytest.raises(UserError, match="no student of the table rank"):
        pictures.sheet("rank", "sheet.png")
    out = Path("runs/experiments") / experiments.name_of("rank", "rank 8", 0)
    out.mkdir(parents=True)
    (out / "student.safetensors").symlink_to(weights / "student.safetensors")
    drawn, show = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axis, x, **how: drawn.append(x.shape) or show(axis, x, **how))
    pictures.sheet("rank", "sheet.png", 2)
    assert drawn == [(64, 2 * 3 * 64, 3)]  # two prompts, three frames of each
    (out.parent / experiments.name_of("overoptimised", "LRM alone", 0)).symlink_to(out.absolute())
    pictures.sheet("overoptimised", "sheet.png", 1)
    assert drawn[1:] == [(64, 3 * 64, 3)] * 2  # the bundled student that it began with stands above it


def test_an_unknown_table_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no table nothing"):
        pictures.curves("nothing", tmp_path / "x.png", ["cd"])
