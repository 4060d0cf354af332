"""Texts and files of token ids, and the batches that are made from them."""
