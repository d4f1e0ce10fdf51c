"""The VAE against diffusers' AutoencoderKLCogVideoX (an independent implementation), and against its own promises."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import cogvideox
from cogvideox import VAE_NAMES, published_name
from common import UserError
from vae3d import PRESETS, VAE3D, CausalConv3d, Norm, VAEConfig

TINY = VAEConfig(channels=(4, 8, 8, 12), latent_channels=3, layers_per_block=1, groups=2, scaling_factor=0.7)
SMALL = replace(PRESETS["shapes"], channels=(8, 16, 16), groups=4)


def reference(c, seed, dtype=torch.float32):
    """diffusers' model of the same shape, every weight and bias perturbed, so that no zero or one hides an error."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=c.channels,
        latent_channels=c.latent_channels,
        layers_per_block=c.layers_per_block,
        norm_num_groups=c.groups,
        scaling_factor=c.scaling_factor,
    )
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype).eval()


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(c, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return VAE3D(c).to(dtype).eval()


def assert_close(ours, theirs, tol):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tol * theirs.abs().max()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    model = reference(TINY, 1)
    model.save_pretrained(folder)
    return model, cogvideox.load_vae(folder), folder


# ---- parity with diffusers ----


@torch.no_grad()
@pytest.mark.parametrize(
    "frames, latents, back",
    [(1, 1, 1), (8, 2, 8), (9, 3, 9), (16, 4, 16), (17, 5, 17), (33, 9, 33), (49, 13, 49)],
)
def test_encode_and_decode_agree_with_diffusers(pair, frames, latents, back):
    theirs, ours, _ = pair
    video = noise(2, 3, frames, 16, 24, seed=frames)
    posterior = theirs.encode(video).latent_dist
    mean, logvar = ours.posterior(video)
    assert mean.shape == (2, 3, latents, 2, 3)
    assert_close(mean, posterior.mean, 1e-5)
    assert_close(logvar, posterior.logvar, 1e-5)
    assert torch.equal(ours.encode(video), mean * 0.7)
    z = noise(2, 3, latents, 2, 3, seed=frames + 1)
    video = ours.decode(z * 0.7)
    assert video.shape[2] == back
    assert_close(video, theirs.decode(z).sample, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("c, size", [
    (replace(TINY, channels=(8, 4, 12, 4), groups=4, layers_per_block=2), (8, 8)),
    (replace(TINY, channels=(4, 4, 4, 4), latent_channels=5, layers_per_block=3), (24, 8)),
])  # fmt: skip
def test_other_configs_agree_with_diffusers(tmp_path, c, size):
    theirs = reference(c, 2, torch.float64)  # in float32 some CPUs convolve by ways that round more
    theirs.save_pretrained(tmp_path)
    ours = cogvideox.load_vae(tmp_path)
    assert ours.config == c
    video = noise(1, 3, 25, *size, dtype=torch.float64)
    assert_close(ours.posterior(video)[0], theirs.encode(video).latent_dist.mean, 1e-10)
    z = noise(
        1, c.latent_channels, 6, size[0] // 8, size[1] // 8, dtype=torch.float64
    )  # an even number: no frame stands alone
    assert_close(ours.decode(z * 0.7), theirs.decode(z).sample, 1e-10)


def test_gradients_agree_with_diffusers(pair):
    theirs, ours = reference(TINY, 3, torch.float64), make(TINY, dtype=torch.float64)
    theirs_names = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        p.data = theirs_names[published_name(name, VAE_NAMES)].data.reshape(p.shape).clone()
    videos = [noise(1, 3, 17, 16, 16, dtype=torch.float64).requires_grad_() for _ in range(2)]
    weight, pixels = (noise(*s, seed=7, dtype=torch.float64) for s in ((1, 6, 5, 2, 2), (1, 3, 17, 16, 16)))
    h = theirs.encode(videos[0]).latent_dist
    ((torch.cat([h.mean, h.logvar], 1) * weight).sum() + (theirs.decode(h.mean).sample * pixels).sum()).backward()
    mean, logvar = ours.posterior(videos[1])
    loss = (torch.cat([mean, logvar], 1) * weight).sum() + (ours.decode(mean * 0.7) * pixels).sum()
    loss.backward()
    assert_close(videos[1].grad, videos[0].grad, 1e-9)
    for name, p in ours.named_parameters():
        assert_close(p.grad, theirs_names[published_name(name, VAE_NAMES)].grad.reshape(p.shape), 1e-9)


def test_published_parameter_count():
    with torch.device("meta"):
        model = VAE3D(PRESETS["cogvideox-2b"])
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(model.encoder), count(model.decoder), count(model)) == (92_215_456, 123_368_451, 215_583_907)


# ---- chunks ----


@torch.no_grad()
def test_independent_chunks_are_coded_one_by_one():
    vae = make(SMALL)
    video = noise(2, 3, 48, 16, 24)
    z = vae.encode(video)
    assert z.shape == (2, 12, 15, 2, 3)
    assert torch.equal(z, torch.cat([vae.encode(f) for f in video.split(16, 2)], 2))
    back = vae.decode(z)
    assert back.shape == video.shape
    assert torch.equal(back, torch.cat([vae.decode(f) for f in z.split(5, 2)], 2))


@torch.no_grad()
def test_an_independent_chunk_is_a_stream_of_17_frames_with_the_first_twice():
    """16 -> 5 -> 16: the same weights, streaming 17 frames in one chunk, do the same but for the frame in front."""
    vae, stream = make(SMALL), make(replace(SMALL, chunking="streaming"))
    stream.load_state_dict(vae.state_dict())
    video = noise(1, 3, 16, 16, 16)
    z = vae.encode(video)
    assert torch.equal(z, stream.encode(torch.cat([video[:, :, :1], video], 2)))
    assert torch.equal(vae.decode(z), stream.decode(z)[:, :, 1:])


@torch.no_grad()
def test_an_image_is_one_frame_and_one_latent():
    for c in (SMALL, TINY):
        vae = make(c)
        z = vae.encode(noise(2, 3, 1, 16, 16))
        assert z.shape == (2, c.latent_channels, 1, 2, 2) and vae.decode(z).shape == (2, 3, 1, 16, 16)


@torch.no_grad()
@pytest.mark.parametrize("frames", [16, 33])
def test_streaming_equals_one_pass_but_for_the_norms(monkeypatch, frames):
    """Group norm averages over a chunk. Without it, nothing depends on where chunks begin: the cache loses nothing."""
    monkeypatch.setattr(torch.nn.GroupNorm, "forward", lambda self, x: x / 2)
    c = TINY
    chunked, whole = make(c), make(replace(c, chunk_frames=frames // 8 * 8))
    video = noise(1, 3, frames, 8, 8)
    z = whole.encode(video)
    assert_close(chunked.encode(video), z, 1e-5)
    assert_close(chunked.decode(z), whole.decode(z), 1e-5)


@torch.no_grad()
def test_later_chunks_cannot_change_earlier_ones():
    vae = make(TINY)
    video = noise(1, 3, 25, 8, 8)
    z = vae.encode(video)  # chunks of 9, 8, 8 frames
    changed = torch.cat([video[:, :, :17], noise(1, 3, 8, 8, 8, seed=5)], 2)
    after = vae.encode(changed)
    assert torch.equal(after[:, :, :5], z[:, :, :5]) and not torch.equal(after[:, :, 5:], z[:, :, 5:])
    after = vae.decode(torch.cat([z[:, :, :5], noise(1, 3, 2, 1, 1)], 2))  # chunks of 3, 2, 2 latents
    assert torch.equal(after[:, :, :17], vae.decode(z)[:, :, :17])
    first = vae.encode(video[:, :, :9])
    assert torch.equal(first, z[:, :, :3])


def test_a_convolution_sees_the_present_and_two_frames_before():
    conv, x = CausalConv3d(2, 3), noise(1, 2, 6, 3, 3).requires_grad_()
    (grad,) = torch.autograd.grad(conv(x)[:, :, 4].sum(), x)
    seen = [t for t in range(6) if grad[:, :, t].abs().sum() > 0]
    assert seen == [2, 3, 4]
    still = x.detach()[:, :, :1].expand(-1, -1, 6, -1, -1)  # before the first frame the world stood still
    assert_close(conv(x)[:, :, 0], conv(still)[:, :, 5], 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("c", [TINY, SMALL])
def test_a_long_clip_is_decoded_in_chunks(c):
    vae, sizes = make(c), []
    vae.decoder.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[2]))
    vae.decode(noise(1, c.latent_channels, 45, 1, 1))
    assert max(sizes) <= 5 and len(sizes) >= 9


@pytest.mark.parametrize("c, frames", [(SMALL, (0, 2, 8, 15, 17, 24, 33)), (TINY, (0, 2, 5, 7, 10, 12, 15, 18))])
def test_frames_that_would_be_lost_are_refused(c, frames):
    vae = make(c)
    for f in frames:
        with pytest.raises(ValueError, match=f"{f} frames"):
            vae.encode(torch.zeros(1, 3, f, 8, 8))
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 1, 12, 8))


