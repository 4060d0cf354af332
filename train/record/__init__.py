"""Stores what is measured: run directories, sinks, TensorBoard, pictures."""
