"""Runs of launch.netlab: what was predicted for them and what was measured, by the speed of the links."""
