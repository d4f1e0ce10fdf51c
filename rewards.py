"""Pixel-space rewards R(video, prompt): what the student is tuned to please; it need not have a gradient.

A reward is a callable `reward(video (B, 3, F, H, W) in [-1, 1], prompts) -> (B,)` in float32, higher is better. The
latent reward model (lrm.py) learns any of them from such numbers alone, so a reward may be a file size. Those that
are differentiable give their gradient on request (`with_grad=True`), which only the direct-gradient baselines ask for.

Image rewards score frames one at a time, and a video is worth their mean; `frames` evenly spaced ones are enough. The
rewards that see motion (dynamic_degree and the two of the judge) take every frame. Those learned from people, HPSv2,
PickScore, ImageReward and LAION's aesthetic score, are in preference.py. The table at the end names them all.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import common
import distributed
import preference
from common import UserError
from video import to_uint8
from world.judge import Judge, slow_motion
from world.shapes import FACTORS, FRAMES, SIZE


@dataclass
class Reward:
    """One reward, ready to be called; `make` builds it.

    Some scores are the dot product of two vectors: *parts*, which depend on the clip alone, and a *direction*, which
    depends on the prompt alone. A judge's parts are the probabilities of all values of all factors, and the direction
    takes the mean of those that the prompt names. A CLIP's are the embeddings of the image, mean over the frames, and
    of the text.
    """

    name: str
    score: Callable | tuple | None  # (video, prompts) -> (B,); of parts: video -> (B, P), prompts -> (B, P)
    differentiable: bool
    text: bool  # does it read the prompt?
    frames: int | None  # how many evenly spaced frames are scored; None: all
    device: str | torch.device
    size: tuple | None = None  # the only (frames, height, width) that it reads; None: any

    def __call__(self, video: torch.Tensor, prompts: list[str] | None = None, with_grad: bool = False) -> torch.Tensor:
        """video (B, 3, F, H, W) in [-1, 1] -> (B,) float32 on the video's device; NaN for a clip that is not finite.

        Raises ValueError for another shape, a wrong number of prompts, or a gradient that does not exist.
        """
        if self.text and len(prompts or []) != len(video):
            raise ValueError(f"{self.name} needs one prompt a clip: {len(video)} clips, {len(prompts or [])} prompts")
        if with_grad and not self.differentiable:
            raise ValueError(f"{self.name} has no gradient")
        if self.has_parts:
            return self.from_parts(self.parts(video, with_grad), prompts)
        return self._of(video, lambda x: self.score(x, prompts), with_grad)

    def _of(self, video, function, with_grad):
        """function(the frames that are scored, in float32) -> (B, ...); NaN for a clip that is not finite."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"a reward takes video (B, 3, F, H, W), not {tuple(video.shape)}")
        self.check([tuple(video.shape[2:])])
        if self.frames and self.frames < video.shape[2]:  # the middles of equal intervals
            video = video[:, :, [int((i + 0.5) * video.shape[2] / self.frames) for i in range(self.frames)]]
        x = video.to(self.device, torch.float32)
        # the published scores are those of float32, whatever precision the training around this call runs in
        with torch.set_grad_enabled(with_grad), torch.autocast(x.device.type, enabled=False):
            found = function(x).float()
            bad = ~torch.isfinite(x).flatten(1).all(1)
            return found.masked_fill(bad.view(-1, *[1] * (found.ndim - 1)), torch.nan).to(video.device)

    def check(self, sizes):
        """UserError if clips of these sizes, (frames, height, width) each, have some that the reward cannot read."""
        if self.size and (others := [size for size in sizes if tuple(size) != self.size]):
            (f, h, w), (frames, height, width) = self.size, others[0]
            others = f"{len(others)} of {len(sizes)} clips have others, e.g. {frames} of {height}x{width}"
            raise UserError(f"the reward {self.name} reads {f} frames of {h}x{w}; {others}")

    @property
    def has_parts(self):
        return isinstance(self.score, tuple)

    @property
    def size_of_parts(self):
        return self.score[1]([""]).shape[1]

    def parts(self, video, with_grad=False):
        """What the reward is made of: video (B, 3, F, H, W) -> (B, P)."""
        return self._of(video, self.score[0], with_grad)

    def from_parts(self, parts, prompts):
        """The reward (B,) of parts (B, P), with gradient with respect to them."""
        with torch.no_grad(), torch.autocast(parts.device.type, enabled=False):  # as in `_of`
            direction = self.score[1](prompts).to(parts)
        return (parts * direction).sum(1)


