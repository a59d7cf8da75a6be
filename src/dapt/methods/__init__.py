"""What is learned: the table of methods and the parts its rows are made of."""

from dapt.methods.contract import (
    Evidence,
    Finish,
    Head,
    LossTerm,
    Method,
    PartSettings,
    Step,
    TowerPart,
)
from dapt.methods.table import METHODS, ZERO_SHOT, get_method

__all__ = [
    "METHODS",
    "ZERO_SHOT",
    "Evidence",
    "Finish",
    "Head",
    "LossTerm",
    "Method",
    "PartSettings",
    "Step",
    "TowerPart",
    "get_method",
]
