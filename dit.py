"""The text-to-video diffusion transformer: CogVideoX's architecture.

A clip's latents are cut into 2x2 patches, one token each. Text and video tokens form one sequence in which every token
attends to every other: with no separate attention over space, time or text, an object can follow its word through the
whole clip. The step t acts through adaLN alone: in each block it shifts, scales and gates the two kinds of token, each
kind with its own numbers, while the norm, the attention and the feed-forward are shared.

    text (B,L,D)  -> Linear ---------+                             (text is dropped)
                                     +-> block x depth -> norm -> adaLN -> Linear -> patches -> (B,C,T,H,W)
    x (B,C,T,H,W) -> patches -> Linear
    t (B,)        -> sinusoid -> MLP -> every block

Where a token stands is told by a fixed sine-cosine table added once (the 2B family), or by rotating queries and keys
(the 5B family). Nothing of it is learned, so clips of any size work. The tables are made when first needed and kept
outside the network: `.to(bfloat16)` cannot round them, and building on the meta device cannot lose them.

What a network predicts, and on which schedule, belongs to its weights: the config says it. The forward pass is that of
diffusers' `CogVideoXTransformer3DModel`, the defaults are the small world's; the 1.5 and image-to-video models have
other patches or inputs and are refused. Sources: CogVideoX, arXiv:2408.06072; DiT, arXiv:2212.09748 (adaLN).
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Prediction = Literal["conjugate", "velocity", "epsilon", "sample"]
Kind = Literal["ddpm", "cogvideox", "flow"]


@dataclass(frozen=True)
class DiTConfig:
    channels: int = 12  # of the latents
    width: int = 192  # of a token
    depth: int = 6  # blocks
    heads: int = 3  # of width / heads each
    patch: int = 2  # in space; a latent frame is never merged with its neighbour
    text_dim: int = 128  # of a text token as the encoder gives it
    text_length: int = 20  # tokens a caption is padded to; padding is attended, as in the published models
    time_dim: int = 64  # of the embedding of t
    latents: tuple[int, int, int] = (5, 8, 8)  # frames, height, width in training; others work (see rotary_table)
    rotary: bool = False  # positions by rotation (5B) or by an added sine-cosine table (2B)
    spatial_scale: float = 1.0  # sine-cosine positions are divided by these
    temporal_scale: float = 1.0
    norm_eps: float = 1e-5
    prediction: Prediction = "conjugate"
    schedule: Kind = "ddpm"
    snr_shift: float = 3.0  # of the cogvideox schedule alone

    def __post_init__(self):
        object.__setattr__(self, "latents", tuple(self.latents))  # a list when it comes out of JSON
        if self.width % self.heads or (self.width // self.heads if self.rotary else self.width) % 16:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads and of 16 (rotary: a head's is)")


_2B = DiTConfig(
    channels=16, width=1920, depth=30, heads=30, text_dim=4096, text_length=226, time_dim=512, latents=(13, 60, 90),
    spatial_scale=1.875, prediction="velocity", schedule="cogvideox",
)  # fmt: skip
PRESETS = {
    "shapes": DiTConfig(),
    "dollar": replace(_2B, channels=12, text_length=256, latents=(40, 24, 40), prediction="conjugate", schedule="ddpm"),
    "cogvideox-2b": _2B,
    "cogvideox-5b": replace(_2B, width=3072, depth=42, heads=48, rotary=True, snr_shift=1.0),
}


def _angles(start, stop, n, dim, device):
    """n evenly spaced places times dim / 2 frequencies from 1 down towards 1 / 10000: (n, dim / 2), float64."""
    freqs = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64, device=device) / (dim // 2))
    return torch.outer(torch.linspace(start, stop, n, dtype=torch.float64, device=device), freqs)


def _every_token(*parts):
    """Join parts that broadcast to (T, h, w, d) each: (T * h * w, sum of d)."""
    size = torch.broadcast_shapes(*(part.shape[:3] for part in parts))
    return torch.cat([part.expand(*size, -1) for part in parts], -1).flatten(0, 2)


@functools.lru_cache(maxsize=4)  # teacher, student and fake score share one
def sincos_table(width, frames, rows, cols, spatial_scale, temporal_scale, dtype, device):
    """The added positions of the 2B family, (1, frames * rows * cols, width); rows and columns are of patches.

    A quarter of the width tells the time, three eighths the column, three eighths the row; sines before cosines.
    """
    t = _angles(0, (frames - 1) / temporal_scale, frames, width // 4, device)
    x = _angles(0, (cols - 1) / spatial_scale, cols, width // 8 * 3, device)
    y = _angles(0, (rows - 1) / spatial_scale, rows, width // 8 * 3, device)
    t, x, y = (torch.cat([angle.sin(), angle.cos()], -1) for angle in (t, x, y))
    return _every_token(t[:, None, None], x[None, None], y[None, :, None]).to(device, dtype)[None]


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # what sampling leaves in the cache, training must be able to save for its backward
def rotary_table(dim, frames, rows, cols, base_rows, base_cols, text_length, device):
    """The rotations of the 5B family, (text_length + frames * rows * cols, 1, dim / 2), unit complex numbers.

    Frames count 0, 1, 2, ...; rows and columns are spread over the largest centred box of their shape inside the
    training size (base_rows, base_cols), so that a clip of another size spans the positions it was trained on. Text
    is not rotated. Complex also because mixed precision, which rounds the float32 inputs of a block, leaves it alone.
    """
    if rows / cols > base_rows / base_cols:
        height, width = base_rows, round(base_rows / rows * cols)
    else:
        height, width = round(base_cols / cols * rows), base_cols
    top, left = round((base_rows - height) / 2), round((base_cols - width) / 2)
    t = _angles(0, frames - 1, frames, dim // 4, device)
    y = _angles(top, (top + height) * (rows - 1) / rows, rows, dim // 8 * 3, device)
    x = _angles(left, (left + width) * (cols - 1) / cols, cols, dim // 8 * 3, device)
    angle = F.pad(_every_token(t[:, None, None], y[None, :, None], x[None, None]), (0, 0, text_length, 0))
    return torch.polar(torch.ones_like(angle), angle)[:, None].to(torch.complex64).to(device)


def rotate(x, table):
    """Turn neighbouring pairs of x (B,S,heads,dim) by rotary_table, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def attention(q, k, v):
    """Softmax attention, each (B, heads, N, head dim). On a CPU, short sequences are multiplied out: PyTorch's fused
    kernel, made for long ones, has a backward four times slower there in bfloat16 (56 ms against 13 at N = 112)."""
    if q.device.type != "cpu" or q.shape[2] > 1024:
        return F.scaled_dot_product_attention(q, k, v)
    return (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1).to(v.dtype) @ v


