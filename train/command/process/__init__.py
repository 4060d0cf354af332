"""A process and its surroundings: its parent, its exit code, its standard streams."""