def test_latents_that_are_no_whole_chunks_are_refused():
    with pytest.raises(ValueError, match="1 or 5k"):
        make(SMALL).decode(torch.zeros(1, 12, 6, 1, 1))


@pytest.mark.parametrize(
    "wrong", [{"patch": 3}, {"patch": 1}, {"channels": (8, 8)}, {"groups": 3}, {"chunk_frames": 12}]
)
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ValueError):
        replace(SMALL, **wrong)


# ---- presets, precision ----


@pytest.mark.parametrize("name, video, latents", [
    ("shapes", (16, 64, 64), (12, 5, 8, 8)),
    ("dollar", (128, 192, 320), (12, 40, 24, 40)),
    ("cogvideox-2b", (49, 480, 720), (16, 13, 60, 90)),
    ("cogvideox-5b", (49, 480, 720), (16, 13, 60, 90)),
])  # fmt: skip
def test_presets_have_the_shapes_they_should(name, video, latents):
    with torch.device("meta"), torch.no_grad():
        vae = VAE3D(PRESETS[name])
        z = vae.encode(torch.empty(1, 3, *video))
        assert z.shape[1:] == latents and vae.decode(z).shape[2:] == video


def test_setting_a_scale_after_training_leaves_the_preset_alone():
    vae, other = make(SMALL), make(SMALL)
    vae.config.scaling_factor = 0.5
    z = vae.encode(video := noise(1, 3, 16, 8, 8))
    assert_close(z, other.encode(video) / 2, 1e-6)
    assert_close(vae.decode(z), other.decode(2 * z), 1e-6)


