"""Video files in and out: .mp4, .gif, images, and sheets of many clips to look at.

Files are read by time, not by frame number: a clip at 8 frames a second is the nearest frame to each eighth of a
second, whatever the file's own rate, constant or not, and only the section that is asked for is decoded. Pictures come
as players show them: turned and mirrored as the file says, with square pixels, in 8 bits, what is transparent on white.
Frames on disk are uint8 (H, W, 3); clips in memory are float (3, F, H, W) in [-1, 1]. What is written depends on the
tensor alone: one encoder thread, no dates in the file.
"""

import collections
import contextlib
import io
import itertools
import random
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps

from common import UserError, atomic

IMAGES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
VIDEOS = (
    *(".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".asf"),
    *(".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".ogg", ".vob", ".mxf", ".y4m", ".mjpeg"),
)


@contextlib.contextmanager
def _stream(path):
    """Open the first video stream of `path`; whatever the decoder says against the file becomes a UserError."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"cannot read {path}: it has no video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e


class VideoInfo(NamedTuple):
    """What must be known of a file before a section of it can be chosen and found."""

    width: int  # as shown
    height: int
    count: int = 1  # frames, by the mean rate
    last: float = 0.0  # seconds from the first frame to the last
    origin: int = 0  # the first frame's time stamp
    stamped: bool = True  # whether decoded frames carry their own times


def is_image(path):
    return Path(path).suffix.lower() in IMAGES


def info(path):
    """The VideoInfo of a video or image, from its first frame and its last packets.

    Raises UserError where the file cannot be read, has no frames, or has colours that would come out wrong.
    """
    if is_image(path):
        height, width, _ = next(frames(path)).shape
        return VideoInfo(width, height)
    with _stream(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise UserError(f"cannot read {path}: it has no frames")
        height, width, _ = rgb(first, stream.sample_aspect_ratio).shape
        # .avi keeps the times of decoding alone, and what is made of them goes backward where frames are reordered
        stamped = container.format.name != "avi" or not stream.codec_context.has_b_frames
        base, rate = stream.time_base, stream.average_rate or stream.guessed_rate or 1
    stamps = _stamps(path, tail=True) or _stamps(path)
    if not stamps:
        raise UserError(f"cannot read {path}: it has no frames that carry a time")
    # a recording may begin with packets that nothing can decode
    origin = first.pts if stamped and first.pts is not None else stamps[0]
    last = float((stamps[-1] - origin) * base)
    return VideoInfo(width, height, round(last * rate) + 1, last, origin, stamped)


def _stamps(path, tail=False):
    """-> sorted time stamps of the frames, found without decoding.

    tail: where the file has an index (.mp4, .mov, .mkv, .webm) the last few alone, which a long file gives as fast as a
    short one; none where it is cut off.
    """
    with _stream(path) as (container, stream):
        if tail and container.duration and container.format.name.split(",")[0] in ("mov", "matroska"):
            container.seek((container.start_time or 0) + container.duration)  # to the last key frame
        shown = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        stamps = (packet.dts if packet.pts is None else packet.pts for packet in shown)
        return sorted(stamp for stamp in stamps if stamp is not None)


def frames(path, times=None, known=None):
    """Yield uint8 (H, W, 3): the frame of `path` nearest to each of `times` (ascending seconds after the first frame).

    Without times every frame. known: the file's VideoInfo. Decoding starts at the last key frame before the first of
    `times` and ends with the last of them. Raises UserError where the file is missing, cannot be decoded, breaks off,
    or has colours that would come out wrong.
    """
    if is_image(path):
        try:
            with Image.open(path) as image:
                picture = rgb(image)
        except Exception as e:  # Pillow's many readers raise whatever they meet
            raise UserError(f"cannot read {path}: {e}") from e
        yield from [picture] * (1 if times is None else len(times))
        return
    known = known or info(path)
    with _stream(path) as (container, stream):
        base, aspect, longest = stream.time_base, stream.sample_aspect_ratio, 1 / (stream.guessed_rate or 1)
        start = times[0] if times else 0.0
        if known.stamped:
            decoded = _decode_from(container, stream, known.origin, known.origin + int(start / base))
            shown = ((frame.pts, frame) for frame in decoded if frame.pts is not None)
        else:  # frames come in the order of display, so the k-th has the k-th smallest time
            shown = zip(_stamps(path), container.decode(stream))
        before, last, wanted = 0.0, None, collections.deque(times or [])
        for stamp, frame in shown:
            now = float((stamp - known.origin) * base)
            while last is not None and wanted and wanted[0] - before <= now - wanted[0]:  # the last is nearer
                yield rgb(last, aspect)
                wanted.popleft()
            if times is None:
                yield rgb(frame, aspect)
            elif not wanted:
                return
            before, last = now, frame
        if last is None or (known.last if times is None else wanted[-1]) - before > longest:
            raise UserError(f"cannot read {path}: it breaks off")
        for _ in wanted:
            yield rgb(last, aspect)


def _decode_from(container, stream, origin, start):
    """Decode from the last key frame at or before the time stamp `start` (or a little earlier)."""
    back = 0
    while start - back > origin:
        container.seek(start - back, stream=stream)
        decoder = container.decode(stream)
        first = next(decoder, None)
        if first and first.pts is not None and first.pts <= start:
            return itertools.chain([first], decoder)
        back = 2 * back + int(1 / stream.time_base)  # some files seek too far
    if back:
        container.seek(min(0, origin), stream=stream)
    return container.decode(stream)


def rgb(source, aspect=None):
    """What a player shows of a decoded frame or a Pillow image: uint8 (H, W, 3).

    aspect: the width of a frame's pixels over their height, None for square ones. Raises ValueError, which says why,
    for what cannot be shown right in 8 bits without a choice of tone: HDR, pixels of 32 bits; and for animated
    images, which are not videos.
    """
    if isinstance(source, Image.Image):
        return _of_image(source)
    if source.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
        raise ValueError("its colours are HDR (PQ or HLG): convert it to BT.709")
    width = round(source.width * (aspect or 1))
    if not 0.1 <= width / source.width <= 10:
        raise ValueError(f"its pixels are said to be {float(aspect):g} times as wide as high")
    clear = source.format.has_palette or any(c.is_alpha for c in source.format.components)
    kind = "rgba" if clear else "rgb24"
    picture = source.reformat(width, format=kind, interpolation=Interpolation.BICUBIC, threads=1).to_ndarray()
    if matrix := source.side_data.get("DISPLAYMATRIX"):  # x' = a x + c y, y' = b x + d y, in quarter turns
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
        if abs(b) > abs(a):
            picture, a, d = picture.swapaxes(0, 1), c, b
        picture = picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return _on_white(picture) if clear else np.ascontiguousarray(picture)


def _of_image(image):
    if image.format in ("PNG", "WEBP", "AVIF") and getattr(image, "is_animated", False):
        raise ValueError("it is an animation: convert it to a video")
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip to 255 what goes to 65535
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, of which nobody says what is white")
    if image.has_transparency_data:
        return _on_white(np.asarray(image.convert("RGBA")))
    if profile and image.mode in ("RGB", "CMYK", "L"):
        with contextlib.suppress(ImageCms.PyCMSError):  # a damaged profile, or one of other pixels: as if it had none
            srgb = ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), srgb, outputMode="RGB")
    return np.array(image.convert("RGB"))


def _on_white(rgba):
    """uint8 (H, W, 4) -> (H, W, 3): what shows through is white, and no hidden colour comes out."""
    part = rgba[..., 3:] / 255
    return (rgba[..., :3] * part + 255 * (1 - part)).round().astype(np.uint8)


def read_video(path):
    """Read a whole video or image: uint8 (F, H, W, 3), and its mean frames a second (1.0 for an image)."""
    known = info(path)
    pictures = np.stack(list(frames(path, None, known)))
    return pictures, (len(pictures) - 1) / known.last if known.last else 1.0


def fit(pictures, height, width):
    """The largest centred part of height:width, resized with antialiasing: (..., h, w) -> (..., height, width)."""
    from torchvision.transforms.v2 import functional as v2  # here, for importing it takes a second

    h, w = pictures.shape[-2:]
    scale = max(height / h, width / w)
    size = [max(height, round(h * scale)), max(width, round(w * scale))]
    return v2.center_crop(v2.resize(pictures, size, v2.InterpolationMode.BICUBIC, antialias=True), [height, width])


def section(path, known, n, fps, seed=0):
    """The times in seconds of n frames at `fps`, from a start chosen by seed; an image has the one time 0.

    known: the file's VideoInfo. Raises UserError where the file is too short.
    """
    if is_image(path):
        return [0.0]
    room = known.last - (n - 1) / fps
    if room < -0.5 * known.last / max(1, known.count - 1) or known.count < min(n, 2):  # each needs a frame close by
        there = f"{known.count} frames in {known.last:.2f} s"
        raise UserError(f"cannot read {path}: it is too short, {there}, where {n} at {fps:g} fps are wanted")
    start = max(0.0, room) * random.Random(f"{seed}/{Path(path).name}").random()
    return [start + i / fps for i in range(n)]


def load_clip(path, n, height, width, fps, seed=0, known=None):
    """One file -> (3, F, H, W) in [-1, 1], F = n, or 1 for an image. known: its VideoInfo, found here if it is None.

    Raises UserError as `info`, `section` and `frames` do.
    """
    known = known or info(path)
    times = section(path, known, n, fps, seed)
    pictures = [torch.from_numpy(picture).permute(2, 0, 1) for picture in frames(path, times, known)]
    # in 8 bits, as published preprocessings resize, and nine times as fast as in floats
    return torch.stack([fit(picture, height, width) for picture in pictures], 1).float().div_(127.5).sub_(1)


def to_uint8(video):
    """(3, F, H, W) in [-1, 1], clamped, to uint8 (F, H, W, 3)."""
    pixels = ((video.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().numpy()


def write_video(path, video, fps):
    """Write (3, F, H, W) in [-1, 1] as .mp4 (H.264; an odd side repeats its last row) or .gif (endless).

    Raises UserError for another suffix and where nothing can be written.
    """
    _write(path, to_uint8(video), fps)


def _write(path, pictures, fps, colours=255):
    kind = Path(path).suffix.lower()
    if kind not in (".mp4", ".gif"):
        raise UserError(f"cannot write {path}: a video file ends in .mp4 or .gif")
    with atomic(path) as part:
        if kind == ".gif":  # a gif counts in hundredths of a second: spread the rounding so that the whole keeps time
            ends = [round(100 * i / fps) for i in range(len(pictures) + 1)]
            first, *rest = [Image.fromarray(picture).quantize(colours) for picture in pictures]
            lasts = [10 * (b - a) for a, b in itertools.pairwise(ends)]
            first.save(part, save_all=True, append_images=rest, duration=lasts, loop=0)
            return
        pictures = np.pad(pictures, ((0, 0), (0, pictures.shape[1] % 2), (0, pictures.shape[2] % 2), (0, 0)), "edge")
        with av.open(str(part), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
            # x264's fast paths give other bytes on another processor, and now and then on the same one
            stream.options = {"crf": "12", "preset": "slow", "x264-params": "cpu-independent=1"}
            stream.codec_context.thread_count = 1  # nor may they depend on the number of threads
            how = {"format": "yuv420p", "dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, as H.264 numbers it
            context.color_range = ColorRange.MPEG
            for picture in pictures:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame.reformat(**how, threads=1)))
            container.mux(stream.encode())


def _sheet(rows, captions, titles):
    """Lay uint8 pictures out in rows: titles above the columns, a caption above each row. -> uint8 (H, W, 3)."""
    height, width, _ = rows[0][0].shape
    scale, gap, line, font = max(1, 128 // max(height, width)), 4, 16, ImageFont.load_default(12)
    cell = (width * scale + gap, height * scale + gap + (line if captions else 0))
    top = line if titles else 0
    sheet = Image.new("RGB", (gap + cell[0] * max(map(len, rows)), top + gap + cell[1] * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles or []):
        draw.text((gap + cell[0] * x, 1), title, "black", font)
    for y, row in enumerate(rows):
        if captions:
            draw.text((gap, top + cell[1] * y + 1), captions[y], "black", font)  # cut off by the sheet's edge
        for x, picture in enumerate(row):
            image = Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + cell[0] * x, top + cell[1] * (y + 1) - height * scale))
    return np.asarray(sheet)


def write_grid(path, videos, captions=None, frames=8, fps=None):
    """Write a PNG contact sheet: a row a video (3, F, H, W), `frames` of its frames evenly spread, captions above.

    fps: the frames' times stand above the columns (of the longest video; the others have as many frames or one).
    """
    rows, times = [], []
    for video in videos:
        numbers = torch.linspace(0, video.shape[1] - 1, min(frames, video.shape[1])).round().long()
        rows.append(list(to_uint8(video[:, numbers])))
        if fps and len(numbers) > len(times):
            times = [f"{number / fps:.2f} s" for number in numbers]
    with atomic(path) as part:
        Image.fromarray(_sheet(rows, captions, times)).save(part, "PNG")


def write_video_grid(path, rows, fps, captions=None, titles=None, colours=255):
    """Write one video that shows many: `rows` lists of videos (3, F, H, W) of one size; a shorter one holds its end.

    `captions` has a text for each row, `titles` one for each column. colours: of each frame of a .gif; fewer make a
    smaller file.
    """
    rows = [[to_uint8(video) for video in row] for row in rows]
    length = max(len(video) for row in rows for video in row)
    sheets = [_sheet([[v[min(i, len(v) - 1)] for v in row] for row in rows], captions, titles) for i in range(length)]
    _write(path, np.stack(sheets), fps, colours)
