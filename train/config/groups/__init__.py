"""The keys of the config, one dataclass for each group; each key has a type, a default and a sentence."""
