"""Tools that run after training: they compare runs, verify a strategy, and measure the lab itself."""
