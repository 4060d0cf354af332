"""One file per technique; `base.py` is the interface, `apply.py` the order in which techniques compose."""
