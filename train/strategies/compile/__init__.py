"""Compilation of blocks with torch.compile."""
