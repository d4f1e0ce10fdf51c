"""video.py: what is written is read again, by time; damaged files are named; the same tensor gives the same bytes."""

import contextlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

import video
from common import UserError
from video import frames, read_video, to_uint8, write_grid, write_video, write_video_grid


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


def test_sound_that_outlasts_the_picture_is_not_counted(tmp_path):
    """A Matroska file says one length for both."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        pictures, sound = container.add_stream("libx264", 25), container.add_stream("pcm_s16le", 8000, layout="mono")
        pictures.height, pictures.width, pictures.pix_fmt = 48, 64, "yuv420p"
        for i in range(20):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 10 * i, np.uint8))))
        container.mux(pictures.encode())
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), layout="mono")  # 2 s beside 0.8 s
        samples.sample_rate = 8000
        container.mux(sound.encode(samples))
        container.mux(sound.encode())
    assert len(read_video(tmp_path / "a.mkv")[0]) == 20


def smooth(frames=9, height=33, width=47, seed=0):
    """A clip with soft colours that change all the time: (3, F, H, W) in [-1, 1]."""
    x = torch.rand(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(x, (frames, height, width), mode="trilinear", align_corners=True)[0] * 2 - 1


def brightness(pictures):
    return [int(p[-8, -8, 0]) for p in pictures]


KINDS = {
    "x264.mp4": {},
    "ntsc.mov": {"fps": 29.97},
    "bframes.m4v": {"g": "5", "bf": "2"},
    "bframes.avi": {"codec": "mpeg4", "bf": "2"},
    "reordered.avi": {"bf": "2"},  # the times in its packets go backward
    "vp9.webm": {"codec": "libvpx-vp9"},
    "drawn.gif": {"codec": "gif", "pixels": "gray"},
    "gop.mkv": {"g": "5", "bf": "2"},
}


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_the_nearest_in_time(tmp_path, name):
    path = film(tmp_path / name, **KINDS[name])
    fps = KINDS[name].get("fps", 25)
    pictures, rate = read_video(path)
    assert pictures.shape == (20, 48, 64, 3) and pictures.dtype == np.uint8
    assert rate == pytest.approx(fps, rel=1e-4)
    assert np.abs(np.array(brightness(pictures)) - 10 * np.arange(20)).max() <= 3
    asked = [[i / rate for i in range(n)] for rate, n in ((fps, 20), (8.3, 6))]
    for times in (*asked, [0.29, 0.31, 0.61], [0.51], [0.41], [0.0, 0.0], [0.01, 0.59, 0.63]):
        want = np.array([10 * round(t * fps) for t in times])
        assert np.abs(np.array(brightness(frames(path, times))) - want).max() <= 3, times


class Counting:
    """A container that tells how many frames it gave."""

    def __init__(self, container, given):
        self.inner, self.given = container, given

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def decode(self, stream):
        for frame in self.inner.decode(stream):
            self.given.append(frame)
            yield frame


def test_only_the_section_is_decoded(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def counted(path, really=video._open):
        with really(path) as container:
            yield Counting(container, given)

    path, given = film(tmp_path / "long.mp4", n=25, fps=5, g="5", bf="0"), []
    monkeypatch.setattr(video, "_open", counted)
    assert len(video.section(path, 3, 5)) == 3 and not given
    assert brightness(frames(path, [3.0, 3.2, 3.4])) == pytest.approx([150, 160, 170], abs=3)
    assert len(given) == 9  # from the key frame a second before, 10, to 17 and the next, which is not nearer


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_any_frame_is_found(tmp_path, name):
    """Also those before a key frame, which come after it in the file."""
    path = film(tmp_path / name, n=25, fps=5, g="5", bf="2")
    for i in range(25):
        assert brightness(frames(path, [i / 5])) == pytest.approx([10 * i], abs=3)


def write_track(path, matrix):
    """Write the display matrix a, b, c, d into an .mp4: x' = a x + c y, y' = b x + d y."""
    a, b, c, d = (value << 16 for value in matrix)  # 16.16 fixed point
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    data[place : place + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)


MATRICES = {  # where the white upper left corner goes: (row, column) of [[0, 1], [2, 3]]
    (1, 0, 0, 1): 0, (-1, 0, 0, 1): 1, (1, 0, 0, -1): 2, (-1, 0, 0, -1): 3,
    (0, 1, 1, 0): 0, (0, 1, -1, 0): 1, (0, -1, 1, 0): 2, (0, -1, -1, 0): 3,
}  # fmt: skip


@pytest.mark.parametrize("matrix", MATRICES)
def test_film_is_turned_and_mirrored_as_it_says(tmp_path, matrix):
    write_track(path := film(tmp_path / "phone.mp4", n=4), matrix)
    picture = read_video(path)[0][3]
    assert picture.shape == ((48, 64, 3) if matrix[0] else (64, 48, 3))
    corners = picture[4, 4, 0], picture[4, -4, 0], picture[-4, 4, 0], picture[-4, -4, 0]
    assert np.argmax(corners) == MATRICES[matrix]
    y, x = (picture[..., 0] > 128).nonzero()  # a third of each side of the film, 16 of its rows and 21 of its columns
    assert (np.ptp(y) + 1, np.ptp(x) + 1) == pytest.approx((16, 21) if matrix[0] else (21, 16), abs=1)


def test_pixels_that_are_not_square(tmp_path):
    """A disc of a player's screen is 32 pixels wide in the file and 64 high."""
    y, x = np.mgrid[:80, :60]
    disc = (((x - 29.5) * 2) ** 2 + (y - 39.5) ** 2 < 32**2)[..., None].repeat(3, 2).astype(np.uint8) * 255
    with av.open(str(path := tmp_path / "disc.mp4"), "w") as container:
        stream = container.add_stream("libx264", 8)
        stream.height, stream.width, stream.pix_fmt = 80, 60, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(disc, format="rgb24")))
        container.mux(stream.encode())
    picture = read_video(path)[0][0]
    assert picture.shape == (80, 120, 3)
    y, x = (picture[..., 0] > 128).nonzero()
    assert np.ptp(y) + 1 == pytest.approx(64, abs=2) and np.ptp(x) + 1 == pytest.approx(64, abs=2)


