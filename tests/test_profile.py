"""Measured profiles: their tables, and what the planner makes of them."""

import dataclasses
import json
import math

import pytest
import yaml

from launch import predict
from launch.checking import records
from scripts.calibrating import profile_file, roofline, table
from scripts.calibrating.profile_file import Known
from tests.plans import plan_of
from tests.synthetic_runs import SAMPLED, make_run
from train.command.planning import constants, measured
from train.command.planning import profile as profiles
from train.command.planning.job import missing_figures, of_plan
from train.command.planning.profile import OPS, Profile, between, profile_of
from train.command.planning.quantities import quantities
from train.command.planning.step_time import ADAM_BYTES, step_time
from train.config.problems import BadInput
from train.config.schema import HardwareConfig

BASE = "model=small train.seq_len=512 train.micro_batch_size=2 train.global_batch_size=8"
COMPUTE = {
    "copy": [[1e6, 20.0], [1e9, 10.0]],
    "optimiser": [[1e6, 20.0], [1e9, 10.0]],
    "products_float32": [[1024, 1024, 1024, 0.1]],
    "attention_float32": [[24, 512, 64, 0.05, 0.05]],
    "layer_float32": [[1e6, 5.0, 5.0]],
    "loss_float32": [[1e6, 5.0, 5.0]],
}
MESSAGES = {f"{op}_float32": [[2, 4096, 100.0], [2, 2**24, 16_777.0]] for op in OPS}
OVERLAP = {f"overlap_{op}": [[2, 1.0]] for op in OPS[:3]}
PROFILE = COMPUTE | MESSAGES | OVERLAP


def plan(line, tables=PROFILE):
    found = plan_of(f"{BASE} {line}")
    hardware = HardwareConfig(name="mine", measured=tables)
    return dataclasses.replace(found, config=dataclasses.replace(found.config, hardware=hardware))


def predicted(line, tables=PROFILE):
    return step_time(quantities(of_plan(plan(line, tables))), constants.load())


def test_figures_between_points_are_those_of_straight_lines_in_log_space():
    rows = [[1, 10.0], [100, 1000.0]]
    assert between(rows, [10]) == (pytest.approx(100.0),)
    assert between(rows, [0.1]) == (pytest.approx(10.0),)
    assert between(rows, [1e6]) == (pytest.approx(1000.0),)


def test_a_measured_point_has_its_own_figures_and_others_lie_between_them():
    rows = [[1, 1, 1, 5.0], [2, 2, 2, 10.0], [4, 4, 4, 40.0]]
    assert between(rows, [2, 2, 2]) == (10.0,)
    (middle,) = between(rows[:2], [math.sqrt(2)] * 3)
    assert middle == pytest.approx(math.sqrt(50))


def test_no_product_is_faster_than_the_fastest_that_was_measured():
    rows = [[256, 256, 256, 50.0], [4096, 4096, 4096, 700.0], [16384, 2048, 2048, 650.0], [2048, 2048, 16384, 600.0]]
    profile = Profile({"products_bf16": rows}, "bf16", False)
    for shape in ((1, 1, 1), (300, 300, 300), (8192, 8192, 8192), (10**6, 10**6, 10**6), (16384, 2048, 2048)):
        assert 50e12 <= profile.product_rate(*shape) <= 700e12
    assert profile.product_rate(16384, 2048, 2048) == pytest.approx(650e12)


def test_a_message_costs_latency_then_bandwidth():
    profile = Profile(MESSAGES, "float32", False)
    assert profile.message_seconds("all_reduce", 2, 8, "float32") == pytest.approx(100e-6)
    assert profile.message_seconds("all_reduce", 2, 2**26, "bf16") == pytest.approx(4 * 16_777e-6)
    assert profile.message_seconds("all_reduce", 4, 8, "float32") is None


def test_the_optimiser_is_a_line_of_latency_and_bandwidth():
    latency, each = 4e5, 5e-4  # 400 us, and 2,000 GB/s, in the unit of bytes / (GB/s)
    rows = [[size, size / (latency + each * size)] for size in (2**24, 2**28, 2**30)]
    profile = Profile({"optimiser": rows}, "bf16", False)
    for size in (2**20, 2**26, 2**33):
        assert profile.optimiser_rate(size) == pytest.approx(1e9 * size / (latency + each * size))
    assert profile.optimiser_rate(2**37) is None, "128 times the largest"
    alone = Profile({"optimiser": rows[:1]}, "bf16", False)
    assert alone.optimiser_rate(2**25) == pytest.approx(1e9 * rows[0][1])
    assert alone.optimiser_rate(2**27) is None, "one size has no line"
    assert Profile({}, "bf16", False).optimiser_rate(1) is None


