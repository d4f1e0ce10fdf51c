"""Which files of a folder are clips, and what their captions are.

A caption stands in a table beside the files or above them, metadata.jsonl or metadata.csv, a row a file (the
convention of Hugging Face's image and video folders: `file_name`, relative to the table, and `text`), or in a .txt of
the file's own name. Whatever is not used is named with its reason, since what is left out without a word is found when
a model does not know it.
"""

import csv
import io
import json
import os
import unicodedata
from pathlib import Path

from common import UserError, atomic, read_text
from video import IMAGES, VIDEOS

TABLES = ("metadata.jsonl", "metadata.csv")


def list_clips(folder):
    """All videos and images below `folder` -> ({name: caption}, {name: why it is left out}), sorted by name.

    Hidden files are passed over. Raises UserError for a folder that is missing, a table or a text that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    names = sorted(_files(folder))
    said = {}
    for table in names:
        if Path(table).name in TABLES:
            said |= _read_table(folder, table)
    captions = {}
    skipped = dict.fromkeys(sorted(set(said).difference(map(_same, names))), "it is not there, though a table names it")
    for name in names:
        kind, beside = Path(name).suffix.lower(), (folder / name).with_suffix(".txt")
        if kind == ".txt" or Path(name).name in TABLES:
            continue
        if kind not in IMAGES + VIDEOS:
            skipped[name] = f"{kind or 'such'} files are not read"
            continue
        caption = said.get(_same(name))
        if not (isinstance(caption, str) and caption.strip()):
            caption = read_text(beside) if beside.exists() else ""
        if caption.strip():
            captions[name] = " ".join(caption.split())
        else:
            skipped[name] = "it has no caption"
    return captions, skipped


def write_caption(clip, caption):
    """Write a clip's caption where `list_clips` finds it, in a .txt beside the clip. Raises UserError."""
    with atomic(Path(clip).with_suffix(".txt")) as part:
        part.write_text(caption, encoding="utf-8")


def _files(folder):
    """The names of all files below a folder, also behind links, but of none that leads to a folder above itself."""
    for place, folders, files in os.walk(folder, followlinks=True):
        above = {os.path.realpath(path) for path in (place, *Path(place).parents)}
        below = {name: os.path.realpath(os.path.join(place, name)) for name in folders if not name.startswith(".")}
        folders[:] = [name for name, path in below.items() if path not in above]
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in files if not name.startswith("."))


def _same(name):
    """One form of a name that can be written in several: a Mac writes an accent as a letter of its own."""
    return unicodedata.normalize("NFC", os.path.normpath(name))


def _read_table(folder, table):
    """-> {file, as named below the folder: caption} of a table's rows; the caption is whatever stands there."""
    text = read_text(folder / table)
    try:
        if table.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        return {_same(Path(table).parent / row["file_name"]): row["text"] for row in rows}
    except (ValueError, KeyError, TypeError, csv.Error) as e:
        raise UserError(f"cannot read {folder / table}, a row a file with its file_name and text: {e!r}") from e
