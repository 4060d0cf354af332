"""launch.netlab's command line: words, where ranks are, what would be run, and what is refused. Nothing is started."""

import itertools
import shlex

import pytest

from launch import netlab
from launch.emulating.placement import crossing_axes, edges_of, full_order, hosts_of_ranks, pairs_of
from launch.emulating.presets import preset_named
from launch.emulating.rows import ahead
from launch.emulating.task import read
from train.command.launching.network import fault, milliseconds, orders, percent, rates, shown_rate
from train.config.problems import BadInput
from train.config.strategy import MESH_AXES

TWO_BY_TWO = dict.fromkeys(MESH_AXES, 1) | {"pp": 2, "tp": 2}


def test_rates_and_times():
    assert rates("25mbit,1gbit") == (25e6, 1e9) and rates("1mbit,1mbit") is None
    assert rates("2.5gbit") == (2.5e9,) and rates("100kbit") == (1e5,)
    assert [shown_rate(rate) for rate in (1e8, 2.5e9, 1e5)] == ["100mbit", "2.5gbit", "100kbit"]
    for wrong in ("100", "100mb", "-1mbit", "0mbit", "1e3mbit", "mbit", "", "1mbit,", "9999999gbit"):
        assert rates(wrong) is None, wrong
    assert milliseconds("200us") == 0.2 and milliseconds("1.5ms") == 1.5 and milliseconds("1") is None
    assert percent("1%") == percent("1") == 1.0 and percent("60%") is None and percent("0%") is None
    assert orders("tp.pp,pp.tp") == (("tp", "pp"), ("pp", "tp")) and orders("tp.tp") is None and orders("xy") is None


@pytest.mark.parametrize("text", ["down:1@6", "down:1:5s@6", "kill:1@6", "late:1:20s", "slow:1:10mbit"])
def test_faults(text):
    assert str(fault(text)) == text


@pytest.mark.parametrize("text", ["down:1", "kill:1", "kill:1:5s@6", "late:1", "late:1:20s@6", "slow:1:5s", "down:1@0"])
def test_wrong_faults(text):
    assert fault(text) is None


def test_in_the_usual_order_ranks_follow_each_other_as_torchrun_numbers_them():
    for degrees in itertools.product((1, 2), repeat=5):
        mesh = dict(zip(MESH_AXES, degrees, strict=True))
        hosts = hosts_of_ranks(mesh, full_order(None, mesh), 1)
        assert hosts == sorted(hosts)
    assert hosts_of_ranks(TWO_BY_TWO, ("tp", "pp"), 2) == [0, 0, 1, 1]


def test_in_another_order_other_axes_cross_hosts():
    usual, other = (hosts_of_ranks(TWO_BY_TWO, order, 2) for order in (("tp", "pp"), ("pp", "tp")))
    assert other == [0, 1, 0, 1]
    assert (crossing_axes(TWO_BY_TWO, usual), crossing_axes(TWO_BY_TWO, other)) == (["pp"], ["tp"])
    # the two groups of tp share the link of their host, in a ring of two and back
    assert (edges_of(TWO_BY_TWO, ["tp"], other).out, edges_of(TWO_BY_TWO, ["tp"], other).inside) == (2, 0)
    assert (edges_of(TWO_BY_TWO, ["tp"], usual).out, edges_of(TWO_BY_TWO, ["tp"], usual).inside) == (0, 2)
    flat = dict.fromkeys(MESH_AXES, 1) | {"dp_shard": 4}
    assert (edges_of(flat, ["dp_shard"], [0, 0, 1, 1]).out, edges_of(flat, ["dp_shard"], [0, 0, 1, 1]).inside) == (1, 1)
    assert (pairs_of(flat, ["dp_shard"], [0, 0, 1, 1]).out, pairs_of(flat, ["dp_shard"], [0, 0, 1, 1]).inside) == (4, 2)
    line = dict.fromkeys(MESH_AXES, 1) | {"pp": 4}
    assert edges_of(line, ["pp"], [0, 0, 1, 1], closed=False).out == 1


def test_an_order_names_the_axes_of_the_mesh():
    with pytest.raises(BadInput, match=r"order=tp does not name the axes of this mesh, tp.pp: use order=tp.pp"):
        full_order(("tp",), TWO_BY_TWO)


