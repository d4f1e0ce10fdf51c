"""The shapes world: what a caption says is what is drawn, and nothing is said that cannot be seen."""

import math
import random

import pytest
import torch

import shapes
from shapes import COLOURS, FACTORS, Clip, caption, parse, render

CLIPS = [Clip.make(7, i) for i in range(400)]


def plain(**fixed):
    """A clip without camera and look, so that its pixels can be measured."""
    return Clip.make(3, 0, camera="static", look="plain", relation=None, **fixed)


def centre(mask):
    """Centre of the objects in every frame, in pixels from the middle of the picture: x, y (F,)."""
    axis = torch.arange(shapes.SIZE) - (shapes.SIZE - 1) / 2
    weight = mask[0].sum((1, 2))
    return (mask[0] * axis).sum((1, 2)) / weight, (mask[0] * axis[:, None]).sum((1, 2)) / weight


def test_a_clip_follows_from_seed_and_index_alone():
    assert Clip.make(1, 2) == Clip.make(1, 2) != Clip.make(1, 3)
    assert torch.equal(render(CLIPS[0])[0], render(Clip.make(7, 0))[0])


def test_pixels_are_in_range_and_one_frame_is_that_frame():
    for clip in CLIPS[:20]:
        video, mask = render(clip)
        assert video.shape == (3, 16, 64, 64) and mask.shape == (1, 16, 64, 64)
        assert video.min() >= -1 and video.max() <= 1 and mask.max() == 1
        for frame in (0, 9):
            still, _ = render(clip, frame)
            torch.testing.assert_close(still[:, 0], video[:, frame], atol=1e-6, rtol=0)


@pytest.mark.parametrize("action, dx, dy", [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1)])
def test_moves_go_where_they_say(action, dx, dy):
    x, y = centre(render(plain(action=action, object="circle"))[1])
    assert (x[-1] - x[0]).sign() == dx or (dx == 0 and abs(x[-1] - x[0]) < 0.5)
    assert (y[-1] - y[0]).sign() == dy or (dy == 0 and abs(y[-1] - y[0]) < 0.5)


def test_grows_shrinks_and_still():
    area = {a: render(plain(action=a, object="square"))[1].sum((0, 2, 3)) for a in ("grows", "shrinks", "still")}
    assert area["grows"][-1] > 3 * area["grows"][0] and area["shrinks"][0] > 3 * area["shrinks"][-1]
    assert area["still"].std() == 0


def test_spinning_turns_less_than_the_object_repeats():
    """A star looks the same after 72 degrees: turning by more than half of that a frame, it would seem to turn back."""
    *_, angle = shapes._path(plain(action="spins", object="star"), torch.linspace(0, 1, 16))
    assert angle.abs().max() > 1.5 and angle.diff().abs().max() < math.pi / 5


def test_relations_hold_in_every_frame():
    for clip in (c for c in CLIPS if c.relation):
        alone = render(Clip(**clip.to_dict() | {"object2": None}))[1]
        x, y = centre(alone)
        gap = {"left": clip.x2 - x, "right": x - clip.x2, "above": clip.y2 - y, "below": y - clip.y2}[clip.relation]
        side = (clip.y2 - y) if clip.relation in ("left", "right") else (clip.x2 - x)
        assert (gap > side.abs()).all()


def test_object_has_its_colour():
    for name, rgb in COLOURS.items():
        clip = plain(colour=name, action="still")
        video, mask = render(clip)
        inside = (video[:, 0] / 2 + 0.5)[:, mask[0, 0] == 1].mean(1)
        torch.testing.assert_close(inside, torch.tensor(rgb), atol=0.01, rtol=0)


def test_nothing_unseen_is_named():
    for clip in CLIPS:
        seen = clip.visible()
        assert not (clip.object in ("circle", "ring") and clip.action == "spins")
        assert clip.colour not in shapes.SCENE_COLOURS[clip.scene] or clip.look == "black and white"
        assert clip.look != "black and white" or "colour" not in seen
        assert (clip.relation is None) == (clip.object2 is None) == (clip.colour2 is None)
        assert [i >= 0 for i in clip.truth()] == [f in seen for f in FACTORS]


def test_camera_moves_the_scene_behind_the_object():
    base = Clip.make(3, 0, camera="static", scene="night", action="still")
    first = render(base)[0]
    for camera in list(shapes.CAMERAS)[1:]:
        moved = render(Clip(**base.to_dict() | {"camera": camera}))[0]
        assert (moved[:, -1] - moved[:, 0]).abs().mean() > 0.05
        assert torch.equal(first[:, -1], first[:, 0])


@pytest.mark.parametrize("style", ["short", "long", "object", "train"])
def test_captions_parse_back_and_fit_the_word_table(style):
    for i, clip in enumerate(CLIPS):
        words, names = caption(clip, style, random.Random(i))
        assert parse(words) == names and len(words.split()) <= 32
        assert set(words.split()) <= set(shapes.WORDS)
        assert all(clip.visible()[factor] == value for factor, value in names.items())


def test_what_each_style_names():
    for clip in CLIPS:
        names = {style: set(caption(clip, style)[1]) for style in ("object", "short", "long")}
        assert names["object"] == {"object"} < names["short"] < names["long"] == set(clip.visible())


def test_parse_keeps_the_two_objects_apart():
    named = parse("A large red ring drifts from right to left, above a blue star before a brick wall pan left.")
    assert named == {
        "size": "large", "colour": "red", "object": "ring", "action": "left", "relation": "above",
        "colour2": "blue", "object2": "star", "scene": "bricks", "camera": "pan left",
    }  # fmt: skip
    assert parse("") == parse("something else") == {}


def test_every_value_of_every_factor_occurs():
    for factor, values in FACTORS.items():
        assert {getattr(c, factor) for c in CLIPS} >= set(values)


def test_impossible_clip_is_refused():
    with pytest.raises(ValueError, match="no clip"):
        Clip.make(0, 0, object="circle", action="spins")
