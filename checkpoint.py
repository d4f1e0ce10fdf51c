"""Weights on disk: one safetensors file that says what is in it.

A safetensors file is raw tensors behind a JSON header. Unlike a pickle it cannot run code when it is opened, and it has
room for metadata: here a model's class, its configuration and how it was made lie beside its weights, so that a file
alone is enough to use it. Files are written whole or not at all. The published models come as folders in diffusers'
layout, config.json beside one safetensors file or several with an index; they are read and written here too.
"""

import json
import os
import textwrap
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cli import UserError, atomic


def save(path, tensors, metadata=None):
    """Write {name: tensor} and {name: anything JSON can hold} to `path`, replacing it only when all is written.

    Raises UserError where nothing can be written.
    """
    # one copy of each: the format has neither strides nor two names for one memory
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    seen = {}
    for name, t in whole.items():
        if seen.setdefault(t.untyped_storage().data_ptr(), name) != name and t.numel():
            whole[name] = t.clone()
    try:
        with atomic(path) as part:
            save_file(whole, part, {name: _to_text(value) for name, value in (metadata or {}).items()})
    except SafetensorError as e:
        raise UserError(f"cannot write {path}: {e}") from e


def load(path):
    """-> ({name: tensor} on the CPU, {name: value}) of a file that `save` wrote.

    Raises UserError naming the file if it is missing, cut off, or no safetensors file.
    """
    try:
        with safe_open(os.fspath(path), "pt") as f:
            metadata = {name: _from_text(text) for name, text in (f.metadata() or {}).items()}
            # copies: a mapped file would crash us if somebody wrote into it
            return {name: f.get_tensor(name).clone() for name in f.keys()}, metadata  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}") from e


def save_model(path, model, dtype=None, **made):
    """Write a model's weights with its class and configuration. made: further metadata, how it came to be.

    dtype: what floating-point weights are stored in (torch.float16 halves the file), None to leave them as they are.
    """
    tensors = {k: t.to(dtype or t.dtype) if t.is_floating_point() else t for k, t in model.state_dict().items()}
    save(path, tensors, {"class": type(model).__name__, "config": asdict(model.config), **made})


def load_model(path, cls, device="cpu"):
    """-> (the model on `device`, in float32, for evaluation; its metadata). cls: the class the file must hold.

    Raises UserError if the file cannot be read, or holds another class, or other weights than its config asks for.
    """
    tensors, metadata = load(path)
    if metadata.get("class") != cls.__name__:
        raise UserError(f"{path} holds {metadata.get('class', 'weights of no class')}, where {cls.__name__} is needed")
    try:
        model = cls(cls.Config(**metadata["config"]))
        model.load_state_dict(tensors)
    except KeyError:
        raise UserError(f"{path} has no config in its metadata") from None
    except (RuntimeError, TypeError, ValueError) as e:  # missing, unknown or misshapen weights; unknown config fields
        said = [line.strip() for line in str(e).splitlines() if line.strip()]
        first = textwrap.shorten(said[min(1, len(said) - 1)], 160, placeholder=" ...")  # after PyTorch's own headline
        raise UserError(f"{path} does not fit this {cls.__name__}: {first}") from e
    return model.float().to(device).eval(), metadata


def metadata(path, name):
    """The metadata of a file of weights alone, without its tensors. name: the class it must hold. Raises UserError."""
    try:
        with safe_open(path, "pt") as f:
            found = {key: _from_text(text) for key, text in (f.metadata() or {}).items()}
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}") from e
    if found.get("class") != name:
        raise UserError(f"{path} holds {found.get('class', 'weights of no class')}, where {name} is needed")
    return found


def below(folder, name):
    """A pipeline's part: `folder`/name, or `folder` itself where that is the part."""
    return Path(folder) / name if (Path(folder) / name).is_dir() else Path(folder)


def folder_config(folder, name):
    """config.json of a folder in diffusers' layout, as a dict. name: the `_class_name` it must have; else UserError."""
    file = Path(folder) / "config.json"
    config = _read_json(file)
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
    save(file, tensors, {"format": "pt"})
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
        shards = _read_json(index[0]).get("weight_map")
        if not (isinstance(shards, dict) and all(isinstance(file, str) for file in shards.values())):
            raise UserError(f"{index[0]} has no weight_map of keys to files")
        files = sorted({folder / file for file in shards.values()})
    elif len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} safetensors files and no index: want one file, or an index")
    for file in files:
        try:
            with safe_open(os.fspath(file), "pt") as f:
                keys = list(f.keys())
            for key in keys:
                with safe_open(os.fspath(file), "pt") as f:
                    yield key, f.get_tensor(key)
        except FileNotFoundError:
            raise UserError(f"there is no file {file}") from None
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file} is not a whole safetensors file: {e}") from e


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


def _read_json(path):
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def _to_text(value):
    """A string stays itself if it cannot be mistaken for JSON; all else is JSON."""
    return value if isinstance(value, str) and _from_text(value) is value else json.dumps(value)


def _from_text(text):
    try:
        return json.loads(text)
    except ValueError:
        return text
