"""The latent reward models: the paper's parameter counts, who has a gradient, and every size that may come."""

from dataclasses import asdict

import pytest
import torch

from losses import lrm_loss
from lrm import ImageLRM, TextImageLRM, TextVideoLRM, VideoLRM


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_those_of_tables_12_and_13():
    assert count(ImageLRM(channels=12)) == count(VideoLRM(channels=12)) == 189_441
    assert count(ImageLRM(channels=16)) == 197_633
    for literal in (False, True):
        assert count(TextImageLRM(channels=12, text_dim=4096, literal=literal)) == 763_009
    assert count(TextVideoLRM(channels=12)) == 763_009
    parts = TextImageLRM()
    assert count(parts.text) == 524_416 and count(parts.query) + count(parts.key) + count(parts.value) == 49_152
    convolutions = [count(m) for m in ImageLRM().modules() if isinstance(m, torch.nn.Conv2d)]
    assert convolutions == [24_704, 147_584, 16_512] and count(ImageLRM().head) == 129


def test_feature_maps_are_those_of_table_12():
    lrm, shapes = ImageLRM(), []
    for module in lrm.cnn:
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(out.shape)))
    assert lrm(normal(2, 12, 1, 24, 40)).shape == (2,)
    assert shapes == [(2, 128, 6, 10), (2, 128, 3, 5)]


MODELS = {
    "image": lambda **k: ImageLRM(channels=4, **k),
    "text-image": lambda **k: TextImageLRM(channels=4, text_dim=6, **k),
    "video": lambda **k: VideoLRM(channels=4, **k),
    "video-3d": lambda **k: VideoLRM(channels=4, backbone="3d", **k),
    "text-video": lambda **k: TextVideoLRM(channels=4, text_dim=6, **k),
    "text-video-3d": lambda **k: TextVideoLRM(channels=4, text_dim=6, backbone="3d", **k),
}


def inputs(name, B=2, T=3, h=8, w=8, L=5, seed=0):
    x = normal(B, 4, T, h, w, seed=seed).requires_grad_()
    return (x, normal(B, L, 6, seed=seed + 1)) if "text" in name else (x,)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("T, h, w, L", [(1, 4, 4, 1), (5, 8, 8, 32), (2, 7, 9, 3), (4, 6, 11, 2), (3, 1, 2, 2)])
def test_every_latent_element_has_a_gradient(name, T, h, w, L):
    """At any number of frames and any height and width, multiples of 4 or not."""
    lrm, args = MODELS[name](), inputs(name, T=T, h=h, w=w, L=L)
    out = lrm(*args)
    assert out.shape == (2,)
    (grad,) = torch.autograd.grad(out.sum(), args[0])
    assert grad.isfinite().all() and (grad != 0).all()


def test_the_printed_padding_leaves_elements_without_gradient():
    """Table 12 has padding 1: kernels of 4 with stride 4 then end before the last row and column. 23% of 8x8, 6.6% of
    24x40."""
    for h, w, unseen in ((8, 8, 15 / 64), (24, 40, 63 / 960)):
        for padding, expected in ((1, unseen), (0, 0.0)):
            x = normal(1, 12, h, w).requires_grad_()
            conv = torch.nn.Conv2d(12, 128, 4, stride=4, padding=padding)
            (grad,) = torch.autograd.grad(conv(x).square().sum(), x)
            assert (grad == 0).float().mean().item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_samples_of_a_batch_do_not_mix(name):
    lrm, args = MODELS[name](), inputs(name, B=3)
    together = lrm(*args)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], lrm(*(a[i : i + 1] for a in args)))


@pytest.mark.parametrize("name", ["image", "text-image", "video", "text-video"])
def test_reward_of_a_clip_is_the_mean_of_its_frames(name):
    lrm, (x, *text) = MODELS[name](), inputs(name)
    frames = torch.stack([lrm(x[:, :, i : i + 1], *text) for i in range(3)])
    torch.testing.assert_close(lrm(x, *text), frames.mean(0))


def test_the_3d_backbone_sees_the_order_of_the_frames_and_the_other_does_not():
    for backbone, sees in (("frames", False), ("3d", True)):
        lrm, (x,) = VideoLRM(channels=4, backbone=backbone), inputs("video", T=5)
        assert torch.allclose(lrm(x), lrm(x.flip(2)), rtol=1e-4, atol=1e-5) != sees


