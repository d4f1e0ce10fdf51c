"""train.py on many ranks: 2, 4 and 8 are 1, a killed run goes on, and what befalls one rank is seen by all.

Each process calls `train.train` as torchrun would have it, on the CPU over gloo. What is compared is every gradient
before clipping, of student, fake score and LRM: parameters alone prove little, for AdamW hides a gradient that is many
times too large. Starting processes is what costs, so each group of them makes several runs, and the tests read these.
What distributed.py promises by itself (SGD, saving, full disks, memory) is tested in test_distributed.py.
"""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import difference, equal, in_ranks, launch, whole

import common
import distributed
import dit
import rewards
import train
import vae3d
from common import UserError
from distributed import start, stop

BATCH = 4  # clips an update, whatever the number of ranks
STEPS = 5
UPDATES = 4  # of an iteration: student, fake score twice, LRM
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Random weights, as small as they go."""
    folder = tmp_path_factory.mktemp("weights")
    teacher = dit.DiT(replace(dit.PRESETS["shapes"], width=32, depth=1, heads=2))
    pairs = ((name, distributed.normal(p.shape, (name,), [0])[0] / 5) for name, p in teacher.named_parameters())
    distributed.load_sharded(teacher, pairs)
    common.save_model(folder / "teacher.safetensors", teacher, kind="teacher", w=2.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = vae3d.VAE3D(replace(vae3d.PRESETS["shapes"], channels=(8, 8, 8)))
    common.save_model(folder / "vae.safetensors", vae)
    return folder


def config(folder, out, size=1, total=BATCH, **changes):
    """All losses on, in float32."""
    small = {"teacher": f"{folder}/teacher.safetensors", "vae": f"{folder}/vae.safetensors", "out": str(out)}
    small |= {"iterations": STEPS, "batch": total // size, "global_batch": total, "fake_updates": 2, "m": 1}
    small |= {"reward": "dynamic_degree", "reward_frames": 2, "precision": "fp32", "lrm_warmup": 0}
    small |= {"lrm_updates": 1}  # what a buffer keeps is each rank's own
    small |= {"save_every": 1, "sample_every": 0}
    small |= {"cd_target": "ema"}  # against the teacher's target the rounding is twice as large: 1.4e-5
    return train.Config(**train.PRESETS["shapes"] | small | changes)


def sgd(nets, *_):
    """Optimizers that do not divide gradients by their size, so that rounding stays as small as it is."""
    learn = {name: module for name, module in nets.modules.items() if name not in ("ema", "buffer")}
    return {name: torch.optim.SGD(module.parameters(), 1e-2, 0.9) for name, module in learn.items()}


def distil(ranks, folder, out, happens=None, adam=train.adam, patience=5, **changes):
    """A run of train.py: {"gradients": of every update, "final": the state after it, "log", "said", "error"}.

    happens: (rank, n, what) befalls that rank: a signal at the end of its n-th step, or "nan" after its n-th step.
    """
    seen, final, printed = [], {}, io.StringIO()
    clip, loss, calls = distributed.clip_gradients, train.vsd_loss, {"steps": 0, "losses": 0}
    rank, when, what = happens or (-1, -1, None)

    def record(model, limit):
        seen.append(whole({name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        return clip(model, limit)

    def finish(nets, *_):
        for name, module in nets.modules.items():
            final.update({f"{name}.{k}": p for k, p in whole(dict(module.named_parameters())).items()})

    def vsd_loss(*args, **kwargs):
        value, info = loss(*args, **kwargs)
        calls["losses"] += 1
        return value * (math.nan if what == "nan" and ranks.rank == rank and calls["losses"] > when else 1), info

    class Stopper(distributed.Stopper):
        def __call__(self):
            calls["steps"] += 1
            if ranks.rank == rank and calls["steps"] == when and what != "nan":
                os.kill(os.getpid(), what)
            return super().__call__()

    # smooth and linear: the size of a JPEG jumps by a byte, and a flow changes its way, where one pixel is rounded
    light = lambda video, prompts: video.flatten(1).mean(1)
    reward = {"dynamic_degree": (light, True, False, True, "")}
    error, before = None, [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with contextlib.ExitStack() as stack:
        for place, name, new in (
            (distributed, "clip_gradients", record),
            (distributed, "Stopper", Stopper),
            (train, "finish", finish),
            (train, "vsd_loss", vsd_loss),
            (train, "adam", adam),
            (train, "PATIENCE", patience),
            (distributed.Checkpoints.__init__, "__defaults__", (9,)),  # keep them all
            (train, "measure_reward", lambda *_: {}),
        ):
            stack.enter_context(mock.patch.object(place, name, new))
        stack.enter_context(mock.patch.dict(rewards.REWARDS, reward))
        stack.enter_context(contextlib.redirect_stdout(printed))
        try:
            train.train(config(folder, out, ranks.size, **changes), ranks)
        except UserError as e:
            error = str(e)
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)
    distributed.any_rank(False, ranks)  # waits: rank 0 writes the log, and may be behind
    log = Path(out) / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {"gradients": seen, "final": final, "log": lines, "said": printed.getvalue(), "error": error}


def several(folder, runs):
    """One process of a group: the runs [(out, changes)] one after the other."""
    ranks = start("cpu", 1800)
    answers = [distil(ranks, folder, out, **changes) for out, changes in runs]
    stop()
    return answers


def killed_while_saving(folder, out):
    """Rank 1 is killed in the middle of its second checkpoint, its part written."""
    write, saves = dcp.FileSystemWriter.write_data, []

    def killed(*args):
        written = write(*args)
        saves.append(written.wait())
        if int(os.environ["RANK"]) == 1 and len(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    with mock.patch.object(dcp.FileSystemWriter, "write_data", killed):
        answer = distil(start("cpu", 1800), folder, out)
    raise UserError(answer["error"])


def left_at(step, run, out):
    """What a kill after the checkpoint of `step` leaves of a run."""
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / f"checkpoints/step_{step:08d}", out / f"checkpoints/step_{step:08d}")
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (out / "log.jsonl").write_text("".join(lines[: step + 1]))  # one more than was saved
    return out


# The runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


SGD = {"adam": sgd, "save_every": 100}
ADAPTED = SGD | {"rank": 4, "checkpoint_activations": True}


@pytest.fixture(scope="module")
def both(tiny, place):
    """One rank, with AdamW, with SGD, and with SGD on adapters."""
    return several(tiny, [(place / "one", {}), (place / "one, sgd", SGD), (place / "one, adapted", ADAPTED)])


@pytest.fixture(scope="module")
def one(both):
    return both[0]


@pytest.fixture(scope="module")
def killed(tiny, place):
    return launch(2, killed_while_saving, tiny, place / "killed")[0]


@pytest.fixture(scope="module")
def two(tiny, place, killed):
    """By name, the two ranks' answers."""
    (place / "file").touch()
    stopped, nan = place / "stopped", place / "nan"
    runs = {
        "straight": (place / "two", {}),
        "sgd": (place / "two, sgd", SGD),
        "adapted": (place / "two, adapted", ADAPTED),
        "stopped": (stopped, {"happens": (1, 2, signal.SIGTERM), "save_every": 100}),
        "stopped, resumed": (stopped, {"resume": True}),
        "killed, resumed": (place / "killed", {"resume": True}),
        "nan": (nan, {"happens": (1, 1, "nan"), "patience": 1}),
        "nan, resumed": (nan, {"resume": True}),
        "recomputed": (place / "recomputed", {"checkpoint_activations": True, "batch": 1, "iterations": 1}),
        "unwritable": (place / "file", {}),
    }
    return dict(zip(runs, zip(*in_ranks(2, several, tiny, list(runs.values())))))


