"""Many GPUs, many CPUs (gloo) or one process: who holds which weights, which noise is whose, and checkpoints.

`fully_shard` (FSDP2) cuts parameters along their first dimension, and gradients and optimizer state with them. A
block's full weights exist only while it computes; its gradients are averaged over the ranks and cut again. The root,
too, is freed after its forward: in a network that only runs forward (teacher, EMA) its full copy would go stale.

Noise belongs to a sample, not to a rank: it comes from a hash of (seed, step, name, sample index), so a global batch is
the same on 1, 2, 4 or 8 ranks. What decides how many forwards a step makes is alike on all: each forward needs all.

Every rank writes its rows of a checkpoint, in the background, into a hidden folder that is renamed once all is on disk:
a kill at any time leaves the checkpoint before it, and any number of ranks can read it. Optimizer state is kept by its
parameter's name, not through `get_state_dict`, which fills a state that is still empty by taking a step: a run that
saves would differ from one that does not. Sources: FSDP, arXiv:2304.11277; torch.distributed.checkpoint (DCP).
"""

import functools
import hashlib
import json
import math
import os
import shutil
import signal
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import implicit_replication

from common import UserError, atomic, open_tensors

BACKEND = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # gloo too: scalars, offloaded gradients, checkpoints
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP says so of every run in one process


@dataclass(frozen=True)
class Ranks:
    rank: int
    size: int
    device: torch.device
    main = property(lambda self: self.rank == 0)


def start(device, timeout_s=600):
    """Join torchrun's processes, or be the only one. Who waits longer than timeout_s for another rank fails."""
    asked = device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # before anything touches a GPU, or all ranks would hold a part of the first
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {asked} cannot be used here: {str(e).splitlines()[0]}") from e
    if (size := int(os.environ.get("WORLD_SIZE", 1))) == 1:
        return Ranks(0, 1, device)
    store, rank, _ = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):  # torchrun's store keeps dead addresses over a restart
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(BACKEND[device.type], None, timedelta(seconds=timeout_s), size, rank, store)
    return Ranks(rank, size, device)


def stop():
    """Leave in order. After an error just exit instead: this would wait for ranks that may be gone."""
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.lru_cache  # so that all networks share one set of communicators
def _mesh(kind, size, shards):
    if not dist.is_initialized():  # a group of one
        dist.init_process_group(BACKEND[kind], store=dist.HashStore(), rank=0, world_size=1)
    shape = (size,) if shards == size else (size // shards, shards)  # the last dimension shards
    return dist.init_device_mesh(kind, shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])


def shard(model, ranks, how="full", dtype=None, cpu_offload=False, trainable=True):
    """Cut model (block by block where it has `.blocks`) over the ranks, in place, and return it. Make optimizers and
    copies afterwards.

    how: "full" over all ranks, "hybrid" within a node and replicated across nodes, "none" replicated on every rank.
    dtype: of computation; what is trained is kept and reduced in float32, what is not is frozen and kept in dtype. (An
    EMA needs float32: shard it as trainable, then `requires_grad_(False)`.) cpu_offload: what is kept is kept in CPU
    memory. One process, and "none", leave the model plain unless dtype or cpu_offload need FSDP; under "none" call
    average_gradients. A model on the meta device gets this rank's memory, for load_sharded or materialise to fill.
    """
    if how not in ("full", "hybrid", "none"):
        raise ValueError(f"how is {how!r}: want 'full', 'hybrid' or 'none'")
    kind, cpu_offload = ranks.device.type, cpu_offload and ranks.device.type != "cpu"
    if not trainable:
        model.requires_grad_(False).to(dtype=dtype)
    if (how != "none" and ranks.size > 1) or (dtype and trainable) or cpu_offload:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
        mesh = _mesh(kind, ranks.size, {"full": ranks.size, "hybrid": per_node, "none": 1}[how])
        # the model casts its inputs: FSDP would also round the rotary table, which blocks take in float32
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
        for module in (*getattr(model, "blocks", ()), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy, offload_policy=offload)
    device = "cpu" if cpu_offload else ranks.device
    return model.to_empty(device=device) if any(p.is_meta for p in model.parameters()) else model.to(device)


def local(p):
    """What this rank holds of a parameter, gradient or optimizer state: a plain tensor in the same memory."""
    return p.to_local() if isinstance(p, DTensor) else p


def materialise(model, seed=0):
    """Draw the first weights of a sharded model (`model.init_weights(seed)`), the same on any number of ranks."""
    with implicit_replication():  # it copies whole tensors, one at a time, into rows
        model.init_weights(seed)
    return model


