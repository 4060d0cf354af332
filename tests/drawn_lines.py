"""Run launch.explain on command lines, each in a forked child; print the result of each as JSON.

argv: a file with a JSON list of command lines. The parent imports the code, without torch, so that children start fast.
A child that works for more than SECONDS is ended by its alarm, and it cannot allocate more than BYTES beyond the memory
of the parent. `lines` draws command lines.
"""

import dataclasses
import gc
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import ClassVar, get_origin, get_type_hints

from launch import explain
from train.command import cli, presets
from train.command.schemas import SCHEMAS

SECONDS, BYTES = 5, 500 * 2**20
WAITING = 60  # seconds
SEED = 13
SAID = "said.json"
GROUPS = {group: presets.names(group) for group in presets.groups()}
NPROC = {"single": "1", "3d": "8", "4d": "16", "moe_3d": "8"}  # of the presets that do not run on 4
# a schedule that torch must be loaded for takes two seconds: those are drawn in tests/test_rules.py
NOT_DRAWN = {"data.path", "strategy.schedule"}
SIZES = ["1", "2", "4", "8", "16", "6", "7", "12", "64", "256", "1000", "4096", "16384"]
DEGREES = ["-1", "1", "2", "3", "4", "8", "64", "1000", "4096"]
ORDINARY = ["1", "2", "4", "8", "16", "128", "0.5", "true", "false", "null"]
NUMBERS = [
    *("0", "-1", "1", "2", "3", "7", "8", "64", "100", "1000", "4096", "65536", "1000000", "16777216", "16777217"),
    *("2147483648", "9223372036854775807", "9223372036854775808", "10000000000000000000000", "9" * 60, "1" * 500),
    *("1" + "0" * 4400, "-9223372036854775809", "0.5", "1e-320", "1e308", "1e400", "-0.0", "nan", "inf", "-inf", "1e3"),
    *("0x10", "0b11", "1_000", "٣", "１２", "007", "+5"),
]
WORDS = [
    *(
        "null",
        "true",
        "off",
        "???",
        "",
        "''",
        "abc",
        "ümläut",
        "日本語",
        "\u202eabc",
        "e\u0301",
        "🦙",
        "a" * 300,
        "a b",
    ),
    *(
        "/proc/x",
        "~",
        "../../x",
        "[1,2]",
        "[]",
        "[[]]",
        "[1,a,null]",
        "{}",
        "{a: 1}",
        "{float32: 0}",
        "[",
        "{",
        "'",
        '"',
    ),
    *("a,b", "1,2", "range(1,3)", "range(1,100000000000)", "choice(1,2)", "glob(*)", "interval(0,1)", "int(3)", "a=b"),
]
INTERPOLATIONS = [
    *("${train.steps}", "${train}", "${model}", "${nope}", "${oc.env:HOME}", "${oc.env:NO_SUCH_NAME}", "${train.steps"),
    *(
        "${oc.decode:'1e400'}",
        "${oc.create:{a: 1}}",
        "${now:%S}",
        "${hydra:job}",
        "${.}",
        "${..}",
        "${}",
        "$",
        "${oc.env}",
    ),
    "'${oc.env:HOME}'",
]


def keys(schema: type, place: str) -> Iterator[str]:
    for name, kind in get_type_hints(schema).items():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from keys(kind, f"{place}{name}.")
        elif get_origin(kind) is not ClassVar:
            yield f"{place}{name}"


KEYS = sorted({key for (group, _), schema in SCHEMAS.items() for key in keys(schema, f"{group}." if group else "")})


def line(draw: random.Random) -> list[str]:
    """A valid command line with one to three changes."""
    preset = draw.choice(GROUPS["strategy"])
    moe = preset in ("ep", "moe_3d")
    words = [f"strategy={preset}", *(["model=moe_tiny"] if moe else []), f"nproc={NPROC.get(preset, '4')}"]
    words += ["train.global_batch_size=4096", "train.micro_batch_size=1"]
    if draw.random() < 0.3:
        words.append(f"model={draw.choice(GROUPS['model'])}")
    if draw.random() < 0.3:
        words.append(f"hardware={draw.choice(GROUPS['hardware'])}")
    if draw.random() < 0.3:
        words.append(f"nproc={draw.choice(SIZES)}")
    return words + [changed(draw) for _ in range(draw.choice((1, 1, 2, 3)))]


def changed(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.15:
        return f"strategy.{draw.choice(('tp', 'pp', 'cp', 'dp_shard', 'dp_replicate', 'ep'))}={draw.choice(DEGREES)}"
    if kind < 0.2:
        return f"nproc={draw.choice(NUMBERS + WORDS)}"
    if kind < 0.25:
        return f"{draw.choice(sorted(GROUPS))}={draw.choice([*GROUPS['strategy'], *GROUPS['data'], *WORDS])}"
    if kind < 0.3:
        return draw.choice(
            ("=", "train", "train.steps", "-x", "--cfg", "-m", "a@b=c", ".=1", "strategy@x=tp", "\t", "=")
        )
    key = draw.choice([key for key in KEYS if key not in NOT_DRAWN])
    if kind < 0.38:
        key = draw.choice(("+", "++", "~", "", "")) + key + draw.choice(("", "", "s", ".x", " ", "ü"))
    values = ORDINARY if kind < 0.55 else NUMBERS if kind < 0.75 else INTERPOLATIONS if kind < 0.82 else WORDS
    return f"{key}={draw.choice(values)}"


def outcome(words: list[str], folder: Path) -> dict[str, object]:
    """The result of a line in a child: {"code": its exit code, "text": what it printed}."""
    file = folder / SAID
    file.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code, said = child(words)
        file.write_text(json.dumps(said))
        os._exit(code)
    _, status, used = os.wait4(pid, 0)
    text = json.loads(file.read_text()) if file.exists() else ""
    return {
        "line": words,
        "code": os.waitstatus_to_exitcode(status),
        "text": text,
        "seconds": used.ru_utime + used.ru_stime,
    }


def child(words: list[str]) -> tuple[int, str]:
    gc.disable()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work, however busy the machine is
    signal.alarm(WAITING)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    sys.argv[1:] = words
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            explain.main()
    except SystemExit as stop:
        return int(stop.code or 0), said.getvalue()
    except BaseException:
        return 99, traceback.format_exc()
    return 0, said.getvalue()


def lines(number: int) -> list[list[str]]:
    draw = random.Random(SEED)
    return [line(draw) for _ in range(number)]


def main() -> None:
    todo = json.loads(Path(sys.argv[1]).read_text())
    cli.configured([])  # so that no child has anything left to load
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        results = [outcome(words, Path(folder)) for words in todo]
        left = sorted(path.name for path in Path(folder).iterdir() if path.name != SAID)
    print(json.dumps({"results": results, "left": left, "torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main()
