"""VBench's sixteen dimensions in the small world, where the truth of a clip is known and each can be put to the test.

The semantic nine ask the judge for what the prompt names, as VBench asks its detectors and CLIPs; a prompt that does
not name it is not asked. The quality seven look at the video alone:

subject, background    the judge sees single frames, each as a clip that stands still; what it believes of object and
consistency            colour (of scene and look) must stay what it was in the first frame and in the one before
temporal flickering    a pixel flickers where it leaves the range of its neighbours in time; what moves past it, or a
                       light that comes on, does not
motion smoothness      how much of the change from frame to frame is motion: the middle frame of three is interpolated
                       along matched blocks, as VBench does by a network, and its error is held against the change
dynamic degree         share of videos whose most moving twentieth moves more than 0.3 pixels a frame
aesthetic quality      few and clean colours: how near the best twelve colours of a frame come to it. This world is
                       painted with few; what is half one thing and half another, or dirty, needs more
imaging quality        sharp edges (the steepest hundredth of a frame's steps), less the noise in its flat parts

Each raw score lies in 0..1; `RANGES` moves it as VBench's own table does, from what the worst corruption reaches to 1,
before the same three totals are made. `validate` spoils rendered clips on purpose, a little, more, much, and shows
that each dimension says so.
"""

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from evals.metrics import mean_error
from evals.vbench import DIMENSIONS
from world import shapes

RANGES = {name: (total, 0.0, 1.0, weight) for name, (total, _, _, weight) in DIMENSIONS.items()}
RANGES |= {  # total, about what the worst corruption of `validate` reaches, 1, weight
    "Subject Consistency": ("quality", 0.55, 1.0, 1.0),
    "Background Consistency": ("quality", 0.55, 1.0, 1.0),
    "Temporal Flickering": ("quality", 0.05, 1.0, 1.0),
    "Motion Smoothness": ("quality", 0.05, 1.0, 1.0),
    "Aesthetic Quality": ("quality", 0.1, 1.0, 1.0),
    "Imaging Quality": ("quality", 0.15, 1.0, 1.0),
}
STILLS = (1, 6, 10, 14)  # frames that are looked at one by one


# ---------------------------------------------------------------------------------------------------------------------
# quality: of the video alone


def quality(eye, video, wanted=()):
    """Raw scores {dimension: (B,)} in 0..1 of the quality dimensions (or those wanted); video (B, 3, F, H, W)."""
    video = video.float().cpu()
    scores = {d: f(video) for d, f in OF_PIXELS.items() if not wanted or d in wanted}
    if not wanted or len(scores) < len(wanted):
        stills = torch.stack([video[:, :, t : t + 1].expand_as(video) for t in STILLS], 1)  # (B, K, 3, F, H, W)
        seen = [eye(part)[0] for part in stills.flatten(0, 1).split(eye.batch)]
        beliefs = {f: torch.cat([s[f] for s in seen]).unflatten(0, (len(video), -1)) for f in seen[0]}  # (B, K, values)
        scores["Subject Consistency"] = steady(beliefs, ("object", "colour"))
        scores["Background Consistency"] = steady(beliefs, ("scene", "look"))
    return scores


def steady(beliefs, factors):
    """VBench's consistency of frames 1..K-1 with the first and the previous one; beliefs {factor: (B, K, values)}.

    The likeness of two beliefs is sum sqrt(p q): 1 for the same, 0 where they share nothing.
    """
    scores = []
    for factor in factors:
        root = beliefs[factor].sqrt()
        first, before = (root[:, 1:] * root[:, :1]).sum(2), (root[:, 1:] * root[:, :-1]).sum(2)
        scores.append((first + before).mean(1) / 2)
    return torch.stack(scores).mean(0)


