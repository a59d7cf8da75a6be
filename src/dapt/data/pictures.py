"""Images as Python programs hold them: paths, PIL images, arrays, tensors, rows of datasets."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dapt.data.images import BadImage, decode_image, open_image, upright_rgb
from dapt.data.items import IMAGE_COLUMNS, LABEL_COLUMNS, first_of
from dapt.errors import UserError


class InputError(UserError, ValueError):
    """Bad input to the estimator; a ValueError too, as scikit-learn wants it."""


def read_picture(value: Any) -> Image.Image:
    """Any of what stands for an image, as upright 8-bit RGB.

    That is a path; a file's bytes; a PIL image; an array or tensor of (H, W), (H, W, C) or
    (C, H, W) with 1, 3 or 4 channels, uint8 or floating point in 0 .. 1; a row of a Hugging Face
    dataset; or a pair of any of these and a label. What is none, or broken, is an `InputError`.
    """
    try:
        if isinstance(value, (str, os.PathLike)):
            return open_image(os.fspath(value))
        if isinstance(value, bytes):
            return decode_image(io.BytesIO(value), f"of {len(value):,} bytes")
    except BadImage as error:
        raise InputError(str(error)) from error
    if isinstance(value, Image.Image):
        try:
            return upright_rgb(value)
        except Exception as error:  # one from a file is decoded only now; see `decode_image`
            raise InputError(f"an image of mode {value.mode} cannot be read ({error})") from error
    if isinstance(value, Mapping):
        # The last two are those of an image that a dataset has not decoded.
        for name in (*IMAGE_COLUMNS, "bytes", "path"):
            if value.get(name) is not None:
                return read_picture(value[name])
        there = ", ".join(map(str, value))
        raise InputError(f"a row with the columns {there} has no image; name the column 'image'")
    if isinstance(value, tuple) and len(value) == 2:
        return read_picture(value[0])
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.ndim > 0:
        return _of_array(value)
    hint = "give paths, PIL images, arrays of (H, W, 3), tensors of (3, H, W), or a dataset"
    raise InputError(f"{type(value).__name__} is no image; {hint}")


def _of_array(array: np.ndarray) -> Image.Image:
    where = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise InputError(f"{where} is no image; give (H, W), (H, W, 3) or (3, H, W)")
    if array.dtype.kind == "f":
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InputError(f"{where} must be within 0 .. 1 (or uint8)")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"{where} must be uint8, or floating point within 0 .. 1")
    array = np.ascontiguousarray(array)
    return upright_rgb(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array))


def as_sequence(images: Any) -> Sequence[Any]:
    """``images``, as a list if they cannot be counted or picked from; `InputError` if none."""
    if hasattr(images, "tocsr"):  # scipy's sparse matrices, of which some are mappings too
        raise InputError("sparse matrices hold no images; give arrays of (n, H, W, 3)")
    if isinstance(images, (str, bytes, os.PathLike, Image.Image, Mapping)):
        raise InputError(f"give a list of images, not one {type(images).__name__}")
    if isinstance(images, np.ndarray | torch.Tensor):
        shape, said = images.shape, f"of shape {tuple(images.shape)}"
        if len(shape) in (0, 2):
            raise InputError(f"an array {said} holds no images; reshape your data to (n, H, W, 3)")
        # The last axis, or a tensor's first, is one of colours: this is no stack of grey images.
        colours = shape[-1] in (1, 3, 4) or (torch.is_tensor(images) and shape[0] == 3)
        if len(shape) == 3 and colours:
            raise InputError(f"give a list of images, not one {said}; grey ones as (n, H, W, 1)")
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        try:
            images = list(images)
        except TypeError as error:
            raise InputError(f"{type(images).__name__} is no collection of images") from error
    if hasattr(images, "iloc"):  # pandas, whose own index need not count from 0
        images = images.to_dict("records") if images.ndim == 2 else list(images)
    if len(images) == 0:
        raise InputError("found array with 0 sample(s) (no images) while a minimum of 1 is needed")
    return images


def labels_of(images: Sequence[Any]) -> list[Any]:
    """Labels in what `as_sequence` gives, as class names where known; `InputError` if none."""
    whole: Any = images
    places: Sequence[int] = range(len(images))
    while hasattr(whole, "dataset") and hasattr(whole, "indices"):  # torch's Subset
        places = [int(whole.indices[i]) for i in places]
        whole = whole.dataset
    names, targets = getattr(whole, "classes", None), getattr(whole, "targets", None)
    if column := first_of(LABEL_COLUMNS, getattr(whole, "column_names", None) or ()):
        names, targets = getattr(whole.features[column], "names", None), list(whole[column])
    if targets is None:
        given = [_label_of(images[i]) for i in range(len(images))]
    else:
        given = [targets[i] for i in places]
    labels = [x.item() if isinstance(x, torch.Tensor | np.generic) else x for x in given]
    if names is None or not all(isinstance(label, int) for label in labels):
        return labels
    if not 0 <= min(labels) <= max(labels) < len(names):
        raise InputError(f"labels must be 0 .. {len(names) - 1}, for that many class names")
    return [str(names[label]) for label in labels]


def _label_of(row: Any) -> Any:
    if isinstance(row, tuple) and len(row) == 2:
        return row[1]
    if isinstance(row, Mapping) and (column := first_of(LABEL_COLUMNS, row)):
        return row[column]
    hint = f"give labels, or a dataset with a column {', '.join(LABEL_COLUMNS)}, or of pairs"
    raise InputError(f"requires y to be passed, but the target y is None: {hint}")
