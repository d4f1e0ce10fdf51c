"""Video files in and out: .mp4, .gif, images, and sheets of many clips to look at.

Files are read by time, not by frame number: a clip at 8 frames a second is the nearest frame to each eighth of a
second, whatever the file's own rate, constant or not, and only the section that is asked for is decoded. Pictures come
as players show them: turned and mirrored as the file says, with square pixels, in 8 bits, what is transparent on white.
Frames on disk are uint8 (H, W, 3); clips in memory are float (3, F, H, W) in [-1, 1]. What is written depends on the
tensor alone: one encoder thread, no dates in the file.
"""

import contextlib
import io
import itertools
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, ColorTrc, Interpolation, VideoReformatter
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


class Listing(NamedTuple):
    """What must be known of a file before a section of it can be chosen and found."""

    count: int  # frames, by the mean rate
    last: float  # seconds from the first frame to the last
    origin: int  # the first frame's time stamp
    stamped: bool  # whether decoded frames carry their own times


LISTINGS = {}  # (path, size, time of its last change) -> Listing


def listing(path):
    """The Listing of `path`, from its first frame and its last packets; found once, kept while the file is the same.

    Raises UserError where the file cannot be read or has no frames.
    """
    if Path(path).suffix.lower() in IMAGES:
        return Listing(1, 0.0, 0, True)
    try:
        found = Path(path).stat()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    key = str(path), found.st_size, found.st_mtime_ns
    if key not in LISTINGS:
        stamps, base, stamped, rate = _stamps(path, ends=True)
        last = float((stamps[-1] - stamps[0]) * base)
        LISTINGS[key] = Listing(round(last * rate) + 1, last, stamps[0], stamped)
    return LISTINGS[key]


def _stamps(path, ends=False):
    """-> time stamps of the frames in the order of display, their unit in seconds, Listing.stamped, frames a second.

    ends: where the file has an index (.mp4, .mov, .mkv, .webm) only the first and the last few, which a long file gives
    as fast as a short one.
    """
    with _stream(path) as (container, stream):
        # .avi keeps the times of decoding alone, and what is made of them goes backward where frames are reordered
        stamped = container.format.name != "avi" or not stream.codec_context.has_b_frames
        ends = ends and container.duration and container.format.name.split(",")[0] in ("mov", "matroska")
        stamps, first = [], []
        for packet in container.demux(stream):
            first = first or packet.decode()
            stamps += _stamp(packet)
            if ends and first:
                break
        if ends and first:
            container.seek((container.start_time or 0) + container.duration)  # to the last key frame
            final = [stamp for packet in container.demux(stream) for stamp in _stamp(packet)]
            if not final:  # it is cut off
                return _stamps(path)
            stamps += final
        if first and stamped and first[0].pts is not None:  # a recording may begin with frames that nothing can decode
            stamps = [s for s in stamps if s >= first[0].pts]
        if not first or not stamps:
            raise UserError(f"cannot read {path}: it has no frames that carry a time")
        return sorted(stamps), stream.time_base, stamped, stream.average_rate or stream.guessed_rate or 1


def _stamp(packet):
    """The time stamp of a packet, in a list; [] if it holds no frame to be shown."""
    stamp = packet.dts if packet.pts is None else packet.pts
    return [stamp] if packet.size and not packet.is_discard and stamp is not None else []


def timeline(path):
    """Seconds after the first frame at which each frame of `path` is shown, sorted; found without decoding."""
    if Path(path).suffix.lower() in IMAGES:
        return [0.0]
    stamps, base, *_ = _stamps(path)
    return [float((s - stamps[0]) * base) for s in stamps]


def frames(path, times):
    """Yield uint8 (H, W, 3): the frame of `path` nearest to each of `times` (ascending seconds after the first frame).

    Decoding starts at the last key frame before the first of `times` and ends with the last of them. Raises UserError
    where the file is missing, cannot be decoded, breaks off, or has colours that would come out wrong.
    """
    if Path(path).suffix.lower() in IMAGES:
        try:
            with Image.open(path) as image:
                picture = rgb(image)
        except Exception as e:  # Pillow's many readers raise whatever they meet
            raise UserError(f"cannot read {path}: {e}") from e
        yield from [picture] * len(times)
        return
    origin, stamped = listing(path)[2:]
    with _stream(path) as (container, stream):
        wanted, base, reformatter, last, before = list(times), stream.time_base, VideoReformatter(), None, 0.0
        aspect = float(stream.sample_aspect_ratio or 1)
        seconds = lambda stamp: float((stamp - origin) * base)
        if stamped:
            shown = _decode_from(container, stream, origin, origin + int(wanted[0] / base))
            shown = ((seconds(frame.pts), frame) for frame in shown if frame.pts is not None)
        else:  # frames come in the order of display, so the k-th has the k-th smallest time
            shown = zip(map(seconds, _stamps(path)[0]), container.decode(stream))
        for now, frame in shown:
            while last is not None and wanted and wanted[0] - before <= now - wanted[0]:  # the last is nearer
                yield rgb(last, aspect, reformatter)
                wanted.pop(0)
            if not wanted:
                return
            before, last = now, frame
        if last is None or (wanted and wanted[-1] - before > 1 / (stream.guessed_rate or 1)):
            raise UserError(f"cannot read {path}: it breaks off")
        for _ in wanted:
            yield rgb(last, aspect, reformatter)


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