@pytest.fixture(scope="module")
def four(tiny, place, two):
    other = left_at(2, place / "two", place / "two to four")
    return in_ranks(4, several, tiny, [(place / "four", {}), (place / "four, sgd", SGD), (other, {"resume": True})])


def updates(run):
    """The gradients of student, fake score (twice) and LRM, a list a step."""
    assert len(run["gradients"]) % UPDATES == 0
    return [run["gradients"][i : i + UPDATES] for i in range(0, len(run["gradients"]), UPDATES)]


def close(ours, theirs, limit=1e-5):
    assert len(ours) == len(theirs)
    return all(difference(a, b) < limit for a, b in zip(ours, theirs))


# What they say


def test_many_ranks_give_the_gradients_of_one(one, two, four):
    assert len(updates(one)) == STEPS
    for run in (*two["straight"], *(straight for straight, *_ in four)):
        assert len(updates(run)) == STEPS and close(updates(run)[0], updates(one)[0])
        # then AdamW has divided rounding by its own size
        assert all(close(a, b, 1e-2) for a, b in zip(updates(run), updates(one)))
        assert difference(run["final"], one["final"]) < 1e-3


def test_many_ranks_go_the_way_of_one(both, two, four):
    """Through all steps, where the optimizer does not divide by what is but rounding."""
    alone = both[1]
    for run in (*two["sgd"], *(sgd for _, sgd, _ in four)):
        assert len(updates(run)) == len(updates(alone)) == STEPS
        assert all(close(a[:3], b[:3]) for a, b in zip(updates(run), updates(alone)))
        # the LRM's errors nearly cancel in a batch of standardised rewards, and their rounding does not
        assert all(close(a[3:], b[3:], 5e-5) for a, b in zip(updates(run), updates(alone)))
        assert difference(run["final"], alone["final"]) < 1e-6
    start = updates(alone)[0][0], updates(alone)[-1][0]
    assert difference(*start) > 1e-2  # it has gone somewhere


def test_many_ranks_go_the_way_of_one_with_adapters(both, two):
    """Base and adapters are cut over the ranks, and blocks are computed again in the backward pass."""
    alone = both[2]
    for run in two["adapted"]:
        assert len(updates(run)) == len(updates(alone)) == STEPS
        assert all(close(a[:3], b[:3]) for a, b in zip(updates(run), updates(alone)))
        assert difference(run["final"], alone["final"]) < 1e-5
    assert all(name.startswith("adapters.") for name in updates(alone)[0][0])
    assert difference(updates(alone)[0][0], updates(alone)[-1][0]) > 1e-2


