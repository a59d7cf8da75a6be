"""The published benchmarks: one table of where each lies and how it is read.

All lie under one root, in the layout of the CoOp code base (Zhou et al., 2022). A row that is
read from something else than a split file brings its own reader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapt.data.items import PARTS, Listing, Pair, check_class_names, check_listing, check_path
from dapt.errors import UserError
from dapt.files import read_json


def read_split(file: Path) -> Listing:
    """Read a split file: ``{"train"|"val"|"test": [[relative path, label, class name], ...]}``.

    Raises:
        UserError: the file is missing, is no JSON, or is not of that form; labels are not
            0 .. C-1; a label has two class names; a path leaves the images' folder.
    """
    if not file.is_file():
        raise UserError(
            f"split file {file} does not exist; put the published one there, or check --root"
        )
    data = read_json(file, "split file")
    if not isinstance(data, dict) or not all(isinstance(data.get(p), list) for p in PARTS):
        raise UserError(
            f"split file {file} must be a JSON object with the lists train, val and test; "
            "download it anew"
        )
    names: dict[int, str] = {}
    parts: dict[str, tuple[Pair, ...]] = {}
    for part in PARTS:
        pairs = []
        for number, entry in enumerate(data[part]):
            where = f"split file {file}, {part} entry {number}"
            path, label, name = _split_entry(entry, where)
            if names.setdefault(label, name) != name:
                raise UserError(
                    f"{where}: label {label} is '{name}' here and '{names[label]}' before; a "
                    "label has one class name"
                )
            pairs.append((check_path(path, where), label))
        parts[part] = tuple(pairs)
    classes = range(len(names))
    if missing := [label for label in classes if label not in names]:
        raise UserError(
            f"split file {file}: labels must be 0 .. {len(names) - 1} for its {len(names)} "
            f"classes, but {missing[0]} is missing; number them anew"
        )
    listing = Listing(tuple(names[label] for label in classes), **parts)
    check_class_names(listing.class_names, f"split file {file}")
    check_listing(listing, f"split file {file}")
    return listing


def _split_entry(entry: Any, where: str) -> tuple[str, int, str]:
    if (
        isinstance(entry, list)
        and [type(x) for x in entry] == [str, int, str]  # True is an int to isinstance
    ):
        return entry[0], entry[1], entry[2]
    raise UserError(f"{where} must be [relative path, label, class name]; download the file anew")


def _not_yet(index: Path) -> Listing:
    raise UserError(f"the benchmark listed by {index} cannot be read yet; use another dataset")


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies below the root, and how it is read.

    Attributes:
        name: what the user calls it.
        folder: its folder below the root.
        images: the images' folder in that one; paths are relative to it.
        index: the file in ``folder`` that lists its images or classes.
        template: the field's hand-written prompt for it, used where the text is not learned.
        read: reads the index.
    """

    name: str
    folder: str
    images: str
    index: str
    template: str = "a photo of a {}."
    read: Callable[[Path], Listing] = read_split

    def image_root(self, root: Path) -> Path:
        """The images' folder, which item paths are relative to."""
        return root / self.folder / self.images

    def open(self, root: Path) -> Listing:
        """Read the listing below ``root``.

        Raises:
            UserError: the folder or its index is missing, or the index is malformed.
        """
        if not root.is_dir():
            raise UserError(
                f"--root {root} does not exist; give the folder that holds {self.folder}/"
            )
        if not (root / self.folder).is_dir():
            raise UserError(
                f"benchmark '{self.name}': its folder {root / self.folder} does not exist; check "
                "--root"
            )
        return self.read(root / self.folder / self.index)


def _split(name: str, folder: str, images: str, index: str, template: str) -> Benchmark:
    return Benchmark(name, folder, images, f"split_zhou_{index}.json", template)


_ROWS = (
    _split("caltech101", "caltech-101", "101_ObjectCategories", "Caltech101", "a photo of a {}."),
    _split("dtd", "dtd", "images", "DescribableTextures", "{} texture."),
    _split("eurosat", "eurosat", "2750", "EuroSAT", "a centered satellite photo of {}."),
    _split("food101", "food-101", "images", "Food101", "a photo of {}, a type of food."),
    _split(
        "oxford_flowers", "oxford_flowers", "jpg", "OxfordFlowers",
        "a photo of a {}, a type of flower.",
    ),
    _split(
        "oxford_pets", "oxford_pets", "images", "OxfordPets", "a photo of a {}, a type of pet."
    ),
    _split("stanford_cars", "stanford_cars", ".", "StanfordCars", "a photo of a {}."),
    _split("sun397", "sun397", "SUN397", "SUN397", "a photo of a {}."),
    _split("ucf101", "ucf101", "UCF-101-midframes", "UCF101", "a photo of a person doing {}."),
    Benchmark(
        "fgvc_aircraft", "fgvc_aircraft", "images", "variants.txt",
        "a photo of a {}, a type of aircraft.", _not_yet,
    ),
    Benchmark("imagenet", "imagenet", "images", "classnames.txt", read=_not_yet),
    Benchmark(
        "imagenetv2", "imagenetv2", "imagenetv2-matched-frequency-format-val", "classnames.txt",
        read=_not_yet,
    ),
    Benchmark("imagenet_sketch", "imagenet-sketch", "images", "classnames.txt", read=_not_yet),
    Benchmark("imagenet_a", "imagenet-adversarial", "imagenet-a", "classnames.txt", read=_not_yet),
    Benchmark("imagenet_r", "imagenet-rendition", "imagenet-r", "classnames.txt", read=_not_yet),
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in _ROWS}
