"""The shapes world: what is said is drawn, nothing is said that cannot be seen, nothing has a free place."""

import random
from dataclasses import replace

import pytest
import torch

from world import shapes
from world.shapes import COLOURS, FACTORS, Clip, caption, parse

CLIPS = [Clip.make(7, i) for i in range(400)]


def plain(**fixed):
    """A clip without camera and look, so that its pixels can be measured."""
    return Clip.make(3, 0, camera="static", look="plain", **({"relation": None} | fixed))


def render(clip, frame=None):
    """Pixels (3, F, H, W) and mask (1, F, H, W) of one clip."""
    video, mask = shapes.render([clip], frame)
    return video[0], mask[0]


def centre(mask):
    """Centre of the objects in every frame, in pixels from the middle of the picture: x, y (F,)."""
    axis = torch.arange(shapes.SIZE) - (shapes.SIZE - 1) / 2
    weight = mask[0].sum((1, 2))
    return (mask[0] * axis).sum((1, 2)) / weight, (mask[0] * axis[:, None]).sum((1, 2)) / weight


def test_a_clip_follows_from_seed_and_index_alone():
    assert Clip.make(1, 2) == Clip.make(1, 2) != Clip.make(1, 3)


def test_clips_drawn_together_are_those_drawn_alone():
    video, mask = shapes.render(CLIPS[:40])
    assert video.shape == (40, 3, 16, 64, 64) and mask.shape == (40, 1, 16, 64, 64)
    assert video.min() >= -1 and video.max() <= 1 and mask.max() == 1 and mask.min() == 0
    for i in range(0, 40, 5):
        alone, its_mask = render(CLIPS[i])
        torch.testing.assert_close(alone, video[i], atol=1e-6, rtol=0)
        torch.testing.assert_close(its_mask, mask[i], atol=1e-6, rtol=0)
        for frame in (0, 9):
            torch.testing.assert_close(render(CLIPS[i], frame)[0][:, 0], video[i, :, frame], atol=1e-5, rtol=0)


@pytest.mark.parametrize("action, dx, dy", [("left", -1, 0), ("right", 1, 0), ("up", 0, -1), ("down", 0, 1)])
def test_moves_go_where_they_say(action, dx, dy):
    x, y = centre(render(plain(action=action, object="circle"))[1])
    torch.testing.assert_close(
        torch.stack([x[-1] - x[0], y[-1] - y[0]]), 24.0 * torch.tensor([dx, dy]), atol=0.7, rtol=0
    )


def test_every_path_passes_the_centre_and_follows_from_the_action():
    """Nothing has a free place: all clips of an action show the same mask, up to object and size."""
    for action in shapes.ACTIONS:
        some = [Clip.make(5, i, action=action, relation=None) for i in range(3)]
        alike = [replace(c, object="square", size=None if action in ("grows", "shrinks") else "small") for c in some]
        masks = shapes.render(alike)[1]
        assert (masks == masks[:1]).all()
        x, y = centre(masks[0][:, 7:9].mean(1, keepdim=True))
        assert abs(x) < 0.5 and abs(y) < 0.5


def test_grows_shrinks_and_still():
    area = {a: render(plain(action=a, object="square"))[1].sum((0, 2, 3)) for a in ("grows", "shrinks", "still")}
    assert area["grows"][-1] > 3 * area["grows"][0] and area["shrinks"][0] > 3 * area["shrinks"][-1]
    assert area["still"].std() == 0


def test_springing_goes_up_to_the_centre_and_falls_back():
    """As what is thrown: one height at either end, the velocity changed by the same amount in every frame."""
    right, down, drop, _, growth = shapes.path(plain(action="springs", object="star"))
    time = torch.linspace(-0.5, 0.5, 16)
    y = down * time + 2 * drop * time**2
    torch.testing.assert_close(y, y.flip(0))
    torch.testing.assert_close(y.diff().diff(), torch.full((14,), 2 * 48 / 15**2), atol=1e-4, rtol=0)
    assert y[0] == 12 and y.min() > 0 and right == growth == 0


@pytest.mark.parametrize("relation", list(shapes.RELATIONS))
@pytest.mark.parametrize("action", ["grows", "shrinks", "still", "up", "down", "springs", "left", "right"])
def test_relations_hold_in_every_frame(relation, action):
    """The first object is the left or the upper one, and the two hardly ever touch."""
    if (relation == "left") == (action in ("left", "right")) and action not in ("grows", "shrinks", "still"):
        pytest.skip("no pair moves along the line between its objects")
    pair = {"relation": relation, "object": "circle", "object2": "square", "colour2": "red", "size": None}
    clip = replace(plain(), action=action, **pair)
    mask = render(clip)[1][0]  # (F, H, W)
    mask = mask if relation == "left" else mask.transpose(1, 2)
    first, second = mask[:, :, :32], mask[:, :, 32:]
    assert (mask[:, :, 31:33].mean((1, 2)) < 0.02).all() and (first.sum((1, 2)) > 50).all()
    assert (second.sum((1, 2)) > 50).all()
    corner = lambda half: (half > 0.99).any(1).float().sum(1) * (half > 0.99).any(2).float().sum(1)
    fill = [(half > 0.99).sum((1, 2)) / corner(half) for half in (first, second)]  # of the box around each
    assert (fill[0] < 0.9).all() and (fill[1] > 0.95).all()  # a circle on this side, a square on that


def test_object_has_its_colour():
    for name, rgb in COLOURS.items():
        video, mask = render(plain(colour=name, action="still", object="square"))
        inside = (video[:, 0] / 2 + 0.5)[:, mask[0, 0] == 1].mean(1)
        torch.testing.assert_close(inside, torch.tensor(rgb), atol=0.01, rtol=0)


