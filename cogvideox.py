"""CogVideoX's published weights, in and out: the transformer and the VAE as folders in diffusers' layout.

diffusers keeps a network as config.json beside one safetensors file, or several with an index. Here stand the map
between its names and ours, which entries of its config we know, and which values of the others are other models (the
1.5 and image-to-video models among them). Tensors are read one at a time, so the peak is the weights and one tensor,
and a rank can keep its rows alone. Config entries that begin with an underscore are skipped by diffusers: `_dollar`
keeps there what only we need.
"""

import json
from pathlib import Path

import torch
from torch import nn

from common import UserError, atomic, load_model, open_tensors, save_tensors
from dit import PRESETS, DiT, DiTConfig
from schedule import Schedule
from vae3d import VAE3D, VAEConfig

# Everything we have under its name in diffusers; * counts blocks and levels, as in both. Each of these modules has a
# weight and a bias; nothing else is stored.
# fmt: off
DIT_NAMES = {
    "patch_in": "patch_embed.proj", "text_in": "patch_embed.text_proj",
    "time_in": "time_embedding.linear_1", "time_out": "time_embedding.linear_2",
    "blocks.*.modulation1": "transformer_blocks.*.norm1.linear",
    "blocks.*.norm1": "transformer_blocks.*.norm1.norm",
    "blocks.*.q": "transformer_blocks.*.attn1.to_q",
    "blocks.*.k": "transformer_blocks.*.attn1.to_k",
    "blocks.*.v": "transformer_blocks.*.attn1.to_v",
    "blocks.*.norm_q": "transformer_blocks.*.attn1.norm_q",
    "blocks.*.norm_k": "transformer_blocks.*.attn1.norm_k",
    "blocks.*.out": "transformer_blocks.*.attn1.to_out.0",
    "blocks.*.modulation2": "transformer_blocks.*.norm2.linear",
    "blocks.*.norm2": "transformer_blocks.*.norm2.norm",
    "blocks.*.up": "transformer_blocks.*.ff.net.0.proj",
    "blocks.*.down": "transformer_blocks.*.ff.net.2",
    "norm": "norm_final", "modulation_out": "norm_out.linear", "norm_out": "norm_out.norm", "out": "proj_out",
}
DIT_DROPPED = {"patch_embed.pos_embedding"}  # the fixed table, which some files store and we compute
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
    "norm_elementwise_affine": True, "flip_sin_to_cos": True, "freq_shift": 0,
}
DIT_OURS = ("prediction", "schedule", "snr_shift")  # what diffusers keeps in its scheduler, and we with the weights
SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
    "rescale_betas_zero_snr": True,
}

