"""Rules of the data. `read_when.py` says which keys only some kinds of data read."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.schema import DataSource


def jsonl_field(plan: Plan) -> Finding | None:
    data = plan.config.data
    if data.source is not DataSource.jsonl or data.field:
        return None
    return Finding("data=jsonl needs data.field, the field of each line that holds the text", ("data.field=text",))


RULES = (
    Rule(
        "jsonl_field",
        "a line of JSON Lines may have several fields, so the field of the text must be named",
        jsonl_field,
    ),
)