@dataclass
class Moments:
    """Running mean and deviation of a reward, by which it is standardised.

    HPSv2 moves by hundredths where a file size moves by kilobytes: only so does --beta-ft mean the same for every
    reward. What is NaN on one rank is left out on all. Plain numbers, so that a checkpoint can keep them.
    """

    count: float = 0.0
    mean: float = 0.0
    square: float = 0.0  # sum of squared deviations

    def update(self, scores: torch.Tensor, ranks) -> None:
        """scores (B,); ranks: see distributed.py, B is alike on all ranks."""
        scores, n = scores.detach().double(), len(scores) * ranks.size  # of all ranks: another number may resume
        mean = distributed.mean(scores.mean(), ranks)
        spread = n * distributed.mean((scores - mean).square().mean(), ranks)
        if not math.isfinite(mean):
            return
        total, shift = self.count + n, mean - self.mean
        self.square += spread + shift * shift * self.count * n / total
        self.mean, self.count = self.mean + shift * n / total, total

    def standardise(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores - self.mean) / self.deviation()

    def natural(self, standardised: torch.Tensor) -> torch.Tensor:
        """The inverse of `standardise`."""
        return standardised * self.deviation() + self.mean

    def deviation(self):
        return max(math.sqrt(self.square / self.count), 1e-6) if self.count else 1.0


def make(name: str, weights: str | None = None, frames: int | None = None, device="cpu") -> Reward:
    """The reward of that name. `weights` is its file or folder; `frames`: see Reward.

    Raises UserError for an unknown name and for weights that are missing or of something else.
    """
    if name not in REWARDS:
        raise UserError(f"unknown reward {name!r}; there are: {', '.join(REWARDS)}")
    score, differentiable, text, moving, needs = REWARDS[name]
    if weights and not needs:
        raise UserError(f"the reward {name} reads no weights: leave out --reward-weights")
    if needs:
        file = weights or (JUDGE if needs == JUDGE else "")
        if not (file and Path(file).exists()):
            missing = f"; there is nothing at {file}" if file else ""
            raise UserError(f"the reward {name} needs weights, {needs}{missing}")
        score = score(file, device)
    size = (FRAMES, SIZE, SIZE) if needs == JUDGE else None
    return Reward(name, score, differentiable, text, None if moving else frames, device, size)


# ---------------------------------------------------------------------------------------------------------------------
# file size


def jpeg_compressibility(video: torch.Tensor) -> torch.Tensor:
    """Minus kilobytes (bytes / 1000) of each frame as JPEG, mean over the frames: (B, 3, F, H, W) -> (B,).

    Quality 95, else the encoder's defaults, as DDPO has it (github.com/kvablack/ddpo-pytorch, rewards.py).
    """
    return make("jpeg_compressibility")(video)


def _jpeg(video, prompts):
    kilobytes = []
    for clip in map(to_uint8, video):  # (F, H, W, 3)
        buffer = io.BytesIO()
        for frame in clip:
            Image.fromarray(frame).save(buffer, format="JPEG", quality=95)
        kilobytes.append(buffer.tell() / len(clip) / 1000)
    return -torch.tensor(kilobytes, device=video.device)


# ---------------------------------------------------------------------------------------------------------------------
# the small world's rewarding judge, which is never the one that evaluates


def _judge(file, device):
    return common.load_model(file, Judge, device)[0].requires_grad_(False)


def _agreement(file, device):
    judge = _judge(file, device)
    return judge.probabilities, judge.direction


def _object_kept(file, device):
    """Does a clip end with the object it began with? Its parts: for every kind of object, that it is both."""
    judge, kinds = _judge(file, device), len(FACTORS["object"])

    def parts(video):
        first, last = slow_motion(video[:, :, :4]), slow_motion(video[:, :, -4:])
        return judge(first)["object"].softmax(1) * judge(last)["object"].softmax(1)

    return parts, lambda prompts: torch.ones(len(prompts or [""]), kinds, device=device)  # of the prompt nothing


# ---------------------------------------------------------------------------------------------------------------------
# motion