def test_eight_ranks_run_the_small_world(tiny, place):
    run = {"iterations": 1, "total": 8, "save_every": 100, "reward": "none", "fake_updates": 1}
    (alone,) = several(tiny, [(place / "one of eight", run)])
    for (answer,) in in_ranks(8, several, tiny, [(place / "eight", run)]):
        assert len(answer["gradients"]) == 2 and close(answer["gradients"], alone["gradients"])


def test_accumulated_and_recomputed_gradients_are_those_of_the_large_batch(one, two):
    """Two ranks, twice batch 1, activations computed again in the backward. The LRM's mean and deviation are running
    ones, which it standardises by as they are after each part: its gradients are others."""
    for run in two["recomputed"]:
        assert close(updates(run)[0][:3], updates(one)[0][:3])


def test_a_run_goes_on_to_the_bit_from_every_step(tiny, place, one):
    for step in range(1, STEPS):
        out = left_at(step, place / "one", place / f"one from {step}")
        (run,) = several(tiny, [(out, {"resume": True})])
        assert len(updates(run)) == STEPS - step and equal(run["final"], one["final"])
        assert [line["step"] for line in run["log"]] == list(range(STEPS))


def test_ranks_killed_in_the_middle_of_a_save_go_on_to_the_bit(killed, two):
    assert killed == [1, -signal.SIGKILL]  # rank 0 has not waited for ever
    for run, straight in zip(two["killed, resumed"], two["straight"]):
        assert len(updates(run)) == STEPS - 1 and equal(run["final"], straight["final"])
    assert "step_00000001" in two["killed, resumed"][0]["said"]


def test_another_number_of_ranks_goes_on_to_rounding(tiny, place, two, four):
    out = left_at(2, place / "two", place / "two to one")
    runs = [*several(tiny, [(out, {"resume": True})]), *(resumed for *_, resumed in four)]
    for run in runs:
        found = updates(two["straight"][0])[2]
        assert len(updates(run)) == STEPS - 2 and close(updates(run)[0][:-1], found[:-1], 3e-5)
        # the LRM's labels are divided by their deviation, and so is their rounding
        assert close(updates(run)[0][-1:], found[-1:], 1e-4)


def test_sigterm_to_one_rank_saves_and_leaves_in_order(two):
    first, second = two["stopped"]
    assert first["said"].splitlines()[-1].startswith("stopped after step 2, saved: go on with --resume --out ")
    assert not second["said"] and not first["final"] and not first["error"]
    for run, straight in zip(two["stopped, resumed"], two["straight"]):
        assert equal(run["final"], straight["final"])


def test_a_nan_on_one_rank_skips_the_step_on_all(two):
    for run in two["nan"]:
        assert "1 updates in a row" in run["error"] and "saved" in run["error"]
        assert [line["skipped"] for line in run["log"]] == [0, 1]
        fine = [[all(t.isfinite().all() for t in grads.values()) for grads in step] for step in updates(run)]
        assert fine == [[True] * 4, [False, True, True, True]]
    for run in two["nan, resumed"]:
        assert run["error"] is None and len(updates(run)) == STEPS - 2
        assert all(t.isfinite().all() for t in run["final"].values())


def test_a_folder_that_cannot_be_written_is_one_line_on_every_rank(two):
    for run in two["unwritable"]:
        assert "cannot write" in run["error"] and "\n" not in run["error"] and not run["gradients"]


SHIM = """
import os, signal, sys
import distributed, train


class Stopper(distributed.Stopper):
    steps = 0

    def __call__(self):
        self.steps += 1
        if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], self.steps) == ("0", "1", 3):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__()


distributed.Stopper, train.finish = Stopper, lambda *_: None
train.run(train.main)
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_restarts_from_the_newest_checkpoint(tiny, tmp_path, nodes):
    """A real torchrun of two ranks on one node or, in two torchruns that find each other, on two. The second rank is
    killed once, at the end of its third step."""
    (tmp_path / "shim.py").write_text(SHIM)
    words = ["--teacher", f"{tiny}/teacher.safetensors", "--vae", f"{tiny}/vae.safetensors", "--out", tmp_path / "run"]
    words += ["--iterations", 4, "--batch", 1, "--fake-updates", 1, "--sample-every", 0]
    words += ["--save-every", 1, "--precision", "fp32", "--device", "cpu", "--threads", 1]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meet = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{probe.getsockname()[1]} --rdzv-id=run".split()
    run = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={2 // nodes}"]
    run += ["--max-restarts=1", *(meet if nodes > 1 else ["--standalone"]), tmp_path / "shim.py", *words]
    env = os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)}
    env |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if nodes > 1 else {}  # see README
    begin = lambda: subprocess.Popen(
        list(map(str, run)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    started = [begin() for _ in range(nodes)]
    said = [process.communicate(timeout=1800) for process in started]
    assert [process.returncode for process in started] == [0] * nodes, said
    assert any(f"going on from {tmp_path}/run/checkpoints/step_0000000" in out for out, _ in said)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]
