"""Rewards against their reference formulas, at tiny random sizes with the published files' own keys; bad input."""

import json
import math
import random
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tv
import transformers
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import common
import preference
import rewards
from common import UserError
from distributed import Ranks
from world import shapes
from world.judge import Judge, JudgeConfig

BUNDLED = Path(__file__).parent.parent / rewards.JUDGE


def still(image, frames=2):
    """(3, H, W) in 0..255 -> one clip (1, 3, F, H, W) in [-1, 1]"""
    return (image.float() / 127.5 - 1)[None, :, None].expand(1, 3, frames, *image.shape[1:])


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def smooth(h, w, seed=0, cell=6):
    """A random smooth picture (3, H, W) in 0..255 of whole numbers, with something to see everywhere."""
    coarse = torch.rand(1, 3, h // cell + 2, w // cell + 2, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (h, w), mode="bicubic", align_corners=True)[0].clamp(0, 1) * 255).round()


def pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy().astype(np.uint8))


GREY = torch.full((3, 192, 320), 128)
RAMP = torch.linspace(0, 255, 320).round().expand(3, 192, 320)
NOISE = noise(3, 192, 320)

# ---------------------------------------------------------------------------------------------------------------------
# the interface


def test_frames_are_evenly_spaced():
    video = torch.linspace(-1, 1, 8).view(1, 1, 8, 1, 1).expand(1, 3, 8, 8, 8)
    seen = lambda frames: rewards.Reward("r", lambda v, p: v[:, 0, :, 0, 0].sum(1), True, False, frames, "cpu")(video)
    level = video[0, 0, :, 0, 0]
    assert seen(1).item() == pytest.approx(level[4].item())
    assert seen(4).item() == pytest.approx(level[[1, 3, 5, 7]].sum().item())
    assert seen(None).item() == seen(8).item() == seen(99).item() == pytest.approx(level.sum().item(), abs=1e-6)


def test_no_gradient_unless_asked():
    video = still(smooth(32, 32), 3).clone().requires_grad_()
    reward = rewards.make("dynamic_degree")
    assert not reward(video).requires_grad and reward(video, with_grad=True).requires_grad
    with torch.no_grad():
        assert not reward(video).requires_grad and torch.is_grad_enabled() is False
    with pytest.raises(ValueError, match="no gradient"):
        rewards.make("jpeg_compressibility")(video, with_grad=True)


def test_the_docs_say_of_each_reward_where_it_comes_from():
    text = (Path(__file__).parent.parent / "docs/REWARDS.md").read_text(encoding="utf-8")
    assert [name for name in rewards.REWARDS if f"| `{name}` |" not in text] == []


def test_moments_are_those_of_all_that_came():
    scores = 3 * torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 5
    moments, ranks = rewards.Moments(), Ranks(0, 1, torch.device("cpu"))
    for part in scores.split([3, 17, 20]):
        moments.update(part, ranks)
    z = (scores - scores.mean()) / scores.std(correction=0)
    torch.testing.assert_close(moments.standardise(scores), z)
    torch.testing.assert_close(moments.natural(z), scores)
    before = rewards.Moments(**json.loads(json.dumps(asdict(moments))))
    moments.update(torch.tensor([math.nan, 1.0]), ranks)
    assert moments == before  # one broken clip does not spoil them for ever


@pytest.mark.parametrize("name", ["jpeg_compressibility", "dynamic_degree"])
def test_finite_and_blind_to_batch_order(name):
    clips = [torch.zeros(3, 40, 56), torch.full((3, 40, 56), 255), GREY[:, :40, :56], RAMP[:, :40, ::6][..., :56]]
    video = torch.cat([still(F.interpolate(c[None].float(), (40, 56))[0], 3) for c in clips])
    random_clips = noise(2, 3, 3, 40, 56) / 127.5 - 1
    video = torch.cat([video, random_clips, 3 * random_clips])  # and a decoder's pixels beyond [-1, 1]
    reward, order = rewards.make(name), torch.tensor([7, 2, 0, 5, 1, 6, 3, 4])
    score = reward(video)
    assert score.shape == (8,) and score.dtype == torch.float32 and torch.isfinite(score).all()
    assert torch.allclose(reward(video[order]), score[order], atol=1e-6)


