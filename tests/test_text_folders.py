"""Folders of text: what is read, what is left out, and that neither links nor size can make it hang or grow."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from launch.sweeping.grid import check_all, expand
from train.command import cli
from train.command.validate import validate
from train.config.problems import BadInput
from train.config.schema import DataSource
from train.data import folder
from train.data.corpus import MOST_WINDOWS, load_corpus
from train.record.run_dir import work_hash

REPO = Path(__file__).resolve().parent.parent
LINES = "all work and no play\n" * 60


@cache
def base():
    words = ["train.seq_len=32", "train.eval_batches=1", "data=text"]
    return cli.parse(cli.parser("test", ""), words)[0]


def config(path, source="text", **keys):
    keys = {"path": str(path), "source": DataSource(source), "field": "text" if source == "jsonl" else None} | keys
    return dataclasses.replace(base(), data=dataclasses.replace(base().data, **keys))


def load(path, source="text", **keys):
    return load_corpus(config(path, source, **keys))


def bytes_of(corpus):
    return b"".join(part.read(0, len(part)).tobytes() for part in (corpus.training, corpus.validation))


def refusal(path, source="text", **keys):
    with pytest.raises(BadInput) as refused:
        load(path, source, **keys)
    (problem,) = refused.value.problems
    assert problem.fix and "\n" not in str(problem)
    return str(problem)


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
        *("hidden 2", "binary 2", "broken links 1", "no regular files 1", "folders linked again 2"),
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
    with pytest.raises(BadInput, match="/a became shorter while it was being read"):
        bytes_of(corpus)


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
    assert "is no regular file" in refusal("/dev/zero")
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


def lines_of(*values):
    return "".join(json.dumps(value) + "\n" for value in values)


def test_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines_of({"text": LINES, "id": 1}, {"text": "ünï"}) + "\n\n")
    (tmp_path / "b.ndjson").write_text(lines_of({"text": "last", "meta": {"text": "no"}}))
    (tmp_path / "c.txt").write_text("no json")
    corpus = load(tmp_path, "jsonl")
    assert bytes_of(corpus) == f"{LINES}\nünï\nlast".encode()
    assert "3 documents" in corpus.says and "without the ending .jsonl or .ndjson 1" in corpus.says
    assert bytes_of(load(tmp_path, "jsonl", glob="a.*")) == f"{LINES}\nünï".encode()
    assert bytes_of(load(tmp_path / "a.jsonl", "jsonl")) == f"{LINES}\nünï".encode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (lines_of({"content": LINES, "n": 1}), "data.field=text is not there in line 1 of"),
        (lines_of({"text": LINES}, {"text": 5, "body": "x"}), "data.field=text is no text in line 2 of"),
        (lines_of({"text": LINES}) + "{'text': 1}", "line 2 of"),
        (lines_of(["text"]), "is no JSON object"),
        (lines_of({"text": 1, "\ud800\n" + "k" * 999: "x"}), "use lines that have a field with text"),
        ("[" * 100_000, "is not JSON"),
        ('{"text": "' + "x" * 90 + "\\ud8\n", "is not JSON"),
    ],
)
def test_lines_that_are_not_read_are_named(text, says, tmp_path):
    (tmp_path / "a.jsonl").write_text(text)
    refused = refusal(tmp_path / "a.jsonl", "jsonl")
    assert says in refused
    if "content" in text:
        assert "whose fields are: content, n: use data.field=content" in refused


def test_json_lines_are_held_in_memory_and_so_bounded(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as file:
        file.truncate(2**28 + 1)
    assert "at most 268,435,456 are read" in refusal(tmp_path / "a.jsonl", "jsonl")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.path=/some/text.txt"], "data.path=/some/text.txt is not read by data=python_docs"),
        (["data=synthetic", "data.path=x.bin"], "use data.source=tokens, data.source=text or data.path=null"),
        (["data.path=a.jsonl"], "use data.source=jsonl data.field=text, data.source=text or data.path=null"),
        (["data.dtype=uint32"], "use data.source=tokens or data.dtype=auto"),
        (["data=text", "data.path=x", "data.field=body"], "data.field=body is not read by data=text"),
        (["data=tokens", "data.path=x", "data.glob='*'"], "data.glob=* is not read by data=tokens"),
        (["data=text", "data.path=x", "data.source=jsonl"], "use data.field=text"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(words, says):
    (problem,) = validate(cli.parse(cli.parser("test", ""), words)[0], 4)
    assert says in str(problem)


def test_a_sweep_refuses_a_key_that_nothing_reads(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(LINES)
    words = ["strategy=dp", f"data.path={tmp_path}/a,{tmp_path}/b", "nproc=2"]
    checked = check_all(cli.parser("test", ""), expand(words), "global")
    assert [[problem.rule for problem in one.problems] for one in checked] == [["unread_data_path"]] * 2


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 12_345])
def test_windows_of_an_evaluation_are_evenly_spread(count, tmp_path):
    (tmp_path / "a.txt").write_text(LINES * 20)
    corpus = load(tmp_path / "a.txt")
    last = len(corpus.validation) - corpus.seq_len - 1
    assert np.array_equal(
        corpus._validation_starts(np.arange(count), count), np.linspace(0, last, count).astype(np.int64)
    )


def test_more_evaluation_than_there_is_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(LINES * 20)
    many = dataclasses.replace(base().train, eval_batches=10**9)
    with pytest.raises(BadInput, match=r"more than the 2,488 places .* use train.eval_batches=311 or less"):
        load_corpus(dataclasses.replace(config(tmp_path / "a.txt"), train=many))


PEAK = """
import re, sys
from pathlib import Path
sys.argv[0] = "launch.explain"
from launch import explain
code = 0
try:
    explain.main()
except SystemExit as end:
    code = end.code
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]  # getrusage's is the parent's too
print("peak MiB", int(peak) / 1024, "code", code, file=sys.stderr)
"""


def explained(*words):
    """(What it printed, its peak of memory in MiB, its exit code)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *words], env=environment, capture_output=True, text=True, timeout=60
    )
    *_, last = run.stderr.strip().splitlines()
    _, _, peak, _, code = last.split()
    assert "Traceback" not in run.stderr
    return run.stdout + run.stderr, float(peak), code


@pytest.mark.timeout(70)
def test_a_text_of_20_gb_is_valid_and_not_read(tmp_path):
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(20 * 10**9)
    said, peak, code = explained("strategy=dp", "data=text", f"data.path={tmp_path}/sparse.txt")
    assert code == "0" and "problems" not in said
    assert peak < 500
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = load(tmp_path / "sparse.txt")
    assert len(corpus.training) + len(corpus.validation) == 20 * 10**9
    assert corpus.batch(1, 8, slice(0, 8))[0].shape == (8, 32)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) / 1024 < 100


@pytest.mark.timeout(70)
def test_the_root_of_the_machine_is_answered():
    said, peak, code = explained("strategy=dp", "data=text", "data.path=/")
    assert code in ("0", "2") and peak < 500, said


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_the_baseline_of_100_mb_is_bounded(tmp_path):
    """Reading, hashing and fitting the bigram model: 14 bytes a character were 1.4 GB."""
    (tmp_path / "text.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 10**8, dtype=np.uint8).tobytes())
    (tmp_path / "other.txt").write_text(LINES)
    program = f"""
import resource, sys
from train.command import cli
from train.data.corpus import load_corpus
config = cli.parse(cli.parser("test", ""), ["data=text", "data.path={tmp_path}"])[0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = load_corpus(config)
corpus.sha256, corpus.bigram_loss({MOST_WINDOWS})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=90
    )
    assert float(run.stdout) < 150
