"""Where the tokens of a run come from: texts, folders, JSON Lines and token files. Torch is not imported."""
