"""The yardsticks of `dapt bench`: part of the repository, not of the wheel."""
