"""Energy and cost: the arithmetic, which rank reads which counter, and no values without a sensor or a price."""

import json
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from train.command import cli, presets
from train.command.validate import validate
from train.config.strategy import StepResult
from train.config.world import World
from train.measure import hardware
from train.measure.energy import Energy, costs, device_id, first_of_each, open_meter
from train.measure.metrics import Metrics
from train.measure.sampling import Sampled
from train.ranks.side_group import SideGroup
from train.record.sinks import JsonLines

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
BOARDS = {"GPU-aaaa": 5_000_000, "GPU-bbbb": 9_000_000}  # mJ since the driver was loaded


def parse(*overrides):
    return cli.parse(cli.parser("test", ""), list(overrides))[0]


def known_costs(**changes):
    figures = {
        "tokens_per_step": 4000, "tokens_per_s": 50_000.0, "num_devices": 2, "joules_per_step": 100.0,
        "price_usd_per_hour": 2.5, "grid_gco2_per_kwh": 360.0,
    }  # fmt: skip
    return costs(**figures | changes)


def test_arithmetic():
    values = known_costs()
    # 5 dollars an hour buy 180 million tokens; a million tokens are 250 steps, 25 kJ, 1/144 kWh
    assert values.pop("cost/usd_per_million_tokens") == pytest.approx(5 / 180)
    assert values.pop("cost/gco2_per_million_tokens") == pytest.approx(360 / 144)
    assert values == {"energy/joules_per_step": 100.0, "energy/tokens_per_joule": 40.0}