VAE_NAMES = {
    "encoder.conv_in": "encoder.conv_in.conv",
    "encoder.blocks.*.*.norm1": "encoder.down_blocks.*.resnets.*.norm1",
    "encoder.blocks.*.*.conv1": "encoder.down_blocks.*.resnets.*.conv1.conv",
    "encoder.blocks.*.*.norm2": "encoder.down_blocks.*.resnets.*.norm2",
    "encoder.blocks.*.*.conv2": "encoder.down_blocks.*.resnets.*.conv2.conv",
    "encoder.blocks.*.*.shortcut": "encoder.down_blocks.*.resnets.*.conv_shortcut",
    "encoder.down.*.conv": "encoder.down_blocks.*.downsamplers.0.conv",
    "encoder.mid.*.norm1": "encoder.mid_block.resnets.*.norm1",
    "encoder.mid.*.conv1": "encoder.mid_block.resnets.*.conv1.conv",
    "encoder.mid.*.norm2": "encoder.mid_block.resnets.*.norm2",
    "encoder.mid.*.conv2": "encoder.mid_block.resnets.*.conv2.conv",
    "encoder.norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out.conv",
    "decoder.conv_in": "decoder.conv_in.conv",
    "decoder.mid.*.norm1": "decoder.mid_block.resnets.*.norm1.norm_layer",
    "decoder.mid.*.norm1.scale": "decoder.mid_block.resnets.*.norm1.conv_y.conv",
    "decoder.mid.*.norm1.shift": "decoder.mid_block.resnets.*.norm1.conv_b.conv",
    "decoder.mid.*.conv1": "decoder.mid_block.resnets.*.conv1.conv",
    "decoder.mid.*.norm2": "decoder.mid_block.resnets.*.norm2.norm_layer",
    "decoder.mid.*.norm2.scale": "decoder.mid_block.resnets.*.norm2.conv_y.conv",
    "decoder.mid.*.norm2.shift": "decoder.mid_block.resnets.*.norm2.conv_b.conv",
    "decoder.mid.*.conv2": "decoder.mid_block.resnets.*.conv2.conv",
    "decoder.blocks.*.*.norm1": "decoder.up_blocks.*.resnets.*.norm1.norm_layer",
    "decoder.blocks.*.*.norm1.scale": "decoder.up_blocks.*.resnets.*.norm1.conv_y.conv",
    "decoder.blocks.*.*.norm1.shift": "decoder.up_blocks.*.resnets.*.norm1.conv_b.conv",
    "decoder.blocks.*.*.conv1": "decoder.up_blocks.*.resnets.*.conv1.conv",
    "decoder.blocks.*.*.norm2": "decoder.up_blocks.*.resnets.*.norm2.norm_layer",
    "decoder.blocks.*.*.norm2.scale": "decoder.up_blocks.*.resnets.*.norm2.conv_y.conv",
    "decoder.blocks.*.*.norm2.shift": "decoder.up_blocks.*.resnets.*.norm2.conv_b.conv",
    "decoder.blocks.*.*.conv2": "decoder.up_blocks.*.resnets.*.conv2.conv",
    "decoder.blocks.*.*.shortcut": "decoder.up_blocks.*.resnets.*.conv_shortcut",
    "decoder.up.*.conv": "decoder.up_blocks.*.upsamplers.0.conv",
    "decoder.norm_out": "decoder.norm_out.norm_layer",
    "decoder.norm_out.scale": "decoder.norm_out.conv_y.conv",
    "decoder.norm_out.shift": "decoder.norm_out.conv_b.conv",
    "decoder.conv_out": "decoder.conv_out.conv",
}
VAE_CLASS, VAE_LEVELS = "AutoencoderKLCogVideoX", 4
VAE_CONFIG = {
    "channels": "block_out_channels", "latent_channels": "latent_channels", "layers_per_block": "layers_per_block",
    "groups": "norm_num_groups", "scaling_factor": "scaling_factor",
}
VAE_FIXED = {
    "in_channels": 3, "out_channels": 3, "act_fn": "silu", "norm_eps": 1e-6, "temporal_compression_ratio": 4,
    "down_block_types": ["CogVideoXDownBlock3D"] * VAE_LEVELS, "up_block_types": ["CogVideoXUpBlock3D"] * VAE_LEVELS,
    "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": None, "latents_mean": None,
    "latents_std": None,
}
VAE_OURS = ("chunking", "chunk_frames")
# fmt: on


def published_name(name, names):
    """blocks.0.q.weight -> transformer_blocks.0.attn1.to_q.weight. names: DIT_NAMES or VAE_NAMES."""
    *module, leaf = name.split(".")
    pattern = names[".".join("*" if part.isdigit() else part for part in module)]
    return pattern.replace("*", "{}").format(*(part for part in module if part.isdigit())) + "." + leaf


