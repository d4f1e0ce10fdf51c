"""Pixel-space rewards R(video, prompt): what the student is tuned to please, and never asked to differentiate.

A reward is a callable `reward(video (B, 3, F, H, W) in [-1, 1], prompts) -> (B,)` in float32, higher is better. The
latent reward model (lrm.py) learns any of them from such numbers alone, so a reward may be a file size. Those that
are differentiable give their gradient on request (`with_grad=True`), which only the direct-gradient baselines ask for.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from cli import UserError
from judge import Judge
from shapes import FACTORS, FRAMES, SIZE, parse

# name -> (differentiable, reads the prompt, scale)
REWARDS = {
    "jpeg_compressibility": (False, False, "minus kilobytes (1000 bytes) of a frame as JPEG of quality 95"),
    "jpeg_incompressibility": (False, False, "kilobytes (1000 bytes) of a frame as JPEG of quality 95"),
    "agreement": (True, True, "0..1: the judge's mean probability of the factors that the prompt names"),
    "object": (True, True, "0..1: the judge's probability of the object that the prompt names"),
    "colour": (True, True, "0..1: the judge's probability of the colour that the prompt names"),
    "action": (True, True, "0..1: the judge's probability of the action that the prompt names"),
}
JUDGED = ("agreement", "object", "colour", "action")
NAMES = list(REWARDS)


@dataclass
class Reward:
    """One reward, ready to be called; `make` builds it.

    `frames` is the number of evenly spaced frames that are scored (None: all).
    """

    name: str
    score: Callable  # (video, prompts) -> (B,)
    differentiable: bool
    text: bool  # does it read the prompt?
    scale: str
    frames: int | None = None
    device: str | torch.device = "cpu"

    def __call__(self, video: torch.Tensor, prompts: list[str] | None = None, with_grad: bool = False) -> torch.Tensor:
        """video (B, 3, F, H, W) in [-1, 1] -> (B,) float32 on the video's device; NaN for a clip that is not finite.

        Raises ValueError for another shape, a wrong number of prompts, or a gradient that does not exist.
        """
        check(video)
        if self.text and (prompts is None or len(prompts) != len(video)):
            raise ValueError(f"{self.name} needs one prompt a clip: {len(video)} clips, {len(prompts or [])} prompts")
        if with_grad and not self.differentiable:
            raise ValueError(f"{self.name} has no gradient")
        if self.frames and self.frames < video.shape[2]:
            video = video[:, :, spread(video.shape[2], self.frames)]
        x = video.to(self.device, torch.float32)
        # the published scores are those of float32, whatever precision the training around this call runs in
        with torch.set_grad_enabled(with_grad), torch.autocast(x.device.type, enabled=False):
            score = self.score(x, prompts)
            bad = ~torch.isfinite(x).flatten(1).all(1)
            return score.float().masked_fill(bad, torch.nan).to(video.device)


def check(video: torch.Tensor) -> None:
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"a reward takes video (B, 3, F, H, W), not {tuple(video.shape)}")


def spread(total: int, n: int) -> list[int]:
    """n of `total` frames, evenly spaced: the middles of n equal intervals."""
    return [int((i + 0.5) * total / n) for i in range(n)]


def parse_spec(spec: str) -> dict[str, float]:
    """'jpeg_compressibility=1,agreement=2' -> {name: weight}; a name alone has weight 1. UserError for anything else."""
    weights = {}
    for part in filter(None, spec.replace(" ", "").split(",")):
        name, _, number = part.partition("=")
        if name not in REWARDS:
            raise UserError(f"unknown reward {name!r}; there are: {', '.join(NAMES)}")
        try:
            weights[name] = float(number or 1)
        except ValueError:
            raise UserError(f"the weight of the reward {name} must be a number, not {number!r}") from None
    if not weights:
        raise UserError(f"no reward in {spec!r}; there are: {', '.join(NAMES)}")
    return weights


def make(name: str, weights: str | None = None, frames: int | None = None, device="cpu") -> Reward:
    """The reward of that name; `weights` is its file or folder, `frames` how many frames it scores (None: all).

    The rewards that read motion (the judge's four, dynamic_degree) always see every frame.
    Raises UserError for an unknown name and for weights that are missing or of something else.
    """
    (name,) = parse_spec(name)
    if frames is not None and frames < 1:
        raise UserError(f"a reward scores at least one frame, not {frames}")
    differentiable, text, scale = REWARDS[name]
    if name in JUDGED:
        score, frames = _judged(name, weights or "weights/judge_reward.safetensors", device), None
    else:
        score = partial(_jpeg, sign=-1.0 if name == "jpeg_compressibility" else 1.0)
    return Reward(name, score, differentiable, text, scale, frames, device)


# ---------------------------------------------------------------------------------------------------------------------
# file size


def jpeg_compressibility(video: torch.Tensor) -> torch.Tensor:
    """Minus kilobytes (bytes / 1000) of each frame as JPEG, mean over the frames: (B, 3, F, H, W) -> (B,).

    Quality 95, the encoder's defaults else, as DDPO has it (github.com/kvablack/ddpo-pytorch, rewards.py).
    """
    check(video)
    return _jpeg(video, None, -1.0).to(video.device)


def _jpeg(video, prompts, sign):
    pixels = ((video.detach().float() + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8)
    kilobytes = []
    for clip in pixels.permute(0, 2, 3, 4, 1).cpu().numpy():  # (F, H, W, 3)
        total = 0
        for frame in clip:
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, format="JPEG", quality=95)
            total += buffer.tell()
        kilobytes.append(total / len(clip) / 1000)
    return sign * torch.tensor(kilobytes, device=video.device)


# ---------------------------------------------------------------------------------------------------------------------
# the shapes world's rewarding judge


def _judged(name, weights, device):
    import checkpoint

    judge, _ = checkpoint.load_model(weights, Judge, device)
    judge.requires_grad_(False)

    def score(video, prompts):
        if tuple(video.shape[2:]) != (FRAMES, SIZE, SIZE):
            raise UserError(f"the reward {name} reads clips of the shapes world only, {FRAMES} frames of {SIZE}x{SIZE}")
        if name == "agreement":
            return judge.agreement(video, prompts)
        p = judge(video)[name].softmax(1)  # (B, values)
        # where the prompt leaves the factor open, any clear one is right
        named = [parse(prompt).get(name) for prompt in prompts]
        return torch.stack([q[FACTORS[name].index(v)] if v else q.max() for q, v in zip(p, named)])

    return score