def test_broken_clip_is_nan_alone():
    video = still(smooth(32, 32), 2).repeat(3, 1, 1, 1, 1)
    video[1, 0, 0, 0, 0] = torch.nan
    assert rewards.jpeg_compressibility(video).isnan().tolist() == [False, True, False]


def test_bad_calls():
    with pytest.raises(ValueError, match=r"\(B, 3, F, H, W\)"):
        rewards.jpeg_compressibility(torch.zeros(3, 2, 8, 8))
    text = rewards.Reward("r", None, True, True, None, "cpu")
    for prompts in (None, ["one"]):
        with pytest.raises(ValueError, match="one prompt a clip"):
            text(torch.zeros(2, 3, 2, 8, 8), prompts)


@pytest.mark.parametrize("spec", ["nonsense", ""])
def test_unknown_reward_lists_the_names(spec):
    with pytest.raises(UserError, match=r"jpeg_compressibility.*dynamic_degree.*aesthetic"):
        rewards.make(spec)


def test_bad_weights(tmp_path, monkeypatch):
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"not a file of weights")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    torch.save(Path("an object, whose loading would run code"), tmp_path / "code.pt")
    for name in ("hpsv2", "pickscore", "imagereward", "aesthetic"):
        with pytest.raises(UserError, match=r"needs weights.*hub"):
            rewards.make(name)
        with pytest.raises(UserError, match="nothing at"):
            rewards.make(name, str(tmp_path / "absent"))
        with pytest.raises(UserError, match="junk"):
            rewards.make(name, str(junk))
        with pytest.raises(UserError):
            rewards.make(name, str(tmp_path))
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TINY)
    for file in ("other.pt", "code.pt"):
        with pytest.raises(UserError, match=file):
            rewards.make("hpsv2", str(tmp_path / file))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="not that of a CLIP"):
        rewards.make("pickscore", str(tmp_path))
    with pytest.raises(UserError, match="reads no weights"):
        rewards.make("jpeg_compressibility", str(junk))


# ---------------------------------------------------------------------------------------------------------------------
# file size


def test_jpeg_sizes():
    # measured with Pillow and libjpeg-turbo; other builds may differ by a few bytes
    y, x = torch.meshgrid(torch.arange(192) // 8, torch.arange(320) // 8, indexing="ij")
    board = ((x + y) % 2 * 255).expand(3, 192, 320)
    for image, kilobytes in ((GREY, 1.585), (torch.zeros(3, 192, 320), 1.587), (RAMP, 5.287), (board, 2.547)):
        assert rewards.jpeg_compressibility(still(image)).item() == pytest.approx(-kilobytes, abs=0.05), kilobytes
    uniform = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (192, 320, 3)).astype(np.uint8)).permute(
        2, 0, 1
    )
    assert rewards.jpeg_compressibility(still(uniform)).item() == pytest.approx(-72.616, rel=2e-3)


