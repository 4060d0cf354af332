"""How the planner is scored on published runs: which rows count, odd ones, and what is printed."""

import csv
import dataclasses
import math
import random
import sys
from pathlib import Path

import pytest

from scripts import score_planner
from scripts.scoring import memory, peer
from scripts.scoring.jobs import HARDWARE, hardware_of, is_deepspeed, job_of, layers
from scripts.scoring.rows import COUNTS, PEAK, SPEED, read
from scripts.scoring.scores import NOT_PREDICTED, Scored, choices, interval
from train.command.planning import constants
from train.command.planning.intervals import SPREAD
from train.command.planning.quantities import quantities
from train.command.planning.step_time import step_time
from train.config.problems import BadInput

RUNS = Path(__file__).resolve().parent.parent / "docs" / "data" / "published_runs.csv"
# a row that is predicted, to which odd cells are given
GOOD = {
    "source": "a/new source", "row_id": "row", "gpu": "H100-80GB-SXM", "n_gpus": "32", "gpus_per_node": "8",
    "n_layers": "32", "d_model": "4096", "n_heads": "32", "n_kv_heads": "8", "d_ff": "14336", "ffn_type": "swiglu",
    "seq_len": "4096", "global_batch_seqs": "64", "micro_batch": "1", "dp": "4", "tp": "4", "pp": "2", "cp": "1",
    "tier": "A", "precision": "bf16", SPEED: "9000", PEAK: "50",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return read(RUNS)


@pytest.fixture(scope="module")
def names():
    with RUNS.open() as file:
        return next(csv.reader(file))


def written(path, names, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def read_one(tmp_path, names):
    """The row that a file with these cells has."""

    def one(**cells):
        (row,) = read(written(tmp_path / "one.csv", names, GOOD | cells))
        return row

    return one


def test_how_many_rows_are_scored(rows):
    speeds = [row for row in rows if row.tokens_per_s]
    promised = [row for row in speeds if row.in_bar]
    assert (len(rows), len(speeds), len(promised)) == (861, 847, 606)
    assert sum(row.regimes[0] == SPREAD for row in promised) == 347
    assert all(job_of(row) is not None for row in speeds[::20])


def test_no_measured_cell_decides_what_is_predicted(rows):
    for row in rows[::150]:
        cells = {name: "" if "measured" in name or "derived" in name else text for name, text in row.cells.items()}
        named = {"source": "x", "row_id": "x", "notes": "x", "model_name": "x"}
        assert job_of(dataclasses.replace(row, cells=cells | named)) == job_of(row)


@pytest.mark.parametrize(
    "odd",
    [{"tp": "0"}, {"pp": "-2"}, {"micro_batch": "1.5"}, {"n_layers": "many"}, {"seq_len": "inf"}, {"d_ff": "1e999"},
     {"dp": "7"}, {"n_gpus": "99999999999"}, {"tp": "64", "n_gpus": "512"}, {"pp": "99", "n_gpus": "1584"},
     {"n_heads": "33"}, {"n_kv_heads": "5"}, {"global_batch_seqs": "3"}, {"virtual_stages": "0"}, {"vocab": "-5"},
     {"virtual_stages": "x"}, {"pp_schedule": "zbv", "virtual_stages": "3"}, {"gpus_per_node": "0"},
     {"gpu": "MI300X"}, {"gpu": "H100-80GB-PCIe"}, {"gpu": "?"}, {"precision": "int3"}, {"is_moe": "1"}],
    ids=str,
)  # fmt: skip
def test_a_row_that_cannot_be_predicted_counts_with_an_error_of_100_percent(read_one, odd):
    row = read_one(**odd)
    assert job_of(row) is None and memory.fits(row) is None
    (peak,) = memory.peaks([row])
    assert Scored(row, None, 0.0, 9000.0, math.nan).error == peak.error == NOT_PREDICTED == 1


@pytest.mark.parametrize(
    "odd",
    [{}, {"gpu": "NVIDIA H100 80GB HBM3"}, {"precision": "BF16-mixed"}, {"interconnect": "0x0Gb"}, {"n_layers": "32.0"},
     {"pp_schedule": "V-Half"}, {"pp_schedule": "unheard of"}, {"zero_or_fsdp": "zero3"}, {"activation_ckpt": "Full"},
     {"gpus_per_node": "4"}, {"gpus_per_node": "nan"}, {"sp": "no"}, {"cp": "2", "n_gpus": "64"}, {"is_moe": "False"},
     {"pp": "34", "n_gpus": "544"}, {"tp": "32", "n_gpus": "256"}, {"global_batch_seqs": "65"}],
    ids=str,
)  # fmt: skip
def test_other_spellings_and_unusual_layouts_are_predicted(read_one, odd):
    row = read_one(**odd)
    job = job_of(row)
    assert job is not None
    assert 0 < step_time(quantities(job), constants.load()).total < math.inf
    assert 0 < memory.allocated(job, row) < math.inf


def test_what_cells_say(read_one):
    assert hardware_of(read_one(gpu="a100-sxm4-40gb")) == "a100_sxm_40gb"
    assert hardware_of(read_one(gpu="A100 (capacity not stated)")) == "a100_sxm"
    assert is_deepspeed(read_one(zero_or_fsdp="zero1")) and not is_deepspeed(read_one(zero_or_fsdp="ZeRO-1 (fused)"))
    assert [read_one(**{SPEED: text}).tokens_per_s for text in ("fast", "-3", "0", "nan", "1e3")] == [None] * 4 + [1000]
    half = job_of(read_one(gpus_per_node="4"))
    assert half is not None and half.plan.config.hardware.node_gb_per_s == 200
    assert read_one(is_moe="1").regimes == ["MoE"] and not read_one(is_moe="1").in_bar


def test_a_blank_vocabulary_is_what_the_layers_leave_over(read_one):
    shape = {"n_layers": "72", "d_model": "14336", "n_heads": "64", "n_kv_heads": "64", "d_ff": "57344"}
    for total, most, least in (("181e9", 250_000, 230_000), ("178e9", 50_257, 50_257), ("many", 50_257, 50_257)):
        job = job_of(read_one(**shape, n_params=total, ffn_type="gelu"))
        assert job is not None and least <= job.plan.config.model.vocab_size <= most, total
    job = job_of(read_one(n_params="8030261248"))
    assert job is not None and job.plan.config.model.vocab_size == pytest.approx(128_256, rel=0.001)
    assert read_one(n_params="8030261248").defaulted


def test_no_row_raises(read_one):
    draw = random.Random(17)
    row = read_one()
    few = {"dp": "1 2 3 8", "tp": "1 2 4 8", "pp": "1 1 2 5 8", "cp": "1 1 1 2", "micro_batch": "1 2 4",
           "n_layers": "6 7 32 32", "n_heads": "8 24 32", "n_kv_heads": "1 8", "d_model": "768 4096",
           "seq_len": "1 2048 2048", "global_batch_seqs": "24 256 256", "virtual_stages": "1 2 3", "sp": "0 1",
           "activation_ckpt": "full selective",
           "pp_schedule": "1f1b zbv zb-2p interleaved_1f1b", "zero_or_fsdp": "none ZeRO-2 FSDP ZeRO-1 FSDP(shard=2)",
           "gpu": "A100 B200 H200", "precision": "fp8 fp16 nvfp4", "gpus_per_node": "4 8 16"}  # fmt: skip
    predicted = 0
    for _ in range(300):
        cells = {name: draw.choice([*texts.split(), "" if name not in COUNTS else "1"]) for name, texts in few.items()}
        cells["n_gpus"] = str(math.prod(int(cells[name]) for name in ("dp", "tp", "pp", "cp")))
        one = dataclasses.replace(row, cells={**row.cells, **cells})
        memory.peaks([one])
        if job := job_of(one):
            predicted += 1
            assert step_time(quantities(job), constants.load()).total > 0, cells
            assert math.isnan(peer.speed(job)) or peer.speed(job) > 0, cells
    assert predicted > 30


def test_a_file_of_new_sources_and_odd_rows_is_scored(tmp_path, names, monkeypatch, capsys):
    with RUNS.open() as file:
        known = [row for row in csv.DictReader(file) if row["tier"] in ("A", "B") and row["d_ff"]][::60]
    monkeypatch.setattr(score_planner, "KNOWN", written(tmp_path / "known.csv", names, *known))
    odd = [GOOD | {"row_id": "odd", "tp": "x"}, GOOD | {"is_moe": "1"}, GOOD | {SPEED: "fast"}, GOOD | {"tier": "D"}]
    good = [GOOD | {"tp": str(tp), "pp": str(8 // tp)} for tp in (1, 2, 4, 8)]
    path = written(tmp_path / "new.csv", names, *good, *odd)
    path.write_text(path.read_text() + "too,few\n")
    said = scored(path, monkeypatch, capsys)
    assert "a/new source | H100-80GB-SXM | multi-node TP/PP" in said and "all sources | MoE" in said
    assert "choice of a layout, in 1 families of 5 layouts" in said
    assert "2 rows are not predicted and count with an error of 100 %" in said and "odd" in said
    assert "1 rows have a speed that is not a positive number" in said
    assert "not stated, or of an ambiguous unit" in said and "said to fit" in said and "nan" not in said
    assert "NVIDIA" not in said, "known runs of other sources are fitted to, not printed"


def scored(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["score_planner", str(path)])
    score_planner.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"gpu,n_gpus\nH100,8\n", "no column ffn_type, n_layers"),
        (b"", "no column gpu"),
        (b"{names},speed of light\n", "the unknown column 'speed of light'"),
        (b"{names}\n", "no row of a model"),
        (b"\xff\xfe\x00\x01", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_another_file_is_one_message(tmp_path, names, monkeypatch, capsys, text, said):
    path = tmp_path / "runs.csv"
    if text is not None:
        path.write_bytes(text.replace(b"{names}", ",".join(names).encode()))
    with pytest.raises(SystemExit) as ended:
        scored(path, monkeypatch, capsys)
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (2, 1), err
    assert said in err and "give a file with the columns of docs/data/published_runs.csv" in err
    with pytest.raises(BadInput):
        read(path)


def test_layers_of_stages():
    assert layers(80, 16) == [5] * 16
    assert layers(126, 8) == [15, *[16] * 6, 15]
    assert layers(95, 8) == [*[12] * 7, 11]
    assert sum(layers(61, 7)) == 61


def test_regret_and_tau(rows):
    row = next(row for row in rows if row.tokens_per_s)
    speeds = [(100.0, 90.0), (80.0, 95.0), (60.0, 50.0), (79.0, 10.0)]  # measured, predicted
    layouts = [dataclasses.replace(row, cells={**row.cells, "tp": str(i)}) for i in range(4)]
    scored = [Scored(one, None, guess, fact, 1.0) for one, (fact, guess) in zip(layouts, speeds, strict=True)]
    (choice,) = choices(scored)
    assert choice.regret == pytest.approx(0.2)
    assert choice.random_regret == pytest.approx(1 - 79.75 / 100)
    assert choice.tau == pytest.approx((3 - 2) / 5), "80 and 79 are equal within the noise"
    assert scored[0].error == NOT_PREDICTED


def test_each_source_weighs_the_same_in_an_interval():
    assert interval([("a", 0.0)] * 100 + [("b", 1.0)]) == (0.0, 1.0)
    assert interval([]) == (-math.inf, math.inf)


def test_the_peer_knows_every_device_and_predicts(read_one):
    assert {*peer.DEVICES} == {*HARDWARE.values()}
    pytest.importorskip("mlsysim")
    whole, half = (job_of(read_one(global_batch_seqs=size)) for size in ("128", "64"))
    assert whole is not None and half is not None
    assert 1_000 < peer.speed(half) < peer.speed(whole) < 20_000, "a smaller batch has the larger bubble"
