"""What `scripts/verify.py` does: choose sizes, run the proof, and say what it shows and what it leaves out."""
