"""Which files of a folder are clips, and what their captions are.

A caption stands in a table beside the files or above them, metadata.jsonl, .csv or .parquet, a row a file (the
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

from common import UserError, read_text
from video import IMAGES, VIDEOS

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def list_clips(folder, column="text"):
    """All videos and images below `folder` -> ({name: caption}, {name: why it is left out}), sorted by name.

    column: the tables' column with the captions. Symbolic links are followed. Raises UserError for a folder that is
    missing, a table that cannot be read, and one without that column.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    names, skipped = _walk(folder)
    on_disk = {_key(name): name for name in names}
    captions, said = {}, {}  # said: by the key of the file's name
    for table in [name for name in names if Path(name).name in TABLES]:
        for file, caption in _read_table(folder / table, column):
            place = os.path.relpath(file, folder.absolute()) if os.path.isabs(file) else Path(table).parent / file
            said[_key(place)] = caption
            if _key(place) not in on_disk:
                skipped[file] = "it is not there, though a table names it"
    for name in names:
        kind, caption = Path(name).suffix.lower(), said.get(_key(name))
        beside = on_disk.get(_key(Path(name).with_suffix(".txt")))
        if kind == ".txt" or Path(name).name in TABLES:
            continue
        if kind not in IMAGES + VIDEOS:
            skipped[name] = f"{kind} files are not read" if kind else "files without a suffix are not read"
            continue
        if beside and not (isinstance(caption, str) and caption.strip()):
            try:
                caption = read_text(folder / beside)
            except UserError:
                skipped[name] = "its .txt is no text in UTF-8 or UTF-16"
                continue
        if not isinstance(caption or "", str):
            skipped[name] = "its caption is no text"
        elif words := (caption or "").split():
            captions[name] = " ".join(words)
        else:
            skipped[name] = "it has no caption"
    return captions, skipped


def _walk(folder):
    """-> names of all files below the folder, sorted, and {name: why} of what is not looked into."""
    names, skipped = [], {}

    def unreadable(error):
        skipped[os.path.relpath(error.filename, folder)] = f"it cannot be opened: {error.strerror}"

    for root, inside, files in os.walk(folder, onerror=unreadable, followlinks=True):
        place = Path(root).relative_to(folder)
        for name in files + inside:
            if name.startswith("."):
                skipped[(place / name).as_posix()] = "it is hidden: its name begins with a dot"
        names += [(place / name).as_posix() for name in files if not name.startswith(".")]
        # a link to a folder that it lies in would lead round and round
        above = {os.path.realpath(folder / part) for part in (place, *place.parents)}
        inside[:] = [d for d in inside if not d.startswith(".") and os.path.realpath(Path(root, d)) not in above]
    return sorted(names), skipped


def _key(name):
    """What two spellings of one name have in common: a Mac writes an accent as a letter of its own, Windows a \\."""
    return unicodedata.normalize("NFC", os.path.normpath(str(name).replace("\\", "/")))


def _read_table(table, column):
    """-> [(file name, caption)] of a table's rows; the caption is whatever stands there."""
    try:
        if table.suffix == ".jsonl":
            lines = [line for line in read_text(table).split("\n") if line.strip()]
            rows = json.loads("[" + ",\n".join(lines) + "]")  # as one text, so that an error tells its line
        elif table.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(read_text(table), newline="")))
        else:
            from pyarrow import parquet  # here, since few have such tables

            rows = parquet.read_table(table).to_pylist()
    except ImportError:
        raise UserError(f"{table} is read by pyarrow: pip install pyarrow, or save it as metadata.csv") from None
    except (ValueError, csv.Error, OSError) as e:  # pyarrow's own errors are among these
        raise UserError(f"cannot read {table}: {e}") from e
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"cannot read {table}: row {number} names no file as file_name")
    columns = {name for row in rows for name in row}
    if rows and column not in columns:
        there = ", ".join(sorted(map(str, columns)))
        raise UserError(f"{table} has the columns {there}: wanted file_name and {column} (see --caption-column)")
    return [(row["file_name"], row.get(column)) for row in rows]
