"""video.py: what is written is read again, by time; damaged files are named; the same tensor gives the same bytes."""

import contextlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import video
from cli import UserError
from video import frames, read_video, timeline, to_uint8, write_grid, write_video, write_video_grid


def film(path, n=20, fps=25, height=48, width=64, codec="libx264", pixels="yuv420p", **options):
    """A clip whose frame i has brightness 10 i everywhere, but for a white upper left corner."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, pixels, options
        stream.bit_rate = 4_000_000
        for i in range(n):
            picture = np.full((height, width, 3), 10 * i, np.uint8)
            picture[: height // 3, : width // 3] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def smooth(frames=9, height=33, width=47, seed=0):
    """A clip with soft colours that change all the time: (3, F, H, W) in [-1, 1]."""
    x = torch.rand(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(x, (frames, height, width), mode="trilinear", align_corners=True)[0] * 2 - 1


def brightness(pictures):
    return [int(p[-8, -8, 0]) for p in pictures]


KINDS = {
    "x264.mp4": {},
    "ntsc.mov": {"fps": 29.97},
    "bframes.avi": {"codec": "mpeg4", "bf": "2"},  # its seek lands behind the wanted frame
    "vp9.webm": {"codec": "libvpx-vp9"},
    "short.ts": {},  # its clock does not begin at 0
    "gop.mkv": {"g": "5", "bf": "2"},
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_the_nearest_in_time(tmp_path, name):
    path = film(tmp_path / name, **KINDS[name])
    fps = KINDS[name].get("fps", 25)
    pictures, rate = read_video(path)
    assert pictures.shape == (20, 48, 64, 3) and pictures.dtype == np.uint8
    assert rate == pytest.approx(fps, rel=1e-4)
    assert timeline(path) == pytest.approx([i / fps for i in range(20)], abs=2e-3)
    assert np.abs(np.array(brightness(pictures)) - 10 * np.arange(20)).max() <= 3
    for times in ([i / 8.3 for i in range(6)], [0.29, 0.31, 0.61], [0.51], [0.41], [0.0, 0.0], [0.01, 0.59, 0.63]):
        want = np.array([10 * round(t * fps) for t in times])
        assert np.abs(np.array(brightness(frames(path, times))) - want).max() <= 3, times


def test_only_the_section_is_decoded(tmp_path, monkeypatch):
    class Counting:
        def __init__(self, container):
            self.seek, self.inner = container.seek, container

        def decode(self, stream):
            for frame in self.inner.decode(stream):
                decoded.append(frame)
                yield frame

    @contextlib.contextmanager
    def counted(path, really=video._stream):
        with really(path) as (container, stream):
            yield Counting(container), stream

    decoded = []
    path = film(tmp_path / "long.mp4", n=25, fps=5, g="5", bf="0")
    monkeypatch.setattr(video, "_stream", counted)
    assert brightness(frames(path, [3.0, 3.2, 3.4])) == pytest.approx([150, 160, 170], abs=3)
    assert len(decoded) <= 6  # the file's first, 15 (a key frame), 16, 17, and one to know that 17 was nearest


def test_sideways_film_is_turned(tmp_path):
    path = film(tmp_path / "phone.mp4")
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44  # the track's 3x3 matrix, 16.16 fixed point: a quarter turn clockwise
    data[place : place + 36] = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)
    pictures, _ = read_video(path)
    assert pictures.shape == (20, 64, 48, 3)
    corners = pictures[3][4, 4, 0], pictures[3][4, -4, 0], pictures[3][-4, 4, 0], pictures[3][-4, -4, 0]
    assert np.argmax(corners) == 1  # the white corner has gone from upper left to upper right


def test_images(tmp_path):
    picture = to_uint8(smooth(1))[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    pictures, _ = read_video(tmp_path / "a.png")
    assert np.array_equal(pictures, picture[None]) and timeline(tmp_path / "a.png") == [0.0]
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    Image.fromarray(picture).save(tmp_path / "b.png", exif=turned)
    assert np.array_equal(read_video(tmp_path / "b.png")[0][0], np.rot90(picture, -1))
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_video(tmp_path / "grey.png")[0][0], picture[..., :1].repeat(3, 2))


def test_damaged_files_are_user_errors(tmp_path):
    write_video(tmp_path / "whole.mp4", smooth(60, 64, 64), 8)  # faststart: the index is in front
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "half.mp4").write_bytes(film(tmp_path / "x.mp4").read_bytes()[:1500])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.webm").write_text("")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for name in ("cut.mp4", "half.mp4", "text.mp4", "empty.webm", "text.png", "folder.png", "sound.mp4", "missing.mp4"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            read_video(tmp_path / name)


@pytest.mark.parametrize("suffix, height, width, mean", [(".mp4", 33, 47, 6), (".mp4", 64, 64, 3), (".gif", 33, 47, 6)])
def test_written_videos_are_read_again(tmp_path, suffix, height, width, mean):
    x = smooth(12, height, width)
    write_video(tmp_path / f"a{suffix}", x, 12)
    pictures, fps = read_video(tmp_path / f"a{suffix}")
    assert len(pictures) == 12 and fps == pytest.approx(12, rel=0.01)
    if suffix == ".mp4":  # H.264 halves the colour: odd sides get one more row
        assert pictures.shape[1:3] == (height + height % 2, width + width % 2)
    error = np.abs(pictures[:, :height, :width].astype(int) - to_uint8(x))
    assert error.mean() < mean
    write_video(tmp_path / f"b{suffix}", x, 12)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_clip_without_motion_keeps_its_frames(tmp_path, suffix):
    write_video(tmp_path / f"a{suffix}", torch.full((3, 16, 32, 32), 0.3), 8)
    pictures, fps = read_video(tmp_path / f"a{suffix}")
    assert len(pictures) == 16 and fps == pytest.approx(8, rel=0.02)
    assert np.abs(pictures.astype(int) - 166).max() <= 3


def test_gifs_keep_time_and_repeat(tmp_path):
    write_video(tmp_path / "a.gif", smooth(16), 12)  # 8 1/3 hundredths a frame
    with Image.open(tmp_path / "a.gif") as image:
        lasts = []
        for i in range(image.n_frames):
            image.seek(i)
            lasts.append(image.info["duration"])
        assert image.info["loop"] == 0
    assert sum(lasts) == 1330 and set(lasts) == {80, 90}


def test_pixels_are_clamped_and_rounded():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]).reshape(1, 1, 1, 6).expand(3, 1, 1, 6)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]


def test_wrong_places_are_user_errors(tmp_path):
    x = smooth(2)
    for name in ("a.avi", "a", "a.png"):
        with pytest.raises(UserError, match=r"\.mp4 or \.gif"):
            write_video(tmp_path / name, x, 8)
    (tmp_path / "file").write_text("")
    for write in (
        lambda p: write_video(p, x, 8),
        lambda p: write_grid(p, [x]),
        lambda p: write_video_grid(p, [[x]], 8),
    ):
        with pytest.raises(UserError, match="cannot write"):
            write(tmp_path / "file" / "a.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_contact_sheet(tmp_path):
    """Each frame stands in its row and column, enlarged by a whole factor; captions and short videos fit."""
    levels = torch.linspace(-1, 1, 16)
    rise = levels[None, :, None, None].expand(3, 16, 40, 64)
    write_grid(tmp_path / "a.png", [rise, -rise, rise[:, :1]], ["up", "down " * 100, ""], frames=4)
    sheet = np.array(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (4 + 3 * (80 + 4 + 16), 4 + 4 * (128 + 4), 3)
    want = [to_uint8(v)[0, 0, 0, 0] for v in rise[:, [0, 5, 10, 15]].split(1, 1)]
    for x in range(4):
        left = 4 + 132 * x
        assert (sheet[20:100, left : left + 128] == want[x]).all()
        assert (sheet[120:200, left : left + 128] == 255 - want[x]).all()
    assert (sheet[220:300, 4:132] == 0).all() and (sheet[220:300, 132:] == 255).all()  # the third has one frame
    assert (sheet[:20] < 128).any() and (sheet[100:120] < 128).any() and (sheet[200:220] == 255).all()  # captions
    write_grid(tmp_path / "b.png", [rise, -rise, rise[:, :1]], ["up", "down " * 100, ""], frames=4)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_video_grid(tmp_path):
    black, white = torch.full((3, 4, 64, 64), -1.0), torch.full((3, 2, 64, 64), 1.0)
    fade = torch.cat([white, black[:, :2]], 1)
    write_video_grid(tmp_path / "a.mp4", [[black, fade], [white, -fade]], 8, ["one", "two"], ["left", "right"])
    pictures, fps = read_video(tmp_path / "a.mp4")
    assert pictures.shape == (4, 16 + 4 + 2 * (128 + 4 + 16), 4 + 2 * 132, 3) and fps == 8
    dark = pictures[:, [100, 100, 240, 240], [60, 200, 60, 200], 0] < 128
    assert dark.tolist() == [[True, False, False, True]] * 2 + [[True, True, False, False]] * 2
