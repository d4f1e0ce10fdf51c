"""CogVideoX's published weights, in and out: the transformer and the VAE as folders in diffusers' layout.

diffusers keeps a network as config.json beside one safetensors file, or several with an index. Here stand the map
between its names and ours, which entries of its config we know, and which values of the others are other models (the
1.5 and image-to-video models among them). Tensors are read one at a time, so the peak is the weights and one tensor,
and a rank can keep its rows alone. Config entries that begin with an underscore are skipped by diffusers: `_dollar`
keeps there what only we need.
"""

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch

import common
from common import UserError, atomic, load_model, open_tensors, save_tensors, uses_bfloat16
from dit import PRESETS, DiT, DiTConfig
from schedule import Schedule
from vae3d import VAE3D, VAEConfig

# From our names to diffusers': each pattern that is found is replaced, in this order.
# fmt: off
DIT_NAMES = {
    r"^patch_in": "patch_embed.proj", r"^text_in": "patch_embed.text_proj",
    r"^time_in": "time_embedding.linear_1", r"^time_out": "time_embedding.linear_2",
    r"^norm_out": "norm_out.norm", r"^modulation_out": "norm_out.linear",
    r"^norm\.": "norm_final.", r"^out": "proj_out",
    r"^blocks": "transformer_blocks",
    r"\.norm([12])": r".norm\1.norm", r"\.modulation([12])": r".norm\1.linear",
    r"\.([qkv])\.": r".attn1.to_\1.", r"\.norm_([qk])": r".attn1.norm_\1", r"\.out\.": ".attn1.to_out.0.",
    r"\.up\.": ".ff.net.0.proj.", r"\.down\.": ".ff.net.2.",
}
POSITIONS = "patch_embed.pos_embedding"  # the fixed table, which some files store and we compute
DIT_CLASS = "CogVideoXTransformer3DModel"
DIT_CONFIG = {
    "channels": "in_channels", "heads": "num_attention_heads", "depth": "num_layers", "patch": "patch_size",
    "text_dim": "text_embed_dim", "text_length": "max_text_seq_length", "time_dim": "time_embed_dim",
    "rotary": "use_rotary_positional_embeddings", "spatial_scale": "spatial_interpolation_scale",
    "temporal_scale": "temporal_interpolation_scale", "norm_eps": "norm_eps",
}
DIT_FIXED = {  # the first is set in CogVideoX 1.5, the next two in its image-to-video kin
    "patch_size_t": None, "ofs_embed_dim": None, "use_learned_positional_embeddings": False, "patch_bias": True,
    "attention_bias": True, "activation_fn": "gelu-approximate", "timestep_activation_fn": "silu",
    "norm_elementwise_affine": True, "flip_sin_to_cos": True, "freq_shift": 0, "temporal_compression_ratio": 4,
}
DIT_OURS = ("prediction", "schedule", "snr_shift")  # what diffusers keeps in its scheduler, and we with the weights
SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
}

VAE_NAMES = {
    r"^encoder\.blocks\.(\d)": r"encoder.down_blocks.\1.resnets",
    r"^decoder\.blocks\.(\d)": r"decoder.up_blocks.\1.resnets",
    r"^encoder\.down\.(\d)": r"encoder.down_blocks.\1.downsamplers.0",
    r"^decoder\.up\.(\d)": r"decoder.up_blocks.\1.upsamplers.0",
    r"\.mid\.": ".mid_block.resnets.",
    r"\.shortcut": ".conv_shortcut",
    r"\.conv(1|2|_in|_out)": r".conv\1.conv",
    r"^(decoder.*\.norm\w+)\.(weight|bias)": r"\1.norm_layer.\2",
    r"\.scale": ".conv_y.conv", r"\.shift": ".conv_b.conv",
}
VAE_CLASS = "AutoencoderKLCogVideoX"
VAE_CONFIG = {
    "channels": "block_out_channels", "latent_channels": "latent_channels", "layers_per_block": "layers_per_block",
    "groups": "norm_num_groups", "scaling_factor": "scaling_factor",
}
VAE_FIXED = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_eps": 1e-6, "temporal_compression_ratio": 4,
    "use_quant_conv": False, "use_post_quant_conv": False,
}
# fmt: on


