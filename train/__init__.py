"""Everything that happens inside one torchrun world."""
