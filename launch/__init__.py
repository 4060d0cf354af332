"""Tools that run before the training processes exist: they choose a layout, check it and start it."""
