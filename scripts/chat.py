"""Let a trained model continue a text: python scripts/chat.py RUN [--prompt TEXT …] [key=value …]

    python scripts/chat.py runs/tp-tp4-ws4-28cd65                               every line that you type is a prompt
    python scripts/chat.py runs/tp-tp4-ws4-28cd65 --prompt "The for statement"  one answer
    python scripts/chat.py RUN --prompt A --prompt B --tokens 64 --json         a batch, and a JSON object for each

RUN is the directory of a run of any strategy, whose newest checkpoint is taken, one of its checkpoints, or a compressed
run (scripts/compress.py). The model
was not trained to talk: it continues every prompt by itself, and knows nothing of the prompts before. A model of
data=tokens or data=synthetic knows ids only, so its prompts are numbers: --prompt "17 4 256". Ctrl-D ends.

    temperature=0        0 takes the most likely token; more draws one, the more freely the higher it is
    top_k=N              only the N most likely tokens may be drawn
    seed=0               of the draws: the same seed draws the same tokens
    stop=TEXT            an answer ends before this text; \\n is a line feed
    runtime.device=auto  cpu or cuda; auto takes an accelerator if there is one

The answer is on the standard output; the time to the first token and the tokens/s after it are on the standard error.
The exit code is 0, or 2 for a wrong command line, run or prompt, or 3 for a device that this machine does not have.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.command.option import Option, count, one_of, positive
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.config import plain_json
from train.config.fields import MAX_TOKENS, MAX_VOCABULARY
from train.config.problems import BadInput, Problem
from train.config.world import World

if TYPE_CHECKING:
    from scripts.generating.answering import Answerer, Answers

TOOL = "scripts/chat.py"
MOST_PROMPTS = 256
MAX_TEMPERATURE, MAX_SEED = 1_000.0, 2**63 - 1


def _temperature(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 <= value <= MAX_TEMPERATURE else None


def _unescaped(text: str) -> str | None:
    return text.replace("\\n", "\n").replace("\\t", "\t") or None


TOKENS: Option[int] = Option("--tokens", 256, (TOOL,), *positive(MAX_TOKENS), example="64", help="")
TEMPERATURE: Option[float] = Option(
    "temperature", 0.0, (TOOL,), f"a number from 0 to {MAX_TEMPERATURE:,.0f}", _temperature, example="0.8", help=""
)
TOP_K: Option[int | None] = Option("top_k", None, (TOOL,), *positive(MAX_VOCABULARY), example="40", help="")
SEED: Option[int] = Option("seed", 0, (TOOL,), *count(MAX_SEED), example="1", help="")
STOP: Option[str] = Option("stop", "", (TOOL,), "a text that is not empty", _unescaped, example="'\\n'", help="")
DEVICE: Option[str] = Option("runtime.device", "auto", (TOOL,), *one_of("auto", "cpu", "cuda"), example="cpu", help="")
OPTIONS: tuple[Option[Any], ...] = (TEMPERATURE, TOP_K, SEED, STOP, DEVICE)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=TOOL, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a text to continue; several are one batch")
    parser.add_argument("--tokens", metavar="N", default="256", help="the most tokens of an answer; 256 if not given")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each prompt")
    args = parser.parse_intermixed_args(argv)
    with reported_once(World.single(), trains=False):
        words = [*args.words]
        values = {option.name: option.pop(words) for option in OPTIONS}
        if words:
            known = ", ".join(f"{option.name}=" for option in OPTIONS)
            raise BadInput(Problem("option", f"{words[0]} is not an option of {TOOL}", f"use {known}"))
        if len(args.prompt or ()) > MOST_PROMPTS:
            message = f"{len(args.prompt)} prompts are more than the {MOST_PROMPTS} of a batch"
            raise BadInput(Problem("prompts", message, f"give {MOST_PROMPTS} or fewer"))
        values[TOKENS.name] = TOKENS.value(f"--tokens={args.tokens}")
        answerer = opened(args.run, values)
        if args.prompt is None:
            return talk(answerer, as_json=args.json)
        answer(answerer, args.prompt, as_json=args.json)
    return 0


def opened(run: Path, values: dict[str, Any]) -> Answerer:
    """The model of the run, which answers as the options want it. Raises BadInput."""
    from scripts.compressing.opened import open_model
    from scripts.generating.answering import Wanted, answerer_of
    from scripts.generating.generate import Sampling

    sampling = Sampling(values[TEMPERATURE.name], values[TOP_K.name], values[SEED.name])
    return answerer_of(open_model(run), values[DEVICE.name], Wanted(values[TOKENS.name], sampling, values[STOP.name]))


def talk(answerer: Answerer, *, as_json: bool) -> int:
    """Answer every line of the standard input. A prompt that is refused costs only itself."""
    code = 0
    for line in typed():
        try:
            answer(answerer, [line], as_json=as_json)
        except BadInput as error:
            print(error, file=sys.stderr)
            code = error.exit_code
    return code


def typed() -> Iterator[str]:
    """The lines of the standard input that are not empty."""
    if not isinstance(sys.stdin, io.TextIOWrapper):  # it is closed
        return
    sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 are tokens like others
    by_hand = sys.stdin.isatty() and sys.stdout.isatty()
    if by_hand:
        with suppress(ImportError):  # some builds of Python do not have it
            importlib.import_module("readline")  # `input` then edits lines, and remembers them
    while True:
        try:
            line = input("> " if by_hand else "")
        except EOFError:
            return
        if line:
            yield line


def answer(answerer: Answerer, prompts: Sequence[str], *, as_json: bool) -> None:
    """Print the answers. That to a single prompt is printed while it is generated. Raises BadInput."""
    answers = answerer.answers(prompts)
    for new in answers:
        if len(prompts) == 1 and not as_json:
            print(new[0], end="", flush=True)
    if as_json:
        for one in objects(answerer, prompts, answers):
            print(plain_json.dumps(one), flush=True)
        return
    pairs = zip(prompts, answers.texts, strict=True)
    print("" if len(prompts) == 1 else "\n".join(f"> {prompt}\n{text}" for prompt, text in pairs))
    print(said(answers), file=sys.stderr)


def objects(answerer: Answerer, prompts: Sequence[str], answers: Answers) -> Iterator[dict[str, Any]]:
    for prompt, text, row in zip(prompts, answers.texts, answers.rows, strict=True):
        yield {
            "prompt": prompt,
            "text": text,
            "tokens": row.tokens,
            "ended": row.ended,
            "first_token_ms": answers.first_token_ms,
            "tokens_per_s": answers.tokens_per_s,
            **answerer.about,
        }


def said(answers: Answers) -> str:
    """The speed, and a sentence if the model has no position left."""
    lines = [f"first token after {answers.first_token_ms:,.1f} ms"]
    if answers.tokens_per_s is not None:
        lines[0] += f", then {answers.tokens_per_s:,.1f} tokens/s"
    return "\n".join([*lines, *([answers.limit] if answers.limit else [])])


if __name__ == "__main__":
    lasting()
    leave_on_interrupt()
    sys.exit(main(sys.argv[1:]))
