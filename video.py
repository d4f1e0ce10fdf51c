"""Video files in and out: .mp4, .gif, images, and sheets of many clips to look at.

Files are read by time, not by frame number: a clip at 8 frames a second is the nearest frame to each eighth of a
second, whatever the file's own rate, and only the section that is asked for is decoded. Frames on disk are uint8
(H, W, 3); clips in memory are float (3, F, H, W) in [-1, 1]. What is written depends on the tensor alone: one encoder
thread, no dates in the file.
"""

import contextlib
import itertools
import math
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import UserError, atomic

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".gif")


def is_image(path):
    return Path(path).suffix.lower() in IMAGES


@contextlib.contextmanager
def _open(path):
    """Yield Pillow's image or av's container; whatever is said against the file becomes a UserError."""
    try:
        with Image.open(path) if is_image(path) else av.open(str(path)) as file:
            if not is_image(path) and not file.streams.video:
                raise ValueError("it has no video")
            yield file
    except Exception as e:  # the readers raise whatever they meet
        raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}") from e


def _length(path):
    """Seconds from the first frame to the last, and mean frames a second, as a file's head says; 0 and 1 of images."""
    with _open(path) as file:
        if is_image(path):
            return 0.0, 1.0
        stream = file.streams.video[0]
        seconds, rate = _seconds(file, stream), stream.average_rate
        if file.format.name == "gif":  # whose rate is guessed from its first frames
            rate = stream.frames / seconds
        return float(seconds - 1 / rate), float(rate)


