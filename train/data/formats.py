"""File formats that are neither text nor plain token ids. They are recognised by their first bytes."""

from __future__ import annotations

import codecs

import numpy as np

HEAD = 8192  # the number of bytes that are read to recognise a format
NPY, MEGATRON, OLD_MEGATRON = b"\x93NUMPY", b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
FOREIGN = {
    b"\x1f\x8b\x08": ("a gzip file", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard file", "unpack it first"),
    b"\xfd7zXZ\x00": ("an xz file", "unpack it first"),
    b"BZh91AY&SY": ("a bzip2 file", "unpack it first"),
    b"PK\x03\x04": ("a zip archive (such as .npz, .pt or .docx)", "save its token ids with numpy.save"),
    b"PAR1": ("a Parquet file", "write its text column as JSON Lines, for data=jsonl"),
    b"ARROW1": ("an Arrow file", "write its text column as JSON Lines, for data=jsonl"),
    b"\x89HDF\r\n": ("an HDF5 file", "save its token ids with numpy.save"),
    b"%PDF-": ("a PDF", "extract its text first"),
    b"\x80\x02\x8a\x0a": ("a PyTorch file", "save its token ids with numpy.save"),
    b"\x80\x04\x95": ("a Python pickle", "save its token ids with numpy.save"),
    b"\x80\x05\x95": ("a Python pickle", "save its token ids with numpy.save"),
    b"\xff\xfe": ("UTF-16 text", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it to UTF-8"),
    OLD_MEGATRON: ("an index in the old format of Megatron and fairseq", "write it again in Megatron's MMIDIDX format"),
}
CONTROL = np.array([byte < 32 and byte not in b"\t\n\v\f\r\b\x1b" for byte in range(256)])
MOST_CONTROL = 0.05  # the largest share of control characters in a text; it is 0.1 in random bytes


def foreign(head: bytes) -> tuple[str, str] | None:
    """(The format, what to do with such a file), if these first bytes belong to a format in FOREIGN."""
    return next((said for magic, said in FOREIGN.items() if head.startswith(magic)), None)


def is_binary(head: bytes) -> bool:
    """Whether these bytes are not text: one is zero (git's rule), they belong to a format in FOREIGN, or too many are
    control characters."""
    if b"\x00" in head or foreign(head) is not None:
        return True
    return bool(head) and CONTROL[np.frombuffer(head, np.uint8)].mean() > MOST_CONTROL


def is_text(head: bytes) -> bool:
    """Whether this is certainly text: UTF-8 without control characters. The last character may be incomplete."""
    if not head or CONTROL[np.frombuffer(head, np.uint8)].any():
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
