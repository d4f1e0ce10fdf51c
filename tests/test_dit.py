"""The transformer against diffusers' CogVideoXTransformer3DModel, written by others for the public weights.

Every parameter, biases and norms included, is drawn anew for the comparison: with the usual initialisation the gates
and the last layer are zero, and a network that gets everything else wrong would agree.
"""

import copy
import inspect
import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import cogvideox
from common import UserError
from dit import PRESETS, DiT, DiTConfig

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = DiTConfig(
    channels=3, width=96, depth=2, heads=2, text_dim=10, text_length=7, time_dim=20, latents=(3, 8, 12),
    spatial_scale=1.875, temporal_scale=1.3, prediction="velocity", schedule="cogvideox",
)  # fmt: skip
FAMILIES = {"2B": TINY, "5B": replace(TINY, rotary=True, snr_shift=1.0)}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturbed(config, seed=0, dtype=torch.float32):
    model, generator = DiT(config), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator) + (p.data if p.ndim == 1 else 0)
    return model.to(dtype)


def inputs(config, batch=2, size=None, length=None, seed=1):
    x = draw(batch, config.channels, *(size or config.latents), seed=seed)
    t = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(seed))
    return x, t, draw(batch, length or config.text_length, config.text_dim, seed=seed + 1)


def reference(model, text_length=None):
    """diffusers' model with the same weights, built from literal arguments so that our own config map is tested too."""
    c = model.config
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=c.heads, attention_head_dim=c.width // c.heads, in_channels=c.channels,
        out_channels=c.channels, time_embed_dim=c.time_dim, text_embed_dim=c.text_dim, num_layers=c.depth,
        sample_frames=4 * c.latents[0] - 3, sample_height=c.latents[1], sample_width=c.latents[2], norm_eps=c.norm_eps,
        patch_size=c.patch, max_text_seq_length=text_length or c.text_length,
        spatial_interpolation_scale=c.spatial_scale, temporal_interpolation_scale=c.temporal_scale,
        use_rotary_positional_embeddings=c.rotary,
    )  # fmt: skip
    ours = dict(model.named_parameters())
    names = cogvideox.published_names(model, cogvideox.DIT_NAMES)
    theirs.load_state_dict({key: ours[name] for key, name in names.items()})
    return theirs


