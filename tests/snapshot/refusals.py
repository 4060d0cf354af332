"""The answers of the commands to the lines of lines.py, and whether the overrides that they propose work.

One process imports the commands and torch once, and answers each line in a forked child, in a folder of its own, with
the command's module run as `python -m` runs it. Nothing is trained: a child ends with code 0 where a run would start.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tests.snapshot.lines import bad_lines, valid_lines
from tests.snapshot.messages import mended, offers

REPO = Path(__file__).resolve().parents[2]
TOOLS = {"local": "launch.local", "explain": "launch.explain", "sweep": "launch.sweep"}
PATIENCE_S = 120  # for one line, however busy the machine is
CRASHED = 99


class Answer(NamedTuple):
    code: int
    text: str


class Answers:
    """Runs the lines in a folder with the files that they name, while a port is in use. A context manager."""

    def __enter__(self) -> Answers:
        self.folder = Path(tempfile.mkdtemp()).resolve()
        self.files, self.said = self.folder / "files", self.folder / "said"
        self.files.mkdir()
        make_files(self.files)
        self.kept = {path.name for path in self.files.iterdir()}
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = str(self.socket.getsockname()[1])
        warm()
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        shutil.rmtree(self.folder)

    def __call__(self, line: str) -> Answer:
        tool, *words = line.replace("{port}", self.port).split(" ")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._child(tool, words)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        text = self.said.read_text(errors="replace")
        for path in self.files.iterdir():
            if path.name not in self.kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Answer(code, text.replace(str(self.files), "FILES").replace(self.port, "{port}"))

    def _child(self, tool: str, words: list[str]) -> NoReturn:
        code = CRASHED
        try:
            signal.alarm(PATIENCE_S)
            os.chdir(self.files)
            descriptor = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = run(tool, words)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


class Started(BaseException):
    """Raised when the command would start a run."""


def run(tool: str, words: list[str]) -> int:
    """The exit code of a command, in this process."""
    for name in ("execv", "execve", "execvp", "execvpe"):
        setattr(os, name, started)
    subprocess.Popen.__init__ = not_python(subprocess.Popen.__init__)  # type: ignore[method-assign]
    sys.argv[1:] = words
    try:
        if tool == "main":
            sys.argv[0] = str(REPO / "train" / "main.py")
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(TOOLS[tool], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Started:
        return 0
    except BaseException:
        traceback.print_exc()
        return CRASHED
    return 0


def started(*_: object) -> NoReturn:
    raise Started


def not_python(start: Callable[..., None]) -> Callable[..., None]:
    """Popen's start for all programs except Python, with which a sweep starts its runs."""

    def checked(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        if sys.executable in args:
            raise Started
        start(self, args, *rest, **options)

    return checked


def warm() -> None:
    """Import what every line needs, and let the commands fill their caches, so that no child spends time on it."""
    warnings.simplefilter("ignore")  # runpy finds the commands imported
    importlib.import_module("torch.distributed.pipelining.schedules")
    for name in TOOLS.values():
        importlib.import_module(name)
    before, sys.argv = sys.argv, [sys.argv[0], "strategy=pp", "nproc=2"]
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(TOOLS["explain"]).main()
    sys.argv = before
    gc.collect()
    gc.freeze()


def make_files(folder: Path) -> None:
    """The files that the lines name."""
    text = b"The quick brown fox jumps over the lazy dog, once more.\n"
    (folder / "folder" / "inner").mkdir(parents=True)
    for name, content in {
        "empty.txt": b"",
        "short.txt": b"too short",
        "middle.txt": text * 400,
        "long.txt": text * 4000,
        "same.txt": b"a" * 5000,
        "folder/one.txt": text * 4000,
        "folder/inner/two.txt": text * 10,
        "short.jsonl": b'{"text": "too short"}\n',
        "lines.jsonl": b'{"text": "The quick brown fox jumps.", "number": 3}\n' * 400,
        "broken.jsonl": b'{"text": "whole"}\n{"text": \n',
        "list.jsonl": b'["no", "object"]\n',
        "packed.gz": b"\x1f\x8b\x08" + bytes(5000),
        "page.pdf": b"%PDF-1.7\n" + bytes(5000),
    }.items():
        (folder / name).write_bytes(content)
    ids = (np.arange(5000) % 250).astype("<u2")
    (ids + 900).tofile(folder / "foreign.bin")
    arrays = {"array": ids, "foreign": ids + 900, "matrix": ids.reshape(-1, 50), "floats": ids.astype("<f4")}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def record(file: Path) -> dict[str, Any]:
    """{line: {"code", "text", "offers": {overrides: the code of the line with them}}}, a line of the file for each;
    those that the file has already are not answered again."""
    found = read(file)
    todo = [line for line in [*bad_lines(), *valid_lines()] if line not in found]
    if not todo:
        return found
    with Answers() as answers, file.open("a", buffering=1) as output:
        for line in todo:
            answer = answers(line)
            wanted = offers(answer.text) if answer.code and line.startswith(("local ", "main ")) else []
            tried = {offer: answers(mended(line, offer)).code for offer in wanted}
            text = answer.text if answer.code or line.startswith("explain ") else ""
            output.write(json.dumps({"line": line, "code": answer.code, "text": text, "offers": tried}) + "\n")
    return read(file)


def read(file: Path) -> dict[str, Any]:
    lines = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
    return {one.pop("line"): one for one in lines}
