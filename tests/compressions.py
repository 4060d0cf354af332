"""Records of compressed runs with known figures."""

from dataclasses import replace

from scripts.compressing.record import Record, Side
from tests.synthetic_runs import WORK

PARENT = Side(2.0, 1_000_000, 1_000_000, 1000.0, 100.0)


def record(method="nf4", loss=2.1, size=200_000, *, control=None, before=PARENT, seed="a", device="cpu", **options):
    after = Side(loss, size, 2 * size, 500.0, 200.0)
    return Record(
        method=method,
        options=options,
        before=before,
        after=after,
        control=control,
        parent={"run": f"runs/{seed}", "sha256": seed * 64},
        training={},
        tokens=256,
        timing={"prompt": 8, "generated": 8, "rounds": 5, "batch": 1},
        environment={"device": device, "torch": "2.13.0", "omp_threads": 1, "commit": "0123456789"},
        work=WORK,
        weights_sha256="0" * 64,
        command="python scripts/compress.py",
    )


def write(folder, **values):
    folder.mkdir(parents=True)
    made = record(**values)
    made.write(folder)
    return made


def other_loss(loss):
    """A parent with another loss."""
    return replace(PARENT, loss=loss)