def run_reference(theirs, x, t, text):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    rope, c, p = None, theirs.config, theirs.config.patch_size
    if c.use_rotary_positional_embeddings:
        grid = x.shape[3] // p, x.shape[4] // p
        crop = get_resize_crop_region_for_grid(grid, c.sample_width // p, c.sample_height // p)
        rope = get_3d_rotary_pos_embed(c.attention_head_dim, crop, grid, x.shape[2])
    return theirs(x.transpose(1, 2), text, t, image_rotary_emb=rope).sample.transpose(1, 2)


CASES = [  # batch, latent size, text length: the config's own, fewer and more frames, other shapes, an image
    (2, (3, 8, 12), 7),
    (1, (5, 8, 12), 4),
    (3, (1, 8, 12), 9),
    (2, (2, 12, 20), 1),
    (1, (2, 14, 6), 7),
    (1, (2, 4, 20), 7),
    (1, (2, 4, 6), 12),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_output_agrees_with_diffusers(family, case):
    batch, size, length = CASES[case]
    model = perturbed(FAMILIES[family], seed=case)
    x, t, text = inputs(model.config, batch, size, length, seed=case)
    with torch.no_grad():
        y, want = model(x, t, text), run_reference(reference(model, length), x, t, text)
    assert y.shape == x.shape and want.std() > 0.3
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", range(4))
def test_other_widths_heads_and_depths_agree_with_diffusers(case):
    changes = [
        {"width": 128, "heads": 4, "rotary": True, "channels": 5, "text_dim": 3},
        {"width": 48, "heads": 3, "depth": 1, "time_dim": 7, "norm_eps": 1e-3},
        {"width": 64, "heads": 4, "rotary": True, "patch": 4, "depth": 3},
        {"width": 80, "heads": 1, "patch": 1, "latents": (2, 3, 5)},
    ][case]
    model = perturbed(replace(TINY, **changes), seed=case)
    with torch.no_grad():
        y, want = model(*inputs(model.config)), run_reference(reference(model), *inputs(model.config))
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


def test_epsilon_of_the_query_and_key_norms_agrees_with_diffusers():
    model = perturbed(TINY)
    for block in model.blocks:
        for part in (block.q, block.k):  # so small that their variance is near the epsilon
            part.weight.data *= 1e-3
            part.bias.data *= 1e-3
    with torch.no_grad():
        y, want = model(*inputs(TINY)), run_reference(reference(model), *inputs(TINY))
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_diffusers(family):
    model = perturbed(FAMILIES[family])
    theirs = reference(model)
    x, t, text = inputs(model.config)
    grads = []
    for network in (model, lambda *a: run_reference(theirs, *a)):
        ins = x.clone().requires_grad_(), text.clone().requires_grad_()
        (network(ins[0], t, ins[1]) * draw(*x.shape, seed=9)).mean().backward()
        grads.append([i.grad for i in ins])
    for ours, want in zip(*grads):
        torch.testing.assert_close(ours, want, atol=1e-6, rtol=1e-4)
    ours, want = dict(model.named_parameters()), dict(theirs.named_parameters())
    names = cogvideox.published_names(model, cogvideox.DIT_NAMES)
    assert set(names) == set(want) and set(names.values()) == set(ours)
    for key, name in names.items():
        torch.testing.assert_close(ours[name].grad, want[key].grad, atol=1e-6, rtol=1e-4, msg=key)


def test_parameter_counts_of_the_published_sizes():
    with torch.device("meta"):
        count = {name: sum(p.numel() for p in DiT(config).parameters()) for name, config in PRESETS.items()}
    assert count["cogvideox-2b"] == 1_693_783_872 and count["cogvideox-5b"] == 5_570_283_072
    # 4 channels fewer, in and out, and nothing else
    assert count["cogvideox-2b"] - count["dollar"] == 4 * 4 * (1920 + 1920 + 1)
    assert 3e6 < count["shapes"] < 8e6  # small enough for two CPU cores


def test_published_presets():
    """diffusers' defaults are the 2B; the 5B differs from them in three arguments."""
    arguments = inspect.signature(diffusers.CogVideoXTransformer3DModel.__init__).parameters
    larger = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
    for name, differs in (("cogvideox-2b", {}), ("cogvideox-5b", larger)):
        theirs = cogvideox._to_diffusers(PRESETS[name])
        assert {key: value for key, value in theirs.items() if arguments[key].default != value} == differs
        assert set(arguments) - set(theirs) <= {"self", "dropout"}


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family):
    model = perturbed(FAMILIES[family])
    batch = inputs(model.config)
    grads = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        saved = 0

        def pack(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*batch).square().mean()
        loss.backward()
        grads.append(([p.grad.clone() for p in model.parameters()], saved))
    for plain, recomputed in zip(grads[0][0], grads[1][0]):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-6)
    assert grads[1][1] < grads[0][1] / 3  # and the blocks' activations were not kept


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family):
    model = perturbed(FAMILIES[family])
    model.checkpoint_activations = True
    x, t, text = inputs(model.config)
    want = model(x, t, text).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x, t, text)
        y.square().mean().backward()
    assert y.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
    assert (y - want).abs().max() < 0.1 * want.abs().max()
    for dtype, far in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        half = copy.deepcopy(model).to(dtype)
        assert half(x, t, text).dtype == torch.float32  # x's
        y = half(x.to(dtype), t, text.to(dtype))
        y.float().square().mean().backward()
        assert y.dtype == dtype and (y - want).abs().max() < far * want.abs().max()


def test_half_precision_is_diffusers_own():
    """In bfloat16 too the two differ by its rounding alone: rotations and the sinusoid of t stay in float32."""
    for config in FAMILIES.values():
        model = perturbed(config)
        x, t, text = inputs(config)
        with torch.no_grad():
            exact, theirs = model(x, t, text), reference(model).bfloat16()
            want = run_reference(theirs, x.bfloat16(), t, text.bfloat16())
            y = model.bfloat16()(x.bfloat16(), t, text.bfloat16())
        assert (y - exact).square().mean() < 1.2 * (want - exact).square().mean()


def test_positions_know_time_row_and_column():
    """Moving a patch moves its output only if positions are read: exchange two patches and see, along every axis."""
    for config in FAMILIES.values():
        model = perturbed(config)
        x, t, text = inputs(config, batch=1, size=(4, 8, 8))
        for axis in (2, 3, 4):
            flipped = x.roll(2, axis)
            with torch.no_grad():
                y = model(flipped, t, text).roll(-2, axis)
                assert (y - model(x, t, text)).abs().max() > 1e-3, (config.rotary, axis)


def test_a_sample_depends_on_its_own_inputs_only():
    model = perturbed(TINY)
    x, t, text = inputs(TINY, batch=3)
    with torch.no_grad():
        whole = model(x, t, text)
        for i in range(3):
            torch.testing.assert_close(
                model(x[i : i + 1], t[i : i + 1], text[i : i + 1])[0], whole[i], atol=1e-5, rtol=0
            )
        for changed in ((x.flip(0), t, text), (x, 999 - t, text), (x, t, text.flip(0))):
            assert (model(*changed) - whole).abs().max() > 1e-2


