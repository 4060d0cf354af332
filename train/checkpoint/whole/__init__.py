"""Checkpoints as whole tensors, in one process without ranks: to look at them, and to go on with a trained model."""
