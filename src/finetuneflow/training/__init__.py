"""Training: `run.py` is the file to read first."""
