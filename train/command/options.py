"""The options of the tools, such as `nproc=4`, which are not keys of the config. Each is declared only here.

The tools read them, and `--help` and docs/configuration.md show them. If an option is given to a wrong tool, the
message names the tools that have it. measuring_options.py has those of scripts/matmul.py. Torch is not imported.
"""

from __future__ import annotations

from typing import Any

from train.command import measuring_options
from train.command.launching import netlab, nodes
from train.command.launching.netlab import NETLAB
from train.command.launching.nodes import KUBERNETES, ON_NODE, SLURM
from train.command.option import TRUE_OR_FALSE, Option, amount, count, one_of, positive, times
from train.config.fields import MAX_RANKS, MAX_SEQUENCES, MAX_STEPS

LOCAL, EXPLAIN, SWEEP = "python -m launch.local", "python -m launch.explain", "python -m launch.sweep"
DOCTOR, PLAN = "python -m launch.doctor", "python -m launch.plan"
VERIFY, BENCH_STEP = "python scripts/verify.py", "scripts/bench_step.py"
SOAK = "python scripts/soak.py"
MAX_RESTARTS = 10_000
MOST_CHECKED = 20
MOST_SHOWN = 200  # layouts: those that a search replays


def of(tool: str) -> list[Option[Any]]:
    """The options of a tool."""
    return [option for option in OPTIONS if tool in option.tools]


def named(name: str) -> Option[Any] | None:
    return next((option for option in OPTIONS if option.name == name), None)


NPROC: Option[int] = Option(
    "nproc",
    1,
    (LOCAL, EXPLAIN, SWEEP, VERIFY, DOCTOR, PLAN, SOAK, ON_NODE, SLURM, KUBERNETES, NETLAB),
    *positive(MAX_RANKS),
    example="4",
    help="The number of processes, of all machines together; launch.explain, launch.sweep and launch.slurm take "
    "several, as nproc=2,4.",
)
PORT: Option[int | None] = Option(
    "port",
    None,
    (LOCAL,),
    *positive(65_535),
    example="29500",
    help="The port of torchrun's store on this machine.",
    unset="a free one",
)
RESTARTS: Option[int] = Option(
    "restarts",
    0,
    (LOCAL,),
    *count(MAX_RESTARTS),
    example="3",
    help="How often all ranks are started again after one of them has failed.",
)
FORCE: Option[bool] = Option(
    "force",
    False,
    (LOCAL, SWEEP, VERIFY, ON_NODE, NETLAB),
    *TRUE_OR_FALSE,
    example="true",
    help="Runs are started even if they do not fit in memory.",
)
BATCH: Option[str] = Option(
    "batch",
    "global",
    (SWEEP,),
    *one_of("global", "micro", "best"),
    example="micro",
    help="How the points are made comparable. global: the global batch is as given. micro: train.micro_batch_size is "
    "as given, and the global batch is scaled so that each data rank has as many microbatches as in the first point. "
    "best: as micro, with the largest micro batch of each point that runs, which short runs find.",
)
MAX_MICRO_BATCH_SIZE: Option[int | None] = Option(
    "max_micro_batch_size",
    None,
    (SWEEP,),
    *positive(MAX_SEQUENCES),
    example="64",
    help="The largest micro batch that batch=best tries, in sequences.",
    unset="64 on a CPU; on a GPU, its memory",
)
SKIP_INVALID: Option[bool] = Option(
    "skip_invalid",
    False,
    (SWEEP, SLURM),
    *TRUE_OR_FALSE,
    example="true",
    help="Points that cannot be run are left out, and the others are run.",
)
FRESH: Option[bool] = Option(
    "fresh",
    False,
    (SWEEP, NETLAB),
    *TRUE_OR_FALSE,
    example="true",
    help="The results of an earlier start of the same command are not used; without this, that sweep is continued.",
)
LOCATE: Option[bool | None] = Option(
    "locate",
    None,
    (VERIFY,),
    *TRUE_OR_FALSE,
    example="true",
    help="Whether to run a strategy once more and look for the first wrong result, comparing every module's output and "
    "its gradient.",
    unset="only where a strategy differs",
)
STEPS: Option[int] = Option(
    "steps",
    40,
    (BENCH_STEP,),
    *positive(MAX_STEPS),
    example="40",
    help="The number of timed steps of each loop.",
)
PEER: Option[str | None] = Option(
    "peer",
    None,
    (BENCH_STEP,),
    *one_of("torchtitan"),
    example="torchtitan",
    help="Another trainer's step of the same shapes, in turns with the lab's; it is installed separately, and needs a "
    "GPU.",
    unset="none",
)
MINUTES: Option[tuple[float, ...]] = Option(
    "minutes",
    (10.0,),
    (SOAK,),
    "a number of minutes",
    lambda text: None if "," in text else times(text),
    example="20",
    help="How long each strategy is trained without kills; the runs with kills make as many steps.",
    unset="10",
)
MTBF_S: Option[tuple[float, ...]] = Option(
    "mtbf_s",
    (60.0,),
    (SOAK,),
    "one or several numbers of seconds",
    times,
    example="300",
    help="The mean time between two kills, in seconds; several values, as 60,300, make a run each.",
    unset="60",
)
LIMIT_S: Option[int] = Option(
    "limit_s",
    10,
    (DOCTOR,),
    *positive(3600),
    example="60",
    help="How long the doctor may take, in seconds. What has not answered by then is an error.",
)
TOP: Option[int] = Option(
    "top",
    10,
    (PLAN,),
    *positive(MOST_SHOWN),
    example="20",
    help="How many of the best layouts are shown.",
)
TOKENS: Option[float | None] = Option(
    "tokens",
    None,
    (PLAN,),
    "a positive number, as 1e12",
    amount,
    example="1e12",
    help="The tokens of a whole training, for its time, GPU-hours, cost and energy.",
    unset="those of train.steps",
)
CHECK: Option[int] = Option(
    "check",
    0,
    (PLAN,),
    *count(MOST_CHECKED),
    example="5",
    help="How many of the best layouts are proven and run on this machine, and two that lose, to compare with the "
    "prediction.",
)
PRICE: Option[float | None] = Option(
    "price",
    None,
    (PLAN,),
    "a positive number",
    amount,
    example="2.5",
    help="The price of one device in US dollars per hour.",
    unset="hardware.price_usd_per_hour",
)
OPTIONS: tuple[Option[Any], ...] = (
    NPROC,
    PORT,
    RESTARTS,
    FORCE,
    BATCH,
    MAX_MICRO_BATCH_SIZE,
    SKIP_INVALID,
    FRESH,
    LOCATE,
    STEPS,
    PEER,
    MINUTES,
    MTBF_S,
    LIMIT_S,
    TOP,
    TOKENS,
    PRICE,
    CHECK,
    *nodes.OPTIONS,
    *netlab.OPTIONS,
    *measuring_options.OPTIONS,
)