def test_colours_come_back_as_they_were_written(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128]], np.uint8)
    bars = colours.repeat(16, 0)[None].repeat(32, 0)  # (32, 96, 3)
    write_video(tmp_path / "a.mp4", torch.from_numpy(bars)[None].permute(3, 0, 1, 2) / 127.5 - 1, 8)
    got = read_video(tmp_path / "a.mp4")[0][0, 16, 8::16].astype(int)
    assert np.abs(got - colours).max() <= 4


def test_images(tmp_path):
    picture = to_uint8(smooth(1))[0]
    Image.fromarray(picture).save(tmp_path / "a.png")
    pictures, _ = read_video(tmp_path / "a.png")
    assert np.array_equal(pictures, picture[None])
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
    assert len(pictures) == 12 and fps == pytest.approx(12, rel=0.05)  # a gif counts in hundredths of a second
    if suffix == ".mp4":  # H.264 halves the colour: odd sides lose a row
        height, width = height - height % 2, width - width % 2
    assert pictures.shape[1:3] == (height, width)
    error = np.abs(pictures.astype(int) - to_uint8(x)[:, :height, :width])
    assert error.mean() < mean
    write_video(tmp_path / f"b{suffix}", x, 12)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_clip_without_motion_keeps_its_frames(tmp_path):
    write_video(tmp_path / "a.mp4", torch.full((3, 16, 32, 32), 0.3), 8)
    pictures, fps = read_video(tmp_path / "a.mp4")
    assert len(pictures) == 16 and fps == pytest.approx(8, rel=0.02)
    assert np.abs(pictures.astype(int) - 166).max() <= 3


def test_gifs_repeat(tmp_path):
    write_video(tmp_path / "a.gif", smooth(16), 10)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (16, 100, 0)
    write_video(tmp_path / "b.gif", smooth(16), 8)
    with av.open(str(tmp_path / "b.gif")) as file:  # 12.5 hundredths of a second a frame
        assert sum(frame.duration * frame.time_base for frame in file.decode(video=0)) == 2


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
    assert sheet.shape == (20 + 3 * (80 + 4 + 16), 4 + 4 * (128 + 4), 3)
    want = [to_uint8(v)[0, 0, 0, 0] for v in rise[:, [0, 5, 10, 15]].split(1, 1)]
    for x in range(4):
        left = 4 + 132 * x
        assert (sheet[36:116, left : left + 128] == want[x]).all()
        assert (sheet[136:216, left : left + 128] == 255 - want[x]).all()
    assert (sheet[236:316, 4:132] == 0).all() and (sheet[236:316, 132:] == 255).all()  # the third has one frame
    assert (sheet[16:36] < 128).any() and (sheet[116:136] < 128).any() and (sheet[216:236] == 255).all()  # captions
    write_grid(tmp_path / "b.png", [rise, -rise, rise[:, :1]], ["up", "down " * 100, ""], frames=4)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_video_grid(tmp_path):
    black, white = torch.full((3, 4, 64, 64), -1.0), torch.full((3, 2, 64, 64), 1.0)
    fade = torch.cat([white, black[:, :2]], 1)
    write_video_grid(tmp_path / "a.mp4", [[black, fade], [white, -fade]], 8, ["one", "two"], ["left", "right"])
    pictures, fps = read_video(tmp_path / "a.mp4")
    assert pictures.shape == (4, 20 + 2 * (128 + 4 + 16), 4 + 2 * 132, 3) and fps == 8
    dark = pictures[:, [100, 100, 240, 240], [60, 200, 60, 200], 0] < 128
    assert dark.tolist() == [[True, False, False, True]] * 2 + [[True, True, False, False]] * 2
