"""Rewards: file sizes against stored values, the invariants that any reward has, and bad input."""

import pytest
import torch

import rewards
from cli import UserError


def still(image, frames=2):
    """(3, H, W) in 0..255 -> one clip (1, 3, F, H, W) in [-1, 1]"""
    return (image.float() / 127.5 - 1)[None, :, None].expand(1, 3, frames, *image.shape[1:])


GREY = torch.full((3, 192, 320), 128)
RAMP = torch.linspace(0, 255, 320).round().expand(3, 192, 320)
NOISE = torch.randint(256, (3, 192, 320), generator=torch.Generator().manual_seed(0))


def test_jpeg_sizes():
    # measured with Pillow and libjpeg-turbo; other builds may differ by a few bytes
    black, board = torch.zeros(3, 192, 320), torch.zeros(3, 192, 320)
    y, x = torch.meshgrid(torch.arange(192) // 8, torch.arange(320) // 8, indexing="ij")
    board = ((x + y) % 2 * 255).expand(3, 192, 320)
    for image, kilobytes in ((GREY, 1.585), (black, 1.587), (RAMP, 5.287), (board, 2.547)):
        assert rewards.jpeg_compressibility(still(image)).item() == pytest.approx(-kilobytes, abs=0.05), kilobytes
    assert rewards.jpeg_compressibility(still(NOISE)).item() == pytest.approx(-72.616, rel=0.01)


def test_jpeg_order_and_sign():
    video = torch.cat([still(i) for i in (NOISE, RAMP, GREY)])
    score = rewards.jpeg_compressibility(video)
    assert score.shape == (3,) and score.dtype == torch.float32
    assert score[0] * 0.1 < score[1] < score[2] < 0
    assert torch.equal(rewards.make("jpeg_incompressibility")(video), -score)
    assert torch.equal(rewards.make("jpeg_compressibility")(video, ["a", "b", "c"]), score)


def test_unknown():
    with pytest.raises(UserError, match=r"jpeg_compressibility.*agreement"):
        rewards.make("nonsense")
