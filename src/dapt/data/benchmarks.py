"""The published benchmarks: how each is listed, where it lies, and what it is.

All lie under one root, in the layout of the CoOp code base (Zhou et al., 2022), whose list of
downloads and split files is at `LAYOUT`. A reader takes the file that lists a benchmark's images or
classes, and the folder of its images, and finds the same order on every file system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from dapt.data.images import has_image_name
from dapt.data.items import (
    DEFAULT_TEMPLATE,
    PARTS,
    Row,
    Task,
    check_class_names,
    check_path,
    make_task,
    refusing,
    subfolders,
)
from dapt.errors import UserError
from dapt.safe.files import read_json, read_text, user_path

LAYOUT = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
CLASS_NAMES = "classnames.txt"


def read_split(file: Path, images: Path | None = None) -> Task:
    """Read a split file: ``{"train"|"val"|"test": [[relative path, label, class name], ...]}``."""
    whole, data = f"split file {file}", read_json(file, "split file")
    if not isinstance(data, dict) or not all(isinstance(data.get(p), list) for p in PARTS):
        form = "a JSON object with the lists train, val and test"
        raise UserError(f"{whole} must be {form}; download it anew")
    names, rows = dict[int, str](), list[Row]()
    for part in PARTS:
        for number, entry in enumerate(data[part]):
            where, kinds = f"{whole}, {part} entry {number}", [str, int, str]
            if not isinstance(entry, list) or [type(value) for value in entry] != kinds:
                form = "[relative path, label, class name]"
                raise UserError(f"{where} must be {form}; download the file anew")
            path, label, name = entry
            if (known := names.setdefault(label, name)) != name:
                what = f"label {label} is '{name}' here and '{known}' before"
                raise UserError(f"{where}: {what}; a label has one class name")
            rows.append((part, check_path(path, where), label))
    if missing := sorted(set(range(len(names))) - set(names)):
        what = f"labels must be 0 .. {len(names) - 1} for its {len(names)} classes"
        raise UserError(f"{whole}: {what}, but {missing[0]} is missing; number them anew")
    names = dict(sorted(names.items()))
    check_class_names(list(names.values()), whole)
    return make_task(file.stem, images or file.parent, rows, whole, names=names)


def read_variants(file: Path, images: Path) -> Task:
    """Read FGVC-Aircraft's own lists: variants.txt and images_variant_{train,val,test}.txt.

    A line of the first is a class, in label order; of the others, "id name of the variant".
    """
    variants, rows = [line for _, line in _lines(file)], list[Row]()
    check_class_names(variants, f"index file {file}")
    names = {variant: variant for variant in variants}
    for part in PARTS:
        for where, line in _lines(file.parent / f"images_variant_{part}.txt"):
            image, _, name = line.partition(" ")
            if name not in names:
                what = f"'{name}' is no variant that {file.name} lists"
                raise UserError(f"{where}: {what}; download both anew")
            rows.append((part, check_path(f"{image}.jpg", where), name))
    return make_task(file.stem, images, rows, f"index file {file}", names=names)


def read_class_folders(
    file: Path, images: Path, parts: dict[str, str], *, numbered: bool = False, some: bool = False
) -> Task:
    """Read folders of images called by WordNet id, with classnames.txt of "wnid name" lines.

    Labels are in the order of that file. ``parts`` tells the folder in ``images`` that holds the
    class folders of each part of the task. Where they are ``numbered``, class folders are called
    by line number, from 0, in place of the id. Where there are only ``some`` (in one part), the
    classes are those that have a folder, in place of all that the file lists.
    """
    names, rows = dict[str, str](), list[Row]()
    for where, line in _lines(file):
        key, _, name = line.partition(" ")
        if not name.strip():
            raise UserError(f"{where}: '{line}' must be 'wnid class name'; mend it")
        key = str(len(names)) if numbered else key
        if key in names:
            raise UserError(f"{where}: {key} is listed twice; take one out")
        names[key] = name.strip()
    for part, place in parts.items():
        folder = images / place
        there = set(subfolders(folder))
        if unknown := sorted(there.difference(names)):
            what = f"folder {folder / unknown[0]} is no class that {file} lists"
            raise UserError(f"{what}; take it out, or mend the file")
        if some:
            names = {key: name for key, name in names.items() if key in there}
        if missing := [key for key in names if key not in there]:
            what = f"class folders ({len(missing):,}) that {file} lists are missing from {folder}"
            raise UserError(f"{what}: {', '.join(missing[:20])}; download what is not there")
        found = {key: sorted(filter(has_image_name, os.listdir(folder / key))) for key in names}
        if empty := [key for key, files in found.items() if not files]:
            what = f"class folders ({len(empty):,}) in {folder} hold no images"
            raise UserError(f"{what}: {', '.join(empty[:20])}; download what is not there")
        for key, files in found.items():
            inside = f"{place}/{key}".removeprefix("./")
            rows += [(part, check_path(f"{inside}/{f}", f"folder {images}"), key) for f in files]
    where, tuned = f"benchmark folder {images}", "train" in parts
    return make_task(images.name, images, rows, where, names=names, tuned=tuned)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """A text file's lines that are not blank, each after where it is."""
    if not file.exists():
        raise UserError(f"index file {file} does not exist; put the published one there")
    with refusing(f"index file {file} cannot be read", "download it anew"):
        text = read_text(file)
    if not text.strip():
        raise UserError(f"index file {file} is empty; download it anew")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"index file {file}, line {number}", line.strip()


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies below the root, how it is read, and what is known of it."""

    name: str  # what the user calls it
    folder: str  # below the root
    images: str  # the images' folder in that one; paths are relative to it
    index: str  # the file in ``folder`` that lists its images or classes
    classes: int
    counts: dict[str, int]  # images of the published split, by the parts that it has
    gigabytes: float  # of its download, about
    licence: str  # as its authors state it
    url: str  # where they give it
    template: str = DEFAULT_TEMPLATE  # the field's hand-written prompt for it
    read: Callable[[Path, Path], Task] = read_split  # of its index and its images' folder
    # images that every class has at least, of the parts where this is known
    least: dict[str, int] = field(default_factory=dict)

    def image_root(self, root: Path) -> Path:
        """The images' folder, which item paths are relative to."""
        return root / self.folder / self.images

    def open(self, root: Path | None) -> Task:
        """Read the listing below ``root``."""
        wanted = f"the folder that holds {self.folder}/"
        if root is None:
            raise UserError(f"benchmark '{self.name}' needs --root, {wanted}")
        root = user_path(root)
        home, index = root / self.folder, root / self.folder / self.index
        if not root.is_dir():
            raise UserError(f"--root {root} does not exist; give {wanted}")
        if not home.is_dir():
            raise UserError(f"benchmark '{self.name}': {home} does not exist; check --root")
        if self.index == CLASS_NAMES and not index.exists():
            index = root / "imagenet" / CLASS_NAMES  # the same for ImageNet and its four shifts
        task = self.read(index, self.image_root(root))
        return replace(task, name=self.name, template=self.template)


