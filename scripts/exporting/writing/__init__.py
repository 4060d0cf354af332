"""One module for each target: `write(model, trained, target, …)` makes its file from the eager model."""
