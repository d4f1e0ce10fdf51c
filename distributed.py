"""Many GPUs: who is who, who holds which rows of the weights, which noise belongs to which sample, and checkpoints.

Everything here also runs as one process without torchrun, and on CPUs (gloo), where it is tested.

**Sharding.** `fully_shard` (FSDP2) cuts every parameter along its first dimension: rank r of n keeps rows
r * ceil(rows / n) onwards, with their gradients and optimizer state, in float32. A block's full weights exist only
while it computes: gathered before (in bfloat16 on a GPU), freed after, and the gradients summed in float32 and cut
again. The root is resharded after its forward too, although its weights are soon needed again: a network that is only
run forward (teacher, EMA, a student in simulation) would otherwise keep a gathered copy that goes stale at the next
update. A network built on the meta device and then sharded gets its weights row by row (`load_sharded`, `materialise`),
so that no rank ever holds a whole one.

**Randomness.** Noise belongs to a sample, not to a rank: it is drawn from a hash of (seed, step, name, sample index),
so one global batch is the same batch on 1, 2, 4 or 8 ranks. What decides how many forwards a step makes (`randint`)
leaves the sample index out and is alike on all ranks: gathering is a collective, and ranks that disagree wait forever.

**Checkpoints.** Every rank writes its own rows, in the background, into a hidden folder that is renamed when all of it
is on disk; a kill at any time leaves the checkpoint before it. Rows are named, so any number of ranks can read them.
Optimizer state is stored under the names of its parameters rather than through `get_state_dict`: that fills a state
that is still empty by taking a step, and a run that saves would differ from a run that does not.
Sources: FSDP, arXiv:2304.11277; torch.distributed.checkpoint.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import shutil
import signal
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from cli import UserError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None  # all ranks in a row; None in one process

    @property
    def main(self):
        return self.rank == 0


def start(device=None, timeout_s=600):
    """Join the processes that torchrun started, or be the only one. device None: this rank's GPU, else the CPU.

    A rank that waits longer than timeout_s for another fails, and torchrun then ends (or restarts) all of them.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        return World(0, 1, device)
    # gloo beside nccl carries what lives on the CPU: scalars, offloaded gradients, checkpoints
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return World(rank, size, device, init_device_mesh(device.type, (size,)))


