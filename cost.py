"""What a video costs: seconds and memory of text encoding, diffusion and decoding (the paper's Table 4).

A GPU is told what to do and does it later. A clock that does not wait for it measures how long the telling took, which
hardly depends on how much there is to do: so ratios far above the ratio of network evaluations can appear. Everything
is therefore timed twice, waiting after each phase ("synchronised") and not ("launched"), and network evaluations stand
beside the seconds. On a CPU, which does what it is told at once, the two agree.
"""

import contextlib
import gc
import statistics
import time
from pathlib import Path

import torch

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


def peak(work, device):
    """Call work(); the most memory in use meanwhile, in bytes. None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        except OSError:
            device = None
    work()
    return (so_far(device) or None) if device is not None else None


def memory(models, prompt):
    """Peak memory of each phase: rows {"label", "steps", "weights", "text", "diffusion", "decoding"} in bytes.

    "weights" is the size of the transformer's, the VAE's and the text encoder's parameters alone.
    """
    rows = []
    for label, generator, steps, w in models:
        parts = [generator.model, generator.vae, getattr(generator.encoder, "model", None)]
        weights = sum(p.numel() * p.element_size() for part in parts if part is not None for p in part.parameters())
        work = phases(generator, prompt, steps, w)
        row = {name: peak(phase, generator.device) for name, phase in work.items()}
        rows.append({"label": label, "steps": steps, "weights": weights} | row)
    return rows
