"""report.html: the facts at its top, that it is self-contained, and that it leaves out what has no meaning."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from scripts.comparing import configs, words
from scripts.comparing.finding import Search
from scripts.comparing.gate import groups_of
from scripts.comparing.pages import head
from scripts.comparing.work import num_parameters, short_count
from tests.synthetic_runs import MODEL, make_run
from train.command.cli import configured
from train.config.plan import Plan
from train.config.shapes import units
from train.record import palette

VENDOR = Path(__file__).resolve().parent.parent / "scripts" / "comparing" / "pages" / "vendor"


def groups(*folders):
    return groups_of(Search(list(folders)).runs)


def test_the_head_says_what_was_trained_on_what_and_how(tmp_path):
    for strategy in ("dp", "tp"):
        make_run(tmp_path, strategy)
    facts = head.facts(groups(tmp_path), ["runs", "--html", "report.html"])
    assert facts == {
        "model": "tiny (2 layers of width 128)",
        "parameters": short_count(num_parameters(MODEL) or 0),
        "batch": "8 sequences of 128 tokens a step",
        "steps": "12",
        "data": "python_docs (3.5 M tokens)",
        "optimiser": "adamw at 0.001",
        "precision": "float32",
        "seed": "1234",
        "machine": "a cpu",
        "software": "torch 2.13.0, commit 0123456789",
        "processes": "2",
        "command": "one for each run: see Environment",
        "this page": "python scripts/compare.py runs --html report.html",
    }


def test_the_command_is_the_sweeps_or_the_only_runs(tmp_path):
    run = make_run(tmp_path, "dp")
    only = "torchrun --nproc_per_node=2 train/main.py strategy=dp"
    assert head.facts(groups(tmp_path), [])["command"] == only
    make_run(tmp_path, "tp")
    (tmp_path / "sweep-1").mkdir()
    points = [{"run_dir": f"runs/{folder.name}"} for folder in (run, tmp_path / "tp-x2-ws2-abcdef")]
    values = {"line": "strategy=dp,tp nproc=2", "fairness": "global", "points": points}
    (tmp_path / "sweep-1" / "points.json").write_text(json.dumps(values))
    assert head.facts(groups(tmp_path), [])["command"] == "python -m launch.sweep strategy=dp,tp nproc=2"


@pytest.mark.parametrize("model", ["tiny", "moe_tiny", "llama_8b"])
def test_parameters_are_those_that_the_planner_counts(model):
    config = configured([f"model={model}", "strategy=single"])
    shapes = {name: shape for _, unit in units(Plan(config, 1), 0) for name, shape in unit.items()}
    total = 0
    for shape in shapes.values():
        size = 1
        for length in shape:
            size *= length
        total += size
    assert num_parameters(vars(config.model)) == total


def test_the_verdict_is_in_words(tmp_path):
    for strategy, off in (("dp", 0.0), ("tp", 2e-7)):
        make_run(tmp_path, strategy, off=off)
    (group,) = groups(tmp_path)
    same = "Both runs train the same model on the same tokens with the same optimiser, so their losses must be equal"
    assert head.verdict(group) == f"{same}, and are (at most 5.3e-08 apart in the first steps, which is rounding)."
    make_run(tmp_path, "pp", off=0.5)
    (group,) = groups(tmp_path)
    assert head.verdict(group).endswith("must be equal: those of pp are not, so it is not ranked below.")


def config_of(strategy, **keys):
    return {f"strategy.{name}": value for name, value in {"name": strategy, **keys}.items()}


SPMD = {"dp_replicate": None, "dp_shard": None, "cp": None, "tp": None, "zero_stage": 3, "bucket_mb": 25.0,
        "reshard_after_forward": True, "comm_hook": "none", "powersgd_rank": 4}  # fmt: skip


def test_differences_that_mean_nothing_for_a_strategy_are_not_listed():
    dp = config_of("dp", **SPMD | {"dp_replicate": -1})
    tp = config_of("tp", **SPMD | {"tp": -1, "bucket_mb": 50.0, "powersgd_rank": 8})
    fsdp = config_of("fsdp", **SPMD | {"dp_shard": -1})
    pp = config_of("pp", **SPMD | {"pp": -1, "schedule": "1f1b", "zero_stage": 1, "reshard_after_forward": False})
    assert configs.differences([dp, tp]) == {}, "no bucket is tp's, and no factors are anyone's"
    assert configs.differences([dp, tp, fsdp, pp]) == {
        "strategy.zero_stage": [None, None, 3, None],
        "strategy.schedule": [None, None, None, "1f1b"],
    }
    assert configs.differences([fsdp, fsdp | {"strategy.zero_stage": 2, "strategy.reshard_after_forward": False}]) == {
        "strategy.zero_stage": [3, 2]
    }, "resharding is stage 3's"
    assert configs.differences([dp, dp | {"strategy.bucket_mb": 1.0}]) == {"strategy.bucket_mb": [25.0, 1.0]}
    assert configs.differences([dp, dp | {"metrics.dir": "x", "metrics.warmup_steps": 1}]) == {
        "metrics.warmup_steps": [None, 1]
    }


def test_every_key_that_needs_an_axis_is_one_of_the_strategies():
    from dataclasses import fields

    from train.strategies.deepspeed.strategy import DeepSpeed
    from train.strategies.pipelined import Pipeline

    assert set(configs.NEEDS) <= {field.name for kind in (Pipeline, DeepSpeed) for field in fields(kind)}


def test_one_colour_is_one_thing():
    kinds = palette.PART_COLOURS | palette.MEMORY_COLOURS | palette.AXIS_COLOURS
    kinds |= {text: colour for text, colour, _ in palette.WORK.values()}
    assert len(set(kinds.values())) == len(kinds), "two kinds have one colour"
    assert palette.GREY not in kinds.values()
    presets = {path.stem for path in (VENDOR.parents[3] / "configs" / "strategy").glob("*.yaml")}
    assert presets <= set(palette.STRATEGIES), "a preset has no colour of its own"
    everything = [*palette.STRATEGIES.values(), *palette.OTHER_STRATEGIES, *kinds.values()]
    assert len(set(everything)) == len(everything)
    few, many = palette.strategy_colours(["dp", "mine"]), palette.strategy_colours(["mine", "tp", "dp", "yours"])
    assert few["dp"] == many["dp"] and few["mine"] == many["mine"] != many["yours"]


def test_the_libraries_are_those_of_the_list_and_small():
    listed = re.findall(r"\| `([\w.]+)` \|.*\| ([0-9a-f]{64}) \|", (VENDOR / "README.md").read_text())
    found = {path.name: path.read_bytes() for path in VENDOR.iterdir() if path.suffix in (".js", ".css")}
    assert dict(listed) == {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
    assert sum(map(len, found.values())) < 60_000


def test_the_page_is_one_file_whose_scripts_are_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    from scripts.comparing.pages import page

    for strategy in ("dp", "tp"):
        make_run(tmp_path, strategy, off=1e-7 if strategy == "tp" else 0.0)
    text = page.report(groups(tmp_path), ["runs"])
    assert "default-src 'none'" in text and "MIT License" in text and "public domain" in text
    bare = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?:|src=|@import|<link|url\((?!#)|href=\"(?!#)| on\w+=", bare)
    assert text.count("<script>") == 3 and text.count('<script type="application/json">') == 3
    titles = re.findall(r"<title>([^<]*)</title>", bare)
    assert {"dp, communication: 18.08 ms", "dp, rank 0, parameters: 2 MiB", "tp, tp: 3 MiB"} <= set(titles)
    assert any(re.fullmatch(r"dp: [\d,]+ tokens/s", title) for title in titles)


def test_bars_of_parts_are_as_long_as_the_median_step(tmp_path):
    pytest.importorskip("matplotlib")
    from scripts.comparing.pages import pictures
    from scripts.comparing.pages.style import Colours

    make_run(tmp_path, "dp")
    (group,) = groups(tmp_path)
    picture = pictures.step_time(group, Colours([group]))
    assert picture is not None
    (axes,) = picture.figure.axes
    bars: Any = axes.patches
    median = group.rows[0].figures["step_ms_p50"]
    assert max(bar.get_x() + bar.get_width() for bar in bars) == pytest.approx(median)
    assert "these took 1.1 times as long" in picture.note


def test_loss_over_time_and_over_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    from scripts.comparing.pages import curves
    from scripts.comparing.pages.style import Colours

    for strategy in ("dp", "tp"):
        make_run(tmp_path, strategy, ms=100.0 if strategy == "dp" else 200.0)
    (group,) = groups(tmp_path)
    picture = curves.loss_over_time(group, Colours([group]))
    assert picture is not None
    (panel,) = picture.panels
    assert panel["x"] == "seconds" and [line["name"] for line in panel["series"]] == ["dp", "tp"]
    assert panel["series"][0]["x"][:2] == pytest.approx([0.101, 1.101])
    picture = curves.loss_over_bytes(group, Colours([group]))
    assert picture is not None
    (panel,) = picture.panels
    assert panel["series"][0]["x"] == [4.5 * n for n in range(1, 13)]
    assert panel["series"][0]["y"] == pytest.approx([5.0 - 0.1 * n for n in range(1, 13)])
    assert words.listed(["a"]) == "a"


def test_the_axis_of_distances_has_numbers(tmp_path):
    """Mathematical text is off, as names may contain a $, and matplotlib's own labels of a log axis need it."""
    pytest.importorskip("matplotlib")
    from matplotlib import rc_context

    from scripts.comparing.pages import curves
    from scripts.comparing.pages.style import STYLE, Colours

    for strategy, off in (("single", 0.0), ("tp", 1e-6)):
        make_run(tmp_path, strategy, off=off)
    (group,) = groups(tmp_path)
    with rc_context(STYLE):
        picture = curves.loss(group, Colours([group]))
        assert picture is not None
        _, distances = picture.figure.axes
        picture.figure.canvas.draw()
    labels = [label.get_text() for label in distances.get_yticklabels()]
    assert labels and all(re.fullmatch(r"\d+e-\d+", text) for text in labels), labels