def _seconds(file, stream):
    """A video's length. That of a Matroska file is its longest stream's, which may be the sound."""
    if stream.duration:
        return stream.duration * stream.time_base
    if "DURATION" in stream.metadata:
        hours, minutes, seconds = stream.metadata["DURATION"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + Fraction(seconds)
    return file.duration / av.time_base


def section(path, n, fps, seed=0):
    """The times in seconds of n frames at `fps`, from a start chosen by seed; an image has the one time 0.

    Raises UserError where the file cannot be opened or is too short.
    """
    last, rate = _length(path)
    n = 1 if is_image(path) else n
    room = last - (n - 1) / fps
    if room < -0.5 / rate:  # each needs a frame close by
        raise UserError(f"cannot read {path}: it is too short for {n} frames at {fps:g} fps")
    start = max(0.0, room) * random.Random(f"{seed}/{Path(path).name}").random()
    return [start + i / fps for i in range(n)]


def frames(path, times):
    """Yield uint8 (H, W, 3): the frame of `path` nearest to each of `times` (ascending seconds after the first frame).

    Raises UserError where the file is missing, cannot be decoded, or breaks off.
    """
    with _open(path) as file:
        if is_image(path):
            yield from [np.array(ImageOps.exif_transpose(file).convert("RGB"))] * len(times)
            return
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        begin = (stream.start_time or 0) * stream.time_base
        counted = file.format.name == "avi"  # it keeps no times of display: its frames are counted from the first
        if not counted:
            # a second early: files are searched by the times of decoding, which are not those of display
            with contextlib.suppress(PermissionError):  # a .gif cannot be searched
                file.seek(int((begin + max(0, times[0] - 1)) * av.time_base))
        before, shown, wanted = -math.inf, None, list(times)
        for k, frame in enumerate(file.decode(stream)):
            now = k / float(stream.average_rate) if counted else frame.time - float(begin)
            while wanted and wanted[0] - before < now - wanted[0]:  # the one before is nearer
                yield _rgb(shown, stream.sample_aspect_ratio)
                wanted.pop(0)
            if not wanted:
                return
            before, shown = now, frame
        if wanted[-1] - before > max(0.5, 1 / stream.average_rate):  # what a head says is not exact
            raise ValueError("it breaks off")
        yield from [_rgb(shown, stream.sample_aspect_ratio) for _ in wanted]


def _rgb(frame, aspect):
    """What a player shows of a decoded frame: uint8 (H, W, 3). aspect: the width of its pixels over their height."""
    picture = frame.reformat(round(frame.width * (aspect or 1)), format="rgb24").to_ndarray()
    if matrix := frame.side_data.get("DISPLAYMATRIX"):  # x' = a x + c y, y' = b x + d y, in quarter turns
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
        if abs(b) > abs(a):
            picture, a, d = picture.swapaxes(0, 1), c, b
        picture = picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(picture)


def read_video(path):
    """Read a whole video or image: uint8 (F, H, W, 3), and its mean frames a second (1.0 for an image)."""
    last, rate = _length(path)
    return np.stack(list(frames(path, [i / rate for i in range(round(last * rate) + 1)]))), rate


def fit(pictures, height, width):
    """The largest centred part of height:width, resized with antialiasing: (..., h, w) -> (..., height, width)."""
    from torchvision.transforms.v2 import functional as v2  # here, for importing it takes a second

    h, w = pictures.shape[-2:]
    scale = max(height / h, width / w)
    size = [round(h * scale), round(w * scale)]
    return v2.center_crop(v2.resize(pictures, size, v2.InterpolationMode.BICUBIC, antialias=True), [height, width])


def load_clip(path, n, height, width, fps, seed=0):
    """One file -> (3, F, H, W) in [-1, 1], F = n, or 1 for an image. Raises UserError as `section` and `frames` do."""
    pictures = (torch.from_numpy(p).permute(2, 0, 1) for p in frames(path, section(path, n, fps, seed)))
    # in 8 bits, as published preprocessings resize, and nine times as fast as in floats
    return torch.stack([fit(picture, height, width) for picture in pictures], 1).float().div_(127.5).sub_(1)


def to_uint8(video):
    """(3, F, H, W) in [-1, 1], clamped, to uint8 (F, H, W, 3)."""
    pixels = ((video.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().numpy()


def write_video(path, video, fps):
    """Write (3, F, H, W) in [-1, 1] as .mp4 (H.264; an odd side loses its last row) or .gif (endless).

    Raises UserError for another suffix and where nothing can be written.
    """
    _write(path, to_uint8(video), fps)


def _write(path, pictures, fps, colours=255):
    kind = Path(path).suffix.lower()
    if kind not in (".mp4", ".gif"):
        raise UserError(f"cannot write {path}: a video file ends in .mp4 or .gif")
    with atomic(path) as part:
        if kind == ".gif":
            first, *rest = [Image.fromarray(picture).quantize(colours) for picture in pictures]
            ends = [round(100 * i / fps) for i in range(len(pictures) + 1)]  # a GIF counts in hundredths of a second
            shown = [10 * (end - begin) for begin, end in itertools.pairwise(ends)]  # ms
            first.save(part, save_all=True, append_images=rest, duration=shown, loop=0)
            return
        height, width = (side // 2 * 2 for side in pictures.shape[1:3])  # H.264 halves the colour
        with av.open(str(part), "w", options={"movflags": "faststart"}) as container:
            stream = container.add_stream("libx264", Fraction(fps).limit_denominator(1001))
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            # x264's fast paths give other bytes on another processor, and now and then on the same one
            stream.options = {"crf": "12", "preset": "slow", "x264-params": "cpu-independent=1"}
            stream.codec_context.thread_count = 1  # nor may they depend on the number of threads
            for picture in pictures[:, :height, :width]:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def _sheet(rows, captions, titles=()):
    """Lay uint8 pictures out in rows: titles above the columns, a caption above each row. -> uint8 (H, W, 3)."""
    height, width, _ = rows[0][0].shape
    scale, font = max(1, 128 // max(height, width)), ImageFont.load_default(12)
    across, down = width * scale + 4, height * scale + 20  # with a gap, and a line of text above
    sheet = Image.new("RGB", (4 + across * max(map(len, rows)), 20 + down * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((4 + across * x, 1), title, "black", font)
    for y, (row, caption) in enumerate(zip(rows, captions or [""] * len(rows))):
        draw.text((4, 17 + down * y), caption, "black", font)  # cut off by the sheet's edge
        for x, picture in enumerate(row):
            large = ImageOps.scale(Image.fromarray(picture), scale, Image.Resampling.NEAREST)
            sheet.paste(large, (4 + across * x, 36 + down * y))
    return np.asarray(sheet)


def write_grid(path, videos, captions=None, frames=8):
    """Write a PNG contact sheet: a row a video (3, F, H, W), `frames` of its frames evenly spread, captions above."""
    spread = lambda n: torch.linspace(0, n - 1, min(frames, n)).round().long()
    rows = [list(to_uint8(video[:, spread(video.shape[1])])) for video in videos]
    with atomic(path) as part:
        Image.fromarray(_sheet(rows, captions)).save(part, "PNG")


def write_video_grid(path, rows, fps, captions=None, titles=(), colours=255):
    """Write one video that shows many: `rows` lists of videos (3, F, H, W) of one size; a shorter one holds its end.

    `captions` has a text for each row, `titles` one for each column. colours: of each frame of a .gif; fewer make a
    smaller file.
    """
    rows = [[to_uint8(video) for video in row] for row in rows]
    length = max(len(video) for row in rows for video in row)
    sheets = [_sheet([[v[min(i, len(v) - 1)] for v in row] for row in rows], captions, titles) for i in range(length)]
    _write(path, np.stack(sheets), fps, colours)
