"""The run directory: its records, and training that survives a stop."""
