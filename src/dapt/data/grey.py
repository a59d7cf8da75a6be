"""Grey values of more than 8 bits on the way to 0 .. 255: one scale for all pictures of a dataset.

A file says how many bits a value may have, not how many a camera fills: X-ray, microscopes and
industrial cameras put 10, 12 or 14 bits into files of 16, and others write 32 bits or fractions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from dapt.errors import PictureWarning

Scale = tuple[float, float]  # the value that becomes black, and the one that becomes white

_WHITES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # of whole numbers
_FRACTIONS = (1, 255)  # of others


class Extent(NamedTuple):
    """The least and the largest value of pictures, and whether values are whole numbers."""

    low: float
    high: float
    whole: bool


def is_deep(image: Image.Image) -> bool:
    """Whether an opened image is grey with more than 8 bits a value."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def extent_of(image: Image.Image) -> Extent:
    """Of a deep image; a `ValueError` where a value is no number."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has values that are no numbers")
    return Extent(low, high, values.dtype.kind != "f")


def scale_for(extents: Iterable[Extent]) -> Scale | None:
    """The scale that pictures use, None without any.

    Whole numbers start at 0 and end with the fewest of 8, 10, 12, 14 or 16 bits that hold all,
    fractions with 1 or 255, if that is not more than four times what is there. What fits none of
    these, or is below 0, is taken from the least to the largest value.
    """
    if not (found := list(extents)):
        return None
    low, high = min(e.low for e in found), max(e.high for e in found)
    whites = _WHITES if all(e.whole for e in found) else _FRACTIONS
    white = next((white for white in whites if high <= white), None)
    if low >= 0 and white is not None and 4 * high > white:
        return 0.0, float(white)
    if low >= 0 and whites is _WHITES and white is not None:
        low = 0.0
    # Of pictures of one value, anything but it is unknown.
    return (low, high) if low < high else (min(low, 0.0), max(high, 0.0) or 1.0)


def in_words(scale: Scale) -> str:
    """A scale for a sentence."""
    return " .. ".join(f"{value:.10g}" for value in scale)


def to_8_bits(image: Image.Image, scale: Scale | None) -> Image.Image:
    """A deep image as 8-bit grey; without a scale, by its own values, which is told.

    For 16 bits it is ``(value + 128) // 257``. What lies outside is black or white, and told once.
    """
    extent = extent_of(image)
    if scale is None:
        scale = scale_for([extent]) or (0.0, 65535.0)
        if scale[1] != _WHITES[-1]:
            _tell(f"a grey picture of more than 8 bits is seen from {in_words(scale)}, by its own "
                  "values: no grey_range of a dataset is known")  # fmt: skip
    low, high = scale
    if extent.low < low or extent.high > high:
        _tell(f"a grey picture has values outside the grey_range {in_words(scale)}, which become "
              "black or white; the setting grey_range=[low,high] takes another")  # fmt: skip
    values = np.asarray(image).astype(
        np.float64 if extent.high - extent.low > 2**20 else np.float32
    )
    values -= low
    values *= 255 / (high - low)
    values += 0.5
    return Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))


def _tell(sentence: str) -> None:
    warnings.warn(sentence, PictureWarning, stacklevel=2)
