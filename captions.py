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
        elif isinstance(caption, str) and caption.strip():
            captions[name] = " ".join(caption.split())
        elif beside:
            try:
                captions[name] = " ".join(read_text(folder / beside).split())
            except UserError:
                skipped[name] = "its .txt is no text in UTF-8 or UTF-16"
        else:
            skipped[name] = "it has no caption" if caption in (None, "") else "its caption is no text"
    for name in [name for name, caption in captions.items() if not caption]:
        skipped[name] = "it has no caption"
        del captions[name]
    return captions, skipped


def _walk(folder):
    """-> names of all files below the folder, sorted, and {name: why} of what is not looked into."""
    names, skipped = [], {}

    def unreadable(error):
        skipped[os.path.relpath(error.filename, folder)] = f"it cannot be opened: {error.strerror}"

    for root, inside, files in os.walk(folder, onerror=unreadable, followlinks=True):
        place = Path(root).relative_to(folder)
        above = {os.path.realpath(folder / part) for part in (place, *place.parents)}
        for name in files + inside:
            if name.startswith("."):
                skipped[(place / name).as_posix()] = "it is hidden: its name begins with a dot"
            elif name in files:
                names.append((place / name).as_posix())
        # a link to a folder that it lies in would lead round and round
        inside[:] = [d for d in inside if not d.startswith(".") and os.path.realpath(Path(root, d)) not in above]
    return sorted(names), skipped


def _key(name):
    """What two spellings of one name have in common: a Mac writes an accent as a letter of its own, Windows a \\."""
    return unicodedata.normalize("NFC", os.path.normpath(str(name).replace("\\", "/")))


def _read_table(table, column):
    """-> [(file name, caption)] of a table's rows; the caption is whatever stands there."""
    if table.suffix == ".jsonl":
        rows = []
        for number, line in enumerate(read_text(table).split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError:
                rows.append(None)
            if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get("file_name"), str):
                raise UserError(f"{table}, line {number}: not a JSON object with file_name and {column}")
    elif table.suffix == ".csv":
        try:
            rows = list(csv.DictReader(io.StringIO(read_text(table), newline="")))
        except csv.Error as e:
            raise UserError(f"cannot read {table}: {e}") from e
    else:
        try:
            from pyarrow import ArrowException, parquet  # here, since few have such tables
        except ImportError:
            raise UserError(f"{table} is read by pyarrow: pip install pyarrow, or save it as metadata.csv") from None
        try:
            rows = parquet.read_table(table).to_pylist()
        except (ArrowException, OSError) as e:
            raise UserError(f"cannot read {table}: {e}") from e
    columns = {name for row in rows for name in row}
    if rows and not {"file_name", column} <= columns:
        there = ", ".join(sorted(map(str, columns)))
        raise UserError(f"{table} has the columns {there}: wanted file_name and {column} (see --caption-column)")
    return [(row["file_name"], row.get(column)) for row in rows if row["file_name"]]
