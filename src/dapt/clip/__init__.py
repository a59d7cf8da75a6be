"""The frozen model: towers, attention, and where weights come from."""