_RESEARCH = "non-commercial research"
_UNSTATED = "none stated"
_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_TARGET = partial(read_class_folders, parts={"test": "."})

# fmt: off
BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in (
    Benchmark("caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json",
              100, {"train": 4128, "val": 1649, "test": 2465}, 0.1, "CC BY 4.0",
              "https://data.caltech.edu/records/mzrjq-6wc02"),
    Benchmark("dtd", "dtd", "images", "split_zhou_DescribableTextures.json",
              47, {"train": 2820, "val": 1128, "test": 1692}, 0.6, "research", f"{_VGG}/dtd/",
              "{} texture."),
    Benchmark("eurosat", "eurosat", "2750", "split_zhou_EuroSAT.json",
              10, {"train": 13500, "val": 5400, "test": 8100}, 0.1, "MIT",
              "https://github.com/phelber/EuroSAT", "a centered satellite photo of {}."),
    Benchmark("food101", "food-101", "images", "split_zhou_Food101.json",
              101, {"train": 50500, "val": 20200, "test": 30300}, 5.0, _RESEARCH,
              "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
              "a photo of {}, a type of food."),
    Benchmark("oxford_flowers", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
              102, {"train": 4093, "val": 1633, "test": 2463}, 0.3, _UNSTATED,
              f"{_VGG}/flowers/102/", "a photo of a {}, a type of flower."),
    Benchmark("oxford_pets", "oxford_pets", "images", "split_zhou_OxfordPets.json",
              37, {"train": 2944, "val": 736, "test": 3669}, 0.8, "CC BY-SA 4.0", f"{_VGG}/pets/",
              "a photo of a {}, a type of pet."),
    Benchmark("stanford_cars", "stanford_cars", ".", "split_zhou_StanfordCars.json",
              196, {"train": 6509, "val": 1635, "test": 8041}, 1.9, _RESEARCH,
              "https://ai.stanford.edu/~jkrause/cars/car_dataset.html"),
    Benchmark("sun397", "sun397", "SUN397", "split_zhou_SUN397.json",
              397, {"train": 15880, "val": 3970, "test": 19850}, 37.0, _RESEARCH,
              "https://vision.princeton.edu/projects/2010/SUN/"),
    Benchmark("ucf101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json",
              101, {"train": 7639, "val": 1898, "test": 3783}, 0.2, _UNSTATED,
              "https://www.crcv.ucf.edu/data/UCF101.php", "a photo of a person doing {}."),
    Benchmark("fgvc_aircraft", "fgvc_aircraft", "images", "variants.txt",
              100, {"train": 3334, "val": 3333, "test": 3333}, 2.6, _RESEARCH,
              f"{_VGG}/fgvc-aircraft/", "a photo of a {}, a type of aircraft.", read_variants),
    Benchmark("imagenet", "imagenet", "images", CLASS_NAMES,
              1000, {"train": 1281167, "test": 50000}, 145.0, _RESEARCH, "https://image-net.org",
              read=partial(read_class_folders, parts={"train": "train", "test": "val"}),
              least={"train": 732, "test": 50}),
    Benchmark("imagenetv2", "imagenetv2", "imagenetv2-matched-frequency-format-val", CLASS_NAMES,
              1000, {"test": 10000}, 1.2, "MIT", "https://github.com/modestyachts/ImageNetV2",
              read=partial(_TARGET, numbered=True), least={"test": 10}),
    Benchmark("imagenet_sketch", "imagenet-sketch", "images", CLASS_NAMES, 1000, {"test": 50889},
              7.0, "MIT", "https://github.com/HaohanWang/ImageNet-Sketch", read=_TARGET),
    Benchmark("imagenet_a", "imagenet-adversarial", "imagenet-a", CLASS_NAMES, 200, {"test": 7500},
              0.7, "MIT", "https://github.com/hendrycks/natural-adv-examples",
              read=partial(_TARGET, some=True)),
    Benchmark("imagenet_r", "imagenet-rendition", "imagenet-r", CLASS_NAMES, 200, {"test": 30000},
              2.0, "MIT", "https://github.com/hendrycks/imagenet-r",
              read=partial(_TARGET, some=True)),
)}
# fmt: on