def flickering(video):
    """exp(-d / 0.02), d the mean distance of pixels in [0, 1] from the range of their two neighbours in time."""
    x = (video + 1) / 2
    before, now, after = x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]
    low, high = torch.minimum(before, after), torch.maximum(before, after)
    outside = (now - high).clamp(min=0) + (low - now).clamp(min=0)
    return torch.exp(-outside.mean((1, 2, 3, 4)) / 0.02)


def frames_at(video, start, stop, step):
    """Brightness of frames [start:stop:step], (B * n, 1, H, W) in [0, 1], a little blurred: edges match roughly."""
    x = (video[:, :, start:stop:step].mean(1).flatten(0, 1)[:, None] + 1) / 2
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def shifted(x, dy, dx, reach):
    """x, padded by `reach` on all sides, moved by (dy, dx)."""
    height, width = x.shape[2] - 2 * reach, x.shape[3] - 2 * reach
    return x[:, :, reach + dy : reach + dy + height, reach + dx : reach + dx + width]


def around(x, reach=2):
    """Mean of x (N, 1, H, W) over 5x5 neighbours, zero outside; by shifts and sums, 9 times as fast as pooling here."""
    for dim, pad in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
        size, padded = x.shape[dim], F.pad(x, pad)
        x = sum(padded.narrow(dim, i, size) for i in range(2 * reach + 1)) / (2 * reach + 1)
    return x


def match(a, b, reach, keep, apart):
    """Block matching of pictures a and b (N, 1, H, W): for every place the way (dy, dx) on which they agree best.

    apart(d): how a way d is shared between a and b. -> of keep(a moved, b moved, dy, dx), (N, 1, H, W), what belongs
    to the best way at every place. Long ways cost a trace more, so that flat parts stand still.
    """
    a, b = (F.pad(x, (reach,) * 4, mode="replicate") for x in (a, b))
    best = kept = None
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            (ay, by), (ax, bx) = apart(dy), apart(dx)
            left, right = shifted(a, ay, ax, reach), shifted(b, by, bx, reach)
            cost = around((left - right).abs()) + 0.002 * math.hypot(dy, dx)
            value = keep(left, right, dy, dx)
            if best is None:
                best, kept = cost, value
            else:
                kept, best = torch.where(cost < best, value, kept), torch.minimum(cost, best)
    return kept


def smoothness(video, reach=3):
    """1 - error / change, 0..1: error of the frame between two others interpolated along matched blocks, over its mean
    difference from the two. What motion does not explain (jumps, swapped frames, noise) is error."""
    before, now, after = frames_at(video, 0, -2, 2), frames_at(video, 1, -1, 2), frames_at(video, 2, None, 2)
    error = match(before, after, reach, lambda x, y, *_: ((x + y) / 2 - now).abs(), lambda d: (d, -d))
    total = lambda x: x.flatten(1).mean(1).unflatten(0, (len(video), -1)).sum(1)
    change = total((before - now).abs() + (after - now).abs()) / 2
    return (1 - total(error) / (change + 1e-3)).clamp(0, 1)


def motion(video, reach=5, stride=4):
    """Pixels a frame of the most moving twentieth of the picture, by blocks matched over `stride` frames."""
    a, b = frames_at(video, 0, -stride, stride), frames_at(video, stride, None, stride)
    flow = match(a, b, reach, lambda x, _, dy, dx: torch.full_like(x, math.hypot(dy, dx)), lambda d: (d, 0))
    flow = flow[:, :, reach:-reach, reach:-reach]  # at the border what moved in has no counterpart
    flow = flow.flatten(1).sort(1, descending=True).values  # (B * n, places)
    return flow[:, : flow.shape[1] // 20].mean(1).unflatten(0, (len(video), -1)).mean(1) / stride


def imaging(video):
    """min(1, s / 0.15) exp(-n / 0.03): s the steepest hundredth of the brightness steps between neighbouring pixels of
    [0, 1], n Immerkaer's estimate of the noise by the median (zero where most of the picture is smooth)."""
    grey = ((video[:, :, ::5].transpose(1, 2).flatten(0, 1) + 1) / 2).mean(1, keepdim=True)  # (B * n, 1, H, W)
    steps = torch.cat([grey.diff(dim=2).abs().flatten(1), grey.diff(dim=3).abs().flatten(1)], 1)
    sharp = steps.sort(1, descending=True).values[:, steps.shape[1] // 100]
    mask = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]).view(1, 1, 3, 3)
    noise = F.conv2d(grey, mask).abs().flatten(1).median(1).values / (6 * 0.6745)
    score = (sharp / 0.15).clamp(max=1) * torch.exp(-noise / 0.03)
    return score.unflatten(0, (len(video), -1)).mean(1)


