"""What scripts/soak.py runs and measures."""
