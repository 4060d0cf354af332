"""How a process begins and ends among others: its parent, its exit, its streams."""
