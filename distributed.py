"""Many GPUs: who holds which rows of the weights, which noise belongs to which sample, and checkpoints.

All of it also runs as one process without torchrun, and on CPUs (gloo), where it is tested.

Sharding. `fully_shard` (FSDP2) cuts every parameter along its first dimension, and gradients and optimizer state with
it, in float32. A block's full weights exist only while it computes: gathered before (in bfloat16 on a GPU), freed
after; gradients are averaged over the ranks in float32 and cut again. The root, too, is freed after its forward: in a
network that only runs forward (teacher, EMA, a student in simulation) its gathered copy would go stale at the next
update. A network built on the meta device gets its weights row by row, so no rank ever holds a whole one.

Randomness. Noise belongs to a sample, not to a rank: it comes from a hash of (seed, step, name, sample index), so that
a global batch is the same on 1, 2, 4 or 8 ranks. What decides how many forwards a step makes (`randint`) is alike on
all ranks: gathering weights is a collective, and ranks that disagree about it wait forever.

Checkpoints. Every rank writes its rows, in the background, into a hidden folder that is renamed once all of it is on
disk; a kill at any time leaves the checkpoint before it, and any number of ranks can read it. Optimizer state is kept
by the name of its parameter, not through `get_state_dict`: that fills a state that is still empty by taking a step,
and a run that saves would differ from one that does not.
Sources: FSDP, arXiv:2304.11277; torch.distributed.checkpoint (DCP).
"""

import functools
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

from cli import UserError, atomic

BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # gloo too: scalars, offloaded gradients, checkpoints
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP says so of every run in one process


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

    A rank that waits longer than timeout_s for another fails, and torchrun then ends or restarts all of them.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return World(0, 1, device)
    dist.init_process_group(BACKEND[device.type], timeout=timedelta(seconds=timeout_s))
    return World(
        dist.get_rank(), dist.get_world_size(), device, init_device_mesh(device.type, (dist.get_world_size(),))
    )


