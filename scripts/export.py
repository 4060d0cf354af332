"""Export a trained model, load it back in its own runtime, and compare: python scripts/export.py RUN to=TARGET …

    to=onnx           for onnxruntime; quant=int8 keeps products' weights in 8 bits
    to=executorch     for phones and boards, with XNNPACK; quant=8da4w keeps linear layers' weights in 4 bits
    to=torch_export   a program that torch.export.load reads
    to=aoti           native code by AOTInductor, for processors like this one: load only what you trust
    to=gguf           for llama.cpp; quant=F32 (if not given), Q8_0 or Q4_0
    to=safetensors    for transformers' LlamaForCausalLM, with config.json
    out=FOLDER        where to; if not given, exports/TARGET-QUANT in the folder of RUN
    licence=NAME      for the artefact's metadata; Apache-2.0, the licence of this program, if not given

RUN is the directory of a run of any strategy, whose newest checkpoint is taken, one of its checkpoints, or a compressed
run, whose weights are those that it computes with. All numbers are float32 where nothing is quantised. The graphs for
onnx, executorch, torch_export and aoti take any number of tokens, and the keys and values of earlier ones. Each export
is compared with the eager model: logits after 20 prompts, after each further token and of whole sequences, and the
validation loss. What differs is not written.

The exit code is 0, 1 if the runtime does not compute the same, 2 for a wrong command line or a model that the target
does not have, or 3 for a package that is not installed or a disk that fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from scripts.exporting import bound
from scripts.exporting.artefact import Artefact
from scripts.exporting.targets import TARGETS
from train.checkpoint.folder import CHECKPOINTS
from train.command.option import Option, name, one_of, text
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.config.problems import BadInput, Problem
from train.config.world import World

TOOL = "scripts/export.py"
MiB = 2**20
LEAST_JUDGED = 32 * MiB  # `tiny` has 6 MiB, `small` 325
QUANTS = dict.fromkeys(quant for target in TARGETS.values() for quant in target.quants)

TO: Option[str | None] = Option("to", None, (TOOL,), *one_of(*TARGETS), example="onnx", help="")
QUANT: Option[str | None] = Option("quant", None, (TOOL,), *one_of(*QUANTS), example="int8", help="")
OUT: Option[str | None] = Option("out", None, (TOOL,), "the name of a folder", text, example="exported", help="")
LICENCE: Option[str] = Option(
    "licence", "Apache-2.0", (TOOL,), "letters, digits, _, . and -", name, example="CC-BY-4.0", help=""
)
OPTIONS: tuple[Option[Any], ...] = (TO, QUANT, OUT, LICENCE)


def main(argv: list[str]) -> int:
    leave_on_interrupt()
    parser = argparse.ArgumentParser(
        prog=TOOL, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(argv)
    with reported_once(World.single(), trains=False):
        words = [*args.words]
        to, quant, out, licence = (option.pop(words) for option in OPTIONS)
        if words:
            known = ", ".join(f"{option.name}=" for option in OPTIONS)
            raise BadInput(Problem("option", f"{words[0]} is not an option of {TOOL}", f"use {known}"))
        if to is None:
            message = f"no target is given for {args.run}"
            raise BadInput(Problem("to", message, f"use to= and one of {', '.join(TARGETS)}"))
        return export(args.run, to, quant, out and Path(out), licence)


def export(path: Path, to: str, quant: str | None, out: Path | None, licence: str) -> int:
    from scripts.compressing.opened import open_model
    from scripts.exporting.making import make

    target = TARGETS[to]
    quant = quant or target.quants[0]
    opened = open_model(path)
    run = path.parent.parent if path.parent.name == CHECKPOINTS else path
    folder = out or run / "exports" / f"{to}-{quant}"
    print("\n".join(lines(folder, make(opened, target, quant, folder, licence))))
    return 0


def lines(folder: Path, made: Artefact) -> list[str]:
    """What was made, and what was measured of it."""
    checks = made.checks
    errors = {key.removesuffix("_error"): value for key, value in checks.items() if key.endswith("_error")}
    shown = ", ".join(f"{where} {error:.1e}" for where, error in errors.items())
    kind = "log-probabilities" if made.target.log_probabilities else "logits"
    return [
        f"{folder}: {made.bytes / MiB:,.2f} MiB, loaded back by {made.target.runtime}",
        f"  largest errors of {kind}: {shown}",
        f"  validation loss {checks['loss']:.6f}, of the eager model on the same tokens {checks['eager_loss']:.6f}",
        f"  decoding on {checks['threads']:.0f} thread(s): {checks['decode_tokens_per_s']:,.1f} tokens/s{share(made)}",
    ]


def share(made: Artefact) -> str:
    """The speed as a share of the bound, for a model that is too large for the caches of one processor."""
    if made.read_bytes < LEAST_JUDGED:
        return ""
    speed, most, cache = made.checks["decode_tokens_per_s"], made.checks["most_tokens_per_s"], bound.processor_cache()
    words = f", {100 * speed / most:.1f} % of the {most:,.1f} that the memory's bandwidth allows"
    if made.read_bytes < cache:
        words += f" (or more, if its {made.read_bytes / MiB:,.0f} MiB stay in the cache of {cache / MiB:,.0f} MiB)"
    return words


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
