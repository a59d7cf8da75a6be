"""An image that is numbers: an array, a tensor or nested lists."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from dapt.errors import InputError, reason_of


def pixels_of(value: Any) -> np.ndarray | None:
    """uint8 (H, W), (H, W, 3) or (H, W, 4) of an image of numbers; None if it is none at all.

    Shapes are (H, W), (H, W, C) or (C, H, W) of 1, 3 or 4 channels; numbers uint8, truth values
    (black and white), floating point of any width within 0 .. 1, or, in lists, which have no type,
    whole ones within 0 .. 255. Else it is an `InputError`.
    """
    if isinstance(value, Tensor):
        value = _array_of(value)
    if isinstance(value, list):  # a dataset's column of arrays, without its format
        value = _typed(value)
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        return None
    where = f"an array of shape {value.shape} and type {value.dtype}"
    if value.ndim == 3 and value.shape[2] not in (1, 3, 4) and value.shape[0] in (1, 3, 4):
        value = value.transpose(1, 2, 0)
    array = value[:, :, None] if value.ndim == 2 else value
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise InputError(f"{where} is no image; give (H, W), (H, W, 3) or (3, H, W)")
    if array.dtype.kind == "b":
        array = array * np.uint8(255)
    if array.dtype.kind == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # nor NaN
            raise InputError(f"{where} must be within 0 .. 1 (or uint8)")
        array = array.astype(np.float32) if array.itemsize < 4 else array
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{where} must be uint8, or floating point within 0 .. 1")
    array = np.ascontiguousarray(array)
    return array[:, :, 0] if array.shape[2] == 1 else array


def _array_of(tensor: Tensor) -> np.ndarray:
    """The same numbers; floating-point types that numpy may lack become float32."""
    try:
        tensor = tensor.detach().cpu()
        short = tensor.is_floating_point() and tensor.element_size() < 4
        return (tensor.float() if short else tensor.resolve_conj().resolve_neg()).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantised, empty
        what = f"a tensor of type {tensor.dtype} and layout {tensor.layout} is no image"
        raise InputError(f"{what} ({reason_of(error)}); give uint8 or float32") from error


def _typed(rows: list[Any]) -> np.ndarray:
    try:
        array = np.asarray(rows)
        whole = array.dtype.kind in "iu" and 0 <= array.min() <= array.max() <= 255
    except (ValueError, OverflowError) as error:  # of unlike lengths, or none
        raise InputError(f"a list of {len(rows)} is no image ({reason_of(error)})") from error
    return array.astype(np.uint8) if whole else array