def timestep_sinusoid(t, width):
    """Cosines, then sines, of t (B,) at width / 2 frequencies: (B, width), in float32 as the weights have known it."""
    freqs = torch.exp(-math.log(10000) * torch.arange(width // 2, dtype=torch.float32, device=t.device) / (width // 2))
    angle = t[:, None].float() * freqs
    return torch.cat([angle.cos(), angle.sin()], -1)


class Block(nn.Module):
    """Attention, then feed-forward, over text and video tokens together; both gated by t."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.modulation1 = nn.Linear(config.time_dim, 6 * width)
        self.norm1 = nn.LayerNorm(width, config.norm_eps)  # one norm for both kinds of token
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.norm_q = nn.LayerNorm(width // self.heads, 1e-6)
        self.norm_k = nn.LayerNorm(width // self.heads, 1e-6)
        self.out = nn.Linear(width, width)
        self.modulation2 = nn.Linear(config.time_dim, 6 * width)
        self.norm2 = nn.LayerNorm(width, config.norm_eps)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, text, video, c, table, adapters=None):
        """text (B,L,D), video (B,N,D), c (B,1,time_dim) after SiLU, table of rotary_table or None -> text, video.

        adapters: {name of a linear map: a module whose output is added to it}, of adapters.py; None: the base alone.
        """
        length = text.shape[1]
        joint, text_gate, gate = self.modulate(self.modulation1, self.norm1, text, video, c)
        q = self.norm_q(self.linear("q", joint, adapters).unflatten(-1, (self.heads, -1)))  # (B, L+N, heads, D/heads)
        k = self.norm_k(self.linear("k", joint, adapters).unflatten(-1, (self.heads, -1)))
        v = self.linear("v", joint, adapters).unflatten(-1, (self.heads, -1))
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        y = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = self.linear("out", y.transpose(1, 2).flatten(2), adapters)  # (B, L+N, D)
        text, video = torch.addcmul(text, text_gate, y[:, :length]), torch.addcmul(video, gate, y[:, length:])

        joint, text_gate, gate = self.modulate(self.modulation2, self.norm2, text, video, c)
        y = F.gelu(self.linear("up", joint, adapters), approximate="tanh")
        y = self.linear("down", y, adapters)
        return torch.addcmul(text, text_gate, y[:, :length]), torch.addcmul(video, gate, y[:, length:])

    def linear(self, name, x, adapters):
        y = getattr(self, name)(x)
        return y if adapters is None else y + adapters[name](x)

    def modulate(self, modulation, norm, text, video, c):
        shift, scale, gate, text_shift, text_scale, text_gate = modulation(c).chunk(6, -1)  # (B, 1, D) each
        text = torch.addcmul(text_shift, norm(text), 1 + text_scale)
        video = torch.addcmul(shift, norm(video), 1 + scale)
        return torch.cat([text, video], 1), text_gate, gate


class DiT(nn.Module):
    """The network. Set `checkpoint_activations` to recompute each block in the backward pass instead of storing it."""

    Config = DiTConfig

    def __init__(self, config):
        super().__init__()
        self.config, width = config, config.width
        self.checkpoint_activations = False
        device = torch.get_default_device()
        with torch.device("meta"):  # PyTorch's own initialisation would cost a second draw, from the global generator
            self.patch_in = nn.Conv2d(config.channels, width, config.patch, config.patch)
            self.text_in = nn.Linear(config.text_dim, width)
            self.time_in, self.time_out = nn.Linear(width, config.time_dim), nn.Linear(config.time_dim, config.time_dim)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.norm = nn.LayerNorm(width, config.norm_eps)
            self.modulation_out = nn.Linear(config.time_dim, 2 * width)
            self.norm_out = nn.LayerNorm(width, config.norm_eps)
            self.out = nn.Linear(width, config.channels * config.patch**2)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(0)

    def forward(self, x, t, text, adapters=None):
        """Noisy latents x (B,C,T,H,W), steps t (B,) int64, text (B,L,text_dim) -> (B,C,T,H,W) in x's dtype.

        adapters: of each block, who is meant where several roles share these weights (adapters.py); None: nobody.

        H and W are multiples of the patch; T, H, W and L need not be those of the config. The weights' dtype decides
        the arithmetic (x and text are cast to it), except under autocast, where the residual stream keeps it.
        Raises ValueError for shapes that do not fit.
        """
        config, p = self.config, self.config.patch
        (B, C, T, H, W), dtype = x.shape, self.patch_in.weight.dtype
        if config.channels != C or H % p or W % p or t.shape != (B,) or text.shape[::2] != (B, config.text_dim):
            raise ValueError(f"x {tuple(x.shape)}, t {tuple(t.shape)}, text {tuple(text.shape)} do not fit {config}")
        h, w = H // p, W // p
        # a convolution whose stride is its size is one matrix product over the patches
        video = x.to(dtype).reshape(B, C, T, h, p, w, p).permute(0, 2, 3, 5, 1, 4, 6).reshape(B, T * h * w, C * p * p)
        video = F.linear(video, self.patch_in.weight.flatten(1), self.patch_in.bias).to(dtype)  # (B, N, D)
        text = self.text_in(text.to(dtype)).to(dtype)  # (B, L, D)
        c = self.time_out(F.silu(self.time_in(timestep_sinusoid(t, config.width).to(dtype))))
        c = F.silu(c)[:, None]  # (B, 1, time_dim); every use begins with this SiLU
        table = None
        if config.rotary:
            base = config.latents[1] // p, config.latents[2] // p
            table = rotary_table(config.width // config.heads, T, h, w, *base, text.shape[1], x.device)
        else:
            scales = config.spatial_scale, config.temporal_scale
            video = video + sincos_table(config.width, T, h, w, *scales, dtype, x.device)
        for block, adapter in zip(self.blocks, adapters or [None] * config.depth):
            inputs = text, video, c, table, adapter
            if self.checkpoint_activations and torch.is_grad_enabled():
                text, video = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                text, video = block(*inputs)
        shift, scale = self.modulation_out(c).chunk(2, -1)  # (B, 1, D)
        y = self.out(torch.addcmul(shift, self.norm_out(self.norm(video)), 1 + scale))  # (B, N, C * p * p)
        return y.reshape(B, T, h, w, C, p, p).permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw every parameter anew from `seed`, alike on every device and however sharded; also after `to_empty`.

        Matrices are Xavier uniform, biases zero. The adaLN layers and the last one start at zero: each block is the
        identity and the output 0 (DiT, section 3.2). Sharded, call it within PyTorch's `implicit_replication`.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            module = name.split(".")[-2]
            full = torch.zeros(p.shape, device="cpu")
            if "norm" in module and name.endswith("weight"):
                full += 1
            elif name.endswith("weight") and not module.startswith("modulation") and name != "out.weight":
                bound = math.sqrt(6 / (p.shape[0] + p.shape[1:].numel()))
                full.uniform_(-bound, bound, generator=generator)
            p.copy_(full)