def test_wrong_shapes_are_refused():
    model = DiT(TINY)
    x, t, text = inputs(TINY)
    for bad in ((x[:, :2], t, text), (x[..., :7], t, text), (x, t[:1], text), (x, t, text[..., :9]), (x, t, text[:1])):
        with pytest.raises(ValueError, match="do not fit"):
            model(*bad)
    with pytest.raises(ValueError, match="multiple"):
        DiTConfig(width=100)
    with pytest.raises(ValueError, match="multiple"):
        DiTConfig(width=96, heads=4, rotary=True)


def test_initialisation():
    before = torch.random.get_rng_state()
    model = DiT(TINY)
    assert torch.equal(before, torch.random.get_rng_state())  # the global generator is left alone
    assert not model(*inputs(TINY)).any()  # the last layer starts at zero
    with torch.device("meta"):
        empty = DiT(TINY)
    for p in empty.to_empty(device="cpu").parameters():
        p.data.fill_(float("nan"))
    empty.init_weights(0)
    other = DiT(TINY)
    other.init_weights(1)
    for (name, p), q, r in zip(model.named_parameters(), empty.parameters(), other.parameters()):
        assert torch.equal(p, q), name
        zero = name.endswith("bias") or name == "out.weight" or "modulation" in name
        if zero or "norm" in name:
            assert (p == (0 if zero else 1)).all(), name
        else:
            fan = p.shape[0] + p[0].numel()
            assert not torch.equal(p, r) and abs(p.var() / (2 / fan) - 1) < 0.25, name
    # with the gates shut every block is the identity
    text, video, c = draw(1, 7, 96), draw(1, 5, 96), draw(1, 1, 20)
    assert all(torch.equal(a, b) for a, b in zip(model.blocks[0](text, video, c, None), (text, video)))


def test_config_survives_json():
    assert DiTConfig(**json.loads(json.dumps(asdict(TINY)))) == TINY


def test_training_after_sampling_in_inference_mode():
    """The position tables kept from an inference_mode forward must be fit for autograd."""
    for config in FAMILIES.values():
        model = perturbed(replace(config, latents=(2, 6, 10)))
        with torch.inference_mode():
            model(*inputs(model.config))
        model(*inputs(model.config)).sum().backward()


# weights in and out


@pytest.fixture(params=FAMILIES)
def published(request, tmp_path):
    """A folder as diffusers writes it, and the model in it."""
    model = perturbed(FAMILIES[request.param])
    folder = tmp_path / "pipeline" / "transformer"
    reference(model).save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(published, dtype, tmp_path):
    folder, model = published
    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    theirs.save_pretrained(folder)
    ours = cogvideox.load_dit(folder)
    assert ours.config == model.config and next(ours.parameters()).dtype == dtype
    cogvideox.save_dit(ours, tmp_path / "out")
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    again = cogvideox.load_dit(tmp_path / "out")
    back = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "out", torch_dtype=dtype)
    for key in before:
        assert before[key].dtype == after[key].dtype == dtype and torch.equal(before[key], after[key]), key
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), back.parameters()))
    skip = ("_name_or_path", "_dollar", "_class_name", "_diffusers_version", "_use_default_values")
    assert {k: v for k, v in theirs.config.items() if k not in skip} == {
        k: v for k, v in back.config.items() if k not in skip
    }
    wide = cogvideox.load_dit(folder, dtype=torch.float64)
    assert all(
        torch.equal(p.double(), q) and q.dtype == torch.float64 for p, q in zip(ours.parameters(), wide.parameters())
    )
    if dtype == torch.float32:
        with torch.no_grad():
            assert torch.equal(again(*inputs(model.config)), model(*inputs(model.config)))


