"""A resumed run is the undisturbed one: to the bit on the same layout, and in float64 to 1e-9 on any other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.rows.base import F32, F64, configured
from tests.running import job, run_jobs
from tests.test_deepspeed import needs_deepspeed
from train.checkpoint.folder import complete
from train.checkpoint.whole.tensors import differences
from train.config.plan import Plan

WORKER = "tests.resume_worker"
SMALL = (
    *("train.seq_len=16", "train.micro_batch_size=1", "train.steps=4", "model.dim=32", "model.num_heads=4"),
    *("model.num_kv_heads=4", "model.ffn_dim=48", "optim.warmup_steps=2", "runtime.timeout_s=120"),
)
DROPOUT = "model.dropout=0.1"
MIXTURE = ("model=moe_tiny", "model.expert_ffn_dim=32", "model.balance=bias")
BUCKETS = "strategy.bucket_mb=0.01"  # several, so that their order can differ
POWERSGD = ("strategy.comm_hook=powersgd", "strategy.powersgd_rank=2", "strategy.powersgd_start_step=2")


@dataclass(frozen=True)
class Case:
    """A layout that must resume to the bit. `bug`: a planted one, with which it must not."""

    size: int
    words: tuple[str, ...]
    bug: str = ""

    @property
    def name(self) -> str:
        return f"same {' '.join(self.words)} ws{self.size}" + (f" bug:{self.bug}" if self.bug else "")

    @property
    def overrides(self) -> list[str]:
        """With at least two layers, and two microbatches on each data rank: four in a pipeline of two stages."""
        plan = Plan(configured([*SMALL, *self.words]), self.size)
        batch = 2 * plan.data_ranks * plan.degrees["pp"]
        sizes = (f"model.num_layers={max(plan.num_stages, 2)}", f"train.global_batch_size={batch}", F32, DROPOUT)
        return [*SMALL, *sizes, *self.words]


def case(size: int, strategy: str, *words: str, bug: str = "") -> Case:
    return Case(size, (f"strategy={strategy}", *words), bug)


CASES = [
    case(1, "single"),
    *(case(2, name) for name in ("zero1", "fsdp", "tp", "pp", "cp")),
    case(2, "pp", "model.tie_embeddings=true"),
    case(2, "ep", *MIXTURE),
    case(2, "fsdp", "optim=sgd", "optim.momentum=0.9"),
    case(2, "fsdp", "optim=adamw8bit"),
    case(4, "dp", BUCKETS),
    case(4, "dp", BUCKETS, "checkpoint.mode=async"),
    case(4, "dp", BUCKETS, *POWERSGD),
    case(4, "hsdp"),
    *(case(4, name) for name in ("dp_pp", "fsdp_tp", "fsdp_pp", "fsdp_cp", "tp_pp", "cp_tp")),
]
SLOW_CASES = [case(8, "3d"), case(8, "moe_3d", *MIXTURE)]
ENGINES = [case(2, name) for name in ("ds_zero1", "ds_zero2", "ds_zero3", "ds_pp", "ds_autotp")]
# two ranks share the device, for which gloo sends; with nccl there is one
SHARED, ALONE = (("runtime.device=cuda", f"runtime.backend={name}") for name in ("gloo", "nccl"))
ON_A_GPU = [
    *(case(1, name, *ALONE) for name in ("single", "fsdp", "tp", "pp")),
    *(case(2, name, *SHARED) for name in ("fsdp", "tp", "cp")),
    case(2, "dp", BUCKETS, *POWERSGD, *SHARED),
]
BUGGY = [
    case(2, "fsdp", bug="moments_not_restored"),
    case(2, "tp", bug="count_not_restored"),
    case(2, "fsdp", "optim=adamw8bit", bug="codes_not_restored"),
    case(2, "fsdp", bug="masks_begin_again"),
    case(2, "ep", *MIXTURE, bug="biases_not_restored"),
    case(4, "dp", BUCKETS, bug="buckets_not_rebuilt"),
    case(4, "dp", BUCKETS, *POWERSGD, bug="hook_begins_again"),
]


@pytest.fixture(scope="module")
def table(request, tmp_path_factory):
    """Results of the selected cases of a size, in one world for each size, kind of engine and device."""
    done = {}
    selected = {
        item.callspec.params["one"]
        for item in request.session.items
        if item.module is request.module and "one" in getattr(getattr(item, "callspec", None), "params", {})
    }

    def results(one: Case):
        key = (one.size, one in ENGINES, one in ON_A_GPU)
        if key not in done:
            chosen = [other for other in selected if (other.size, other in ENGINES, other in ON_A_GPU) == key]
            jobs = [job(other.name, other.overrides) for other in sorted(chosen, key=lambda other: other.name)]
            done[key] = run_jobs(tmp_path_factory.mktemp("resume"), jobs, size=one.size, worker=WORKER)
        result = done[key][one.name]
        assert "error" not in result, result["error"]
        return result

    return results


def same_to_the_bit(one: Case, table) -> None:
    result = table(one)
    assert result["num_compared"] > 20
    assert result["different"] == []
    undisturbed, resumed = result["losses"]
    assert undisturbed == resumed


def ids(one: Case) -> str:
    return one.name.replace("strategy=", "").replace("strategy.", "")


def quick(cases: list[Case]) -> list[Any]:
    """All of them, those of four ranks as slow."""
    return [pytest.param(one, marks=[pytest.mark.slow] if one.size > 2 else []) for one in cases]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("one", quick(CASES), ids=ids)
def test_same_layout_resumes_to_the_bit(one, table):
    same_to_the_bit(one, table)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("one", SLOW_CASES, ids=ids)
def test_eight_ranks_resume_to_the_bit(one, table):
    same_to_the_bit(one, table)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("one", ENGINES, ids=ids)
def test_engine_resumes_to_the_bit(one, table):
    same_to_the_bit(one, table)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("one", ON_A_GPU, ids=ids)
def test_a_gpu_resumes_to_the_bit(one, table):
    same_to_the_bit(one, table)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("one", quick(BUGGY), ids=ids)
def test_planted_bug_is_seen(one, table, record_property):
    result = table(one)
    record_property("planted_bug", f"{one.bug} ({ids(one)})")
    assert result["calls"], "the planted line never ran"
    assert result["different"] or result["losses"][0] != result["losses"][1]


@dataclass(frozen=True)
class Link:
    """One run of a chain, each of which resumes from the one before, on another layout or another size."""

    size: int
    words: tuple[str, ...]


FLOAT64 = [
    Link(4, ("strategy=dp",)),
    Link(4, ("strategy=tp_pp",)),
    Link(2, ("strategy=fsdp",)),
    Link(1, ("strategy=single",)),
    Link(8, ("strategy=3d",)),
]
FLOAT32 = [Link(4, ("strategy=dp",)), Link(2, ("strategy=ds_zero2",)), Link(2, ("strategy=tp",))]


def chain(links: list[Link], folder: Path, precision: str, near: float) -> None:
    """Run the chain. Each link must have the state that it has read, and the losses of the first link."""
    losses, before = [], None
    for number, link in enumerate(links):
        run = folder / str(number)
        load = f"load:{before} " if before else ""
        words = [*SMALL, "model.num_layers=4", "train.global_batch_size=8", precision, *link.words]
        one = job(f"{load}save:{run}", words)
        result = run_jobs(folder / f"world_{number}", [one], size=link.size, worker=WORKER)[one.name]
        assert "error" not in result, result["error"]
        losses.append(result["losses"])
        if before:
            (old,), (new,) = complete(before), complete(run)
            assert [*differences(old, new)] == [], f"{link.words} did not restore what it read"
        before = run
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=near)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_layouts_continue_the_curve(tmp_path):
    chain(FLOAT64, tmp_path, F64, 1e-9)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeed_continues_the_lab_and_the_lab_continues_deepspeed(tmp_path):
    chain(FLOAT32, tmp_path, F32, 1e-5)
