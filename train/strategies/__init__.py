"""The strategies, and one folder for each technique that they use."""
