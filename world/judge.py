"""The judge of the small world: a small network that reads every factor off a clip.

It is trained on rendered clips alone (`pretrain.py judge`) and stands where large pretrained networks stand at full
scale: its readings are the semantic scores of VBench, its features those of the Frechet distance and of the Vendi
score, and its agreement with a caption a text-video reward. Motion is read off all frames coarsely, shape off one frame
in four at full resolution: with a strided stem alone the eight objects stay at 54%. There are two kinds, since the
judge that evaluates is never the one that rewards: "conv" mixes time by 3D convolutions; "attention" sees single
frames and their changes through 2D convolutions and mixes them by self-attention. A student that fools the one does not
by that fool the other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from world.shapes import FACTORS, parse


def slow_motion(part):
    """Four frames (B, 3, 4, H, W), each shown four times: a part of a clip at the length that a judge reads."""
    return part.repeat_interleave(4, 2)


@dataclass
class JudgeConfig:
    kind: str = "conv"  # "conv" or "attention"
    width: int = 16  # channels after the stem; a token has 8 times as many


class Judge(nn.Module):
    """Clips (B, 3, 16, 64, 64) in [-1, 1] to logits of every factor of `shapes.FACTORS`."""

    Config = JudgeConfig

    def __init__(self, config=None):
        super().__init__()
        self.config = config = config or JudgeConfig()
        c, dim, attention = config.width, 8 * config.width, config.kind == "attention"

        def conv(cin, cout, stride, kernel=(1 if attention else 3, 3, 3)):
            pad = [n // 2 for n in kernel]
            return nn.Sequential(nn.Conv3d(cin, cout, kernel, stride, pad, bias=False), nn.BatchNorm3d(cout), nn.SiLU())

        def conv2d(cin, cout, stride=1):
            return conv(cin, cout, (1, stride, stride), (1, 3, 3))

        self.trunk = nn.Sequential(  # motion: all frames, coarsely
            conv(6, c, (1, 2, 2), (1, 5, 5)),  # (B, c, 16, 32, 32)
            conv(c, 2 * c, (2, 2, 2)),
            conv(2 * c, 4 * c, (2, 2, 2)),
            conv(4 * c, dim, (1, 2, 2)),
            conv(dim, dim, 1),
        )  # (B, dim, 4, 4, 4)
        self.trunk2d = nn.Sequential(  # shape: one frame in four, at full resolution; an outline is lost to a stride
            conv2d(3, c),
            conv2d(c, c, 2),
            conv2d(c, 2 * c),
            conv2d(2 * c, 4 * c, 2),
            conv2d(4 * c, 4 * c),
            conv2d(4 * c, 6 * c, 2),
            conv2d(6 * c, dim),
            nn.MaxPool3d((1, 2, 2)),
        )  # (B, dim, 4, 4, 4)
        self.mixer = nn.Sequential()
        for _ in range(2 if attention else 0):
            layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            self.mixer.append(layer)
        self.join = nn.Sequential(nn.Linear(2 * dim, dim), nn.SiLU())
        self.place = nn.Parameter(torch.randn(1, 64, dim) * 0.02)
        self.where = nn.Linear(dim, 16)  # what is kept of every token in its place
        self.pool = nn.Sequential(nn.Linear(2 * dim + 64 * 16, dim), nn.SiLU())
        self.answer = nn.ModuleList(nn.Linear(dim, len(values)) for values in FACTORS.values())

    def tokens(self, video):
        """(B, 3, 16, 64, 64) -> (B, 64, dim). Motion is shown outright: each frame beside its change from the last."""
        change = torch.cat([torch.zeros_like(video[:, :, :1]), video[:, :, 1:] - video[:, :, :-1]], 2)
        x = torch.cat([self.trunk(torch.cat([video, 3 * change], 1)), self.trunk2d(video[:, :, 2::4])], 1)
        return self.mixer(self.join(x.flatten(2).transpose(1, 2)) + self.place)

    def forward(self, video):
        return self.answers(self.tokens(video))

    def answers(self, x):
        """Tokens (B, 64, dim) -> logits of every factor."""
        x = self.pool(torch.cat([x.mean(1), x.amax(1), self.where(x).flatten(1)], 1))  # what is there, and where
        return {name: head(x).float() for name, head in zip(FACTORS, self.answer)}

    def features(self, video):
        """What the Frechet distance and the Vendi score look at: the mean token, (B, dim)."""
        return self.tokens(video).float().mean(1)

    def loss(self, video, truth):
        """Mean over the factors of the cross entropy on those that can be seen; truth (B, factors), -1 = unseen."""
        seen = (truth >= 0).sum(0).clamp(min=1)  # in a small batch a factor may be seen in no clip at all
        pairs = zip(self(video).values(), truth.T)
        sums = [F.cross_entropy(logits, right, ignore_index=-1, reduction="sum") for logits, right in pairs]
        return (torch.stack(sums) / seen).mean()

    @torch.no_grad()
    def read(self, video):
        """Most probable class index of each factor, (B, factors)."""
        return torch.stack([logits.argmax(1) for logits in self(video).values()], 1)

    def probabilities(self, video):
        """Of every value of every factor, one factor after the other: (B, values)."""
        return torch.cat([logits.softmax(1) for logits in self(video).values()], 1)

    def direction(self, prompts):
        """What of `probabilities` a prompt asks for: 1 / n at each of the n values it names, (B, values)."""
        places = [(factor, value) for factor, values in FACTORS.items() for value in values]
        out = torch.zeros(len(prompts), len(places), device=self.place.device)
        for row, prompt in zip(out, prompts):
            named = parse(prompt)
            row[[places.index(pair) for pair in named.items()]] = 1 / max(1, len(named))
        return out

    @torch.no_grad()
    def score(self, video, prompts):
        """Share of the factors that each prompt names which are read as named, (B,) in [0, 1]; 0 if it names none."""
        read = torch.cat([F.one_hot(logits.argmax(1), logits.shape[1]) for logits in self(video).values()], 1)
        named = self.direction(prompts) > 0  # (B, values)
        return (read * named).sum(1) / named.sum(1).clamp(min=1)
