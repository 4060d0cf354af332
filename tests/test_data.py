"""Batches are pure functions of (seed, step), the rows of the ranks partition them, and files are read unchanged."""

import errno
import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from train.command import cli
from train.config.fields import IGNORE_INDEX
from train.config.problems import BadInput
from train.data.corpus import load_corpus
from train.data.tokens import InFile, InMemory


def corpus(*overrides):
    return load_corpus(cli.parse(cli.parser("test", ""), list(overrides))[0])


def whole(tokens):
    return tokens.read(0, len(tokens))


def test_python_docs_is_english_text():
    docs = corpus()
    text = whole(docs.training).tobytes().decode()
    assert 400_000 < len(docs.training) + len(docs.validation) < 700_000
    assert "The following" in text


def test_bigram_is_judged_on_the_tokens_that_the_loss_is(tmp_path):
    (tmp_path / "text").write_text("aaab" * 40_000)  # after an a: another one, two times in three
    path = ("data=text", f"data.path={tmp_path / 'text'}")
    assert corpus(*path, "data.ignore_token=97").bigram_loss(8) == pytest.approx(math.log(3), abs=0.01)
    mean = (math.log(3) + 2 * math.log(3 / 2)) / 4  # and after a b always an a
    assert corpus(*path).bigram_loss(8) == pytest.approx(mean, abs=0.01)


def test_every_file_of_a_folder_must_be_readable(tmp_path, monkeypatch):
    (tmp_path / "1.txt").write_text("text " * 1000)
    (tmp_path / "2.txt").write_text("more " * 1000)
    opened = Path.open

    def refused(path, *arguments, **options):
        if path.name == "2.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)  # root may read everything
    with pytest.raises(BadInput, match=r"\(\S+2.txt in it\) cannot be read \(Permission denied\): use readable files"):
        corpus("data=text", f"data.path={tmp_path}")


def test_python_source_is_large():
    assert 8e6 < len(corpus("data=python_source").training) < 20e6


def test_batch_depends_on_seed_and_step_only():
    first, again, other_seed = corpus(), corpus(), corpus("train.seed=7")
    rows = slice(0, 8)
    assert torch.equal(first.batch(3, 8, rows)[0], again.batch(3, 8, rows)[0])
    assert not torch.equal(first.batch(3, 8, rows)[0], first.batch(4, 8, rows)[0])
    assert not torch.equal(first.batch(3, 8, rows)[0], other_seed.batch(3, 8, rows)[0])


def test_rows_tile_the_global_batch():
    docs = corpus()
    whole = docs.batch(5, 8, slice(0, 8))
    for part in range(2):
        parts = [docs.batch(5, 8, slice(i, i + 2))[part] for i in range(0, 8, 2)]
        assert torch.equal(torch.cat(parts), whole[part])


def test_targets_are_the_next_tokens():
    tokens, targets = corpus().batch(1, 4, slice(0, 4))
    assert tokens.shape == targets.shape == (4, 128)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_validation_is_held_out_and_fixed():
    docs = corpus()
    batches = [docs.validation_batch(i, 4, 8, slice(0, 8))[0] for i in range(4)]
    assert torch.equal(batches[2], docs.validation_batch(2, 4, 8, slice(0, 8))[0])
    assert torch.equal(batches[-1][-1], torch.from_numpy(whole(docs.validation)[-129:-1].astype(np.int64)))
    assert torch.equal(batches[0][0], torch.from_numpy(whole(docs.validation)[:128].astype(np.int64)))


def test_ignored_token_carries_no_loss():
    docs = corpus("data.ignore_token=32")
    tokens, targets = docs.batch(1, 8, slice(0, 8))
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX
    assert torch.equal(targets[:, :-1] == IGNORE_INDEX, tokens[:, 1:] == 32)
    assert 0 < (targets == IGNORE_INDEX).sum() < targets.numel()


def test_text_folder_and_tokens_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 900)
    (tmp_path / "b.txt").write_bytes(b"b" * 900)
    folder = corpus("data=text", f"data.path={tmp_path}", "train.seq_len=32")
    joined = b"a" * 900 + b"\n" + b"b" * 900
    assert whole(folder.training).tobytes() + whole(folder.validation).tobytes() == joined
    assert folder.sha256 == hashlib.sha256(joined).hexdigest()
    ids = np.arange(3000) % 50000
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    tokens = corpus("data=tokens", f"data.path={tmp_path}/ids.bin", "model=small", "train.seq_len=32")
    assert isinstance(tokens.training, InFile)
    assert tokens.batch(1, 1, slice(0, 1))[0][0, 0] in ids


def test_bigram_model_is_a_real_baseline():
    """The bigram loss is 0 if each byte determines the next one, and log 256 for random bytes."""
    docs = corpus()
    assert 2.0 < docs.bigram_loss(64) < 2.6
    docs.training = docs.validation = InMemory(np.tile(np.frombuffer(b"abcd", np.uint8), 50_000))
    assert docs.bigram_loss(8) < 0.02
    docs.training = docs.validation = InMemory(np.random.default_rng(0).integers(0, 256, 2**22).astype(np.uint8))
    assert docs.bigram_loss(8) == pytest.approx(np.log(256), abs=0.02)


def test_one_row_keeps_its_ignored_tokens_as_inputs():
    tokens, targets = corpus("data.ignore_token=32").batch(1, 8, slice(0, 1))
    assert (tokens >= 0).all() and (targets == IGNORE_INDEX).any()
    assert tokens.stride() == targets.stride() == (128, 1), "pipelines of torch 2.11 compare the strides"
