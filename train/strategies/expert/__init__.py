"""Expert parallelism, and load balancing of experts."""
