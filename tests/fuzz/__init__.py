"""Fuzzing of everything that shl reads: `PYTHONPATH=tests python -m fuzz` runs the full count."""
