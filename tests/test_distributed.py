"""distributed.py with real processes over gloo on the CPU: what many ranks do is what one does.

`in_ranks(n, work)` runs `work(ranks)` in n processes, as torchrun would. Starting them is what costs, so each group of
processes answers many questions, and the tests below read the answers. The network is a DiT of some thousand
parameters, none of them zero, and `backward` is Algorithm 1 in small: a simulation without gradient of random length,
a frozen guided teacher, the student called several times with gradient, a fake score, and a replicated reward model.
"""

import errno
import hashlib
import json
import math
import os
import resource
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import difference, equal, in_ranks, launch, whole
from safetensors.torch import save_file
from torch import nn

import distributed
import nets
import train
from common import UserError
from distributed import Checkpoints, Ranks, Stopper, any_rank, every, local, mean, normal, randint, shard, start, stop
from dit import DiT, DiTConfig
from losses import lrm_loss, reward_loss
from lrm import Buffer

TINY = DiTConfig(channels=4, width=32, depth=2, heads=2, text_dim=8, text_length=4, time_dim=16, latents=(2, 4, 4))
SIZED = DiTConfig(width=192, depth=1, text_dim=64, text_length=8, latents=(2, 4, 4))  # 0.6 million parameters
ALONE = Ranks(0, 1, torch.device("cpu"))
TOTAL = 8  # samples in a global batch
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]  # DCP, of one process

# Algorithm 1 in small


def weights(config, seed):
    """Pairs (name, tensor) without a zero, so that every parameter matters: the DiT's own beginning is the identity."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in DiT(config).named_parameters()}
    return ((name, 0.3 * normal(shape, (seed, name), [0])[0]) for name, shape in shapes.items())


def fill(modules, optimizers=(), seed=0):
    """The weights of `seed`, and optimizers that have not stepped."""
    for name in ("student", "fake", "teacher"):
        distributed.load_sharded(modules[name], weights(TINY, f"{seed} {name}"))
    pairs = [(name, normal(p.shape, (seed, "lrm", name), [0])[0] / 8) for name, p in modules["lrm"].named_parameters()]
    distributed.load_sharded(modules["lrm"], pairs)
    for name in optimizers:
        optimizers[name].state.clear()
        optimizers[name].zero_grad()


def build(ranks, how, dtype=None):
    modules = {}
    for name in ("student", "fake", "teacher"):
        with torch.device("meta"):
            model = DiT(TINY)
        modules[name] = shard(model, ranks, how, dtype, trainable=name != "teacher")
    modules["lrm"] = nn.Sequential(nn.Flatten(), nn.Linear(128, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    fill(modules)
    return modules, {name: torch.optim.AdamW(modules[name].parameters()) for name in ("student", "fake", "lrm")}


def backward(modules, ranks, step, accumulate=1):
    """Gradients of one step in the modules' .grad, unclipped. Returns the loss of this rank."""
    student, teacher, fake, lrm = (modules[name] for name in ("student", "teacher", "fake", "lrm"))
    own, losses = TOTAL // ranks.size // accumulate, 0.0
    for micro in range(accumulate):
        numbers = [(micro * ranks.size + ranks.rank) * own + i for i in range(own)]
        x, text = normal((4, 2, 4, 4), (step, "x"), numbers), normal((4, 8), (step, "text"), numbers)
        t = torch.tensor([randint(1000, (step, "t", i)) for i in numbers])
        z = x
        with torch.no_grad():
            for _ in range(randint(3, (step, "forwards"))):
                z = student(z, t, text)
        y = student(z, t, text)
        with torch.no_grad():
            guided = 2 * teacher(y, t, text) - teacher(y, t, 0 * text)
            push = fake(y, t, text) - guided
        again = student(student(y.detach(), t, text), t, text)
        loss = (y - (y - push).detach()).square().mean() + (again - x).square().mean() + reward_loss(lrm, y)
        loss = loss + (fake(y.detach(), t, text) - x).square().mean() + lrm_loss(lrm, y, x.flatten(1).mean(1))
        (loss / accumulate).backward()
        losses += loss.item() / accumulate
    for module in modules.values():
        distributed.average_gradients(module, ranks)
    return losses


