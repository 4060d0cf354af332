"""Expert parallelism, and the balance of the experts."""
