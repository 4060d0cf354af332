"""The museum's plants tried with spmd_types, a type system for tensors on several ranks: `python -m tests.typed`."""