def gradients(modules):
    named = [(f"{m}.{name}", p) for m, module in modules.items() for name, p in module.named_parameters()]
    return whole({name: p.grad for name, p in named if p.grad is not None})


def state(modules, optimizers):
    """Every number that training goes on from, whole, as a flat dict."""
    return whole({k: t for k, t in distributed._tensors(modules, optimizers).items() if "teacher" not in k})


def update(modules, optimizers, ranks, step):
    """Take a step; returns (mean loss, norms, gradients before clipping)."""
    loss = mean(backward(modules, ranks, step), ranks)
    found = gradients(modules)
    norms = {name: distributed.clip_gradients(modules[name], 1.0) for name in optimizers}
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    return loss, norms, found


def saved(modules):
    return {name: module for name, module in modules.items() if name != "teacher"}


# What the processes do


def answer(folder, load=None, other=None):
    """The questions to 1, 2 and 4 ranks: two steps and a save between them, then again from the checkpoint.

    load: a checkpoint of another number of ranks. other: another way of sharding.
    """
    ranks = start("cpu", 1800)
    out = {"rank": ranks.rank, "main": ranks.main}
    modules, optimizers = build(ranks, "full")
    trained = saved(modules)
    out["bytes"] = sum(local(p).nbytes for p in modules["student"].parameters())
    checkpoints = Checkpoints(folder)
    first = update(modules, optimizers, ranks, 0)
    out["saved"] = state(modules, optimizers)
    checkpoints.save(1, trained, optimizers, {"step": 1, "name": "é"})
    out["full"] = [first, update(modules, optimizers, ranks, 1)]
    out["straight"] = state(modules, optimizers)
    checkpoints.wait()

    for name, path in {"own": checkpoints.newest(), "other": load}.items():
        if path:
            fill(modules, optimizers, 1)
            out[name, "extra"] = checkpoints.load(path, trained, optimizers)
            out[name, "loaded"] = state(modules, optimizers)
            distributed.load_sharded(modules["teacher"], weights(TINY, "0 teacher"))  # it is not in the checkpoint
            update(modules, optimizers, ranks, 1)
            out[name, "resumed"] = state(modules, optimizers)

    fill(modules, optimizers)
    modules["student"].checkpoint_activations = True
    backward(modules, ranks, 0)
    out["recomputed"] = gradients(modules)
    modules["student"].checkpoint_activations = False
    fill(modules, optimizers)
    backward(modules, ranks, 0, accumulate=2)
    out["accumulated"] = gradients(modules)

    fill(modules, optimizers)
    sgd = {name: torch.optim.SGD(modules[name].parameters(), 0.01, momentum=0.9) for name in optimizers}
    out["sgd"] = [update(modules, sgd, ranks, step) for step in range(2)]
    out["sgd state"] = state(modules, sgd)

    if other:
        others = build(ranks, other)
        out["other bytes"] = sum(local(p).nbytes for p in others[0]["student"].parameters())
        out[other] = [update(*others, ranks, 0), update(*others, ranks, 1)]
    stop()
    return out


