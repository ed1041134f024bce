"""Faults at random moments of every command: `PYTHONPATH=tests python -m faults` runs the full counts."""
