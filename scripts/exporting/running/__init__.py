"""One module for each target: its `Runner` loads the file in its own runtime. None of them unpickles anything."""