def test_the_decoder_norm_reads_the_latents_of_its_own_place():
    """With a norm that gives zeros only the shift is left: each z fills its block, the first frame stands alone."""
    norm = Norm(2, 2, 1)
    norm.shift.weight.data.fill_(1)
    norm.shift.bias.data.zero_()
    z = torch.arange(12.0).reshape(1, 1, 3, 2, 2)
    out = norm(torch.zeros(1, 2, 9, 4, 4), z)
    for t, source in enumerate([0, 1, 1, 1, 1, 2, 2, 2, 2]):
        assert torch.equal(out[0, 1, t], z[0, 0, source].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_training_in_bf16_and_channels_last_agrees_with_float32():
    vae, video = make(SMALL), noise(2, 3, 16, 16, 16)
    mean, _ = vae.posterior(video)
    want = vae.decode(mean)
    vae.to(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean16, logvar16 = vae.posterior(video)
        got = vae.decode(mean16)
    assert mean16.dtype == logvar16.dtype == got.dtype == torch.float32
    assert_close(mean16, mean, 0.03)
    assert_close(got, want, 0.05)
    got.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters() if p is not None)


@torch.no_grad()
def test_half_weights_take_and_return_any_precision():
    vae, video = make(SMALL), noise(1, 3, 16, 16, 16)
    want = vae.encode(video)
    half = vae.bfloat16()
    assert_close(half.encode(video), want, 0.05)
    assert half.encode(video).dtype == torch.float32 and half.decode(want.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_weights_compute_as_they_are_under_autocast_too(dtype):
    """On a GPU autocast would let norms give out float32, and it mixes no float16 with bfloat16."""
    vae, video = make(SMALL, dtype=dtype), noise(1, 3, 16, 16, 16)
    latents = vae.encode(video)
    want, kept = vae.decode(latents), []
    vae.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(video), latents) and torch.equal(vae.decode(latents), want)
    assert kept == [dtype]


@torch.no_grad()
def test_log_variance_is_clamped():
    vae = make(SMALL)
    vae.encoder.conv_out.bias.data.fill_(1e4)
    assert (vae.posterior(noise(1, 3, 1, 8, 8))[1] == 20).all()
    vae.encoder.conv_out.bias.data.fill_(-1e4)
    assert (vae.posterior(noise(1, 3, 1, 8, 8))[1] == -30).all()


# ---- folders in diffusers' layout ----


def test_round_trip_keeps_every_bit(pair, tmp_path):
    theirs, ours, _ = pair
    cogvideox.save_vae(ours, tmp_path)
    again, back = cogvideox.load_vae(tmp_path), diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    for model, other in ((ours, again), (theirs, back)):
        a, b = model.state_dict(), other.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert again.config == ours.config and back.config.scaling_factor == 0.7


def test_every_name_is_mapped_once(pair):
    theirs, ours, _ = pair
    named = {published_name(name, VAE_NAMES) for name, _ in ours.named_parameters()}
    assert named == set(theirs.state_dict()) and len(named) == len(list(ours.parameters()))


def test_how_chunks_are_coded_survives_the_round_trip(tmp_path):
    c = replace(TINY, chunking="independent", chunk_frames=16)
    cogvideox.save_vae(make(c), tmp_path)
    assert cogvideox.load_vae(tmp_path).config == c
    diffusers.AutoencoderKLCogVideoX.from_pretrained(tmp_path)


def test_shards_and_precision(pair, tmp_path):
    theirs, ours, _ = pair
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for dtype, cast in ((None, torch.float32), (torch.float16, torch.float16)):
        got, want = cogvideox.load_vae(tmp_path, dtype).state_dict(), ours.state_dict()
        assert all(torch.equal(got[k], want[k].to(cast)) for k in want)
    with pytest.raises(UserError, match="give another folder"):  # the index there would win over our file
        cogvideox.save_vae(ours, tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=shard.name):
        cogvideox.load_vae(tmp_path)


def test_half_precision_files_stay_half(pair, tmp_path):
    reference(TINY, 4).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in cogvideox.load_vae(tmp_path).parameters()} == {torch.bfloat16}


