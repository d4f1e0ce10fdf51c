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
from video import frames, info, read_video, to_uint8, write_grid, write_video, write_video_grid


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
    "reordered.avi": {"bf": "2"},  # its times go backward
    "short.ts": {"g": "5"},  # its clock does not begin at 0
    "disc.mpg": {"codec": "mpeg2video", "bf": "2", "g": "5"},
    "old.wmv": {"codec": "wmv2"},
    "web.flv": {"bf": "2", "g": "5"},
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
    known = info(path)
    assert known[:4] == (64, 48, 20, pytest.approx(19 / fps, abs=2e-3))
    assert np.abs(np.array(brightness(pictures)) - 10 * np.arange(20)).max() <= 3
    asked = [[i / rate for i in range(n)] for rate, n in ((fps, 20), (8.3, 6))]
    for times in (*asked, [0.29, 0.31, 0.61], [0.51], [0.41], [0.0, 0.0], [0.01, 0.59, 0.63]):
        want = np.array([10 * round(t * fps) for t in times])
        assert np.abs(np.array(brightness(frames(path, times, known))) - want).max() <= 3, times


class Counting:
    """A container that tells how many packets and frames it gave."""

    def __init__(self, container, given):
        self.inner, self.given = container, given

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def demux(self, stream):
        for packet in self.inner.demux(stream):
            self.given["packets"] += 1
            yield packet

    def decode(self, stream):
        for frame in self.inner.decode(stream):
            self.given["frames"] += 1
            yield frame


def test_a_long_file_costs_what_a_short_one_does(tmp_path, monkeypatch):
    """Its times are found at its ends, and only the section is decoded."""

    @contextlib.contextmanager
    def counted(path, really=video._stream):
        with really(path) as (container, stream):
            yield Counting(container, given), stream

    path, given = film(tmp_path / "long.mp4", n=25, fps=5, g="5", bf="0"), {"packets": 0, "frames": 0}
    monkeypatch.setattr(video, "_stream", counted)
    known = info(path)
    assert known == (64, 48, 25, pytest.approx(4.8), 0, True) and given["packets"] < 25
    given.update(packets=0, frames=0)
    assert brightness(frames(path, [3.0, 3.2, 3.4], known)) == pytest.approx([150, 160, 170], abs=3)
    assert given == {"packets": 0, "frames": pytest.approx(5, abs=1)}  # 15, a key frame, to 17, and what is nearer


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


def draw(path, picture, codec="libx264rgb", pixels="rgb24", n=2, **about):
    """A film of one picture, (H, W, 3) or (H, W, 4) in `pixels`, without loss; `about` is set on the codec."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, 8)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], pixels
        stream.options = {"crf": "0"} if codec.startswith("libx264") else {}
        for name, value in about.items():
            setattr(stream.codec_context, name, value)
        for _ in range(n):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format=pixels)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0)])
def test_pixels_that_are_not_square(tmp_path, matrix):
    """A disc of a player's screen is 32 pixels wide in the file and 64 high, or lies on its side when turned."""
    y, x = np.mgrid[:80, :60]
    disc = (((x - 29.5) * 2) ** 2 + (y - 39.5) ** 2 < 32**2)[..., None].repeat(3, 2)
    about = {"sample_aspect_ratio": Fraction(2)}
    path = draw(tmp_path / "disc.mp4", (disc * 255).astype(np.uint8), **about)
    write_track(path, matrix)
    picture = read_video(path)[0][0]
    assert picture.shape == ((80, 120, 3) if matrix[0] else (120, 80, 3))
    y, x = (picture[..., 0] > 128).nonzero()
    assert np.ptp(y) + 1 == pytest.approx(64, abs=2) and np.ptp(x) + 1 == pytest.approx(64, abs=2)


COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 128, 128]], np.uint8)
BARS = COLOURS.repeat(16, 0)[None].repeat(32, 0)  # (32, 96, 3)


