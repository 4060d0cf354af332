"""Writes docs/proven-products.md from the results of `tests/many_proven.py`."""

from collections.abc import Sequence

from scripts.verifying.report import Answer
from tests import proven
from tests.many_proven import Proven, groups, is_alarm

COMMAND = "python -m tests.many_proven; python -m tests.many_proven --write"
EVERYWHERE = {f"{key}={value}" for key, value in proven.BASE.items()}


def page(done: Sequence[Proven]) -> str:
    commits = " and ".join(sorted({one.commit for one in done})) or "none"
    versions = " and ".join(sorted({one.torch for one in done})) or "none"
    alarms = [one for one in done if is_alarm(one)]
    return f"""# Products that were proven

<!-- written by `{COMMAND}`: change tests/many_proven.py, not this page -->

A proof that calls a right strategy wrong is as useless as one that calls a wrong strategy right. So {len(done)} configs
were drawn by the seed {proven.SEED} from all presets, their degrees and options, models, batches and precisions, as far
as the rules allow them, on 2 to 8 ranks. Each was compared with one device, column by column ([proof.md](proof.md)),
and the localiser searched each for the first wrong thing. None of them has a known bug, so whatever is called wrong is
a false alarm, or a bug that nobody knew. Dropout, compilation, asynchronous tensor parallelism and PowerSGD, which
starts after the steps of the proof, are not drawn. Models in bf16 are wider (heads of 16 features instead of 4),
because gradients of such narrow heads are mostly rounding there.

{len(alarms)} of {len(done)} were called wrong. The results are of commit {commits}, torch {versions}, on a machine
with 2 CPU cores, by `{COMMAND}`. After a change of the code, only the configs that it
concerned were run again, so there may be several commits.

{summary(done)}

"Worst" is the error of the worst column relative to its bound; 1 would be at the bound. Every config also has
`{" ".join(sorted(EVERYWHERE))}`, if its line does not say another value.

{table(done)}
"""


def summary(done: Sequence[Proven]) -> str:
    lines = ["| | " + " | ".join(a.value for a in Answer) + " | found by the localiser | largest “worst” |"]
    lines.append("|---" * (len(Answer) + 3) + "|")
    for title, some in groups(done).items():
        numbers = [sum(one.answer is answer for one in some) for answer in Answer]
        numbers.append(sum(bool(one.finding) for one in some))
        lines.append(f"| {title} | {' | '.join(map(str, numbers))} | {max(one.share for one in some):.1e} |")
    return "\n".join(lines)


def table(done: Sequence[Proven]) -> str:
    lines = ["| ranks | config | answer | worst | s |", "|---|---|---|---|---|"]
    for one in done:
        words = " ".join(word for word in one.overrides if word not in EVERYWHERE)
        said = "; ".join(text for text in (one.answer.value, one.finding, *one.reason.splitlines()[-1:]) if text)
        worst = f"{one.column.split()[0]} {one.share:.1e}" if one.column else ""
        lines.append(f"| {one.world_size} | `{words}` | {said} | {worst} | {one.seconds:g} |")
    return "\n".join(lines)
