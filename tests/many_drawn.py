"""Build and step hundreds of drawn valid configs, one rank of each: python -m tests.many_drawn [number=210]

tests/test_rules.py and tests/test_ledger.py do the same with a few configs in every run of the tests. Each config is
run twice by tests/fake_worker.py: once for a step and an evaluation, and once to compare its traffic and its bytes of
state with their closed forms. Each result is a line of build/many_drawn.jsonl, so that an interrupted run can be
continued. The exit code is 1 if any config raised.
"""

import json
import random
import sys
from pathlib import Path

from tests.drawn import NATIVE
from tests.test_rules import SEED, run_fake, valid_configs

FILE = Path("build") / "many_drawn.jsonl"
CHUNK = 10  # configs a process


def main(number: int) -> int:
    FILE.parent.mkdir(exist_ok=True)
    ranks, jobs = random.Random(SEED), []
    for one in valid_configs(number, NATIVE, 64, 6):
        job = {"overrides": [*one.overrides], "world_size": one.world_size, "rank": ranks.randrange(one.world_size)}
        jobs += [job, job | {"count": True}]
    done = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    outcomes = {json.dumps(outcome["job"]): outcome["error"] for outcome in done}
    left = [job for job in jobs if json.dumps(job) not in outcomes]
    for start in range(0, len(left), CHUNK):
        chunk = left[start : start + CHUNK]
        raised = {json.dumps({key: failure[key] for key in job}): failure["error"]
                  for failure in run_fake(chunk) for job in chunk if job.items() <= failure.items()}  # fmt: skip
        with FILE.open("a") as file:
            for job in chunk:
                outcomes[json.dumps(job)] = raised.get(json.dumps(job), "")
                file.write(json.dumps({"job": job, "error": outcomes[json.dumps(job)]}) + "\n")
        print(f"{len(jobs) - len(left) + start + len(chunk)}/{len(jobs)}", flush=True)
    wrong = {text: error for text, error in outcomes.items() if error}
    for text, error in wrong.items():
        print(text, error[-600:], sep="\n")
    print(f"{len(outcomes)} runs of {number} drawn configs, {len(wrong)} raised")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(dict(word.split("=") for word in sys.argv[1:]).get("number", 210))))
