"""What a video costs: seconds and memory of text encoding, diffusion and decoding (the paper's Table 4).

A GPU is told what to do and does it later. A clock that does not wait for it measures how long the telling took, which
hardly depends on how much there is to do: so ratios far above the ratio of network evaluations can appear. Everything
is therefore timed twice, waiting after each phase ("synchronised") and not ("launched"; fresh noise between steps,
which comes from the CPU, is waited for all the same), and network evaluations stand beside the seconds. On a CPU, which
does what it is told at once, the two agree.

Also what a reward costs in memory when it is differentiated (Tables 1 and 10). Where no GPU is there to say so, this is
counted: each operation is asked for its result's size alone ("meta" tensors: no numbers, so CLIP-H at 128 frames takes
no memory to count), and what is alive at the same time is added up. A GPU's kernels may need some workspace on top.
"""

import contextlib
import gc
import statistics
import time
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lrm
from common import UserError

PHASES = ("text", "diffusion", "decoding", "total")


def wait(device):
    """Return when the device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def phases(generator, prompt, steps, w=None):
    """The three phases of drawing one video, as functions to be called in this order."""
    made = {}

    def text():
        made["text"] = generator.encoder.encode([prompt]).to(generator.device)

    def diffusion():
        made["latents"] = generator.latents(made["text"], [0], steps, w)

    def decoding():
        made["video"] = generator.decode(made["latents"])

    return {"text": text, "diffusion": diffusion, "decoding": decoding}


def clock(work, device, synchronise):
    """Seconds of each phase of `work` and of all, from an idle device."""
    barrier = (lambda: wait(device)) if synchronise else (lambda: None)
    wait(device)
    begin = start = time.perf_counter()
    seconds = {}
    for name, phase in work.items():
        phase()
        barrier()
        now = time.perf_counter()
        seconds[name], start = now - start, now
    return seconds | {"total": start - begin}


def times(models, prompt, repeats=100, seconds=300.0):
    """Time models [(label, generator, steps, w)], by turns so that a slow minute of the machine meets them all.

    -> rows {"label", "steps", "nfe", "repeats", "synchronised": {phase: {"mean", "std"}}, "launched": the same}. There
    are at most `repeats` rounds, and no new one after so many seconds, but two at least.
    """
    works = [phases(generator, prompt, steps, w) for _, generator, steps, w in models]
    for work in works:  # the first time, everything is slower
        clock(work, models[0][1].device, True)
    taken = [{"synchronised": [], "launched": []} for _ in models]
    begin = time.perf_counter()
    for round_ in range(repeats):
        if round_ >= 2 and time.perf_counter() - begin > seconds:
            break
        for (_, generator, *_), work, kept in zip(models, works, taken):
            kept["synchronised"].append(clock(work, generator.device, True))
            kept["launched"].append(clock(work, generator.device, False))
    rows = []
    for (label, generator, steps, w), kept in zip(models, taken):
        row = {"label": label, "steps": steps, "nfe": generator.evaluations(steps, w), "repeats": len(kept["launched"])}
        rows.append(row | {kind: {p: spread([s[p] for s in some]) for p in PHASES} for kind, some in kept.items()})
    return rows


def spread(values):
    """Mean and standard deviation."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def so_far(device):
    """The most memory that was in use until now, in bytes: the device's, or on a CPU that of the whole process.

    0 where the system does not tell (Linux does). What Python and malloc keep for later counts as in use.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 0


def forget(device):
    """Begin anew with `so_far`. Returns whether the system can."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak(work, device):
    """Call work(); the most memory in use meanwhile, in bytes. None where the system does not tell."""
    told = forget(device)
    work()
    return so_far(device) or None if told else None


def memory(models, prompt):
    """Peak memory of each phase: rows {"label", "steps", "weights", "text", "diffusion", "decoding"} in bytes.

    "weights" is the size of the transformer's, the VAE's and the text encoder's parameters alone. A model that is not
    measured waits on the CPU.
    """
    rows = []
    for _, generator, *_ in models:
        place(generator, "cpu")
    for label, generator, steps, w in models:
        place(generator, generator.device)
        weights = sum(p.numel() * p.element_size() for part in networks(generator) for p in part.parameters())
        work = phases(generator, prompt, steps, w)
        row = {name: peak(phase, generator.device) for name, phase in work.items()}
        rows.append({"label": label, "steps": steps, "weights": weights} | row)
        place(generator, "cpu")
    return rows


