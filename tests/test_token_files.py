"""Token files of other trainers: each is recognised by its bytes and read correctly, or refused in one sentence."""

import struct
from functools import cache

import numpy as np
import pytest

from train.command import cli
from train.config.plan import Plan
from train.config.problems import BadInput
from train.data.corpus import load_corpus
from train.data.token_files import MEGATRON_HEAD

GPT2, LLAMA3 = 50_257, 128_256
COUNT = 6000


@cache
def base():
    words = ["data=tokens", "train.seq_len=32", "train.eval_batches=1"]
    return Plan(cli.parse(cli.parser("test", ""), words)[0], 1)


def load(path, *overrides, vocab=LLAMA3):
    words = (f"data.path={path}", f"model.vocab_size={vocab}", *overrides)
    return load_corpus(base().override(" ".join(words)).config)


def ids_of(corpus):
    parts = (corpus.training, corpus.validation)
    return np.concatenate([part.read(0, len(part)) for part in parts]).astype(np.int64)


def refusal(path, *overrides, **options):
    with pytest.raises(BadInput) as refused:
        load(path, *overrides, **options)
    (problem,) = refused.value.problems
    assert problem.fix and str(problem).count("\n") == 0
    return str(problem)


def text_like(vocab, count=COUNT, seed=0):
    """Ids with frequencies like those of words."""
    ranks = np.random.default_rng(seed).zipf(1.2, 4 * count)
    return (ranks[ranks < vocab] - 1)[:count]


def header(magic, version, count, width=0):
    numbers = np.zeros(256, "<i4")
    numbers[:4] = magic, version, count, width
    return numbers.tobytes()


@pytest.mark.parametrize(
    ("dtype", "vocab"),
    [
        *(("<u2", vocab) for vocab in (5, 65, 1000, GPT2)),
        *((dtype, vocab) for dtype in ("<u4", "<i4", "<i8") for vocab in (5, 65, 1000, GPT2, LLAMA3, 200_000)),
    ],
)
@pytest.mark.parametrize("draw", ["as words", "evenly"])
def test_ids_without_a_header_are_told_by_their_bytes(vocab, dtype, draw, tmp_path):
    """The ids are right, or the file is refused with the key that would help; the ids are never wrong."""
    ids = text_like(vocab) if draw == "as words" else np.random.default_rng(1).integers(0, vocab, COUNT)
    ids.astype(dtype).tofile(tmp_path / "ids.bin")
    corpus = load(tmp_path / "ids.bin", vocab=max(vocab, 256))
    assert np.array_equal(ids_of(corpus), ids)
    assert f"{COUNT:,} ids of" in corpus.says and "no header" in corpus.says
    said = load(tmp_path / "ids.bin", f"data.dtype={np.dtype(dtype).name}", vocab=max(vocab, 256))
    assert np.array_equal(ids_of(said), ids)


def test_large_files_are_told_by_blocks(tmp_path):
    ids = np.tile(text_like(LLAMA3, 100_000), 25)
    ids.astype("<u4").tofile(tmp_path / "ids.bin")
    corpus = load(tmp_path / "ids.bin")
    assert len(corpus.training) + len(corpus.validation) == len(ids)
    assert "uint32" in corpus.says


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda ids: np.zeros(COUNT, "<u2").tobytes(), "only zeros"),
        (lambda ids: ids.astype(">u2").tobytes(), "big-endian"),
        (lambda ids: ids.astype(">u4").tobytes(), "in turn"),
        (lambda ids: ids.astype("<u2")[:100].tobytes(), "too few ids"),
        (lambda ids: ids.astype("<u2").tobytes() + b"x", "odd number of bytes"),
        (lambda ids: (ids % 200).astype("u1").tobytes(), "both bytes of its words are alike"),
        (lambda ids: np.random.default_rng(0).integers(0, 2**16, COUNT).astype("<u2").tobytes(), "are alike"),
        (lambda ids: np.where(ids % 7 == 0, -100, ids).astype("<i4").tobytes(), "in turn"),
    ],
)
def test_what_cannot_be_told_is_refused_with_the_key_that_says_it(made, says, tmp_path):
    (tmp_path / "ids.bin").write_bytes(made(np.random.default_rng(2).integers(0, GPT2, COUNT)))
    refused = refusal(tmp_path / "ids.bin")
    assert says in refused and "data.dtype=uint16" in refused


