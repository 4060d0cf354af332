"""The description of a run, which needs no torch: schema, plan, shapes, and the types of rules and traffic."""