def test_jpeg_order_and_mean():
    score = rewards.jpeg_compressibility(torch.cat([still(i) for i in (NOISE, RAMP, GREY)]))
    assert score[0] * 0.1 < score[1] < score[2] < 0
    mixed = torch.cat([still(NOISE, 1), still(RAMP, 1), still(GREY, 1)], 2)
    assert rewards.jpeg_compressibility(mixed).item() == pytest.approx(score.mean().item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# the judge


def test_judge_probabilities(tmp_path):
    torch.manual_seed(0)
    judge = Judge(JudgeConfig("attention", 8)).eval()
    file = tmp_path / "judge.safetensors"
    common.save_model(file, judge)
    clips = [shapes.Clip.make(0, i) for i in range(3)]
    video = shapes.render_batch(clips)
    prompts = ["a red circle moves left", "a shape at night", "a blue star"]
    with torch.no_grad():
        p = {name: logits.softmax(1) for name, logits in judge(video).items()}
    at = lambda factor, i, value: p[factor][i, shapes.FACTORS[factor].index(value)].item()
    first = (at("object", 0, "circle") + at("colour", 0, "red") + at("action", 0, "left")) / 3
    third = (at("object", 2, "star") + at("colour", 2, "blue")) / 2
    agreement = rewards.make("agreement", str(file))(video, prompts).tolist()
    assert agreement == pytest.approx([first, at("scene", 1, "night"), third])
    assert rewards.make("agreement", str(file), frames=4).frames is None  # it sees motion, so it takes every frame
    moved = rewards.make("agreement", str(file))(video.requires_grad_(), prompts, with_grad=True)
    assert torch.autograd.grad(moved.sum(), video)[0].abs().sum() > 0
    with pytest.raises(UserError, match="16 frames of 64x64"):
        rewards.make("agreement", str(file))(video[:, :, :8], prompts)
    with pytest.raises(UserError):
        rewards.make("agreement", str(tmp_path / "absent.safetensors"))


@pytest.mark.skipif(not BUNDLED.exists(), reason=f"{rewards.JUDGE} is not there: `pretrain.py judge` makes it")
def test_bundled_judge_knows_its_captions():
    clips = [shapes.Clip.make(12345, i) for i in range(24)]
    prompts = [shapes.caption(clip, "long", random.Random(0))[0] for clip in clips]
    video, reward = shapes.render_batch(clips), rewards.make("agreement", str(BUNDLED))
    own, other = reward(video, prompts), reward(video, prompts[1:] + prompts[:1])
    assert own.mean() > 0.85 and (own > other).float().mean() > 0.95 and other.mean() < 0.6


# ---------------------------------------------------------------------------------------------------------------------
# motion


def test_the_judge_sees_an_object_change():
    """Clips of one scene and action, whose end is then another object's: kept is what is one object throughout."""
    same = {"action": "still", "scene": "night", "camera": "static", "look": "plain", "colour": "red", "size": "large"}
    kinds = shapes.FACTORS["object"]
    clips = [shapes.Clip.make(11, 0, **same, object=kind) for kind in kinds]
    video, reward = shapes.render_batch(clips), rewards.make("object_kept", str(BUNDLED))
    assert (reward(video) > 0.9).all() and not reward.text
    changed = torch.cat([video[:, :, :8], video.roll(1, 0)[:, :, 8:]], 2)
    assert (reward(changed) < 0.1).all()
    middle = torch.cat([video[:, :, :4], video.roll(1, 0)[:, :, 4:-4], video[:, :, -4:]], 2)
    torch.testing.assert_close(reward(middle), reward(video))  # its ends alone are looked at
    parts = reward.parts(video)
    assert parts.argmax(1).tolist() == list(range(len(kinds)))  # the parts say which it is
    torch.testing.assert_close(reward.from_parts(parts, [""] * len(kinds)), reward(video))


def test_flow_recovers_a_translation():
    scene = smooth(120, 140)[None] / 255
    cut = lambda dx, dy: scene[..., 20 - dy : 100 - dy, 20 - dx : 116 - dx]  # content moves by (dx, dy)
    for dx, dy in ((1, 0), (0, -2), (3, 2), (-5, 4)):
        flow = rewards.optical_flow(cut(0, 0), cut(dx, dy))[..., 8:-8, 8:-8]
        assert flow.shape[1] == 2
        error = (flow - torch.tensor([dx, dy]).view(1, 2, 1, 1)).abs()
        assert error.mean() < 0.02 and error.max() < 0.25, (dx, dy)


def test_flow_of_half_a_pixel():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    wave = lambda d: (0.5 + 0.25 * torch.sin((x - d) / 3) + 0.25 * torch.sin(y / 4)).expand(1, 3, 64, 64)
    flow = rewards.optical_flow(wave(0), wave(0.5))[..., 6:-6, 6:-6]
    assert flow[:, 0].mean().item() == pytest.approx(0.5, abs=0.02) and flow[:, 1].abs().max() < 0.1


def test_dynamic_degree_counts_pixels():
    scene = smooth(160, 240, 1)
    slide = lambda s: torch.stack([scene[:, 40:104, 60 + s * f : 124 + s * f] for f in range(3)], 1)[None] / 127.5 - 1
    reward = rewards.make("dynamic_degree")
    assert abs(reward(still(scene, 4)).item()) < 1e-4 and reward(still(scene, 1)).item() == 0
    score = [reward(slide(s)).item() for s in (1, 2, 4)]
    assert score == pytest.approx([s / 1.5 for s in (1, 2, 4)], rel=0.07)  # 6 * 64 / 256 = 1.5 pixels are the unit
    doubled = F.interpolate(slide(2)[0].transpose(0, 1), scale_factor=4).transpose(0, 1)[None]
    assert reward(doubled).item() == pytest.approx(score[1], rel=0.05)  # the same motion of a picture of 256 pixels


def test_dynamic_degree_of_the_shapes_world():
    reward = rewards.make("dynamic_degree")
    make = lambda action: shapes.render_batch(
        [shapes.Clip.make(s, 0, action=action, camera="static", look="plain", relation=None) for s in range(2)]
    )
    still_ones, moving = reward(make("still")), reward(make("left"))
    assert still_ones.abs().max() < 1e-4
    assert moving.tolist() == pytest.approx([28 / 15 / 1.5] * 2, rel=0.25)


def test_dynamic_degree_has_a_gradient():
    video = torch.stack([smooth(32, 32, 3), smooth(32, 32, 3).roll(1, -1)], 1)[None] / 127.5 - 1
    video.requires_grad_()
    grad = torch.autograd.grad(rewards.make("dynamic_degree")(video, with_grad=True).sum(), video)[0]
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0
    flat = still(GREY[:, :32, :32]).clone().requires_grad_()
    grad = torch.autograd.grad(rewards.make("dynamic_degree")(flat, with_grad=True).sum(), flat)[0]
    assert torch.isfinite(grad).all()


# ---------------------------------------------------------------------------------------------------------------------
# models learned from people

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["a red circle moves left", "the Bund, Shanghai: an oil painting"]


@pytest.mark.parametrize("h,w,inside", [(192, 320, (134, 224)), (320, 192, (224, 134)), (64, 64, (224, 224))])
def test_whole_image_is_padded_black(h, w, inside):
    image = (40 + 0.7 * smooth(h, w)).round()
    ours = preference._prepare(image[None] / 255, 224, True)[0]
    scale = 224 / max(h, w)
    size = [round(h * scale), round(w * scale)]
    assert tuple(size) == inside
    top, left = (224 - size[0]) // 2, (224 - size[1]) // 2
    assert (h, w) != (192, 320) or (top, 224 - top - size[0]) == (45, 45)
    border = [left, top, 224 - size[1] - left, 224 - size[0] - top]
    resized = tv.resize(image / 255, size, tv.InterpolationMode.BICUBIC, antialias=True)
    assert torch.allclose(ours, tv.normalize(tv.pad(resized, border), MEAN, STD), atol=1e-5)
    if top:
        assert torch.allclose(ours[:, 0, 0], -torch.tensor(MEAN) / torch.tensor(STD))
    # and the picture library's own resizing, up to its rounding to 8 bits
    by_eye = tv.to_tensor(tv.pad(pil(image).resize(size[::-1], Image.BICUBIC), border))
    assert (ours - tv.normalize(by_eye, MEAN, STD)).abs().max() < 2 / 255 / min(STD)


@pytest.mark.parametrize("h,w", [(192, 320), (320, 192), (64, 64), (50, 77), (480, 720)])
def test_centre_is_cut_out(h, w):
    image = (40 + 0.7 * smooth(h, w)).round()
    ours = preference._prepare(image[None] / 255, 224, False)[0]
    theirs = transformers.CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)(
        pil(image), return_tensors="pt"
    )
    assert (ours - theirs.pixel_values[0]).abs().max() < 2 / 255 / min(STD)
    edges = torch.arange(w).div(3, rounding_mode="floor") % 2 * torch.ones(3, h, 1)  # bicubic overshoots here
    ours = preference._prepare(edges[None], 224, False)[0] * torch.tensor(STD).view(3, 1, 1)
    pixels = ours + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


