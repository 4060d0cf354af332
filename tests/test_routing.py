"""The proof of a mixture: where rounding decides, a strategy uses one device's choice of experts."""

import contextlib

import pytest
import torch

from tests.test_model import CPU, build, config
from train.config.schema import ActivationCheckpointing, Precision
from train.config.world import World
from train.model.moe import routers
from train.model.spans import span, watched
from train.proof import routing
from train.proof.routing import LEAST_MARGIN, Routing, is_within_rounding, router_name
from train.ranks.distributed import Runtime, build_mesh, process_group
from train.strategies.recompute.apply import apply_checkpointing

CONFIG = config(
    *("model=moe_tiny", "model.num_layers=2", "train.seq_len=16", "strategy=single"),
    *("precision=float64", "train.global_batch_size=4", "train.micro_batch_size=2"),
)
LAYER, ROW, POSITION = 1, 3, 5  # a token of the second microbatch
TOKENS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
MICROBATCHES = TOKENS.split(CONFIG.train.micro_batch_size)


@pytest.fixture
def begin():
    """Starts a Routing with its model: begin(reference) -> (routing, model)."""
    runtime = Runtime(CPU, "gloo")
    with process_group(runtime, World.single(), 60), watched() as work:
        mesh = build_mesh(CONFIG, runtime)

        def started(reference, mode=ActivationCheckpointing.none):
            model, found = build(CONFIG.model), Routing(CONFIG, mesh, work, reference)
            for layer in model.layers.values():
                apply_checkpointing(layer, mode)
            found.attach(model)
            return found, model

        yield started


def train(model, *, says=True, backwards=(0, 1)):
    """Run the microbatches, and return the gradients. `says`: whether the loop says which microbatch runs."""
    region = span if says else lambda *of: contextlib.nullcontext()
    losses = {}
    for i, tokens in enumerate(MICROBATCHES):
        with region("F", 0, i):
            losses[i] = model.loss(model(tokens), tokens)
        if backwards == (0, 1):
            with region("B", 0, i):
                losses[i].backward()
    for i in backwards if backwards != (0, 1) else ():
        with region("B", 0, i):
            losses[i].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def record(begin):
    found, model = begin({})
    found.phase("step 1")
    train(model)
    return found.collect()


def with_another_choice(record):
    """The record with another pair of experts for one token."""
    name = f"step 1 {router_name(LAYER)}"
    changed = record[name].clone()
    changed[ROW, POSITION] = (changed[ROW, POSITION] + 1) % CONFIG.model.num_experts
    changed[ROW, POSITION] = changed[ROW, POSITION].sort().values
    assert not torch.equal(changed, record[name])
    return record | {name: changed}


@pytest.mark.parametrize(
    ("expected", "margin", "answer"),
    [
        ((0, 2), 0.02, True),
        ((2, 0), 0.02, True),
        ((0, 2), 0.005, False),  # expert 1 is clearly better than expert 2
        ((1, 2), 0.02, False),  # expert 0 is clearly missing, though 1 and 2 are nearly equal
        ((0, 3), 0.02, False),
        ((1, 0), 0.02, False),  # the same experts: nothing to replay
    ],
)
def test_a_choice_is_replayed_only_where_the_scores_allow_it(expected, margin, answer):
    ranked, own = torch.tensor([[[0.5, 0.4, 0.39, 0.1]]]), torch.tensor([[[0, 1]]])
    assert is_within_rounding(ranked, own, torch.tensor([[expected]]), margin).item() is answer


def test_all_experts_are_never_another_choice():
    every = torch.tensor([[[1, 0]]])
    assert not is_within_rounding(torch.tensor([[[0.5, 0.4]]]), every, every.flip(-1), 1.0).any()


def test_the_order_of_a_tokens_experts_does_not_depend_on_their_scores(begin):
    """The scores of two experts can be equal but for rounding. What the dispatch gives for each choice would then be
    called wrong."""
    found, _ = begin({})
    found.phase("step 1")
    scores = torch.tensor([0.4, 0.3, 0.2, 0.1]).expand(2, 16, 4)
    for own in ([0, 1], [1, 0]):
        chosen = found.choose(0, scores, torch.tensor(own).expand(2, 16, 2))
        assert torch.equal(chosen, torch.tensor([0, 1]).expand(2, 16, 2))


