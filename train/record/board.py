"""What TensorBoard is told beside the scalars, so that `tensorboard --logdir runs` alone says which run is fastest,
which fits, and why: hyperparameters with the same columns for every strategy, results, and a page of charts, "Compare".

TensorBoard takes the columns from the first run that it reads, so they are the same for all. A result that is not known
is absent, which shows as an empty cell; NaN would show as a number. Results are written at every step, of the run so
far, so that a run that is killed or still going has them too; they end as the figures of summary.json.

Three habits of TensorBoard decide the rest. It lists groups of tags by name, so what explains a result stands under
`why`, behind the results. The axis of a chart leaves out what is below the 5th or above the 95th percentile of all
values drawn, so a chart has one line a run, and a sampled step's values are written for the steps before it too: one
point among many would be left out. It smooths all charts but those "with margins", so Compare has these, which show
the last value as it is.
"""

from __future__ import annotations

import math
import time
from typing import Any

from train.config.plan import Plan
from train.config.schema import Config
from train.measure.results import (
    LOSS,
    VALIDATION_LOSS,
    Record,
    Results,
    by_axis,
    exposed_pct,
    memory_at_peak,
    state_mib,
    time_parts,
)
from train.record.tags import shown_as

Hparams = dict[str, str | float]

# tag -> the column's title; TensorBoard shows five columns of results at first, so the first five must say the most
RESULTS = {
    "result/tokens_per_s": "tokens/s",
    "result/memory_gib": "memory, GiB",
    "result/held_mib": "held between steps, MiB",
    "result/exposed_communication_pct": "exposed communication, %",
    "result/bubble_pct": "bubble, %",
    "result/validation_loss": "validation loss",
    "result/train_loss": "training loss",
    "result/step_ms": "step, ms",
    "result/sent_mib": "sent a step, MiB",
    "result/mfu_pct": "MFU, %",
    "result/peak_tensors_mib": "tensors at the peak, MiB",
}
RESULT_OF_VALIDATION = "result/validation_loss"  # written with the loss that it is, not at every step
# The same of hyperparameters: those said to differ come first, the others after them by name.
FIRST_COLUMNS = ("layout", "micro_batch", "schedule", "strategy", "world_size")

MEDIANS = ("perf/tokens_per_s", "perf/step_ms", "perf/mfu_pct")

# Of a sampled step, for which they stand together with the steps since the sample before. Not time/step_ms, which says
# that a step was sampled.
OF_SAMPLES = r"(time/(?!step_ms)|pipeline/)"
MOST_POINTS = 10  # for one sample

# Title -> tags of metrics.jsonl and results: a line, or a line and the two edges of a band.
BUBBLE = "pipeline bubble, %: the line is measured, the band reaches to what the schedule alone costs"
CHARTS: dict[str, tuple[str, ...]] = {
    BUBBLE: ("pipeline/bubble_pct", "pipeline/bubble_theory_pct", "pipeline/bubble_pct"),  # only of pipelines
    "throughput: tokens per second, median so far": ("result/tokens_per_s",),
    "throughput: step, ms, median so far": ("result/step_ms",),
    "loss: training": ("train/loss",),
    "loss: validation": ("validation/loss",),
    "memory: held between steps by the largest rank, MiB": ("result/held_mib",),
    "memory: all tensors at the peak of the fullest rank, MiB": ("result/peak_tensors_mib",),
    "memory: peak allocated on a GPU, resident on a CPU, GiB": ("result/memory_gib",),
    "communication: sent a step, MiB": ("result/sent_mib",),
    "communication: exposed, ms of a step": ("time/communication_ms",),
    "time of a step: forward, ms": ("time/forward_ms",),
    "time of a step: backward, ms": ("time/backward_ms",),
    "time of a step: optimiser, ms": ("time/optimiser_ms",),
}


def hparams(config: Config, world_size: int, device: str) -> Hparams:
    """The same keys for every strategy: degrees are 1, and the schedule "-", where a strategy has none."""
    plan, train = Plan(config, world_size), config.train
    degrees = plan.degrees | {"ep": plan.ep}
    return {
        "strategy": config.strategy.name,
        "layout": " ".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree > 1) or "-",
        "world_size": world_size,
        **degrees,
        "schedule": plan.config.strategy.schedule_name() or "-",
        "micro_batch": train.micro_batch_size,
        "activation_checkpointing": train.activation_checkpointing.value,
        "compile": config.compile.mode.value if config.compile.enabled else "off",
        "precision": config.precision.value,
        "model": config.model.name,
        "global_batch": train.global_batch_size,
        "seq_len": train.seq_len,
        "optimiser": config.optim.name.value,
        "lr": config.optim.lr,
        "device": device,
    }


