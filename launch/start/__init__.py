"""How processes are started and ended."""