def published_names(model, names):
    """{name in diffusers: name here} of every parameter."""
    return {published_name(name, names): name for name, _ in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# the transformer


def load_dit(folder, dtype=None):
    """The DiT in `folder`, the `transformer` folder of a diffusers pipeline, in one file or in shards.

    dtype None keeps each tensor's own. Raises UserError naming the file, field or tensor that does not fit.
    """
    config = read_dit_config(folder)
    with torch.device("meta"):
        model = DiT(config)
    return fill(model, read_dit_weights(folder, config), dtype)


def save_dit(model, folder, **about):
    """Write config.json and one safetensors file that diffusers' CogVideoXTransformer3DModel loads, in our dtype.

    about: what else the folder shall say of the network, for `read_dit_about`.
    Raises UserError if the folder cannot be written, or holds sharded weights, which would be read instead.
    """
    weights = {key: model.get_parameter(name).data for key, name in published_names(model, DIT_NAMES).items()}
    ours = {"_dollar": about | {name: getattr(model.config, name) for name in DIT_OURS}}
    save_folder(folder, DIT_CLASS, ours | _to_diffusers(model.config), weights)


def read_dit_weights(folder, config):
    """Every (our name, tensor) of a transformer's folder, one at a time; config: its DiTConfig. Raises UserError."""
    with torch.device("meta"):
        model = DiT(config)
    names = published_names(model, DIT_NAMES)
    shape = lambda key: tuple(model.get_parameter(names[key]).shape)
    return read_named(folder, f"a CogVideoX transformer of {config.depth} layers", names, shape, DIT_DROPPED)


def read_dit_about(folder):
    """What `save_dit` noted of the network beside its size; {} for a folder that others wrote."""
    return read_json(Path(folder) / "config.json").get("_dollar", {})


def _to_diffusers(config):
    frames, height, width = config.latents
    made = {theirs: getattr(config, ours) for ours, theirs in DIT_CONFIG.items()} | DIT_FIXED
    made |= {"attention_head_dim": config.width // config.heads, "out_channels": config.channels}
    made |= {"sample_frames": 4 * (frames - 1) + 1, "temporal_compression_ratio": 4}  # it counts the video's frames
    return made | {"sample_height": height, "sample_width": width}


def read_dit_config(folder):
    """The DiTConfig of a diffusers folder; a field that is not there has diffusers' default, which is the 2B's."""
    folder = Path(folder)

    def check(got, want):
        for key, value in want.items():
            if got.get(key) != value:
                raise ValueError(f"{key} is {got.get(key)}, not {value}")

    path, beside = folder / "config.json", folder.parent / "scheduler" / "scheduler_config.json"
    try:
        get = _to_diffusers(PRESETS["cogvideox-2b"]) | json.loads(path.read_text())
        check(get, {"_class_name": DIT_CLASS, "out_channels": get["in_channels"]} | DIT_FIXED)
        if not (made := get.get("_dollar")):
            shift = 1.0 if get["use_rotary_positional_embeddings"] else 3.0
            scheduler = {"prediction_type": "v_prediction", "snr_shift_scale": shift} | SCHEDULER
            if beside.exists():
                path = beside
                scheduler |= json.loads(path.read_text())
            check(scheduler, SCHEDULER)
            kind = scheduler["prediction_type"]
            if kind not in ("v_prediction", "sample", "epsilon"):
                raise ValueError(f"prediction_type is {kind}, not v_prediction")
            made = {"prediction": "velocity" if kind == "v_prediction" else kind, "schedule": "cogvideox"}
            made["snr_shift"] = scheduler["snr_shift_scale"]
        if (made["prediction"], made["schedule"]) == ("epsilon", "cogvideox"):
            raise ValueError("prediction_type is epsilon, but at zero terminal SNR x_0 cannot be had from epsilon")
        frames = (get["sample_frames"] - 1) // get["temporal_compression_ratio"] + 1
        return DiTConfig(
            **{ours: get[theirs] for ours, theirs in DIT_CONFIG.items()} | {name: made[name] for name in DIT_OURS},
            width=get["num_attention_heads"] * get["attention_head_dim"],
            latents=(frames, get["sample_height"], get["sample_width"]),
        )
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror} (want the folder `transformer` of a pipeline)") from e
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as e:
        raise UserError(f"{path} is not of CogVideoX 2B or 5B, text to video: {e}") from e


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
    published = folder_config(folder, VAE_CLASS)
    try:
        with torch.device("meta"):
            model = VAE3D(read_vae_config(folder, published))
    except (TypeError, ValueError, KeyError) as e:
        raise UserError(f"{folder}: config.json does not describe a VAE: {e}") from e
    names = published_names(model, VAE_NAMES)
    shape = lambda key: vae_shape(model.get_parameter(names[key]), key)
    tensors = read_named(folder, "a CogVideoX VAE of this config", names, shape)
    return fill(model, ((k, x.reshape(model.get_parameter(k).shape)) for k, x in tensors), dtype).eval()


def save_vae(model, folder):
    """Write a folder that diffusers' AutoencoderKLCogVideoX.from_pretrained loads, in our dtype.

    diffusers always streams; how this one codes its chunks stays in `_dollar`. Raises UserError if the folder cannot be
    written, or the model has a patchified stem, which diffusers does not know.
    """
    c = model.config
    if c.patch != 1 or len(c.channels) != VAE_LEVELS:
        raise UserError(f"diffusers knows no VAE with patch {c.patch} and {len(c.channels)} levels of channels")
    named = {key: model.get_parameter(name).data for key, name in published_names(model, VAE_NAMES).items()}
    weights = {key: p.reshape(vae_shape(p, key)) for key, p in named.items()}
    config = {theirs: getattr(c, ours) for ours, theirs in VAE_CONFIG.items()} | VAE_FIXED
    save_folder(folder, VAE_CLASS, config | {"_dollar": {k: getattr(c, k) for k in VAE_OURS}}, weights)


def vae_shape(p, key):
    """The samplers' convolutions are two-dimensional there, and here three-dimensional of depth one."""
    return tuple(p.shape[:2] + p.shape[3:] if "samplers" in key and p.dim() == 5 else p.shape)


def read_vae_config(folder, published):
    """diffusers' config as a VAEConfig; what it leaves out is as in CogVideoX-2B."""
    default = VAEConfig()
    get = {theirs: getattr(default, ours) for ours, theirs in VAE_CONFIG.items()} | VAE_FIXED | published
    for key, value in VAE_FIXED.items():
        if get[key] != value:
            raise UserError(f"{folder}: {key} is {get[key]} in config.json, in a CogVideoX VAE it is {value}")
    ours = {k: published["_dollar"][k] for k in VAE_OURS} if "_dollar" in published else {}
    return VAEConfig(**{ours: get[theirs] for ours, theirs in VAE_CONFIG.items()}, **ours)


# ---------------------------------------------------------------------------------------------------------------------
# diffusers' pipeline


def save_pipeline(folder, model, about):
    """Write a student (a DiT, its file's metadata) as diffusers' transformer/ and scheduler/. Returns a line to print.

    diffusers' LCMScheduler renoises as `few_step` does. It has no SNR shift, so it gets our betas as such; of its own
    boundary condition (c_skip, c_out) a large timestep_scaling leaves nothing; with 1000 original steps its n steps are
    ours. It knows neither conjugate velocity nor DDIM between the steps: such a student leaves without scheduler/, and
    the transformer's config says what it predicts (`_dollar`), which is all that `Generator.load` needs.
    """
    folder, c = Path(folder), model.config
    dtype = getattr(torch, about.get("weights_dtype", "torch.float32").removeprefix("torch."))
    save_dit(model.to(dtype), folder / "transformer", **about)
    (file := folder / "scheduler" / "scheduler_config.json").unlink(missing_ok=True)  # an earlier run's
    kinds = {"velocity": "v_prediction", "sample": "sample", "epsilon": "epsilon"}
    if c.prediction not in kinds or c.schedule == "flow" or about["transition"] != "renoise":
        return f"wrote {folder}/transformer, for sample.py alone: diffusers has no sampler for it"
    abar = Schedule(c.schedule, c.snr_shift).a ** 2
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    config = {"_class_name": "LCMScheduler", "trained_betas": betas.tolist(), "prediction_type": kinds[c.prediction]}
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


def folder_config(folder, name):
    """config.json of a folder in diffusers' layout, as a dict. name: the `_class_name` it must have; else UserError."""
    file = Path(folder) / "config.json"
    config = read_json(file)
    if config.get("_class_name") != name:
        raise UserError(f"{file} describes a {config.get('_class_name')}, where {name} is needed")
    return config


def save_folder(folder, name, config, tensors):
    """Write tensors {key: tensor} and config as a folder in diffusers' layout, under the `_class_name` name.

    Raises UserError where it cannot be written, or the folder holds other weights that would be read instead.
    """
    file = Path(folder) / "diffusion_pytorch_model.safetensors"
    if others := [p for p in _weights(file.parent) if p != file]:
        raise UserError(f"{folder} already holds {others[0].name}: give another folder")
    save_tensors(file, tensors, {"format": "pt"})
    with atomic(file.parent / "config.json") as part:
        part.write_text(json.dumps({"_class_name": name, **config}, indent=2) + "\n")


def _weights(folder):
    return sorted(p for p in folder.glob("*.safetensors*") if not p.name.startswith("."))


def _read_tensors(folder):
    """Every (key, tensor) of a folder's weights in one file or in shards with an index, one at a time; else UserError.

    Each comes from the file opened anew: the pages of a mapped file count as memory until it is closed.
    """
    files = [p for p in _weights(folder) if p.suffix == ".safetensors"]
    if index := [p for p in _weights(folder) if p.name.endswith(".safetensors.index.json")]:
        shards = read_json(index[0]).get("weight_map")
        if not (isinstance(shards, dict) and all(isinstance(file, str) for file in shards.values())):
            raise UserError(f"{index[0]} has no weight_map of keys to files")
        files = sorted({folder / file for file in shards.values()})
    elif len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} safetensors files and no index: want one file, or an index")
    for file in files:
        with open_tensors(file) as (f, _):
            keys = list(f.keys())
        for key in keys:
            with open_tensors(file) as (f, _):
                yield key, f.get_tensor(key)


