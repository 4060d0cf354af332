"""What a recorded step shows: intervals, parts without overlap, collectives, memory by kind. Then a real recording."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from train.command import cli
from train.measure import breakdown, out_of_memory, peak
from train.measure.out_of_memory import OutOfMemory
from train.measure.quantiles import median_interval
from train.measure.recording import Recording, read
from train.measure.results import TIME_PARTS
from train.model import spans

REPO = Path(__file__).resolve().parent.parent


def test_interval_arithmetic():
    assert spans.union([(3, 4), (0, 1), (1, 2)]) == [(0, 2), (3, 4)]
    assert spans.union([(0, 1), (1.1, 2)], gap=0.2) == [(0, 2)]
    assert spans.subtract([(0, 10)], [(1, 2), (4, 5), (9, 12)]) == [(0, 1), (2, 4), (5, 9)]
    assert spans.intersect([(0, 3), (5, 8)], [(2, 6)]) == [(2, 3), (5, 6)]
    assert spans.clip([(0, 1), (2, 3), (4, 5)], 2.5, 4.5) == [(2.5, 3), (4, 4.5)]


def event(name, start, end, cat="cpu_op", **args):
    return {"ph": "X", "cat": cat, "name": name, "ts": 1000 * start, "dur": 1000 * (end - start), "args": args}


def memory(at, address, size, total=0, device=0):
    args = {"Addr": address, "Bytes": size, "Total Allocated": total, "Device Type": device}
    return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1000 * at, "args": args}


def region(name, start, end):
    return event(f"lab:{name}", start, end, cat="user_annotation")


# a step of 100 ms that begins at 50: one microbatch, an all-reduce half hidden behind the backward, a wait
CPU_STEP = [
    region("step", 50, 150),
    region("data", 50, 52),
    event("aten::to", 50, 52),
    region("F 0 0", 52, 80),
    event("aten::mm", 52, 80),
    region("B 0 0", 80, 130),
    event("aten::mm", 80, 110),
    region("comm dp_replicate all_reduce 1048576", 100, 101),
    event("gloo:all_reduce", 101, 125, cat="user_annotation"),
    region("optimiser", 130, 145),
    event("aten::add", 130, 145),
]


def test_parts_are_apart_and_together_the_step():
    recording = read(CPU_STEP, "cpu", None)
    found = breakdown.parts(recording)
    sizes = {name: spans.length(intervals) for name, intervals in found.items()}
    wanted = {"data": 2, "forward": 28, "backward": 35, "optimiser": 15, "communication": 15, "other": 5}
    assert sizes == pytest.approx(wanted)
    edges = sorted(interval for intervals in found.values() for interval in intervals)
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(edges))


def test_exposed_time_is_what_the_backward_does_not_hide():
    recording = read(CPU_STEP, "cpu", None)
    rows = breakdown.collectives(recording, breakdown.parts(recording)["communication"])
    assert rows == {"dp_replicate/all_reduce": {"calls": 1, "mib": 1, "ms": pytest.approx(24), "exposed_ms": 15}}
    bandwidths = breakdown.bandwidths({"mib": 1.0, "ms": 24.0}, "all_reduce", 4)
    assert bandwidths["algbw_gb_per_s"] == pytest.approx(2**20 / 24e-3 / 1e9)
    assert bandwidths["busbw_gb_per_s"] == pytest.approx(1.5 * bandwidths["algbw_gb_per_s"])


def test_a_wait_for_a_receive_is_exposed_and_goes_to_the_sends():
    events = [
        region("step", 0, 100),
        region("comm pp send 2097152", 0, 1),
        event("c10d::send", 0, 1),
        event("gloo:send", 1, 3, cat="user_annotation"),
        region("wait", 3, 40),
        event("gloo:recv", 3, 40, cat="user_annotation"),
        region("F 1 0", 40, 100),
        event("aten::mm", 40, 100),
    ]
    recording = read(events, "cpu", None)
    found = breakdown.parts(recording)
    assert spans.length(found["communication"]) == pytest.approx(40)
    rows = breakdown.collectives(recording, found["communication"])
    assert rows["pp/send"]["exposed_ms"] == pytest.approx(40) and rows["pp/send"]["mib"] == 2


def kernel(name, start, end, correlation, **args):
    return event(name, start, end, cat="kernel", correlation=correlation, **args)


def test_a_gpu_step_goes_by_kernels_and_by_who_launched_them():
    nccl = {
        "Collective name": "_allgather_base",
        "Process Group Name": "",
        "dtype": "BFloat16",
        "In msg nelems": 2**18,
        "Out msg nelems": 2**20,
    }
    events = [
        region("step", 0, 100),
        region("F 0 0", 1, 5),
        event("cudaLaunchKernel", 2, 3, cat="cuda_runtime", correlation=1),
        region("B 0 0", 5, 10),
        event("cudaLaunchKernel", 6, 7, cat="cuda_runtime", correlation=2),
        kernel("gemm", 10, 40, 1),
        kernel("gemm_backward", 50, 90, 2),
        kernel("ncclDevKernel_AllGather", 30, 48, 3, **nccl),
    ]
    recording = read(events, "cuda", None)
    sizes = {name: spans.length(i) for name, i in breakdown.parts(recording).items()}
    assert sizes == pytest.approx(
        {"data": 0, "forward": 30, "backward": 40, "optimiser": 0, "communication": 8, "other": 22}
    )
    (row,) = breakdown.collectives(recording, breakdown.parts(recording)["communication"]).values()
    assert row == pytest.approx({"calls": 1, "mib": 2, "ms": 18, "exposed_ms": 8})
    assert breakdown.actions(recording) == [["F", 0, 0, 10, 40], ["B", 0, 0, 50, 90]]


def test_memory_at_its_fullest_by_kind():
    mib = 2**20
    events = [
        region("step", 0, 100),
        region("F 0 0", 0, 40),
        memory(1, 0xA, 4 * mib),  # an activation
        memory(2, 0xB, 2 * mib),  # given back before the peak
        memory(3, 0xB, -2 * mib),
        region("comm tp all_gather 8", 10, 20),
        memory(11, 0xC, 1 * mib),
        region("B 0 0", 40, 80),
        memory(41, 0xB, 3 * mib),  # becomes a gradient
        memory(42, 0xD, 1 * mib),
        memory(43, 0xA, -4 * mib),
        region("optimiser", 80, 100),
    ]
    known = {"parameters": {0x1: 3 * mib}, "optimiser": {0x2: 6 * mib}, "gradients": {0xB: 3 * mib}}
    found = peak.at_peak(read(events, "cpu", None), known)
    wanted = {"parameters": 3, "optimiser": 6, "gradients": 3, "activations": 4, "communication": 1, "temporary": 1}
    assert found["at_peak_mib"] == wanted | {"untracked": 0}
    assert max(size for _, size in found["curve"]) == 18


def test_what_a_gpu_held_before_and_nobody_knows_is_untracked():
    mib = 2**20
    events = [region("step", 0, 10), memory(1, 0xA, mib, total=12 * mib, device=1)]
    known = {"parameters": {0x1: 3 * mib}, "optimiser": {0x2: 6 * mib}, "gradients": {}}
    found = peak.at_peak(read(events, "cuda", None), known)["at_peak_mib"]
    assert (found["untracked"], found["temporary"]) == (2, 1)


def test_the_curve_keeps_its_highest_points():
    curve = [(float(i), i % 1000) for i in range(5000)]
    thin = peak.thinned(curve)
    assert len(thin) <= peak.CURVE_POINTS and max(size for _, size in thin) == 999


def test_interval_of_the_median():
    assert median_interval([float(i) for i in range(1, 101)]) == (40.0, 61.0)  # ranks of the binomial at n = 100
    assert median_interval([3.0, 1.0, 2.0]) == (None, None)
    low, high = median_interval([float(i) for i in range(5000)])
    assert low is not None and high is not None
    assert 2400 < low < 2500 < high < 2600


def test_an_empty_recording_is_all_other():
    sizes = {name: spans.length(i) for name, i in breakdown.parts(Recording(10.0, [], [])).items()}
    assert sizes["other"] == 10 and sum(sizes.values()) == 10


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_run_logs_a_recorded_step(tmp_path):
    """Two ranks of a pipeline, recorded at the tenth step."""
    words = ["strategy=pp", "model.num_layers=2", "train.steps=12", "train.eval_every=0", "metrics.trace=true"]
    words += ["train.micro_batch_size=2"]  # 4 microbatches
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "launch.local", "nproc=2", *words, f"metrics.dir={tmp_path}"]
    run = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr
    assert "USDT" not in run.stdout + run.stderr and "CPUAllocator" not in run.stderr
    (path,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if "time/step_ms" in line)
    assert line["step"] == 10
    parts = sum(line[f"time/{part}_ms"] for part in TIME_PARTS)
    assert parts == pytest.approx(line["time/step_ms"], rel=1e-6)
    assert line["pipeline/bubble_closed_form_pct"] == pytest.approx(20)
    assert 0 < line["pipeline/bubble_pct"] < 100
    assert all("comm/pp/send_mib" in line for line in lines if line["step"] >= 3 and "train/loss" in line)
    sample = json.loads((path / "samples" / "step-10.json").read_text())
    for rank, facts in enumerate(sample["ranks"]):
        kinds = [kind for kind, stage, *_ in facts["timeline"] if stage == rank]
        assert sorted(kinds) == ["B"] * 4 + ["F"] * 4
        assert facts["memory"]["at_peak_mib"]["activations"] > 0
        assert facts["comm"]["pp/send"]["calls"] == 4
        assert (path / "traces" / f"step-10-rank-{rank}.json.gz").stat().st_size > 1000
    summary = json.loads((path / "summary.json").read_text())
    assert (
        summary["perf/tokens_per_s_ci95_low"] <= summary["perf/tokens_per_s"] <= summary["perf/tokens_per_s_ci95_high"]
    )


def test_out_of_memory_is_one_line_of_what_fills_it_and_what_helps():
    config = cli.parse(cli.parser("test", ""), ["strategy=dp", "train.micro_batch_size=2"])[0]
    cpu = torch.device("cpu")
    with pytest.raises(OutOfMemory) as caught, out_of_memory.explained(config, cpu, 1) as watched:
        watched.train_step = mock.Mock(
            state_tensors=lambda: {"parameters": [torch.ones(2**18)], "optimiser": [torch.ones(2**20)]}
        )
        torch.empty(2**62, dtype=torch.uint8)
    text = caught.value.report()
    assert "rank 1 (cpu), which holds optimiser 0.00 GiB, parameters 0.00 GiB" in text and "\n" not in text
    assert "train.micro_batch_size=1 or train.activation_checkpointing=full or precision=bf16" in text
    assert caught.value.exit_code == 3
    recomputed = ["strategy=dp", "train.activation_checkpointing=full"]
    config = cli.parse(cli.parser("test", ""), recomputed)[0]
    assert out_of_memory.remedies(config, built=True)[0] == "train.offload_activations=true"
    with pytest.raises(RuntimeError, match="else"), out_of_memory.explained(config, cpu, 0):
        raise RuntimeError("something else")
