"""How people spell parts and columns, and what systems call folders of their own: data alone."""

from __future__ import annotations

import re

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # how names of tables end
# What each part is called. Words, in lower case; plurals and "set", "data" and the like go along.
PART_WORDS = {
    "train": ("train", "training", "tr", "trn", "trainval"),
    "val": ("val", "valid", "validation", "validate", "dev", "devel"),
    "test": ("test", "testing", "tst", "te", "eval", "evaluation", "holdout", "heldout"),
}
# Those that are classes as well: of vehicles, sports, languages, documents.
_DOUBTFUL = {"train", "trains", "training", "tr", "trn", "dev", "tst", "te", "valid"}
_FILLERS = ("set", "sets", "data", "dataset", "split", "part", "folder", "images", "image", "imgs",
            "img", "photos", "pictures", "labels", "label", "metadata", "annotations")  # fmt: skip
_PART_OF = {word: part for part, words in PART_WORDS.items() for word in words}
_HOLD_OUT = re.compile(r"h(?:o|e)ld[^a-z]*out")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")

# Folders that NAS, systems and programs keep for themselves, in lower case: never a class.
SERVICE = {
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@__thumb",
    ".@__thumb", "$recycle.bin", "recycler", "system volume information", "lost+found",
    "__macosx", ".trash", ".trashes", ".trash-1000", ".appledouble", ".spotlight-v100",
    ".fseventsd", ".ipynb_checkpoints", "__pycache__", ".thumbnails", "thumbnails", "thumbnail",
    "_thumbnails", "_thumbs", ".thumbs", "_vti_cnf", ".picasaoriginals",
}  # fmt: skip
_SERVICE_WITHIN = SERVICE | {"thumbs", "thumb"}  # which may be a class of gestures

# Folders of images that have no class yet, in lower case.
UNSORTED = {"unlabelled", "unlabeled", "unsorted", "unannotated", "unsup", "no label", "no_label"}

# Columns of tables, the usual ones first; read without regard to case, spaces and hyphens.
PATH_COLUMNS = (
    "path", "filename", "file_name", "filepath", "file_path", "filepaths", "file", "image",
    "image_path", "imagepath", "image_file", "image_name", "imagename", "img", "img_path",
    "img_name", "picture", "photo", "images", "files", "filenames", "image_id", "id",
)  # fmt: skip
LABEL_COLUMNS = (
    "label", "class", "category", "label_name", "class_name", "classname", "category_name",
    "labels", "classes", "target", "choice", "species", "breed", "cls", "fine_label",
)  # fmt: skip
SPLIT_COLUMNS = ("split", "data_set", "dataset", "subset", "set", "partition", "part")
BOX_COLUMNS = {"xmin", "x_min", "bbox"}  # a line each for what is seen in an image
INDEX_COLUMNS = ("", "unnamed:_0", "index")  # that pandas writes: no class of one-hot columns

# Tables that lie beside images, by their names without the suffix.
TABLE_NAMES = (
    "metadata",
    "_classes",
    "labels",
    "_annotations.coco",
    "_annotations",
    "annotations",
    "label",
)


def part_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The part that a folder or a table is named for, and what else its name says; None if none.

    "Train", "training_set", "TrainImages" and "train2017" are ("train", ()), and "seg_train" is
    ("train", ("seg",)).
    """
    text = _HOLD_OUT.sub("holdout", _CAMEL.sub(" ", name).casefold())
    found, rest = list[str](), list[str]()
    for word in re.findall(r"[^\W\d_]+", text):
        if (part := _part_word(word)) is not None:
            found.append(part)
        elif word not in _FILLERS:
            rest.append(word)
    return (found[0], tuple(rest)) if len(found) == 1 else None


def plain_part(name: str) -> str:
    """The part that a name says and nothing else, or ""."""
    part, rest = part_of(name) or ("", ())
    return "" if rest else part


def _part_word(word: str) -> str | None:
    """The part of one word: it may be a plural, or glued to "set" and the like."""
    for ending in ("", "s", *_FILLERS):
        stem = word.removesuffix(ending)
        # Of the shortest words no others are made.
        if stem + ending == word and (not ending or len(stem) > 2) and stem in _PART_OF:
            return _PART_OF[stem]
    return None


def may_be_class(name: str) -> bool:
    """Whether what is called like a part may well be a class beside others."""
    return name.casefold() in _DOUBTFUL


def is_service(name: str, *, within: bool = True) -> bool:
    """Whether a folder is a system's own; ``within`` a class folder, or beside class folders."""
    return name.casefold() in (_SERVICE_WITHIN if within else SERVICE)


def column_key(name: str) -> str:
    """A column's name as the lists here have it."""
    return re.sub(r"[\s\-]+", "_", name.strip().casefold())