def networks(generator):
    """The transformer (of adapters also their base), the VAE and, if it is one, the text encoder."""
    base, text = getattr(generator.model, "base", None), getattr(generator.encoder, "model", None)
    return [network for network in (generator.model, base, generator.vae, text) if network]


def place(generator, device):
    for network in networks(generator):
        network.to(device)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors alive within it, forward and backward: .now, and .most at once."""

    def __init__(self, tensors):
        super().__init__()
        self.now, self.most, self.known = 0, 0, set()
        self.count(tensors)

    def count(self, tensors):
        for storage in (t.untyped_storage() for t in tensors if torch.is_tensor(t)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count(tree_leaves(out))
        return out


def footprint(model, x, *others):
    """Bytes of model(x, *others), whose first argument gets a gradient, and whatever of `model` learns.

    -> {"forward": the peak without gradient, "backward": the peak of forward and backward, "saved": what is kept from
    the one to the other, parameters left out}; weights and arguments are part of both peaks.
    """
    weights, saved, device = list(model.parameters()), {}, x.device
    ours = {p.untyped_storage()._cdata for p in weights}

    def keep(t):
        storage = t.untyped_storage()
        saved.update({} if storage._cdata in ours else {storage._cdata: storage.nbytes()})
        return t

    def both():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = model(x.detach().requires_grad_(), *others).sum()
        out.backward()

    def most(work):
        if device.type == "cuda":
            return peak(work, device)
        with Alive([*weights, x, *others]) as alive:
            work()
        return alive.most

    found = {"forward": most(torch.no_grad()(lambda: model(x, *others))), "backward": most(both)}
    for p in weights:
        p.grad = None
    return found | {"saved": sum(saved.values())}


class ClipReward(torch.nn.Module):
    """HPSv2 and PickScore's network, of random weights and frozen, as a reward of a video and a prompt."""

    def __init__(self, name="ViT-H-14"):
        import open_clip

        import preference

        super().__init__()
        if not (config := open_clip.get_model_config(name)):
            raise UserError(f"open_clip has no model {name}")
        self.clip = open_clip.CLIP(**config).eval().requires_grad_(False)
        self.sides = preference.cosine  # of the product that the score is

    def forward(self, video):
        size, context = self.clip.visual.image_size[0], self.clip.context_length
        how = self.clip.encode_image, self.clip.encode_text, size, True, context, video.device
        parts, direction = self.sides(*how)
        return (parts(video) * direction(["a"])).sum(1)


def reward_memory(device, frames=(1, 12, 24, 64, 128), clip="ViT-H-14"):
    """Rows {"label", "parameters", "frames", "forward", "backward", "saved"}: rewards of a video of 192x320, batch 1.

    device: "cuda" measures, "meta" counts. Latent rewards see 5 latents of 12x24x40 for each 16 frames, and one of an
    image; the text has 256 tokens of 4096. All in float32.
    """
    rows, empty = [], lambda *shape: torch.empty(shape, device=device).normal_()
    latents = lambda n: empty(1, 12, 1 if n == 1 else 5 * -(-n // 16), 24, 40)
    name = "CLIP-H (HPSv2, PickScore)" if clip == "ViT-H-14" else clip
    kinds = [
        ("image LRM", lrm.ImageLRM, lambda n: (latents(n),)),
        ("text-image LRM", lrm.TextImageLRM, lambda n: (latents(n), empty(1, 256, 4096))),
        ("image LRM of CLIP-H's 1,024 parts", lambda: lrm.ImageLRM(outputs=1024), lambda n: (latents(n),)),
        (name, lambda: ClipReward(clip), lambda n: (empty(1, 3, n, 192, 320),)),
    ]
    for label, make, inputs in kinds:
        with torch.device(device):
            model = make()
        size = sum(p.numel() for p in model.parameters())
        rows += [{"label": label, "parameters": size, "frames": n} | footprint(model, *inputs(n)) for n in frames]
        del model
    return rows
