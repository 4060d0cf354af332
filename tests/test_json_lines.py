"""Texts in JSON Lines, and keys of `data` that the chosen source does not read."""

import json

import pytest

from launch.sweeping.grid import check_all, expand
from tests.texts import LINES, bytes_of, load, refusal
from train.command import cli
from train.command.validate import validate


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
        (lines_of({"content": LINES, "n": 1}), "data.field=text is missing in line 1 of"),
        (lines_of({"text": LINES}, {"text": 5, "body": "x"}), "data.field=text is not a string in line 2 of"),
        (lines_of({"text": LINES}) + "{'text': 1}", "line 2 of"),
        (lines_of(["text"]), "is not a JSON object"),
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
