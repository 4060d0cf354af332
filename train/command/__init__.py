"""How a process starts, reads its command line, and ends. Torch is not imported."""
