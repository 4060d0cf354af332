"""Where a strategy goes wrong: right strategies have no finding, and each kind of planted bug has the right one.

tests/test_locating_kinds.py tests the single questions without a world, and `python -m tests.museum` asks about many
more bugs.
"""

from html.parser import HTMLParser

import pytest

from tests.rows.base import COMPILED, F32, Row, row
from tests.rows.expert import AUX
from tests.running import run_rows
from tests.test_verify import SMALL, verify
from train.proof.locating.finding import Finding, Kind

RING = ("strategy=cp", "strategy.cp_method=ring")
RECOMPUTED = "train.activation_checkpointing=full"
RIGHT = [
    row(2, "strategy=tp"),
    row(2, "strategy=fsdp"),
    row(2, *RING),
    row(2, "strategy=pp"),
    row(2, "strategy=tp", options=(F32,)),
    row(2, "strategy=ep", options=AUX),
]
# strategy; module, axis, kind, and the ranks that have a wrong value, where this is known
WRONG = {
    "rope_from_zero": (RING, "layers.0.attention.kernel:q", "cp", Kind.positions, (0, 1)),
    "norm_gradient_not_summed": (("strategy=tp",), "gradients", "tp", Kind.own_part, ()),
    "norm_counts_replicas": (("strategy=tp",), "norm", "tp", Kind.counted_again, ()),
    "shards_do_not_decay": (("strategy=fsdp",), "weights", "dp_shard", Kind.decay, ()),
    "norms_rounded_on_every_rank": (("strategy=dp",), "replicas", "dp_replicate", Kind.replicas, (0, 1)),
    "judged_on_the_first_labels": (("strategy=pp",), "evaluate", "pp", Kind.stale, ()),
    "own_tokens_times_ranks": (("strategy=dp",), "evaluate", "dp_replicate", Kind.own_part, ()),
}
ROWS = {bug: row(2, *strategy, bug=bug) for bug, (strategy, *_) in WRONG.items()}
ELSEWHERE = {
    "recomputed": row(2, *RING, RECOMPUTED, bug="rope_from_zero"),
    "compiled": row(2, *RING, options=(F32, COMPILED), bug="rope_from_zero"),
}
ZERO2 = row(2, "strategy=ds_zero2", options=(F32,))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is found in these rows, by their names. One world runs them all."""
    rows = [*RIGHT, *ROWS.values()]
    return run_rows(tmp_path_factory.mktemp("world"), rows, traced=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_terms_of_a_mixture_under_tp_and_cp_are_no_parts_of_a_sequence(tmp_path):
    """A rank of tp has one term of a sum for all its tokens. With as many ranks in cp, half of the sequence has the
    shape of this term too."""
    one = row(4, "strategy=cp_tp", options=AUX)
    assert finding(run_rows(tmp_path, [one], traced=True), one) is None


def finding(results, one: Row) -> Finding | None:
    result = results[one.name]
    assert "finding" in result, result
    return result["finding"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("right", RIGHT, ids=lambda one: one.name)
def test_in_a_right_strategy_nothing_is_found(found, right):
    assert finding(found, right) is None


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", WRONG)
def test_a_planted_bug_is_located(found, bug):
    one = finding(found, ROWS[bug])
    assert one is not None
    assert (one.module, " or ".join(one.guess.axes), one.guess.kind, one.ranks) == WRONG[bug][1:], one.sentence()
    assert found[ROWS[bug].name]["patched_calls"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("how", "modules"), [("recomputed", ("layers.0.attention.kernel",)), ("compiled", ("layers.0",))]
)
def test_the_block_is_found_if_it_is_recomputed_or_compiled(tmp_path, how, modules):
    results = run_rows(tmp_path / "rows", [ELSEWHERE[how]], traced=True)
    one = finding(results, ELSEWHERE[how])
    assert one is not None and one.what == "activation"
    assert one.module.partition(":")[0] in modules, one.sentence()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_in_a_right_engine_of_deepspeed_nothing_is_found(tmp_path):
    assert finding(run_rows(tmp_path / "rows", [ZERO2], traced=True), ZERO2) is None


# what scripts/verify.py shows


class Page(HTMLParser):
    """Collects the text of the cells by class, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.cells: dict[str, list[str]] = {}

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class", "")))
            if tag == "td":
                self.cells.setdefault(self.open[-1][1], []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "td":
            self.cells[self.open[-1][1]][-1] += data


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_of_a_wrong_strategy_the_command_prints_the_place_and_writes_a_page(tmp_path):
    file = tmp_path / "page.html"
    run = verify("nproc=2", "strategy=dp", "precision=float64", *SMALL, "--html", str(file), bad_worker="wrong")
    assert run.returncode == 1, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert any(line.split()[0] == "gradients" and line.endswith("differs") for line in lines if line)
    assert "DIFFERS from one device in" in lines[-1]
    sentence = next(line for line in lines if line.startswith("  first wrong: "))
    assert sentence.startswith("  first wrong: the update: gradients of head.weight, error ")
    assert "; own part only along dp_replicate" in sentence
    page = Page()
    page.feed(file.read_text())
    page.close()
    assert not page.open
    assert len(page.cells["first"]) == 1 and float(page.cells["first"][0]) > 0.1
    assert len(page.cells["right"]) > 40 and "wrong" not in page.cells
