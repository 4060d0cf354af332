"""The search for the fastest layout of a config on a number of devices. Torch is not imported."""