def rgb(source, aspect=1.0, reformatter=None):
    """What a player shows of a decoded frame or a Pillow image: uint8 (H, W, 3).

    aspect: the width of a frame's pixels over their height. Raises ValueError, which says why, for what cannot be shown
    right in 8 bits without a choice of tone: HDR, pixels of 32 bits; and for animated images, which are not videos.
    """
    if isinstance(source, Image.Image):
        return _of_image(source)
    if source.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
        raise ValueError("its colours are HDR (PQ or HLG): convert it to BT.709")
    if not 0.1 <= aspect <= 10:
        raise ValueError(f"its pixels are said to be {aspect:g} times as wide as high")
    clear = source.format.has_palette or any(c.is_alpha for c in source.format.components)
    how = {"interpolation": Interpolation.BICUBIC, "threads": 1}
    how |= {"width": round(source.width * aspect), "format": "rgba" if clear else "rgb24"}
    picture = (reformatter or VideoReformatter()).reformat(source, **how).to_ndarray()
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
    shown = timeline(path)
    return np.stack(list(frames(path, shown))), (len(shown) - 1) / shown[-1] if shown[-1] else 1.0


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
            first, *rest = [_palette(p, i % 2, colours) for i, p in enumerate(pictures)]
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
            context, reformatter = stream.codec_context, VideoReformatter()
            context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709, as H.264 numbers it
            context.color_range = ColorRange.MPEG
            for picture in pictures:
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(reformatter.reformat(frame, **how, threads=1)))
            container.mux(stream.encode())


def _palette(picture, odd, colours):
    """256 colours. Pillow drops a frame that equals the last, so every other one has a corner one step bluer."""
    image = Image.fromarray(picture).quantize(colours)
    red, green, blue = image.convert("RGB").getpixel((0, 0))
    image.putpalette([*(image.getpalette() + [0] * 765)[:765], red, green, blue ^ odd])
    image.putpixel((0, 0), 255)
    return image


def _sheet(rows, captions, titles):
    """Lay uint8 pictures out in rows: titles above the columns, a caption above each row. -> uint8 (H, W, 3)."""
    height, width, _ = rows[0][0].shape
    scale, gap, line, font = max(1, 128 // max(height, width)), 4, 16, ImageFont.load_default(12)
    cell = (width * scale + gap, height * scale + gap + (line if captions else 0))
    top = line if titles else 0
    sheet = Image.new("RGB", (gap + cell[0] * max(map(len, rows)), top + gap + cell[1] * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles or []):
        draw.text((gap + cell[0] * x, 1), _fit(title, cell[0] - gap, font), "black", font)
    for y, row in enumerate(rows):
        if captions:
            draw.text((gap, top + cell[1] * y + 1), _fit(captions[y], sheet.width - 2 * gap, font), "black", font)
        for x, picture in enumerate(row):
            image = Image.fromarray(picture).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + cell[0] * x, top + cell[1] * (y + 1) - height * scale))
    return np.asarray(sheet)


def _fit(text, width, font):
    """The text, or as much of it as `width` pixels hold, and dots."""
    if font.getlength(text) <= width:
        return text
    return next((s for n in range(len(text), 0, -1) if font.getlength(s := text[:n].rstrip() + "...") <= width), "")


def write_grid(path, videos, captions=None, frames=8, fps=None):
    """Write a PNG contact sheet: a row a video (3, F, H, W), `frames` of its frames evenly spread, captions above.

    fps: the frames' times stand above the columns (of the longest video; the others have as many frames or one).
    """
    longest = max(video.shape[1] for video in videos)
    times = [f"{i / fps:.2f} s" for i in _spread(longest, frames)] if fps else None
    rows = []
    for video in videos:
        rows.append(list(to_uint8(video[:, _spread(video.shape[1], frames)])))
    with atomic(path) as part:
        Image.fromarray(_sheet(rows, captions, times)).save(part, "PNG")


def _spread(n, frames):
    """The numbers of at most `frames` of n frames, evenly spread."""
    return torch.linspace(0, n - 1, min(frames, n)).round().long().tolist()


def write_video_grid(path, rows, fps, captions=None, titles=None, colours=255):
    """Write one video that shows many: `rows` lists of videos (3, F, H, W) of one size; a shorter one holds its end.

    `captions` has a text for each row, `titles` one for each column. colours: of each frame of
    a .gif; fewer make a smaller file.
    """
    rows = [[to_uint8(video) for video in row] for row in rows]
    length = max(len(video) for row in rows for video in row)
    sheets = [_sheet([[v[min(i, len(v) - 1)] for v in row] for row in rows], captions, titles) for i in range(length)]
    _write(path, np.stack(sheets), fps, colours)
