"""The model's contract: what strategies rely on."""

import dataclasses

import pytest
import torch

from train.command import cli
from train.config.flops import flops_per_token, matmul_parameters
from train.config.schema import AttentionKernel, Precision
from train.model.transformer import (
    IGNORE_INDEX,
    CrossEntropy,
    EagerKernel,
    SdpaKernel,
    Transformer,
    dtypes,
    rope_table,
    rotate,
)
from train.model.weights import initial_value, materialise

CPU = torch.device("cpu")


def config(*overrides):
    return cli.parse(cli.parser("test", ""), list(overrides))[0]


def build(model_config, precision=Precision.float64, seed=1):
    model = Transformer(model_config, **dtypes(precision))
    materialise(model, "", model_config, seed=seed, device=CPU)
    return model


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("tiny", 1.542),
        ("small", 123.6),
        ("llama_1b", 889.3),
        ("moe_1b", 2550.5),
        ("llama_8b", 8030.3),
        ("llama_70b", 70553.7),
    ],
)
def test_presets_have_their_size_and_need_no_memory(name, millions):
    model = Transformer(config(f"model={name}", "train.seq_len=64").model, **dtypes(Precision.float32))
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


def test_flops_follow_the_convention():
    model = config("model=llama_1b", "train.seq_len=4096").model
    assert matmul_parameters(model) / 1e6 == pytest.approx(822, abs=0.5)
    assert flops_per_token(model, 4096) == 6 * matmul_parameters(model) + 12 * 16 * 2048 * 4096


def test_the_mixture_works_as_hard_as_the_dense_model():
    """A token uses as many weights in moe_1b as in llama_1b, and those of the router."""
    dense, mixture = (config(f"model={name}", "train.seq_len=64").model for name in ("llama_1b", "moe_1b"))
    router = mixture.num_layers * mixture.dim * mixture.num_experts
    assert matmul_parameters(mixture) == matmul_parameters(dense) + router
    model = Transformer(mixture, **dtypes(Precision.float32))
    idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) * 6 // 8
    active = sum(p.numel() for p in model.parameters()) - idle
    assert (active / 1e6, matmul_parameters(mixture) / 1e6) == pytest.approx((889.5, 822.3), abs=0.06)


def test_weights_are_a_function_of_seed_and_name_alone():
    model_config = config().model
    whole, again, other = build(model_config), build(model_config), build(model_config, seed=2)
    part = Transformer(model_config, **dtypes(Precision.float64))
    for name in [str(i) for i in range(5)]:
        del part.layers[name]
    part.embed = None
    materialise(part, "", model_config, seed=1, device=CPU)
    weights = dict(whole.named_parameters())
    for name, p in part.named_parameters():
        assert torch.equal(p, weights[name])
    for name, p in again.named_parameters():
        assert torch.equal(p, weights[name])
    assert not torch.equal(weights["head.weight"], other.head.weight)
    assert not torch.equal(weights["layers.0.attention.wq.weight"], weights["layers.1.attention.wq.weight"])


def test_block_by_block_equals_all_at_once():
    model_config = config().model
    model = Transformer(model_config, **dtypes(Precision.float64))
    for name, layer in model.layers.items():
        materialise(layer, f"layers.{name}.", model_config, seed=1, device=CPU)
    materialise(model, "", model_config, seed=1, device=CPU)
    for (name, p), (_, q) in zip(model.named_parameters(), build(model_config).named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_initial_scale():
    model_config = config("model=small").model
    wide = initial_value("layers.0.feed_forward.up.weight", torch.Size((2048, 768)), model_config, 0)
    residual = initial_value("layers.0.feed_forward.down.weight", torch.Size((768, 2048)), model_config, 0)
    assert wide.std().item() == pytest.approx(0.5 * 768**-0.5, rel=0.01)
    assert residual.std().item() == pytest.approx(0.5 * (2048 * 24) ** -0.5, rel=0.01)
    assert torch.equal(initial_value("norm.weight", torch.Size((768,)), model_config, 0), torch.ones(768))


def test_tied_embeddings_are_one_parameter():
    model = build(config("model.tie_embeddings=true").model)
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_kernels_agree_and_are_causal():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 16, 8, dtype=torch.float64) for heads in (8, 4, 4))
    fused, eager = SdpaKernel()(q, k, v), EagerKernel()(q, k, v)
    assert torch.allclose(fused, eager, atol=1e-12)
    v2 = v.clone()
    v2[:, :, 9:] += 1
    assert torch.equal(EagerKernel()(q, k, v2)[:, :, :9], eager[:, :, :9])


def test_kernel_is_chosen_by_the_config():
    model = build(config("model.attention=eager").model)
    assert isinstance(model.layers["0"].attention.kernel, EagerKernel)
    assert config().model.attention is AttentionKernel.sdpa


def test_rope_depends_on_distance_alone():
    rope = rope_table(32, 16, 10000.0)
    q, k = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    turned_q, turned_k = (rotate(x.expand(1, 32, 1, 16), rope)[0, :, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    assert scores[5, 2].item() == pytest.approx(scores[25, 22].item(), abs=1e-12)
    assert scores[5, 2].item() != pytest.approx(scores[5, 3].item(), abs=1e-3)


def test_positions_move_a_shard_to_its_place():
    model = build(config("train.seq_len=16").model)
    tokens = torch.randint(0, 256, (2, 16))
    assert torch.equal(model(tokens), model(tokens, torch.arange(16)))
    part = tokens[:, :8]
    assert torch.allclose(model(part, torch.arange(8, 16)), model(part)), "distances are the same"
    assert not torch.allclose(model(part, torch.arange(0, 16, 2)), model(part))


def test_stages_compose_to_the_model():
    model_config = config().model
    whole, first, second = (build(model_config) for _ in range(3))
    first.norm = first.head = None
    second.embed = None
    for i in range(8):
        del (second if i < 3 else first).layers[str(i)]
    tokens = torch.randint(0, 256, (2, 16))
    assert torch.equal(second(first(tokens)), whole(tokens))


def test_loss_counts_valid_tokens_only():
    logits, targets = torch.randn(2, 4, 10), torch.randint(0, 10, (2, 4))
    loss = CrossEntropy()
    masked = targets.clone()
    masked[0, :3] = IGNORE_INDEX
    assert loss(logits, masked).item() == pytest.approx(
        (loss(logits[:1, 3:], targets[:1, 3:]) + loss(logits[1:], targets[1:])).item(), rel=1e-5
    )
    assert loss(logits, torch.full_like(targets, IGNORE_INDEX)).item() == 0


def test_bf16_casts_compute_and_keeps_weights():
    model = build(config().model, Precision.bf16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logits = model(torch.randint(0, 256, (1, 8)))
    assert logits.dtype is torch.bfloat16
    loss = model.loss(logits, torch.randint(0, 256, (1, 8)))
    assert loss.dtype is torch.float32
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_dropout_acts_in_training_only():
    model = build(dataclasses.replace(config().model, dropout=0.5))
    tokens = torch.randint(0, 256, (1, 8))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
