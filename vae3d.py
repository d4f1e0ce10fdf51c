"""The causal 3D VAE: a video becomes latents 8 times smaller in height and width and 4 times in time, and comes back.

The architecture is CogVideoX's, so that its published weights load without touching the forward pass: residual blocks
of two 3x3x3 convolutions that look only backward in time, pairs of frames averaged on the way down and repeated on the
way up, and decoder norms whose scale and shift are read off the latents. The posterior is a diagonal Gaussian.

A clip is coded chunk by chunk, so that memory does not grow with its length, in one of two ways:

independent  (DOLLAR and the small world) every 16 frames on their own. The first frame is repeated once in front, and
             these 17 frames give 1 + 16 / 4 = 5 latents; after decoding the extra frame is dropped. An image is a clip
             of one frame and one latent.
streaming    (CogVideoX) 8 frames or 2 latents at a time, each convolution keeping its last two input frames for the
             next chunk; what is left over goes into the first chunk. 1, 8k and 8k + 1 frames come back as they were.

One thing is ours: `patch` folds patch x patch pixels into channels before the first convolution and unfolds them after
the last one, in place of as many spatial samplers. Almost all of the work in a VAE is done at full resolution; this is
what lets two CPU cores train one.
"""

from dataclasses import dataclass, replace
from functools import wraps
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

HALVINGS = {1: 3, 2: 2, 4: 1, 8: 0}  # what is left to do of height and width, by how many pixels are folded


@dataclass
class VAEConfig:
    """The defaults are CogVideoX-2B's. Height and width are compressed by 8 and time by 4, whatever the fields say."""

    channels: tuple = (128, 256, 256, 512)  # of every level, finest first
    latent_channels: int = 16
    layers_per_block: int = 3  # residual blocks a level in the encoder; the decoder has one more
    groups: int = 32  # of every group norm
    patch: int = 1  # pixels folded into channels, per side: 1, 2, 4 or 8
    chunking: Literal["independent", "streaming"] = "streaming"
    chunk_frames: int = 8  # frames coded at a time
    scaling_factor: float = 1.15258426  # latents are the posterior mean times this, about unit variance

    def __post_init__(self):
        self.channels = tuple(self.channels)  # JSON has lists
        if self.patch not in HALVINGS or len(self.channels) <= max(2, HALVINGS[self.patch]):
            raise ValueError(f"patch {self.patch} is none of 1, 2, 4, 8, or wants more levels than {self.channels}")
        if any(c % self.groups for c in self.channels) or self.chunk_frames % 8:
            raise ValueError("channels must be multiples of groups, chunk_frames of 8")

    def samplers(self):
        """[(halves time, halves space)] of the encoder's levels but the last. Finest first: cheapest afterwards."""
        return [(i < 2, i < HALVINGS[self.patch]) for i in range(len(self.channels) - 1)]


PRESETS = {
    "shapes": VAEConfig(
        channels=(32, 64, 96),
        latent_channels=12,
        layers_per_block=1,
        groups=8,
        patch=4,
        chunking="independent",
        chunk_frames=16,
        scaling_factor=1.0,
    ),
    "dollar": VAEConfig(latent_channels=12, chunking="independent", chunk_frames=16, scaling_factor=1.0),
    "cogvideox-2b": VAEConfig(),
    "cogvideox-5b": VAEConfig(scaling_factor=0.7),
}


class CausalConv3d(nn.Conv3d):
    """3x3x3, zeros around the picture, and in front of the first frame that frame twice, or the end of the last chunk.

    `cache` is a dict from layer to its last two input frames, filled as the chunks of one clip pass, or None.
    """

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=(0, 1, 1))

    def forward(self, x, cache=None):
        front = [cache[self]] if cache and self in cache else [x[:, :, :1]] * 2
        x = torch.cat([*front, x], 2)  # (B, C, 2 + T, H, W); F.pad's replicate mode is many times slower
        if cache is not None:
            cache[self] = x[:, :, -2:].clone()
        return super().forward(x)


class Norm(nn.GroupNorm):
    """Group norm; in the decoder also a scale and a shift at every place, linear in the latents z that belong there."""

    def __init__(self, channels, groups, latent_channels=None):
        super().__init__(groups, channels, eps=1e-6)
        if latent_channels:
            self.scale = nn.Conv3d(latent_channels, channels, 1)
            self.shift = nn.Conv3d(latent_channels, channels, 1)

    def forward(self, x, z=None):
        x = super().forward(x)  # (B, C, T, H, W)
        if z is None:
            return x
        # Every z serves a block of places. A 1x1 convolution commutes with repeating, so it is done on z itself.
        return x * repeat(self.scale(z), x.shape[2:]) + repeat(self.shift(z), x.shape[2:])