def stop(world):
    """Leave in order. After an error just exit instead: this would wait for ranks that may be gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model, world, how="full", dtype=None, cpu_offload=False, trainable=True):
    """Cut model (it has `.blocks`) over the ranks, in place, and return it. Make optimizers and copies afterwards.

    how: "full" over all ranks, "hybrid" within a node and replicated across nodes, "none" replicated on every rank.
    dtype: of computation; what is trained is kept and reduced in float32, what is not is frozen and kept in dtype. (An
    EMA needs float32: shard it as trainable, then `requires_grad_(False)`.) cpu_offload: what is kept is kept in CPU
    memory. One process, and "none", return the plain model unless dtype or cpu_offload need FSDP; under "none" call
    average_gradients. A model on the meta device gets memory full of NaN: then load_sharded or materialise.
    """
    if how not in ("full", "hybrid", "none"):
        raise ValueError(f"how is {how!r}: want 'full', 'hybrid' or 'none'")
    cpu_offload = cpu_offload and world.device.type != "cpu"
    if not trainable:
        model.requires_grad_(False).to(dtype=dtype)
    if (how != "none" and world.size > 1) or (dtype and trainable) or cpu_offload:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        rules = {
            "mesh": _mesh(world.device.type, world.size, {"full": world.size, "hybrid": per_node, "none": 1}[how]),
            "reshard_after_forward": True,
            # the model casts its inputs: FSDP would also round the rotary table, which blocks take in float32
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
        }
        for block in model.blocks:
            fully_shard(block, **rules)
        fully_shard(model, **rules)
    device = "cpu" if cpu_offload else world.device
    if not any(p.is_meta for p in model.parameters()):
        return model.to(device)
    model.to_empty(device=device)
    for p in model.parameters():
        local(p).detach().fill_(math.nan)
    return model


@functools.lru_cache  # the networks share their communicators
def _mesh(kind, size, shards):
    """The ranks in a row, or (replicas, shards) in rows of `shards`."""
    if not dist.is_initialized():  # mixed precision or offloading in one process: a group of one
        dist.init_process_group(BACKEND[kind], store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(kind, (size,) if shards == size else (size // shards, shards))


def local(p):
    """What this rank holds of a parameter, gradient or optimizer state: a plain tensor in the same memory."""
    return p.to_local() if isinstance(p, DTensor) else p


def materialise(model, world, seed=0):
    """Draw the first weights of a sharded model (`model.init_weights(seed)`), the same on any number of ranks."""
    with implicit_replication():  # it copies whole tensors, one at a time, into rows
        model.init_weights(seed)
    return model


@torch.no_grad()
def load_sharded(model, source):
    """Fill model, sharded or not, from a safetensors file (reading this rank's rows alone) or pairs (name, tensor).

    Raises UserError for an unreadable file and where a parameter is missing, unknown, or of another shape.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            with safe_open(source, "pt") as file:
                return load_sharded(model, ((name, file.get_slice(name)) for name in file.keys()))  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise UserError(f"cannot read the weights {source}: {e}") from e
    params = model.state_dict()
    for name, whole in source:
        shape, p = getattr(whole, "get_shape", lambda t=whole: t.shape)(), params.pop(name, None)
        if p is None or list(p.shape) != list(shape):
            raise UserError(f"these weights are of another model: {name} {list(shape)} does not fit")
        first = 0
        if isinstance(p, DTensor):  # as torch.chunk cuts; the mesh's last dimension shards
            dim = p.device_mesh.ndim - 1
            first = p.device_mesh.get_local_rank(dim) * math.ceil(len(p) / p.device_mesh.size(dim))
        local(p).copy_(whole[first : first + len(local(p))])
    if params:
        raise UserError(f"these weights are of another model: {sorted(params)[0]} is not among them")
    return model


@torch.no_grad()
def gather(model):
    """The whole state dict on the CPU of rank 0 (the others get {}), tensor by tensor. All ranks call it."""
    main, whole = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, p in model.state_dict().items():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        whole |= {name: full.to("cpu", copy=True)} if main else {}
    return whole


@torch.no_grad()
def average_gradients(model, world):
    """Replace the gradients of a replicated module by their mean over the ranks. FSDP has averaged its own already."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if world.size > 1 and grads and not isinstance(grads[0], DTensor):
        flat = torch.cat([g.flatten().float() for g in grads])  # one message
        dist.all_reduce(flat)
        for g, total in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(total.view_as(g) / world.size)


@torch.no_grad()
def clip_gradients(model, max_norm):
    """Scale the gradients down to max_norm. Returns their norm before, alike on all ranks; it may not be finite."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [local(g) for g in grads]  # many times faster than DTensor's own arithmetic on lists
    total = nn.utils.get_total_norm(parts).square()
    if grads and isinstance(grads[0], DTensor):
        dist.all_reduce(total, group=grads[0].device_mesh.get_group(grads[0].device_mesh.ndim - 1))
    torch._foreach_mul_(parts, (max_norm / (total.sqrt() + 1e-6)).clamp(max=1))
    return total.sqrt().item()


def mean(value, world):
    """The mean of a number over the ranks; NaN or infinity on one is so on all."""
    total = torch.tensor(float(value), dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(total)
    return total.item() / world.size


def any_rank(flag, world):
    """Whether flag is true on any rank; all ranks call it and hear the same."""
    return mean(bool(flag), world) > 0


def _hash(key):
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest(), "big")


def normal(shape, key, indices, device="cpu"):
    """Standard normal noise (len(indices), *shape), float32; sample i depends on key and indices[i] alone.

    key: a tuple of numbers and words, such as (seed, step, "student"). Drawn on the CPU, alike for every device.
    """
    generators = [torch.Generator().manual_seed(_hash((*key, int(i)))) for i in indices]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def randint(high, key):
    """A number in 0..high-1 from key alone, alike on all ranks."""
    return _hash(("randint", *key)) % high


class _Writer(dcp.FileSystemWriter):
    """DCP's, which at the end, on rank 0 when all ranks have written, calls `publish`."""

    def finish(self, metadata, results):
        super().finish(metadata, results)
        self.publish(Path(self.path))


class Checkpoints:
    """folder/step_00001000 and so on: the newest keep_last, and those whose step is a multiple of keep_every (0: none).

    All ranks make it and call each method; with several nodes, on a folder that all of them see.
    """

    def __init__(self, folder, keep_last=2, keep_every=0):
        """Raises UserError where nothing can be written."""
        self.folder, self.keep_last, self.keep_every, self.pending = Path(folder), keep_last, keep_every, None
        # a group of its own: saving talks in the background, between the messages of training
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.main = self.group is None or dist.get_rank() == 0
        with atomic(self.folder / ".writable"):  # find out now, not at the first save
            pass

    def newest(self):
        """The newest complete checkpoint's path, or None; rank 0 looks and tells the others."""
        found = [max(self.folder.glob("step_*"), default=None) if self.main else None]
        if self.group:
            dist.broadcast_object_list(found, 0, self.group)
        return found[0]

    def save(self, step, modules, optimizers, extra, wait=False):
        """Copy everything to the CPU, then write it in the background; return after the copy, unless wait.

        modules, optimizers: dicts by name; an optimizer's parameters belong to the modules. extra: goes into JSON.
        Learning rates and the like are not saved: the configuration has them. Raises UserError where the save before
        this one (with wait: this one) failed; earlier checkpoints are then untouched.
        """
        self.wait()
        self._clean()
        extra, final = json.dumps(extra), self.folder / f"step_{step:08d}"

        def publish(part):
            (part / "extra.json").write_text(extra)
            if final.exists():  # the same step once more
                final.rename(part.with_name(part.name + ".old"))
            part.rename(final)
            self._clean()

        writer, tensors = _Writer(final.with_name(f".tmp_{final.name}")), _tensors(modules, optimizers)
        writer.publish = publish
        kwargs = {"process_group": self.group, "no_dist": not self.group}
        self.pending = dcp.async_save(tensors, storage_writer=writer, **kwargs)
        if wait:
            self.wait()

    def wait(self):
        """Wait until the save under way is complete. Raises UserError, on all ranks, if it failed on one."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except CheckpointException as e:
            self._clean()
            raise UserError(f"cannot save in {self.folder}: {_cause(e)} (earlier checkpoints are whole)") from e

    def _clean(self):
        """Remove what is no longer kept, and what a killed or failed save left."""
        for path in sorted(self.folder.glob("step_*"))[: -self.keep_last] if self.main else []:
            if not self.keep_every or int(path.name[5:]) % self.keep_every:
                path.rename(path.with_name(f".tmp_{path.name}"))  # half a folder must not look like a checkpoint
        for path in self.folder.glob(".tmp_*") if self.main else []:
            shutil.rmtree(path, ignore_errors=True)

    def load(self, path, modules, optimizers):
        """Fill modules and optimizers in place from a checkpoint of any number of ranks. Returns extra.

        Raises UserError for a damaged checkpoint and for one of other models.
        """
        tensors, params = _tensors(modules, {}), {name: p for p, name in _names(modules).items()}
        slots = []  # (optimizer, parameter, key, name): a fresh optimizer is empty, what was saved says what it needs
        try:
            extra = json.loads((Path(path) / "extra.json").read_text())
            saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            theirs = {
                (k, m.size) for k, m in saved.items() if k.split("/")[0] == "modules" and k.split("/")[1] in modules
            }
            for name, _ in theirs ^ {(k, t.shape) for k, t in tensors.items()}:
                raise UserError(f"the checkpoint {path} is of another model: {name} differs")
            for name, m in saved.items():
                kind, o, *rest = name.split("/")
                if kind == "optimizers" and o in optimizers:
                    p, key = params["/".join(rest[:-1])], rest[-1]
                    slots.append((optimizers[o], p, key, name))
                    like = m.size == p.shape
                    tensors[name] = torch.zeros_like(p) if like else torch.zeros(m.size, dtype=m.properties.dtype)
            dcp.load(tensors, checkpoint_id=path, process_group=self.group, no_dist=not self.group)
        except (CheckpointException, OSError, EOFError, json.JSONDecodeError, pickle.UnpicklingError) as e:
            raise UserError(f"cannot read the checkpoint {path} ({_cause(e)}); remove it to use the one before") from e
        for optimizer in optimizers.values():
            optimizer.state.clear()
        for optimizer, p, key, name in slots:
            optimizer.state[p][key] = tensors[name]
        for optimizer in optimizers.values():
            optimizer.load_state_dict(optimizer.state_dict())  # puts each tensor where the optimizer wants it
        return extra


def _names(modules):
    return {p: f"{m}/{name}" for m, module in modules.items() for name, p in module.named_parameters()}


def _tensors(modules, optimizers):
    """All to be saved, by name: modules/student/out.weight, optimizers/adamw/student/out.weight/exp_avg, ..."""
    names = _names(modules)
    tensors = {f"modules/{m}/{name}": t for m, module in modules.items() for name, t in module.state_dict().items()}
    for o, optimizer in optimizers.items():
        for p, slot in optimizer.state.items():
            tensors |= {f"optimizers/{o}/{names[p]}/{key}": t for key, t in slot.items() if t is not None}
    return tensors


def _cause(e):
    e = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
    return getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"


class Stopper:
    """SIGTERM and SIGINT set a flag; `stopper()`, at the end of a step, says on all ranks alike whether any has one.

    Without torchrun (which sends Ctrl-C on a second time) another Ctrl-C interrupts at once.
    """

    def __init__(self, world):
        self.world, self.flag = world, False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number, frame):
        if self.flag and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.flag = True

    def __call__(self):
        return any_rank(self.flag, self.world)
