"""Exports are measured in processes of their own, and energy where the processor has a counter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import edge_bench
from scripts import export as tool
from scripts.exporting import bound
from scripts.exporting.artefact import Shape
from scripts.exporting.rapl import Counters
from train.checkpoint.whole.trained import open_trained

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_each_artefact_is_measured_in_turns(run, capsys, monkeypatch):
    folders = [run / "exports" / name for name in ("onnx-none", "onnx-int8")]
    for folder in folders:
        assert tool.main([str(run), "to=onnx", f"quant={folder.name.partition('-')[2]}"]) == 0
    order = []
    measure = edge_bench.Job.measure

    def noted(job, *words):
        order.append(job.folder)
        return measure(job, *words)

    monkeypatch.setattr(edge_bench.Job, "measure", noted)
    capsys.readouterr()
    words = ["threads=1", "prompt=4", "tokens=6", "rounds=2"]
    assert edge_bench.main([*map(str, folders), *words, "--json"]) == 0
    assert order == folders * 2
    for folder, line in zip(folders, capsys.readouterr().out.splitlines(), strict=True):
        row = json.loads(line)
        files = sum(file.stat().st_size for file in folder.iterdir() if file.name != "export.json")
        assert row["artefact"] == str(folder) and row["bytes"] == files and row["rounds"] == 2
        assert row["tokens_per_s"] > 0 and row["load_ms"] > row["first_token_ms"] > 0
        assert 10 < row["peak_mib"] < 150, "torch alone would need more"
    shown = edge_bench.table([row, row | {"joules_per_token": 0.5}]).splitlines()
    assert len(shown) == 3 and len({len(line) for line in shown}) == 1 and shown[2].endswith("0.5000")


def test_what_cannot_be_measured_is_refused(run, tmp_path, capsys):
    assert tool.main([str(run), "to=safetensors"]) == 0
    folder = run / "exports" / "safetensors-none"
    for words, said in (
        ([tmp_path], "it has no export.json"),
        ([folder, "prompt=10", "tokens=6"], "16 tokens with the prompt do not fit into the 16 positions"),
        ([folder, "threads=1,0"], "threads=1,0 is not valid"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            edge_bench.main([*map(str, words)])
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_joules_of_counters_that_begin_anew(tmp_path):
    for name, energy in (("intel-rapl:0", 900), ("intel-rapl:1", 5), ("intel-rapl:0:0", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text("1000\n")
    counters = Counters(tmp_path)
    before = counters.read()
    assert before == [900, 5], "a part of a package is not added to it"
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")
    assert counters.joules(before, counters.read()) == pytest.approx(200e-6)
    nothing = Counters(tmp_path / "none")
    assert nothing.joules(nothing.read(), nothing.read()) is None


def test_a_token_reads_the_weights_and_the_cache():
    shape = Shape(vocab_size=256, max_seq_len=512, num_layers=12, num_kv_heads=4, head_dim=64)
    assert bound.cache_bytes(shape, 100) == 2 * 4 * 12 * 4 * 64 * 100
    assert bound.read_bandwidth(1) > 1e8


@pytest.mark.slow
def test_the_program_in_the_docs_continues_a_text(run):
    assert tool.main([str(run), "to=onnx"]) == 0
    program = (REPO / "docs" / "edge.md").read_text().partition("```python\n")[2].partition("```")[0]
    words = [sys.executable, "-c", program, str(run / "exports" / "onnx-none"), "for"]
    done = subprocess.run(words, capture_output=True, timeout=100, check=True)
    model = open_trained(run).model()
    tokens = [*b"for"]
    while len(tokens) <= model.config.max_seq_len:
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert [*done.stdout] == tokens[3:]
