"""cost.py: memory counted without numbers is what the sizes say, and grows linearly with the frames."""

import pytest
import torch

import dit
import lrm
from evals import cost

MLP = 4 * (8 * 32 + 32 + 32 * 1 + 1)  # bytes of its weights


def mlp(device):
    with torch.device(device):
        return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Sigmoid(), torch.nn.Linear(32, 1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_footprint_of_a_network_one_can_count(device):
    n = 1000
    found = cost.footprint(mlp(device), torch.ones(n, 8, device=device))
    x, hidden, out = 4 * 8 * n, 4 * 32 * n, 4 * n
    # without gradient: weights, input, and the sigmoid's input and output at once
    assert found["forward"] == MLP + x + 2 * hidden
    assert found["saved"] == x + hidden  # for the first Linear's weight; the sigmoid's output, also the second's input
    # at the sigmoid's backward: input, its output, the gradients of its output and input
    assert MLP + x + 3 * hidden <= found["backward"] <= 2 * MLP + 2 * x + 3 * hidden + 2 * out


def test_saved_bytes_are_linear_in_the_frames():
    model = lrm.VideoLRM(channels=4, width=16)
    latents = lambda n, device: torch.zeros(1, 4, n, 8, 8, device=device)
    counted = [cost.footprint(model.to("meta"), latents(n, "meta"))["saved"] for n in (1, 2, 5)]
    assert counted[2] - counted[0] == 4 * (counted[1] - counted[0]) > 0
    real = cost.footprint(lrm.VideoLRM(channels=4, width=16), latents(5, "cpu"))
    assert real["saved"] == pytest.approx(counted[2], rel=0.1)  # kernels may keep a little for themselves


def test_rewards_of_the_paper_are_counted_without_memory(monkeypatch):
    import open_clip

    small = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16}}
    small["text_cfg"] = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: small)
    rows = cost.reward_memory("meta", frames=(1, 2, 3))
    sizes = {row["label"]: row["parameters"] for row in rows}
    assert sizes["image LRM"] == 189_441 and sizes["text-image LRM"] == 763_009
    clip = [row for row in rows if row["label"].startswith("CLIP-H")]
    assert [row["frames"] for row in clip] == [1, 2, 3]
    a, b, c = (row["saved"] for row in clip)
    assert c - b == b - a > 0
    assert all(row["backward"] > row["forward"] > 4 * row["parameters"] for row in rows)


def test_checkpointing_keeps_a_blocks_input_alone():
    """Of a depth of 6: what is kept shrinks to the inputs of the blocks, and the backward's peak falls."""
    config, n = dit.PRESETS["shapes"], 16
    kept = {}
    for again in (False, True):
        with torch.device("meta"):
            model = dit.DiT(config).bfloat16()
            model.checkpoint_activations = again
            x, t = torch.zeros(n, config.channels, *config.latents), torch.zeros(n, dtype=torch.int64)
            kept[again] = cost.footprint(model, x, t, torch.zeros(n, config.text_length, config.text_dim))
    frames, rows, columns = config.latents
    tokens = frames * rows * columns // config.patch**2 + config.text_length
    inputs = config.depth * n * tokens * config.width * 2  # bytes in bfloat16
    assert inputs < kept[True]["saved"] < 2 * inputs < kept[False]["saved"] / 4
    assert kept[True]["backward"] < kept[False]["backward"] / 2
