"""The points of scripts/bench_strategies.sh, which calls this file, and the check whether they are valid.

    python scripts/benching/points.py list N [override …]    the points on N GPUs: label, processes, overrides
    python scripts/benching/points.py check N [override …]   check all rules of all points, start nothing; exit code 2

Batches: a rank of the data axes has 2 microbatches of 4 sequences of 4,096 tokens in each step. So N GPUs have 8 N
sequences under every strategy. A pipeline over all N GPUs has 2 N microbatches. This equals the number of stages of the
schedules with two stages per rank, and some of them need at least so many. `llama_8b` has 1 sequence in a microbatch,
because `single` and `dp` have full optimiser states. Context parallelism has one sequence in each step, with 8,192
tokens for each rank.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from train.command.process.streams import lasting

COMMON = "precision=bf16 data=python_source train.steps=20 train.eval_every=0 train.eval_batches=1 checkpoint.every=0"
MODELS = {  # (sequences in a microbatch, overrides of the model)
    "llama_1b": (4, "model=llama_1b"),
    "moe_1b": (4, "model=moe_1b"),
    "llama_8b": (1, "model=llama_8b model.num_layers=8"),
}
SEQ_LEN = 4096
MICROBATCHES = 2  # for each data rank
CP_TOKENS = 8192  # for each rank
PP = "strategy=pp strategy.schedule="
EAGER = " compile.enabled=false"

# (the least number of GPUs, label, overrides, model)
FIRST: list[tuple[int, str, str, str]] = [
    (1, "single", "strategy=single", "llama_1b"),
    (2, "dp", "strategy=dp", "llama_1b"),
    (2, "fsdp", "strategy=fsdp", "llama_1b"),
    (2, "tp", "strategy=tp", "llama_1b"),
    (2, "pp 1f1b", PP + "1f1b", "llama_1b"),
    (4, "fsdp_tp", "strategy=fsdp_tp", "llama_1b"),
    (8, "3d", "strategy=3d", "llama_1b"),
    (2, "ds_zero3, eager", "strategy=ds_zero3" + EAGER, "llama_1b"),  # a rule refuses it compiled
    (2, "ds_zero2", "strategy=ds_zero2", "llama_1b"),
]
THEN: list[tuple[int, str, str, str]] = [
    (4, "hsdp", "strategy=hsdp", "llama_1b"),
    (2, "tp, whole activations", "strategy=tp strategy.sequence_parallel=false", "llama_1b"),
    (2, "tp, async", "strategy=tp strategy.async_tp=true", "llama_1b"),
    (4, "tp_pp", "strategy=tp_pp", "llama_1b"),
    (2, "pp interleaved_1f1b", PP + "interleaved_1f1b", "llama_1b"),
    *((2, f"cp {method}", f"strategy=cp strategy.cp_method={method}", "llama_1b")
      for method in ("allgather", "ring", "ulysses")),
    (2, "ep", "strategy=ep", "moe_1b"),
    (2, "fsdp, beside ep", "strategy=fsdp", "moe_1b"),
    (2, "zero1", "strategy=zero1", "llama_1b"),
    (2, "zero2", "strategy=zero2", "llama_1b"),
    (2, "dp, bf16 gradients", "strategy=dp strategy.comm_hook=bf16", "llama_1b"),
    (2, "ds_zero1", "strategy=ds_zero1", "llama_1b"),
    (2, "ds_pp", "strategy=ds_pp", "llama_1b"),
    (4, "dp_pp", "strategy=dp_pp", "llama_1b"),
    (4, "fsdp_pp", "strategy=fsdp_pp", "llama_1b"),
    (4, "fsdp_cp", "strategy=fsdp_cp", "llama_1b"),
    (4, "cp_tp", "strategy=cp_tp", "llama_1b"),
    (8, "moe_3d", "strategy=moe_3d", "moe_1b"),
    (2, "pp gpipe", PP + "gpipe", "llama_1b"),
    (2, "pp looped_bfs", PP + "looped_bfs", "llama_1b"),
    # a schedule that splits the backward does not support compiled stages, so these are compared with an eager 1f1b
    (2, "pp 1f1b, eager", PP + "1f1b" + EAGER, "llama_1b"),
    (2, "pp interleaved_zero_bubble, eager", PP + "interleaved_zero_bubble" + EAGER, "llama_1b"),
    (2, "pp zbv_zero_bubble, eager", PP + "zbv_zero_bubble" + EAGER, "llama_1b"),
    (2, "pp dualpipev, eager", PP + "dualpipev" + EAGER, "llama_1b"),
]  # fmt: skip
RAW = argparse.RawDescriptionHelpFormatter
SCALED = ("dp", "fsdp", "tp", "pp 1f1b")  # from 1 GPU to N


@dataclass(frozen=True)
class Point:
    label: str
    nproc: int
    overrides: tuple[str, ...]


def points(num_gpus: int, more: tuple[str, ...] = ()) -> list[Point]:
    """The most important points first: every strategy on `llama_1b`, the first eight on `llama_8b`, and then those for
    the scaling from 1 GPU to N."""
    here = [entry for entry in (*FIRST, *THEN) if entry[0] <= num_gpus]
    made = [_point(label, 1 if least == 1 else num_gpus, words, model, more) for least, label, words, model in here]
    for least, label, words, _ in FIRST[:8]:
        if least <= num_gpus:
            nproc = 1 if least == 1 else num_gpus
            made.append(_point(f"{label}, 8 layers of 8B", nproc, words, "llama_8b", more))
    for nproc in (n for n in (1, 2, 4) if n < num_gpus):
        made += [_point(label, nproc, words, model, more) for _, label, words, model in FIRST if label in SCALED]
    return made


def _point(label: str, nproc: int, words: str, model: str, more: tuple[str, ...]) -> Point:
    micro, shape = MODELS[model]
    batch, seq_len = MICROBATCHES * micro * nproc, SEQ_LEN
    if "strategy=cp " in words:
        micro, batch, seq_len = 1, 1, CP_TOKENS * nproc
    sizes = f"train.seq_len={seq_len} train.micro_batch_size={micro} train.global_batch_size={batch}"
    compiled = "" if EAGER in words else "compile.enabled=true"
    # a later override of the same key wins
    return Point(label, nproc, (*f"{words} {shape} {sizes} {compiled} {COMMON}".split(), *more))


def check(num_gpus: int, more: tuple[str, ...] = ()) -> list[str]:
    """The problems of the points, one line for each. Needs no GPU."""
    from train.command import cli
    from train.command.validate import validate
    from train.config.problems import BadInput
    from train.data.corpus import load_corpus

    parser, found, longest = cli.parser("scripts/benching/points.py", __doc__ or ""), [], None
    for point in points(num_gpus, more):
        try:
            config, _, _ = cli.parse(parser, list(point.overrides))
        except BadInput as error:
            found.append(f"{point.label}: {error}")
            continue
        found += [f"{point.label} on {point.nproc}: {problem}" for problem in validate(config, point.nproc)]
        if longest is None or config.train.seq_len > longest.train.seq_len:
            longest = config
    if longest is not None:
        try:
            load_corpus(longest)
        except BadInput as error:
            found.append(str(error))
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("scripts/benching/points.py", description=__doc__, formatter_class=RAW)
    parser.add_argument("command", choices=["list", "check"], help="print the points, or check them")
    parser.add_argument("num_gpus", type=int, metavar="N", help="the number of GPUs")
    parser.add_argument(
        "overrides", nargs="*", metavar="override", help="added to every point, after its own overrides"
    )
    args = parser.parse_args(argv)
    num_gpus, more = args.num_gpus, tuple(args.overrides)
    if args.command == "list":
        for point in points(num_gpus, more):
            print("\t".join([point.label, str(point.nproc), " ".join(point.overrides)]))
        return 0
    problems = check(num_gpus, more)
    print("\n".join(problems) or f"{len(points(num_gpus, more))} points on {num_gpus} GPUs: no problem")
    return 2 if problems else 0


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
