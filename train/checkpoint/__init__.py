"""Checkpoints: what a run saves so that it can go on, on the same layout or on another."""
