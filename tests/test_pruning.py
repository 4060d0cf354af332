"""What pruning leaves of a model, against the definitions written out."""

import pytest
import torch
from torch.nn import functional as F

from scripts.compressing.methods.prune import kept, prunable, prune
from scripts.compressing.methods.student import even_layers
from scripts.compressing.packed import MASK, VALUES, dense, one_in_a_byte, sparse, two_in_a_byte
from train.command import cli
from train.config.problems import BadInput
from train.model.transformer import Transformer, dtypes
from train.model.weights import materialise

WORDS = ["strategy=single", "model.num_layers=2", "train.seq_len=8", "model.dim=32", "model.num_heads=4"]


@pytest.fixture
def model():
    config = cli.configured([*WORDS, "model.num_kv_heads=2", "model.ffn_dim=40"])
    made = Transformer(config.model, **dtypes(config.precision))
    materialise(made, "", config.model, seed=1, device=torch.device("cpu"))
    return made.eval().requires_grad_(False)


def share(model):
    return {name: float((layer.weight == 0).float().mean()) for name, layer in prunable(model).items()}


@pytest.mark.parametrize("calibrated", [False, True], ids=["magnitude", "wanda"])
def test_of_four_columns_two_stay_and_the_rest_of_the_model_too(model, calibrated):
    before = {name: value.clone() for name, value in model.named_parameters()}
    tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(0))
    prune(model, None, tokens if calibrated else None)
    layers = prunable(model)
    assert len(layers) == 14 and "head.weight" not in layers
    for name, value in model.named_parameters():
        if name in layers:
            zeros = (value == 0).unflatten(-1, (-1, 4)).sum(-1)
            assert (zeros == 2).all(), name
            assert torch.equal(value[value != 0], before[name][value != 0])
        else:
            assert torch.equal(value, before[name])


def test_wandas_score_is_the_weight_times_the_norm_of_its_pruned_models_input(model):
    """The second block's wq, whose inputs are what the first block gives after it is pruned."""
    tokens = torch.randint(256, (3, 8), generator=torch.Generator().manual_seed(0))
    weight = model.layers["1"].attention.wq.weight.clone()
    untouched = model.layers["1"].attention_norm(model.layers["0"](model.embed(tokens), model.rope))
    prune(model, 0.25, tokens)
    x = model.layers["1"].attention_norm(model.layers["0"](model.embed(tokens), model.rope)).flatten(0, 1)
    score = weight.abs() * x.norm(dim=0)
    wanted = torch.stack([row >= row.sort().values[8] for row in score])  # 8 of a row's 32 become 0
    pruned = model.layers["1"].attention.wq.weight
    assert torch.equal(pruned != 0, wanted)
    for other in (weight.abs(), weight.abs() * untouched.flatten(0, 1).norm(dim=0)):
        alone = torch.stack([row >= row.sort().values[8] for row in other])
        assert not torch.equal(wanted, alone), "the test could not tell the score from another one"


def test_by_magnitude_the_smallest_of_a_matrix_go_wherever_they_are(model):
    model.layers["0"].attention.wq.weight[0] *= 1e-3
    prune(model, 0.5, None)
    assert all(zeros == pytest.approx(0.5, abs=1e-3) for zeros in share(model).values())
    assert (model.layers["0"].attention.wq.weight[0] == 0).all()
    assert kept(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 0.5, by_row=True).tolist() == [[1, 0], [0, 1]]


def test_codes_and_sparse_weights_come_back_to_the_bit():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3).view(6, 8)
    packed = two_in_a_byte(codes)
    assert packed.shape == (6, 4) and packed.dtype is torch.uint8
    assert torch.equal(one_in_a_byte(packed), codes)
    weight = F.dropout(torch.randn(5, 7), 0.5)
    parts = sparse(weight)
    assert parts[MASK].numel() == 5 and torch.equal(dense(parts[MASK], parts[VALUES], weight.shape), weight)
    for mask, values in ((parts[MASK][:-1], parts[VALUES]), (parts[MASK], parts[VALUES][:-1])):
        with pytest.raises(ValueError, match="are no weight of"):
            dense(mask, values, weight.shape)


def test_a_student_has_the_even_layers():
    names = [f"layers.{i}.norm" for i in range(5)] + ["embed.weight"]
    found = even_layers({name: name for name in names}, 5)
    assert found == {"embed.weight": "embed.weight", "layers.0.norm": "layers.0.norm", "layers.1.norm": "layers.2.norm"}
    with pytest.raises(BadInput, match="half the layers"):
        even_layers({"layers.0.norm": 0}, 1)