def middles(picture):
    return picture[len(picture) // 2, 8::16].astype(int)


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv444p10le"])
@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("tag, red, blue", [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (9, 0.2627, 0.0593)])
def test_colours_are_those_of_the_matrix_that_a_file_names(tmp_path, tag, red, blue, limited, pixels):
    """Y'CbCr by the definitions of BT.709, BT.601 and BT.2020, in limited and full range, 8 and 10 bits."""
    r, g, b = np.moveaxis(BARS / 255, -1, 0)
    y = red * r + (1 - red - blue) * g + blue * b
    planes = np.stack([y, (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)])
    scale, shift = ([219, 224, 224], [16, 128, 128]) if limited else ([255] * 3, [0, 128, 128])
    bits = 4 if "10" in pixels else 1
    planes = planes * np.reshape(scale, (3, 1, 1)) + np.reshape(shift, (3, 1, 1))
    planes = (planes * bits).round().clip(0, 256 * bits - 1).astype(np.uint8 if bits == 1 else np.uint16)
    frame = av.VideoFrame(96, 32, pixels)
    for plane, values in zip(frame.planes, planes):
        rows = np.frombuffer(plane, values.dtype).reshape(32, -1)
        rows[:, :96] = values
    frame.colorspace, frame.color_range = tag, 1 if limited else 2
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", 8)
        stream.height, stream.width, stream.pix_fmt = 32, 96, pixels
        stream.codec_context.colorspace, stream.codec_context.color_range = frame.colorspace, frame.color_range
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    got = middles(read_video(tmp_path / "a.mkv")[0][0])
    assert np.abs(got - COLOURS).max() <= 2, got


def test_what_we_write_says_how_its_colours_are_meant(tmp_path):
    write_video(tmp_path / "a.mp4", torch.from_numpy(BARS)[None].permute(3, 0, 1, 2) / 127.5 - 1, 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_primaries, frame.color_trc, frame.color_range) == (1, 1, 1, 1)
    assert (tmp_path / "a.mp4").read_bytes().count(b"colrnclx") == 1
    y = middles(frame.to_ndarray()[:32, :, None])[:, 0]  # 16 + 219 (0.2126 R + 0.7152 G + 0.0722 B)
    assert y.tolist() == pytest.approx([63, 173, 32, 235, 16, 126], abs=1)
    assert np.abs(middles(read_video(tmp_path / "a.mp4")[0][0]) - COLOURS).max() <= 3


def test_videos_of_other_pixels(tmp_path):
    hidden = np.dstack([BARS, np.full((32, 96), 255, np.uint8)])
    hidden[:, :16, 3], hidden[:, 16:32, 3] = 0, 128  # red cannot be seen, green half
    want = COLOURS.astype(int)
    want[0], want[1] = (255, 255, 255), (127, 255, 127)
    for name, codec in (("a.mov", "png"), ("b.mov", "qtrle"), ("c.mkv", "ffv1")):
        pixels = {"png": "rgba", "qtrle": "argb", "ffv1": "bgra"}[codec]
        order = {"rgba": [0, 1, 2, 3], "argb": [3, 0, 1, 2], "bgra": [2, 1, 0, 3]}[pixels]
        path = draw(tmp_path / name, np.ascontiguousarray(hidden[..., order]), codec, pixels)
        assert np.abs(middles(read_video(path)[0][0]) - want).max() <= 1, name
    deep = draw(tmp_path / "d.mkv", BARS[..., 0].astype(np.uint16) * 257, "ffv1", "gray16le")
    assert np.abs(middles(read_video(deep)[0][0]) - COLOURS[:, :1]).max() <= 1
    Image.fromarray(hidden).save(tmp_path / "e.gif", save_all=True, append_images=[Image.fromarray(hidden[::-1])])
    assert middles(read_video(tmp_path / "e.gif")[0][0])[0].tolist() == [255, 255, 255]
    for curve in (16, 18):  # PQ, HLG
        draw(tmp_path / "hdr.mkv", BARS[..., 0].astype(np.uint16), "ffv1", "gray16le", color_trc=curve)
        with pytest.raises(UserError, match=r"hdr\.mkv: its colours are HDR"):
            read_video(tmp_path / "hdr.mkv")


def test_images_of_other_pixels(tmp_path):
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    for name in ("a.png", "a.tif", "a.jp2"):
        Image.fromarray(deep).save(tmp_path / name)
        assert read_video(tmp_path / name)[0][0, 0, :, 1].tolist() == [0, 100, 255], name
    clear = np.array([[[255, 0, 0, 0], [0, 255, 0, 128], [0, 0, 255, 255]]], np.uint8)
    for name in ("b.png", "b.webp", "b.tif"):
        Image.fromarray(clear).save(tmp_path / name, lossless=True)
        assert read_video(tmp_path / name)[0][0, 0].tolist() == [[255, 255, 255], [127, 255, 127], [0, 0, 255]], name
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([9, 9, 9, 200, 100, 50, 0, 0, 255])
    palette.save(tmp_path / "c.png", transparency=0)
    assert read_video(tmp_path / "c.png")[0][0, 0].tolist() == [[255, 255, 255], [200, 100, 50], [0, 0, 255]]
    Image.fromarray(clear[..., 2:].copy(), "LA").save(tmp_path / "d.png")
    assert read_video(tmp_path / "d.png")[0][0, 0, :, 0].tolist() == [255, 127, 255]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "e.png")
    assert read_video(tmp_path / "e.png")[0][0, 0, :, 0].tolist() == [255, 0]
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0] = 255  # cyan
    Image.fromarray(ink, "CMYK").save(tmp_path / "f.jpg", quality=100)
    assert read_video(tmp_path / "f.jpg")[0][0, 8, 8].tolist() == pytest.approx([0, 255, 255], abs=3)
    for name, picture in (("g.tif", np.ones((2, 2), np.float32)), ("h.tif", np.ones((2, 2), np.int32))):
        Image.fromarray(picture).save(tmp_path / name)
        with pytest.raises(UserError, match="32 bits"):
            read_video(tmp_path / name)
    first, second = (Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (0, 255))
    first.save(tmp_path / "i.webp", save_all=True, append_images=[second], duration=100)
    with pytest.raises(UserError, match="animation"):
        read_video(tmp_path / "i.webp")


