"""Look at checkpoints: python scripts/checkpoint.py inspect|verify|diff|export PATH …

    inspect RUN                    the checkpoints of a run, or what one of them holds
    verify RUN                     compare every file with its SHA-256
    diff FIRST SECOND              the tensors that are not bitwise equal, and the largest error
    export RUN FOLDER              the weights as safetensors, with the config.json of transformers' LlamaForCausalLM

RUN is the directory of a run, whose newest checkpoint is taken (by `verify`: all of them), or one of its checkpoints.
The exit code is 0, or 1 if `verify` finds a damaged checkpoint or `diff` a difference, or 2 for a wrong command line.
Opening a checkpoint runs no code from it, whoever made it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from train.checkpoint.manifest import Damaged, Manifest
from train.checkpoint.whole.newest import checkpoints, newest, problems
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem, Reported
from train.config.strategy import MESH_AXES
from train.config.world import World
from train.record.run_files import clean

MiB = 2**20
MOST_SHOWN = 20  # differences


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/checkpoint.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, words in {
        "inspect": ["path"],
        "verify": ["path"],
        "diff": ["first", "second"],
        "export": ["path", "folder"],
    }.items():
        command = commands.add_parser(name)
        for word in words:
            command.add_argument(word, type=Path, metavar=word.upper())
    args = parser.parse_args(argv)
    with reported_once(World.single(), trains=False):
        if args.command == "inspect":
            return inspect(args.path)
        if args.command == "verify":
            return verify(args.path)
        if args.command == "diff":
            return diff(newest(args.first), newest(args.second))
        return export(newest(args.path), args.folder)


def inspect(path: Path) -> int:
    found = checkpoints(path)
    for one in found:
        try:
            manifest = Manifest.read(one)
        except Damaged as error:
            print(f"{one}: {error.why}")
            continue
        keys = manifest.layout["strategy"]
        degrees = clean(" ".join(f"{axis} {keys[axis]}" for axis in MESH_AXES if axis in keys))
        size, tensors = manifest.bytes / MiB, len(manifest.tensors)
        print(f"{one}: step {manifest.step}, {size:,.1f} MiB in {len(manifest.files)} files, {tensors:,} tensors")
        print(f"  saved on {manifest.layout['world_size']} rank(s): {degrees}")
        print(f"  by {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
        if len(found) == 1 or one is found[0]:
            show_tensors(manifest)
    return 0


def show_tensors(manifest: Manifest) -> None:
    """The number and the size of the tensors by kind, and every parameter with its shape."""
    kinds: dict[str, list[str]] = {}
    for key in manifest.tensors:
        kinds.setdefault(key.partition("/")[0], []).append(key)
    for kind, keys in kinds.items():
        print(f"  {kind}: {len(keys):,} tensors, {_mib(manifest, keys):,.1f} MiB")
    for key in kinds.get("parameter", []):
        print(f"    {key.partition('/')[2]}  {manifest.tensors[key]}")


def verify(path: Path) -> int:
    bad = 0
    for one in checkpoints(path):
        wrong = problems(one)
        bad += bool(wrong)
        print(f"{one}: {'; '.join(wrong) if wrong else 'every file is as it was written'}")
    return 1 if bad else 0


def diff(first: Path, second: Path) -> int:
    from train.checkpoint.whole.tensors import differences

    found = [*differences(first, second)]
    for one in found[:MOST_SHOWN]:
        print(f"{one.key}: {one.why or f'error {one.error:.3g}'}")
    if len(found) > MOST_SHOWN:
        print(f"… and {len(found) - MOST_SHOWN} more")
    errors = [one.error for one in found if one.error is not None]
    largest = f", the largest error is {max(errors):.3g}" if errors else ""
    print(f"{len(found)} tensor(s) differ between {first} and {second}{largest}")
    return 1 if found else 0


def export(folder: Path, target: Path) -> int:
    if importlib.util.find_spec("safetensors") is None:
        fix = 'pip install "strategy-lab[export]"'
        raise BadInput(Problem("extra", "export needs safetensors, which is not installed", fix, exit_code=3))
    if target.exists():
        raise BadInput(Problem("exists", f"{target} exists already", "name a new folder"))
    from train.checkpoint.whole.llama import export as write

    try:
        write(folder, Manifest.read(folder), target)
    except OSError as error:
        raise NotWritten(f"{target} cannot be written ({error.strerror or error}): name another folder") from error
    print(f"{target}: LlamaForCausalLM.from_pretrained({str(target)!r}) loads it")
    return 0


class NotWritten(Reported):
    exit_code = EXIT_ENVIRONMENT


def _mib(manifest: Manifest, keys: Iterable[str]) -> float:
    return sum(manifest.tensors[key].bytes for key in keys) / MiB


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
