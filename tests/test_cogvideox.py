"""CogVideoX in and out: a random one made by diffusers is cached for, distilled, and sampled by diffusers again."""

import collections
import contextlib
import json
import math
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import common
import data
import dit
import nets
import train
import vae3d
from cogvideox import load_dit, save_dit, save_pipeline
from distributed import Ranks
from evals import watch
from generate import Generator, load_network
from schedule import few_step, timesteps
from video import write_video

diffusers = pytest.importorskip("diffusers")
WORLD = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    """A pipeline's folder as published: transformer/, vae/, text_encoder/, tokenizer/, scheduler/; random and tiny."""
    import sentencepiece
    from transformers import T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("cogvideox")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=16, time_embed_dim=16,
            text_embed_dim=32, num_layers=2, sample_frames=17, sample_height=6, sample_width=6,
            max_text_seq_length=16, spatial_interpolation_scale=1.875,
        )  # fmt: skip
        vae = diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(4, 8, 8, 12), latent_channels=16, layers_per_block=1, norm_num_groups=2
        )
        for p in [*transformer.parameters(), *vae.parameters()]:
            p.data += 0.1 * torch.randn_like(p)  # no zero-initialised layer hides an error
        sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
        T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(root / "text_encoder")
    transformer.save_pretrained(root / "transformer")
    vae.save_pretrained(root / "vae")
    diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", snr_shift_scale=3.0, rescale_betas_zero_snr=True, timestep_spacing="trailing",
        clip_sample=False, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
    ).save_pretrained(root / "scheduler")  # fmt: skip
    (root / "tokenizer").mkdir()
    (root / "corpus").write_text("a grey square moves right\nthe quick dog jumps over many words\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus"), model_prefix=str(root / "tokenizer" / "spiece"), vocab_size=60,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    about = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>"}
    (root / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(about | {"unk_token": "<unk>"}))
    return root


