"""The parts of scripts/matmul.py: what is measured, how it is timed, and where it goes."""
