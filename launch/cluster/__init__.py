"""Runs on several machines: how they find each other, and the jobs of schedulers that start them."""
