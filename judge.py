"""The judge of the shapes world: a small network that reads every factor off a clip.

It is trained on rendered clips alone (`pretrain.py judge`) and stands where large pretrained networks stand at full
scale: its readings are the semantic scores of VBench, its features those of the Frechet distance and of the Vendi
score, and its agreement with a caption a text-video reward. Two judges are shipped. The one that evaluates is never
the one that rewards: they differ in seed and architecture ("conv" mixes time by 3D convolutions, "attention" sees
pairs of frames through 2D convolutions and mixes them by self-attention), so that a student which fools the second
does not by that fool the first.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from shapes import FACTORS, parse


@dataclass
class JudgeConfig:
    kind: str = "conv"  # "conv" or "attention"
    width: int = 24  # (16 for "attention") channels after the stem; the trunk ends with 8 times as many


class Judge(nn.Module):
    """Clips (B, 3, 16, 64, 64) in [-1, 1] to logits of each factor of `shapes.FACTORS`."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig | None = None):
        super().__init__()
        self.config = config = config or JudgeConfig()
        if config.kind not in ("conv", "attention"):
            raise ValueError(f"a judge is 'conv' or 'attention', not {config.kind!r}")
        c, k, t = config.width, 3 if config.kind == "conv" else 1, 2 if config.kind == "conv" else 1
        dim = 8 * c

        def conv(cin, cout, stride):
            pad = (k // 2, 1, 1)
            return nn.Sequential(nn.Conv3d(cin, cout, (k, 3, 3), stride, pad), nn.GroupNorm(8, cout), nn.SiLU())

        first = nn.Conv3d(3, c, (1, 5, 5), (1, 2, 2), (0, 2, 2)) if k == 3 else nn.Conv3d(3, c, (2, 5, 5), 2, (0, 2, 2))
        self.trunk = nn.Sequential(
            nn.Sequential(first, nn.GroupNorm(8, c), nn.SiLU()),  # (B, c, 16 or 8, 32, 32)
            conv(c, 2 * c, (t, 2, 2)),
            conv(2 * c, 4 * c, (t, 2, 2)),
            conv(4 * c, 4 * c, 1),
            conv(4 * c, dim, (1, 2, 2)),
            conv(dim, dim, 1),
        )  # (B, dim, 4 or 8, 4, 4)
        self.place = nn.Parameter(torch.zeros(1, (4 if k == 3 else 8) * 16, dim))
        layer = lambda: nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.mixer = nn.Sequential(*(layer() for _ in range(0 if k == 3 else 2)))
        self.ask = nn.Parameter(torch.randn(1, len(FACTORS), dim) * dim**-0.5)  # one question a factor
        self.attend = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.answer = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, len(values)))
            for values in FACTORS.values()
        )

    def tokens(self, video: torch.Tensor) -> torch.Tensor:
        """(B, 3, F, H, W) -> (B, F' H' W', dim)"""
        return self.mixer(self.trunk(video).flatten(2).transpose(1, 2) + self.place)

    def forward(self, video: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.tokens(video)
        x, _ = self.attend(self.ask.expand(len(x), -1, -1), x, x, need_weights=False)  # (B, factors, dim)
        return {name: head(x[:, i]).float() for i, (name, head) in enumerate(zip(FACTORS, self.answer))}

    def features(self, video: torch.Tensor) -> torch.Tensor:
        """What the Frechet distance and the Vendi score look at: the mean token, (B, dim)."""
        return self.tokens(video).float().mean(1)

    def loss(self, video: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Mean over the factors of the cross entropy on those that can be seen; truth (B, factors), -1 = unseen."""
        terms = []
        for i, logits in enumerate(self(video).values()):
            seen = (truth[:, i] >= 0).sum().clamp(min=1)  # in a small batch a factor may be seen in no clip at all
            terms.append(F.cross_entropy(logits, truth[:, i], ignore_index=-1, reduction="sum") / seen)
        return torch.stack(terms).mean()

    @torch.no_grad()
    def read(self, video: torch.Tensor) -> torch.Tensor:
        """Most probable class index of each factor, (B, factors)."""
        return torch.stack([logits.argmax(1) for logits in self(video).values()], 1)

    def agreement(self, video: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Text-video agreement (B,) in [0, 1]: the mean probability of the factors that each prompt names."""
        logits = self(video)
        out = []
        for i, prompt in enumerate(prompts):
            named = parse(prompt)
            p = [logits[f][i].softmax(0)[FACTORS[f].index(v)] for f, v in named.items()]
            out.append(torch.stack(p).mean() if p else logits["object"][i].sum() * 0)
        return torch.stack(out)

    @torch.no_grad()
    def score(self, video: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """Share of the factors that each prompt names which are read as named, (B,) in [0, 1]; 0 if it names none."""
        read, out = self.read(video).tolist(), []
        for row, prompt in zip(read, prompts):
            found = dict(zip(FACTORS, row))
            right = [found[f] == FACTORS[f].index(v) for f, v in parse(prompt).items()]
            out.append(sum(right) / max(1, len(right)))
        return torch.tensor(out)
