"""Loads texts as a run would, for tests: the content of a folder or a file, and the refusal of a bad one."""

import dataclasses
from functools import cache

import pytest

from train.command import cli
from train.config.problems import BadInput
from train.config.schema import DataSource
from train.data.corpus import load_corpus

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