def trouble(folder):
    """What may go wrong on one rank, and must be seen by all."""
    ranks = start("cpu", 1800)
    out, last = {}, ranks.size - 1
    bad = math.nan if ranks.rank == last else 1.0
    out["mean"], out["nan"] = mean(ranks.rank, ranks), mean(bad, ranks)
    out["every"] = every({"rank": ranks.rank}, ranks)
    out["any"] = [any_rank(flag, ranks) for flag in (False, ranks.rank == last, bad != bad)]
    modules, optimizers = build(ranks, "full")
    x, t, text = normal((4, 2, 4, 4), (0,), [0]), torch.tensor([3]), normal((4, 8), (1,), [0])
    (modules["student"](x, t, text) * bad).sum().backward()
    out["nan norm"] = distributed.clip_gradients(modules["student"], 1.0)
    optimizers["student"].zero_grad()

    stopper = Stopper(ranks)
    out["stop"] = [stopper()]
    if ranks.rank == last:
        os.kill(os.getpid(), signal.SIGTERM)
    out["stop"] += [stopper(), stopper.flag]

    # a save in the background is of the moment when it was asked for
    update(modules, optimizers, ranks, 0)
    checkpoints, gate, write = Checkpoints(folder), threading.Event(), dcp.FileSystemWriter.write_data
    before = state(modules, optimizers)

    def late(*args):
        assert gate.wait(1800)
        return write(*args)

    with mock.patch.object(dcp.FileSystemWriter, "write_data", late):
        checkpoints.save(1, saved(modules), optimizers, {})
        out["early"] = checkpoints.newest()  # nothing is written yet
        update(modules, optimizers, ranks, 1)
        out["moved"] = not equal(state(modules, optimizers), before)
        gate.set()
        checkpoints.wait()
    checkpoints.load(folder / "step_00000001", saved(modules), optimizers)
    out["snapshot"] = equal(state(modules, optimizers), before)

    # what every rank has of its own comes back to it
    mine = Buffer(2, (1, 1, 1, 1), 1)
    mine.add(torch.full((1, 1, 1, 1, 1), 5.0 + ranks.rank), torch.zeros(1, 1), torch.zeros(1, 1, 1))
    checkpoints.save(1, saved(modules), optimizers, {}, wait=True, own=mine)
    mean(0, ranks)
    again = Buffer(2, (1, 1, 1, 1), 1)
    checkpoints.load(folder / "step_00000001", saved(modules), optimizers, again)
    out["own"] = again.x.flatten().tolist(), int(again.count)

    # the last rank's disk is full
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with mock.patch.object(dcp.FileSystemWriter, "write_data", full if ranks.rank == last else write):
        checkpoints.save(2, saved(modules), optimizers, {})
        with pytest.raises(UserError, match="No space left on device") as error:
            checkpoints.save(3, saved(modules), optimizers, {})
        out["full"] = str(error.value)
    mean(0, ranks)  # rank 0 has cleaned up
    out["after"] = sorted(path.name for path in folder.iterdir())
    checkpoints.save(3, saved(modules), optimizers, {}, wait=True)
    mean(0, ranks)
    out["again"] = sorted(path.name for path in folder.iterdir())
    stop()
    return out


def memory(config):
    """Bytes of (parameters, gradients, optimizer state) on this rank, and the gradients' first numbers."""
    ranks = start("cpu", 1800)
    with torch.device("meta"):
        model = DiT(config)
    distributed.materialise(shard(model, ranks), 3)
    optimizer = torch.optim.AdamW(model.parameters())
    x, t = normal((config.channels, *config.latents), (0, "x"), [ranks.rank]), torch.tensor([500])
    model(x, t, normal((8, config.text_dim), (0, "text"), [ranks.rank])).square().mean().backward()
    optimizer.step()
    params = list(model.parameters())
    slots = [t for slot in optimizer.state.values() for t in slot.values()]
    held = [sum(local(t).nbytes for t in ts) for ts in (params, [p.grad for p in params], slots)]
    first = distributed.gather(distributed.materialise(model, 3))
    stop()
    return held, first


