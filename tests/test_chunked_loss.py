"""The loss in chunks: the same numbers as at once, with the logits of one chunk at a time."""

import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scripts.verifying import task
from tests.drawn import Drawn
from tests.footprints import LENGTH, SIZES, compared, dry_runs, fullest
from tests.refused import assert_refused_with_a_fix
from train.config.fields import IGNORE_INDEX
from train.model.transformer import CrossEntropy, Linear
from train.strategies.chunked_loss.apply import loss_in_chunks

ROWS, LENGTH_OF_ROW, VOCABULARY = 3, 7, 50
WIDTH = 5  # less than the tokens of a chunk, so that no weight looks like a chunk's logits
TOKENS = ROWS * LENGTH_OF_ROW
SCALE = 1 / 17  # what comes into the loss's backward: 1 / the number of valid tokens of all ranks
UNIT = 2**-8  # of bf16: rounding moves a number by half of this at the most


def problem(dtype: torch.dtype) -> tuple[Linear, Tensor, Tensor]:
    """A head, its input and targets of which some, and a whole chunk, have no loss."""
    generator = torch.Generator().manual_seed(0)
    head = Linear(WIDTH, VOCABULARY).to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    x = torch.randn(ROWS, LENGTH_OF_ROW, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS, LENGTH_OF_ROW), generator=generator)
    targets[0] = targets[1, ::2] = IGNORE_INDEX
    return head, x, targets


def results(loss: Tensor, x: Tensor, weight: Tensor, scale: float = SCALE) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss * scale, (x, weight))
    return dict(zip(("loss", "x", "weight"), (loss.detach(), *gradients), strict=True))


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).abs().max() / right.double().abs().max())


def at_once(head: Linear, x: Tensor, targets: Tensor) -> Tensor:
    return CrossEntropy()(head(x), targets)


@pytest.mark.parametrize("chunks", [2, 3, 8, TOKENS])
def test_loss_and_gradients_are_those_of_torch(chunks):
    head, x, targets = problem(torch.float64)
    logits = F.linear(x, head.weight).flatten(0, 1)
    right = results(F.cross_entropy(logits, targets.flatten(), reduction="sum"), x, head.weight)
    found = results(loss_in_chunks(head, CrossEntropy(), chunks, x, targets), x, head.weight)
    assert {name: error(found[name], right[name]) <= 1e-12 for name in right} == dict.fromkeys(right, True)
    with torch.no_grad():
        assert error(loss_in_chunks(head, CrossEntropy(), chunks, x, targets), right["loss"]) <= 1e-12


@pytest.mark.parametrize("scale", [1 / 16, SCALE])
@pytest.mark.parametrize("chunks", [2, 3, TOKENS])
def test_bf16_loses_one_rounding_more_at_the_most(chunks, scale):
    """The weight's gradient: that of a chunk's product. Both: that of what comes in, unless it is a power of two."""
    head, x, targets = problem(torch.bfloat16)
    found = results(loss_in_chunks(head, CrossEntropy(), chunks, x, targets), x, head.weight, scale)
    once = results(at_once(head, x, targets), x, head.weight, scale)
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in once.items()}
    exact = head.weight.detach().bfloat16().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    logits = F.linear(wide, exact).flatten(0, 1)
    right = results(F.cross_entropy(logits, targets.flatten(), reduction="sum"), wide, exact, scale)
    more = {"loss": 0.0, "x": 0.0 if scale == 1 / 16 else UNIT, "weight": UNIT}
    for name in right:
        assert error(found[name], right[name]) <= 1.1 * error(once[name], right[name]) + more[name], name


class Alive(TorchDispatchMode):
    """The most rows, of all dtypes together, of the storages that exist at a time and have the vocabulary as the last
    dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, int] = {}  # by the storage's address
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (VOCABULARY,) and tensor.ndim > 1:
                storage = tensor.untyped_storage()
                at = storage.data_ptr()
                if at not in self.rows:
                    weakref.finalize(storage, self.rows.pop, at, None)
                self.rows[at] = storage.nbytes() // tensor.itemsize // VOCABULARY
                self.most = max(self.most, sum(self.rows.values()))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_one_chunk_exist_at_a_time(dtype):
    head, x, targets = problem(dtype)
    chunked = partial(loss_in_chunks, head, CrossEntropy(), 4)
    seen: dict[str, tuple[int, int]] = {}
    for name, loss in {"at once": partial(at_once, head), "in chunks": chunked}.items():
        with Alive() as trained:
            loss(x, targets).backward()
        with Alive() as evaluated, torch.no_grad():
            loss(x, targets)
        seen[name] = trained.most - WIDTH, evaluated.most - WIDTH  # without the weight, as it is transposed
    casts = dtype is torch.bfloat16
    of_a_chunk = -(-TOKENS // 4)
    # the logits, their cast, their softmax, and for training two gradients: some of them
    assert seen["in chunks"] == (4 * of_a_chunk, (2 + casts) * of_a_chunk)
    assert seen["at once"][0] == 3 * TOKENS


def test_nothing_of_a_chunk_is_kept_for_the_backward():
    head, x, targets = problem(torch.bfloat16)
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = loss_in_chunks(head, CrossEntropy(), 4, x, targets)
    assert kept[-2:] == [(TOKENS, WIDTH), (VOCABULARY, WIDTH)], "the gradients of x and of the weight"
    total.backward()


@pytest.mark.parametrize(
    ("line", "size", "rule"),
    [
        ("strategy=tp strategy.loss_parallel=false train.loss_chunks=4", 2, "chunk_logits"),
        ("strategy=dp train.seq_len=16 train.loss_chunks=17", 2, "chunk_tokens"),
        ("strategy=cp train.seq_len=16 train.loss_chunks=9", 2, "chunk_tokens"),
        ("strategy=dp train.loss_chunks=4 train.teacher=runs/x", 2, "chunk_teacher"),
        ("strategy=dp train.loss_chunks=4 precision=fp8", 2, "chunk_fp8"),
        ("strategy=ds_zero1 train.loss_chunks=4", 2, "ds_loss_chunks"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_fix(line, size, rule):
    assert_refused_with_a_fix(line.split(), size, rule)


def test_a_proof_compares_it_with_the_whole_loss():
    subject = task.read(["strategy=dp", "nproc=2", "train.loss_chunks=4", "runtime.device=cpu"], "").subjects["dp"]
    assert (subject.config.train.loss_chunks, subject.reference.train.loss_chunks) == (4, 1)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_closed_form_of_memory_is_what_a_dry_run_counts():
    small = [word for word in SIZES if not word.startswith(("model.num_layers=", "model.vocab_size="))]
    words = (*small, LENGTH, "model.num_layers=2", "model.vocab_size=65536", "train.loss_chunks=4")
    drawn = [
        Drawn(("strategy=single", *words, "train.global_batch_size=4"), 1),
        Drawn(("strategy=fsdp_tp", *words, "train.global_batch_size=8"), 4),
        Drawn(("strategy=pp", *words, "strategy.schedule=gpipe", "train.global_batch_size=8"), 2),
    ]
    jobs = [(one, one.world_size - 1 if "strategy=pp" in one.overrides else fullest(one)) for one in drawn]
    for (one, rank), result in zip(jobs, dry_runs(jobs, timeout_s=180), strict=True):
        assert "error" not in result, result["error"]
        found = compared(one, rank, result["kinds"])
        assert result["kinds"]["logits"] > 0.05 * found.total
        assert abs(found.error) < 0.03 and abs(found.worst_kind[0]) < 0.03, (one, found)