def aesthetic(video):
    """exp(-d / 0.02), d the mean distance of two frames' pixels in [0, 1] from the best 12 colours of each frame."""
    out = []
    for clip in to_bytes(video[:, :, 1::9]):
        images = [Image.fromarray(picture) for picture in clip]
        drawn = [
            np.asarray(image.quantize(12, Image.Quantize.MEDIANCUT, 2, dither=0).convert("RGB")) for image in images
        ]
        out.append(np.abs(clip.astype(np.float32) - np.stack(drawn)).mean() / 255)
    return torch.exp(-torch.tensor(out) / 0.02)


def to_bytes(video):
    """(B, 3, F, H, W) in [-1, 1] to uint8 (B, F, H, W, 3)."""
    return ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()


OF_PIXELS = {
    "Temporal Flickering": flickering,
    "Motion Smoothness": smoothness,
    "Dynamic Degree": lambda video: (motion(video) > 0.3).float(),
    "Aesthetic Quality": aesthetic,
    "Imaging Quality": imaging,
}


# ---------------------------------------------------------------------------------------------------------------------
# semantics: of the video and its prompt


def semantic(beliefs, named):
    """Scores (n,) of the nine semantic dimensions, NaN where it is not named; beliefs {factor: (n, values)}."""
    names = [d for d, (total, *_) in DIMENSIONS.items() if total == "semantic"]
    scores = {d: torch.full((len(named),), math.nan) for d in names}
    for i, asked in enumerate(named):
        read = {f: shapes.FACTORS[f][int(p[i].argmax())] for f, p in beliefs.items()}
        p = {f: float(beliefs[f][i, shapes.FACTORS[f].index(v)]) for f, v in asked.items()}
        answers = {d: read[f] == asked[f] for d, f in ASKED.items() if f in asked}
        answers |= {d: p[f] for d, f in STYLES.items() if f in p}
        if "relation" in asked:
            answers["Spatial Relationship"] = all(read[f] == asked[f] for f in PLACED if f in asked)
            if "object" in asked and "object2" in asked:
                both = {"object", "object2"}
                answers["Multiple Objects"] = {read[f] for f in both} == {asked[f] for f in both}
        if p:
            answers["Overall Consistency"] = sum(p.values()) / len(p)
        for dimension, value in answers.items():
            scores[dimension][i] = float(value)
    return scores


ASKED = {"Object Class": "object", "Human Action": "action", "Color": "colour", "Scene": "scene"}
PLACED = ("object", "relation", "object2")
STYLES = {"Appearance Style": "look", "Temporal Style": "camera"}


# ---------------------------------------------------------------------------------------------------------------------
# validation: rendered clips, spoilt on purpose


def render(clips):
    return shapes.render_batch(clips)


