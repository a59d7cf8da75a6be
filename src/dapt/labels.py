"""Labels as scikit-learn's users give them: classes in order, and what prompts call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from dapt.data.given import as_labels, is_missing
from dapt.data.items import check_class_names
from dapt.errors import InputError, reason_of, shown


def are_lists(y: Any) -> bool:
    """Whether images have several labels each."""
    if not isinstance(y, Iterable) or (isinstance(y, np.ndarray) and y.dtype != object):
        return False
    return any(isinstance(own, list | tuple | set) for own in y)


def classes_of_lists(y: Any, count: int) -> tuple[np.ndarray, list[list[int]]]:
    """As `classes_of`, of a list of labels for each image."""
    if odd := [own for own in y if not isinstance(own, list | tuple | set) or not own]:
        what = "is empty" if odd[0] in ([], (), set()) else f"{odd[0]!r} is no list"
        raise InputError(f"an image's labels: {what}; give each image a list of one or more")
    lists = [list(own) for own in y]
    classes, codes = classes_of([label for own in lists for label in own], sum(map(len, lists)))
    if len(lists) != count:
        raise InputError(f"{count} images, but {len(lists)} lists of labels; give one for each")
    found, flat = list[list[int]](), iter(codes)
    for own in lists:
        found.append(sorted({next(flat)[0] for _ in own}))
    return classes, found


def classes_of(y: Any, count: int) -> tuple[np.ndarray, list[list[int]]]:
    """Distinct labels in sorted order, and the place of each image's among them, in a list."""
    labels = column_or_1d(as_labels(y), warn=True)
    if len(labels) != count:
        raise InputError(f"{count} images, but {len(labels)} labels; give one for each")
    try:
        check_classification_targets(labels)
        classes, codes = np.unique(labels, return_inverse=True)
    except (TypeError, ValueError) as error:  # such as fractions, or values without an order
        what = f"labels such as {shown(labels[:1].tolist()[0])} do not name classes"
        raise InputError(f"{what} ({reason_of(error)}); give text or whole numbers") from error
    if len(classes) < 2:
        raise InputError(f"y has one class, {classes[0]!r}; give images of two or more classes")
    return classes, codes[:, None].tolist()


def names_for(given: Any, classes: np.ndarray) -> tuple[str, ...]:
    """What prompts call the classes."""
    names = labels = classes.tolist()
    if isinstance(given, Mapping):
        if missing := [label for label in labels if is_missing(given.get(label))]:
            raise InputError(f"class_names has no name for label {missing[0]!r}; add it")
        names = [given[label] for label in labels]
    elif given is not None and len(names := given) != len(labels):
        what = f"class_names lists {len(given)} names, but y has {len(labels)} classes"
        raise InputError(f"{what}; list one for each, in sorted order of labels")
    called = tuple(map(str, names))
    check_class_names(called, "labels" if given is None else "class_names")
    return called
