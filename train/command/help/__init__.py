"""The help of the command line: `--help`, the descriptions of keys and presets, and hints for misspelt ones."""