def _window(n: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """(n, n): a line times this is its mean over a window, taken twice, so that the window is a triangle.

    A box would turn some wavelengths around, and iterating would blow them up. A product is much faster than pooling.
    """
    box = F.avg_pool1d(torch.eye(n).to(like)[None], window, 1, window // 2, count_include_pad=False)[0]
    return box @ box


def optical_flow(first: torch.Tensor, second: torch.Tensor, window: int = 7, iterations: int = 3) -> torch.Tensor:
    """Lucas-Kanade from coarse to fine: images (N, C, H, W) in [0, 1] -> flow (N, 2, H, W), x and y in pixels.

    What is at p in `first` is at p + flow(p) in `second`. In a window that is flat the flow is that of the coarser
    level, and none at the coarsest: motion is only where it can be seen. Lucas and Kanade (1981), Bouguet (2001).
    """
    pyramid = [(first, second)]
    while min(pyramid[-1][0].shape[-2:]) >= 32:
        pyramid.append(tuple(F.avg_pool2d(image, 2) for image in pyramid[-1]))
    flow = first.new_zeros(len(first), 2, 1, 1)
    for a, b in reversed(pyramid):
        h, w = a.shape[-2:]
        finer = flow.new_tensor([w / flow.shape[3], h / flow.shape[2]]).view(1, 2, 1, 1)
        flow = F.interpolate(flow, (h, w), mode="bilinear") * finer
        wide = F.pad(a, (1, 1, 1, 1), mode="replicate")
        gx, gy = (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2, (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2
        across, down = (_window(n, window, a) for n in (w, h))
        around = lambda q, across=across, down=down: down.T @ q.mean(1, keepdim=True) @ across
        floor = 1e-4  # a gradient of 0.01 a pixel, about what noise and compression leave in a flat place
        xx, xy, yy = around(gx * gx) + floor, around(gx * gy), around(gy * gy) + floor
        y, x = torch.meshgrid(torch.arange(h, device=a.device), torch.arange(w, device=a.device), indexing="ij")
        for _ in range(iterations):
            place = torch.stack([(x + flow[:, 0] + 0.5) / w, (y + flow[:, 1] + 0.5) / h], -1) * 2 - 1  # (N, h, w, 2)
            change = F.grid_sample(b, place, padding_mode="border", align_corners=False) - a
            change = change * (place.abs().amax(-1) < 1)[:, None]  # what has left the picture says nothing
            bx, by = around(gx * change), around(gy * change)
            step = torch.cat([xy * by - yy * bx, xy * bx - xx * by], 1) / (xx * yy - xy * xy)
            flow = flow + step.clamp(-1, 1)  # beyond a pixel the linearisation does not hold
    return flow


def _dynamic_degree(video, prompts):
    """VBench's dynamic degree before its threshold, which is 1 here, and by Lucas-Kanade instead of RAFT.

    For each pair of frames the mean of the largest 5% of flow lengths, in units of 6 min(H, W) / 256 pixels. VBench
    asks whether a quarter of the pairs exceed 1; the mean over the pairs also says by how much. VBench first thins a
    video to 8 frames a second: give clips at about that rate.
    """
    n, _, f, h, w = video.shape
    if f < 2:
        return video.new_zeros(n)
    images = (video.transpose(1, 2).flatten(0, 1).clamp(-1, 1) + 1) / 2
    if min(h, w) > 128:  # the unit shrinks along
        images = F.interpolate(images, scale_factor=128 / min(h, w), mode="area")
    h, w = images.shape[-2:]
    images = images.unflatten(0, (n, f))
    flow = optical_flow(images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1))
    length = torch.linalg.vector_norm(flow, dim=1).flatten(1)  # (n (f - 1), h w)
    top = length.topk(max(1, int(0.05 * h * w))).values.mean(1)
    return top.view(n, f - 1).mean(1) / (6 * min(h, w) / 256)


# ---------------------------------------------------------------------------------------------------------------------
# name -> (its score, or what makes it out of weights; differentiable; reads the prompt; sees every frame; its weights)

HPS = "--reward-weights FILE, HPS_v2_compressed.pt or HPS_v2.1_compressed.pt of hub xswu/HPSv2"
PICK = "--reward-weights FOLDER, hub yuvalkirstain/PickScore_v1"
IMAGE = "--reward-weights FOLDER, hub THUDM/ImageReward and in it vocab.txt of bert-base-uncased"
LAION = "--reward-weights FOLDER, hub openai/clip-vit-large-patch14 and in it sac+logos+ava1-l14-linearMSE.pth"
JUDGE = "weights/judge_reward.safetensors"
REWARDS = {
    "jpeg_compressibility": (_jpeg, False, False, False, ""),
    "agreement": (_agreement, True, True, True, JUDGE),
    "object_kept": (_object_kept, True, False, True, JUDGE),
    "dynamic_degree": (_dynamic_degree, True, False, True, ""),
    "hpsv2": (preference.hpsv2, True, True, False, HPS),
    "pickscore": (preference.pickscore, True, True, False, PICK),
    "imagereward": (preference.imagereward, True, True, False, IMAGE),
    "aesthetic": (preference.aesthetic, True, False, False, LAION),
}
