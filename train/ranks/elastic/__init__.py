"""Training goes on when a rank is lost, without a restart (`runtime.elastic`).

A *place* is a process that torchrun starts: its number is torchrun's RANK and never changes. It is a *keeper*
(`train/command/process/keeper.py`), which starts the process that trains, outlives it, and starts it again when it is
killed. A *generation* is the time in which the same places train together; each has a world, process groups and ranks
of its own. The *roll* knows which places are alive, and says when a generation is over and who is in the next one. It
is kept by the keeper of place 0, so that no rank's end can end it.
"""
