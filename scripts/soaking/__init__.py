"""What scripts/soak.py runs and measures, and a tool that kills ranks."""
