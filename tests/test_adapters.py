"""Adapters: one base, and roles that differ from it by what they have learned and by nothing else."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import config, fit

import adapters
import cogvideox
import common
import dit
import eval as evaluation
import nets
import sample
import train
from adapters import MAPS, Adapted, merge
from common import UserError
from distributed import Ranks
from evals import cost
from generate import Generator

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = replace(dit.PRESETS["shapes"], width=32, depth=2, heads=2)
ROLES = ("student", "ema", "fake")


def perturbed(seed=0, dtype=torch.float64):
    """A base with no zero anywhere."""
    base = dit.DiT(SMALL)
    base.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in base.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return base.to(dtype).requires_grad_(False)


def learned(model, seed=1):
    """An Adapted whose B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@torch.no_grad()
def test_what_is_small_beside_the_base_is_kept():
    """In bfloat16 a weight of 1 has no neighbour nearer than 1/128: merged in it, these adapters would be gone."""
    base = perturbed(dtype=torch.float32).bfloat16()
    model = learned(Adapted(base, 4))
    for p in model.parameters():
        p *= 0.01
    merged, weights = merge(base.state_dict(), model.state_dict()), base.state_dict()
    for i, block in enumerate(model.adapters):
        for name, linear in block.items():
            change, key = linear.B @ linear.A, f"blocks.{i}.{name}.weight"
            error = (merged[key].float() - weights[key].float() - change).norm() / change.norm()
            assert error < 0.01


def inputs(dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 12, 5, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, SMALL.text_length, SMALL.text_dim, generator=generator).to(dtype)
    return x, torch.tensor([300, 900]), text


def built(tiny, out, **changes):
    """The networks of a run with adapters, each role moved elsewhere."""
    cfg = config(tiny, out, rank=4, reward="none", **changes)
    made = nets.build(cfg, ALONE)
    for i, name in enumerate(ROLES):
        learned(getattr(made, name), seed=i)
    return cfg, made


def test_every_role_begins_as_the_base_to_the_bit():
    base, given = perturbed(), inputs()
    assert torch.equal(Adapted(base, 4).double()(*given), base(*given))


def test_a_linear_map_becomes_w_plus_b_a():
    base = perturbed()
    model, x = learned(Adapted(base, 3).double()), torch.randn(5, 32, dtype=torch.float64)
    for name in MAPS:
        linear, low_rank = getattr(base.blocks[1], name), model.adapters[1][name]
        x = torch.randn(5, linear.in_features, dtype=torch.float64)
        want = x @ (linear.weight + low_rank.B @ low_rank.A).T + linear.bias
        torch.testing.assert_close(base.blocks[1].linear(name, x, model.adapters[1]), want)


def test_merged_weights_say_what_the_adapters_say():
    base = perturbed()
    model, merged, given = learned(Adapted(base, 4).double()), dit.DiT(SMALL).double(), inputs()
    merged.load_state_dict(merge(base.state_dict(), model.state_dict()))
    torch.testing.assert_close(merged(*given), model(*given), rtol=1e-5, atol=1e-5)  # merged in float32
    assert (merged(*given) - base(*given)).abs().mean() > 0.01


def test_a_run_has_one_base_and_adapters_for_every_role(tiny, tmp_path):
    _, made = built(tiny, tmp_path)
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert all(getattr(made, name).base is made.teacher for name in ROLES)
    assert not any(p.requires_grad for p in made.teacher.parameters())
    width, depth = made.teacher.config.width, made.teacher.config.depth
    assert all(count(getattr(made, name)) == depth * 4 * 18 * width for name in ROLES)  # 4 of 2 width, 2 of 5
    held = {p.data_ptr() for name in ROLES for p in getattr(made, name).parameters()}
    assert len(held) == 3 * depth * 2 * len(MAPS)  # no tensor serves two roles
    learning = train.adam(made, 1e-3, 1e-3, (0.9, 0.999))
    assert learning.keys() == {"student", "fake"}
    ours = {name: {id(p) for group in o.param_groups for p in group["params"]} for name, o in learning.items()}
    assert ours["student"].isdisjoint(ours["fake"]) and len(ours["fake"]) == depth * 2 * len(MAPS)


@pytest.mark.parametrize("order", [("student", "fake"), ("fake", "student")])
def test_recomputed_activations_are_those_of_the_role_that_was_meant(tiny, tmp_path, order):
    """Both roles go forward before either goes backward: a role that were a switch would be the wrong one by then."""
    _, made = built(tiny, tmp_path)
    x, t, _ = inputs(torch.float32)
    text = made.encoder.encode(["a red star", "a heart grows"])
    gradients = []
    for recomputed in (False, True):
        made.teacher.checkpoint_activations = recomputed
        losses = [getattr(made, name)(x, t, text).square().mean() for name in order]
        made.teacher(x, t, text)
        for loss in losses:
            loss.backward()
        gradients.append([p.grad.clone() for name in order for p in getattr(made, name).parameters()])
        for name in order:
            getattr(made, name).zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert sum(g.abs().sum() for g in gradients[0]) > 0


