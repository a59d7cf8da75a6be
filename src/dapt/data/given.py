"""Images and labels in the forms that Python programs hold them in, as sequences of one kind."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset

from dapt.data.images import FILE_COLUMNS, IMAGE_COLUMNS, first_of, image_in, is_pair
from dapt.data.spellings import LABEL_COLUMNS
from dapt.errors import InputError, shown

# What a missing value is called once it was made text, and no class is.
_NO_NAMES = {"nan", "NaN", "NaT", "<NA>"}
_NO_VALUES = {"NAType", "NaTType"}  # pandas'


class Rows(list[Any]):
    """Rows of what can be walked through once, and the class names that it had."""

    classes: Any = None


def as_sequence(images: Any) -> Sequence[Any]:
    """``images``, as a list if they cannot be counted or picked from; `InputError` if none.

    A Hugging Face dataset is taken as it is stored, whatever its format, unless that is a function;
    a dictionary of one dataset is that dataset, and one of columns a table.
    """
    if hasattr(images, "tocsr"):  # scipy's sparse matrices, of which some are mappings too
        raise InputError("sparse matrices hold no images; give arrays of (n, H, W, 3)")
    if isinstance(images, DataLoader):
        raise InputError(
            "a DataLoader gives batches; give its dataset (.dataset), which has images"
        )
    if isinstance(images, Mapping):
        images = _of_mapping(images)
    if isinstance(images, (str, bytes, os.PathLike, Image.Image, Mapping)):
        raise InputError(f"give a list of images, not one {type(images).__name__}")
    if isinstance(images, np.ndarray | torch.Tensor):
        images = _checked_stack(images)
    for table in ("to_pylist", "to_dicts"):  # pyarrow, and polars
        images = getattr(images, table)() if hasattr(images, table) else images
    if hasattr(images, "iloc"):  # pandas, whose own index need not count from 0
        images = _of_frame(images) if images.ndim == 2 else list(images)
    names = None
    if hasattr(images, "with_format") and hasattr(images, "features"):
        images, names = _of_hugging_face(images)
    counted = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if not counted or isinstance(images, IterableDataset):
        names = names or _names_of(images)
        try:
            images = Rows(images)
        except TypeError as error:
            raise InputError(f"{type(images).__name__} is no collection of images") from error
        images.classes = names
    if len(images) == 0:
        raise InputError("found array with 0 sample(s) (no images) while a minimum of 1 is needed")
    if isinstance(images, list):
        _check_whole(map(image_in, images), "image")
    return images


def _of_mapping(given: Mapping[Any, Any]) -> Any:
    """The one dataset in it, or the rows of its columns; else itself."""
    parts = {k: v for k, v in given.items() if isinstance(v, Dataset) or hasattr(v, "column_names")}
    if len(parts) == 1 and len(given) == 1:
        return next(iter(parts.values()))
    if parts:
        names = ", ".join(repr(str(name)) for name in parts)
        raise InputError(f"give one dataset, not {len(parts)} parts: pick one of {names}")
    column = given.get(first_of((*IMAGE_COLUMNS, *FILE_COLUMNS), given))
    if not isinstance(column, list | tuple) and getattr(column, "ndim", 0) != 4:
        return given
    if len({len(values) for values in given.values()}) > 1:
        raise InputError(f"columns {[*given]} are of unlike lengths; give each row a value in all")
    return [dict(zip(given, row, strict=True)) for row in zip(*given.values(), strict=True)]


def _checked_stack(images: Any) -> Any:
    """An array or tensor of images, or an array of what else stands for them."""
    shape, said = images.shape, f"of shape {tuple(images.shape)}"
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUS" and shape[1:] == (1,):
        return images[:, 0]  # a table's column of paths
    if len(shape) in (0, 2):
        raise InputError(f"an array {said} holds no images; reshape your data to (n, H, W, 3)")
    # The last axis, or a tensor's first, is one of colours: this is no stack of grey images.
    colours = shape[-1] in (1, 3, 4) or (torch.is_tensor(images) and shape[0] == 3)
    if len(shape) == 3 and colours:
        raise InputError(f"give a list of images, not one {said}; grey ones as (n, H, W, 1)")
    return images


def _of_frame(frame: Any) -> list[Any]:
    """Rows of a pandas table; of a single column, whatever its name, the images themselves."""
    if len(frame.columns) == 1:
        return list(frame.iloc[:, 0])
    return list(frame.to_dict("records"))


def _of_hugging_face(data: Any) -> tuple[Any, Any]:
    """The dataset without its format, its columns of images and labels called so; class names.

    A column is known by its name, or as the only one of its type.
    """
    # A function of the user's that makes the rows is theirs to choose.
    if (getattr(data, "format", None) or {}).get("type") == "custom":
        return data, None
    data = data.with_format(None)
    for kind, known in (("Image", (*IMAGE_COLUMNS, *FILE_COLUMNS)), ("ClassLabel", LABEL_COLUMNS)):
        alike = [
            n for n, feature in (data.features or {}).items() if type(feature).__name__ == kind
        ]
        if len(alike) == 1 and first_of(known, data.features) is None:
            data = data.rename_column(alike[0], known[0])
    column = first_of(LABEL_COLUMNS, data.features or ())
    return data, getattr((data.features or {}).get(column), "names", None)


def labels_of(images: Sequence[Any]) -> list[Any]:
    """Labels in what `as_sequence` gives, as class names where known; `InputError` if none."""
    return _labels(images, range(len(images)), range(len(images)))


def _labels(whole: Any, places: Sequence[int], rows: Sequence[int]) -> list[Any]:
    """Those of the images at these places, which are rows of what was given."""
    if hasattr(whole, "dataset") and hasattr(whole, "indices"):  # torch's Subset
        return _labels(whole.dataset, [int(whole.indices[i]) for i in places], rows)
    if isinstance(whole, ConcatDataset):
        return _of_parts(whole, places, rows)
    names, targets = _names_of(whole), getattr(whole, "targets", None)
    if change := getattr(whole, "target_transform", None):  # names are of what it changes
        names, targets = None, None if targets is None else [*map(change, targets)]
    if (column := first_of(LABEL_COLUMNS, getattr(whole, "column_names", None) or ())) is not None:
        names = getattr(whole.features[column], "names", None)
        targets = list(whole.with_format(None)[column])
    given = [_label_of(whole[i]) if targets is None else targets[i] for i in places]
    labels = as_labels(given, rows).tolist()
    if names is None or not all(isinstance(label, int) for label in labels):
        return labels
    known = dict(names if isinstance(names, Mapping) else enumerate(names))
    if odd := next((i for i, label in enumerate(labels) if label not in known), None):
        what = f"labels must be 0 .. {len(known) - 1}, for that many class names"
        raise InputError(f"{what}; that of {_row(rows[odd])} is {labels[odd]}")
    # ImageNet's classes have synonyms, the usual one first.
    found = {k: name[0] if isinstance(name, tuple) else name for k, name in known.items()}
    return [str(found[label]) for label in labels]


def _of_parts(whole: ConcatDataset[Any], places: Sequence[int], rows: Sequence[int]) -> list[Any]:
    """Labels of images of datasets that are laid end to end."""
    ends, found = [0, *whole.cumulative_sizes], dict[int, Any]()
    for number, part in enumerate(whole.datasets):
        own = [i for i, place in enumerate(places) if bisect_right(ends, place) == number + 1]
        if own:
            inside = [places[i] - ends[number] for i in own]
            labels = _labels(part, inside, [rows[i] for i in own])
            found |= dict(zip(own, labels, strict=True))
    return [found[i] for i in range(len(places))]


def _names_of(whole: Any) -> Any:
    """Class names by number, as torchvision's datasets keep them; None where they do not."""
    for attribute in ("classes", "categories"):
        if names := getattr(whole, attribute, None):
            return names
    numbers = getattr(whole, "class_to_idx", None)
    return {number: name for name, number in numbers.items()} if numbers else None


