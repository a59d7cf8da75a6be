"""Several looks at an image, whose features are averaged: it, mirrored, and cut at its edges.

A tower's features of the same thing differ a little from look to look; in their mean, such chance
is less. Looks are made of what preprocessing gives, so that training, prediction, a server and an
exported file cannot differ in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Look(NamedTuple):
    """A part of an image, in shares of its side, stretched to the whole square again."""

    top: float = 0.0
    left: float = 0.0
    height: float = 1.0
    width: float = 1.0
    mirrored: bool = False


# The first so many are taken: the image, its mirror image, then cut at one edge, then at two.
LOOKS = (
    Look(),
    Look(mirrored=True),
    Look(width=0.85),
    Look(left=0.15, width=0.85, mirrored=True),
    Look(height=0.85, mirrored=True),
    Look(top=0.15, height=0.85),
    Look(0.0, 0.0, 0.9, 0.9, mirrored=True),
    Look(0.0, 0.1, 0.9, 0.9),
    Look(0.1, 0.0, 0.9, 0.9),
    Look(0.1, 0.1, 0.9, 0.9, mirrored=True),
    Look(0.0, 0.0, 0.8, 0.8),
    Look(0.0, 0.2, 0.8, 0.8, mirrored=True),
    Look(0.2, 0.0, 0.8, 0.8, mirrored=True),
    Look(0.2, 0.2, 0.8, 0.8),
)


def looks(images: Tensor, count: int) -> Iterator[Tensor]:
    """The first ``count`` of `LOOKS` at normalised images (B, 3, S, S): as many, of that size."""
    size = images.shape[-1]
    for *box, mirrored in LOOKS[:count]:
        top, left, height, width = (round(size * share) for share in box)
        seen = images[..., top : top + height, left : left + width]
        if min(height, width) < size:
            # In fp32, whatever the tower's precision.
            seen = F.interpolate(seen.float(), (size, size), mode="bilinear").to(images.dtype)
        yield seen.flip(-1) if mirrored else seen
