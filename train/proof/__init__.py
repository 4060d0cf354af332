"""The proof that a strategy computes the same as one device."""
