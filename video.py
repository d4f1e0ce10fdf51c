"""Video files in and out: .mp4, .gif, images, and sheets of many clips to look at.

Files are read by time, not by frame number: a clip at 8 frames a second is the nearest frame to each eighth of a
second, whatever the file's own rate, constant or not, and only the section that is asked for is decoded. Frames on
disk are uint8 (H, W, 3); clips in memory are float (3, F, H, W) in [-1, 1]. What is written depends on the tensor
alone: one encoder thread, no dates in the file.
"""

import contextlib
import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cli import UserError, atomic

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")


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
    except (av.error.FFmpegError, OSError) as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from e


def timeline(path):
    """Seconds after the first frame at which each frame of `path` is shown, sorted; found without decoding."""
    if Path(path).suffix.lower() in IMAGES:
        return [0.0]
    with _stream(path) as (container, stream):
        stamps = [p.dts if p.pts is None else p.pts for p in container.demux(stream) if p.size and not p.is_discard]
        stamps = sorted(s for s in stamps if s is not None)
        if not stamps:
            raise UserError(f"cannot read {path}: it has no frames")
        return [float((s - stamps[0]) * stream.time_base) for s in stamps]


def frames(path, times, seek=True):
    """Yield uint8 (H, W, 3): the frame of `path` nearest to each of `times` (ascending seconds after the first frame).

    Decoding starts at the last key frame before the first of `times` and ends with the last of them.
    Raises UserError where the file is missing, cannot be decoded or breaks off.
    """
    if Path(path).suffix.lower() in IMAGES:
        try:
            with Image.open(path) as image:
                picture = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # all that Pillow's readers raise
            raise UserError(f"cannot read {path}: {e}") from e
        yield from [picture] * len(times)
        return
    with _stream(path) as (container, stream):
        wanted, decoder, base = list(times), container.decode(stream), stream.time_base
        last = next(decoder, None)
        if last is None or last.pts is None:
            raise UserError(f"cannot read {path}: it has no frames that carry a time")
        origin, start = last.pts, last.pts + int(wanted[0] / base)
        if seek and start > origin:
            container.seek(start, stream=stream)
            decoder = container.decode(stream)
            last = next(decoder, None)
            if last is None or last.pts > start:  # some files seek too far
                yield from frames(path, times, seek=False)
                return
        for frame in decoder:
            before, now = (float((f.pts - origin) * base) for f in (last, frame))
            while wanted and abs(wanted[0] - before) <= now - wanted[0]:  # the last frame is nearer
                yield _rgb(last)
                wanted.pop(0)
            if not wanted:
                return
            last = frame
        if wanted and wanted[-1] - float((last.pts - origin) * base) > 1 / (stream.guessed_rate or 1):
            raise UserError(f"cannot read {path}: it breaks off")
        yield from [_rgb(last)] * len(wanted)


def _rgb(frame):
    turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)  # telephones film sideways and say so
    return np.ascontiguousarray(turned)


def read_video(path):
    """Read a whole video or image: uint8 (F, H, W, 3), and its mean frames a second (1.0 for an image)."""
    shown = timeline(path)
    return np.stack(list(frames(path, shown))), (len(shown) - 1) / shown[-1] if len(shown) > 1 else 1.0


def to_uint8(video):
    """(3, F, H, W) in [-1, 1], clamped, to uint8 (F, H, W, 3)."""
    pixels = ((video.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().numpy()


def write_video(path, video, fps):
    """Write (3, F, H, W) in [-1, 1] as .mp4 (H.264; an odd side repeats its last row) or .gif (endless).

    Raises UserError for another suffix and where nothing can be written.
    """
    _write(path, to_uint8(video), fps)


def _write(path, pictures, fps):
    kind = Path(path).suffix.lower()
    if kind not in (".mp4", ".gif"):
        raise UserError(f"cannot write {path}: a video file ends in .mp4 or .gif")
    with atomic(path) as part:
        if kind == ".gif":  # a gif counts in hundredths of a second: spread the rounding so that the whole keeps time
            ends = [round(100 * i / fps) for i in range(len(pictures) + 1)]
            first, *rest = [_palette(p, i % 2) for i, p in enumerate(pictures)]
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
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def _palette(picture, odd):
    """256 colours. Pillow drops a frame that equals the last, so every other one has a corner one step bluer."""
    image = Image.fromarray(picture).quantize(255)
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


def write_grid(path, videos, captions=None, frames=8):
    """Write a PNG contact sheet: a row a video (3, F, H, W), `frames` of its frames evenly spread, captions above."""
    rows = []
    for video in videos:
        picked = torch.linspace(0, video.shape[1] - 1, min(frames, video.shape[1])).round().long()
        rows.append(list(to_uint8(video[:, picked])))
    with atomic(path) as part:
        Image.fromarray(_sheet(rows, captions, None)).save(part, "PNG")


def write_video_grid(path, rows, fps, captions=None, titles=None):
    """Write one video that shows many: `rows` lists of videos (3, F, H, W) of one size; a shorter one holds its end.

    `captions` has a text for each row, `titles` one for each column.
    """
    rows = [[to_uint8(video) for video in row] for row in rows]
    length = max(len(video) for row in rows for video in row)
    sheets = [_sheet([[v[min(i, len(v) - 1)] for v in row] for row in rows], captions, titles) for i in range(length)]
    _write(path, np.stack(sheets), fps)
