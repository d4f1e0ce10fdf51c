"""The sixteen dimensions of the small world: closed forms, and rendered clips spoilt on purpose.

Each dimension must fall where a clip is spoilt in what it measures, the more the worse. `pytest` asks this of all of
them, `pytest -m "not slow"` of those that look at pixels and of three that ask the judge.
"""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import beliefs_of

from evals.metrics import mean_error
from evals.vbench import DIMENSIONS
from world import dimensions, reading, shapes
from world.dimensions import ASKED, OF_PIXELS, STYLES
from world.shapes import render_batch

JUDGE = Path(__file__).parents[1] / "weights/judge.safetensors"


def test_spatial_relationship_asks_for_the_objects_and_their_places():
    asked = {"object": "star", "relation": "left", "object2": "ring"}

    def score(asked, **read):
        beliefs = beliefs_of([shapes.Clip.make(0, 0)])
        for factor, value in read.items():
            beliefs[factor] = torch.eye(len(shapes.FACTORS[factor]))[[shapes.FACTORS[factor].index(value)]]
        return dimensions.semantic(beliefs, [asked])["Spatial Relationship"].item()

    assert score(asked, **asked) == 1
    assert score(asked, object="ring", relation="left", object2="star") == 0
    assert score(asked, object="star", relation="above", object2="ring") == 0
    assert score(asked, object="star", relation="left", object2="heart") == 0
    assert score({"relation": "left"}, object="cross", relation="left", object2="ring") == 1


def test_semantic_dimensions_of_a_perfect_judge():
    clips = [shapes.Clip.make(5, i) for i in range(30)]
    named = [clip.visible() for clip in clips]
    scores = dimensions.semantic(beliefs_of(clips), named)
    assert list(scores) == [d for d, (total, *_) in DIMENSIONS.items() if total == "semantic"]
    for dimension, values in scores.items():
        good = 0.9 if dimension in ("Appearance Style", "Temporal Style", "Overall Consistency") else 1.0
        assert values[~values.isnan()].tolist() == pytest.approx([good] * int((~values.isnan()).sum()))
    assert scores["Multiple Objects"].isnan().tolist() == [clip.relation is None for clip in clips]
    swapped = [exchanged(clip, None) for clip in clips]
    scores = dimensions.semantic(beliefs_of(swapped), named)
    assert mean_error(scores["Spatial Relationship"])["mean"] == 0
    assert mean_error(scores["Multiple Objects"])["mean"] == 1


def test_steadiness_in_closed_form():
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    steady = lambda *frames: float(dimensions.steady({"object": torch.stack(frames)[None]}, ("object",)))
    assert steady(p, p, p, p) == 1
    assert steady(p, p, p, q) == pytest.approx(2 / 3)  # the last of three is like neither the first nor the one before
    assert steady(p, q, q, q) == pytest.approx((0 + 1 / 2 + 1 / 2) / 3)


def test_pixel_measures_in_closed_form():
    still = torch.zeros(1, 3, 16, 64, 64)
    assert dimensions.flickering(still) == 1 and dimensions.dynamic(still) == 0
    blink = still.clone()
    blink[:, :, ::2] = 0.02  # 0.01 of the range outside it at every frame
    assert float(dimensions.flickering(blink)) == pytest.approx(math.exp(-0.5), rel=1e-4)
    ramp = torch.linspace(-1, 1, 16).view(1, 1, 16, 1, 1).expand_as(still)
    assert dimensions.flickering(ramp) == 1  # a light that comes on does not flicker
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pan = torch.stack([picture[:, :, :, t : t + 64] for t in range(16)], 2)
    assert dimensions.dynamic(pan) == 1
    assert float(dimensions.smoothness(pan)) > 0.85


def test_what_can_be_seen_of_every_corruption():
    """Another value of a factor is another one, and one that can be seen."""
    for i in range(60):
        clip, rng = shapes.Clip.make(7, i), random.Random(i)
        for factor in ("object", "colour", "scene", "look", "camera", "action"):
            changed = other(clip, factor, rng)
            same = {f for f in ("object", "colour", "scene", "look", "camera", "action") if f != factor}
            grey = {"colour"} if "monochrome" in (changed.look, clip.look) else set()  # which has one colour a scene
            assert all(getattr(changed, f) == getattr(clip, f) for f in same - grey)
            if changed.look != "monochrome" and clip.look != "monochrome":
                assert changed.colour not in shapes.SCENE_COLOURS[changed.scene] or factor == "scene"