def test_images_with_a_colour_profile(tmp_path):
    """The profile of a screen whose red is sRGB's green comes out as it would look there."""
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for place in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12):  # the table of its tags
        swapped = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(profile[place : place + 4]))
        profile[place : place + 4] = swapped or profile[place : place + 4]
    image = Image.fromarray(np.full((4, 4, 3), (255, 0, 0), np.uint8))
    image.save(tmp_path / "a.png", icc_profile=bytes(profile))
    assert read_video(tmp_path / "a.png")[0][0, 0, 0].tolist() == pytest.approx([0, 255, 0], abs=3)
    image.save(tmp_path / "b.png", icc_profile=b"no profile")
    assert read_video(tmp_path / "b.png")[0][0, 0, 0].tolist() == [255, 0, 0]


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
    assert len(pictures) == 12 and fps == pytest.approx(12, rel=0.01)
    if suffix == ".mp4":  # H.264 halves the colour: odd sides get one more row
        assert pictures.shape[1:3] == (height + height % 2, width + width % 2)
    error = np.abs(pictures[:, :height, :width].astype(int) - to_uint8(x))
    assert error.mean() < mean
    write_video(tmp_path / f"b{suffix}", x, 12)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_clip_without_motion_keeps_its_frames(tmp_path):
    write_video(tmp_path / "a.mp4", torch.full((3, 16, 32, 32), 0.3), 8)
    pictures, fps = read_video(tmp_path / "a.mp4")
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
