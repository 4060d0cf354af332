"""Tools that run after training: compare runs, prove a strategy, measure the lab itself."""