def die(folder):
    """Rank 1 is killed in the middle of its second save, its part written; rank 0 waits for it."""
    ranks = start("cpu", 1800)
    modules, optimizers = build(ranks, "full")
    update(modules, optimizers, ranks, 0)
    checkpoints, write = Checkpoints(folder), dcp.FileSystemWriter.write_data
    checkpoints.save(1, saved(modules), optimizers, {"step": 1}, wait=True)

    def killed(*args):
        write(*args).wait()
        os.kill(os.getpid(), signal.SIGKILL)

    if ranks.rank == 1:
        dcp.FileSystemWriter.write_data = killed
    checkpoints.save(2, saved(modules), optimizers, {"step": 2})
    for step in range(1, 1000):
        update(modules, optimizers, ranks, step)


def killed_before_the_rename(folder):
    ranks = start("cpu")
    modules, optimizers = build(ranks, "full")
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, saved(modules), optimizers, {"step": 1}, wait=True)
    with mock.patch.object(Path, "write_text", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
        checkpoints.save(2, saved(modules), optimizers, {"step": 2}, wait=True)


def hang(limit, sleep):
    """The last rank sleeps; how long the others wait for it before they fail."""
    ranks, begun = start("cpu", limit), time.monotonic()
    if ranks.rank == 1:
        time.sleep(sleep)
    else:
        with pytest.raises(RuntimeError):
            mean(0, ranks)
    return time.monotonic() - begun


def half_precision():
    """Computation in bfloat16: kinds of tensor, and how far output and gradients are from float32's."""
    ranks = start("cpu", 1800)
    (full, _), (half, _) = build(ranks, "full"), build(ranks, "full", dtype=torch.bfloat16)
    for modules in (full, half):
        backward(modules, ranks, 0)
    teacher, student = ({p.dtype for p in half[name].parameters()} for name in ("teacher", "student"))
    x, t, text = normal((4, 2, 4, 4), (0,), [0]), torch.tensor([3]), normal((4, 8), (1,), [0])
    with torch.no_grad():
        outputs = [modules["student"](x, t, text) for modules in (full, half)]
    kinds, found = {p.grad.dtype for p in half["student"].parameters()}, [gradients(full), gradients(half)]
    stop()
    return teacher, student, kinds, outputs, *found


# The answers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def one(place):
    return answer(place / "1")


@pytest.fixture(scope="module")
def two(place, one):
    return in_ranks(2, answer, place / "2", place / "1/step_00000001", "none")


@pytest.fixture(scope="module")
def four(place, two):
    return in_ranks(4, answer, place / "4", place / "2/step_00000001", "hybrid", LOCAL_WORLD_SIZE="2")


@pytest.fixture(scope="module")
def troubled(place):
    return in_ranks(2, trouble, place / "trouble")


def test_every_rank_knows_its_place(two, four):
    for answers in (two, four):
        assert [a["rank"] for a in answers] == list(range(len(answers)))
        assert [a["main"] for a in answers] == [True] + [False] * (len(answers) - 1)


def test_a_rank_holds_its_share_of_the_weights(one, two, four):
    total = one["bytes"]
    assert {a["bytes"] for a in two} == {total // 2} and {a["other bytes"] for a in two} == {total}
    assert {a["bytes"] for a in four} == {total // 4} and {a["other bytes"] for a in four} == {total // 2}


@pytest.mark.parametrize("how", ["2 full", "2 none", "4 full", "4 hybrid"])
def test_gradients_are_those_of_one_process(one, two, four, how):
    """Losses, norms and every gradient before clipping: in the first step to rounding.

    The second step's weights are those that AdamW has made of the first's gradients. It divides each by its own size,
    which makes of rounding in what is nearly zero a step of full length.
    """
    size, how = how.split()
    answers = {"2": two, "4": four}[size]
    for a in answers:
        for (loss, norms, grads), (want, norms_want, grads_want), limit in zip(a[how], one["full"], (1e-5, 1e-3)):
            assert loss == pytest.approx(want, rel=limit) and norms == pytest.approx(norms_want, rel=limit)
            assert difference(grads, grads_want) < limit
        assert [step[:2] for step in a[how]] == [step[:2] for step in answers[0][how]]  # alike on all ranks, to the bit


def test_parameters_after_steps_of_sgd_are_those_of_one_process(one, two, four):
    for a in (*two, *four):
        for (loss, _, grads), (want, _, grads_want) in zip(a["sgd"], one["sgd"]):
            assert loss == pytest.approx(want, rel=1e-5) and difference(grads, grads_want) < 1e-5
        assert difference(a["sgd state"], one["sgd state"]) < 1e-5


def test_recomputed_activations_give_the_same_gradients(one, two, four):
    for a in (one, *two, *four):
        assert difference(a["recomputed"], a["full"][0][2]) < 1e-6


def test_accumulated_gradients_are_those_of_the_large_batch(one, two, four):
    for a in (one, *two, *four):
        assert difference(a["accumulated"], one["full"][0][2]) < 1e-5


def test_a_run_goes_on_to_the_bit(one, two, four):
    for a in (one, *two, *four):
        assert a["own", "extra"] == {"step": 1, "name": "é"}
        assert sum("exp_avg_sq" in name for name in a["saved"]) == len(a["saved"]) // 4  # with weight, exp_avg, step
        assert equal(a["own", "loaded"], a["saved"])
        assert equal(a["own", "resumed"], a["straight"]) and not equal(a["straight"], a["saved"])


def test_a_checkpoint_is_read_by_another_number_of_ranks(place, one, two, four):
    for answers, origin in ((two, one), (four, two[0])):  # 1 -> 2, 2 -> 4
        for a in answers:
            assert equal(a["other", "loaded"], origin["saved"])
            assert difference(a["other", "resumed"], origin["straight"]) < 1e-3  # AdamW, as above
    for a in in_ranks(2, load, place / "4/step_00000001"):  # 4 -> 2
        assert equal(a, four[0]["saved"])
    for folder, origin in ((place / "2", two[0]), (place / "4", four[0])):  # 2 -> 1, 4 -> 1
        assert equal(load(folder / "step_00000001"), origin["saved"])


def load(path):
    ranks = start("cpu", 1800)
    modules, optimizers = build(ranks, "full")
    fill(modules, seed=1)
    Checkpoints(path.parent).load(path, saved(modules), optimizers)
    found = state(modules, optimizers)
    stop()
    return found


def test_what_happens_on_one_rank_is_seen_by_all(troubled):
    for a in troubled:
        assert a["every"] == [{"rank": 0}, {"rank": 1}]
        assert a["mean"] == 0.5 and math.isnan(a["nan"]) and a["any"] == [False, True, True]
        assert math.isnan(a["nan norm"])
    assert [a["stop"] for a in troubled] == [[False, True, False], [False, True, True]]


def test_a_save_in_the_background_is_of_the_moment_it_was_asked_for(troubled):
    for a in troubled:
        assert a["early"] is None and a["moved"] and a["snapshot"]


def test_what_a_rank_has_of_its_own_comes_back_to_it(troubled, place):
    assert [a["own"] for a in troubled] == [([5, 0], 1), ([6, 0], 1)]


def test_a_full_disk_of_one_rank_leaves_the_checkpoint_before(troubled):
    for a in troubled:
        assert a["full"].count("\n") == 0 and "trouble" in a["full"]
        assert a["after"] == [".writable", "step_00000001"]
        assert a["again"] == [".writable", "step_00000001", "step_00000003"]


def test_memory_per_rank_is_the_total_over_the_ranks():
    """Prints the table: bytes of parameters, gradients and optimizer state on each rank of 1, 2, 4 and 8."""
    plain, table = DiT(SIZED), {}
    plain.init_weights(3)
    for size in (1, 2, 4, 8):
        answers = [memory(SIZED)] if size == 1 else in_ranks(size, memory, SIZED)
        table[size] = [held for held, _ in answers]
        assert equal(answers[0][1], plain.state_dict())  # the same first weights, gathered on rank 0 alone
        assert not any(others for _, others in answers[1:])
    print("\nranks  parameters  gradients  optimizer: the most bytes that a rank holds")
    for size, held in table.items():
        print(f"{size:5d}  " + "  ".join(f"{max(column):9d}" for column in zip(*held)))
        for row in held:
            assert row == pytest.approx([total / size for total in table[1][0]], rel=0.05)
        reckoned, _ = nets.held(train.Config(), SIZED, size, SIZED.latents)  # what `train.py memory` says
        assert max(held) == pytest.approx(reckoned["student and its optimizer"], rel=0.005)


def test_bfloat16_computes_and_float32_keeps():
    for size in (1, 2):
        for teacher, student, grads, (full, half), exact, close in in_ranks(size, half_precision):
            assert teacher == {torch.bfloat16} and student == grads == {torch.float32}
            assert full.dtype == half.dtype == torch.float32
            assert 1e-4 < ((full - half).norm() / full.norm()).item() < 0.05
            # TINY's gradients of fifteen chained layers lose digits: it is enough that they point the same way
            a, b = (torch.cat([g[k].flatten() for k in sorted(exact) if "student" in k]) for g in (exact, close))
            assert torch.cosine_similarity(a, b, dim=0) > 0.99


# Deaths


def test_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before(tmp_path):
    codes, _ = launch(2, die, tmp_path)
    assert codes[1] == -signal.SIGKILL and codes[0] == 1  # rank 0 has not waited for ever, and says so
    assert (tmp_path / ".tmp_2").exists() and Checkpoints(tmp_path).newest() == tmp_path / "step_00000001"
    modules, optimizers = build(ALONE, "full")
    assert Checkpoints(tmp_path).load(tmp_path / "step_00000001", saved(modules), optimizers) == {"step": 1}
    Checkpoints(tmp_path).save(2, saved(modules), optimizers, {"step": 2}, wait=True)
    assert not (tmp_path / ".tmp_2").exists() and Checkpoints(tmp_path).newest() == tmp_path / "step_00000002"


def test_kill_just_before_the_rename_leaves_the_checkpoint_before(tmp_path):
    codes, _ = launch(1, killed_before_the_rename, tmp_path)
    assert codes == [-signal.SIGKILL]
    assert Checkpoints(tmp_path).newest() == tmp_path / "step_00000001" and (tmp_path / ".tmp_2/.metadata").exists()


def test_a_rank_that_hangs_does_not_hold_the_others_for_ever():
    waited, slept = in_ranks(2, hang, 5, 15)
    assert waited < 12 < slept


# Without other processes


@pytest.fixture
def small():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    return {"net": module}, {"adam": torch.optim.AdamW(module.parameters(), 1e-2)}


def move(modules, optimizers):
    modules["net"](torch.ones(2, 3)).square().mean().backward()
    optimizers["adam"].step()


def test_a_second_signal_is_not_caught():
    """It is for who does not want to wait for what comes after the last step."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stopper = Stopper(Ranks(0, 1, torch.device("cpu")))
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopper() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)


def test_gradient_descent_clips_and_leaves_out_what_is_not_finite():
    alone, p = Ranks(0, 1, torch.device("cpu")), nn.Parameter(torch.zeros(2))
    module, sgd = nn.ParameterList([p]), torch.optim.SGD([p], 1.0)
    for gradient, limit, finite, norm, place in (
        ([3.0, 4.0], 10.0, True, 5.0, [-3.0, -4.0]),
        ([3.0, 4.0], 1.0, True, 5.0, [-3.6, -4.8]),  # scaled down to norm 1
        ([3.0, 4.0], 1.0, False, math.nan, [-3.6, -4.8]),
        ([math.inf, 4.0], 1.0, True, math.nan, [-3.6, -4.8]),
    ):
        p.grad = torch.tensor(gradient)
        said = distributed.gradient_descent(module, sgd, limit, alone, finite)
        assert said == pytest.approx(norm, nan_ok=True) and p.grad is None
        torch.testing.assert_close(p.detach(), torch.tensor(place), rtol=1e-5, atol=1e-5)


def test_which_checkpoints_are_kept(tmp_path, small):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    assert checkpoints.newest() is None
    copies = [tmp_path / name for name in ("step_00000001.bak", "step_00000009_good")]  # a user's own
    for copy in copies:
        copy.mkdir()
    for step in range(1, 9):
        checkpoints.save(step, *small, {"step": step})
    checkpoints.wait()
    assert all(copy.is_dir() for copy in copies)
    assert sorted(p.name[-1] for p in set(tmp_path.glob("step_*")) - set(copies)) == ["7", "8"]
    assert checkpoints.newest().name == "step_00000008"
    assert json.loads((checkpoints.newest() / "extra.json").read_text()) == {"step": 8}
    move(*small)
    checkpoints.save(8, *small, {"step": "again"}, wait=True)  # the same step once more
    assert checkpoints.load(checkpoints.newest(), *small) == {"step": "again"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


def test_an_optimizer_that_has_not_stepped_is_saved_and_loaded_as_such(tmp_path, small):
    """And saving changes nothing: get_state_dict would take a step, and AdamW's bias correction would be of step 2."""
    modules, optimizers = small
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, modules, optimizers, {}, wait=True)
    assert not optimizers["adam"].state
    move(modules, optimizers)
    assert {slot["step"].item() for slot in optimizers["adam"].state.values()} == {1}
    checkpoints.save(1, modules, optimizers, {}, wait=True)
    checkpoints.load(tmp_path / "step_00000000", modules, optimizers)
    assert not optimizers["adam"].state
    checkpoints.load(tmp_path / "step_00000001", modules, optimizers)
    assert {slot["step"].item() for slot in optimizers["adam"].state.values()} == {1}


def test_learning_rates_are_those_of_the_configuration(tmp_path, small):
    modules, optimizers = small
    move(modules, optimizers)
    Checkpoints(tmp_path).save(1, modules, optimizers, {}, wait=True)
    other = {"adam": torch.optim.AdamW(modules["net"].parameters(), 5e-4)}
    Checkpoints(tmp_path).load(tmp_path / "step_00000001", modules, other)
    assert other["adam"].param_groups[0]["lr"] == 5e-4
    p = modules["net"][0].weight
    assert torch.equal(other["adam"].state[p]["exp_avg"], optimizers["adam"].state[p]["exp_avg"])


def test_a_disk_that_fills_up_while_writing(tmp_path, small):
    modules, optimizers = {"net": nn.Linear(300, 300)}, {}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, modules, optimizers, {}, wait=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # 360 kB do not fit
        checkpoints.save(2, modules, optimizers, {})
        with pytest.raises(UserError, match="cannot save") as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value) and sorted(p.name for p in tmp_path.glob("*")) == [
        ".writable",
        "step_00000001",
    ]
    checkpoints.load(checkpoints.newest(), modules, optimizers)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below", "/proc/nothing"):
        with pytest.raises(UserError, match="cannot write"):
            Checkpoints(folder)


def damage_nothing(path):
    (path / "extra.json").unlink()


def damage_index(path):
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:200])


