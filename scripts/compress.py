"""Make a trained model smaller, and measure what that costs and gains: python scripts/compress.py RUN method=NAME …

    RUN method=int8_weight_only                8 bits a weight (torchao); int8_dynamic: 8 bits for the inputs too
    RUN method=int4_weight_only                4 bits a weight (torchao), a scale for 32; 8da4w: 8 bits for the inputs
    RUN method=llm_int8                        bitsandbytes, 8 bits; nf4: 4 bits
    RUN method=qat_8da4w retrain=500           8da4w after a training that simulates it
    RUN method=prune_2_4 score=wanda           of four weights two become 0; score=magnitude, calibration=32 sequences
    RUN method=prune_unstructured sparsity=0.5 half of the weights become 0; with retrain=500 a training follows
    RUN method=distil retrain=3000             a student of half the layers; init=teacher or scratch, kl=true or false
    RUN method=trained_on retrain=500          the model trained on, which methods that train are compared with
    --table FOLDER …                           the table of compressed runs; --md, --json: as Markdown or JSON;
                                               --png FILE: a picture of it, the loss against the bytes

RUN is the directory of a run, one of its checkpoints, or a compressed run. The new directory, beside RUN or out=FOLDER,
has weights.safetensors, config.yaml and compression.json: the loss before and after on the same validation tokens,
bytes, memory, and tokens/s of reading and of generating tokens=64, on device=cpu or cuda, in one process in turns.
Other words are of the training: strategy=dp nproc=2 optim.lr=3e-4. It uses the parent's text and optimiser at a third
of its rate (a student: the whole rate). The exit code is 2 for a wrong command line or run, 3 for what this machine
lacks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.compressing import table, words
from scripts.compressing.record import Record
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.world import World

MiB = 2**20


def main(argv: list[str]) -> int:
    leave_on_interrupt()
    parser = argparse.ArgumentParser(
        prog=words.TOOL, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--png", metavar="FILE", default="")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--md", action="store_true")
    formats.add_argument("--json", action="store_true")
    args = parser.parse_intermixed_args(argv)
    with reported_once(World.single(), trains=False):
        if not args.words:
            raise BadInput(Problem("words", "no run is given", "see --help"))
        if args.table:
            return show(args)
        if args.md or args.png:
            flag = "--md" if args.md else "--png"
            raise BadInput(Problem("table", f"{flag} shows a table", "use it with --table"))
        return compress(args)


def show(args: argparse.Namespace) -> int:
    """Print the table of the compressed runs that are named, and those below named folders."""
    found, notes = table.find(map(Path, args.words))
    records, unread = table.read_all(found)
    print("".join(f"compress: {line}\n" for line in notes + unread), end="", file=sys.stderr)
    if not records:
        raise BadInput(Problem("table", "there is no compressed run to show", "name folders with compressed runs"))
    made = table.tables(records)
    if args.png:
        draw(made, Path(args.png))
    if args.md or args.json:
        sys.stdout.write(table.to_markdown(made) if args.md else table.to_json(made))
    else:
        table.to_terminal(made)
    return 0


def draw(made: list[table.Table], file: Path) -> None:
    """Write the picture of each table, and print its path to stderr."""
    try:
        from scripts.comparing.pages.compression import save
    except ModuleNotFoundError as error:
        message, fix = f"--png needs {error.name}, which is not installed", 'pip install "strategy-lab[plot]"'
        raise BadInput(Problem("extra", message, fix, exit_code=EXIT_ENVIRONMENT)) from error
    try:
        for path in save(made, file):
            print(path, file=sys.stderr)
    except (OSError, ValueError) as error:
        message = f"--png {file} cannot be written ({getattr(error, 'strerror', None) or error})"
        raise BadInput(Problem("png", message, "name a .png or .svg file in a folder that can be written")) from error


def compress(args: argparse.Namespace) -> int:
    run, *given = args.words
    task = words.read(run, given)
    from scripts.compressing.control import compress as make

    folder, record = make(task)
    if args.json:
        print((folder / "compression.json").read_text(), end="")
    else:
        print("\n".join([f"{folder}: {record.label}", *lines(record)]))
    return 0


def lines(record: Record) -> list[str]:
    before, after = record.before, record.after
    share = 100 * after.bytes / before.bytes
    control = "" if record.control is None else f"; the parent trained on by as many steps: {record.control:.4f}"
    speeds = {
        name: (getattr(before, f"{name}_tokens_per_s"), getattr(after, f"{name}_tokens_per_s"))
        for name in ("prefill", "decode")
    }
    return [
        f"  validation loss  {before.loss:.4f} -> {after.loss:.4f} on {record.tokens:,} tokens{control}",
        f"  cost             {record.cost_pct:+.2f} %",
        f"  bytes on disk    {_bytes(before.bytes)} -> {_bytes(after.bytes)} ({share:.1f} %)",
        f"  memory           {_bytes(before.resident_bytes)} -> {_bytes(after.resident_bytes)}",
        *(f"  {name:<16} {old:,.0f} -> {new:,.0f} tokens/s" for name, (old, new) in speeds.items() if old and new),
    ]


def _bytes(size: int) -> str:
    return f"{size / MiB:,.2f} MiB"


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