def program(module, *words):
    """Run a script's main() as its command line would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, words)])
        module.main()


def encode(cogvideox, clips, out, *more):
    size = ["--text-length", 16, "--frames", 9, "--height", 32, "--width", 32, "--device", "cpu"]
    parts = ["--vae", cogvideox, "--text", cogvideox]
    program(data, "cache", "--preset", "cogvideox-2b", "--data", clips, "--out", out, *parts, *size, *more)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three films and an image."""
    clips = tmp_path_factory.mktemp("clips")
    rows = [{"file_name": "still.png", "text": "a grey square"}]
    Image.new("RGB", (40, 36), (90, 120, 30)).save(clips / "still.png")
    for i in range(3):
        film = torch.full((3, 12, 36, 40), -0.5)
        for frame in range(12):
            film[i, frame, 8:20, 2 * frame : 2 * frame + 12] = 0.8
        write_video(clips / f"film{i}.mp4", film, 8)
        rows.append({"file_name": f"film{i}.mp4", "text": f"the square moves right {'over many words' * i}"})
    (clips / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return clips


@pytest.fixture(scope="module")
def cache(cogvideox, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "cache"
    encode(cogvideox, clips, out)
    return out


def settings(cogvideox, cache, out, *more):
    small = ["--iterations", 4, "--fake-updates", 1, "--m", 1, "--precision", "fp32", "--lr", 1e-3, "--fake-lr", 1e-3]
    parts = ["--teacher", cogvideox, "--data", cache, "--out", out, "--device", "cpu", "--sample-every", 0]
    words = [*parts, *small, *more]
    return ["--preset", "cogvideox-2b", *words]


def test_from_a_pipelines_folder_and_films_to_a_pipeline_again(cogvideox, cache, tmp_path, capsys):
    out, prompt = tmp_path / "run", "the quick square moves over many words"
    program(
        train, *settings(cogvideox, cache, out, "--vae", cogvideox, "--text", cogvideox, "--sample-every", 4)
    )  # 4 iterations: every film and the image once
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(math.isfinite(x) for line in lines for x in line.values())
    assert all(line["skipped"] == 0 and line["vsd"] > 0 and line["cd"] > 0 and line["fake"] > 0 for line in lines)
    assert (out / "compare.mp4").exists() and (out / "step000004.png").exists()
    assert "GiB on each process" in capsys.readouterr().out

    theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(out / "diffusers" / "transformer")
    before = diffusers.CogVideoXTransformer3DModel.from_pretrained(cogvideox / "transformer")
    assert any(not torch.equal(p, q) for p, q in zip(theirs.parameters(), before.parameters()))
    ours = Generator.load(out / "diffusers", cogvideox, text=cogvideox)
    assert ours.student and ours.steps(4) == [999, 749, 499, 249] and ours.about["fps"] == 8
    assert ours.about["latents"] == [3, 4, 4] and ours.config.prediction == "velocity"
    pipe = diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLCogVideoX.from_pretrained(cogvideox / "vae"),
        transformer=theirs.eval(),
        scheduler=diffusers.LCMScheduler.from_pretrained(out / "diffusers" / "scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    text = ours.encoder.encode([prompt])
    for n in (4, 2, 1):
        latents, seen = torch.randn(1, 3, 16, 4, 4, generator=torch.Generator().manual_seed(1)), []
        pipe(
            prompt_embeds=text, latents=latents, num_inference_steps=n, guidance_scale=1.0, height=32, width=32,
            num_frames=9, generator=torch.Generator().manual_seed(2), output_type="latent",
            callback_on_step_end=lambda pipe, i, t, kept, seen=seen: seen.append(kept["latents"]) or kept,
        )  # fmt: skip
        source, calls = torch.Generator().manual_seed(2), []
        noise = lambda i, g=source: torch.randn(1, 3, 16, 4, 4, generator=g).transpose(1, 2)

        def predict(x, t, calls=calls):
            calls.append(x)
            with torch.no_grad():
                return ours.schedule.to_x0(ours.model(x, t, text), x, t, "velocity")

        last = few_step(predict, ours.schedule, latents.transpose(1, 2), ours.steps(n), noise)
        assert len(seen) == n == len(calls)
        for mine, other in zip([*calls[1:], last], seen):
            torch.testing.assert_close(mine, other.transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert ours.decode(ours.latents(text, [0], 4)).shape == (1, 3, 9, 32, 32)


def test_a_cache_spares_vae_and_text_encoder_and_a_student_may_predict_otherwise(cogvideox, cache, tmp_path):
    words = settings(
        cogvideox, cache, tmp_path / "run", "--prediction", "conjugate", "--vae", cogvideox, "--fake-warmup", 0
    )
    cfg = common.parse(train.Config, list(map(str, words)), "", train.PRESETS)
    held = nets.build(cfg, WORLD)
    assert held.vae is None and isinstance(held.encoder, nets.CachedText)
    assert held.teacher.config.prediction == held.fake.config.prediction == "velocity"
    assert held.student.config.prediction == held.ema.config.prediction == "conjugate"
    assert held.schedule.a[-1] == 0 and held.prompts and "a grey square" not in held.prompts  # the image's caption
    torch.testing.assert_close(held.null, data.LatentCache(cache).null)
    optimizers = train.adam(held, 1e-4, 1e-4, (0.9, 0.999))
    _, numbers, made, _ = next(train.algorithm_1(cfg, WORLD, held, optimizers))
    assert made and all(math.isfinite(x) for x in numbers.values())

    line = save_pipeline(tmp_path / "folder", held.ema, held.about)
    assert "sample.py" in line and not (tmp_path / "folder" / "scheduler").exists()
    again = Generator.load(tmp_path / "folder", cogvideox, text=cogvideox)
    assert again.student and again.config == held.student.config and again.config.prediction == "conjugate"
    x, t, text = torch.randn(1, 16, 3, 4, 4), torch.tensor([499]), held.null
    torch.testing.assert_close(again.model(x, t, text), held.ema(x, t, text))


def test_a_teachers_folder_says_its_own_guidance(cogvideox, tmp_path):
    model = load_dit(cogvideox / "transformer")
    for said, w in (({}, 5.0), ({"kind": "teacher", "w": 3.0}, 3.0)):  # published ones: a guidance scale of 6
        save_dit(model, tmp_path / str(w), **said)
        cfg = replace(train.Config(), preset="cogvideox-2b", teacher=str(tmp_path / str(w)))
        assert load_network(tmp_path / str(w))[1]["w"] == nets.read_teacher(cfg).about["w"] == w


def test_adapters_on_a_pipeline_or_its_transformer_alone(cogvideox, cache, tmp_path):
    """The teacher's own files are read once more at the end, to merge the adapters with them."""
    rank = ("--rank", 4, "--iterations", 1, "--vae", "", "--text", "")
    for name, teacher in (("a", cogvideox), ("b", cogvideox / "transformer")):
        program(train, *settings(cogvideox, cache, tmp_path / name, *rank, "--teacher", teacher))
    ours, theirs = (common.load_tensors(tmp_path / name / "student.safetensors")[0] for name in ("a", "b"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (tmp_path / "b/lora/pytorch_lora_weights.safetensors").exists() and (tmp_path / "b/diffusers").is_dir()


def test_a_reward_kept_in_the_cache_spares_the_decoding_of_real_clips(cogvideox, clips, tmp_path, monkeypatch):
    encode(cogvideox, clips, tmp_path / "cache", "--reward", "jpeg_compressibility")
    words = settings(cogvideox, tmp_path / "cache", tmp_path / "run", "--vae", cogvideox, "--reward")
    decoded, decode = [], vae3d.VAE3D.decode
    monkeypatch.setattr(vae3d.VAE3D, "decode", lambda vae, z: decoded.append(len(z)) or decode(vae, z))
    measured = {"true_reward": -1.0, "true_error": 0.1, "lrm_estimate": -1.0, "rank_correlation": 0.0}
    monkeypatch.setattr(watch, "measure", lambda *a, **k: measured)  # decodes fresh samples, which is not asked here
    program(train, *words, "jpeg_compressibility", "--global-batch", 1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert decoded == [1] * 4 and all(line["reward"] < 0 and math.isfinite(line["lrm"]) for line in lines)
    with pytest.raises(common.UserError, match="keeps the reward jpeg_compressibility, not dynamic_degree"):
        program(train, *words, "dynamic_degree")


@pytest.mark.parametrize("schedule", ["ddpm", "cogvideox"])
def test_the_written_scheduler_has_our_noise_levels_and_steps(tmp_path, schedule):
    config = dit.DiTConfig(width=32, depth=1, heads=2, schedule=schedule, prediction="velocity")
    model = dit.DiT(config)
    save_pipeline(tmp_path, model, {"kind": "student", "transition": "renoise", "weights_dtype": "torch.bfloat16"})
    scheduler = diffusers.LCMScheduler.from_pretrained(tmp_path / "scheduler")
    ours = nets.Schedule(schedule, 3.0).a ** 2
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ours, rtol=1e-5, atol=1e-7)
    for n in (1, 2, 4):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == timesteps(n)
    assert load_dit(tmp_path / "transformer").patch_in.weight.dtype == torch.bfloat16
    save_pipeline(tmp_path / "ddim", model, {"transition": "ddim"})
    assert not (tmp_path / "ddim" / "scheduler").exists()


# ---------------------------------------------------------------------------------------------------------------------
# full scale


META = Ranks(0, 1, torch.device("meta"))


def shapes_alone(monkeypatch):
    """Tensors on the meta device have shapes and no memory. What asks for their values hears that all is well."""

    def answer(name, value):
        ask = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *args: value(x) if x.is_meta else ask(x, *args))

    answer("item", lambda x: {torch.bool: True, torch.int64: 1}.get(x.dtype, 0.5))
    answer("__bool__", lambda x: True)
    answer("any", lambda x: torch.tensor(False))


class Stub:
    """Data and text encoder of a size."""

    def __init__(self, config):
        self.config = config

    def at(self, seed, position, size):
        return list(range(size))

    def batch(self, indices, step):
        c, n = self.config, len(indices)
        text = self.encode([""] * n)
        return {"latents": torch.zeros(n, c.channels, *c.latents), "text": text, "captions": [""] * n, "reward": None}

    def encode(self, prompts):
        return torch.zeros(len(prompts), self.config.text_length, self.config.text_dim)


@pytest.mark.parametrize("preset", ["dollar", "cogvideox-2b", "cogvideox-5b"])
def test_an_iteration_at_full_scale(preset, monkeypatch):
    """Every call, backward and update of Algorithm 1 at the true shapes, widths and depths, on meta tensors.

    Weights are bfloat16, as FSDP hands them to the forward on a GPU, and activations are checkpointed. Fewer fake
    updates and teacher steps than the paper's repeat the same calls less often.
    """
    monkeypatch.setattr(train, "autocast", lambda *_: contextlib.nullcontext())  # there is none for meta tensors
    cfg = common.parse(train.Config, ["--preset", preset, "--fake-updates", "2", "--m", "1"], "", train.PRESETS)
    cfg.fake_warmup = cfg.lrm_warmup = 0
    config, calls = dit.PRESETS[preset], collections.Counter()

    def network(name):
        with torch.device("meta"):
            model = dit.DiT(config).bfloat16()
        model.checkpoint_activations = cfg.checkpoint_activations
        model.register_forward_pre_hook(lambda model, inputs: calls.update([name, tuple(inputs[0].shape)]))
        return model

    shapes_alone(monkeypatch)
    networks, stub = [network(name) for name in ("teacher", "student", "fake", "ema")], Stub(config)
    held = nets.Nets(*networks, None, stub, stub, {}, META.device, [])
    held.teacher.requires_grad_(False), held.ema.requires_grad_(False)
    optimizers = train.adam(held, 1e-4, 1e-4, (0.9, 0.999))
    _, numbers, made, _ = next(train.algorithm_1(cfg, META, held, optimizers))
    assert made and numbers.keys() == {"score_gap", "dropped", "vsd", "cd", "grad_norm", "fake", "fake_norm"}
    assert calls["teacher"] == 1 + 1 and calls["ema"] == 1 and calls["student"] >= 1 + 1 + 1 and calls["fake"] == 1 + 2
    alone, guided = (calls[(n, config.channels, *config.latents)] for n in (1, 2))
    assert guided == calls["teacher"] and alone == calls["student"] + calls["fake"] + calls["ema"]
    for name in ("student", "fake"):
        learned = optimizers[name].state
        assert len(learned) == len(list(held.modules[name].parameters()))
        assert all(state["exp_avg"].shape == p.shape for p, state in learned.items())
        assert {int(state["step"]) for state in learned.values()} == {2 if name == "fake" else 1}


@pytest.mark.parametrize(
    "preset, size, shard, gib",
    [  # 2 bytes a parameter of the teacher, 16 of student and fake score, 4 of the average
        ("cogvideox-2b", 1, "full", 1_693_783_872 * 38 / 2**30),
        ("cogvideox-5b", 8, "full", 5_570_283_072 * 38 / 8 / 2**30),
        ("cogvideox-5b", 8, "none", 5_570_283_072 * 38 / 2**30),
    ],
)
def test_memory_is_said_beforehand(preset, size, shard, gib):
    cfg = common.parse(train.Config, ["--preset", preset, "--shard", shard, "--precision", "bf16"], "", train.PRESETS)
    config = dit.PRESETS[preset]
    said = nets.memory(cfg, config, Ranks(0, size, torch.device("cuda")), config.latents)
    assert f"GPU, of {size}" in said and "activations" in said
    together, active = (float(said.split(word + " ")[1].split()[0].rstrip(",")) for word in ("together", "(estimated)"))
    assert together - active == pytest.approx(gib, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# what does not fit


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


WRONG = {
    "another model": lambda model, cache: edit(model / "transformer/config.json", _class_name="UNet2DModel"),
    "no transformer": lambda model, cache: shutil.rmtree(model / "transformer"),
    "missing shard": lambda model, cache: (model / "transformer/diffusion_pytorch_model.safetensors.index.json")
    .write_text(json.dumps({"weight_map": {"proj_out.weight": "model-00001-of-00002.safetensors"}})),
    "cut weights": lambda model, cache: cut(model / "transformer/diffusion_pytorch_model.safetensors"),
    "another shape": lambda model, cache: edit(model / "transformer/config.json", time_embed_dim=24),
    "another vae": lambda model, cache: edit(model / "vae/config.json", scaling_factor=0.5),
    "another text": lambda model, cache: edit(model / "text_encoder/config.json", feed_forward_proj="gated-silu"),
    "unfinished cache": lambda model, cache: next(cache.glob("clip-*")).unlink(),
    "cut cache": lambda model, cache: cut(next(cache.glob("clip-*"))),
    "no cache": lambda model, cache: shutil.rmtree(cache),
    "another preset": lambda model, cache: ["--preset", "cogvideox-5b"],
    "another ranks": lambda model, cache: ["--preset", "dollar"],
    "pure noise": lambda model, cache: ["--prediction", "epsilon"],
    "unknown prediction": lambda model, cache: ["--prediction", "flow"],
    "a reward without decoder": lambda model, cache: ["--reward", "jpeg_compressibility", "--vae", ""],
}  # fmt: skip
SAID = {
    "another model": "UNet2DModel", "no transformer": "transformer", "missing shard": "model-00001-of-00002",
    "cut weights": "diffusion_pytorch_model", "another shape": "time_embed_dim|shape", "another vae": "another vae",
    "another text": "another text", "unfinished cache": "unfinished", "cut cache": "not a whole", "no cache": "no such",
    "another preset": "rotary", "another ranks": "channels", "pure noise": "pure noise",
    "unknown prediction": "invalid choice", "a reward without decoder": "--vae is needed",
}  # fmt: skip


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_clear_line(cogvideox, cache, tmp_path, case):
    model, latents = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(cogvideox, model), shutil.copytree(cache, latents)
    words = WRONG[case](model, latents)
    words = words if isinstance(words, list) else []
    parts = ["--vae", model, "--text", model if case in ("another text", "no cache") else "", *words]
    with pytest.raises(common.UserError, match=SAID[case]) as e:
        program(train, *settings(model, latents, tmp_path / "out", *parts))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "out" / "checkpoints").exists()