@pytest.mark.parametrize(
    ("magic", "version", "dtype", "width"),
    [
        (20240520, 1, "<u2", 0),  # llm.c's GPT-2, modded-nanogpt
        (20240801, 7, "<u4", 0),  # llm.c's Llama 3
        (278895051, 1, "<u2", 2),  # NeMo Automodel
        (278895051, 1, "<u4", 4),
        (20250401, 1, "<u2", 0),  # of others, who took the format and another number
    ],
)
def test_headers_are_no_tokens(magic, version, dtype, width, tmp_path):
    ids = text_like(GPT2)
    (tmp_path / "ids.bin").write_bytes(header(magic, version, COUNT, width) + ids.astype(dtype).tobytes())
    corpus = load(tmp_path / "ids.bin")
    assert np.array_equal(ids_of(corpus), ids)
    assert f"magic {magic}" in corpus.says
    wrong = "uint32" if dtype == "<u2" else "uint16"
    assert "use data.dtype=auto" in refusal(tmp_path / "ids.bin", f"data.dtype={wrong}")
    (tmp_path / "cut.bin").write_bytes(header(magic, version, COUNT, width) + ids[:-9].astype(dtype).tobytes())
    if magic != 20250401:  # not known for a header but by its count
        assert f"says {COUNT:,}" in refusal(tmp_path / "cut.bin")


def test_other_files_of_llm_c_are_named(tmp_path):
    for magic, what in [(20240522, "evaluation file"), (20240326, "model"), (20240328, "tokenizer")]:
        (tmp_path / "file.bin").write_bytes(header(magic, 1, 10) + bytes(5000))
        assert what in refusal(tmp_path / "file.bin")


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", "<i8", "u1"])
def test_npy(dtype, tmp_path):
    ids = text_like(250)
    np.save(tmp_path / "ids.npy", ids.astype(dtype))
    assert np.array_equal(ids_of(load(tmp_path / "ids.npy")), ids)


def test_npy_that_is_no_list_of_ids(tmp_path):
    path = tmp_path / "ids.npy"
    np.save(path, np.zeros((60, 100), np.int64))
    assert "shape (60, 100)" in refusal(path)
    np.save(path, np.zeros(COUNT))
    assert "float64 numbers, not token ids" in refusal(path)
    np.save(path, np.array([{"a": 1}] * COUNT, dtype=object), allow_pickle=True)
    assert "array of object" in refusal(path)
    np.save(path, np.zeros(COUNT, np.int64) - 100)
    assert "token id -100" in refusal(path)
    np.save(path, text_like(GPT2))
    path.write_bytes(path.read_bytes()[:-100])
    assert "ends before the last" in refusal(path)
    path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00nothing to read!")
    assert "header cannot be read" in refusal(path)


