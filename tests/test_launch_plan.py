"""`launch.plan` as a command: what it prints and what it refuses."""

import json
import sys

import pytest

from launch import plan
from launch.planning.figures import costs_of
from tests.plans import composed

SMALL = ["model=small", "train.seq_len=256", "train.global_batch_size=16"]
H100 = ["hardware=h100_sxm", "precision=bf16"]


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, standard output, standard error) of a command line."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["launch.plan", *words])
        code = 0
        try:
            plan.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_what_is_printed(run):
    code, out, err = run(*SMALL, *H100, "nproc=4", "top=3", "tokens=1e9", "price=2")
    assert (code, err) == (0, "")
    for said in ("small on 4 x h100_sxm, 16 sequences of 256 tokens a step, bf16", "valid layouts", "80 % interval",
                 "messages over", "compute", "kept free", "a device has 79.65 GiB", "for 1,000,000,000 tokens",
                 "why not the second:", "python -m launch.local nproc=4 ", " strategy=zero1 "):  # fmt: skip
        assert said in out, said
    assert "lacks the figure" not in out


def test_as_json(run):
    code, out, _ = run(*SMALL, *H100, "nproc=4", "top=5", "tokens=1e9", "price=2", "--json")
    found = json.loads(out)
    assert code == 0 and len(found["layouts"]) == 5
    speeds = [one["tokens_per_s"] for one in found["layouts"]]
    assert speeds == sorted(speeds, reverse=True)
    for one in found["layouts"]:
        step = sum(one["step_s"].values())
        assert one["step_ms"] == pytest.approx(1e3 * step)
        assert one["tokens_per_s"] == pytest.approx(16 * 256 / step)
        assert one["low"] < one["tokens_per_s"] < one["high"]
        assert 0 < one["mfu_pct"] < 81, "of the data sheet's peak; the measured one is 80.3 % of it"
        assert sum(one["memory_bytes"].values()) < 79.65 * 2**30
        costs = one["costs"]
        assert costs["device_hours"] == pytest.approx(4 * 1e9 / one["tokens_per_s"] / 3600)
        assert (costs["usd"], costs["kwh"]) == (
            pytest.approx(2 * costs["device_hours"]),
            pytest.approx(0.7 * costs["device_hours"]),
        )


def test_several_precisions(run):
    line = (*SMALL, "hardware=h100_sxm", "nproc=2", "top=200", "--json")
    code, out, _ = run(*line, "precision=bf16,fp8,float32")
    found = json.loads(out)
    assert code == 0 and found["searched"].keys() == {"bf16", "fp8", "float32"}
    assert {one["products"] for one in found["layouts"]} <= {"bf16", "fp8", "float32"}
    alone = json.loads(run(*line, "precision=float32")[1])["layouts"][0]
    same = next((one for one in found["layouts"] if one["products"] == "float32"), alone)
    assert same["memory_bytes"] == alone["memory_bytes"], "of activations in float32"


@pytest.mark.parametrize(("nproc", "start"), [(12, "--nnodes=2 --nproc_per_node=6"), (8, "-m launch.local nproc=8")])
def test_the_command_starts_all_processes(run, nproc, start):
    code, out, err = run("model=small", "train.seq_len=256", "train.global_batch_size=24", *H100, f"nproc={nproc}")
    assert code == 0, err
    assert start in out.splitlines()[-1]


def test_figures_that_are_missing_are_named(run):
    code, out, _ = run(*SMALL, *H100, "nproc=2", "hardware.watts=null", "hardware.memory_gib=null")
    assert code == 0
    assert "left out, as hardware=h100_sxm lacks the figure: whether layouts fit (hardware.memory_gib), cost" in out
    assert "energy (hardware.watts)" in out
    costs = costs_of(composed("strategy=single", "hardware=l40s"), 2, 1e9, 1e6, None)
    assert costs.usd is None and costs.kwh is None


def test_the_batch_of_a_large_model(run):
    code, out, _ = run("model=llama_1b", *H100, "nproc=2", "top=1", "--json")
    found = json.loads(out)
    assert code == 0 and (found["seq_len"], found["global_batch_size"]) == (4096, 1024)
    code, out, _ = run("model=llama_1b", *H100, "nproc=2", "train.seq_len=2048", "train.global_batch_size=8", "--json")
    assert (json.loads(out)["seq_len"], json.loads(out)["global_batch_size"]) == (2048, 8)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("hardware=h200 nproc=8", "hardware=h200 does not name a preset"),
        ("nproc=0", "nproc=0 is not valid"),
        ("hardware=h100_sxm nproc=2 strategy=fsdp", "strategy=fsdp is given, but python -m launch.plan chooses"),
        ("hardware=h100_sxm nproc=2 strategy.tp=2", "strategy.tp=2 is given, but python -m launch.plan chooses"),
        ("hardware=l40s precision=bf16 nproc=2", "hardware=l40s lacks processors, exp_tera_per_s, link_gb_per_s"),
        ("hardware=h100_sxm nproc=2 precision=fp4", "fp4 is not a precision"),
        ("hardware=h100_sxm nproc=2 tokens=many", "tokens=many is not valid"),
        ("hardware=h100_sxm nproc=2 train.steps=0", "train.steps=0 is out of range"),
        ("hardware=h100_sxm nproc=2 hardware.matmul_tflops.bf16=0", "matmul_tflops.bf16=0 is not a valid rate"),
        ("hardware=h100_sxm nproc=2 hardware.peak_tflops.bf16=0", "hardware.peak_tflops.bf16=0 is not a valid peak"),
        ("hardware=h100_sxm nproc=7 model.num_layers=2", "train.global_batch_size=8 is not divisible"),
        ("model=llama_70b hardware=h100_sxm precision=bf16 nproc=4", "valid layouts of nproc=4 fits in hardware=h100"),
    ],
)
def test_what_is_refused(run, words, says):
    code, out, err = run(*words.split())
    assert (code, out) == (2, ""), err
    assert says in err and err.startswith("1 problem, nothing was trained:"), err
    assert "Traceback" not in err


def test_what_is_missing_is_said_in_gib(run):
    _, _, err = run("model=llama_70b", *H100, "nproc=4")
    assert "(79.65 GiB): the nearest, " in err and " GiB a device" in err


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0 and "usage: python -m launch.plan [nproc=4] [top=20]" in out and "[--json]" in out
