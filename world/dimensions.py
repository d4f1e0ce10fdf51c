"""VBench's sixteen dimensions in the small world, where the truth of a clip is known and each can be put to the test.

The semantic nine ask the judge for what the prompt names, as VBench asks its detectors and CLIPs; a prompt that does
not name it is not asked. The quality seven look at the video alone:

subject, background    the judge sees single frames, each as a clip that stands still; what it believes of object and
consistency            colour (of scene and look) must stay what it was in the first frame and in the one before
temporal flickering    a pixel flickers where it leaves the range of its neighbours in time; what moves past it, or a
                       light that comes on, does not
motion smoothness      how much of the change from frame to frame is motion: the middle frame of three is interpolated
                       along matched blocks, as VBench does by a network, and its error is held against the change
dynamic degree         share of videos whose most moving twentieth moves more than 0.3 pixels a frame, by the
                       optical flow of the reward dynamic_degree
aesthetic quality      few and clean colours: how near the best twelve colours of a frame come to it. This world is
                       painted with few; what is half one thing and half another, or dirty, needs more
imaging quality        sharp edges (the steepest hundredth of a frame's steps), less the noise in its flat parts

Each raw score lies in 0..1; `RANGES` moves it as VBench's own table does, from what the worst corruption reaches to 1,
before the same three totals are made. The corruptions are those of tests/test_dimensions.py: rendered clips spoilt on
purpose, a little, more, much.
"""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import rewards
from evals.vbench import DIMENSIONS
from video import to_uint8
from world import shapes

WORST = {  # about what the worst corruption reaches, where that is not 0
    "Subject Consistency": 0.55,
    "Background Consistency": 0.55,
    "Temporal Flickering": 0.05,
    "Motion Smoothness": 0.05,
    "Aesthetic Quality": 0.1,
    "Imaging Quality": 0.15,
}
RANGES = {name: (total, WORST.get(name, 0.0), 1.0, weight) for name, (total, _, _, weight) in DIMENSIONS.items()}
STILLS = (1, 6, 10, 14)  # frames that the judge sees one by one


# ---------------------------------------------------------------------------------------------------------------------
# quality: of the video alone


def quality(judge, video):
    """Raw scores {dimension: (B,)} in 0..1 of the quality dimensions; video (B, 3, F, H, W), judge: of reading.py."""
    video = video.float().cpu()
    return {dimension: score(video) for dimension, score in OF_PIXELS.items()} | consistency(judge, video)


def consistency(judge, video):
    """The two dimensions for which the judge looks at single frames, as `quality` gives them."""
    stills = torch.stack([video[:, :, t : t + 1].expand_as(video) for t in STILLS], 1)  # (B, K, 3, F, H, W)
    read = [judge(part)[0] for part in stills.flatten(0, 1).split(judge.batch)]
    beliefs = {f: torch.cat([r[f] for r in read]).unflatten(0, (len(video), -1)) for f in read[0]}  # (B, K, values)
    return {
        "Subject Consistency": steady(beliefs, ("object", "colour")),
        "Background Consistency": steady(beliefs, ("scene", "look")),
    }


def steady(beliefs, factors):
    """VBench's consistency of frames 1..K-1 with the first and the previous one; beliefs {factor: (B, K, values)}.

    The likeness of two beliefs is sum sqrt(p q): 1 for the same, 0 where they share nothing.
    """
    scores = []
    for factor in factors:
        root = beliefs[factor].sqrt()
        likeness = (root[:, 1:] * (root[:, :1] + root[:, :-1])).sum(2) / 2
        scores.append(likeness.mean(1))
    return torch.stack(scores).mean(0)


def flickering(video):
    """exp(-d / 0.02), d the mean distance of pixels in [0, 1] from the range of their two neighbours in time."""
    x = (video + 1) / 2
    before, now, after = x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]
    low, high = torch.minimum(before, after), torch.maximum(before, after)
    outside = (now - high).clamp(min=0) + (low - now).clamp(min=0)
    return torch.exp(-outside.mean((1, 2, 3, 4)) / 0.02)


def interpolation_error(before, now, after, reach=3):
    """|now - the picture between its neighbours|, all (B, n, H, W), interpolated along matched blocks.

    For every place the way (dy, dx) on which `before` moved by it and `after` moved back agree best. Long ways cost a
    trace more, so that flat parts stand still.
    """
    height, width = now.shape[2:]
    before, after = (F.pad(x, (reach,) * 4, mode="replicate") for x in (before, after))

    def shifted(x, dy, dx):
        return x[:, :, reach + dy : reach + dy + height, reach + dx : reach + dx + width]

    best, error = torch.full_like(now, math.inf), torch.zeros_like(now)
    for dy, dx in itertools.product(range(-reach, reach + 1), repeat=2):
        x, y = shifted(before, dy, dx), shifted(after, -dy, -dx)
        cost = F.avg_pool2d((x - y).abs(), 5, 1, 2) + 0.002 * math.hypot(dy, dx)
        error = torch.where(cost < best, ((x + y) / 2 - now).abs(), error)
        best = torch.minimum(cost, best)
    return error