def test_a_small_optimiser_that_stays_in_a_cache_says_nothing_of_a_large_one():
    assert profiles.line([(1e6, 1.0), (1e9, 2000.0)]) is None, "its latency would be negative"
    assert profiles.line([(1e6, 2.0), (1e9, 1.0)]) is None, "its bandwidth would be negative"
    cached = Profile({"optimiser": [[4e6, 26.0], [3.2e7, 22.0]]}, "bf16", False)
    assert cached.optimiser_rate(1e9) == pytest.approx(22e9)
    between = cached.optimiser_rate(1e7)
    assert between is not None and 22e9 < between < 26e9


def test_without_a_measured_optimiser_its_time_is_that_of_the_memory():
    tiny = {name: rows for name, rows in PROFILE.items() if name != "optimiser"} | {"optimiser": [[4096, 0.001]]}
    line = "strategy=single nproc=1"
    updated = max(stage.updated_bytes for stage in quantities(of_plan(plan(line))).kinds)
    copied = between(PROFILE["copy"], (updated,))[0] * 1e9
    assert predicted(line, tiny).optimiser == pytest.approx(ADAM_BYTES * updated / copied)
    published = HardwareConfig(name="mine", measured=tiny, memory_gb_per_s=100.0)
    found = plan(line)
    job = of_plan(dataclasses.replace(found, config=dataclasses.replace(found.config, hardware=published)))
    assert step_time(quantities(job), constants.load()).optimiser == pytest.approx(ADAM_BYTES * updated / 100e9)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"copies": [[1.0, 2.0]]}, "hardware.measured.copies is not a table"),
        ({"copy": []}, "hardware.measured.copy is not a list of rows"),
        ({"copy": 3}, "hardware.measured.copy is not a list of rows"),
        ({"copy": [[1.0]]}, "has the row [1.0], but a row has 2 positive numbers"),
        ({"copy": [[1.0, 0.0]]}, "has the row [1.0, 0.0]"),
        ({"products_bf16": [[1.0, 1.0, 1.0, math.nan]]}, "has the row"),
        ({"send_bf16": [["a", 1.0, 1.0]]}, "has the row ['a', 1.0, 1.0], but a row has 3 positive numbers"),
    ],
)
def test_a_wrong_table_is_named(tables, said):
    with pytest.raises(BadInput) as raised:
        profile_of(HardwareConfig(name="mine", measured=tables), "float32", False)
    assert said in str(raised.value) and raised.value.exit_code == 2


def test_what_a_profile_lacks_is_named():
    assert missing_figures(of_plan(plan("strategy=dp nproc=2"))) == []
    without = {name: rows for name, rows in PROFILE.items() if name != "layer_float32"}
    assert missing_figures(of_plan(plan("strategy=dp nproc=2", without))) == ["measured.layer_float32"]
    assert missing_figures(of_plan(plan("strategy=dp nproc=2", COMPUTE))) == ["messages between 2 ranks"]
    assert missing_figures(of_plan(plan("strategy=dp nproc=4"))) == ["messages between 4 ranks"]


def test_products_take_their_measured_rates():
    slow = PROFILE | {"products_float32": [[1024, 1024, 1024, 0.05]]}
    q = quantities(of_plan(plan("strategy=single nproc=1")))
    assert q.profile is not None
    forward, backward = measured.layer_time(q, q.profile)
    assert forward.products == pytest.approx(2 * q.work.forward.volume / 1e11)
    assert backward.products == pytest.approx(2 * q.work.backward.volume / 1e11)
    assert predicted("strategy=single nproc=1", slow).compute > 1.7 * predicted("strategy=single nproc=1").compute


def test_compiled_layers_take_the_rates_of_compiled_ones():
    fast = PROFILE | {"layer_float32_compiled": [[1e6, 50.0, 50.0]]}
    compiled = "strategy=single nproc=1 compile.enabled=true"
    assert predicted(compiled, fast).compute < predicted("strategy=single nproc=1", fast).compute
    assert predicted(compiled).compute == predicted("strategy=single nproc=1").compute, "nothing compiled was measured"


def test_messages_that_hide_nothing_are_added_and_others_hide():
    blocking = predicted("strategy=fsdp nproc=2").exposed["dp"]
    beside = predicted("strategy=fsdp nproc=2", PROFILE | {f"overlap_{op}": [[2, 0.0]] for op in OPS[:3]})
    assert blocking > 0 and beside.exposed["dp"] == 0
    traffic = [m for m in quantities(of_plan(plan("strategy=fsdp nproc=2"))).kinds[0].messages if m.calls]
    profile = Profile(PROFILE, "float32", False)
    each = [profile.message_seconds(m.op, 2, m.bytes / m.calls, "float32") or math.nan for m in traffic]
    assert blocking == pytest.approx(sum(m.calls * seconds for m, seconds in zip(traffic, each, strict=True)))


def test_fsdp_copies_what_it_gathers():
    q = quantities(of_plan(plan("strategy=fsdp nproc=2")))
    alone = quantities(of_plan(plan("strategy=single nproc=1")))
    matrices = q.work.matrices
    elements = sum(columns * depth for columns, depth in matrices)
    assert measured.weight_bytes(q, matrices) == (8 * elements, (8 + 6 + 8) * elements)
    assert measured.weight_bytes(alone, matrices) == (0.0, 12 * elements * 3 / 4)


