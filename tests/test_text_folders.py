"""Folders of text: what is read, what is left out, and that links and size cannot cause a hang or much memory."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.texts import LINES, bytes_of, config, load, refusal
from train.data import folder
from train.data.tokens import LostData
from train.record.run_dir import work_hash

REPO = Path(__file__).resolve().parent.parent


def test_a_folder_is_read_with_its_links_and_without_what_is_no_text(tmp_path):
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for place in (texts / "b", texts / ".git", texts / "z", elsewhere):
        place.mkdir(parents=True)
    (texts / "a.txt").write_text("a" + LINES)
    (texts / "b" / "c.md").write_text("c" + LINES)
    (elsewhere / "linked.txt").write_text("l" + LINES)
    (texts / "b.txt").symlink_to(elsewhere / "linked.txt")
    (texts / "e").symlink_to(elsewhere)
    (texts / "z" / "loop").symlink_to(texts)
    (texts / "z" / "again").symlink_to(elsewhere)
    (texts / "z" / "nowhere").symlink_to(tmp_path / "nowhere")
    (texts / ".git" / "config").write_text(LINES)
    (texts / ".hidden.txt").write_text(LINES)
    (texts / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00" + bytes(range(256)))
    (texts / "noise").write_bytes(bytes(range(1, 256)) * 4)
    (texts / "some.jsonl").write_text('{"text": "x"}\n')
    os.mkfifo(texts / "pipe")
    corpus = load(texts)
    expected = "\n".join(letter + LINES for letter in "acll")  # a.txt, b/c.md, b.txt, e/linked.txt
    assert bytes_of(corpus) == expected.encode()
    assert f"4 files, {4 * (1 + len(LINES)):,} bytes; skipped: " in corpus.says
    left_out = {
        *("hidden 2", "binary 2", "broken links 1", "special files 1", "folders linked again 2"),
        "JSON Lines (data=jsonl reads them) 1",
    }
    assert set(corpus.says.partition("skipped: ")[2].split(", ")) == left_out


def test_the_folder_of_runs_is_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "metrics.jsonl").write_text("{}")
    (tmp_path / "runs" / "log.txt").write_text(LINES)
    (tmp_path / "text.txt").write_text(LINES)
    assert bytes_of(load(".")) == LINES.encode()
    assert "folders of runs 1" in load(".").says


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        ("*.md", ["a.md", "docs/b.md", "docs/deep/c.md"]),
        ("docs/*.md", ["docs/b.md"]),
        ("docs/**/*.md", ["docs/b.md", "docs/deep/c.md"]),
        ("**/deep/*", ["docs/deep/c.md", "docs/deep/d.txt"]),
        ("[ad].*", ["a.md", "docs/deep/d.txt"]),
        ("**/**/**/**/**/**/x*", []),
    ],
)
def test_glob(pattern, read, tmp_path):
    names = ["a.md", "docs/b.md", "docs/deep/c.md", "docs/deep/d.txt", "docs/e.jsonl"]
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_text(name + LINES)
    if not read:
        assert f"another data.glob than {pattern}" in refusal(tmp_path, glob=pattern)
        return
    assert bytes_of(load(tmp_path, glob=pattern)) == "\n".join(name + LINES for name in read).encode()
    assert f"left out by data.glob {len(names) - len(read)}" in load(tmp_path, glob=pattern).says


def test_windows_of_a_folder_are_those_of_its_joined_text(tmp_path):
    draw = np.random.default_rng(0)
    sizes = [0, 700, 1, 0, 3, 40, 0, 900, 200, 0]
    for index, size in enumerate(sizes):
        (tmp_path / f"{index}.txt").write_bytes(draw.integers(97, 123, size).astype(np.uint8).tobytes())
    joined = b"\n".join((tmp_path / f"{index}.txt").read_bytes() for index in range(len(sizes)))
    corpus = load(tmp_path)
    assert bytes_of(corpus) == joined
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "all.txt").write_bytes(joined)
    whole = load(tmp_path / "whole" / "all.txt")
    assert whole.sha256 == corpus.sha256
    for step in range(50):
        for one, other in zip(corpus.batch(step, 8, slice(2, 8)), whole.batch(step, 8, slice(2, 8)), strict=True):
            assert one.equal(other)
    assert corpus.bigram_loss(8) == whole.bigram_loss(8)
    same = work_hash(config(tmp_path, glob="*.txt"), corpus.sha256)
    assert work_hash(config(tmp_path / "whole" / "all.txt"), whole.sha256) == same, "the text is known by its hash"


def test_a_file_that_shrinks_is_named(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(LINES)
    corpus = load(tmp_path)
    (tmp_path / "a").write_text("short")
    with pytest.raises(LostData) as lost:
        bytes_of(corpus)
    assert "/a cannot be read any more (it became shorter): put it back as it was" in lost.value.report()
    (tmp_path / "a").unlink()
    with pytest.raises(LostData) as lost:
        bytes_of(corpus)
    assert "/a cannot be read any more (No such file or directory)" in lost.value.report()
    assert isinstance(lost.value, OSError), "so that it is BadInput while the corpus is checked"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n' * 50, "use data=jsonl"),
        ("a.npy", b"\x93NUMPY\x01\x00" + bytes(500), "use data=tokens"),
        ("a.gz", b"\x1f\x8b\x08" + bytes(500), "a gzip file"),
        ("a.txt", "\ufeffwords".encode("utf-16") * 50, "UTF-16"),
        ("a\nb.pdf", b"%PDF-1.7 " + bytes(500), r"a\nb.pdf"),
    ],
)
def test_a_file_that_is_no_text(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


def test_a_folder_without_text(tmp_path):
    assert "is empty" in refusal(tmp_path)
    (tmp_path / ".a").touch()
    assert "holds nothing to read (skipped: hidden 1)" in refusal(tmp_path)
    (tmp_path / "b").touch()
    assert "holds nothing to read" in refusal(tmp_path)
    assert "is not a regular file" in refusal("/dev/zero")
    assert "needs a path" in refusal("")
    assert "cannot be read (File name too long)" in refusal("x" * 5000)
    (tmp_path / "elf").write_bytes(b"\x7fELF" + bytes(4000))
    assert load(tmp_path / "elf").says.endswith("4,004 bytes, which look binary")
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b\x08" + bytes(500))
    assert "a gzip file, not text: unpack it first" in refusal(tmp_path / "a.jsonl.gz", "jsonl")
    (tmp_path / "one.txt").write_text(LINES)
    assert "data.glob=*.txt chooses files of a folder" in refusal(tmp_path / "one.txt", glob="*.txt")


def test_too_many_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MOST_ENTRIES", 20)
    for index in range(21):
        (tmp_path / f"{index}.txt").write_text(LINES)
    monkeypatch.setattr(folder, "head_of", lambda path: pytest.fail(f"{path} was read"))
    assert "holds more than 20 files and folders" in refusal(tmp_path)
