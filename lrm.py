"""Latent reward models (Tables 11-13): a small network that learns a pixel reward from the latents alone.

The true reward looks at decoded pixels, may be large, slow, or have no gradient (the size of a JPEG file). This one has
190 thousand parameters, reads latents, and always has a gradient: it is trained to say what the true reward says
(Eq. 14), and the student is tuned through it (Eq. 15), without decoder or reward in memory.

    ImageLRM       2D CNN frame by frame, mean of the frames' rewards                       189,441 parameters
    TextImageLRM   the same, and the frame's feature attends over the prompt's tokens       763,009 parameters
    VideoLRM       as ImageLRM ("frames"), or a 3D CNN over the clip ("3d")
    TextVideoLRM   as TextImageLRM ("frames"), or the 3D CNN's one feature attends ("3d")

Counts are for 12 channels and 4096-wide text, and are the paper's. Three things are not as its tables print them.
Table 12's first convolution has padding 1: then no kernel reaches the last row and column of the latents, and they get
no gradient; with padding 0 the map has the same size and all is seen. Table 13 averages the text into one key; a
softmax over one key is 1 whatever the image, so the reward depends on the text alone and its gradient with respect to
the latents is zero. Here the image attends over all tokens and its own feature is added back; `literal=True` is Table
13's form, kept for the test that shows this. The text's Linear has a bias, Q, K and V have none: that, with GroupNorm's
scales and shifts, is what gives the paper's total.

An LRM may also learn what a reward is made of, its parts, which do not depend on the prompt: a judge's probabilities, a
CLIP's image embedding. The reward is a known function of these and of the prompt (rewards.py), so it is computed, and
its gradient with respect to the latents is that of the computed number. What a number a clip does not teach, which of
the factors is wrong, the parts say outright. Then `outputs` is their number, and no text is read. `LatentReward` has
both forms.

Table 12's first convolution cuts the latents into squares of 4x4. On a map of 8x8 that leaves four, so `stride=1` puts
a 3x3 convolution there; `apart=T` gives the head all T frames side by side instead of their mean, for what is seen only
between frames. The counts above are those without either.

Where the tables are silent: GroupNorm has 8 groups (small latents end as a map of one pixel, where each group is
normalised over its channels alone: many small groups would leave little of the signal); every text token is attended
to, padding included, as the encoder gives it; the attention has one head. Section 7.2 writes it without a scale; here
it has the usual 1 / sqrt(width).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from schedule import at_least_float32

GROUPS = 8


@dataclass
class LRMConfig:
    channels: int = 12  # of the latents
    text_dim: int = 4096  # of a text token, where text is read
    literal: bool = False  # Table 13 as printed: blind to the image
    width: int = 128
    backbone: str = "frames"  # a 2D CNN frame by frame, or "3d"
    outputs: int = 1  # numbers that are predicted: the reward, or its parts
    stride: int = 4  # of the 2D CNN's first convolution, or 1
    apart: int = 0  # frames that the head sees side by side; 0: their mean


class VideoLRM(nn.Module):
    """Latents (B, C, T, h, w) -> reward (B,), or with several `outputs` (B, outputs), for any T, h, w >= 1.

    fields: of LRMConfig; seed: of the first weights. ValueError for an unknown backbone, and for latents of another
    number of channels.
    """

    def __init__(self, seed: int = 0, **fields):
        super().__init__()
        self.config = config = LRMConfig(**fields)
        width = config.width
        if config.backbone not in ("frames", "3d"):
            raise ValueError(f"unknown backbone {config.backbone!r}: frames or 3d")
        self.frames = config.backbone == "frames"
        if self.frames:
            kernel = {"kernel_size": 3, "padding": 1} if config.stride == 1 else {"kernel_size": 4, "stride": 4}
            first = nn.Conv2d(config.channels, width, **kernel)
            second, third = nn.Conv2d(width, width, 3, stride=2, padding=1), nn.Conv2d(width, width, 1)
        else:
            first = nn.Conv3d(config.channels, width, (3, 4, 4), stride=(1, 4, 4), padding=(1, 0, 0))
            second, third = nn.Conv3d(width, width, 3, stride=2, padding=1), nn.Conv3d(width, width, 1)
        norms = [nn.GroupNorm(GROUPS, width) for _ in range(2)]
        self.cnn = nn.Sequential(first, norms[0], nn.SiLU(), second, norms[1], nn.SiLU())
        self.project = third
        self.head = nn.Linear(width * max(1, config.apart), config.outputs)
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """PyTorch's own uniform initialisation, from a seed of its own."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
                bound = module.weight[0].numel() ** -0.5
                for p in module.parameters():
                    p.copy_(torch.empty(p.shape, device="cpu").uniform_(-bound, bound, generator=generator))

    def features(self, x):
        """Latents (B, C, T, h, w) -> (B, T, width), or (B, 1, width) of the 3D CNN.

        A height or width that is no multiple of 4 is filled up by repeating the last row or column: the first
        convolution would otherwise cut the rest off, unseen and without gradient.
        """
        if x.ndim != 5 or x.shape[1] != self.config.channels:
            raise ValueError(f"latents must be (B, {self.config.channels}, T, h, w), got {tuple(x.shape)}")
        B, *_, h, w = x.shape
        if h % 4 or w % 4:
            x = F.pad(x, (0, -w % 4, 0, -h % 4, 0, 0), mode="replicate")
        if self.frames:
            x = x.transpose(1, 2).flatten(0, 1)  # (B T, C, h, w)
        x = self.cnn(x)  # (B T, width, h/8, w/8), with stride 1 h/2, w/2
        x = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)  # (B T, width, 1, 1)
        return self.project(x).reshape(B, -1, self.config.width)  # (B, T, width)

    def forward(self, x):
        features = self.features(x)  # (B, T, width)
        if self.config.apart:
            features = features.flatten(1)[:, None]  # (B, 1, T width)
        predicted = self.head(features).mean(1)  # (B, outputs)
        return predicted.squeeze(1) if self.config.outputs == 1 else predicted