@pytest.fixture
def folder(pair, tmp_path):
    """A copy of the weights' folder to spoil, and a function that edits its tensors."""
    for file in pair[2].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(folder, change):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_weights_that_do_not_fit_are_named(folder):
    key = "decoder.up_blocks.0.upsamplers.0.conv.weight"
    edit(folder, lambda t: t.update({key: torch.zeros(12, 12, 1, 3)}))
    with pytest.raises(UserError, match=rf"{key} has shape \(12, 12, 1, 3\)"):
        cogvideox.load_vae(folder)
    edit(folder, lambda t: t.pop(key))
    with pytest.raises(UserError, match=f"1 tensors are missing.*{key}"):
        cogvideox.load_vae(folder)
    edit(folder, lambda t: t.update({"quant_conv.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"quant_conv\.weight"):
        cogvideox.load_vae(folder)


@pytest.mark.parametrize("entry, value", [
    ("_class_name", "AutoencoderKL"), ("use_quant_conv", True), ("act_fn", "gelu"), ("temporal_compression_ratio", 8),
    ("block_out_channels", [4, 8, 8]), ("norm_num_groups", 3), ("block_out_channels", "wide"), ("latent_channels", "x"),
])  # fmt: skip
def test_configs_of_other_models_are_refused(folder, entry, value):
    config = json.loads((folder / "config.json").read_text()) | {entry: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(folder)):
        cogvideox.load_vae(folder)


def test_folders_that_cannot_be_read(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.safetensors"):
        cogvideox.load_vae(folder)
    file.unlink()
    with pytest.raises(UserError, match="0 safetensors files"):
        cogvideox.load_vae(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        cogvideox.load_vae(folder)
    with pytest.raises(UserError, match=r"nowhere"):
        cogvideox.load_vae(folder / "nowhere")


def test_a_patchified_vae_has_no_place_in_diffusers(tmp_path):
    with pytest.raises(UserError, match="patch 4"):
        cogvideox.save_vae(make(SMALL), tmp_path)
