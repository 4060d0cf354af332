"""Tools that run before the world exists: choose a layout, check it, start it."""
