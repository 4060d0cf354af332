"""Texts and token files, and the batches that are cut from them."""