def test_what_is_not_known_is_left_out():
    assert known_costs(joules_per_step=None).keys() == {"cost/usd_per_million_tokens"}
    assert known_costs(price_usd_per_hour=None, grid_gco2_per_kwh=None).keys() == {
        "energy/joules_per_step", "energy/tokens_per_joule"
    }  # fmt: skip
    assert known_costs(joules_per_step=None, price_usd_per_hour=None) == {}


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """Imitates NVML with two boards, and torch, which sees the boards in CUDA_VISIBLE_DEVICES in that order."""
    module: Any = ModuleType("pynvml")
    module.counters = dict(BOARDS)
    module.NVMLError = NVMLError

    def handle(uuid):
        if uuid not in module.counters:
            raise NVMLError("Not Found")
        return uuid

    def energy(uuid):
        if module.counters[uuid] is None:
            raise NVMLError("Not Supported")
        return module.counters[uuid]

    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = handle
    module.nvmlDeviceGetTotalEnergyConsumption = energy
    module.nvmlSystemGetDriverVersion = lambda: "1.2.3"

    def properties(device):
        import os

        order = [int(i) for i in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return SimpleNamespace(uuid=list(BOARDS)[order[device.index]].removeprefix("GPU-"))

    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(hardware, "device_name", lambda device: "NVIDIA H100 80GB HBM3" if device == GPU else "cpu")
    monkeypatch.setattr("train.measure.energy.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return module


@pytest.mark.parametrize(("visible", "board"), [("0,1", "GPU-aaaa"), ("1,0", "GPU-bbbb"), ("1", "GPU-bbbb")])
def test_the_board_read_is_the_one_that_torch_uses(nvml, monkeypatch, visible, board):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    meter = open_meter(GPU)
    before = meter.read_joules()
    assert before == BOARDS[board] / 1e3
    nvml.counters[board] += 70_000
    after = meter.read_joules()
    assert after is not None and after - before == 70.0
    assert "driver 1.2.3" in meter.note


def test_without_a_sensor_nothing_is_read_and_a_line_says_why(nvml, monkeypatch):
    assert open_meter(CPU).read_joules() is None and "cpu" in open_meter(CPU).note
    nvml.counters["GPU-aaaa"] = None
    assert open_meter(GPU).read_joules() is None and "Not Supported" in open_meter(GPU).note
    del nvml.counters["GPU-aaaa"]  # as a slice of a board (MIG) is not found
    assert open_meter(GPU).read_joules() is None and "Not Found" in open_meter(GPU).note
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what `import` makes of a missing package
    assert open_meter(GPU).read_joules() is None and "strategy-lab[gpu]" in open_meter(GPU).note


def test_a_counter_that_fails_later_ends_the_figure(nvml):
    meter = open_meter(GPU)
    nvml.counters["GPU-aaaa"] = None
    assert meter.read_joules() is None


def test_a_board_that_ranks_share_is_read_once(nvml):
    assert first_of_each(["a", "b", "a", "b"]) == [True, True, False, False]
    assert first_of_each(["", ""]) == [True, True]
    config = parse("metrics.warmup_steps=0")
    labs: list[Any] = [
        SimpleNamespace(world=World(rank, rank, 2, 2, True), gather_json=lambda own: [own] * 2, share=lambda text: text)
        for rank in range(2)
    ]
    ranks = [Energy(config, GPU, lab) for lab in labs]
    nvml.counters["GPU-aaaa"] += 600_000
    joules = [energy.step_done(1, 2000.0) for energy in ranks]
    assert joules == [600.0, 0.0]
    assert ranks[0].num_devices == 1
    assert ranks[0].values(joules, 1024 / 2)["energy/joules_per_step"] == 600.0
    assert device_id(GPU) == "GPU-aaaa"


def test_energy_is_a_mean_after_warm_up_without_evaluations(nvml):
    config = parse("metrics.warmup_steps=2", "hardware.grid_gco2_per_kwh=36", "hardware.price_usd_per_hour=3.6")
    energy = Energy(config, GPU, SideGroup(World.single()))

    def step(index, joules, ms=400.0):
        nvml.counters["GPU-aaaa"] += round(joules * 1e3)
        return energy.values([energy.step_done(index, ms)], 1000.0)

    money = {"cost/usd_per_million_tokens": pytest.approx(1.0)}
    assert step(1, 999) == step(2, 999) == money  # warm-up
    assert step(3, 100) == step(4, 200) == money  # too short for the counter
    nvml.counters["GPU-aaaa"] += 5_000_000  # an evaluation
    energy.resume()
    found = step(5, 300)
    assert found["energy/joules_per_step"] == pytest.approx(200.0)
    assert found["energy/tokens_per_joule"] == pytest.approx(1024 / 200)
    assert found["cost/gco2_per_million_tokens"] == pytest.approx(1e6 / 1024 * 200 / 3.6e6 * 36)
    nvml.counters["GPU-aaaa"] = None
    assert math.isnan(energy.step_done(6, 400.0))
    assert energy.values([math.nan], 1000.0) == money


def test_auto_takes_the_file_and_what_the_user_gives(nvml):
    found = hardware.hardware_of(parse("hardware.price_usd_per_hour=2.5", "+hardware.peak_tflops.bf16=800"), GPU)
    assert (found.name, found.price_usd_per_hour, found.memory_gb_per_s) == ("h100_sxm", 2.5, 3350.0)
    assert found.peak_tflops == {"bf16": 800.0, "float32": 67.0}
    assert hardware.hardware_of(parse("hardware.price_usd_per_hour=0.1"), CPU).price_usd_per_hour == 0.1
    assert hardware.peak_tflops(parse(), CPU) is None
    assert hardware.hardware_of(parse("hardware=a100_sxm"), GPU).name == "a100_sxm"


@pytest.mark.parametrize(
    ("name", "file"),
    [("NVIDIA H200", "h200_sxm"), ("NVIDIA H200 NVL", "auto"), ("NVIDIA A100-SXM4-40GB", "a100_sxm_40gb"),
     ("A100-SXM4-80GB", "a100_sxm"), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "auto"), ("NVIDIA L40S", "l40s")],
)  # fmt: skip
def test_a_device_gets_its_own_figures_or_none(monkeypatch, name, file):
    monkeypatch.setattr(hardware, "device_name", lambda device: name)
    assert hardware.hardware_of(parse(), GPU).name == file


def test_no_price_comes_with_the_lab():
    for name in presets.names("hardware"):
        config = parse(f"hardware={name}").hardware
        assert (config.price_usd_per_hour, config.grid_gco2_per_kwh) == (None, None)


def test_a_price_has_a_range():
    (problem,) = validate(parse("hardware.price_usd_per_hour=-1"), 4)
    assert problem.overrides == ("hardware.price_usd_per_hour=null",)


@pytest.mark.parametrize("price", [None, 0.5])
def test_a_cpu_run_logs_money_where_a_price_is_given_and_no_energy(tmp_path, price):
    config = parse(
        "strategy=single", "metrics.warmup_steps=1", *([f"hardware.price_usd_per_hour={price}"] if price else [])
    )
    step = SimpleNamespace(state_bytes=lambda: dict.fromkeys(("parameters", "gradients", "optimiser"), 0))
    metrics = Metrics(config, SideGroup(World.single()), CPU, step, [JsonLines(tmp_path)])
    for index in range(1, 4):
        metrics.log(index, StepResult(torch.tensor(1.0), torch.tensor(1.0)), 1e-3, Sampled())
    metrics.resume_clock()
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        money = {tag for tag in line if tag.startswith(("energy/", "cost/"))}
        assert money == ({"cost/usd_per_million_tokens"} if price else set())
        if price:
            expected = price / 3600 / line["perf/tokens_per_s"] * 1e6
            assert line["cost/usd_per_million_tokens"] == pytest.approx(expected)
