"""Does it fit, and how long will it take? Updates of Algorithm 1 at a preset's full size, with random weights.

    python train.py trial --preset cogvideox-2b --rank 64 --iterations 20 --out results/trial-cogvideox-2b-rank64.json

The teacher's weights, the latents and the text are random numbers of the right shapes, so nobody's file is needed; all
else is what `train.py` does with the same flags. Under torchrun the ranks, all on one machine, share the work as they
would in training. `train.py memory` computes what GPUs would hold, without any.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import common
import distributed
from common import UserError
from data import PRESETS as CLIPS
from dit import PRESETS as SIZES
from dit import DiT
from evals import tables
from evals.cost import forget, so_far
from nets import build, held

CLIPS_IN_CACHE = 4  # all alike
OF_FILES = ("data", "teacher", "vae", "text", "student", "resume", "reward", "reward_weights")


def write_inputs(preset, folder, device):
    """A teacher's file and a cache of clips in `folder`, of random numbers."""
    config, generator = SIZES[preset], torch.Generator().manual_seed(0)
    with torch.device(device):
        model = DiT(config)
    common.save_model(folder / "teacher.safetensors", model, torch.bfloat16, kind="teacher")
    latents = torch.randn(config.channels, *config.latents, generator=generator).half()
    text = torch.randn(1, config.text_length, config.text_dim, generator=generator).bfloat16()
    cache = folder / "cache"
    names = [f"{i}.mp4" for i in range(CLIPS_IN_CACHE)]
    for i, name in enumerate(names):
        about = {"class": "clip", "name": name, "caption": name, "shape": list(latents.shape)}
        common.save_tensors(cache / f"clip-{i:06d}.safetensors", {"latents": latents, "text": text[0]}, about)
    common.save_tensors(cache / "null.safetensors", {"text": text})
    made = {"frames": CLIPS[preset]["frames"], "fps": CLIPS[preset]["fps"], "text": "random", "vae": "random"}
    common.write_json(cache / "index.json", {"made": made | {"reward": None}, "names": names})


def trial(cfg, ranks):
    """Make cfg.iterations updates as `train` would. cfg: train.py's Config; an --out of .json keeps the result.

    One row: the most memory in use, in bytes of the first rank, and the median seconds of an update, without the first.
    Raises UserError for flags that name files, and for a reward.
    """
    from train import BETAS, PRESETS, Config, adam, algorithm_1, settled  # here: train.py calls this

    plain = replace(Config(), **PRESETS[cfg.preset])
    given = [f"--{name.replace('_', '-')}" for name in OF_FILES if getattr(cfg, name) != getattr(plain, name)]
    if given:
        raise UserError(f"a trial has weights and clips of its own, random ones: leave out {', '.join(given)}")
    if Path(cfg.out).suffix:
        if not cfg.out.endswith(".json"):
            raise UserError(f"--out {cfg.out}: a trial is kept in a file NAME.json")
        common.writable(cfg.out)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(distributed.every(folder, ranks)[0])
        if ranks.main:
            write_inputs(cfg.preset, place, ranks.device)
        distributed.any_rank(False, ranks)  # wait for it
        forget(ranks.device)  # what making them took
        files = {"teacher": str(place / "teacher.safetensors"), "data": str(place / "cache")}
        run = replace(settled(cfg), vae="", text="", sample_every=0, fake_warmup=0, **files)
        nets = build(run, ranks)
        optimizers = adam(nets, run.lr, run.fake_lr, BETAS[run.preset])
        accumulate = max(1, run.global_batch // (run.batch * ranks.size))
        seconds, begun = [], time.perf_counter()
        for step, *_ in algorithm_1(run, ranks, nets, optimizers, accumulate):
            seconds.append(time.perf_counter() - begun)
            peak = so_far(ranks.device) / 2**30
            if ranks.main:
                print(f"update {step + 1}: {seconds[-1]:.2f} s, at most {peak:.2f} GiB", flush=True)
            begun = time.perf_counter()
    cuda = ranks.device.type == "cuda"
    row = {"preset": cfg.preset, "rank": cfg.rank, "ranks": ranks.size, "updates": len(seconds)}
    row |= {"device": torch.cuda.get_device_name() if cuda else "CPU", "peak": so_far(ranks.device)}
    row |= {"seconds": statistics.median(seconds[1:] or seconds), "all_seconds": seconds}
    return tables.save(cfg, "trial", rows=[row]) if ranks.main else None


def memory_table(cfg):
    """A Markdown table of what each GPU of 1, 2, 4 and 8 will hold; to cfg.out as well, if that is a .json file."""
    rows, config = [], SIZES[cfg.preset]
    for size in (1, 2, 4, 8):
        networks, activations = held(cfg, config, size if cfg.shard != "none" else 1, config.latents)
        kinds = dict(zip(("parameters", "gradients", "optimizer"), map(sum, zip(*networks.values()))))
        rows.append({"preset": cfg.preset, "rank": cfg.rank, "ranks": size, **kinds, "activations": activations})
    return tables.table([tables.save(cfg, "sharding", rows=rows)])
