"""Code that knows about ranks: mesh, process groups, collectives, gradients, optimiser, and the state of shards."""