@torch.no_grad()
def load_sharded(model, source):
    """Fill model from a safetensors file, touching this rank's rows alone, or pairs (name, tensor); else UserError."""
    if isinstance(source, str | os.PathLike):
        with open_tensors(source) as (file, _):
            return load_sharded(model, ((name, file.get_tensor(name)) for name in file.keys()))  # noqa: SIM118
    params = model.state_dict()
    for name, whole in source:
        p = params.pop(name, None)
        if p is None or p.shape != whole.shape:
            raise UserError(f"these weights are of another model: {name} {list(whole.shape)} does not fit")
        if isinstance(p, DTensor):
            mesh, dim = p.device_mesh, p.device_mesh.ndim - 1
            rows = math.ceil(len(p) / mesh.size(dim))  # as torch.chunk cuts
            begin = mesh.get_local_rank(dim) * rows
            whole = whole[begin : begin + len(local(p))]
        local(p).copy_(whole)
    if params:
        raise UserError(f"these weights are of another model: {min(params)} is not among them")
    return model


def gather(model):
    """The whole state dict on the CPU of rank 0 (the others get {}), tensor by tensor. All ranks call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


@torch.no_grad()
def average_gradients(model, ranks):
    """Replace the gradients of a replicated module by their mean over the ranks. FSDP has averaged its own already."""
    for p in model.parameters() if ranks.size > 1 else ():
        if p.grad is not None and not isinstance(p.grad, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= ranks.size


@torch.no_grad()
def clip_gradients(model, max_norm):
    """Scale the gradients down to max_norm. Returns their norm before, alike on all ranks; it may not be finite."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [local(g) for g in grads]  # DTensor's own arithmetic on lists is many times slower
    square = torch.nn.utils.get_total_norm(parts).square()
    if grads and isinstance(grads[0], DTensor):
        dist.all_reduce(square, group=grads[0].device_mesh.get_group(grads[0].device_mesh.ndim - 1))
    norm = square.sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for part in parts:
        part *= scale
    return norm.item()


def gradient_descent(module, optimizer, max_norm, ranks, finite=True):
    """One step of an optimizer, on all ranks or on none: none where the gradient, or what one rank says, is not finite.

    Returns the gradient's norm before clipping, alike on all ranks; NaN where the step was left out.
    """
    average_gradients(module, ranks)
    norm = clip_gradients(module, max_norm)
    skipped = any_rank(not (finite and math.isfinite(norm)), ranks)
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return math.nan if skipped else norm


def sample_numbers(ranks, micro, batch):
    """The numbers that this rank's samples have among those of all ranks, of its part `micro` of an update."""
    return [(micro * ranks.size + ranks.rank) * batch + i for i in range(batch)]


def means(numbers, ranks):
    """The means of {name: number} over the ranks, which have the same names; NaN or infinity on one is so on all."""
    total = torch.tensor([float(value) for value in numbers.values()], dtype=torch.float64)
    if ranks.size > 1:
        dist.all_reduce(total)
    return dict(zip(numbers, (total / ranks.size).tolist()))


def mean(value, ranks):
    """The mean of a number over the ranks."""
    return means({"": value}, ranks)[""]


def any_rank(flag, ranks):
    """Whether flag is true on any rank; all ranks call it and hear the same."""
    return mean(bool(flag), ranks) > 0


def every(value, ranks):
    """The list of what each rank's value is; anything that can be pickled."""
    values = [value] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(values, value)
    return values


def restarted(ranks):
    """Whether torchrun --max-restarts has started this run anew after a death, which its own node alone counts."""
    return any_rank(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0, ranks)


def _hash(key):
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest(), "big")


def normal(shape, key, indices, device="cpu"):
    """Standard normal noise (len(indices), *shape), float32; sample i depends on the tuple key and indices[i] alone."""
    generators = [torch.Generator().manual_seed(_hash((*key, int(i)))) for i in indices]
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def randint(high, key):
    """A number in 0..high-1 from key alone, alike on all ranks."""
    return _hash(("randint", *key)) % high


STEP = "step_" + 8 * "[0-9]"  # the names of checkpoints, and of nothing that a user has put beside them


