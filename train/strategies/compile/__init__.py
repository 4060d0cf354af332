"""Compilation of blocks by torch.compile."""
