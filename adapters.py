"""Low-rank adapters: student, its average and the fake score as small changes of one frozen network.

Distillation by score needs three or four networks of one architecture. With adapters (LoRA, Hu et al. 2021,
arXiv:2106.09685) it needs one: the teacher is the base, and each role adds to six linear maps W of every block,
attention's four and the feed-forward's two (the modulations, the embeddings and the last layer stay the teacher's),

    W x + B A x          A (rank, in) random, B (out, rank) zero at first: every role begins as the teacher

Only A and B are trained, so gradients and AdamW's state are as small as they are; the scale before B A is 1, so what
is exported needs no further number. Which role is meant is an argument of the base's forward pass (`DiT.forward`),
handed down to its blocks. State that is switched would be wrong: with activation checkpointing a block is computed
again in the backward pass, long after another role has been called.

An `Adapted` stands where a DiT stands: same config, same call. Its base is shared, hence no submodule of it: its
parameters, its checkpoint and its optimizer are those of the adapters alone.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

MAPS = ("q", "k", "v", "out", "up", "down")  # of each block: attention's four and the feed-forward's two


class LowRank(nn.Module):
    """x (..., inputs) -> B A x (..., outputs)."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x):
        return F.linear(F.linear(x, self.A), self.B)


class Adapted(nn.Module):
    """A DiT with one role's adapters of `rank`. x (B,C,T,H,W), t (B,), text (B,L,D) -> (B,C,T,H,W), as the base."""

    def __init__(self, base, rank: int):
        super().__init__()
        width = base.config.width
        sizes = dict.fromkeys(MAPS, (width, width)) | {"up": (width, 4 * width), "down": (4 * width, width)}
        blocks = [{name: LowRank(*size, rank) for name, size in sizes.items()} for _ in range(base.config.depth)]
        self.adapters = nn.ModuleList(nn.ModuleDict(block) for block in blocks)
        self.__dict__["base"] = base  # past nn.Module, which would register it: all roles share it
        self.config = base.config
        self.init_weights(0)

    def forward(self, x, t, text):
        return self.base(x, t, text, self.adapters)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """Draw every A anew from `seed`, uniform in +-1 / sqrt(in), and set every B to zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            values = torch.zeros(p.shape, device="cpu")
            if name.endswith("A"):
                bound = 1 / math.sqrt(p.shape[1])
                values.uniform_(-bound, bound, generator=generator)
            p.copy_(values)


def merge(base: dict, adapters: dict) -> dict:
    """The state dict of a DiT in which W + B A stands for W, in float32: half of a small B A would be lost in bfloat16.

    base: a DiT's state dict; adapters: an Adapted's.
    """
    merged = dict(base)
    for name, A in adapters.items():
        if name.endswith(".A"):
            _, block, linear, _ = name.split(".")  # adapters.<block>.<linear>.A
            key = f"blocks.{block}.{linear}.weight"
            change = adapters[name.removesuffix("A") + "B"].float() @ A.float()
            merged[key] = base[key].float() + change
    return merged
