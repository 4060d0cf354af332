"""The options of the launchers of several hosts. Torch is not imported."""
