"""What the command line says of itself: `--help`, the words for keys and presets, and hints for misspelt ones."""