def test_dry_run_prints_every_command_and_starts_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(netlab, "rights", lambda: pytest.fail("something is started"))
    words = ["nodes=2", "nproc=4", "inter=25mbit,100mbit", "strategy=tp_pp", "order=tp.pp,pp.tp", "dry_run=true"]
    assert netlab.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    trains = [shlex.split(line) for line in lines if "train/main.py" in line]
    # of two speeds and two orders: an agent for each host, or one for each rank
    assert len(trains) == 2 * (2 + 4)
    for line in trains:
        place = next(i for i, word in enumerate(line) if word.endswith("train/main.py"))
        assert line[place + 1] == "strategy=tp_pp" and all("=" in word for word in line[place + 1 :])
        assert "torchrun" in line and "--master_addr=10.77.0.101" in line
    assert {word for line in trains for word in line if word.startswith("--nproc_per_node")} == {
        "--nproc_per_node=2",
        "--nproc_per_node=1",
    }
    assert lines[-1].startswith("python ") and "compare.py runs/netlab-" in lines[-1], "after the last run"
    assert sum("tbf rate 25mbit" in line for line in lines) == 2 * 4, "both ends of two links, to measure and to train"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nodes=2", "nproc=3"], "nproc=3 is not divisible by nodes=2"),
        (["nodes=2", "fault=kill:2@5"], "fault=kill:2@5 names host 2, but the hosts are 0 to 1"),
        (["nodes=2", "preset=h100_ib400", "inter=1mbit"], "preset=h100_ib400 sets inter and intra"),
        (
            ["nodes=2", "preset=h100_ib400", "fault=late:1:5s"],
            "needs a measurement, which fault=late:1:5s",
        ),
        (["nodes=2", "preset=h100"], "preset=h100 is not known: use preset=a100_eth100"),
        (["nodes=2", "inter=fast"], "inter=fast is not valid: inter must be rates such as 100mbit"),
        (["nodes=2", "runtime.device=cuda"], "the hosts of an emulated cluster share the CPU"),
        (["nodes=2", "nproc=2,4"], "nproc=2,4 is not valid"),
        (["nodes=2", "strategy=tp", "strategy.tp=4"], "tp 4 needs 4 processes, but there are 2"),
    ],
)
def test_what_is_refused(words, said, capsys, monkeypatch):
    monkeypatch.setattr(netlab, "rights", lambda: pytest.fail("something is started"))
    with pytest.raises(SystemExit) as ended:
        netlab.main(words)
    assert ended.value.code in (2, 3) and said in capsys.readouterr().err


def test_other_speeds_and_faults_go_on_in_the_same_folder():
    def folder(*words):
        return read(["nodes=2", "strategy=dp", *words], "").folder

    assert folder("inter=25mbit") == folder("inter=1gbit", "fault=down:1@3")
    assert folder() != folder("intra=1gbit") != folder("train.steps=7")


def test_it_is_said_before_how_long_the_runs_take():
    points = read(["nodes=2", "strategy=dp,tp", "train.steps=12"], "").points
    rows = [{"label": point.label, "predicted_ms": 1e3 * ms} for point, ms in itertools.product(points, (0.5, 2.5))]
    assert ahead(rows, points).startswith("4 run(s) to go: 72 s by their predictions")
    rows[0] |= {"status": "done"}
    assert ahead(rows, points).startswith("3 run(s) to go: 66 s")
    rows[1]["predicted_ms"] = 1e5
    assert ahead(rows, points).startswith("3 run(s) to go: 21 minutes")


def test_a_preset_keeps_the_ratio_of_computation_to_bandwidth():
    preset = preset_named("h100_ib400")
    inter, intra = preset.scaled(preset.tflops / 1e4, per_node=2)
    assert inter == pytest.approx(2 * preset.inter_gbit * 1e9 / 1e4)
    assert intra / inter == pytest.approx(preset.intra_gbit / preset.inter_gbit)


def test_a_speed_that_the_machine_does_not_reach_is_refused_with_that_speed():
    from launch.emulating.lab import check_speeds
    from launch.emulating.predicting import Measured

    task = read(["nodes=2", "nproc=2", "inter=500mbit", "strategy=dp"], "")
    reached = Measured.of([["all_reduce", 2, 2**22, 8 * 2**22 / 400]])  # 400 bit a microsecond
    check_speeds(reached, task, (25e6, 4e8))
    with pytest.raises(
        BadInput, match=r"inter=500mbit is faster than this machine itself, which reaches 418mbit"
    ) as it:
        check_speeds(reached, task, task.speeds)
    assert it.value.exit_code == 3