def other(clip, factor, rng):
    """The clip with another value of one factor, such as can be seen."""
    values = [v for v in shapes.FACTORS[factor] if v != getattr(clip, factor)]
    still_turns = lambda name: not (name in shapes.ROUND and clip.action == "spins")
    if factor == "colour":
        values = [v for v in values if v not in shapes.SCENE_COLOURS[clip.scene] and v != clip.colour2]
    elif factor == "scene":
        values = [v for v in values if not {clip.colour, clip.colour2} & shapes.SCENE_COLOURS[v]] or values
    elif factor == "object":
        values = [v for v in values if v != clip.object2 and still_turns(v)]
    elif factor == "action":
        values = [v for v in values if v != "spins" or not {clip.object, clip.object2} & shapes.ROUND]
        values = [v for v in values if not clip.relation or v in ("grows", "shrinks", "still")]
    changed = replace(clip, **{factor: rng.choice(values)}) if values else clip
    if changed.look == "monochrome":  # in which no colour may melt into its scene
        grey = shapes.MONOCHROME.get(changed.scene, "white")
        changed = replace(changed, colour=grey, colour2=clip.colour2 and grey)
    return changed


def exchanged(clip, _):
    """The clip of a pair with its objects in each other's place."""
    first = {"object": clip.object2, "colour": clip.colour2, "object2": clip.object, "colour2": clip.colour}
    return replace(clip, **first) if clip.relation else clip


def alone(clip, _):
    return replace(clip, relation=None, object2=None, colour2=None)


def wrong(change):
    """A corruption that shows through the clip more and more: what `change(clip, rng)` makes of it."""

    def spoil(clips, degree, rng):
        return torch.lerp(render(clips), render([change(clip, rng) for clip in clips]), degree)

    return spoil


def swapped(*factors):
    """From the last quarter, half, or in every second quarter on, some factors have other values."""

    def spoil(clips, degree, rng):
        video, changed = render(clips), clips
        for factor in factors:
            changed = [other(clip, factor, rng) for clip in changed]
        quarters = {1: (3,), 2: (2, 3), 3: (1, 3)}[degree]
        for q in quarters:
            video[:, :, 4 * q : 4 * q + 4] = render(changed)[:, :, 4 * q : 4 * q + 4]
        return video

    return spoil


def filtered(act):
    """A corruption of the pixels: act(video, degree, generator)."""
    return lambda clips, degree, rng: act(render(clips), degree, torch.Generator().manual_seed(rng.getrandbits(31)))


def flicker(video, degree, noise):
    return (video + degree * torch.randn(len(video), 1, video.shape[2], 1, 1, generator=noise)).clamp(-1, 1)


def grain(video, degree, noise):
    return (video + degree * torch.randn(video.shape, generator=noise)).clamp(-1, 1)


def blur(video, degree, _):
    reach = math.ceil(3 * degree)
    weight = torch.exp(-((torch.arange(-reach, reach + 1) / degree) ** 2) / 2)
    weight = (weight / weight.sum()).view(1, 1, 1, -1)
    x = F.pad(video.flatten(0, 2)[:, None], (reach,) * 4, mode="replicate")  # (B * 3 * F, 1, H, W)
    return F.conv2d(F.conv2d(x, weight), weight.transpose(2, 3)).view(video.shape)


def shuffle(video, degree, noise):
    """A share of the frames, at random, exchange their places."""
    order = torch.arange(video.shape[2])
    some = torch.randperm(len(order), generator=noise)[: round(degree * len(order))]
    order[some.sort().values] = some[torch.randperm(len(some), generator=noise)]
    return video[:, :, order]


def jerk(video, degree, noise):
    """A share of the frames is dropped, and the frame before stands still in their place."""
    frames = video.shape[2]
    dropped = set((torch.randperm(frames - 1, generator=noise)[: round(degree * frames)] + 1).tolist())
    when = list(range(frames))
    for t in range(1, frames):
        when[t] = when[t - 1] if t in dropped else t
    return video[:, :, when]


def slow(video, degree, _):
    """Motion at 1 - degree of its speed."""
    return video[:, :, (torch.arange(video.shape[2]) * (1 - degree)).long()]


def ghost(clips, degree, rng):
    """Another clip shines through."""
    strangers = [shapes.Clip.make(rng.getrandbits(31), i) for i in range(len(clips))]
    return torch.lerp(render(clips), render(strangers), degree)


