"""Inputs of layers that wait for the backward in the host's memory (`train.offload_activations`)."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from scripts.verifying import task
from tests.refused import assert_refused_with_a_fix
from tests.rows.base import configured
from train.command.planning.footprint import footprint
from train.command.planning.job import of_plan
from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing
from train.strategies.offload.apply import Input, Offloading
from train.strategies.recompute.apply import apply_checkpointing

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
LAYERS = 6
SIZES = {"cpu": (16, 8), "cuda": (16384, 2048)}  # tokens, width


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((width, 4 * width), (4 * width, width)))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu() * scale)


def layers(device: str, *, offloaded: bool, compiled: bool) -> list[nn.Module]:
    torch.manual_seed(0)
    made: list[nn.Module] = [Layer(SIZES[device][1]).to(device) for _ in range(LAYERS)]
    offloading = Offloading(device)
    for number, layer in enumerate(made):
        apply_checkpointing(layer, ActivationCheckpointing.full, compiled=compiled)
        if compiled:
            layer.forward = torch.compile(layer.forward, backend="inductor" if device == "cuda" else "aot_eager")
        if offloaded:
            layer.forward = offloading.around(layer.forward, first=number == 0)
    return made


def step(made: list[nn.Module], device: str, seed: int) -> list[Tensor]:
    """Gradients of two microbatches."""
    generator = torch.Generator(device).manual_seed(seed)
    scale = torch.tensor(0.5, device=device)
    for _ in range(2):
        x = torch.randn(SIZES[device], generator=generator, device=device, requires_grad=True)
        for layer in made:
            x = layer(x, scale)
        (x * x).mean().backward()
    gradients = [p.grad for layer in made for p in layer.parameters()]
    for layer in made:
        layer.zero_grad()
    return [grad for grad in gradients if grad is not None]


@pytest.mark.timeout(200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own code, which its compiler loads
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the compiler suggests it for float32
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_gradients_are_the_same_to_the_bit(device, compiled):
    stay, leave = (layers(device, offloaded=offloaded, compiled=compiled) for offloaded in (False, True))
    for seed in range(4):
        expected, found = step(stay, device, seed), step(leave, device, seed)
        assert len(found) == 2 * LAYERS
        assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("compiled", [False, True])
def test_two_inputs_are_on_the_device_at_a_time(monkeypatch, compiled):
    made: list[Input] = []
    counts: list[int] = []
    there = Input.taken

    def new(original, self: Input, *args, **named) -> None:
        original(self, *args, **named)
        made.append(self)
        counts.append(sum(one.x is not None for one in made))

    def taken(self: Input) -> Tensor:
        x = there(self)
        counts.append(1 + sum(one.x is not None for one in made))
        return x

    original = Input.__init__
    monkeypatch.setattr(Input, "__init__", lambda self, *args, **named: new(original, self, *args, **named))
    monkeypatch.setattr(Input, "taken", taken)
    step(layers("cpu", offloaded=True, compiled=compiled), "cpu", 0)
    assert len(made) == 2 * LAYERS
    forwards, backwards = counts[:LAYERS], counts[LAYERS : 2 * LAYERS]
    assert forwards == [1] * LAYERS and backwards == [2] * (LAYERS - 1) + [1]


def test_a_second_backward_fetches_again():
    made = layers("cpu", offloaded=True, compiled=False)
    x = torch.randn(SIZES["cpu"], requires_grad=True)
    y = x
    for layer in made:
        y = layer(y, torch.tensor(0.5))
    loss = y.square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_copied_without_gradients():
    offloading = Offloading("cpu")
    forward = offloading.around(partial(torch.add, torch.ones(2)), first=True)
    with torch.no_grad():
        assert torch.equal(forward(torch.ones(2)), torch.full((2,), 2.0))
    assert offloading.newest is None


@pytest.mark.parametrize("device", [GPU])
def test_the_device_needs_less_memory(device):
    peaks = []
    for offloaded in (False, True):
        made = layers(device, offloaded=offloaded, compiled=False)
        step(made, device, 0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(made, device, 1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del made
    size = 4 * SIZES[device][0] * SIZES[device][1]
    assert peaks[0] - peaks[1] >= (LAYERS - 3) * size


def test_the_closed_form_of_memory_has_two_inputs():
    words = "strategy=single model=llama_1b precision=bf16 train.seq_len=32768 train.global_batch_size=2"
    words += " train.activation_checkpointing=full train.loss_chunks=32"
    there, away = (
        footprint(of_plan(Plan(configured([*words.split(), f"train.offload_activations={offload}"]), 1)))
        for offload in ("false", "true")
    )
    one = 32768 * 2048 * 2
    assert there.kinds["activations"] == pytest.approx(16 * one, rel=0.01)
    assert away.kinds["activations"] == pytest.approx(2 * one, rel=0.01)
    assert there.total - away.total == pytest.approx(14 * one)


def test_with_large_inputs_the_peak_is_at_the_last_layer_with_two():
    words = "strategy=single model=llama_1b precision=bf16 train.seq_len=32768 train.micro_batch_size=8"
    words += " train.global_batch_size=8 train.activation_checkpointing=full train.offload_activations=true"
    found = footprint(of_plan(Plan(configured([*words.split(), "train.loss_chunks=32"]), 1)))
    assert found.kinds["activations"] == pytest.approx(2 * 8 * 32768 * 2048 * 2, rel=0.01)
    ends = 4 * 2048 * 32768  # the embedding, or the head
    layer = (found.kinds["parameters"] - 2 * ends) / 16
    assert ends + 14 * layer <= found.kinds["gradients"] < ends + 15.5 * layer


@pytest.mark.parametrize(
    ("line", "size", "rule"),
    [
        ("strategy=dp train.offload_activations=true", 2, "offload_full"),
        (
            "strategy=dp train.offload_activations=true train.activation_checkpointing=selective",
            2,
            "offload_full",
        ),
        (
            "strategy=pp train.offload_activations=true train.activation_checkpointing=full",
            2,
            "offload_pipeline",
        ),
        (
            "strategy=ds_zero1 train.offload_activations=true train.activation_checkpointing=full",
            2,
            "ds_activations",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_fix(line, size, rule):
    assert_refused_with_a_fix(line.split(), size, rule)


def test_a_proof_compares_it_with_what_stays_on_the_device():
    words = ["strategy=dp", "nproc=2", "train.activation_checkpointing=full", "train.offload_activations=true"]
    subject = task.read([*words, "runtime.device=cpu"], "").subjects["dp"]
    assert subject.config.train.offload_activations and not subject.reference.train.offload_activations
