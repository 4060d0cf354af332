"""The memory of a step, replayed by the sizes of tensors only. Torch is not imported."""
