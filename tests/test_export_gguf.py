"""GGUF files in llama.cpp itself."""

import pytest

from scripts import export as tool
from scripts.exporting import artefact, checking
from scripts.exporting.making import make
from scripts.exporting.running.gguf import Runner
from scripts.exporting.running.opened import open_runner
from scripts.exporting.targets import GGUF
from scripts.exporting.writing import gguf as writing
from train.checkpoint.whole.trained import open_trained

pytest.importorskip("xllamacpp")


@pytest.mark.timeout(200)
def test_log_probabilities_are_those_of_eager_and_texts_are_bytes(run):
    assert tool.main([str(run), "to=gguf"]) == 0
    folder = run / "exports" / "gguf-F32"
    made, runner = open_runner(folder)
    assert isinstance(runner, Runner)
    assert made.checks["prompt_error"] < 1e-4 and made.checks["decode_error"] < 1e-4
    assert made.checks["loss"] == pytest.approx(made.checks["eager_loss"], abs=1e-4)
    text = "a b é"
    answer = runner.complete(text, 1)
    assert answer["usage"]["prompt_tokens"] == len(text.encode()), "a space is one token, and é two"
    assert runner.complete([*text.encode()], 1)["choices"][0]["text"] == answer["choices"][0]["text"]
    assert facts(folder / "model.gguf") >= {f"strategy_lab.{key}": value for key, value in made.facts.items()}.items()


def facts(file):
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("strategy_lab.")}.items()


def test_without_the_order_of_its_rope_it_is_refused(run, monkeypatch):
    monkeypatch.setattr(writing, "in_rope_order", lambda name, weight, model: weight)
    with pytest.raises(checking.Differs, match="gguf: its log-probabilities are up to"):
        make(open_trained(run), GGUF, "F32", run / "wrong", "Apache-2.0")
    assert not (run / "wrong").exists()


@pytest.mark.parametrize(("quant", "most", "rel"), [("Q8_0", 0.32, 1e-3), ("Q4_0", 0.22, 2e-2)])
def test_quantised_files_are_small(quant, most, rel, run):
    assert tool.main([str(run), "to=gguf", f"quant={quant}"]) == 0
    made = artefact.read(run / "exports" / f"gguf-{quant}")
    model = open_trained(run).model()
    matrices = sum(4 * p.numel() for name, p in model.named_parameters() if p.ndim > 1 and name != "embed.weight")
    others = sum(4 * p.numel() for p in model.parameters()) - matrices
    assert made.bytes - others < most * matrices + 16_384, "16 KiB of metadata and tokenizer"
    assert made.checks["loss"] == pytest.approx(made.checks["eager_loss"], rel=rel)