def test_a_profile_is_written_and_read_again(tmp_path):
    published = HardwareConfig(
        name="h", peak_tflops={"float32": 0.4}, price_usd_per_hour=2.0, source={"peak_tflops": "x"}
    )
    machine = {"device": "cpu", "world_size": 2, "omp_threads": 1, "torch": "2.13", "commit": "abc"}
    known = Known("mine", published, PROFILE, machine)
    profile_file.write(known, str(tmp_path))
    values = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    assert values["measured"] == {name: [[float(x) for x in row] for row in rows] for name, rows in PROFILE.items()}
    assert values["matmul_tflops"] == {"float32": 0.1} and values["match"] == "cpu"
    assert "price_usd_per_hour" not in values, "a price is the user's"
    shown = "\n".join(table.lines(known, None))
    assert "25.0" in shown and "5.56" in shown, "0.1 of 0.4 TFLOP/s; 2 / 3,600 / 0.0001 PFLOP/s"
    faster = dataclasses.replace(known, tables=PROFILE | {"products_float32": [[1024, 1024, 1024, 0.2]]})
    assert " 2.0" in "\n".join(table.lines(faster, known))
    pytest.importorskip("matplotlib")
    roofline.draw(known, str(tmp_path / "r.svg"))
    assert (tmp_path / "r.svg").stat().st_size > 1000


def test_a_price_is_for_a_pflop():
    assert table.dollars_per_pflop(3.6, 1.0) == pytest.approx(1.0), "0.001 $ a second, 0.001 PFLOP a second"


def test_predicted_parts_add_up_to_the_step():
    for line in ("strategy=pp nproc=2", "strategy=fsdp nproc=2", "strategy=tp nproc=2"):
        step = predicted(line)
        parts = records.predicted(step)
        assert sum(parts.values()) == pytest.approx(1e3 * step.total)
    assert records.PIPELINE in records.predicted(predicted("strategy=pp nproc=2"))


def test_predicted_beside_measured(tmp_path, capsys, monkeypatch):
    path = make_run(tmp_path, "tp")  # ordinary steps take 106 to 112 ms
    run = records.read(path)
    assert (run.overrides, run.world_size) == (("strategy=tp",), 2)
    assert run.parts == {} or sum(run.parts.values()) == pytest.approx(run.step_ms, rel=0.01)
    words = ["hardware=h100_sxm", "precision=bf16", "hardware=a100_sxm"]
    monkeypatch.setattr("sys.argv", ["predict", str(path), *words])
    predict.main()
    said = capsys.readouterr().out
    assert "exposed tp" in said and all(f"{x}_sxm: mean error of the step" in said for x in ("h100", "a100"))


@pytest.mark.parametrize(("device", "slowed", "scale"), [("a card", 125.0, 450 / 535), ("cpu", 0.0, 450 / 660)])
def test_what_recording_adds_is_taken_from_other_where_the_host_records(tmp_path, device, slowed, scale):
    path = make_run(tmp_path, "fsdp", steps=12, ms=441.5)  # the median of steps 6 to 12 without the recorded one is 450
    work = json.loads((path / "work.json").read_text()) | {"device": device}
    (path / "work.json").write_text(json.dumps(work))
    early = {"forward": 150.0, "backward": 300.0, "communication": 200.0, "optimiser": 5.0, "other": 5.0}
    late = {"forward": 180.0, "backward": 340.0, "communication": 25.0, "optimiser": 15.0, "other": 100.0}
    ranks = [{"rank": i, "step_ms": 660.0, "parts_ms": parts, "comm": {}} for i, parts in enumerate((early, late))]
    (path / "samples" / f"step-{SAMPLED}.json").write_text(json.dumps({"step": SAMPLED, "ranks": ranks}))
    run = records.read(path)
    assert (run.step_ms, run.slowed_ms) == (pytest.approx(450), slowed) and run.scale == pytest.approx(scale)
    assert run.parts["compute"] == pytest.approx(520 * scale), "of the rank that waits least"
    assert run.parts["other"] == pytest.approx((125 - slowed) * scale), "what is in no message's name is other"
    assert sum(run.parts.values()) == pytest.approx(450)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hardware=h100_sxm"], "no run, or no hardware=NAME"),
        (["{run}"], "no run, or no hardware=NAME"),
        (["{none}", "hardware=h100_sxm"], "is not the folder of a run"),
        (["{run}", "hardware=a_card"], "hardware=a_card does not name a preset"),
        (["{run}", "hardware=l40s"], "hardware=l40s has no"),
    ],
)
def test_what_cannot_be_predicted_is_one_message(tmp_path, capsys, monkeypatch, words, said):
    places = {"run": make_run(tmp_path, "tp"), "none": tmp_path / "none"}
    monkeypatch.setattr("sys.argv", ["predict", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as ended:
        predict.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err
