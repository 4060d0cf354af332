"""Tools that run after the runs: compare, verify, benchmarks."""