def write_megatron(prefix, ids, code, dtype, sequences=6, order=1):
    parts = np.array_split(ids.astype(dtype), sequences)
    lengths = [len(part) for part in parts]
    places = np.cumsum([0, *lengths[:-1]]) * np.dtype(dtype).itemsize
    prefix.with_suffix(".bin").write_bytes(b"".join(part.tobytes() for part in parts))
    index = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, sequences, sequences + 1)
    index += np.array(lengths, "<i4").tobytes() + places[::order].astype("<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(index + np.arange(sequences + 1, dtype="<i8").tobytes())


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
@pytest.mark.parametrize("ending", [".bin", ".idx", ""])
def test_megatron(code, dtype, ending, tmp_path):
    assert MEGATRON_HEAD.size == 34
    ids = text_like(GPT2)
    write_megatron(tmp_path / "my_text", ids, code, dtype)
    corpus = load(tmp_path / f"my_text{ending}")
    assert np.array_equal(ids_of(corpus), ids)
    assert "Megatron index, 6 sequences" in corpus.says


def test_an_index_is_of_its_own_file_alone(tmp_path):
    """If a .npy and a Megatron pair have the same name, the .npy is read and named."""
    mine, theirs = text_like(GPT2, seed=1), text_like(GPT2, seed=2)
    write_megatron(tmp_path / "corpus", theirs, 8, "<u2")
    np.save(tmp_path / "corpus.npy", mine.astype("<u2"))
    found = load(tmp_path / "corpus.npy")
    assert np.array_equal(ids_of(found), mine) and "corpus.npy" in found.says


def test_megatron_that_does_not_fit(tmp_path):
    prefix = tmp_path / "my_text"
    write_megatron(prefix, text_like(GPT2), 8, "<u2", order=-1)
    assert "one after another" in refusal(prefix.with_suffix(".bin"))
    write_megatron(prefix, text_like(GPT2), 7, "<f4")
    assert "float32 numbers" in refusal(prefix.with_suffix(".bin"))
    write_megatron(prefix, text_like(GPT2), 8, "<u2")
    prefix.with_suffix(".idx").write_bytes(prefix.with_suffix(".idx").read_bytes()[:50])
    assert "ends before the last" in refusal(prefix.with_suffix(".bin"))
    prefix.with_suffix(".idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
    assert "TNTIDX" in refusal(prefix.with_suffix(".bin"))
    write_megatron(prefix, text_like(GPT2), 8, "<u2")
    prefix.with_suffix(".bin").unlink()
    assert "is missing" in refusal(prefix.with_suffix(".idx"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x1f\x8b\x08" + bytes(range(256)) * 40, "a gzip file"),
        (b"PK\x03\x04" + bytes(range(256)) * 40, "a zip archive"),
        (b"PAR1" + bytes(range(256)) * 40, "a Parquet file"),
        (b"\x80\x04\x95" + bytes(range(256)) * 40, "a Python pickle"),
        (b"plain words and more of them " * 300, "is text"),
        (b'{"text": "h\xc3\xa9llo"}\n' * 300, "is text"),
    ],
)
def test_other_formats_are_named(content, says, tmp_path):
    (tmp_path / "ids.bin").write_bytes(content)
    assert says in refusal(tmp_path / "ids.bin")


def test_ids_beyond_the_vocabulary_are_named(tmp_path):
    ids = text_like(LLAMA3)
    ids[77] = LLAMA3 - 1
    ids.astype("<u4").tofile(tmp_path / "ids.bin")
    refused = refusal(tmp_path / "ids.bin", vocab=GPT2)
    assert f"contains token id {LLAMA3 - 1}, but model.vocab_size={GPT2}" in refused
    assert f"use model.vocab_size={LLAMA3} or more" in refused
    assert len(load(tmp_path / "ids.bin", vocab=LLAMA3).training) > 0
    said = refusal(tmp_path / "ids.bin", "data.dtype=int64", vocab=GPT2)
    assert "contains token id" in said, "wrong types are taken at their word, and their ids refused"


@pytest.mark.parametrize("scanned", [0, 2 * 2**22 - 4])  # one block of four; three of four
def test_ids_of_a_large_file_are_checked_as_they_are_read(scanned, tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.corpus.SCANNED", scanned)
    ids = np.tile(text_like(200, 2**17), 32)
    ids[2 * 2**20 : 3 * 2**20] = 300
    ids.astype("<u2").tofile(tmp_path / "ids.bin")
    corpus = load(tmp_path / "ids.bin", vocab=256)
    with pytest.raises(BadInput, match=r"contains token id 300, but model.vocab_size=256"):
        for step in range(20):
            corpus.batch(step, 8, slice(0, 8))
