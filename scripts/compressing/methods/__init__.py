"""The methods of scripts/compress.py, one file for each kind. Each changes a model of one process."""
