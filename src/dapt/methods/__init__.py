"""What is learned: the table of methods and the parts its rows are made of."""

from dapt.methods.table import (
    LOSS_TERMS,
    METHODS,
    PUBLISHED,
    Batch,
    LossTerm,
    Method,
    get_method,
    published_epochs,
)

__all__ = [
    "LOSS_TERMS",
    "METHODS",
    "PUBLISHED",
    "Batch",
    "LossTerm",
    "Method",
    "get_method",
    "published_epochs",
]
