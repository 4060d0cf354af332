"""`single`, the reference of the proof, against what others wrote (tests/anchors/), and bugs that only this sees."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.anchors import loop, mixtures, models, record
from tests.anchors.differences import Differs, hold
from tests.anchors.loop import Expected
from tests.anchors.mixtures import check_mixture
from tests.anchors.models import check_model
from tests.anchors.record import check_ten_steps
from tests.anchors.text import write_text
from tests.anchors.theirs import schedule
from tests.planted import reference
from tests.planted.base import Counter
from train.config.schema import LrSchedule, OptimConfig, Optimiser, Precision
from train.measure.metrics import Metrics
from train.ranks.optim import lr_at

LONG = ("model.num_layers=1", "model.dim=16", "model.num_heads=2", "model.num_kv_heads=1")
GQA = models.Case("grouped queries", ("model.num_kv_heads=2",))
FLOAT32 = models.Case("float32", ("model.num_kv_heads=2",), precision=Precision.float32, raised=False, bound=5e-6)
MODELS = [
    models.Case("plain"),
    GQA,
    models.Case("one KV head", ("model.num_kv_heads=1",)),
    models.Case("tied", ("model.tie_embeddings=true", "model.num_kv_heads=2")),
    models.Case("heads of 2", ("model.dim=8",)),
    models.Case("heads of 24", ("model.dim=48", "model.num_heads=2", "model.num_kv_heads=2")),
    models.Case("heads of 64", ("model.dim=128", "model.num_heads=2", "model.num_kv_heads=1")),
    models.Case("2,048 tokens", LONG, seq_len=2048, rows=1),
    models.Case("theta of Llama 3", ("model.rope_theta=500000.0",)),
    models.Case("small theta", ("model.rope_theta=50.0",)),
    models.Case("eps of Llama 1", ("model.norm_eps=1.0e-6",)),
    models.Case("large eps", ("model.norm_eps=0.01",)),
    models.Case("the lab's written-out attention", ("model.attention=eager", "model.num_kv_heads=2")),
    models.Case("float64, some parts float32", ("model.num_kv_heads=2",), raised=False, bound=5e-6),
    FLOAT32,
    dataclasses.replace(FLOAT32, name="float32, their written-out attention", attention="eager"),
    dataclasses.replace(FLOAT32, name="float32, 2,048 tokens", overrides=LONG, seq_len=2048, rows=1),
]
ALONE = ("model.num_shared_experts=0",)
MIXTURES = [
    mixtures.Case("Mixtral", True, ALONE),
    mixtures.Case("Mixtral, 3 experts", True, (*ALONE, "model.top_k=3")),
    mixtures.Case("Mixtral, float32", True, ALONE, torch.float32, 2e-6),
    mixtures.Case("DeepSeek-V3", False),
    mixtures.Case("DeepSeek-V3, 2 shared, 4 experts", False, ("model.num_shared_experts=2", "model.top_k=4")),
    mixtures.Case("DeepSeek-V3, float32", False, (), torch.float32, 2e-6),
]
LOSS, NORM = "train/loss of step", "train/grad_norm of step"
SEEN_IN = {  # where each bug must show first
    "rate_a_step_late": "train/lr of step 1:",
    "norms_decay": LOSS,
    "betas_swapped": LOSS,
    "adam_eps_of_torch": LOSS,
    "clip_without_clamp": f"validation/loss of step {loop.EVAL_EVERY}:",
    "norm_after_clipping": NORM,
    "mask_not_counted": f"{LOSS} 1:",
    "same_batch_at_every_step": f"{LOSS} 2:",
    "first_validation_batch_only": f"validation/loss of step {loop.EVAL_EVERY}:",
    "rate_of_the_first_group": LOSS,
    "norms_of_a_block_mixed_up": "logits",
    "norm_eps_of_torch": "logits",
    "rope_frequencies_of_half_the_range": "logits",
    "gelu_for_silu": "logits",
}


@dataclasses.dataclass(frozen=True)
class Ready:
    """The text, and what the loop found on it."""

    text: Path
    expected: Expected


@pytest.fixture(scope="session")
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchors")
    write_text(folder / "text.txt")
    return Ready(folder / "text.txt", loop.train(record.parsed(folder / "text.txt", folder), folder / "text.txt"))


def name(one):
    return one.name if hasattr(one, "name") else one.__name__


@pytest.mark.parametrize("case", MODELS, ids=name)
def test_the_model_is_llama(case):
    print(case.name, check_model(case))  # pytest -s shows the errors that docs/proof.md quotes


@pytest.mark.parametrize("case", MIXTURES, ids=name)
def test_the_mixtures_are_mixtral_and_deepseek(case):
    print(case.name, check_mixture(case))


@pytest.mark.parametrize("min_lr_ratio", [0.0, 0.1])
@pytest.mark.parametrize("kind", LrSchedule)
def test_the_schedules_are_those_of_transformers_a_step_earlier(kind, min_lr_ratio):
    config = OptimConfig(Optimiser.adamw, lr=3e-4, weight_decay=0.1, schedule=kind, min_lr_ratio=min_lr_ratio)
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=config.lr)
    theirs = schedule(optimiser, config, 40)
    assert optimiser.param_groups[0]["lr"] == 0, "the rate that has no step in the lab"
    for step in range(1, 41):
        optimiser.step()
        theirs.step()
        assert lr_at(step, 40, config) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12, abs=1e-18)


def test_the_ten_steps_exercise_what_they_must(ready):
    """Some steps clip and others do not, and the targets with a loss are spread unevenly over microbatches."""
    clipped = [norm > loop.CLIP_NORM for norm in ready.expected.norms]
    assert 2 < sum(clipped) < 8
    assert all(abs(norm / loop.CLIP_NORM - 1) > 0.01 for norm in ready.expected.norms), "not within rounding"
    counts = ready.expected.valid
    assert sum(first != second for first, second in counts) > 5
    assert any(0 in step and sum(step) > 0 for step in counts), "a microbatch without any target"


def test_every_number_of_a_run_is_that_of_the_loop(ready, tmp_path):
    print("ten steps", check_ten_steps(ready.expected, ready.text, tmp_path / "runs"))


@pytest.mark.parametrize("bug", reference.BUGS, ids=name)
def test_a_bug_that_one_device_shares_is_seen(bug, ready, tmp_path, record_property):
    """Each is planted alone, and an ordinary test of this file must fail: the same call, with the same bound."""
    counter, where = Counter(), SEEN_IN[bug.__name__]
    with bug(counter), pytest.raises(Differs, match=where) as found:
        if where == "logits":
            check_model(GQA)
        else:
            check_ten_steps(ready.expected, ready.text, tmp_path / "runs")
    assert counter.calls > 0, "the patched line never ran"
    record_property("planted_bug", f"{bug.__name__}: {found.value}")


def test_a_number_without_an_anchor_is_seen(ready, tmp_path, monkeypatch):
    original = Metrics._performance
    monkeypatch.setattr(Metrics, "_performance", lambda self, step_ms: original(self, step_ms) | {"perf/new": 1.0})
    with pytest.raises(Differs, match="step 1 has values that are held against nothing: perf/new"):
        check_ten_steps(ready.expected, ready.text, tmp_path / "runs")


def test_the_comparison_can_fail():
    with pytest.raises(Differs, match="shape"):
        hold("x", torch.zeros(2), torch.zeros(3), 1)
    with pytest.raises(Differs, match="nan"):
        hold("x", float("nan"), 1.0, 1)
    assert hold("x", 1.5, 1.0, 1) == 0.5
