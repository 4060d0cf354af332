"""The world of processes: mesh, groups, collectives, gradients across meshes, optimiser and state of shards."""
