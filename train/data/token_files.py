"""Files of token ids. Their type is read from their header, or found from their bytes, or must be given.

.npy                        numpy's header: dtype and length
Megatron                    NAME.bin beside NAME.idx: MMIDIDX, version, dtype, lengths and places of the sequences
llm.c, modded-nanogpt       256 int32: magic, version, number of tokens; then uint16 (20240520) or uint32 (20240801)
NeMo Automodel              the same with magic 278895051; the fourth int32 is the number of bytes of a token
nanoGPT                     no header: uint16, or uint32, int32, int64, …; see `evidence.py`
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.config.problems import BadInput, Problem
from train.config.schema import Config, TokenType
from train.data.evidence import dtype_of
from train.data.folder import head_of
from train.data.formats import MEGATRON, NPY, OLD_MEGATRON, foreign, is_text
from train.data.text import Source
from train.data.tokens import InFile, shown

HEADER_BYTES = 1024  # 256 int32
HEADERS = {20240520: "uint16", 20240801: "uint32"}
AUTOMODEL = 278895051
OTHER_LLMC_FILES = {  # files of llm.c that are not token ids
    20240522: "an evaluation file of llm.c (HellaSwag, MMLU)",
    20240326: "a model of llm.c",
    20240803: "a model of llm.c",
    20240328: "a tokenizer of llm.c",
    20240327: "a debugging state of llm.c",
    20240527: "an optimiser state of llm.c",
}
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
MEGATRON_HEAD = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents


@dataclass(frozen=True)
class Layout:
    """Where the ids are in a file, and their type. `known_by`: how the type is known."""

    path: Path
    dtype: np.dtype
    offset: int
    count: int
    known_by: str


def token_file(path: Path, config: Config) -> Source:
    """The ids of a file. Raises BadInput if its format is not supported or cannot be found out."""
    found = layout(path, config.data.dtype)
    if found.dtype.kind not in "ui":
        message = f"data.path={shown(path)} holds {found.dtype} numbers, not token ids"
        raise BadInput(Problem("token_type", message, "save token ids as an integer type, such as uint16"))
    if found.count == 0:
        raise BadInput(Problem("data_path", f"data.path={shown(path)} is empty", "use a file with token ids in it"))
    ids = InFile(found.path, found.dtype, found.offset, 0, found.count)
    return Source(ids, f"{shown(found.path)}: {found.count:,} ids of {found.dtype} ({found.known_by})", is_bytes=False)


def layout(path: Path, asked: TokenType) -> Layout:
    """The layout from the file's header or index; without one, from the type `asked`, or else from the bytes."""
    head = head_of(path)
    for describes in (_megatron, _npy, _header):
        found = describes(path, head)
        if found is None:
            continue
        if asked is not TokenType.auto and np.dtype(asked.value) != found.dtype.newbyteorder("<"):
            message = f"data.dtype={asked.value}, but data.path={shown(path)} holds {found.dtype} ({found.known_by})"
            raise BadInput(Problem("token_type", message, "use data.dtype=auto", ("data.dtype=auto",)))
        return found
    size, told = path.stat().st_size, "no header, as data.dtype says"
    if asked is TokenType.auto:
        _refuse_others(path, head)
        name, told = dtype_of(path)
    else:
        name = asked.value
    dtype = np.dtype(name).newbyteorder("<")
    if size % dtype.itemsize:
        message = f"data.path={shown(path)} has {size:,} bytes, which is not a multiple of a {name} id's "
        message += f"{dtype.itemsize} bytes"
        raise BadInput(Problem("token_type", message, "use the data.dtype that the file was written with"))
    return Layout(path, dtype, 0, size // dtype.itemsize, told)


def _refuse_others(path: Path, head: bytes) -> None:
    if (kind := foreign(head)) is not None:
        fix = f"{kind[1]}; if it does contain ids, use data.dtype=uint16 or another type"
        raise BadInput(Problem("token_file", f"data.path={shown(path)} is {kind[0]}, not a file of token ids", fix))
    if is_text(head):
        fix = "use data=text (or data=jsonl); if it does contain ids, set data.dtype, such as data.dtype=uint16"
        raise BadInput(Problem("token_file", f"data.path={shown(path)} is text, not a file of token ids", fix))


def _npy(path: Path, head: bytes) -> Layout | None:
    if not head.startswith(NPY):
        return None
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            offset = file.tell()
    except ValueError as error:
        raise _damaged(path, f"its .npy header cannot be read: {str(error).splitlines()[0][:100]}") from error
    if len(shape) != 1:
        message = f"data.path={shown(path)} holds an array of shape {shape}, but data=tokens reads one dimension only"
        raise BadInput(Problem("token_file", message, "save array.reshape(-1) if each row continues the one before"))
    if dtype.hasobject or dtype.names:
        message = f"data.path={shown(path)} holds an array of {dtype}, not token ids"
        raise BadInput(Problem("token_type", message, "save token ids as an integer type, such as uint16"))
    if shape[0] < 0 or path.stat().st_size < offset + shape[0] * dtype.itemsize:
        raise _damaged(path, f"its header says {shape[0]:,} ids of {dtype}, but the file ends before the last one")
    return Layout(path, dtype, offset, shape[0], ".npy")


def _header(path: Path, head: bytes) -> Layout | None:
    if len(head) < HEADER_BYTES:
        return None
    numbers = np.frombuffer(head[:HEADER_BYTES], "<i4").tolist()
    magic, version, count, width = numbers[:4]
    size = path.stat().st_size - HEADER_BYTES
    if magic in OTHER_LLMC_FILES and not any(numbers[16:]):
        message = f"data.path={shown(path)} is {OTHER_LLMC_FILES[magic]} (magic {magic}), not a stream of token ids"
        raise BadInput(Problem("token_file", message, "use the .bin file that its tokens were written to"))
    if magic == AUTOMODEL:
        name = {2: "uint16", 4: "uint32"}.get(width, f"ids of {width} bytes")
    elif magic in HEADERS:
        name = HEADERS[magic]
    elif 1 <= version <= 99 and count > 0 and not any(numbers[4:]) and size in (2 * count, 4 * count):
        # a related format: only a real header gives exactly the number of bytes that follow
        name = "uint16" if size == 2 * count else "uint32"
    else:
        return None
    if name not in ("uint16", "uint32") or size != count * np.dtype(name).itemsize:
        raise _damaged(path, f"its header (magic {magic}) says {count:,} {name}, but {size:,} bytes follow it")
    dtype = np.dtype(name).newbyteorder("<")
    return Layout(path, dtype, HEADER_BYTES, count, f"after a header of 1,024 bytes with magic {magic}")


def _megatron(path: Path, head: bytes) -> Layout | None:
    """The layout of NAME, NAME.bin or NAME.idx, if the index is Megatron's. Sequences must be stored in order, without
    gaps."""
    if path.suffix not in ("", ".bin", ".idx") and not head.startswith(MEGATRON):
        return None
    index = path if path.suffix == ".idx" or head.startswith(MEGATRON) else path.with_suffix(".idx")
    if not index.is_file():
        return None
    data, start = index.with_suffix(".bin"), head_of(index)
    if start.startswith(OLD_MEGATRON):
        message = f"{shown(index)} is an index in the old format of Megatron and fairseq (TNTIDX), which is not read"
        raise BadInput(Problem("token_file", message, "write it again with Megatron's preprocess_data.py"))
    if not start.startswith(MEGATRON):
        return None
    if len(start) < MEGATRON_HEAD.size:
        raise _damaged(index, "it ends inside its header")
    _, version, code, sequences, _ = MEGATRON_HEAD.unpack_from(start)
    if version != 1 or code not in MEGATRON_TYPES:
        raise _damaged(index, f"version {version} with dtype code {code} is not a known Megatron index")
    if not data.is_file():
        message = f"{shown(index)} is a Megatron index, but {shown(data)} is missing"
        raise BadInput(Problem("token_file", message, "put the .bin file beside its .idx"))
    dtype = np.dtype(MEGATRON_TYPES[code]).newbyteorder("<")
    if index.stat().st_size < MEGATRON_HEAD.size + 12 * sequences:
        raise _damaged(index, f"it says {sequences:,} sequences, but it ends before the last one")
    size = data.stat().st_size
    if _length(index, sequences, dtype.itemsize) != size:
        message = f"the sequences of {shown(index)} do not fill the {size:,} bytes of {shown(data)} one after another"
        fix = "use a .bin and .idx pair that was written together and not reordered"
        raise BadInput(Problem("token_file", message, fix))
    told = f"Megatron index, {sequences:,} sequences"
    return Layout(data, dtype, 0, size // dtype.itemsize, told)


def _length(index: Path, sequences: int, itemsize: int) -> int:
    """The number of bytes of all sequences; -1 if they are not stored one after another."""
    if sequences == 0:
        return 0
    lengths = np.memmap(index, "<i4", "r", MEGATRON_HEAD.size, (sequences,))
    places = np.memmap(index, "<i8", "r", MEGATRON_HEAD.size + 4 * sequences, (sequences,))
    end, block = 0, 2**20
    for start in range(0, sequences, block):
        ends = end + np.cumsum(lengths[start : start + block], dtype=np.int64) * itemsize
        if int(places[start]) != end or not np.array_equal(places[start + 1 : start + block], ends[:-1]):
            return -1
        end = int(ends[-1])
    return end


def _damaged(path: Path, why: str) -> BadInput:
    fix = "copy or download it again, or write it again"
    return BadInput(Problem("token_file", f"{shown(path)} is damaged: {why}", fix))
