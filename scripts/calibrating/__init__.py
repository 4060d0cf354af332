"""The parts of scripts/matmul.py: what is measured, how it is timed, and where it goes; and a count of what context
parallelism keeps in memory."""
