"""Benchmarks around runs: the points of scripts/bench_strategies.sh, their results, and the cost of a checkpoint."""
