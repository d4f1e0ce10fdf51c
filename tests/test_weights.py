"""Files of weights: what goes in comes out, a failing save leaves what was there, and a bad file is named."""

import os
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import common
from common import UserError, load_model, load_tensors, save_model, save_tensors


@dataclass
class NetConfig:
    width: int = 3
    sizes: tuple = (1, 2)


class Net(nn.Module):
    Config = NetConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.width, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


class Other(Net):
    pass


@pytest.fixture
def file(tmp_path):
    return tmp_path / "net.safetensors"


def test_tensors_come_back_as_they_were(file):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {
        "a": base,
        "strided": base.T,
        "channels last": torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
        "half": base.half(),
        "whole": torch.arange(3),
        "empty": torch.zeros(0, 2),
        "trained": nn.Parameter(base + 1),
    }
    save_tensors(file, tensors)
    back, metadata = load_tensors(file)
    assert metadata == {} and back.keys() == tensors.keys()
    for name, t in tensors.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name], t)


def test_metadata_comes_back_as_it_was(file):
    metadata = {
        "text": "python train.py --steps 4",
        "looks like JSON": "4",
        "null": "null",
        "quoted": '"x"',
        "number": 4,
        "float": 0.1,
        "none": None,
        "yes": True,
        "steps": [999, 499],
        "nested": {"a": [1, {"b": "ü\n"}]},
        "empty": "",
    }
    save_tensors(file, {}, metadata)
    assert load_tensors(file) == ({}, metadata)


def test_a_failing_save_leaves_the_old_file(file, monkeypatch):
    save_tensors(file, {"a": torch.ones(2)})

    def fail(tensors, path, metadata):
        path.write_bytes(b"half of")
        raise OSError("power cut")

    monkeypatch.setattr(common, "save_file", fail)
    with pytest.raises(OSError, match="power cut"):
        save_tensors(file, {"a": torch.zeros(2)})
    assert load_tensors(file)[0]["a"].sum() == 2
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_what_cannot_be_stored_leaves_nothing(file):
    with pytest.raises(TypeError):
        save_tensors(file, {}, {"a model": Net(NetConfig())})
    assert not list(file.parent.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "plain").write_text("")
    for path in (tmp_path / "plain" / "net.safetensors", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            save_tensors(path, {"a": torch.ones(2)})


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00.", b"\xff" * 100])
def test_other_files_are_named(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"net\.safetensors is not a whole safetensors file"):
        load_tensors(file)


def test_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        load_tensors(tmp_path)


@pytest.mark.parametrize("cut", [1, 100])
def test_a_truncated_file_is_named(file, cut):
    save_model(file, Net(NetConfig()))
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"net\.safetensors is not a whole safetensors file"):
        load_tensors(file)


def test_missing_files_and_folders_are_named(file):
    with pytest.raises(UserError, match=r"there is no file .*net\.safetensors"):
        load_tensors(file)
    with pytest.raises(UserError, match=str(file.parent)):
        load_tensors(file.parent)


def test_a_loaded_file_may_be_replaced(file):
    """The tensors are copies: another save to the same place does not reach them."""
    save_tensors(file, {"a": torch.ones(1000)})
    tensors, _ = load_tensors(file)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert tensors["a"].sum() == 1000


def test_models_know_their_config_and_their_making(file):
    model = Net(NetConfig(width=5, sizes=(7,)))
    model.count += 3
    save_model(file, model, seed=0, command="python pretrain.py vae", results={"psnr": 30.5})
    back, metadata = load_model(file, Net)
    assert not back.training and back.config.width == 5 and list(back.config.sizes) == [7]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values()))
    assert metadata["seed"] == 0 and metadata["command"] == "python pretrain.py vae"
    assert metadata["results"] == {"psnr": 30.5} and metadata["class"] == "Net"


def test_models_are_stored_in_half_and_loaded_in_float32(file):
    model = Net(NetConfig())
    model.count += 70_000  # more than half precision holds: whole numbers are left alone
    save_model(file, model, torch.float16)
    tensors, _ = load_tensors(file)
    assert tensors["linear.weight"].dtype == torch.float16 and tensors["count"] == 70_000
    back, _ = load_model(file, Net)
    assert back.linear.weight.dtype == torch.float32 and model.linear.weight.dtype == torch.float32
    assert torch.equal(back.linear.weight, model.linear.weight.half().float())


def test_a_model_that_is_not_finite_is_not_written(file):
    model = Net(NetConfig())
    model.linear.weight.data[0, 0] = 1e6  # beyond half precision
    save_model(file, model)
    before = file.read_bytes()
    with pytest.raises(UserError, match="not finite"):
        save_model(file, model, torch.float16)
    assert file.read_bytes() == before


def test_others_may_read_weights(file):
    before = os.umask(0o022)
    save_model(file, Net(NetConfig()))
    os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644


def test_wrong_models_are_refused(file):
    save_model(file, Net(NetConfig()))
    with pytest.raises(UserError, match="holds Net, where Other is needed"):
        load_model(file, Other)
    tensors, metadata = load_tensors(file)
    for change, complaint in (
        ({"linear.bias": None}, r"linear\.bias"),
        ({"stranger": torch.ones(1)}, "stranger"),
        ({"linear.weight": torch.ones(2, 4)}, r"linear\.weight"),
    ):
        save_tensors(file, {k: t for k, t in (tensors | change).items() if t is not None}, metadata)
        with pytest.raises(UserError, match=f"(?s){complaint}"):
            load_model(file, Net)
    save_tensors(file, tensors, metadata | {"config": {"depth": 1}})
    with pytest.raises(UserError, match="depth"):
        load_model(file, Net)
    save_tensors(file, tensors, {"class": "Net"})
    with pytest.raises(UserError, match="no config"):
        load_model(file, Net)
    save_file(tensors, file)
    with pytest.raises(UserError, match="no class"):
        load_model(file, Net)
