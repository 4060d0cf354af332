"""A rank of a world whose layers sleep: it records a step of each job. The name of the job says what is planted."""

import re
import time
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

from tests import sleeping
from train.model.spans import span
from train.proof import jobs
from train.ranks import collectives


@contextmanager
def slow_link(seconds: float, calls: list[float]):
    """Imitate a slow link: every exchange and every reduction of `tp` takes `seconds` longer."""

    def slowed(send):
        def later(*args):
            calls.append(seconds)
            with span("wait"):
                time.sleep(seconds)
                return send(*args)

        return later

    with ExitStack() as stack:
        for name in ("_exchanged", "_reduced"):
            send = getattr(collectives, name)
            stack.enter_context(mock.patch.object(collectives, name, slowed(send)))
        yield


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    config = job.config
    late: list[float] = []
    words = dict(re.findall(r"(\w+):(\S+)", job.name))
    with (
        sleeping.layers(float(words["unit"]), words.get("slow_layer", "")) if "unit" in words else nullcontext(),
        slow_link(float(words["link"]), late) if "link" in words else nullcontext(),
    ):
        result = sleeping.record(config, site)
    return {**result, "late_s": sum(late) / config.train.steps} if site.world.rank == 0 else {}