class Checkpoints:
    """folder/step_00001000, ..., the newest keep_last of them. For all ranks."""

    def __init__(self, folder, keep_last=2):
        self.folder, self.keep_last, self.pending = Path(folder), keep_last, None
        # a group of its own: saving talks in the background, between the messages of training
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.main = not self.group or dist.get_rank() == 0
        with atomic(self.folder / ".writable"):  # find out now, not at the first save
            pass

    def newest(self):
        """The newest complete checkpoint's path, or None."""
        return max(self.folder.glob(STEP), default=None)

    def save(self, step, modules, optimizers, extra, wait=False, own=None):
        """Copy all to the CPU, then write it in the background, extra as JSON. Raises as `wait`, of the save before.

        own: a module of which every rank has another, None: there is none.
        """
        self.wait()
        self._clean()
        extra, part, final = json.dumps(extra), self.folder / f".tmp_{step}", self.folder / f"step_{step:08d}"
        writer = dcp.FileSystemWriter(part)
        write_index = writer.finish

        def finish(metadata, results):  # DCP calls it on rank 0 when all ranks have written
            write_index(metadata, results)
            (part / "extra.json").write_text(extra)
            if final.exists():  # the same step once more
                final.rename(self.folder / f".tmp_old_{step}")
            part.rename(final)
            self._clean()

        writer.finish = finish
        tensors = _tensors(modules, optimizers) | self._of_rank(own)
        self.pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        if wait:
            self.wait()

    def wait(self):
        """Until the save under way is complete. Raises UserError on all ranks if it failed on one, a full disk say."""
        pending, self.pending = self.pending, None
        try:
            if pending:
                pending.result()
        except CheckpointException as e:
            self._clean()
            cause = str(e).strip().splitlines()[-1]  # after DCP's traceback
            raise UserError(f"cannot save in {self.folder} ({cause}); older checkpoints are whole") from e

    def _clean(self):
        """Remove what is no longer kept, and what a killed or failed save left."""
        if self.main:
            for path in sorted(self.folder.glob(STEP))[: -self.keep_last]:
                path.rename(self.folder / f".tmp_{path.name}")  # half a folder must not look like a checkpoint
            for path in self.folder.glob(".tmp_*"):
                shutil.rmtree(path, ignore_errors=True)

    def load(self, path, modules, optimizers, own=None):
        """Fill modules and optimizers in place from a checkpoint of any number of ranks. Returns extra.

        own: as saved; it stays as it is where fewer ranks have saved theirs.
        """
        tensors = _tensors(modules, {})
        params = {f"{m}/{name}": p for m, module in modules.items() for name, p in module.named_parameters()}
        for optimizer in optimizers.values():
            optimizer.state.clear()
        try:
            extra = json.loads((Path(path) / "extra.json").read_text())
            saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            for name, m in saved.items():  # a fresh optimizer is empty: what was saved tells what it will hold
                kind, o, *rest = name.split("/")
                if kind == "optimizers" and o in optimizers:
                    p, key = params["/".join(rest[:-1])], rest[-1]
                    zeros = torch.zeros_like(p) if m.size == p.shape else torch.zeros(m.size, dtype=m.properties.dtype)
                    tensors[name] = optimizers[o].state[p][key] = zeros
                if kind == "modules" and o in modules and name not in tensors:
                    raise LookupError(f"the model has no {name}")
            tensors |= {name: t for name, t in self._of_rank(own).items() if name in saved}
            dcp.load(tensors, checkpoint_id=path, process_group=self.group)
        except (CheckpointException, Exception) as e:  # whatever half a file may bring about
            cause = f"{type(e).__name__}: {e}".strip().splitlines()[-1]
            hint = "if so, remove it, and --resume goes on from the one before"
            raise UserError(f"the checkpoint {path} is of another model or damaged: {hint} ({cause})") from e
        for optimizer in optimizers.values():
            optimizer.load_state_dict(optimizer.state_dict())  # puts each tensor where this optimizer wants it
        return extra

    def _of_rank(self, own):
        """The tensors of this rank's own module, under names of its own: one name would be taken for one tensor."""
        rank = dist.get_rank() if self.group else 0
        return {f"rank{rank}/{name}": t for name, t in own.state_dict().items()} if own else {}


def _tensors(modules, optimizers):
    """By name: modules/ema/out.weight, optimizers/adam/student/out.weight/exp_avg. Learning rates are configuration."""
    names = {p: f"{m}/{name}" for m, module in modules.items() for name, p in module.named_parameters()}
    tensors = {f"modules/{m}/{name}": t for m, module in modules.items() for name, t in module.state_dict().items()}
    for o, p, slot in ((o, p, slot) for o, optimizer in optimizers.items() for p, slot in optimizer.state.items()):
        tensors |= {f"optimizers/{o}/{names[p]}/{key}": t for key, t in slot.items() if t is not None}
    return tensors


class Stopper:
    """SIGTERM and SIGINT set a flag; `stopper()`, at the end of a step, says on all ranks alike whether any has one.

    A second signal ends the process as it would without this.
    """

    def __init__(self, ranks):
        self.ranks, self.flag = ranks, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.set)

    def set(self, number, _):
        self.flag = True
        signal.signal(number, signal.SIG_DFL)

    def __call__(self):
        return any_rank(self.flag, self.ranks)