class TextVideoLRM(VideoLRM):
    """Latents (B, C, T, h, w) and text (B, L, D) -> reward (B,), for any T, h, w, L >= 1."""

    def __init__(self, seed: int = 0, **fields):
        super().__init__(seed, **fields)
        width = self.config.width
        self.text = nn.Linear(self.config.text_dim, width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.init_weights(seed)

    def forward(self, x, text):
        image = self.features(x)  # (B, T, width)
        text = self.text(text)  # (B, L, width)
        if self.config.literal:
            text = text.mean(dim=1, keepdim=True)  # (B, 1, width): one key, so the softmax below is 1
        scores = self.query(image) @ self.key(text).transpose(1, 2)  # (B, T, L)
        mixed = (scores * self.config.width**-0.5).softmax(dim=-1) @ self.value(text)  # (B, T, width)
        return self.head(mixed if self.config.literal else image + mixed).mean(dim=(1, 2))  # (B,)


class ImageLRM(VideoLRM):
    """Table 12: the frames' backbone alone. An image is a clip of one frame; a clip has the mean of its frames."""


class TextImageLRM(TextVideoLRM):
    """Table 13, the frames' backbone alone: mean over the frames, each attending over the tokens by itself."""


# ---------------------------------------------------------------------------------------------------------------------
# what an LRM learns of a reward


class LatentReward:
    """A reward as an LRM knows it: what it is taught, and what it says.

    lrm: one of the above; reward: of rewards.py; moments: by which its numbers are standardised, kept up to date by
    whoever trains. parts: the LRM learns the reward's parts; else, as in the paper, the standardised number.
    """

    def __init__(self, lrm, reward, moments, parts: bool):
        self.lrm, self.reward, self.moments, self.parts = lrm, reward, moments, parts
        self.reads_text = reward.text and not parts

    def labels(self, video, captions):
        """What the pixel reward says of decoded clips (B, 3, F, H, W): its number (B, 1), or its P parts (B, P)."""
        return self.reward.parts(video) if self.parts else self.reward(video, captions)[:, None]

    def scores(self, labels, captions):
        """The reward (B,) that the labels say."""
        return self.reward.from_parts(labels, captions) if self.parts else labels[:, 0]

    def target(self, labels):
        """What the LRM shall say (Eq. 14): the parts (B, P), or the standardised reward (B,)."""
        return labels if self.parts else self.moments.standardise(labels[:, 0])

    def estimate(self, x, text, captions):
        """The standardised reward (B,) that the LRM sees in latents x, with gradient with respect to x (Eq. 15)."""
        predicted = self.lrm(x, text) if self.reads_text else self.lrm(x)
        if not self.parts:
            return predicted
        return self.moments.standardise(self.reward.from_parts(at_least_float32(predicted), captions))


class Buffer(nn.Module):
    """The newest `size` samples of a rank with their labels, so that each label, which costs a decoding, teaches often.

    A module, so that a checkpoint keeps it. Latents (C, T, h, w) are kept in bfloat16, text (L, D) where it is read; an
    image among clips is kept as a clip that stands still. What is not finite is not kept.
    """

    def __init__(self, size: int, latents: tuple, labels: int, text: tuple = (0, 0)):
        super().__init__()
        self.register_buffer("x", torch.zeros(size, *latents, dtype=torch.bfloat16))
        self.register_buffer("labels", torch.zeros(size, labels))
        self.register_buffer("text", torch.zeros(size, *text, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # of all that ever came

    def add(self, x, labels, text):
        """x (B, C, T, h, w), labels (B, n), text (B, L, D): the newest take the places of the oldest."""
        finite = x.flatten(1).isfinite().all(1) & labels.isfinite().all(1)
        x, labels, text = x[finite], labels[finite], text[finite]
        size, first = len(self.x), int(self.count)
        places = [(first + i) % size for i in range(len(x))]
        self.x[places], self.labels[places] = x.to(self.x), labels.to(self.labels)
        if self.text.numel():
            self.text[places] = text.to(self.text)
        self.count += len(x)

    def sample(self, n: int, seed: int):
        """n of what is kept, each as likely as any other: x, labels, text, in float32."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(min(int(self.count), len(self.x)), (n,), generator=generator)
        return self.x[rows].float(), self.labels[rows], self.text[rows].float()