def test_shards(published):
    folder, model = published
    whole = load_file(folder / WEIGHTS)
    reference(model).save_pretrained(folder / "sharded", max_shard_size="200KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    loaded = cogvideox.load_dit(folder / "sharded")
    assert all(
        torch.equal(loaded.get_parameter(name), whole[key])
        for key, name in cogvideox.published_names(loaded, cogvideox.DIT_NAMES).items()
    )
    with pytest.raises(UserError, match="already holds"):
        cogvideox.save_dit(loaded, folder / "sharded")
    gone = sorted((folder / "sharded").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=gone.name):
        cogvideox.load_dit(folder / "sharded")


def test_prediction_and_schedule(published, tmp_path):
    folder, model = published
    assert cogvideox.load_dit(folder).config == model.config  # alone: as published for its family
    scheduler = diffusers.CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear", rescale_betas_zero_snr=True, prediction_type="v_prediction", snr_shift_scale=2.0
    )
    scheduler.save_pretrained(folder.parent / "scheduler")
    config = cogvideox.load_dit(folder).config
    assert (config.prediction, config.schedule, config.snr_shift) == ("velocity", "cogvideox", 2.0)
    made = perturbed(replace(model.config, prediction="conjugate", schedule="ddpm", snr_shift=5.0))
    (folder / WEIGHTS).unlink()
    cogvideox.save_dit(made, folder)  # our own word goes before the scheduler that happens to stand beside it
    assert cogvideox.load_dit(folder).config == made.config
    (folder / "config.json").write_text(
        json.dumps({"_class_name": cogvideox.DIT_CLASS} | cogvideox._to_diffusers(model.config))
    )
    for key, value in (("rescale_betas_zero_snr", False), ("beta_schedule", "linear"), ("prediction_type", "epsilon")):
        file = folder.parent / "scheduler" / "scheduler_config.json"
        good = file.read_text()
        file.write_text(json.dumps(json.loads(good) | {key: value}))
        with pytest.raises(UserError, match=key):
            cogvideox.load_dit(folder)
        file.write_text(good)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


BAD = {
    "another model": (lambda f: edit_config(f, _class_name="WanTransformer3DModel"), "WanTransformer3DModel"),
    "1.5": (lambda f: edit_config(f, patch_size_t=2), "patch_size_t"),
    "1.5 image to video": (lambda f: edit_config(f, ofs_embed_dim=512), "ofs_embed_dim"),
    "image to video": (lambda f: edit_config(f, in_channels=6), "out_channels"),
    "learned positions": (lambda f: edit_config(f, use_learned_positional_embeddings=True), "use_learned"),
    "no such size": (lambda f: edit_config(f, num_attention_heads=None), "config.json"),
    "odd width": (lambda f: edit_config(f, attention_head_dim=47), "multiple"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "0 safetensors files"),
    "index of nothing": (lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {}}'), "64 tensors"),
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]), WEIGHTS),
    "not safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"PK\x03\x04 a zip"), WEIGHTS),
    "unknown key": (lambda f: edit_weights(f, lambda w: w.update({"lora.A": torch.zeros(1)})), "lora.A"),
    "missing key": (lambda f: edit_weights(f, lambda w: w.pop("norm_final.bias")), "norm_final.bias"),
    "too shallow": (lambda f: edit_config(f, num_layers=3), "transformer_blocks.2"),
    "too deep": (lambda f: edit_config(f, num_layers=1), "transformer_blocks.1"),
    "shape": (lambda f: edit_config(f, text_embed_dim=11), "patch_embed.text_proj.weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders(case, tmp_path):
    cogvideox.save_dit(perturbed(TINY), tmp_path)
    spoil, named = BAD[case]
    spoil(tmp_path)
    with pytest.raises(UserError, match=named) as e:
        cogvideox.load_dit(tmp_path)
    assert str(tmp_path) in str(e.value)


def test_a_stored_table_is_dropped(tmp_path):
    model = perturbed(TINY)
    cogvideox.save_dit(model, tmp_path)
    edit_weights(tmp_path, lambda w: w.update({"patch_embed.pos_embedding": torch.zeros(1, 79, 96)}))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), cogvideox.load_dit(tmp_path).parameters()))


def test_missing_folder_and_unwritable_place(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        cogvideox.load_dit(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        cogvideox.save_dit(DiT(TINY), tmp_path / "file")


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def sharded(config, mesh, **how):
    """Each block wrapped with FSDP2, from the meta device."""
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = DiT(config)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, **how)
    return model.to_empty(device="cpu")


def test_sharding_changes_nothing(mesh):
    from torch.distributed.tensor.experimental import implicit_replication

    models = sharded(TINY, mesh), DiT(TINY)
    for model in models:
        with implicit_replication():
            model.init_weights(3)
        model.out.weight.data.fill_(0.1)
        model(*inputs(TINY)).square().mean().backward()
    for p, q in zip(*(model.parameters() for model in models)):
        assert torch.equal(p.full_tensor(), q)
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_sharding_in_mixed_precision_rounds_no_position(family, mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import distribute_tensor

    plain = perturbed(replace(FAMILIES[family], latents=(9, 8, 12)))
    model = sharded(plain.config, mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for p, q in zip(model.parameters(), plain.parameters()):
        p.data.copy_(distribute_tensor(q.data, mesh, p.placements))
    x, t, text = inputs(plain.config)
    with torch.no_grad():
        assert torch.equal(model(x, t, text), plain.bfloat16()(x.bfloat16(), t, text.bfloat16()))