def test_nothing_unseen_is_named():
    for clip in CLIPS:
        seen = clip.visible()
        assert clip.colour not in shapes.SCENE_COLOURS[clip.scene] or clip.look == "monochrome"
        assert clip.look != "monochrome" or not {"colour", "colour2"} & set(seen)
        assert (clip.relation is None) == (clip.object2 is None) == (clip.colour2 is None)
        along = {"left": ("left", "right"), "above": ("up", "down", "springs")}  # the line between the two of a pair
        assert clip.action not in along.get(clip.relation, ())
        assert (clip.size is None) == (clip.relation is not None or clip.action in ("grows", "shrinks"))
        assert [i >= 0 for i in clip.truth()] == [f in seen for f in FACTORS]
        assert set(clip.visible(still=True)) == set(seen) - {"action", "camera"}


def test_an_object_stands_out_from_its_scene():
    """In every look, in the middle of its outline's inside against the pixels just outside: 0.15 of the range."""
    for clip in CLIPS[:150]:
        video, mask = render(clip, shapes.MIDDLE)
        light = (video.mean(0) / 2 + 0.5)[0] if clip.look == "monochrome" else (video / 2 + 0.5)[:, 0]
        inside, outside = mask[0, 0] == 1, mask[0, 0] == 0
        gap = (light[..., inside].mean(-1) - light[..., outside].mean(-1)).abs().max()
        assert gap > 0.15, (clip, gap)


def test_monochrome_is_grey_and_neon_is_dark():
    clip = plain(scene="desert", action="still")
    looks = {look: render(replace(clip, look=look))[0] for look in shapes.LOOKS}
    assert (looks["monochrome"].diff(dim=0).abs() < 1e-5).all() and looks["plain"].diff(dim=0).abs().max() > 0.2
    assert looks["neon"].mean() < looks["plain"].mean() - 0.3


def test_a_neon_object_glows_beyond_its_outline():
    clip = plain(scene="night", action="still", object="square", colour="red")
    video, mask = render(replace(clip, look="neon"))
    red, outside = video[0, 0], mask[0, 0] == 0
    near = torch.nn.functional.max_pool2d(mask[0, :1], 5, 1, 2)[0] > 0.5
    assert red[outside & near].min() > red[outside & ~near].median() + 0.2


def test_the_camera_moves_the_scene_and_nothing_else():
    base = plain(scene="night", action="still", object="square")
    first, mask = render(base)
    assert torch.equal(first[:, -1], first[:, 0])
    for camera in list(shapes.CAMERAS)[1:]:
        moved, its_mask = render(replace(base, camera=camera))
        assert (moved[:, -1] - moved[:, 4]).abs().mean() > 0.05 and torch.equal(its_mask, mask)
    # one pixel a frame and more: a star that stands at the left moves to the right where the camera pans left
    pan = render(replace(base, camera="pan left"))[0]
    left, right = pan[:, 6, :, 2:-2], pan[:, 7, :, 2:-2]
    error = {shift: (left.roll(shift, -1) - right)[..., 8:12, 4:-4].abs().mean() for shift in (-2, 0, 2)}
    assert error[2] < error[0] and error[2] < error[-2]


@pytest.mark.parametrize("style", ["short", "long", "object", "train"])
@pytest.mark.parametrize("still", [False, True])
def test_captions_parse_back_and_fit_the_word_table(style, still):
    for i, clip in enumerate(CLIPS):
        words, names = caption(clip, style, random.Random(i), still)
        assert parse(words) == names and len(words.split()) <= 20
        assert set(words.split()) <= set(shapes.WORDS)
        assert all(clip.visible(still)[factor] == value for factor, value in names.items())


def test_what_each_style_names():
    for clip in CLIPS:
        names = {style: set(caption(clip, style)[1]) for style in ("object", "short", "long")}
        assert names["object"] == {"object"} < names["short"] < names["long"] == set(clip.visible())


def test_most_captions_name_one_to_three_factors():
    named = [caption(c, "train", random.Random(i))[1] for i, c in enumerate(CLIPS)]
    singles = [len(n) for n in named if "relation" not in n]
    assert 0.8 < sum(n <= 3 for n in singles) / len(singles) < 0.97
    share = {f: sum(f in n for n in named) / len(named) for f in FACTORS}
    assert share["object"] > 0.3 and share["object2"] > 0.05 and min(share.values()) > 0.02


def test_a_pair_can_be_told_from_both_sides():
    assert parse("a red ring left of a blue star") == parse("a blue star right of a red ring")
    assert parse("a ring below a star") == {"object": "star", "relation": "above", "object2": "ring"}


def test_parse_keeps_the_two_objects_apart():
    named = parse("A red ring, above a blue star, drifts left before a checkerboard, camera pans left.")
    assert named == {
        "colour": "red", "object": "ring", "action": "left", "relation": "above", "colour2": "blue",
        "object2": "star", "scene": "checkerboard", "camera": "pan left",
    }  # fmt: skip
    assert parse("") == parse("something else") == {}
    assert parse("A red star!") == parse("(a red star)") == {"object": "star", "colour": "red"}  # as WordTable reads it


def test_every_value_of_every_factor_occurs():
    for factor, values in FACTORS.items():
        assert {getattr(c, factor) for c in CLIPS} >= set(values)


def test_impossible_clip_is_refused():
    with pytest.raises(ValueError, match="no clip"):
        Clip.make(0, 0, object="circle", object2="circle")
