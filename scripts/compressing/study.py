"""Every method on one model, over several seeds: python scripts/compressing/study.py FOLDER [key=value …]

    model=tiny seeds=1234,1235,1236      the parents
    steps=3000                           of a parent, at least: more until its validation loss falls by less than 1 % in
                                         the last 500
    retrain=500 distil=3000              the steps of a training after pruning or with rounding, and of a student
    device=cpu jobs=1                    where to train and to measure, and how many processes train at once
    speeds=cpu                           a second device on which speeds are measured
    only=int8_weight_only,nf4            some methods
    other words                          overrides of all trainings, such as data=python_source

It can be started again, and goes on with what is not done. FOLDER/rows.jsonl has a line for each method, seed and
device: what compression.json has, with "of": "parent", or "trained_on" for the post-training quantisation of the parent
trained on, with which quantisation-aware training is compared. The table and the bars are printed at the end. Trainings
are processes of train/main.py, as many at once as jobs says; everything is measured alone, in this process.
"""

from __future__ import annotations

import sys

from scripts.compressing.studying import plan
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.config.world import World


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, end="")
        return 0
    leave_on_interrupt()
    with reported_once(World.single(), trains=False):
        study = plan.read(argv)
        from scripts.compressing.studying.running import run

        study.folder.mkdir(parents=True, exist_ok=True)
        run(study)
    return 0


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