def stop(world):
    """Leave in order. After an error just exit instead: this would wait for ranks that may be gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


# Sharding


def shard(model, world, how="full", dtype=None, cpu_offload=False, trainable=True):
    """Cut model (a network with `.blocks`) over the ranks, in place. Make optimizers afterwards. Returns the model.

    how: "full" over all ranks; "hybrid" within a node, replicated across nodes; "none": every rank holds all of it
    (then call average_gradients). In one process "full" and "hybrid" are "none", unless cpu_offload is set.
    dtype: of computation (None: the weights' own). What is trained is kept and its gradients are reduced in float32;
    what is not trainable is frozen and kept in dtype. An EMA is not trained either but needs float32: shard it as
    trainable, then `requires_grad_(False)`. cpu_offload: weights, gradients, optimizer state wait in CPU memory.
    A model built on the meta device gets memory for this rank's rows, full of NaN: fill it with `load_sharded` or
    `materialise`.
    """
    if how not in ("full", "hybrid", "none"):
        raise ValueError(f"how is {how!r}: want 'full', 'hybrid' or 'none'")
    if not trainable:
        model.requires_grad_(False).to(dtype=dtype)
    cpu_offload &= world.device.type == "cuda"
    if how == "none" or (world.size == 1 and not cpu_offload):
        if dtype is not None and trainable:
            _autocast(model, world.device.type, dtype)
        return _allocate(model, world.device)
    mesh = world.mesh
    if mesh is None:  # offloading in one process: a group of one
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh(world.device.type, (1,))
    elif how == "hybrid":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        mesh = init_device_mesh(world.device.type, (world.size // local, local), mesh_dim_names=("nodes", "shards"))
    rules = {
        "mesh": mesh,
        "reshard_after_forward": True,
        # inputs are cast by the model: FSDP would also round the rotary table that blocks take in float32
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for block in model.blocks:
        fully_shard(block, **rules)
    return _allocate(fully_shard(model, **rules), "cpu" if cpu_offload else world.device)


def _autocast(model, device, dtype):
    """Run the forward under autocast. Hooks, since a wrapped `forward` survives deepcopy bound to the original."""
    entered = []

    def enter(*_):
        entered.append(torch.autocast(device, dtype))
        entered[-1].__enter__()

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(lambda *_: entered.pop().__exit__(None, None, None), always_call=True)


def _allocate(model, device):
    """Bring model to device; where it has no memory yet, fill it with NaN, which cannot be mistaken for weights."""
    if not any(p.is_meta for p in model.parameters()):
        return model.to(device)
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            local(p).fill_(math.nan)
    return model


def local(p):
    """What this rank holds of a parameter, gradient or optimizer state: a plain tensor, the same memory."""
    return p.to_local() if isinstance(p, DTensor) else p


def _rows(p):
    """Which rows of the whole parameter this rank holds."""
    if not isinstance(p, DTensor):
        return slice(None)
    mesh = p.device_mesh  # its last dimension shards, one before it replicates
    each = math.ceil(p.shape[0] / mesh.size(mesh.ndim - 1))
    first = min(each * mesh.get_local_rank(mesh.ndim - 1), p.shape[0])
    return slice(first, first + len(local(p)))


def materialise(model, world, seed=0):
    """Draw the first weights of a sharded model (`model.init_weights(seed)`), the same on any number of ranks."""
    with implicit_replication():  # init_weights copies a whole tensor, one at a time, into rows
        model.init_weights(seed)
    return model


@torch.no_grad()
def load_sharded(model, source):
    """Fill model, sharded or not, from a safetensors file (of its rows alone) or from pairs (name, whole tensor).

    Raises UserError where a parameter is missing, unknown, or of another shape.
    """
    params = model.state_dict()
    if isinstance(source, (str, os.PathLike)):
        try:
            with safe_open(source, "pt") as file:
                slices = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 (it is no dict)
                return load_sharded(model, slices)
        except (OSError, SafetensorError) as e:
            raise UserError(f"cannot read the weights {source}: {e}") from e
    left = set(params)
    for name, whole in source:
        shape = tuple(whole.get_shape() if hasattr(whole, "get_shape") else whole.shape)
        if name not in params or shape != tuple(params[name].shape):
            want = tuple(params[name].shape) if name in params else "nothing of that name"
            raise UserError(f"these are the weights of another model: {name} is {shape}, want {want}")
        if not params[name].ndim:
            local(params[name]).copy_(whole if isinstance(whole, torch.Tensor) else whole[...])
        else:
            local(params[name]).copy_(whole[_rows(params[name])])
        left.discard(name)
    if left:
        raise UserError(f"the weights lack {sorted(left)[0]} and {len(left) - 1} more")
    return model


@torch.no_grad()
def gather(model):
    """The whole state dict, on the CPU of rank 0 (others get {}), tensor by tensor. All ranks call it."""
    whole = {}
    for name, p in model.state_dict().items():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        if not dist.is_initialized() or dist.get_rank() == 0:
            whole[name] = full.cpu().clone()
    return whole


# Gradients and numbers over the ranks


@torch.no_grad()
def average_gradients(model, world):
    """Replace the gradients of a replicated module by their mean over the ranks. Sharded ones are averaged already."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if world.size == 1 or not grads or isinstance(grads[0], DTensor):
        return
    flat = torch.cat([g.flatten().float() for g in grads])  # one message
    dist.all_reduce(flat)
    for g, mean in zip(grads, flat.div_(world.size).split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def clip_gradients(model, max_norm):
    """Scale the gradients down to max_norm; their norm before that, the same on all ranks. May be NaN: then skip."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def mean(value, world):
    """The mean of a number over the ranks, in float64. NaN or infinity on one rank is NaN or infinity on all."""
    if world.size == 1:
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / world.size


def any_rank(flag, world):
    """Whether flag is true on any rank; all ranks call it and hear the same."""
    return mean(bool(flag), world) > 0


# Randomness


def _hash(*key):
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest(), "big")


def normal(shape, key, indices, device="cpu"):
    """Standard normal noise (len(indices), *shape), float32; sample i depends on key and indices[i] alone.

    key: a tuple of numbers and words, such as (seed, step, "student"). Drawn on the CPU, alike for every device.
    """
    draw = (torch.randn(shape, generator=torch.Generator().manual_seed(_hash(*key, int(i)))) for i in indices)
    return torch.stack(list(draw)).to(device)


def randint(high, key):
    """A number in 0..high-1 from key alone, alike on all ranks."""
    return _hash("randint", *key) % high


# Checkpoints and signals


class _Writer(dcp.FileSystemWriter):
    """Writes into a hidden folder; when every rank's part is on disk, rank 0 calls finish, which renames it."""

    def __init__(self, final, extra, prune):
        super().__init__(final.with_name(f".tmp_{final.name}"))
        self.final, self.extra, self.prune = final, extra, prune

    def finish(self, metadata, results):
        super().finish(metadata, results)
        folder = Path(self.path)
        (folder / "extra.json").write_text(self.extra)
        if self.final.exists():  # the same step once more
            self.final.rename(folder.with_name(folder.name + "_old"))
        folder.rename(self.final)
        self.prune()


class Checkpoints:
    """folder/step_00001000, ...: the newest keep_last, and every one whose step is a multiple of keep_every (0: none).

    Made, and each method called, on all ranks. With several nodes the folder is on a file system that all of them see.
    Raises UserError where nothing can be written.
    """

    def __init__(self, folder, keep_last=2, keep_every=0):
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.pending, self.group, self.main = None, None, True
        if dist.is_initialized():  # its own group: saving talks in the background, between the training's messages
            self.group, self.main = dist.new_group(backend="gloo"), dist.get_rank() == 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".tmp_probe{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as e:
            raise UserError(f"cannot write checkpoints into {folder}: {e.strerror}") from e

    def _complete(self):
        return sorted(p for p in self.folder.glob("step_*") if (p / "extra.json").exists())

    def newest(self):
        """The newest complete checkpoint's path, or None; rank 0 looks and tells the others."""
        found = [next(iter(self._complete()[::-1]), None) if self.main else None]
        if self.group is not None:
            dist.broadcast_object_list(found, 0, self.group)
        return found[0]

    def save(self, step, modules, optimizers, extra, wait=False):
        """Copy everything to the CPU, then write it in the background; returns after the copy unless wait is set.

        modules, optimizers: dicts by name; an optimizer's parameters are found in the modules. extra: goes into JSON.
        Hyperparameters of optimizers are not saved: they are the configuration's. Raises UserError where the save
        before this one failed (or this one, with wait); the checkpoints before it are untouched.
        """
        self.wait()
        if self.main:
            self._clean()
        writer = _Writer(self.folder / f"step_{step:08d}", json.dumps(extra), self._clean)
        state = _tensors(modules, optimizers)
        with _quiet():
            self.pending = dcp.async_save(
                state, storage_writer=writer, process_group=self.group, no_dist=self.group is None
            )
        if wait:
            self.wait()

    def wait(self):
        """Until the save under way is complete. Raises UserError if it failed."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.result()
        except (CheckpointException, OSError) as e:
            if self.main:
                self._clean()
            raise UserError(f"cannot save a checkpoint in {self.folder}: {_cause(e)}; those before it are whole") from e

    def _clean(self):
        """Remove what is no longer kept and what a killed save left."""
        done = self._complete()
        old = [p for p in done[: -self.keep_last] if not self.keep_every or int(p.name[5:]) % self.keep_every]
        for path in old:  # out of sight first: half a checkpoint must not look like one
            path.rename(path.with_name(f".tmp_{path.name}"))
        for path in self.folder.glob(".tmp_step_*"):
            shutil.rmtree(path, ignore_errors=True)

    def load(self, path, modules, optimizers):
        """Fill modules and optimizers in place from a checkpoint of any number of ranks; returns extra.

        Raises UserError for a damaged checkpoint and for one of other models.
        """
        path, state, names = Path(path), _tensors(modules, {}), _names(modules)
        try:
            extra = json.loads((path / "extra.json").read_text())
            saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            theirs = {
                k: m.size for k, m in saved.items() if k.split("/")[0] == "modules" and k.split("/")[1] in modules
            }
            for name in sorted({k for k, _ in theirs.items() ^ {(k, t.shape) for k, t in state.items()}}):
                raise UserError(f"the checkpoint {path} is of another model: {name} differs")
            slots = {}  # where each optimizer's tensors go: found in what was saved, for a fresh optimizer has none
            for name, m in saved.items():
                slots.setdefault(name.rpartition("/")[0], {})[name.rpartition("/")[2]] = m
            for o, optimizer in optimizers.items():
                params = [p for group in optimizer.param_groups for p in group["params"]]
                slots[o] = [slots.get(f"optimizers/{o}/{names[p]}", {}) for p in params]
                for p, slot in zip(params, slots[o]):
                    for key, m in slot.items():
                        like = (
                            torch.zeros_like(p) if m.size == p.shape else torch.zeros(m.size, dtype=m.properties.dtype)
                        )
                        state[f"optimizers/{o}/{names[p]}/{key}"] = slot[key] = like
            with _quiet():
                dcp.load(state, checkpoint_id=path, process_group=self.group, no_dist=self.group is None)
        except (CheckpointException, OSError, EOFError, ValueError, pickle.UnpicklingError) as e:
            raise UserError(f"cannot read the checkpoint {path} ({_cause(e)}); remove it to use the one before") from e
        for o, optimizer in optimizers.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": dict(enumerate(slots[o])), "param_groups": groups})
        return extra


def _names(modules):
    return {p: f"{m}/{name}" for m, module in modules.items() for name, p in module.named_parameters()}


def _tensors(modules, optimizers):
    """Everything to be saved, by name: modules/student/blocks.0.q.weight, optimizers/student/student/.../exp_avg."""
    names = _names(modules)
    tensors = {f"modules/{m}/{name}": t for m, module in modules.items() for name, t in module.state_dict().items()}
    for o, optimizer in optimizers.items():
        for p, slot in optimizer.state.items():
            tensors |= {f"optimizers/{o}/{names[p]}/{key}": t for key, t in slot.items() if t is not None}
    return tensors


def _cause(e):
    if isinstance(e, CheckpointException):
        e = next(iter(e.failures.values()))[0]
    return getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process is told that it is one process
        yield


class Stopper:
    """SIGTERM and SIGINT set a flag; `stopper()` at the end of a step says, on all ranks alike, whether any has one.

    Without torchrun (which passes a Ctrl-C on a second time) another Ctrl-C interrupts at once.
    """

    def __init__(self, world):
        self.world, self.flag = world, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number, frame):
        if self.flag and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.flag = True

    def __call__(self):
        return any_rank(self.flag, self.world)
