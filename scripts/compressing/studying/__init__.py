"""Every method on one model over several seeds: the parts of study.py."""