def names_of_labels(y: Any) -> dict[int, str]:
    """Class names that a Hugging Face dataset's column of labels brings along; else none."""
    return dict(enumerate(getattr(getattr(y, "features", None), "names", None) or ()))


def _label_of(row: Any) -> Any:
    if is_pair(row):
        return row[1]
    if isinstance(row, Mapping) and (column := first_of(LABEL_COLUMNS, row)) is not None:
        return row[column]
    hint = f"give labels, or a dataset with a column {', '.join(LABEL_COLUMNS)}, or of pairs"
    raise InputError(f"requires y to be passed, but the target y is None: {hint}")


def as_labels(y: Any, rows: Sequence[int] | None = None) -> np.ndarray:
    """(n,) labels of one kind, from a list, array, tensor, column or any other collection.

    One that is missing, or of another kind than the rest, is an `InputError` that names its row:
    its place, or what ``rows`` has there.
    """
    if isinstance(y, torch.Tensor):
        y = y.detach().cpu().tolist()
    if isinstance(y, np.ma.MaskedArray):
        y = y.tolist()  # None where it is masked
    array = np.asarray(y) if hasattr(y, "__array__") else None
    if array is not None and (array.ndim == 0 or array.size != len(array)):
        return array  # what scikit-learn refuses
    if isinstance(y, str | bytes | Mapping) or (array is None and not isinstance(y, Iterable)):
        raise InputError(f"labels are to be a list, one for each image, not {type(y).__name__}")
    values = [_value(label) for label in (y if array is None else array.ravel())]
    _check_whole(values, "label", rows)
    text = [isinstance(value, str) for value in values]
    if any(text) and not all(text):
        odd = text.index(not text[0])
        what = f"the label of {_row(rows[odd] if rows else odd)} is {shown(values[odd])}"
        raise InputError(f"{what}, but others are like {shown(values[0])}; make them of one kind")
    if array is None:
        return np.asarray(values)
    return array if array.dtype.kind not in "OS" else np.asarray(values).reshape(array.shape)


def _value(label: Any) -> Any:
    """A label as Python's own value; of bytes, the text."""
    if label is np.ma.masked:
        return None
    if isinstance(label, torch.Tensor | np.ndarray) and label.ndim == 0:
        label = label.item()
    if isinstance(label, np.generic) and label.dtype.kind not in "mM":
        label = label.item()
    return label.decode("utf-8", "replace") if isinstance(label, bytes) else label


def is_missing(value: Any) -> bool:
    """Whether it stands for no value: None, NaN of any type, no text, or text made of a NaN."""
    if isinstance(value, str):
        return not value.strip() or value in _NO_NAMES
    if isinstance(value, Number | np.datetime64 | np.timedelta64):
        return bool(value != value)
    return value is None or type(value).__name__ in _NO_VALUES


def _check_whole(values: Iterable[Any], what: str, rows: Sequence[int] | None = None) -> None:
    if missing := [place for place, value in enumerate(values) if is_missing(value)]:
        more = f" (nor have {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        first = rows[missing[0]] if rows else missing[0]
        raise InputError(f"{_row(first)} has no {what}{more}; give it one, or leave it out")


def _row(number: int) -> str:
    return f"row {number} (counted from 0)"