# ---------------------------------------------------------------------------------------------------------------------
# rendered clips, spoilt on purpose


def other(clip, factor, rng):
    """The clip with another value of one factor, such as can be seen."""
    values = [v for v in shapes.FACTORS[factor] if v != getattr(clip, factor)]
    if factor == "colour":
        values = [v for v in values if v not in shapes.SCENE_COLOURS[clip.scene] and v != clip.colour2]
    elif factor == "scene":
        values = [v for v in values if not {clip.colour, clip.colour2} & shapes.SCENE_COLOURS[v]] or values
    elif factor == "object":
        values = [v for v in values if v != clip.object2]
    elif factor == "action":
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
        return torch.lerp(render_batch(clips), render_batch([change(clip, rng) for clip in clips]), degree)

    return spoil


def swapped(*factors):
    """From the last quarter, half, or in every second quarter on, some factors have other values."""

    def spoil(clips, degree, rng):
        video, changed = render_batch(clips), clips
        for factor in factors:
            changed = [other(clip, factor, rng) for clip in changed]
        quarters = {1: (3,), 2: (2, 3), 3: (1, 3)}[degree]
        for q in quarters:
            video[:, :, 4 * q : 4 * q + 4] = render_batch(changed)[:, :, 4 * q : 4 * q + 4]
        return video

    return spoil


def filtered(act):
    """A corruption of the pixels: act(video, degree, generator)."""
    return lambda clips, degree, rng: act(
        render_batch(clips), degree, torch.Generator().manual_seed(rng.getrandbits(31))
    )


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
    return torch.lerp(render_batch(clips), render_batch(strangers), degree)


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


def raw_scores(judge, clips, dimension, spoil=None, degree=0.0):
    """Raw scores (n,) of one dimension over rendered clips, spoilt to some degree or as they are."""
    video = spoil(clips, degree, random.Random("spoil")) if spoil else render_batch(clips)
    if dimension in OF_PIXELS:
        scores = OF_PIXELS[dimension](video)
    elif DIMENSIONS[dimension][0] == "quality":
        scores = dimensions.consistency(judge, video)[dimension]
    else:
        scores = dimensions.semantic(judge(video)[0], [clip.visible() for clip in clips])[dimension]
    return scores.double()


CHEAP = {*OF_PIXELS, "Subject Consistency", "Color", "Human Action"}
CASES = [
    pytest.param(dimension, what, spoil, degrees, marks=[] if dimension in CHEAP else pytest.mark.slow)
    for dimension, cases in SPOIL.items()
    for what, spoil, degrees in cases
]


@pytest.mark.skipif(not JUDGE.exists(), reason="there is no bundled judge")
@pytest.mark.parametrize("dimension, what, spoil, degrees", CASES)
def test_every_dimension_sees_what_is_spoilt(dimension, what, spoil, degrees):
    """The strongest corruption is below the truth by more than 3 standard errors and by 5 points; no degree is above a
    weaker one, or above the truth, by more than 2 standard errors. Errors are those of differences on the same clips.
    """
    n, clips = 16, [shapes.Clip.make(shapes.HELD_OUT + 3, i) for i in range(128)]
    pairs, singles = ([c for c in clips if bool(c.relation) == two] for two in (True, False))
    clips, judge = pairs[: n // 2] + singles[: n // 2], reading.Evaluator(JUDGE)
    scores = [raw_scores(judge, clips, dimension)]
    scores += [raw_scores(judge, clips, dimension, spoil, degree) for degree in degrees]
    for weak, strong in itertools.combinations(scores, 2):
        fall = mean_error(weak - strong)
        assert fall["mean"] >= -2 * fall["error"]
    fall = mean_error(scores[0] - scores[-1])
    assert fall["mean"] > max(3 * fall["error"], 0.05)


def test_all_sixteen_are_spoilt():
    assert SPOIL.keys() == DIMENSIONS.keys()