def test_no_role_feels_anothers_loss(tiny, tmp_path):
    _, made = built(tiny, tmp_path)
    x, t, _ = inputs(torch.float32)
    text = made.encoder.encode(["a red star", "a heart grows"])
    made.student(x, t, text).square().mean().backward()
    assert all(p.grad is not None for p in made.student.parameters())
    for name in ("fake", "ema", "teacher"):
        assert all(p.grad is None for p in getattr(made, name).parameters())
    three = [getattr(made, name)(x, t, text).detach() for name in (*ROLES, "teacher")]
    assert all(not torch.equal(a, b) for i, a in enumerate(three) for b in three[:i])


ABLATIONS = (
    {},
    {"cd_target": "student", "checkpoint_activations": True},
    {"cd_target": "teacher", "generator_input": "data", "transition": "ddim"},
    {"beta_vsd": 0.0, "beta_kl": 1.0},
    {"reward": "jpeg_compressibility", "reward_samples": 3, "global_batch": 4},
)


@pytest.mark.parametrize("changes", ABLATIONS)
def test_all_that_a_run_can_do_works_with_adapters_and_resumes_to_the_bit(tiny, tmp_path, changes):
    changes = {"rank": 4} | changes
    straight, about, lines = fit(config(tiny, tmp_path / "a", **changes))
    fit(config(tiny, tmp_path / "b", **changes | {"iterations": 2}))
    resumed, _, _ = fit(config(tiny, tmp_path / "b", **changes | {"resume": True}))
    assert straight.keys() == resumed.keys() and all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert about["rank"] == 4 and len(lines) == 3
    if not changes.keys() - {"rank"}:  # merged, it goes on as any other student
        fit(config(tiny, tmp_path / "c", student=f"{tmp_path}/a/student.safetensors", iterations=1))
    teacher, _ = common.load_tensors(f"{tiny}/teacher.safetensors")
    moved = {name for name, p in teacher.items() if not torch.equal(p.half(), straight[name])}
    assert moved == {f"blocks.0.{name}.weight" for name in MAPS}
    saved = sum(file.stat().st_size for file in (tmp_path / "a/checkpoints/step_00000003").iterdir())
    assert changes.get("reward") or saved < 2 * 4 * sum(p.numel() for p in teacher.values())  # no network in it


def test_a_checkpoint_of_another_rank_is_refused(tiny, tmp_path):
    fit(config(tiny, tmp_path / "a", rank=4, iterations=1))
    for rank in (8, 0):
        with pytest.raises(UserError, match=r"of another student: repeat its .* --rank"):
            fit(config(tiny, tmp_path / "a", rank=rank, resume=True))
    with pytest.raises(UserError, match="keeps the teacher's last layer"):
        fit(config(tiny, tmp_path / "b", rank=4, prediction="velocity"))


def test_a_student_goes_on_from_its_adapters(tiny, tmp_path):
    fit(config(tiny, tmp_path / "a", rank=4))
    file = tmp_path / "a/adapter.safetensors"
    made = nets.build(config(tiny, tmp_path / "b", rank=4, student=str(file), beta_kl=1.0), ALONE)
    saved = common.load_tensors(file)[0]
    for network in (made.student, made.ema, made.frozen):
        assert all(torch.equal(p.half(), saved[name]) for name, p in network.named_parameters())
    assert all(p.abs().sum() == 0 for name, p in made.fake.named_parameters() if name.endswith("B"))
    with pytest.raises(UserError, match="adapters of rank 4: say --rank 4"):
        nets.build(config(tiny, tmp_path / "b", rank=8, student=str(file)), ALONE)
    other, about = common.load_model(tiny / "teacher.safetensors", dit.DiT)
    other.patch_in.weight.data += 0.1
    common.save_model(tmp_path / "other.safetensors", other, kind="teacher", w=about["w"])
    with pytest.raises(UserError, match="adapters of other weights"):
        nets.build(
            config(tiny, tmp_path / "b", rank=4, student=str(file), teacher=f"{tmp_path}/other.safetensors"), ALONE
        )
    with pytest.raises(UserError, match="written over by the result"):
        nets.build(config(tiny, tmp_path / "a", rank=4, student=str(file)), ALONE)
    with pytest.raises(UserError, match=r"holds Adapted, where DiT is needed; adapters .* --rank"):
        nets.build(config(tiny, tmp_path / "b", student=str(file)), ALONE)


