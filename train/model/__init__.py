"""The transformer and its weights. Nothing here knows of ranks."""
