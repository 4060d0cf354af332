"""Print the table of docs/communication.md from a run: python -m tests.ledger_table

It shows the measured traffic of rank 0 beside the closed form, for some configs, where it is at least LEAST bytes.
"""

import platform
import subprocess
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tests.rows.base import BF16, F32, TIED
from tests.test_ledger import FULL, MOE, name, run_ledger

LEAST = 1024  # bytes: what is less is single numbers, mostly
TELLING: dict[int, list[tuple[str, ...]]] = {
    2: [
        ("strategy=dp", F32),
        ("strategy=dp", F32, "strategy.comm_hook=fp16"),
        ("strategy=dp", F32, "strategy.comm_hook=powersgd", "strategy.powersgd_start_step=2", "strategy.bucket_mb=1"),
        *((f"strategy={name}", F32) for name in ("zero1", "zero2", "fsdp", "tp")),
        ("strategy=tp", F32, "strategy.sequence_parallel=false"),
        ("strategy=pp", F32),
        ("strategy=pp", F32, TIED),
        *(("strategy=cp", BF16, f"strategy.cp_method={method}") for method in ("allgather", "ring", "ulysses")),
    ],
    4: [
        ("strategy=fsdp", F32, "strategy.dp_replicate=2"),
        ("strategy=tp_pp", F32, "strategy.schedule=interleaved_zero_bubble", FULL),
        ("strategy=ep", F32, *MOE, "strategy.ep=2"),
    ],
    8: [("strategy=moe_3d", F32, *MOE)],
}


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"commit {commit}, torch {torch.__version__}, gloo, Python {platform.python_version()}, {date.today()}\n")
    print("| strategy | ranks | axis | operation | calls | bytes | closed form: calls | bytes |")
    print("|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for size, configs in TELLING.items():
            found = run_ledger(Path(folder), size, configs)
            for config in configs:
                print("\n".join(rows(name(size, config), size, found[f"{name(size, config)} rank0"])), flush=True)


def rows(title: str, size: int, result: dict) -> list[str]:
    words = [word for word in title.split()[:-1] if word != F32]
    lines = []
    for key in sorted(result["measured"].keys() | result["expected"].keys()):
        (calls, sent), (said_calls, said) = (result[kind].get(key, (0, 0)) for kind in ("measured", "expected"))
        if max(sent, said) >= LEAST:
            axis, op = key.split("/")
            mean = " (mean)" if key in result["means"] else ""
            figures = f"{calls} | {sent:,} | {said_calls} | {said:,}{mean}"
            lines.append(f"| `{' '.join(words)}` | {size} | `{axis}` | {op} | {figures} |")
    return lines


if __name__ == "__main__":
    main()
