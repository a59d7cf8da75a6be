"""One door to every task: the bundled one, a benchmark, or images in whatever form they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapt.data.benchmarks import BENCHMARKS
from dapt.data.folders import read_folder
from dapt.data.items import (
    PARTS,
    Item,
    Listing,
    Pair,
    Task,
    check_class_names,
    check_path,
    names_alike,
)
from dapt.data.packed import is_hugging_face, is_webdataset, read_packed
from dapt.data.tables import SUFFIXES, read_table
from dapt.errors import UserError, nearest
from dapt.safe.files import read_json, user_path

BUNDLED = "bundled"
BUNDLED_ROOT = Path(__file__).resolve().parents[1] / "assets" / "task"
DEFAULT_TEMPLATE = "a photo of a {}."

__all__ = ["BUNDLED", "DEFAULT_TEMPLATE", "Item", "Task", "bundled_domains", "open_task"]


def open_task(
    dataset: str,
    *,
    root: Path | None = None,
    domain: str | None = None,
    class_names: Path | None = None,
    test_fraction: float = 0.5,
    split_seed: int = 0,
    evaluate: bool = False,
) -> Task:
    """Open a task. No image is looked at yet: a missing one is reported when it is read.

    Args:
        dataset: ``bundled``; a benchmark's name; a folder with ``train/<class>/`` and
            ``test/<class>/`` or with ``<class>/`` alone; a ``.csv`` or ``.jsonl`` file with
            ``path`` and ``label`` (and ``split``); or a Hugging Face dataset or WebDataset
            shards, as `read_packed` takes them.
        root: folder that holds the benchmarks; not read for anything else.
        domain: style of the bundled task; the source domain if not given.
        class_names: JSON file with other names for the classes: an object from the listed name
            (a folder's, say) to the new one, or a list of all in label order.
        test_fraction: share of each class that becomes test images, where nothing is split yet.
        split_seed: of that split.
        evaluate: the task is only evaluated on: an unsplit source is all test images, and
            nothing needs train images.

    Raises:
        UserError: unknown dataset or domain, or anything wrong with what is read.
    """
    if domain is not None and dataset != BUNDLED:
        raise UserError(f"--domain {domain} goes with the bundled task only, not with '{dataset}'")
    if not 0 < test_fraction < 1:
        raise UserError(f"test_fraction {test_fraction} must be between 0 and 1")
    if evaluate:
        test_fraction = 1.0
    template, source, notes = DEFAULT_TEMPLATE, None, tuple[str, ...]()
    path = user_path(dataset)
    if dataset == BUNDLED:
        name, listing, template = _read_bundled(domain)
        images = BUNDLED_ROOT
    elif dataset in BENCHMARKS:
        benchmark = BENCHMARKS[dataset]
        if root is None:
            raise UserError(
                f"benchmark '{dataset}' needs --root, the folder that holds {benchmark.folder}/"
            )
        root = user_path(root)
        name, listing, template = dataset, benchmark.open(root), benchmark.template
        images = benchmark.image_root(root)
    elif is_hugging_face(path) or is_webdataset(path):
        name = path.resolve().stem
        images, listing, source = read_packed(path, test_fraction, split_seed)
    elif path.is_dir():
        name, images = path.resolve().name, path
        listing, notes = read_folder(path, test_fraction, split_seed)
    elif path.suffix.lower() in SUFFIXES and path.is_file():
        name, images = path.stem, path.parent
        listing = read_table(path, test_fraction, split_seed)
    else:
        raise UserError(_unknown(dataset, path))
    names = _renamed(listing.class_names, class_names)
    # Some benchmarks do have two classes of one name; their readers check what should hold.
    published = dataset in BENCHMARKS and class_names is None
    where = f"class name file {class_names}" if class_names else f"dataset '{dataset}'"
    check_class_names(names, where, distinct=not published)
    train, val, test = (
        tuple(Item(path, label, names[label]) for path, label in getattr(listing, part))
        for part in PARTS
    )
    if published and (alike := names_alike(names)):
        one, other = alike[0]
        notes += (
            f"{len(alike)} of the {len(names):,} classes of '{name}' have another's name (such as "
            f"'{names[other]}', label {other}, that of label {one}), which text prompts cannot "
            "tell apart; better names can be given with --class-names",
        )
    return Task(name, images, names, train, val, test, template, source, notes)


def bundled_domains() -> tuple[str, ...]:
    """Styles of the bundled task, the source domain first."""
    return tuple(_bundled_index()["domains"])


def _unknown(dataset: str, path: Path) -> str:
    if path.is_file():
        return f"dataset {path} must be a .csv, .jsonl or .tar file, or a folder"
    if path.suffix.lower() in SUFFIXES or len(path.parts) > 1:
        return f"dataset {path} does not exist; check the path"
    known = (BUNDLED, *BENCHMARKS)
    return (
        f"unknown dataset '{dataset}'{nearest(dataset, known)}; give a folder, a .csv or .jsonl "
        f"file, or one of {', '.join(known)}"
    )


def _bundled_index() -> dict[str, Any]:
    data = read_json(BUNDLED_ROOT / "task.json", "bundled task")
    if not isinstance(data, dict) or not isinstance(data.get("domains"), dict):
        raise UserError(f"bundled task {BUNDLED_ROOT} is damaged; reinstall dapt")
    return data


def _read_bundled(domain: str | None) -> tuple[str, Listing, str]:
    """The bundled task's name, listing and template; the first domain is the source."""
    data = _bundled_index()
    domains = list(data["domains"])
    if domain is None:
        domain = domains[0]
    if domain not in domains:
        raise UserError(
            f"the bundled task has no domain '{domain}'{nearest(domain, domains)}; use one of "
            f"{', '.join(domains)}"
        )
    name = BUNDLED if domain == domains[0] else f"{BUNDLED}:{domain}"
    parts = {part: _bundled_pairs(data["domains"][domain].get(part, ())) for part in PARTS}
    return name, Listing(tuple(data["class_names"]), **parts), data["template"]


def _bundled_pairs(entries: list[Any] | tuple[()]) -> tuple[Pair, ...]:
    return tuple((check_path(path, "bundled task"), label) for path, label in entries)


def _renamed(names: tuple[str, ...], file: Path | None) -> tuple[str, ...]:
    """Class names after the user's mapping or list."""
    if file is None:
        return names
    given = read_class_names(file)
    if isinstance(given, dict):
        for name in given:
            if name not in names:
                raise UserError(
                    f"class name file {file}: the dataset has no class '{name}'"
                    f"{nearest(name, names)}; take it out"
                )
        return tuple(given.get(name, name) for name in names)
    if len(given) != len(names):
        raise UserError(
            f"class name file {file} lists {len(given)} names, but the dataset has {len(names)} "
            "classes; list one for each, in label order"
        )
    return tuple(given)


def read_class_names(file: Path) -> list[str] | dict[str, str]:
    """Class names in label order, or an object from listed names to better ones.

    Raises:
        UserError: the file cannot be read, or holds something else or nothing.
    """
    given = read_json(user_path(file), "class name file")
    values = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise UserError(
            f"class name file {file} must hold a JSON object of folder name to class name, or a "
            "list of class names in label order"
        )
    return given
