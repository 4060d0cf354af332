"""Where measurements go: run directories, sinks, TensorBoard, pictures."""