def damage_data(path):
    for file in path.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("damage", [damage_nothing, damage_index, damage_data])
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, small, damage):
    Checkpoints(tmp_path).save(1, *small, {}, wait=True)
    damage(tmp_path / "step_00000001")
    with pytest.raises(UserError, match="step_00000001 is of another model or damaged") as error:
        Checkpoints(tmp_path).load(tmp_path / "step_00000001", *small)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "other", [nn.Linear(3, 4), nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), nn.Linear(3, 4, bias=False)]
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, small, other):
    Checkpoints(tmp_path).save(1, *small, {}, wait=True)
    with pytest.raises(UserError, match="another model"):
        Checkpoints(tmp_path).load(
            tmp_path / "step_00000001",
            {"net": nn.Sequential(*other) if isinstance(other, nn.Sequential) else nn.Sequential(other)},
            {},
        )


def test_weights_come_from_a_file_or_from_pairs(tmp_path):
    file, config = tmp_path / "w.safetensors", TINY
    tensors = {name: t.clone() for name, t in weights(config, 5)}
    save_file(tensors, file)
    model = distributed.load_sharded(DiT(config), file)
    assert equal(dict(model.state_dict()), tensors) and equal(distributed.gather(model), tensors)
    name = "blocks.1.q.weight"
    for wrong in (
        {k: v for k, v in tensors.items() if k != name},
        tensors | {"more": torch.zeros(2)},
        tensors | {name: torch.zeros(33, 32)},
    ):
        with pytest.raises(UserError, match="another model"):
            distributed.load_sharded(model, wrong.items())
    file.write_bytes(file.read_bytes()[:1000])
    for path in (file, tmp_path / "missing.safetensors"):
        with pytest.raises(UserError, match=path.name):
            distributed.load_sharded(model, path)


