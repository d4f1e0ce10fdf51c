"""captions.py: which files are clips and what is said of them, from the tables and texts that people have."""

import csv
import json
import unicodedata

import pytest

from captions import list_clips
from common import UserError
from video import IMAGES, VIDEOS


def make(folder, files):
    """Write {name: bytes, or text}."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def row(name, text, column="text"):
    return json.dumps({"file_name": name, column: text}, ensure_ascii=False)


@pytest.fixture
def clips(tmp_path):
    """Five clips, four of them with captions, and what else lies in such folders."""
    rows = [("a.mp4", "A red ball"), ("sub/b.webm.mp4", "a blue ball"), ("d.png", "picture of\u2028a ball")]
    table = "\n".join([*(row(*pair) for pair in rows), row("gone.mp4", "a ball"), ""])
    files = {"metadata.jsonl": table, "c.txt": "A ball\n rolls\n", "E.txt": "picture of a red ball", "notes.pdf": ""}
    files |= dict.fromkeys(("a.mp4", "sub/b.webm.mp4", "c.mkv", "d.png", "E.JPG", "silent.mp4", ".hidden.mp4"), b"")
    return make(tmp_path, files)


def test_captions_from_the_table_and_from_beside_the_file(clips):
    captions, skipped = list_clips(clips)
    assert captions == {
        "E.JPG": "picture of a red ball", "a.mp4": "A red ball", "c.mkv": "A ball rolls", "d.png": "picture of a ball",
        "sub/b.webm.mp4": "a blue ball",
    }  # fmt: skip
    assert list(captions) == sorted(captions)
    assert skipped == {
        "gone.mp4": "it is not there, though a table names it", "silent.mp4": "it has no caption",
        "notes.pdf": ".pdf files are not read", ".hidden.mp4": "it is hidden: its name begins with a dot",
    }  # fmt: skip


@pytest.mark.parametrize(
    "line, why",
    [("{", "Expecting .* line 5"), *((line, "row 5") for line in ('{"text": "a"}', "[1]", '{"file_name": 3}'))],
)
def test_a_broken_table_is_named_with_its_row(clips, line, why):
    with open(clips / "metadata.jsonl", "a") as f:
        f.write(line)
    with pytest.raises(UserError, match=rf"metadata\.jsonl: {why}"):
        list_clips(clips)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-with-mark"])
def test_texts_in_the_encodings_that_say_what_they_are(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("mark") else ""
    encode = lambda text: (mark + text).encode(encoding.removesuffix("-with-mark"))
    make(tmp_path, {"a.mp4": b"", "a.txt": encode("a café"), "b.mp4": b""})
    make(tmp_path, {"metadata.jsonl": encode(row("b.mp4", "a cat"))})
    assert list_clips(tmp_path) == ({"a.mp4": "a café", "b.mp4": "a cat"}, {})


def test_texts_in_other_encodings_are_left_out_by_name(tmp_path):
    text = {"a.txt": "a café".encode("latin-1"), "b.txt": "a cat".encode("utf-16-le"), "c.txt": " \n", "d.txt": "a"}
    make(tmp_path, text | {f"{name}.mp4": b"" for name in "abcd"})
    why = "its .txt is no text in UTF-8 or UTF-16"
    assert list_clips(tmp_path) == ({"d.mp4": "a"}, {"a.mp4": why, "b.mp4": why, "c.mp4": "it has no caption"})
    (tmp_path / "metadata.jsonl").write_bytes("{}".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"metadata\.jsonl: it is no text in UTF-8"):
        list_clips(tmp_path)


@pytest.mark.parametrize("value", [["a cat"], float("nan"), 3, {"a": "cat"}, True])
def test_only_text_is_a_caption(tmp_path, value):
    make(tmp_path, {"a.mp4": b"", "b.mp4": b"", "c.mp4": b"", "b.txt": "a dog"})
    (tmp_path / "metadata.jsonl").write_text("\n".join([row("a.mp4", value), row("b.mp4", value), row("c.mp4", None)]))
    want = {"a.mp4": "its caption is no text", "c.mp4": "it has no caption"}
    assert list_clips(tmp_path) == ({"b.mp4": "a dog"}, want)


def test_names_are_compared_as_people_read_them(tmp_path):
    """An accent that a Mac wrote as a letter of its own, back slashes, a table in a folder, the whole path."""
    apart = unicodedata.normalize("NFD", "café.mp4")
    names = (apart, "clips/a.mp4", "train/b.mp4", "c.mp4", "train/d.mp4", f"train/{apart}")
    make(tmp_path, dict.fromkeys(names, b"") | {f"train/{unicodedata.normalize('NFC', 'café')}.txt": "a cup"})
    table = [("café.mp4", "a cat"), ("clips\\a.mp4", "a dog"), (f"{tmp_path}/c.mp4", "an ox"), ("/data/e.mp4", "no")]
    make(tmp_path, {"metadata.jsonl": "\n".join(row(*pair) for pair in table)})
    make(tmp_path, {"train/metadata.jsonl": row("b.mp4", "a bee") + "\n" + row("./d.mp4", "a fly")})
    captions, skipped = list_clips(tmp_path)
    said = {apart: "a cat", "clips/a.mp4": "a dog", "c.mp4": "an ox", "train/b.mp4": "a bee", "train/d.mp4": "a fly"}
    assert captions == said | {f"train/{apart}": "a cup"}
    assert skipped == {"/data/e.mp4": "it is not there, though a table names it"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_of_each_kind_and_the_column_of_the_captions(tmp_path, kind):
    make(tmp_path, {"a.mp4": b"", "b.mp4": b"", "c.mp4": b""})
    long = 'a cat, "old" and\u2028grey,\nwalks'
    rows = [
        {"file_name": "a.mp4", "text": "a cat", "long": long},
        {"file_name": "b.mp4", "text": None, "long": "a dog"},
    ]
    table = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        with open(table, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow", exc_type=ImportError)
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), table)
    none = "it has no caption"
    assert list_clips(tmp_path) == ({"a.mp4": "a cat"}, {"b.mp4": none, "c.mp4": none})
    assert list_clips(tmp_path, "long")[0] == {"a.mp4": 'a cat, "old" and grey, walks', "b.mp4": "a dog"}
    with pytest.raises(UserError, match=f"{kind} has the columns file_name, long, text: wanted file_name and caption"):
        list_clips(tmp_path, "caption")


def test_a_broken_parquet_file(tmp_path):
    pytest.importorskip("pyarrow", exc_type=ImportError)
    make(tmp_path, {"a.mp4": b"", "metadata.parquet": b"PAR1 and no more"})
    with pytest.raises(UserError, match=r"cannot read .*metadata\.parquet"):
        list_clips(tmp_path)


def test_links_to_folders_are_followed_and_loops_are_cut(tmp_path):
    make(tmp_path, {"disk/a.mp4": b"", "disk/a.txt": "a cat", "disk/more/b.mp4": b"", "disk/more/b.txt": "a dog"})
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/videos").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/more/back").symlink_to(tmp_path / "disk")  # a loop
    assert list(list_clips(tmp_path / "clips")[0]) == ["videos/a.mp4", "videos/more/b.mp4"]
    (tmp_path / "disk/out").symlink_to(tmp_path / "clips")  # and one through another link
    (tmp_path / "clips/gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "clips/gone.txt").write_text("a fox")
    captions, skipped = list_clips(tmp_path / "clips")
    assert captions == {"gone.mp4": "a fox", "videos/a.mp4": "a cat", "videos/more/b.mp4": "a dog"} and not skipped


def test_every_file_is_read_or_counted(tmp_path):
    make(tmp_path, {f"a{kind}": b"" for kind in (*IMAGES, *VIDEOS, ".heic", ".MPG", "")} | {"a.txt": "a cat"})
    captions, skipped = list_clips(tmp_path)
    assert set(captions) == {f"a{kind}" for kind in (*IMAGES, *VIDEOS, ".MPG")}
    assert skipped == {"a.heic": ".heic files are not read", "a": "files without a suffix are not read"}
