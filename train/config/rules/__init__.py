"""Rules that belong to no technique."""