def published_name(name, names):
    """blocks.0.q.weight -> transformer_blocks.0.attn1.to_q.weight. names: DIT_NAMES or VAE_NAMES."""
    for pattern, published in names.items():
        name = re.sub(pattern, published, name)
    return name


def published_names(model, names):
    """{name in diffusers: name here} of every parameter."""
    return {published_name(name, names): name for name, _ in model.named_parameters()}


def published_shape(key, p):
    """The VAE's samplers have two-dimensional convolutions there, and here three-dimensional ones of depth one."""
    return p.shape[:2] + p.shape[3:] if "samplers" in key and p.dim() == 5 else p.shape


# ---------------------------------------------------------------------------------------------------------------------
# the transformer


def load_dit(folder, dtype=None):
    """The DiT in `folder`, the `transformer` folder of a diffusers pipeline, in one file or in shards.

    dtype None keeps each tensor's own. Raises UserError naming the file, field or tensor that does not fit.
    """
    with torch.device("meta"):
        model = DiT(read_dit_config(folder))
    return load_weights(model, folder, DIT_NAMES, dtype)


def save_dit(model, folder, **about):
    """Write config.json and one safetensors file that diffusers' CogVideoXTransformer3DModel loads, in our dtype.

    about: what else the folder shall say of the network, for `read_dit_about`.
    Raises UserError if the folder cannot be written, or holds sharded weights, which would be read instead.
    """
    ours = about | {name: getattr(model.config, name) for name in DIT_OURS}
    save_folder(folder, DIT_CLASS, _to_diffusers(model.config) | {"_dollar": ours}, model, DIT_NAMES)


def read_dit_weights(folder, config):
    """Every (our name, tensor) of a transformer's folder, one at a time; config: its DiTConfig. Raises UserError."""
    with torch.device("meta"):
        model = DiT(config)
    return read_weights(folder, model, DIT_NAMES)


def read_dit_about(folder):
    """What is known of a network beside its size: that of a published teacher, or what `save_dit` has noted."""
    published = {"kind": "teacher", "w": 5.0}  # made for a guidance scale of 6
    return published | read_json(Path(folder) / "config.json").get("_dollar", {})


