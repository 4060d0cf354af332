"""How a process begins, reads its command line, and ends. Torch is not imported."""
