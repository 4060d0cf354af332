"""Examinations of this machine, for launch.doctor. Each part has pure functions that judge what was measured."""
