"""The transformer and its weights. Nothing in this folder knows about ranks."""
