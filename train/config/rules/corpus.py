"""Rules of the data: a key that the chosen data does not read would do nothing, so it is refused."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import PurePath

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.schema import DataConfig, DataSource

TEXTS, TOKENS = (DataSource.text, DataSource.jsonl), (DataSource.tokens,)
READ_BY = {"path": (*TEXTS, *TOKENS), "dtype": TOKENS, "glob": TEXTS, "field": (DataSource.jsonl,)}
ENDINGS = {
    **dict.fromkeys((".jsonl", ".ndjson"), DataSource.jsonl),
    **dict.fromkeys((".bin", ".npy", ".idx"), DataSource.tokens),
}


def unread(key: str) -> Callable[[Plan], Finding | None]:
    """The check of one key that only some sources read."""
    default = DataConfig.__dataclass_fields__[key].default

    def check(plan: Plan) -> Finding | None:
        data = plan.config.data
        value, readers = getattr(data, key), READ_BY[key]
        if value == default or data.source in readers:
            return None
        shown, unset = (str(v.value if isinstance(v, Enum) else "null" if v is None else v) for v in (value, default))
        likely = ENDINGS.get(PurePath(data.path or "").suffix.lower(), DataSource.text)
        ordered = sorted(readers, key=lambda source: source is not likely)
        message = f"data.{key}={shown} is not read by data={data.source.value}, which would train on another text"
        if key != "path":
            message = f"data.{key}={shown} is not read by data={data.source.value}"
        field = {DataSource.jsonl: " data.field=text"}  # which data=jsonl sets too
        fixes = tuple(f"data.source={source.value}{field.get(source, '')}" for source in ordered)
        return Finding(message, (*fixes[:2], f"data.{key}={unset}"), f"use data={ordered[0].value}")

    return check


def jsonl_field(plan: Plan) -> Finding | None:
    data = plan.config.data
    if data.source is not DataSource.jsonl or data.field:
        return None
    return Finding("data=jsonl needs data.field, the field of each line that holds the text", ("data.field=text",))


RULES = (
    *(Rule(f"unread_data_{key}", f"only some data read data.{key}", unread(key)) for key in READ_BY),
    Rule("jsonl_field", "a line of JSON Lines may have several texts", jsonl_field),
)