def read_named(folder, kind, names, shape, dropped=()):
    """Every (our name, tensor) of a folder's weights, one at a time, so that a rank can keep its rows alone.

    names: {key there: name here}, all of which must come; shape(key) -> the tuple it must have; dropped: keys that are
    passed over. Raises UserError naming a tensor that is missing, or that `kind`, in words, does not have.
    """
    left = dict(names)
    for key, tensor in _read_tensors(Path(folder)):
        if key in dropped:
            continue
        if key not in left:
            raise UserError(f"{folder}: {kind} has no tensor {key}, or it came twice")
        if (got := tuple(tensor.shape)) != (want := shape(key)):
            raise UserError(f"{folder}: {key} has shape {got}, but config.json asks for {want}")
        yield left.pop(key), tensor
    if left:
        raise UserError(f"{folder}: {len(left)} tensors are missing, the first is {next(iter(left))}")


def fill(model, tensors, dtype=None):
    """Give a model that was built without memory its parameters, (name, tensor) by (name, tensor). Returns the model.

    The peak is the weights and one tensor. dtype None keeps each tensor's own.
    """
    for name, tensor in tensors:
        module, leaf = name.rsplit(".", 1)
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor.to(dtype or tensor.dtype, copy=True)))
    return model


def read_json(path):
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value
