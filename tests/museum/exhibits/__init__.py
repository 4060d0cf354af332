"""All exhibits: the published bugs by subject, then the lab's own."""

from tests.museum.base import Exhibit
from tests.museum.exhibits import context, data, deepspeed, expert, own, pipeline, tensor, update

_SUBJECTS = (tensor, context, pipeline, data, expert, update, deepspeed, own)
EXHIBITS: tuple[Exhibit, ...] = tuple(exhibit for subject in _SUBJECTS for exhibit in subject.EXHIBITS)