def smoothness(video):
    """1 - error / change, 0..1: error of the frame between two others interpolated along matched blocks, over its mean
    difference from the two. What motion does not explain (jumps, swapped frames, noise) is error."""
    grey = F.avg_pool2d((video.mean(1) + 1) / 2, 3, 1, 1, count_include_pad=False)  # a little blurred, (B, F, H, W)
    before, now, after = grey[:, :-2:2], grey[:, 1:-1:2], grey[:, 2::2]
    change = ((before - now).abs() + (after - now).abs()).mean((2, 3)).sum(1) / 2
    error = interpolation_error(before, now, after).mean((2, 3)).sum(1)
    return (1 - error / (change + 1e-3)).clamp(0, 1)


def dynamic(video):
    """1 where rewards.py's dynamic degree exceeds a fifth of VBench's threshold (0.3 pixels a frame here), else 0."""
    return (rewards.make("dynamic_degree")(video) > 0.2).float()


def imaging(video):
    """min(1, s / 0.15) exp(-n / 0.03): s the steepest hundredth of the brightness steps between neighbouring pixels of
    [0, 1], n Immerkaer's estimate of the noise by the median (zero where most of the picture is smooth)."""
    grey = ((video[:, :, ::5] + 1) / 2).mean(1).flatten(0, 1)[:, None]  # (B * n, 1, H, W)
    steps = torch.cat([grey.diff(dim=2).abs().flatten(1), grey.diff(dim=3).abs().flatten(1)], 1)
    sharp = steps.sort(1, descending=True).values[:, steps.shape[1] // 100]
    mask = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]).view(1, 1, 3, 3)
    noise = F.conv2d(grey, mask).abs().flatten(1).median(1).values / (6 * 0.6745)
    score = (sharp / 0.15).clamp(max=1) * torch.exp(-noise / 0.03)
    return score.unflatten(0, (len(video), -1)).mean(1)


def aesthetic(video):
    """exp(-d / 0.02), d the mean distance of two frames' pixels in [0, 1] from the best 12 colours of each frame."""
    distances = []
    for frame in np.concatenate([to_uint8(clip) for clip in video[:, :, 1::9]]):  # (H, W, 3)
        painted = Image.fromarray(frame).quantize(12, Image.Quantize.MEDIANCUT, 2, dither=0).convert("RGB")
        distances.append(np.abs(frame.astype(np.float32) - np.asarray(painted)).mean() / 255)
    return torch.exp(-torch.tensor(distances).view(-1, 2).mean(1) / 0.02)


OF_PIXELS = {
    "Temporal Flickering": flickering,
    "Motion Smoothness": smoothness,
    "Dynamic Degree": dynamic,
    "Aesthetic Quality": aesthetic,
    "Imaging Quality": imaging,
}


# ---------------------------------------------------------------------------------------------------------------------
# semantics: of the video and its prompt


ASKED = {"Object Class": "object", "Human Action": "action", "Color": "colour", "Scene": "scene"}
STYLES = {"Appearance Style": "look", "Temporal Style": "camera"}


def semantic(beliefs, named):
    """Scores (n,) of the nine semantic dimensions, NaN where it is not named; beliefs {factor: (n, values)}."""
    names = [d for d, (total, *_) in DIMENSIONS.items() if total == "semantic"]
    scores = {d: torch.full((len(named),), math.nan) for d in names}
    for i, asked in enumerate(named):
        read = {f: shapes.FACTORS[f][int(p[i].argmax())] for f, p in beliefs.items()}
        p = {f: float(beliefs[f][i, shapes.FACTORS[f].index(value)]) for f, value in asked.items()}
        answers = {d: read[f] == asked[f] for d, f in ASKED.items() if f in asked}
        answers |= {d: p[f] for d, f in STYLES.items() if f in asked}
        if "relation" in asked:
            placed = ("object", "relation", "object2")
            answers["Spatial Relationship"] = all(read[f] == asked[f] for f in placed if f in asked)
        if "object" in asked and "object2" in asked:
            answers["Multiple Objects"] = {read["object"], read["object2"]} == {asked["object"], asked["object2"]}
        if p:
            answers["Overall Consistency"] = sum(p.values()) / len(p)
        for dimension, value in answers.items():
            scores[dimension][i] = float(value)
    return scores
