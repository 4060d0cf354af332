"""Generation with kept keys and values gives what the whole model gives, at every position."""

import pytest
import torch

from scripts.generating import cache, timing
from scripts.generating.answering import store_as_computed
from scripts.generating.cache import CachedModel, decode_step, empty_slots, write
from scripts.generating.generate import Generator, Sampling, choose, generate
from scripts.generating.timing import drawn
from train.command import cli
from train.config.problems import BadInput

LENGTH = 24
MODELS = {
    "dense": ["model.num_heads=4", "model.num_kv_heads=4"],
    "grouped": ["model.num_heads=8", "model.num_kv_heads=2"],
    "tied": ["model.tie_embeddings=true", "model.attention=eager"],
    "mixture": ["model=moe_tiny"],
    "softmax mixture": ["model=moe_tiny", "model.score_function=softmax", "model.top_k=1", "model.balance=none"],
}
BOUNDS = {"float64": 1e-9, "float32": 1e-4}
CASES = [(model, precision) for model in MODELS for precision in BOUNDS]
CHUNKS = (5, 7, *[1] * (LENGTH - 12))  # a prompt, more of it, and then token by token


def made(*words, device="cpu"):
    """A model of two layers with drawn weights, and a batch of three rows of as many tokens as it reads."""
    sizes = ["model.num_layers=2", "model.dim=64", "model.ffn_dim=96", f"train.seq_len={LENGTH}", "model.vocab_size=97"]
    config = cli.configured(["strategy=single", *words, *sizes, "model.init_scale=3"])
    tokens = torch.randint(97, (3, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    return drawn(config, torch.device(device)), tokens


def in_chunks(read, tokens_BT):
    return torch.cat([read(part) for part in tokens_BT.split(CHUNKS, dim=1)], dim=1)


def error(one, other):
    return float((one - other).abs().max())


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_every_position_is_that_of_the_whole_forward(model, precision):
    model, tokens = made(*MODELS[model], f"precision={precision}")
    whole = model(tokens)
    assert float(whole.std()) > 0.5, "logits that are all alike would agree with anything"
    cached = CachedModel(model, batch=3)
    assert error(in_chunks(cached, tokens), whole) <= BOUNDS[precision]
    with pytest.raises(ValueError, match="24 of 24 slots are filled"):
        cached(tokens[:, :1])
    cached.start()  # what the slots held before is not seen
    backwards = tokens.flip(1)
    assert error(in_chunks(cached, backwards), model(backwards)) <= BOUNDS[precision]
    assert torch.equal(model(tokens), whole), "the model itself keeps its kernels"


@pytest.mark.parametrize(("model", "precision"), CASES)
def test_a_step_with_fixed_shapes_is_the_same(model, precision):
    model, tokens = made(*MODELS[model], f"precision={precision}")
    step, position = decode_step(model), 0
    keys, values = (slots.fill_(1e3) for slots in empty_slots(model, 3, LENGTH))  # what an earlier prompt left

    def read(part):
        nonlocal position
        logits, *new = step(part, torch.tensor([position]), keys, values)
        for slots, one in zip((keys, values), new, strict=True):
            write(slots, one, position)
        position += part.shape[1]
        return logits

    assert error(in_chunks(read, tokens), model(tokens)) <= BOUNDS[precision]


def test_a_step_is_exported_for_any_number_of_tokens():
    model, tokens = made(*MODELS["grouped"])
    step, slots = decode_step(model), empty_slots(model, 3, LENGTH + 8)
    count = torch.export.Dim("count", min=1, max=LENGTH)
    given = (tokens[:, :5].contiguous(), torch.tensor([0]), *slots)
    graph = torch.export.export(step, given, dynamic_shapes=({1: count}, None, None, None)).module()
    for number in (1, 2, LENGTH):
        assert error(graph(tokens[:, :number], torch.tensor([0]), *slots)[0], model(tokens[:, :number])) <= 1e-4


@pytest.mark.parametrize("model", ["grouped", "mixture"])
def test_rows_of_several_lengths_are_those_without_padding(model, monkeypatch):
    model, tokens = made(*MODELS[model], "precision=float64")
    padding = [0, 4, 9]

    def largest():
        cached = CachedModel(model, batch=3)
        cached.start(padding)
        rows = torch.stack([row.roll(pad) for row, pad in zip(tokens, padding, strict=True)])
        logits = in_chunks(cached, rows)
        alone = [model(row[None, : LENGTH - pad])[0] for row, pad in zip(tokens, padding, strict=True)]
        return max(error(logits[i, pad:], alone[i]) for i, pad in enumerate(padding))

    assert largest() <= 1e-9
    monkeypatch.setattr(cache.CachedModel, "_mask", lambda self, positions: None)
    assert largest() > 1e-3, "without the mask, padding is seen"


def most_likely(model, prompt, count):
    """The same without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def made_of(model, prompts, tokens, **more):
    *_, rows = generate(Generator(model, len(prompts)), prompts, tokens, **more)
    return [(row.tokens, row.ended) for row in rows]


PROMPTS = [[5, 17, 3, 3, 60], [8], [44, 45, 46, 47, 48, 49, 50]]


def test_a_batch_gives_what_each_prompt_gives_alone():
    model, _ = made(precision := "precision=float64", *MODELS["mixture"])
    expected = [(most_likely(model, prompt, 9), "tokens") for prompt in PROMPTS]
    assert made_of(model, PROMPTS, 9) == expected, precision
    assert len({tuple(tokens) for tokens, _ in expected}) == 3


def test_a_row_ends_at_its_stop_and_at_the_last_position():
    model, _ = made()
    free = most_likely(model, PROMPTS[0], LENGTH - 5 + 1)
    assert made_of(model, [PROMPTS[0]], 10**6) == [(free, "limit")], (
        "the model reads as many tokens as it has positions"
    )
    (stopped, why), other = made_of(model, PROMPTS[:2], 12, stop=free[3:5])
    assert why == "stop" and stopped == free[: len(stopped)] and stopped[-2:] == free[3:5]
    assert other == (most_likely(model, PROMPTS[1], 12), "tokens"), "the other row goes on"


def test_draws_follow_the_seed_the_temperature_and_top_k():
    model, _ = made()
    drawn_twice = [made_of(model, PROMPTS, 10, sampling=Sampling(1.0, seed=4)) for _ in range(2)]
    assert drawn_twice[0] == drawn_twice[1] != made_of(model, PROMPTS, 10, sampling=Sampling(1.0, seed=5))
    assert made_of(model, PROMPTS, 10, sampling=Sampling(2.0, top_k=1)) == made_of(model, PROMPTS, 10)
    assert all(id < 7 for tokens, _ in made_of(model, PROMPTS, 10, sampling=Sampling(3.0), known=7) for id in tokens)

    logits = torch.tensor([0.0, 1.0, 3.0, 2.0]).repeat(20_000, 1)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 3)):
        expected = logits[0] / temperature
        if top_k:
            expected[0] = -torch.inf
        ids = choose(logits, Sampling(temperature, top_k), torch.Generator().manual_seed(0))
        shares = ids.bincount(minlength=4) / len(ids)
        assert error(shares, expected.softmax(-1)) < 0.015
    assert choose(logits[:1], Sampling(1e-320), torch.Generator()).tolist() == [2]
    with pytest.raises(BadInput, match="the model's logits are not finite"):
        choose(logits[:1] * torch.nan, Sampling(), torch.Generator())


def test_weights_may_be_stored_in_the_dtype_of_the_computation():
    for words in (MODELS["mixture"], MODELS["tied"]):
        model, tokens = made(*words, "precision=bf16")
        before = model(tokens)
        store_as_computed(model)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(model(tokens), before)


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "precision"), CASES)
def test_every_position_on_a_gpu(model, precision):
    assert not torch.backends.cuda.matmul.allow_tf32
    model, tokens = made(*MODELS[model], f"precision={precision}", device="cuda")
    assert error(in_chunks(CachedModel(model, batch=3), tokens), model(tokens)) <= BOUNDS[precision]


def test_the_two_ways_that_are_timed_give_the_same_tokens():
    model, _ = made("precision=float64")
    ways = [[int(token) for token in way(model, LENGTH)] for way in timing.WAYS.values()]
    assert ways[0] == ways[1] and len(ways[0]) == LENGTH and len({*ways[0]}) > 3
    found = timing.measured(model, 10, turns=2)
    assert {way: [len(turn) for turn in turns] for way, turns in found.items()} == {
        way: [10, 10] for way in timing.WAYS
    }
    assert all(ms > 0 for turns in found.values() for turn in turns for ms in turn)
