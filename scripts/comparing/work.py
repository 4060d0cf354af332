"""What a run computes, in words for people: model, parameters, batch, data, precision."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from scripts.comparing.runs import Run
from train.record.run_files import GIVEN, Record, clean, is_count, number
from train.strategies import memory

SIZES = ("num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
EXPERTS = ("num_experts", "expert_ffn_dim", "num_shared_experts")
Facts = dict[str, str]


def work_of(run: Run) -> Record:
    """`work` of work.json, else the same keys of config.yaml, nested by their first word."""
    if run.compared:
        return run.compared
    groups: Record = {}
    for key, value in run.config.items():
        group, _, name = key.partition(".")
        if name:
            groups.setdefault(group, {})[name] = value
        else:
            groups[group] = value
    return groups


def facts_of(run: Run) -> Facts:
    """Name and words of everything that decides the numbers, in the order in which a reader asks."""
    work = work_of(run)
    model, data, train, optim = (_group(work, name) for name in ("model", "data", "train", "optim"))
    facts = {
        "model": _model(model),
        "parameters": _count(num_parameters(model)),
        "batch": _batch(train),
        "steps": _count(train.get("steps")),
        "data": _data(data, run),
        "optimiser": _optimiser(optim),
        "precision": clean(work.get("precision", ""), 20),
        "seed": clean(train.get("seed", ""), 20),
        "given": ", ".join(f"{clean(key, 20)} {clean(value, 12)}" for key, value in _group(work, GIVEN).items()),
    }
    return {name: words for name, words in facts.items() if words}


def work_in_words(run: Run) -> str:
    """One line; the hash for whoever wants to find the runs."""
    facts = facts_of(run)
    if "parameters" in facts:
        facts["parameters"] += " parameters"
    if "steps" in facts:
        facts["steps"] += " steps"
    if "seed" in facts:
        facts["seed"] = f"seed {facts['seed']}"
    return f"{', '.join(facts.values()) or 'not said'} ({run.work_hash or 'no hash'})"


def num_parameters(model: Record) -> int | None:
    """All that are stored, every expert too; None if the sizes are not there."""
    sizes = {name: model.get(name, 0 if name in EXPERTS else None) for name in (*SIZES, *EXPERTS)}
    if not all(is_count(size) for size in sizes.values()) or not sizes["num_heads"]:
        return None
    known = SimpleNamespace(**sizes, top_k=model.get("top_k", 0), tie_embeddings=bool(model.get("tie_embeddings")))
    return memory.num_parameters(known)[0]  # type: ignore[arg-type]


def short_count(value: float) -> str:
    """1.59 M; whole below 1,000."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}"


def _group(work: Record, name: str) -> Record:
    value = work.get(name)
    return value if isinstance(value, dict) else {}


def _model(model: Record) -> str:
    name = clean(model.get("name") or "", 40)
    layers, width = model.get("num_layers"), model.get("dim")
    if not is_count(layers) or not is_count(width):
        return name
    experts = f", {model['num_experts']} experts" if is_count(model.get("num_experts")) and model["num_experts"] else ""
    return f"{name} ({layers} layers of width {width}{experts})".strip()


def _batch(train: Record) -> str:
    rows, length = train.get("global_batch_size"), train.get("seq_len")
    if not is_count(rows):
        return ""
    return f"{rows:,} sequences of {length:,} tokens a step" if is_count(length) else f"{rows:,} sequences a step"


def _data(data: Record, run: Run) -> str:
    source = clean(data.get("source") or "", 40)
    tokens = run.facts.get("tokens")
    return f"{source} ({short_count(tokens)} tokens)" if source and tokens else source


def _optimiser(optim: Record) -> str:
    name, rate = clean(optim.get("name") or "", 20), number(optim.get("lr"))
    return f"{name} at {rate:g}" if name and rate is not None else name


def _count(value: Any) -> str:
    return short_count(value) if is_count(value, 10**18) else ""