def test_hpsv2(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY).eval()
    torch.save({"state_dict": model.half().state_dict(), "iteration": 3}, tmp_path / "HPS_v2.1_compressed.pt")
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: TINY)
    model.float()
    reward = rewards.make("hpsv2", str(tmp_path / "HPS_v2.1_compressed.pt"))
    images = [smooth(48, 80, seed) for seed in range(2)]
    score = reward(torch.cat([still(i, 3) for i in images]), PROMPTS)
    with torch.no_grad():
        x = torch.stack([tv.resize(i / 255, [19, 32], tv.InterpolationMode.BICUBIC) for i in images])
        x = tv.normalize(tv.pad(x, [0, 6, 0, 7]), MEAN, STD)
        image, text, temperature = model(x, open_clip.tokenize(PROMPTS))
        expected = (image @ text.T).diagonal()  # the package's formula: neither temperature nor factor 100
    assert torch.allclose(score, expected, atol=1e-5) and temperature > 10
    # its parts are the image's embedding: an LRM that knew it would know the number
    parts = reward.parts(torch.cat([still(i, 3) for i in images]))
    torch.testing.assert_close(parts, image, atol=1e-5, rtol=0)
    assert reward.has_parts and reward.size_of_parts == parts.shape[1]
    assert torch.allclose(reward.from_parts(parts, PROMPTS), expected, atol=1e-5)
    assert torch.allclose(reward.from_parts(image, PROMPTS), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # of the training around it
        assert torch.allclose(reward.from_parts(image, PROMPTS), expected, atol=1e-5)
    video = still(images[0], 2).clone().requires_grad_()
    assert torch.autograd.grad(reward(video, PROMPTS[:1], with_grad=True).sum(), video)[0].abs().sum() > 0


def test_hpsv2_is_the_published_architecture():
    with torch.device("meta"):
        big, tiny = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")), open_clip.CLIP(**TINY)
    assert len(big.state_dict()) == 686 and sum(p.numel() for p in big.parameters()) == 986_109_441
    assert sum(p.numel() for p in big.visual.parameters()) == 632_076_800
    assert set(tiny.state_dict()) < set(big.state_dict())


@pytest.fixture
def clip_folder(tmp_path):
    torch.manual_seed(0)
    both = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    config = transformers.CLIPConfig(
        text_config=both | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
        vision_config=both | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    return tmp_path, model


def crops(images):
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return processor([pil(i) for i in images], return_tensors="pt").pixel_values


def test_pickscore(clip_folder, monkeypatch):
    folder, model = clip_folder
    reward = rewards.make("pickscore", str(folder), frames=2)
    images = [smooth(48, 80, seed) for seed in range(2)]
    video = torch.cat([still(i, 5) for i in images])
    with torch.no_grad():
        out = model(input_ids=open_clip.tokenize(PROMPTS), pixel_values=crops(images))
    expected = out.logits_per_image.diagonal() / model.logit_scale.exp()
    assert torch.allclose(reward(video, PROMPTS), expected, atol=2e-3)
    assert (expected[0] - expected[1]).abs() > 4e-3  # so that the tolerance means something
    swapped = reward(video.flip(0), PROMPTS[::-1])
    assert torch.allclose(swapped.flip(0), reward(video, PROMPTS), atol=1e-6)
    # transformers 4 returns the embedding itself
    for name in ("get_image_features", "get_text_features"):
        new = getattr(transformers.CLIPModel, name)
        old = lambda self, *a, new=new, **k: getattr(new(self, *a, **k), "pooler_output", None)
        monkeypatch.setattr(transformers.CLIPModel, name, old)
    assert torch.allclose(reward(video, PROMPTS), expected, atol=2e-3)


def test_pickscore_refuses_half_a_model(clip_folder):
    folder, model = clip_folder
    tensors = {k: v.clone() for k, v in model.state_dict().items() if "visual_projection" not in k}
    transformers.modeling_utils.safe_save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="visual_projection"):
        rewards.make("pickscore", str(folder))


def linear_head(width):
    sizes = [width, 1024, 128, 64, 16, 1]
    linear = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    drop = nn.Dropout
    return nn.Sequential(linear[0], drop(0.2), linear[1], drop(0.2), linear[2], drop(0.1), linear[3], linear[4]).eval()


def test_aesthetic(clip_folder):
    folder, model = clip_folder
    assert sum(p.numel() for p in linear_head(768).parameters()) == 927_969
    head = linear_head(24)
    with pytest.raises(UserError, match="linearMSE"):
        rewards.make("aesthetic", str(folder))
    torch.save(
        {"layers." + k: 5 * v for k, v in head.state_dict().items()}, folder / "sac+logos+ava1-l14-linearMSE.pth"
    )
    images = [smooth(48, 80, seed) for seed in range(2)]
    score = rewards.make("aesthetic", str(folder))(torch.cat([still(i, 2) for i in images]))
    with torch.no_grad():
        feature = model.visual_projection(model.vision_model(crops(images)).pooler_output)
        for p in head.parameters():
            p.mul_(5)
        expected = head(F.normalize(feature, dim=-1))[:, 0]
    assert torch.allclose(score, expected, rtol=2e-3) and (expected[0] - expected[1]).abs() > 0.01 * expected[0].abs()


def test_imagereward(tmp_path):
    torch.manual_seed(0)
    eye = VisionTransformer(32, 16, embed_dim=64, depth=2, num_heads=1, num_classes=0, global_pool="").eval()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "blue", "star"]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    sizes |= {"max_position_embeddings": 40, "vocab_size": len(words)}
    config = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    reader = transformers.BertModel(config, add_pooling_layer=False).eval()
    reader.config.is_decoder = False  # it looks at the image, but reads the words in both directions
    nn.init.zeros_(reader.embeddings.token_type_embeddings.weight)
    head = linear_head(64)
    with torch.no_grad():
        for p in (*eye.parameters(), *reader.parameters(), *head.parameters()):
            p.add_(0.1 * torch.randn_like(p)) if p is not reader.embeddings.token_type_embeddings.weight else None
    tensors = {"blip.visual_encoder." + k: v for k, v in eye.state_dict().items()}
    tensors |= {"blip.text_encoder." + k: v for k, v in reader.state_dict().items() if "token_type" not in k}
    tensors |= {"mlp.layers." + k: v for k, v in head.state_dict().items()}
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    tensors["blip.vision_proj.weight"] = torch.zeros(8, 64)  # in the file, but not in the score
    torch.save(tensors, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(sizes | {"encoder_width": 768}))
    with pytest.raises(UserError, match=r"vocab\.txt"):
        rewards.make("imagereward", str(tmp_path))
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    images = [smooth(32, 32, seed) for seed in range(2)]  # of its own size: nothing is resized, nothing rounded
    prompts = ["a red circle", "A blue star!"]
    score = rewards.make("imagereward", str(tmp_path))(torch.cat([still(i, 2) for i in images]), prompts)
    with torch.no_grad():
        ids = torch.zeros(2, 35, dtype=torch.long)
        ids[0, :5], ids[1, :6] = torch.tensor([2, 5, 6, 7, 3]), torch.tensor([2, 5, 8, 9, 1, 3])
        out = reader(ids, (ids > 0).long(), encoder_hidden_states=eye.forward_features(crops(images)))
        expected = (head(out.last_hidden_state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert torch.allclose(score, expected, rtol=1e-4)
    assert (expected[0] - expected[1]).abs() > 0.05 * expected[0].abs()
