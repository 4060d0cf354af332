"""What a run is, said before torch is loaded: schema, plan, shapes, and the types of rules and traffic."""
