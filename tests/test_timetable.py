"""Pipeline schedules as tables and pictures."""

import pytest

from train.strategies.pipeline.placement import SCHEDULES, rank_of_stage, stages_of_rank
from train.strategies.pipeline.timetable import (
    Action,
    Paired,
    actions_by_rank,
    closed_form_bubble,
    draw_schedule,
    forward_ticks,
    timetable,
)


def sizes(name):
    facts = SCHEDULES[name]
    for chunks in {facts.least, facts.most or 3}:
        yield from ((p * chunks, p, m) for p in (1, 2, 3, 4) for m in range(1, 13))


def test_1f1b_drawn():
    assert draw_schedule("1f1b", 4, 4, 5).split("\n") == [
        "rank 0  F0 F1 F2 F3 .  .  .  .  .  .  B0 -- F4 B1 -- .  B2 -- .  B3 -- .  B4 --",
        "rank 1  .  F0 F1 F2 .  .  .  .  B0 -- F3 B1 -- F4 B2 -- .  B3 -- .  B4 -- .  .",
        "rank 2  .  .  F0 F1 .  .  B0 -- F2 B1 -- F3 B2 -- F4 B3 -- .  B4 -- .  .  .  .",
        "rank 3  .  .  .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- F4 B4 -- .  .  .  .  .  .",
    ]


@pytest.mark.parametrize("m", [4, 5, 8])
def test_1f1b_lines(m):
    lines = draw_schedule("1f1b", 4, 4, m).split("\n")
    for rank, line in enumerate(lines):
        words = line.split()[2:]
        assert words[:rank] == ["."] * rank
        assert [word for word in words if word[0] == "F"] == [f"F{i}" for i in range(m)]
        assert [word for word in words if word[0] == "B"] == [f"B{i}" for i in range(m)]
        alive = [
            sum(w[0] == "F" for w in words[: i + 1]) - sum(w[0] == "B" for w in words[: i + 1])
            for i in range(len(words))
        ]
        assert max(alive) == 4 - rank, "no more microbatches alive than stages that follow"
    assert closed_form_bubble("1f1b", 4, 4, m) == pytest.approx(3 / (m + 3))


@pytest.mark.parametrize("name", SCHEDULES)
def test_tables_are_whole_and_their_bubble_is_the_closed_form(name):
    facts = SCHEDULES[name]
    compared = 0
    for num_stages, p, m in sizes(name):
        if not facts.accepts(m, p, num_stages):
            continue
        table = timetable(actions_by_rank(name, num_stages, p, m), num_stages)
        done = [action for row in table.rows for _, action in row]
        assert len(set(done)) == len(done)
        assert sum(kind == "F" for kind, _, _ in done) == num_stages * m
        assert sum(kind in "BW" for kind, _, _ in done) == num_stages * m
        for rank, row in enumerate(table.rows):
            assert {stage for _, (_, stage, _) in row} == set(
                stages_of_rank(rank, p, num_stages, v_shaped=facts.v_shaped)
            )
        if (closed := closed_form_bubble(name, num_stages, p, m)) is not None:
            assert table.bubble == pytest.approx(closed, abs=1e-12), (num_stages, p, m)
            compared += 1
    assert compared > 5


def test_the_results_of_a_pair_leave_together():
    first = [Paired("F", 0, 0), Action("F", 0, 1)]
    second = [Action("F", 1, 0), Action("F", 1, 1)]
    starts = [[start for start, _ in row] for row in timetable([first, second], 2).rows]
    assert starts == [[0, 1], [2, 3]]  # and not 1: the first result waits for the second


@pytest.mark.parametrize("name", [name for name, facts in SCHEDULES.items() if facts.least == 2])
def test_rules_refuse_what_torch_refuses(name):
    for num_stages, p, m in sizes(name):
        if not SCHEDULES[name].accepts(m, p, num_stages):
            with pytest.raises(ValueError):
                timetable(actions_by_rank(name, num_stages, p, m), num_stages)


@pytest.mark.parametrize("v_shaped", [False, True])
def test_forward_ticks_need_only_what_earlier_ticks_made(v_shaped):
    for num_stages, p, m in ((4, 4, 3), (8, 4, 5), (2, 1, 4), (4, 2, 1)):
        made = {(-1, i) for i in range(m)}
        for tick in forward_ticks(num_stages, p, m, v_shaped=v_shaped):
            assert len({rank for rank, _, _ in tick}) == len(tick)
            assert all((stage - 1, i) in made for _, stage, i in tick)
            assert all(rank == rank_of_stage(stage, p, v_shaped=v_shaped) for rank, stage, _ in tick)
            made |= {(stage, i) for _, stage, i in tick}
        assert len(made) == (num_stages + 1) * m
