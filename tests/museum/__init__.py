"""A museum of real bugs: published ones, planted into the lab's own functions. `python -m tests.museum` runs it."""

from tests.museum import context, data, deepspeed, expert, pipeline, tensor, update, vocabulary
from tests.planted.base import Bug

_SUBJECTS = (tensor, vocabulary, context, pipeline, data, expert, update, deepspeed)
BUGS: dict[str, Bug] = {bug.__name__: bug for subject in _SUBJECTS for bug in subject.BUGS}