def steps_of_sample(before: int, step: int) -> list[int]:
    """The steps that the sample of this one stands for, of those since the sample `before`: this one is the last."""
    points = min(step - before, MOST_POINTS)
    return [before + (step - before) * i // points for i in range(1, points + 1)]


class ResultsSoFar:
    """The results of a run so far: medians of the measured steps, peaks, and the newest of everything else (which
    records count says train/measure/results.py). Medians are found anew whenever there is 1 % more to find them of, so
    that a long run does not sort all of its steps at each."""

    def __init__(self, warmup_steps: int) -> None:
        self.of_run, self.due = Results(warmup_steps), 0
        self.medians: Record = {}

    def add(self, values: Record) -> Record:
        """The results after these values."""
        self.of_run.add(values)
        if self.of_run.num_steps >= self.due:
            self.due = self.of_run.num_steps + max(self.of_run.num_steps // 100, 1)
            found = {tag: self.of_run.median(tag) for tag in MEDIANS}
            self.medians = {tag: median for tag, median in found.items() if median is not None}
        return self.results({})

    def results(self, known: dict[str, Any]) -> Record:
        """The results, with figures that are known better put in for those of the steps."""
        return results(self.of_run.latest | self.of_run.largest | self.medians | known)


def results(values: dict[str, Any]) -> Record:
    """Those of RESULTS that are known from a run's figures, under the tags of metrics.jsonl and summary.json."""
    sent, at_peak = by_axis(values), memory_at_peak(values)
    found = {
        "tokens_per_s": values.get("perf/tokens_per_s"),
        "step_ms": values.get("perf/step_ms"),
        "held_mib": state_mib(values),
        "memory_gib": values.get("memory/peak_allocated_gib", values.get("memory/resident_gib")),
        "exposed_communication_pct": exposed_pct(time_parts(values)),
        "bubble_pct": values.get("pipeline/bubble_pct"),
        "sent_mib": sum(sent.values()) if sent else None,
        "validation_loss": values.get(VALIDATION_LOSS),
        "train_loss": values.get(LOSS),
        "mfu_pct": values.get("perf/mfu_pct"),
        "peak_tensors_mib": sum(at_peak.values()) if at_peak else None,
    }
    return {f"result/{name}": value for name, value in found.items() if value is not None and math.isfinite(value)}


def start_summary(values: Hparams) -> Any:
    """A Summary with the columns, this run's hyperparameters, and the charts: all that a run that is killed needs."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
    from torch.utils.tensorboard.summary import custom_scalars

    words = {name: as_text(value) for name, value in values.items()}
    columns = [
        api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_STRING, differs=name in FIRST_COLUMNS) for name in words
    ]
    found = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=title) for tag, title in RESULTS.items()]
    start = SessionStartInfo(start_time_secs=time.time())
    for name, word in words.items():
        start.hparams[name].string_value = word
    experiment = HParamsPluginData(
        version=metadata.PLUGIN_DATA_VERSION,
        experiment=api_pb2.Experiment(hparam_infos=columns, metric_infos=found),
    )
    session = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, session_start_info=start)
    summary = Summary(
        value=[
            _without_value(metadata.EXPERIMENT_TAG, experiment),
            _without_value(metadata.SESSION_START_INFO_TAG, session),
        ]
    )
    # One category, as others start folded. Backwards, as the page puts each chart "with margins" before the one that it
    # drew last. TensorBoard merges the layouts of all runs and appends what the first run lacks: so the chart that only
    # pipelines have is the last one in every layout, and the first on the page.
    charted = [title for title in CHARTS if title != BUBBLE or values.get("schedule", "-") != "-"]
    charts = {title: ["Margin", _edges(*map(shown_as, CHARTS[title]))] for title in reversed(charted)}
    summary.MergeFrom(custom_scalars({"Compare": charts}))
    return summary


def _edges(value: str, lower: str | None = None, upper: str | None = None) -> list[str]:
    return [value, lower or value, upper or value]


def as_text(value: str | float) -> str:
    """A number as TensorBoard's table must have it: as a number, 4 ranks would be 4.0000; as text, 16 would be sorted
    before 4, but for the blanks in front, which the page does not show."""
    return f"{value:>8}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value


def end_summary() -> Any:
    """A Summary that says that the run is complete; without it, it is running or was ended."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, session_end_info=end)
    return Summary(value=[_without_value(metadata.SESSION_END_INFO_TAG, data)])


def _without_value(tag: str, data: Any) -> Any:
    """The hparams plug-in keeps what it knows in a tag's metadata."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams.metadata import PLUGIN_NAME

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=data.SerializeToString())
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
