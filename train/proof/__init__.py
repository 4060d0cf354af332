"""The proof that a strategy computes what one device computes."""
