"""Exports whose runtimes take minutes to compile for: two layers, from a run on four processes."""

import pytest

from scripts import export as tool
from scripts.exporting import artefact
from scripts.exporting.running.opened import open_runner
from tests.saved_runs import train_on
from train.checkpoint.whole.trained import open_trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