def _to_diffusers(config):
    frames, height, width = config.latents
    made = {theirs: getattr(config, ours) for ours, theirs in DIT_CONFIG.items()} | DIT_FIXED
    made |= {"attention_head_dim": config.width // config.heads, "out_channels": config.channels}
    return made | {"sample_frames": 4 * frames - 3, "sample_height": height, "sample_width": width}  # of the video


def read_dit_config(folder):
    """The DiTConfig of a diffusers folder; a field that is not there has diffusers' default, which is the 2B's.

    Its schedule is what we noted, or the pipeline's scheduler beside it says, or is usual in its family.
    """
    file, beside = Path(folder) / "config.json", Path(folder).parent / "scheduler" / "scheduler_config.json"
    get = read_config(file, DIT_CLASS, _to_diffusers(PRESETS["cogvideox-2b"]), DIT_FIXED)
    with describes_cogvideox(file):
        check(file, get, {"out_channels": get["in_channels"]})
        shift = 1.0 if get["use_rotary_positional_embeddings"] else 3.0
        made = {"prediction": "velocity", "schedule": "cogvideox", "snr_shift": shift}
        if "_dollar" in get:
            made = {name: get["_dollar"][name] for name in DIT_OURS}
        elif beside.exists():
            scheduler = SCHEDULER | {"snr_shift_scale": shift} | read_json(beside)
            check(beside, scheduler, SCHEDULER)
            made["snr_shift"] = scheduler["snr_shift_scale"]
        return DiTConfig(
            **{ours: get[theirs] for ours, theirs in DIT_CONFIG.items()} | made,
            width=get["num_attention_heads"] * get["attention_head_dim"],
            latents=((get["sample_frames"] - 1) // 4 + 1, get["sample_height"], get["sample_width"]),
        )


# ---------------------------------------------------------------------------------------------------------------------
# the VAE


def load_vae(place, dtype=None):
    """The VAE3D of a diffusers pipeline, of its `vae` folder, or in a .safetensors file of ours.

    dtype None keeps each tensor's own (a file of ours is read in float32). Raises UserError naming the file, key or
    tensor that does not fit.
    """
    if not Path(place).is_dir():
        return load_model(place, VAE3D)[0].to(dtype=dtype)
    folder = below(place, "vae")
    default, file = VAEConfig(), folder / "config.json"
    get = {theirs: getattr(default, ours) for ours, theirs in VAE_CONFIG.items()} | VAE_FIXED
    get = read_config(file, VAE_CLASS, get, VAE_FIXED)
    with describes_cogvideox(file), torch.device("meta"):
        given = {ours: get[theirs] for ours, theirs in VAE_CONFIG.items()}
        model = VAE3D(VAEConfig(**given, **get.get("_dollar", {})))
    return load_weights(model, folder, VAE_NAMES, dtype).eval()


def load_vae_of(weights, config, place, precision, device):
    """`load_vae` for the network of a DiTConfig, called `weights`, frozen on its device.

    Published VAEs stay in half precision where the device computes in bfloat16. UserError for other latent channels.
    """
    vae = load_vae(place, None if uses_bfloat16(precision, device) else torch.float32)
    if (there := vae.config.latent_channels) != config.channels:
        said = f"{place} has {there} latent channels, {weights} {config.channels}"
        raise UserError(f"{said}: name the weights' own VAE with --vae")
    return vae.to(device, memory_format=torch.channels_last_3d).eval().requires_grad_(False)


def save_vae(model, folder):
    """Write a folder that diffusers' AutoencoderKLCogVideoX.from_pretrained loads, in our dtype.

    diffusers always streams; how this one codes its chunks stays in `_dollar`. Raises UserError if the folder cannot be
    written, or the model has a patchified stem, which diffusers does not know.
    """
    c = model.config
    if c.patch != 1 or len(c.channels) != 4:
        raise UserError(f"diffusers knows no VAE with patch {c.patch} and {len(c.channels)} levels of channels")
    config = {theirs: getattr(c, ours) for ours, theirs in VAE_CONFIG.items()} | VAE_FIXED
    ours = {"chunking": c.chunking, "chunk_frames": c.chunk_frames}
    save_folder(folder, VAE_CLASS, config | {"_dollar": ours}, model, VAE_NAMES)


# ---------------------------------------------------------------------------------------------------------------------
# diffusers' pipeline


def save_pipeline(folder, model, about):
    """Write a student (a DiT, its file's metadata) as diffusers' transformer/ and scheduler/. Returns a line to print.

    diffusers' LCMScheduler renoises as `few_step` does. It has no SNR shift, so it gets our betas as such; of its own
    boundary condition (c_skip, c_out) a large timestep_scaling leaves nothing; with 1000 original steps its n steps are
    ours. A student that predicts no velocity, or goes by DDIM between the steps, leaves without scheduler/, and the
    transformer's config says what it predicts (`_dollar`), which is all that `Generator.load` needs.
    """
    folder, c = Path(folder), model.config
    dtype = getattr(torch, about.get("weights_dtype", "torch.float32").removeprefix("torch."))
    save_dit(model.to(dtype), folder / "transformer", **about)
    (file := folder / "scheduler" / "scheduler_config.json").unlink(missing_ok=True)  # an earlier run's
    if c.prediction != "velocity" or c.schedule == "flow" or about["transition"] != "renoise":
        return f"wrote {folder}/transformer, for sample.py alone: diffusers has no sampler for it"
    abar = Schedule(c.schedule, c.snr_shift).a ** 2
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    config = {"_class_name": "LCMScheduler", "trained_betas": betas.tolist(), "prediction_type": "v_prediction"}
    config |= {"num_train_timesteps": 1000, "original_inference_steps": 1000, "timestep_scaling": 1e6}
    config |= {"clip_sample": False, "set_alpha_to_one": True}
    with atomic(file) as part:
        part.write_text(json.dumps(config, indent=2) + "\n")
    return f"wrote {folder}: transformer and scheduler for diffusers' CogVideoXPipeline (guidance_scale=1)"


def save_lora(folder, adapters):
    """Write a student's adapters (an Adapted's state dict) as diffusers' `load_lora_weights` takes them."""
    tensors = {}
    for name, p in adapters.items():
        _, block, linear, matrix = name.split(".")  # adapters.<block>.<linear>.<A or B>
        module = published_name(f"blocks.{block}.{linear}.weight", DIT_NAMES).removesuffix(".weight")
        tensors[f"transformer.{module}.lora_{matrix}.weight"] = p
    file = Path(folder) / "pytorch_lora_weights.safetensors"
    save_tensors(file, tensors, {"format": "pt"})
    return f"wrote {file}, for load_lora_weights of diffusers' CogVideoXPipeline"


# ---------------------------------------------------------------------------------------------------------------------
# folders


def below(folder, name):
    """A pipeline's part: `folder`/name, or `folder` itself where that is the part."""
    return Path(folder) / name if (Path(folder) / name).is_dir() else Path(folder)


def read_json(path):
    if not path.exists():
        raise UserError(f"there is no {path}: want a pipeline of diffusers, or its transformer/ or vae/")
    return common.read_json(path)


def read_config(file, name, defaults, fixed):
    """A config.json as a dict. UserError where its class is not `name`, or a value is not that of `fixed`."""
    config = defaults | read_json(file)
    check(file, config, {"_class_name": name} | fixed)
    return config


def check(file, config, fixed):
    for key, value in fixed.items():
        if config.get(key) != value:
            raise UserError(f"{file}: {key} is {config.get(key)}, in CogVideoX 2B and 5B it is {value}")


@contextmanager
def describes_cogvideox(file):
    """UserError where what is made of the values in `file` cannot be."""
    try:
        yield
    except (TypeError, ValueError, KeyError) as e:
        raise UserError(f"{file} describes no CogVideoX network: {e}") from e


def save_folder(folder, name, config, model, names):
    """Write a model and its config as a folder in diffusers' layout, under the `_class_name` name.

    Raises UserError where it cannot be written, or the folder holds other weights that would be read instead.
    """
    file = Path(folder) / "diffusion_pytorch_model.safetensors"
    if others := [p for p in file.parent.glob("[!.]*.safetensors*") if p != file]:
        raise UserError(f"{folder} already holds {others[0].name}: give another folder")
    weights = {key: model.get_parameter(name).data for key, name in published_names(model, names).items()}
    save_tensors(file, {key: p.reshape(published_shape(key, p)) for key, p in weights.items()}, {"format": "pt"})
    with atomic(file.parent / "config.json") as part:
        part.write_text(json.dumps({"_class_name": name, **config}, indent=2) + "\n")


def read_weights(folder, model, names):
    """Every (our name, tensor) of a folder's weights, one at a time, so that a rank can keep its rows alone.

    model: of that size, on the meta device. Raises UserError naming a tensor that is missing, unknown or misshapen.
    """
    missing = published_names(model, names)
    for key, tensor in _read_tensors(Path(folder)):
        if key == POSITIONS:
            continue
        if key not in missing:
            raise UserError(f"{folder}: config.json has no place for the tensor {key}")
        p = model.get_parameter(missing[key])
        got, want = tuple(tensor.shape), tuple(published_shape(key, p))
        if got != want:
            raise UserError(f"{folder}: {key} has shape {got}, but config.json asks for {want}")
        yield missing.pop(key), tensor.reshape(p.shape)
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {next(iter(missing))}")


def _read_tensors(folder):
    """Every (key, tensor) of a folder's weights in one file or in shards with an index, one at a time; else UserError.

    Each comes from the file opened anew: the pages of a mapped file count as memory until it is closed.
    """
    files = list(folder.glob("[!.]*.safetensors"))
    if index := list(folder.glob("*.safetensors.index.json")):
        files = sorted({folder / file for file in read_json(index[0])["weight_map"].values()})
    elif len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} safetensors files and no index: want one file, or an index")
    for file in files:
        with open_tensors(file) as (f, _):
            keys = list(f.keys())
        for key in keys:
            with open_tensors(file) as (f, _):
                yield key, f.get_tensor(key)


def load_weights(model, folder, names, dtype):
    """Give a model on the meta device the weights of a folder; the peak is these and one tensor. Returns the model."""
    weights = {k: x.to(dtype or x.dtype, copy=True) for k, x in read_weights(folder, model, names)}
    model.load_state_dict(weights, assign=True)
    return model