def test_literal_table_13_is_blind_to_the_image():
    """A softmax over one key is 1: no gradient reaches the latents, and the reward is the same for any of them."""
    for Model in (TextImageLRM, TextVideoLRM):
        for literal in (True, False):
            lrm, (x, text) = Model(channels=4, text_dim=6, literal=literal), inputs("text-image")
            (grad,) = torch.autograd.grad(lrm(x, text).sum(), x)
            same = torch.allclose(lrm(x, text), lrm(normal(*x.shape, seed=7), text), atol=1e-6)
            assert (grad.abs().max() < 1e-7) == literal and same == literal


def test_text_lrm_reads_every_token():
    """The reward depends on each token and weighs them by the image: it is no average over the text."""
    lrm, (x, text) = TextImageLRM(channels=4, text_dim=6), inputs("text-image")
    text.requires_grad_()
    (grad,) = torch.autograd.grad(lrm(x, text).sum(), text)
    assert (grad.abs().sum(-1) > 0).all()
    with torch.no_grad():
        lrm.query.weight *= 30  # sharp attention: which token counts depends on the image
    other = normal(*x.shape, seed=7)
    part = lambda x, text: lrm(x, text) - lrm.head(lrm.features(x)).mean(dim=(1, 2))  # what the text adds
    assert not torch.allclose(part(x, text), part(other, text), atol=1e-4)


def test_text_attention_is_the_formula():
    """Softmax(Q K^T / sqrt(128)) V + the image feature, by loops in float64."""
    lrm, (x, text) = TextImageLRM(channels=4, text_dim=6).double(), inputs("text-image", B=1, T=2)
    x, text = x.detach().double(), text.double()
    image, tokens = lrm.features(x)[0], [lrm.text(token) for token in text[0]]
    total = 0.0
    for frame in image:
        weights = torch.stack([lrm.query(frame) @ lrm.key(token) / 128**0.5 for token in tokens]).exp()
        mixed = sum(w * lrm.value(token) for w, token in zip(weights / weights.sum(), tokens))
        total = total + lrm.head(frame + mixed)
    torch.testing.assert_close(lrm(x, text), total / 2)


def test_seed_and_config():
    state = torch.get_rng_state()
    one, two, other = ImageLRM(channels=4, seed=1), ImageLRM(channels=4, seed=1), ImageLRM(channels=4, seed=2)
    torch.set_rng_state(state)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.cnn[0].weight, other.cnn[0].weight)
    other.init_weights(1)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))
    for make in MODELS.values():  # as a checkpoint makes it again
        lrm = make()
        again = type(lrm)(**asdict(lrm.config))
        again.load_state_dict(lrm.state_dict())
        assert again.config == lrm.config
    with pytest.raises(ValueError, match="backbone"):
        VideoLRM(backbone="2d")
    with pytest.raises(ValueError, match="latents"):
        ImageLRM(channels=4)(normal(2, 12, 1, 8, 8))
    with pytest.raises(ValueError, match="latents"):
        ImageLRM(channels=4)(normal(2, 4, 8, 8))


@pytest.mark.parametrize("name", ["image", "text-video-3d"])
def test_it_learns_a_reward(name):
    """A few steps on a fixed batch bring the error of a simple reward down to a tenth."""
    lrm, args = MODELS[name](), inputs(name, B=16, T=1)
    reward = args[0].detach().abs().mean(dim=(1, 2, 3, 4))
    reward = (reward - reward.mean()) / reward.std()
    optimizer, losses = torch.optim.Adam(lrm.parameters(), 1e-3), []
    for _ in range(30):
        losses.append(lrm_loss(lrm, args[0], reward, *args[1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 10


def test_frames_apart_are_told_apart():
    """A mean over the frames cannot see their order; the head that has them side by side does."""
    x = normal(2, 4, 5, 8, 8)
    for apart, alike in ((0, True), (5, False)):
        lrm = VideoLRM(channels=4, outputs=3, stride=1, apart=apart)
        assert lrm(x).shape == (2, 3)
        assert torch.allclose(lrm(x), lrm(x.flip(2)), atol=1e-6) is alike
