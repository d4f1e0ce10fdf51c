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


def row(name, text):
    return json.dumps({"file_name": name, "text": text}, ensure_ascii=False)


@pytest.fixture
def clips(tmp_path):
    """Five clips, four of them with captions, and what else lies in such folders."""
    rows = [("a.mp4", "A red ball"), ("sub/b.webm.mp4", "a blue ball"), ("d.png", "picture of\u2028a ball")]
    table = "\n".join([*(row(*pair) for pair in rows), row("gone.mp4", "a ball"), ""])
    files = {"metadata.jsonl": table, "c.txt": "A ball\n rolls\n", "E.txt": "picture of a red ball", "notes.pdf": ""}
    files |= {"of.v1/README": ""}  # a folder with a dot in its name is none of the files
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
        "notes.pdf": ".pdf files are not read", "of.v1/README": "such files are not read",
    }  # fmt: skip


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', "[1]", '{"file_name": 3, "text": "a"}'])
def test_a_broken_table_is_named(clips, line):
    with open(clips / "metadata.jsonl", "a") as f:
        f.write(line)
    with pytest.raises(UserError, match=r"metadata\.jsonl, a row a file with its file_name and text"):
        list_clips(clips)


def test_texts_in_other_encodings_are_refused_by_name(tmp_path):
    make(tmp_path, {"a.mp4": b"", "a.txt": "a café".encode("latin-1")})
    with pytest.raises(UserError, match=r"a\.txt: it is no text in UTF-8"):
        list_clips(tmp_path)


@pytest.mark.parametrize("value", [["a cat"], 3, {"a": "cat"}, True])
def test_only_text_is_a_caption(tmp_path, value):
    make(tmp_path, {"a.mp4": b"", "b.mp4": b"", "c.mp4": b"", "b.txt": "a dog"})
    (tmp_path / "metadata.jsonl").write_text("\n".join([row("a.mp4", value), row("b.mp4", ""), row("c.mp4", None)]))
    want = {"a.mp4": "it has no caption", "c.mp4": "it has no caption"}
    assert list_clips(tmp_path) == ({"b.mp4": "a dog"}, want)


def test_an_accent_may_be_written_in_two_ways(tmp_path):
    apart, one = (unicodedata.normalize(form, "café.mp4") for form in ("NFD", "NFC"))
    make(tmp_path, {apart: b"", "metadata.jsonl": row(one, "a cup")})
    assert list_clips(tmp_path) == ({apart: "a cup"}, {})


def test_names_are_relative_to_their_table(tmp_path):
    make(tmp_path, dict.fromkeys(("c.mp4", "train/b.mp4", "train/d.mp4"), b""))
    make(tmp_path, {"metadata.jsonl": row("./c.mp4", "an ox")})
    make(tmp_path, {"train/metadata.jsonl": row("b.mp4", "a bee") + "\n" + row("./d.mp4", "a fly")})
    assert list_clips(tmp_path) == ({"c.mp4": "an ox", "train/b.mp4": "a bee", "train/d.mp4": "a fly"}, {})


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_tables_of_each_kind(tmp_path, kind):
    make(tmp_path, {"a.mp4": b"", "b.mp4": b"", "c.mp4": b""})
    rows = [
        {"file_name": "a.mp4", "text": 'a cat, "old" and\u2028grey,\nwalks', "more": 1},
        {"file_name": "b.mp4", "text": None, "more": 2},
    ]
    table = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        with open(table, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    none = "it has no caption"
    assert list_clips(tmp_path) == ({"a.mp4": 'a cat, "old" and grey, walks'}, {"b.mp4": none, "c.mp4": none})
    table.write_text(table.read_text().replace("text", "caption"))
    with pytest.raises(
        UserError, match=rf"metadata\.{kind}, a row a file with its file_name and text: KeyError\('text'"
    ):
        list_clips(tmp_path)


@pytest.mark.parametrize("empty", ["", "  ", None, 3])
def test_a_row_without_a_caption_leaves_it_to_the_text_beside(tmp_path, empty):
    make(tmp_path, {"metadata.jsonl": row("a.mp4", empty), "a.mp4": b"", "a.txt": "a cat"})
    assert list_clips(tmp_path) == ({"a.mp4": "a cat"}, {})


def test_links_to_folders_are_followed(tmp_path):
    make(tmp_path, {"disk/a.mp4": b"", "disk/a.txt": "a cat", "disk/more/b.mp4": b"", "disk/more/b.txt": "a dog"})
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/videos").symlink_to(tmp_path / "disk")
    assert list(list_clips(tmp_path / "clips")[0]) == ["videos/a.mp4", "videos/more/b.mp4"]
    assert len(list_clips(tmp_path)[0]) == 4  # a folder has two names: which one a table uses is not known


def test_a_link_into_itself_is_not_followed(tmp_path):
    make(tmp_path, {"sub/a.mp4": b"", "sub/a.txt": "a cat"})
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    (tmp_path / "sub/gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    captions, skipped = list_clips(tmp_path)
    assert list(captions) == ["sub/a.mp4"] and skipped == {"sub/gone.mp4": "it has no caption"}


def test_every_file_is_read_or_counted(tmp_path):
    make(tmp_path, {f"a{kind}": b"" for kind in (*IMAGES, *VIDEOS, ".heic", ".MOV")} | {"a.txt": "a cat"})
    captions, skipped = list_clips(tmp_path)
    assert set(captions) == {f"a{kind}" for kind in (*IMAGES, *VIDEOS, ".MOV")}
    assert skipped == {"a.heic": ".heic files are not read"}
