"""The table of keys that only some runs read, and its rules. Keys of strategies have tables of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePath

from train.config.groups.run import AUTO, NEVER
from train.config.rules.idle import Condition, Table, rules
from train.config.schema import Config

ENDINGS = {
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **dict.fromkeys((".bin", ".npy", ".idx"), "tokens"),
}


def _to(*lines: str) -> Callable[[Config], tuple[str, ...]]:
    return lambda config: lines


def _of_data(*sources: str, says: str = "") -> Condition:
    def fixes(config: Config) -> tuple[str, ...]:
        likely = ENDINGS.get(PurePath(config.data.path or "").suffix.lower(), "text")
        field = {"jsonl": " data.field=text"}  # the preset data=jsonl sets it too
        ordered = sorted(sources, key=lambda source: source != likely)
        return tuple(f"data.source={source}{field.get(source, '')}" for source in ordered[:2])

    return Condition(("data.source",), lambda source: source in sources, f"is not read by data={{}}{says}", fixes)


def _of_optimiser(*names: str) -> Condition:
    says = f"is not read by optim={{}}, only by {' and '.join(f'optim={name}' for name in names)}"
    return Condition(("optim.name",), lambda chosen: chosen in names, says)


def _of_balance(name: str) -> Condition:
    return Condition(
        ("model.num_experts", "model.balance"),
        lambda experts, balance: experts != 0 and balance == name,
        f"is not read with model.num_experts={{}} and model.balance={{}}, only by a mixture of experts with "
        f"model.balance={name}",
        _to(f"model.balance={name}"),
    )


MIXTURE = Condition(
    ("model.num_experts",),
    lambda experts: experts != 0,
    "is not read by a dense model (model.num_experts={}), only by a mixture of experts, as model=moe_tiny is",
)
DENSE = Condition(
    ("model.num_experts",),
    lambda experts: experts == 0,
    "is not read by a mixture of experts (model.num_experts={}), whose width is model.expert_ffn_dim",
)

READ_WHEN: Table = {
    **dict.fromkeys(("model.top_k", "model.num_shared_experts", "model.expert_ffn_dim"), MIXTURE),
    **dict.fromkeys(("model.score_function", "model.balance"), MIXTURE),
    "model.ffn_dim": DENSE,
    "model.aux_loss_coef": _of_balance("aux_loss"),
    "model.bias_update_rate": _of_balance("bias"),
    "data.path": _of_data("text", "jsonl", "tokens", says=", which has its own text"),
    "data.dtype": _of_data("tokens"),
    "data.glob": _of_data("text", "jsonl"),
    "data.field": _of_data("jsonl"),
    "optim.momentum": _of_optimiser("sgd"),
    **dict.fromkeys(("optim.beta1", "optim.beta2", "optim.eps"), _of_optimiser("adamw", "adamw8bit")),
    "optim.min_lr_ratio": Condition(
        ("optim.schedule",),
        lambda schedule: schedule != "constant",
        "is not read with optim.schedule={}, under which the learning rate does not fall",
        _to("optim.schedule=cosine"),
    ),
    **dict.fromkeys(
        ("checkpoint.keep", "checkpoint.mode"),
        Condition(
            ("checkpoint.every",),
            lambda every: every != 0,
            "has no effect with checkpoint.every={}, which saves nothing",
            _to("checkpoint.every=500"),
        ),
    ),
    "train.keep_zeros": Condition(
        ("checkpoint.weights", "checkpoint.resume"),
        lambda weights, resume: weights is not None or resume not in (AUTO, NEVER),
        "has no effect with checkpoint.weights={} and checkpoint.resume={}, as parameters that are drawn have no zeros",
    ),
    "train.fp8_scaling": Condition(
        ("precision",),
        lambda precision: precision == "fp8",
        "is not read with precision={}",
        _to("precision=fp8"),
    ),
    **dict.fromkeys(
        ("train.distil_weight", "train.distil_temperature"),
        Condition(("train.teacher",), lambda teacher: teacher is not None, "is not read without train.teacher"),
    ),
    "metrics.trace": Condition(
        ("metrics.profile_every",),
        lambda every: every != 0,
        "keeps nothing with metrics.profile_every={}, which records no step",
        _to("metrics.profile_every=500"),
    ),
    "metrics.memory_snapshot": Condition(
        ("runtime.device",),
        lambda device: device in ("auto", "cuda"),
        "writes nothing with runtime.device={}, as only CUDA devices have such snapshots",
        _to("runtime.device=auto"),
    ),
    "hardware.match": Condition(
        (), lambda: False, "is not read on the command line: only files in configs/hardware use it"
    ),
}
# Keys that do not change the numbers of some runs, but are not refused. A key that only a longer run would read is
# valid, so that a command line can be tried for a few steps. A model's name and max_seq_len never change a number.
DECIDES_NUMBERS_WHEN: Table = {
    **dict.fromkeys(
        ("optim.schedule", "optim.min_lr_ratio"),
        Condition(("optim.warmup_steps", "train.steps"), lambda warmup, steps: warmup < steps),
    ),
    **dict.fromkeys(("model.name", "model.max_seq_len"), Condition((), lambda: False)),
}

RULES = rules(READ_WHEN)
