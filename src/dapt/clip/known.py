"""Models that are known by name, and the one that suits a machine.

Who has photographs and names no model gets the best one whose licence is open, that fits the
machine's memory and that it computes in good time. Nothing is loaded here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from dapt.errors import UserError
from dapt.safe.files import parse_yaml

# A name, or the names of models that are joined; and what each of them has: a tag, a commit.
Names = str | Sequence[str]
Each = str | Sequence[str | None] | None

BUNDLED = "bundled"
SUITED = "auto"  # by this name, that model is asked for
STAND_IN = (
    "The bundled model stands in for one that could not be had: it knows drawings, not photographs"
)
# What a processor, and a GPU, are taken to compute in good time, in GFLOPs an image.
_GOOD_TIME = {"cpu": 20.0, "cuda": 200.0}
# GiB beside the weights, of images and of Python itself.
_BESIDE = 2.0


@dataclass(frozen=True)
class Known:
    """A model of open_clip's by name and tag, as ``known.yaml`` describes it.

    Sides of images in pixels; parameters in millions; GFLOPs of an image; accuracy in percent of
    zero-shot on ImageNet and the mean over 38 datasets.
    """

    name: str
    pretrained: str
    licence: str
    size: int
    parameters: float
    gflops: float
    imagenet: float
    mean: float

    def __str__(self) -> str:
        return f"{self.name}/{self.pretrained}"

    @property
    def megabytes(self) -> int:
        """Of its file, with four bytes a parameter."""
        return round(4 * self.parameters)

    @property
    def memory(self) -> float:
        """GiB that it needs in all, in fp32."""
        return self.parameters * 4e6 / 2**30 + _BESIDE


@cache
def known_models() -> tuple[Known, ...]:
    """All of them, the smallest first."""
    text = (files("dapt.clip") / "known.yaml").read_text("utf-8")
    rows: list[dict[str, Any]] = parse_yaml(text)
    return tuple(sorted((Known(**row) for row in rows), key=lambda m: (m.gflops, m.mean)))


def best_for(memory: float, gflops: float) -> Known | None:
    """The best on average of what fits so many GiB and GFLOPs an image; None if none does."""
    fitting = [m for m in known_models() if m.memory <= memory and m.gflops <= gflops]
    return max(fitting, key=lambda m: m.mean, default=None)


def recommended(kind: str, memory: float) -> Known | None:
    """The model for photographs on a device of a kind, "cpu" or "cuda", with so much memory."""
    return best_for(memory, _GOOD_TIME.get(kind, _GOOD_TIME["cpu"]))


def memory_of_machine() -> float:
    """GiB of memory of the whole machine; infinite where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return float("inf")


def names_of(backbone: Names) -> tuple[str, ...]:
    """All names of a backbone: one, or those of the models that are joined."""
    return (backbone,) if isinstance(backbone, str) else tuple(backbone)


def each_of(backbone: Names, values: Each, what: str = "pretrained") -> tuple[str | None, ...]:
    """The value of each model of a backbone, None for 'default'; a `UserError` if not as many."""
    if not (count := len(names_of(backbone))):
        raise UserError("backbone is an empty list; name a model, or leave it out")
    if values is None:
        return (None,) * count
    own = [values] if isinstance(values, str) else values
    found = tuple(None if value == "default" else value for value in own)
    if len(found) != count:
        told = f"backbone names {count} models, and {what} is of {len(found)}"
        raise UserError(f"{told}; give each its own, in their order (its usual one: 'default')")
    return found


def as_one(values: Any) -> Any:
    """What `names_of` or `each_of` gave, as settings keep it: a single value is no list."""
    if all(value is None for value in values):
        return None
    return values[0] if len(values) == 1 else tuple(values)


def stands_in(asked: Names, used: Names) -> bool:
    """Whether the bundled model was used for want of the one for photographs."""
    both = zip(names_of(asked), names_of(used), strict=False)
    return any(one == SUITED and other == BUNDLED for one, other in both)
