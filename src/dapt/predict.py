"""A tuned classifier on new images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapt.classifier import Classifier
from dapt.data import ImageStore, is_image_file
from dapt.errors import UserError
from dapt.evaluate import classify
from dapt.progress import Advance, nothing


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, with their probabilities."""

    path: Path
    classes: tuple[tuple[str, float], ...]


def predict(
    classifier: Classifier,
    paths: Sequence[Path | str],
    *,
    top: int = 1,
    batch_size: int = 100,
    advance: Advance = nothing,
) -> list[Prediction]:
    """Classify image files.

    Args:
        classifier: from `load_classifier`.
        paths: image files.
        top: how many classes to name for each, best first.
        batch_size: images a batch.
        advance: is told how many more are done.

    Raises:
        UserError: an image cannot be read.
    """
    if not paths:
        return []
    files = [Path(path) for path in paths]
    seen = classifier.backbone.preprocessing
    store = ImageStore(
        files,
        size=seen.size,
        interpolation=seen.interpolation,
        resize_mode=seen.resize_mode,
        memory_budget=0,
    )
    logits = classify(classifier, store, batch_size=batch_size, advance=advance)
    probabilities, classes = logits.softmax(-1).topk(min(top, len(classifier.class_names)))
    names = classifier.class_names
    return [
        Prediction(path, tuple((names[c], p) for c, p in zip(cs, ps, strict=True)))
        for path, cs, ps in zip(files, classes.tolist(), probabilities.tolist(), strict=True)
    ]


def find_images(arguments: Iterable[Path]) -> list[Path]:
    """Image files among ``arguments``, folders searched through, in sorted order.

    Raises:
        UserError: a path does not exist, or a folder holds no image.
    """
    found: list[Path] = []
    for path in arguments:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if is_image_file(p))
            if not inside:
                raise UserError(f"folder {path} holds no images; give one that does")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"image {path} does not exist; check the path")
    if not found:
        raise UserError("no images given; name image files or folders")
    return found