def test_adapters_alone_and_merged_draw_the_same(tiny, tmp_path, monkeypatch):
    fit(config(tiny, tmp_path / "a", rank=4, lr=5e-2, ema=0.0))
    vae, base = f"{tiny}/vae.safetensors", f"{tiny}/teacher.safetensors"
    file = str(tmp_path / "a/adapter.safetensors")
    merged = Generator.load(tmp_path / "a/student.safetensors", vae)
    alone = Generator.load(base, vae, adapter=file)
    assert alone.student and alone.about["timesteps"] == merged.about["timesteps"]
    draw = lambda generator: generator.latents(generator.encoder.encode(["a red star"]), [0], 4)
    torch.testing.assert_close(draw(alone), draw(merged), rtol=0.02, atol=0.02)  # each was rounded to half precision
    untouched = common.load_model(base, dit.DiT)[0].state_dict()  # a base in half precision would lose what is small
    assert all(torch.equal(p, untouched[name]) for name, p in alone.model.base.state_dict().items())
    assert (draw(merged) - draw(Generator.load(base, vae))).abs().max() > 0.05
    sample.main(["--weights", base, "--vae", vae, "--adapter", file, "--steps", "4", "--out", f"{tmp_path}/s.gif"])
    assert (tmp_path / "s.gif").stat().st_size
    measured = evaluation.ModelConfig(weights=base, vae=vae, adapter=file)
    assert torch.equal(draw(measured.load()), draw(alone)) and not measured.load(base).student
    assert {alone.model, alone.model.base, alone.vae} == set(cost.networks(alone))  # whose memory is measured
    model, about = common.load_model(base, dit.DiT)
    with torch.no_grad():
        model.out.bias += 1
    common.save_model(tmp_path / "other.safetensors", model, **about)
    with pytest.raises(UserError, match="adapters of other weights"):
        Generator.load(tmp_path / "other.safetensors", vae, adapter=file)
    with pytest.raises(UserError, match="holds DiT, where Adapted is needed"):
        Generator.load(base, vae, adapter=base)


def test_the_newest_checkpoint_is_exported_merged(tiny, tmp_path):
    straight, *_ = fit(config(tiny, tmp_path / "a", rank=4))
    (tmp_path / "a/student.safetensors").unlink()
    train.export(tmp_path / "a")
    again, about = common.load_tensors(tmp_path / "a/student.safetensors")
    assert all(torch.equal(straight[name], again[name]) for name in straight) and about["kind"] == "student"


def test_memory_is_counted_by_role(tiny, tmp_path):
    cfg = config(tiny, tmp_path, rank=64)
    networks, _ = nets.held(cfg, dit.PRESETS["cogvideox-2b"], 1, (13, 60, 90))
    n, m = 1_693_783_872, 30 * 64 * 18 * 1920
    assert networks["teacher"] == (2 * n, 0, 0) and networks["its average"] == (4 * m, 0, 0)
    assert networks["fake score and its optimizer"] == (4 * m, 4 * m, 8 * m)
    assert sum(map(sum, networks.values())) / 2**30 < 5.5  # beside 66 GiB of full networks


def test_diffusers_draws_the_same_with_the_exported_adapters(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    theirs = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=32, num_layers=2, sample_frames=9, sample_height=4, sample_width=4, max_text_seq_length=8,
    )  # fmt: skip
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    theirs.save_pretrained(tmp_path / "transformer")
    base = cogvideox.load_dit(tmp_path / "transformer")
    model = learned(Adapted(base, 4))
    cogvideox.save_lora(tmp_path / "lora", model.state_dict())
    pipeline = diffusers.CogVideoXPipeline(None, None, None, theirs, diffusers.CogVideoXDDIMScheduler())
    pipeline.load_lora_weights(tmp_path / "lora")
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 3, 4, 4, generator=generator), torch.randn(2, 8, 32, generator=generator)
    t = torch.tensor([300, 900])
    with torch.no_grad():
        ours, plain = model(x, t, text), base(x, t, text)
        want = pipeline.transformer(x.transpose(1, 2), text, t).sample.transpose(1, 2)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)
    assert (ours - plain).abs().mean() > 0.01


def test_the_first_weights_follow_from_the_seed():
    first, again, other = (Adapted(perturbed(), 4) for _ in range(3))
    other.init_weights(1)
    values = [json.dumps([p.tolist() for p in model.parameters()]) for model in (first, again, other)]
    assert values[0] == values[1] != values[2]
    assert adapters.LowRank(8, 6, 2)(torch.zeros(3, 8)).shape == (3, 6)
