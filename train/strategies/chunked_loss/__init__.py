"""The head and the loss in chunks of tokens."""
