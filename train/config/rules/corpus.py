"""Rules of the data; which keys only some data read stands in `idle.py`."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.schema import DataSource


def jsonl_field(plan: Plan) -> Finding | None:
    data = plan.config.data
    if data.source is not DataSource.jsonl or data.field:
        return None
    return Finding("data=jsonl needs data.field, the field of each line that holds the text", ("data.field=text",))


RULES = (Rule("jsonl_field", "a line of JSON Lines may have several texts", jsonl_field),)