SPOIL = {  # dimension: [(what is done, how, degrees)]
    "Subject Consistency": [("another object midway", swapped("object", "colour"), (1, 2, 3))],
    "Background Consistency": [("another scene midway", swapped("scene"), (1, 2, 3))],
    "Temporal Flickering": [
        ("flickering light", filtered(flicker), (0.05, 0.1, 0.2)),
        ("noise", filtered(grain), (0.05, 0.1, 0.2)),
    ],
    "Motion Smoothness": [
        ("frames shuffled", filtered(shuffle), (0.25, 0.5, 1.0)),
        ("frames held and dropped", filtered(jerk), (0.1, 0.3, 0.6)),
    ],
    "Aesthetic Quality": [
        ("another clip shining through", ghost, (0.15, 0.3, 0.5)),
        ("noise", filtered(grain), (0.05, 0.1, 0.2)),
    ],
    "Imaging Quality": [
        ("blur", filtered(blur), (0.7, 1.2, 2.0)),
        ("noise", filtered(grain), (0.05, 0.1, 0.2)),
    ],
    "Dynamic Degree": [("slowed down, frozen", filtered(slow), (0.8, 0.9, 1.0))],
    "Multiple Objects": [("second object missing", wrong(alone), (1 / 3, 2 / 3, 1.0))],
    "Spatial Relationship": [("sides swapped", wrong(exchanged), (1 / 3, 2 / 3, 1.0))],
    "Overall Consistency": [("another prompt's clip", ghost, (0.3, 0.6, 1.0))],
}
for _dimension, _factor in (ASKED | STYLES).items():
    _change = lambda clip, rng, f=_factor: other(clip, f, rng)
    SPOIL[_dimension] = [(f"another {_factor}", wrong(_change), (1 / 3, 2 / 3, 1.0))]


def measure(eye, clips, named, dimension, spoil=None, degree=0.0, seed=0):
    """Raw scores (n,) of one dimension over rendered clips, spoilt to some degree or as they are."""
    scores = []
    for i in range(0, len(clips), eye.batch):
        some = clips[i : i + eye.batch]
        video = spoil(some, degree, random.Random(f"spoil {seed} {i}")) if spoil else render(some)
        if DIMENSIONS[dimension][0] == "quality":
            scores.append(quality(eye, video, (dimension,))[dimension])
        else:
            scores.append(semantic(eye(video)[0], named[i : i + eye.batch])[dimension])
    return torch.cat(scores).double()


def validate(eye, n=96, seed=0, wanted=tuple(DIMENSIONS)):
    """Every dimension on rendered clips and on each corruption made for it: rows for the table, one a corruption.

    "apart": the strongest corruption is below the truth by more than 3 standard errors and by 5 points; "ordered": no
    degree is above a weaker one, or above the truth, by more than 2 standard errors. Errors are those of differences on
    the same clips.
    """
    clips, rows = [shapes.Clip.make(shapes.HELD_OUT + 3, i) for i in range(8 * n)], []
    pairs, singles = ([c for c in clips if bool(c.relation) == two] for two in (True, False))
    clips = pairs[: n // 2] + singles[: n - n // 2]
    named = [clip.visible() for clip in clips]
    for dimension in tqdm(wanted, desc="validation", dynamic_ncols=True, leave=False):
        truth = measure(eye, clips, named, dimension)
        for what, spoil, degrees in SPOIL[dimension]:
            scores = [truth, *(measure(eye, clips, named, dimension, spoil, d, seed) for d in degrees)]
            falls = [mean_error(weak - strong) for weak, strong in itertools.combinations(scores, 2)]
            whole = mean_error(scores[0] - scores[-1])
            row = {"dimension": dimension, "corruption": what, "truth": mean_error(truth)}
            row |= {
                "degrees": [mean_error(s) for s in scores[1:]],
                "apart": whole["mean"] > max(3 * whole["error"], 0.05),
                "ordered": all(fall["mean"] >= -2 * fall["error"] for fall in falls),
            }
            rows.append(row)
    return rows