def repeat(x, size):
    """Repeat the places of x (B, C, t, h, w) to size (T, H, W); the first frame of an odd number T stands alone."""
    T, H, W = size
    if T > 1 and T % 2:
        first, rest = x.split([1, x.shape[2] - 1], 2)
        return torch.cat([F.interpolate(first, (1, H, W)), F.interpolate(rest, (T - 1, H, W))], 2)
    return F.interpolate(x, (T, H, W))


class ResBlock(nn.Module):
    def __init__(self, inputs, outputs, groups, latent_channels=None):
        super().__init__()
        self.norm1 = Norm(inputs, groups, latent_channels)
        self.conv1 = CausalConv3d(inputs, outputs)
        self.norm2 = Norm(outputs, groups, latent_channels)
        self.conv2 = CausalConv3d(outputs, outputs)
        self.shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x, z, cache):
        h = self.conv1(F.silu(self.norm1(x, z)), cache)
        h = self.conv2(F.silu(self.norm2(h, z)), cache)
        return h + (x if self.shortcut is None else self.shortcut(x))


class Down(nn.Module):
    """Average pairs of frames (of an odd number the first stays alone), then a strided convolution within each."""

    def __init__(self, channels, time, space):
        super().__init__()
        self.time = time
        self.conv = nn.Conv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2)) if space else None

    def forward(self, x):
        if self.time and x.shape[2] > 1:
            first, rest = x.split([x.shape[2] % 2, x.shape[2] // 2 * 2], 2)
            x = torch.cat([first, (rest[:, :, ::2] + rest[:, :, 1::2]) / 2], 2)
        return x if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Repeat frames (of an odd number the first stays alone), double every pixel, then a convolution within each."""

    def __init__(self, channels, time, space):
        super().__init__()
        self.time = time
        self.conv = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1)) if space else None

    def forward(self, x):
        T, H, W = x.shape[2:]
        T = 2 * T - T % 2 if self.time else T
        return repeat(x, (T, H, W)) if self.conv is None else self.conv(repeat(x, (T, 2 * H, 2 * W)))


def res_levels(channels, n, groups, latent_channels=None):
    """n residual blocks at each level, from whose channels the next one goes on."""
    levels = nn.ModuleList()
    for i, width in enumerate(channels):
        inputs = [channels[max(i - 1, 0)]] + [width] * (n - 1)
        levels.append(nn.ModuleList(ResBlock(c, width, groups, latent_channels) for c in inputs))
    return levels


def through_levels(x, z, levels, samplers, cache):
    """x through the blocks of every level, and through a sampler after every level but the last."""
    for i, blocks in enumerate(levels):
        for block in blocks:
            x = block(x, z, cache)
        if i < len(samplers):
            x = samplers[i](x)
    return x


class Encoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.patch = c.patch
        self.conv_in = CausalConv3d(3 * c.patch**2, c.channels[0])
        self.blocks = res_levels(c.channels, c.layers_per_block, c.groups)
        self.down = nn.ModuleList(Down(n, time, space) for n, (time, space) in zip(c.channels, c.samplers()))
        width = c.channels[-1]
        self.mid = nn.ModuleList(ResBlock(width, width, c.groups) for _ in range(2))
        self.norm_out = Norm(width, c.groups)
        self.conv_out = CausalConv3d(width, 2 * c.latent_channels)

    def forward(self, x, cache=None):
        x = F.pixel_unshuffle(x.transpose(1, 2), self.patch).transpose(1, 2)
        x = self.conv_in(x, cache)
        x = through_levels(x, None, self.blocks, self.down, cache)
        for block in self.mid:
            x = block(x, None, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)  # (B, 2C, T, h, w)


class Decoder(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.patch = c.patch
        channels = c.channels[::-1]
        self.conv_in = CausalConv3d(c.latent_channels, channels[0])
        self.mid = nn.ModuleList(ResBlock(channels[0], channels[0], c.groups, c.latent_channels) for _ in range(2))
        self.blocks = res_levels(channels, c.layers_per_block + 1, c.groups, c.latent_channels)
        self.up = nn.ModuleList()
        for i, (_, space) in enumerate(c.samplers()[::-1]):
            self.up.append(Up(channels[i], i < 2, space))  # time doubles first, at the coarsest levels
        self.norm_out = Norm(channels[-1], c.groups, c.latent_channels)
        self.conv_out = CausalConv3d(channels[-1], 3 * c.patch**2)

    def forward(self, z, cache=None):
        x = self.conv_in(z, cache)
        for block in self.mid:
            x = block(x, z, cache)
        x = through_levels(x, z, self.blocks, self.up, cache)
        x = self.conv_out(F.silu(self.norm_out(x, z)), cache)
        return F.pixel_shuffle(x.transpose(1, 2), self.patch).transpose(1, 2)


def without_autocast_in_half(method):
    """Weights in half precision compute in it: autocast would let every norm give out float32, in twice the memory, and
    does not mix float16 with bfloat16."""

    @wraps(method)
    def call(self, x):
        if self.decoder.conv_in.weight.dtype == torch.float32:
            return method(self, x)
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x)

    return call


class VAE3D(nn.Module):
    """Videos (B, 3, F, H, W) in [-1, 1] to latents (B, C, T, H/8, W/8) and back; results have the input's dtype."""

    Config = VAEConfig

    def __init__(self, config):
        super().__init__()
        self.config = replace(config)  # a copy: scaling_factor is set after training, and presets are shared
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def check(self, frames, height, width):
        """ValueError for a video of a size that cannot be encoded."""
        size, independent = self.config.chunk_frames, self.config.chunking == "independent"
        if height % 8 or width % 8:
            raise ValueError(f"height and width must be multiples of 8, got {height}x{width}")
        if frames != 1 and (frames < size or frames % size > (0 if independent else 1)):
            allowed = f"1 or {size}k" if independent else f"1, {size}k or {size}k + 1"
            raise ValueError(f"{frames} frames cannot be encoded: a clip has {allowed} frames")

    @without_autocast_in_half
    def posterior(self, video):
        """video (B, 3, F, H, W) in [-1, 1] -> mean, log-variance of the posterior, unscaled, each (B, C, T, H/8, W/8).

        T is 1 for one frame; independent chunks: F = 16k gives 5k; streaming: 8k gives 2k, 8k + 1 gives 2k + 1.
        Raises ValueError for another F, or a height or width that is not a multiple of 8.
        """
        self.check(*video.shape[2:])
        size, frames, independent = self.config.chunk_frames, video.shape[2], self.config.chunking == "independent"
        chunks = in_chunks(video.to(self.encoder.conv_in.weight.dtype), size)
        if independent and frames > 1:
            chunks = [torch.cat([chunk[:, :, :1], chunk], 2) for chunk in chunks]
        cache = None if independent else {}
        h = torch.cat([self.encoder(chunk, cache) for chunk in chunks], 2)
        mean, logvar = h.to(video.dtype).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, video):
        """video (B, 3, F, H, W) in [-1, 1] -> latents (B, C, T, H/8, W/8): posterior mean times scaling_factor."""
        return self.posterior(video)[0] * self.config.scaling_factor

    @without_autocast_in_half
    def decode(self, latents):
        """latents (B, C, T, h, w) as `encode` gives them -> video (B, 3, F, 8h, 8w), not clamped.

        Independent chunks: T is 1 or 5k, else ValueError. Streaming: an odd T gives 4T - 3 frames, an even one 4T.
        """
        c, T, independent = self.config, latents.shape[2], self.config.chunking == "independent"
        size = c.chunk_frames // 4 + (1 if independent else 0)
        if independent and T > 1 and T % size:
            raise ValueError(f"{T} latent frames cannot be decoded: there are 1 or {size}k")
        chunks = in_chunks((latents / c.scaling_factor).to(self.decoder.conv_in.weight.dtype), size)
        cache = None if independent else {}
        videos = [self.decoder(chunk, cache) for chunk in chunks]
        if independent and T > 1:
            videos = [video[:, :, 1:] for video in videos]
        return torch.cat(videos, 2).to(latents.dtype)


def in_chunks(x, size):
    """x (B, C, T, H, W) in chunks of `size` frames, the first one larger by what is left over, or all of a short x."""
    T = x.shape[2]
    first = min(T, size + T % size)
    return x.split([first] + [size] * ((T - first) // size), 2)


def psnr(copies, videos):
    """Peak signal to noise ratio in dB of each copy, (B,); both (B, 3, F, H, W) in [-1, 1]."""
    return -10 * (((copies - videos).float() / 2) ** 2).mean((1, 2, 3, 4)).log10()
