"""The published benchmarks: one table of where each lies, how it is read, and what it is.

All lie under one root, in the layout of the CoOp code base (Zhou et al., 2022), whose list of
downloads and split files is at `LAYOUT`. Counts are those of the published splits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dapt.data.items import Listing
from dapt.data.splits import read_class_folders, read_split, read_variants
from dapt.errors import UserError

LAYOUT = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
CLASS_NAMES = "classnames.txt"


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies below the root, how it is read, and what is known of it.

    Attributes:
        name: what the user calls it.
        folder: its folder below the root.
        images: the images' folder in that one; paths are relative to it.
        index: the file in ``folder`` that lists its images or classes.
        classes: how many.
        counts: images to train, validate and test on; those that it has.
        gigabytes: of its download, about.
        licence: as its authors state it.
        url: where they give it.
        template: the field's hand-written prompt for it, used where the text is not learned.
        read: reads the index, given its path and that of the images' folder.
        least: images that every class has at least, of the parts where this is known.
    """

    name: str
    folder: str
    images: str
    index: str
    classes: int
    counts: dict[str, int]
    gigabytes: float
    licence: str
    url: str
    template: str = "a photo of a {}."
    read: Callable[[Path, Path], Listing] = read_split
    least: dict[str, int] = field(default_factory=dict)

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
        index = root / self.folder / self.index
        if self.index == CLASS_NAMES and not index.exists():
            index = root / "imagenet" / CLASS_NAMES  # the same for ImageNet and its four shifts
        return self.read(index, self.image_root(root))


def _counts(train: int, val: int, test: int) -> dict[str, int]:
    return {"train": train, "val": val, "test": test}


_RESEARCH = "non-commercial research"
_UNSTATED = "none stated"
_VGG = "https://www.robots.ox.ac.uk/~vgg/data"
_TARGET = partial(read_class_folders, parts={"test": "."})

_ROWS = (
    Benchmark(
        "caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json",
        100, _counts(4128, 1649, 2465), 0.1, "CC BY 4.0",
        "https://data.caltech.edu/records/mzrjq-6wc02",
    ),
    Benchmark(
        "dtd", "dtd", "images", "split_zhou_DescribableTextures.json",
        47, _counts(2820, 1128, 1692), 0.6, "research", f"{_VGG}/dtd/", "{} texture.",
    ),
    Benchmark(
        "eurosat", "eurosat", "2750", "split_zhou_EuroSAT.json",
        10, _counts(13500, 5400, 8100), 0.1, "MIT", "https://github.com/phelber/EuroSAT",
        "a centered satellite photo of {}.",
    ),
    Benchmark(
        "food101", "food-101", "images", "split_zhou_Food101.json",
        101, _counts(50500, 20200, 30300), 5.0, _RESEARCH,
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        "a photo of {}, a type of food.",
    ),
    Benchmark(
        "oxford_flowers", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json",
        102, _counts(4093, 1633, 2463), 0.3, _UNSTATED, f"{_VGG}/flowers/102/",
        "a photo of a {}, a type of flower.",
    ),
    Benchmark(
        "oxford_pets", "oxford_pets", "images", "split_zhou_OxfordPets.json",
        37, _counts(2944, 736, 3669), 0.8, "CC BY-SA 4.0", f"{_VGG}/pets/",
        "a photo of a {}, a type of pet.",
    ),
    Benchmark(
        "stanford_cars", "stanford_cars", ".", "split_zhou_StanfordCars.json",
        196, _counts(6509, 1635, 8041), 1.9, _RESEARCH,
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
    ),
    Benchmark(
        "sun397", "sun397", "SUN397", "split_zhou_SUN397.json",
        397, _counts(15880, 3970, 19850), 37.0, _RESEARCH,
        "https://vision.princeton.edu/projects/2010/SUN/",
    ),
    Benchmark(
        "ucf101", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json",
        101, _counts(7639, 1898, 3783), 0.2, _UNSTATED,
        "https://www.crcv.ucf.edu/data/UCF101.php", "a photo of a person doing {}.",
    ),
    Benchmark(
        "fgvc_aircraft", "fgvc_aircraft", "images", "variants.txt",
        100, _counts(3334, 3333, 3333), 2.6, _RESEARCH, f"{_VGG}/fgvc-aircraft/",
        "a photo of a {}, a type of aircraft.", read_variants,
    ),
    Benchmark(
        "imagenet", "imagenet", "images", CLASS_NAMES,
        1000, {"train": 1281167, "test": 50000}, 145.0, _RESEARCH, "https://image-net.org",
        read=partial(read_class_folders, parts={"train": "train", "test": "val"}),
        least={"train": 732, "test": 50},
    ),
    Benchmark(
        "imagenetv2", "imagenetv2", "imagenetv2-matched-frequency-format-val", CLASS_NAMES,
        1000, {"test": 10000}, 1.2, "MIT", "https://github.com/modestyachts/ImageNetV2",
        read=partial(_TARGET, numbered=True), least={"test": 10},
    ),
    Benchmark(
        "imagenet_sketch", "imagenet-sketch", "images", CLASS_NAMES,
        1000, {"test": 50889}, 7.0, "MIT", "https://github.com/HaohanWang/ImageNet-Sketch",
        read=_TARGET,
    ),
    Benchmark(
        "imagenet_a", "imagenet-adversarial", "imagenet-a", CLASS_NAMES,
        200, {"test": 7500}, 0.7, "MIT", "https://github.com/hendrycks/natural-adv-examples",
        read=partial(_TARGET, some=True),
    ),
    Benchmark(
        "imagenet_r", "imagenet-rendition", "imagenet-r", CLASS_NAMES,
        200, {"test": 30000}, 2.0, "MIT", "https://github.com/hendrycks/imagenet-r",
        read=partial(_TARGET, some=True),
    ),
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {row.name: row for row in _ROWS}
