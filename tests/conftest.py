"""What several files of tests share: tiny networks, a run of train.py, and processes that are ranks.

`in_ranks(n, work)` runs `work(ranks)` in n processes, as torchrun would. Starting them is what costs, so each group of
processes answers many questions.
"""

import json
import multiprocessing
import os
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import common
import dit
import train
import vae3d
from distributed import Ranks, local
from world import shapes
from world.judge import Judge, JudgeConfig

ROOT = Path(__file__).parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several side by side: a core each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Random weights, as small as they go: teacher, VAE and judge."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    teacher = dit.DiT(replace(dit.PRESETS["shapes"], width=32, depth=1, heads=2))
    teacher.init_weights(0)
    with torch.no_grad():  # no zero-initialised layer, or all predictions are zero
        for p in teacher.parameters():
            p += 0.05 * torch.randn(p.shape)
    vae = vae3d.VAE3D(replace(vae3d.PRESETS["shapes"], channels=(8, 8, 8)))
    common.save_model(folder / "teacher.safetensors", teacher, kind="teacher", w=2.0)
    common.save_model(folder / "vae.safetensors", vae)
    common.save_model(folder / "judge.safetensors", Judge(JudgeConfig(width=8)))
    return folder


def config(tiny, out, **changes):
    small = {"teacher": f"{tiny}/teacher.safetensors", "vae": f"{tiny}/vae.safetensors", "out": str(out)}
    small |= {"iterations": 3, "batch": 2, "fake_updates": 2, "m": 2, "precision": "fp32", "save_every": 1}
    return train.Config(**train.PRESETS["shapes"] | small | {"sample_every": 0} | changes)


def fit(cfg):
    train.train(cfg, Ranks(0, 1, torch.device("cpu")))
    tensors, about = common.load_tensors(Path(cfg.out) / "student.safetensors")
    lines = [json.loads(line) for line in (Path(cfg.out) / "log.jsonl").read_text().splitlines()]
    return tensors, about, lines


def beliefs_of(clips, sure=0.9):
    """A judge that reads everything right: {factor: (n, values)}."""
    out = {}
    for i, (factor, values) in enumerate(shapes.FACTORS.items()):
        p = torch.full((len(clips), len(values)), (1 - sure) / (len(values) - 1))
        for j, clip in enumerate(clips):
            p[j, max(clip.truth()[i], 0)] = sure
        out[factor] = p
    return out


# ranks

CONTEXT = multiprocessing.get_context("forkserver")  # a clean process that has imported torch once and forks
CONTEXT.set_forkserver_preload(
    [  # the last two: what an optimizer imports, and train.py, for its own tests
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.tensor.experimental",
        "pytest",
        "torch._dynamo",
        "train",
    ]
)


def enter(env, file, work, args):
    os.environ.update(env)
    torch.set_num_threads(1)
    torch.save(work(*args), file)


def launch(size, work, *args, seconds=3600, **env):
    """Exit codes and answers (None of the dead) of `size` processes that call work(*args); none outlives `seconds`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(size)}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.pt" for rank in range(size)]
        whoami = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        processes = [CONTEXT.Process(target=enter, args=(*who, work, args)) for who in zip(whoami, files)]
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        for process in processes:
            process.join(max(0, end - time.monotonic()))
            if process.exitcode is None:
                process.kill()
        answers = [torch.load(f, weights_only=False) if f.exists() else None for f in files]
    return [process.exitcode for process in processes], answers


def in_ranks(size, work, *args, **env):
    codes, answers = launch(size, work, *args, **env)
    assert codes == [0] * size
    return answers


def whole(tensors):
    """Put the ranks' rows of a dict of tensors together, on every rank, in one message (full_tensor() is one each)."""
    cut = [t for t in tensors.values() if isinstance(t, DTensor)]
    if cut:
        mine = torch.cat([local(t).flatten() for t in cut])
        everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, mine)
        mesh = cut[0].device_mesh.mesh
        copy = mesh.reshape(-1, mesh.shape[-1])[0].tolist()  # ranks that hold one whole copy
        rows = [everybody[rank].split([local(t).numel() for t in cut]) for rank in copy]
        cut = iter([torch.cat(parts).view(t.shape) for t, parts in zip(cut, zip(*rows))])
    return {k: next(cut) if isinstance(t, DTensor) else t.detach().clone() for k, t in tensors.items()}


def difference(ours, theirs):
    """The largest relative difference of two dicts of tensors; a tensor that is nearly zero counts as its module's."""
    assert ours.keys() == theirs.keys()
    size = max(t.norm() for t in theirs.values())
    return max(((ours[k] - t).norm() / max(t.norm(), 1e-2 * size)).item() for k, t in theirs.items())


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], t) for k, t in theirs.items())
