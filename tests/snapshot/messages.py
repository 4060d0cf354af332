"""The content of a message, independent of its wording: the keys that it names, their values, and proposed overrides.
Also whether the messages of two records have the same content."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

# The lines whose message may say something else after the restructure, each with the reason. The exit code must be the
# same for these too, and what their new message offers must work.
BOUND = "the bound of min_lr_ratio is its field's"
SHORTER = "num_experts=0 alone works, as presets' own values of the other keys are not refused"
DECLARED = "options of the tools are declared, and hints know them"
SCALARS = "the rows of the gradient norm follow from who holds what, and come in another order"
ALLOWED: dict[str, str] = {
    **dict.fromkeys((f"local nproc=1 strategy=dp optim.min_lr_ratio={x}" for x in ("1.0001", "2", "1.5")), BOUND),
    **dict.fromkeys(
        (f"local nproc=2 strategy={x} model=moe_tiny" for x in ("ds_zero1", "ds_zero3", "ds_autotp")), SHORTER
    ),
    "local nproc=2 strategy=fsdp strategy.async_tp=true": "an option of tp is refused where tp is not used",
    "local force=1": DECLARED,
    "explain batch=micro": DECLARED,
    **dict.fromkeys(
        (
            "explain nproc=4 strategy=cp_tp",
            "explain nproc=4 strategy=fsdp_tp",
            "explain nproc=16 strategy=fsdp_tp train.global_batch_size=16",
            "explain nproc=16 strategy=4d train.global_batch_size=16",
            "explain nproc=16 strategy=3d train.global_batch_size=16",
            "explain nproc=8 model=moe_tiny strategy=moe_3d",
            "explain nproc=8 strategy=fsdp_tp model=llama_8b hardware=h200_sxm precision=bf16",
            "explain nproc=8 strategy=cp_tp model=llama_8b hardware=h200_sxm precision=bf16",
            "explain nproc=8 strategy=3d model=llama_8b hardware=h200_sxm precision=bf16",
            "explain nproc=4 strategy=cp_tp strategy.cp_method=ring",
            "explain nproc=4 strategy=cp_tp strategy.cp_method=ulysses",
            "explain nproc=4 strategy=fsdp_tp strategy.cpu_offload=true",
            "explain nproc=4 strategy=fsdp_tp strategy.reshard_after_forward=false",
        ),
        SCALARS,
    ),
}

GROUPS = "strategy|model|data|optim|hardware|train|compile|runtime|metrics"
KEY = re.compile(rf"\b(?:{GROUPS})(?:\.[a-z_0-9]+)+|[a-z_]+(?==)")
NUMBER = r"(?<![\w.])-?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)"
VALUE = re.compile(rf"=(\[[^\]]*\]|[^\s,;:)]*[^\s,;:).?])|(?<!\w)'([^']+)'(?!\w)|({NUMBER})")
NUMBERS = re.compile(NUMBER)
# how many problems there are, and advice on the grammar, which names no key
NOISE = re.compile(r"\d+ problems?, nothing was trained:|for these \d+ together:|\b(?:key|group)=\S+")

WORD = r"[+~]*[a-z_]+(?:\.\w+)*=(?:\[[^\]]*\]|'[^']*'|[^\s,;:|?()…]++)(?![|…])"
TOGETHER = rf"{WORD}(?: {WORD})*"
OFFER = re.compile(rf"\b(?i:use|try|set|give|choose|pass|add) ({TOGETHER}(?:(?:, or |, | or ){TOGETHER})*)")
NO_OVERRIDE = re.compile(r"(?:key|group)=|[a-z_.]+=[A-Z]+$")  # key=value, data.path=FILE


def offers(text: str) -> list[str]:
    """The overrides that a message offers, each alternative as `a=b c=d`, in the order of their keys."""
    found = [re.split(r", or |, | or ", run[1].rstrip(".")) for run in OFFER.finditer(text)]
    lines = [" ".join(sorted(line.split())) for alternatives in found for line in alternatives]
    return [*dict.fromkeys(line for line in lines if not any(map(NO_OVERRIDE.match, line.split())))]


def mended(line: str, offer: str) -> str:
    """The command line in which the proposed overrides replace those of the same keys."""
    tool, *words = line.split(" ")
    keys = {_key(word) for word in offer.split()}
    kept = [word for word in words if _key(word) not in keys]
    return " ".join([tool.replace("main", "local"), *kept, *offer.split()])


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def without_offers(text: str) -> str:
    return NOISE.sub("", OFFER.sub("", text))


def keys(text: str) -> set[str]:
    return set(KEY.findall(text))


def values(text: str) -> set[str]:
    """Values of keys, quoted words, and numbers."""
    return {next(filter(None, found)) for found in VALUE.findall(text)}


def lost(before: str, after: str) -> list[str]:
    """What one message contains and the other does not, without the proposed overrides."""
    one, other = without_offers(before), without_offers(after)
    gone = [f"the key {key}" for key in sorted(keys(one) - keys(other))]
    for value in sorted(values(one)):
        if not re.search(rf"(?<![\w.]){re.escape(value)}(?!\w)", other):
            gone.append(f"the value {value}")
    return gone


@dataclass
class Outcome:
    """`differences`: changes, which must not exist. `notes`: what is the same before and after."""

    same_code: int = 0
    same_words: int = 0
    offers_kept: int = 0
    offers: int = 0
    working: int = 0
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(before: dict[str, Any], after: dict[str, Any]) -> Outcome:
    """Compare two records of refusals.py."""
    result = Outcome()
    for line, old in before.items():
        new = after.get(line)
        if new is None:
            result.differences.append(f"{line}\n    is not in the second record")
            continue
        found = []
        if new["code"] == old["code"]:
            result.same_code += 1
        else:
            found.append(f"exit code {old['code']}, then {new['code']}")
        gone = lost(old["text"], new["text"]) if line not in ALLOWED else []
        in_order = sorted if line in ALLOWED else list
        if not old["code"] and in_order(NUMBERS.findall(old["text"])) != in_order(NUMBERS.findall(new["text"])):
            gone.append("every number in the same order")
        result.same_words += not gone
        fewer = [*set(old["offers"]) - set(new["offers"])] if line not in ALLOWED else []
        result.offers_kept += len(old["offers"]) - len(fewer)
        found += [f"no longer names {what}" for what in gone] + [f"no longer offers {what}" for what in fewer]
        for offer, code in new["offers"].items():
            result.offers += 1
            result.working += code == 0
            if code and old["offers"].get(offer) == code:
                result.notes.append(f"{line}: offers {offer}, which ends with exit code {code}, before and after")
            elif code:
                found.append(f"offers {offer}, which ends with exit code {code}")
        if found:
            shown = "\n".join(f"      {part}" for part in (old["text"].strip(), "--", new["text"].strip()))
            result.differences.append("\n    ".join([line, *found]) + "\n" + shown)
    result.differences += [f"{line}\n    is not in the first record" for line in after.keys() - before.keys()]
    return result


def show(result: Outcome, lines: int) -> None:
    for text in [*result.notes, *result.differences]:
        print(text)
    for line, reason in ALLOWED.items():
        print(f"allowed to say something else: {line}: {reason}")
    print(f"{lines} lines: {result.same_code} same code, {result.same_words} same key and value, "
          f"{result.offers_kept} fixes still offered, {result.working} of {result.offers} fixes validate")  # fmt: skip
