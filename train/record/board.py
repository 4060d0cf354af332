"""What TensorBoard gets beside the scalars: hyperparameters, results, and a page of charts named "Compare". With them
`tensorboard --logdir runs` shows which run is fastest, which fits into memory, and why.

TensorBoard takes the columns of its table from the first run that it reads, so all runs have the same columns. An
unknown result is not written, and its cell is empty; NaN would be shown as a number. Results of the run so far are
written at every step, so that a running or killed run has them too. The last ones equal the figures of summary.json.

Three properties of TensorBoard decide the rest:
1. It sorts groups of tags by name. So the tags that explain a result are under `why`, after the results.
2. The axis of a chart omits values below the 5th and above the 95th percentile of all values in it. A single point
   among many would be omitted. So a chart has one line for each run, and the values of a sampled step are also written
   for the steps before it.
3. It smooths all charts except those "with margins". So Compare uses these, and shows the true last value.
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

# tag -> title of the column; TensorBoard shows five columns of results at first, so the most important are first
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
RESULT_OF_VALIDATION = "result/validation_loss"  # written when there is a new validation loss, not at every step
# Columns of hyperparameters: those marked as differing come first, then the others by name.
FIRST_COLUMNS = ("layout", "micro_batch", "schedule", "strategy", "world_size")

MEDIANS = ("perf/tokens_per_s", "perf/step_ms", "perf/mfu_pct")

# Tags of a sampled step that are also written for the steps since the previous sample. time/step_ms is not one of them,
# because it marks the steps that were sampled.
OF_SAMPLES = r"(time/(?!step_ms)|pipeline/)"
MOST_POINTS = 10  # written for one sample

# Title -> tags of metrics.jsonl and results: one tag for a line, or three for a line and the two edges of a band.
BUBBLE = "pipeline bubble, %: the line is measured, the band reaches to what the schedule alone costs"
CHARTS: dict[str, tuple[str, ...]] = {
    BUBBLE: ("pipeline/bubble_pct", "pipeline/bubble_theory_pct", "pipeline/bubble_pct"),  # only pipelines have it
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
    """The hyperparameters, with the same keys for every strategy. An axis that a strategy does not have has degree 1,
    and a missing schedule is "-"."""
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
        "compile": "on" if config.compile.enabled else "off",
        "precision": config.precision.value,
        "model": config.model.name,
        "global_batch": train.global_batch_size,
        "seq_len": train.seq_len,
        "optimiser": config.optim.name.value,
        "lr": config.optim.lr,
        "device": device,
    }


def steps_of_sample(before: int, step: int) -> list[int]:
    """The steps for which the values of the sample at `step` are written: some of those after the previous sample, at
    step `before`, and `step` itself as the last."""
    points = min(step - before, MOST_POINTS)
    return [before + (step - before) * i // points for i in range(1, points + 1)]


class ResultsSoFar:
    """The results of a run so far: medians of the measured steps, peaks, and the newest value of everything else.
    train/measure/results.py defines which records count. The medians are computed again only when there are 1 % more
    steps, so that a long run does not sort all of its steps at every step."""

    def __init__(self, warmup_steps: int) -> None:
        self.of_run, self.due = Results(warmup_steps), 0
        self.medians: Record = {}

    def add(self, values: Record) -> Record:
        """Add the values of a record. Returns the results with them."""
        self.of_run.add(values)
        if self.of_run.num_steps >= self.due:
            self.due = self.of_run.num_steps + max(self.of_run.num_steps // 100, 1)
            found = {tag: self.of_run.median(tag) for tag in MEDIANS}
            self.medians = {tag: median for tag, median in found.items() if median is not None}
        return self.results({})

    def results(self, known: dict[str, Any]) -> Record:
        """The results. The `known` values replace those from the steps."""
        return results(self.of_run.latest | self.of_run.largest | self.medians | known)


def results(values: dict[str, Any]) -> Record:
    """The known values of RESULTS, from a run's figures under the tags of metrics.jsonl and summary.json."""
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
    """A Summary with the columns, the hyperparameters of this run, and the charts. It is written at the start, so that
    a killed run has it too."""
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
    # There is one category, because further ones would be closed at first. The order is reversed, because the page puts
    # each chart "with margins" before the previous one. TensorBoard merges the layouts of all runs, and appends charts
    # that the first run does not have. So the chart that only pipelines have is last in the layout, and first on the
    # page.
    charted = [title for title in CHARTS if title != BUBBLE or values.get("schedule", "-") != "-"]
    charts = {title: ["Margin", _edges(*map(shown_as, CHARTS[title]))] for title in reversed(charted)}
    summary.MergeFrom(custom_scalars({"Compare": charts}))
    return summary


def _edges(value: str, lower: str | None = None, upper: str | None = None) -> list[str]:
    return [value, lower or value, upper or value]


def as_text(value: str | float) -> str:
    """A value as text for TensorBoard's table. As a number, 4 ranks would be shown as 4.0000. As plain text, 16 would
    be sorted before 4; the blanks in front prevent this, and the page does not show them."""
    return f"{value:>8}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value


def end_summary() -> Any:
    """A Summary that marks the run as complete. A run without it is still running or was stopped."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

    end = SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    data = HParamsPluginData(version=metadata.PLUGIN_DATA_VERSION, session_end_info=end)
    return Summary(value=[_without_value(metadata.SESSION_END_INFO_TAG, data)])


def _without_value(tag: str, data: Any) -> Any:
    """A tag without a value: the hparams plug-in stores its data in the metadata of the tag."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams.metadata import PLUGIN_NAME

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=data.SerializeToString())
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))