def test_an_equal_model_replays_nothing(begin):
    reference = record(begin)
    assert {x.shape for x in reference.values()} == {(4, 16, 2)}
    found, model = begin(reference)
    found.phase("step 1")
    train(model)
    assert found.facts() == {"replayed": 0, "choices": 2 * TOKENS.numel()}
    assert all(torch.equal(x, reference[name]) for name, x in found.collect().items())


def test_a_choice_beyond_rounding_stays_and_is_seen(begin):
    reference = record(begin)
    found, model = begin(with_another_choice(reference))
    found.phase("step 1")
    train(model)
    assert found.facts()["replayed"] == 0
    assert all(torch.equal(x, reference[name]) for name, x in found.collect().items())


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("mode", ActivationCheckpointing)
def test_a_recomputed_forward_uses_the_choices_of_the_original(begin, monkeypatch, mode, says):
    reference = with_another_choice(record(begin))
    monkeypatch.setitem(LEAST_MARGIN, Precision.float64, 1.0)
    gradients = []
    for kind in (ActivationCheckpointing.none, mode):
        found, model = begin(reference, kind)
        found.phase("step 1")
        gradients.append(train(model, says=says))
        assert found.facts() == {"replayed": 1, "choices": 2 * TOKENS.numel()}
        assert all(torch.equal(x, reference[name]) for name, x in found.collect().items())
    assert all(torch.equal(gradient, gradients[0][name]) for name, gradient in gradients[1].items())


def test_backwards_may_run_in_another_order(begin, monkeypatch):
    """As in looped_bfs, which begins with the last microbatch."""
    reference = with_another_choice(record(begin))
    monkeypatch.setitem(LEAST_MARGIN, Precision.float64, 1.0)
    gradients = []
    for backwards in ((0, 1), (1, 0)):
        found, model = begin(reference, ActivationCheckpointing.full)
        found.phase("step 1")
        gradients.append(train(model, backwards=backwards))
        assert found.facts()["replayed"] == 1
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-12), name


def test_phases_are_apart(begin):
    found, model = begin({})
    for phase in ("step 1", "evaluation 1"):
        found.phase(phase)
        with torch.no_grad() if phase.startswith("evaluation") else contextlib.nullcontext():
            for i, tokens in enumerate(MICROBATCHES):
                with span("F", 0, i):
                    model(tokens if phase == "step 1" else tokens.flip(0))
    names = {f"{phase} {router_name(layer)}" for phase in ("step 1", "evaluation 1") for layer in (0, 1)}
    collected = found.collect()
    assert collected.keys() == names
    first, then = (collected[f"{phase} {router_name(0)}"] for phase in ("step 1", "evaluation 1"))
    assert torch.equal(first[:2].flip(0), then[:2])
    assert not torch.equal(first, then)


@pytest.mark.filterwarnings("default")  # the compiler of torch 2.13 causes warnings in torch itself
def test_a_compiled_block_is_compiled_once_for_all_microbatches(begin, monkeypatch):
    reference = with_another_choice(record(begin))
    monkeypatch.setitem(LEAST_MARGIN, Precision.float64, 1.0)
    found, model = begin(reference)
    plain: dict[str, torch.Tensor] = {}
    for compiled in (False, True):
        for layer in model.layers.values() if compiled else ():
            layer.forward = torch.compile(layer.forward, backend="eager")
        for step in range(3):
            found.phase("step 1")
            with torch._dynamo.config.patch(error_on_recompile=compiled and step > 0):
                gradients = train(model)
            model.zero_grad()
        assert all(torch.equal(x, reference[name]) for name, x in found.collect().items())
        plain = plain or gradients
    assert found.facts()["replayed"] == 6
    assert all(torch.allclose(gradient, plain[name], atol=1e-12) for name, gradient in gradients.items())


def test_the_hook_is_called_by_every_router(begin):
    found, model = begin({})
    assert all(router.on_choice is not None for router in routers(model.layers).values())
    assert found.layers == [0, 1]


def test_a_dense_model_has_nothing_to_replay(begin):
    found, _ = begin({})
    found.config = config("model=tiny", "train.seq_len=16", "strategy=single")
    assert found.facts() == {}
    assert found.collect() == {}
    assert routing.router_biases(build(found.config.model), found.mesh, found.config) == {}


def test_a_watcher_that_ends_does_not_end_another_one_that_has_seen_the_same():
    with watched() as routed:
        with watched(), span("F", 0, 1):
            pass
        with span("F", 0, 2):
            assert (routed.kind, routed.microbatch) == ("F", 2)
