"""With real processes whose layers sleep, the measured bubble is that of the schedule, and planted delays are found."""

import pytest

from tests.running import job, run_jobs

SMALL = (
    *("model.dim=16", "model.num_heads=2", "model.num_kv_heads=2", "model.ffn_dim=16", "train.seq_len=8"),
    *("train.micro_batch_size=1", "train.steps=4", "precision=float32", "runtime.device=cpu", "runtime.timeout_s=60"),
    "metrics.profile_every=1",
)
# stages on a rank, and microbatches for each rank
SCHEDULES = {
    "gpipe": (1, 1),
    "1f1b": (1, 1),
    "interleaved_1f1b": (2, 1),
    "interleaved_zero_bubble": (2, 1),
    "dualpipev": (2, 2),
}
UNIT = {2: 0.03, 4: 0.03, 8: 0.05}  # seconds that a layer sleeps, by processes
NEAR = 5.0  # percent of the step


def with_longer_sleeps(check, folder, size):
    """Calls check(folder, size, unit) with layers that sleep one, two, then four units, until it passes; the last must.

    The work around a layer takes a time of its own. A slow or busy machine makes its share of the step larger, and a
    longer sleep makes it smaller. A wrong schedule or measurement stays wrong at every length.
    """
    for times in (1, 2, 4):
        try:
            return check(folder / str(times), size, times * UNIT[size])
        except AssertionError as error:
            if times == 4:
                raise
            print(f"layers that sleep {times} x {UNIT[size]} s: {error}")


def pipeline(name, size, schedule, microbatches, stages):
    words = ["strategy=pp", f"strategy.schedule={schedule}", f"train.global_batch_size={microbatches}"]
    return job(name, [*SMALL, *words, f"model.num_layers={size * stages}"])


def run(folder, jobs, size):
    results = run_jobs(folder, jobs, size=size, timeout_s=120, worker="tests.bubble_worker")
    for result in results.values():
        assert "error" not in result, result["error"]
    return {name: result for name, result in results.items()}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", [4, 8])
def test_bubble_is_that_of_the_schedule(size, tmp_path):
    with_longer_sleeps(bubble_is_that_of_the_schedule, tmp_path, size)


def bubble_is_that_of_the_schedule(folder, size, unit):
    jobs = [
        pipeline(f"{name} unit:{unit}", size, name, size * microbatches, stages)
        for name, (stages, microbatches) in SCHEDULES.items()
        if size == 4 or microbatches == 1  # on 8 ranks the others take long
    ]
    for name, result in run(folder, jobs, size).items():
        values = result["values"]
        measured, theory = values["pipeline/bubble_pct"], values["pipeline/bubble_theory_pct"]
        closed = values["pipeline/bubble_closed_form_pct"]
        print(f"{size} ranks, {name}: measured {measured:.1f} %, theory {theory:.1f} %, closed form {closed:.1f} %")
        assert measured == pytest.approx(closed, abs=NEAR), name
        assert measured == pytest.approx(theory, abs=NEAR), name


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(500)
def test_a_slow_stage_shows_as_the_slowest_rank_and_in_the_bubble_alone(tmp_path):
    with_longer_sleeps(a_slow_stage_shows, tmp_path, 4)


def a_slow_stage_shows(folder, size, unit):
    plain, slow = f"plain unit:{unit}", f"slow unit:{unit} slow_layer:2"
    found = run(folder, [pipeline(name, size, "1f1b", 8, 1) for name in (plain, slow)], size)
    before, after = found[plain]["values"], found[slow]["values"]
    assert after["stragglers/slowest_rank"] == 2
    grown = after["stragglers/compute_ms_max"] - before["stragglers/compute_ms_max"]
    assert grown == pytest.approx(8 * 1e3 * unit, rel=0.25)  # eight microbatches, a unit each
    assert after["stragglers/compute_ms_min"] == pytest.approx(before["stragglers/compute_ms_min"], rel=0.15)
    assert after["pipeline/bubble_pct"] > before["pipeline/bubble_pct"] + 3
    assert after["pipeline/bubble_pct"] == pytest.approx(after["pipeline/bubble_theory_pct"], abs=NEAR)
    sent = {tag: value for tag, value in before.items() if tag.endswith(("_mib", "_calls")) and tag.startswith("comm/")}
    assert sent and sent == {tag: after[tag] for tag in sent}
    backward = [result["values"]["time/backward_ms"] for result in (found[plain], found[slow])]
    assert backward[1] == pytest.approx(backward[0], rel=0.15)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(500)
def test_a_slow_link_shows_in_exposed_communication_alone(tmp_path):
    with_longer_sleeps(a_slow_link_shows, tmp_path, 2)


def a_slow_link_shows(folder, size, unit):
    words = ["strategy=tp", "model.num_layers=2", "train.global_batch_size=2"]
    plain, slow = f"plain unit:{unit}", f"slow unit:{unit} link:{2 * unit / 3}"
    found = run(folder, [job(name, [*SMALL, *words]) for name in (plain, slow)], size)
    before, after = found[plain]["values"], found[slow]["values"]
    assert found[slow]["late_s"] > 0
    grown = after["time/communication_ms"] - before["time/communication_ms"]
    assert grown == pytest.approx(1e3 * found[slow]["late_s"], rel=0.2)
    exposed = sum(v - before[t] for t, v in after.items() if t.startswith("comm/tp/") and t.endswith("_exposed_ms"))
    assert exposed == pytest.approx(grown, rel=0.2)
    for part in ("forward", "backward"):
        assert after[f"time/{part}_ms"] == pytest.approx(before[f"time/{part}_ms"], rel=0.2), part