def test_one_process_gets_the_model_itself():
    model = DiT(TINY)
    assert all(shard(model, ALONE, how) is model for how in ("full", "hybrid", "none")) and type(model) is DiT
    assert shard(model, ALONE, trainable=False) is model and not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="half"):
        shard(model, ALONE, "half")


def test_clipping():
    module = nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    assert distributed.clip_gradients(module, 10.0) == 5 and module.weight.grad.tolist() == [[3, 4]]
    assert distributed.clip_gradients(module, 1.0) == 5
    torch.testing.assert_close(module.weight.grad, torch.tensor([[0.6, 0.8]]))
    module.weight.grad = None
    assert distributed.clip_gradients(module, 1.0) == 0


# Noise


def test_noise_belongs_to_the_sample():
    shape, key = (3, 5), (0, 7, "start")
    batch = normal(shape, key, range(8))
    assert batch.shape == (8, 3, 5) and batch.dtype == torch.float32
    for rank in range(4):  # any share of the batch, in any order
        assert torch.equal(normal(shape, key, [2 * rank + 1, 2 * rank]), batch[[2 * rank + 1, 2 * rank]])
    others = [
        normal(shape, k, [0]) for k in ((1, 7, "start"), (0, 8, "start"), (0, 7, "cd"), (0, "7s", "tart"), (0, 7))
    ]
    draws = [*batch, *(x[0] for x in others)]
    assert len({tuple(x.flatten().tolist()) for x in draws}) == len(draws)
    torch.manual_seed(3)
    assert torch.equal(normal(shape, key, [2])[0], batch[2])  # whatever else is seeded


def test_noise_is_stable_over_versions_of_this_file():
    """The hash is part of what a checkpoint means: another one would go on with other noise."""
    digest = hashlib.blake2b(b"0\x007\x00start\x002", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    assert torch.equal(normal((3, 5), (0, 7, "start"), [2])[0], torch.randn(3, 5, generator=generator))


def test_noise_is_standard_normal_and_independent():
    x = normal((64,), (0,), range(1024)).double()  # (samples, elements)
    n = x.numel()
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x[1:] * x[:-1]).mean()) < 4 / n**0.5  # neighbours


def test_randint_is_uniform_and_of_its_key_alone():
    draws = torch.tensor([randint(4, (0, step, "k")) for step in range(4000)])
    counts = draws.bincount(minlength=4)
    assert len(counts) == 4 and (counts - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5
    assert [randint(4, (0, step, "k")) for step in range(20)] == draws[:20].tolist()
    assert draws[:200].tolist() != [randint(4, (1, step, "k")) for step in range(200)]
