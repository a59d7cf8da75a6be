"""Tuning and evaluation in memory: nothing here knows a file."""
