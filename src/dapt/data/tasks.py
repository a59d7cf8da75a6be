"""Opening a task, wherever it lies: the bundled drawings, a benchmark, a folder, a table.

Four sources, one form. Nothing here opens an image.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from dapt.data.benchmarks import BENCHMARKS
from dapt.data.folders import read_folder
from dapt.data.items import PARTS, Item, Listing, Task, check_class_names
from dapt.data.tables import SUFFIXES, read_table
from dapt.errors import UserError, nearest
from dapt.files import read_json

BUNDLED = "bundled"
DEFAULT_TEMPLATE = "a photo of a {}."


def open_task(
    dataset: str,
    *,
    root: Path | None = None,
    domain: str | None = None,
    class_names: Path | None = None,
    test_fraction: float = 0.5,
    split_seed: int = 0,
) -> Task:
    """Open a dataset as a task.

    Args:
        dataset: ``"bundled"``; a benchmark's name; a folder with ``train/`` and ``test/`` (and
            ``val/``), or with a folder for each class, which is then split; or a ``.csv`` or
            ``.jsonl`` file with ``path``, ``label`` and, optionally, ``split``.
        root: folder that holds the benchmarks.
        domain: style of the bundled task; by default its source style.
        class_names: JSON file, for own data: an object that maps folder names or labels to class
            names, or a list of class names in label order.
        test_fraction: share of each class that an unsplit source keeps for testing.
        split_seed: of that split.

    Raises:
        UserError: no such dataset, or something about its files is wrong.
    """
    if dataset == BUNDLED:
        return _bundled(domain)
    if domain is not None:
        raise UserError(f"--domain {domain}: only the bundled task has domains; leave it out")
    if dataset in BENCHMARKS:
        row = BENCHMARKS[dataset]
        if root is None:
            raise UserError(f"dataset '{dataset}' needs --root, the folder that holds {row.folder}")
        root = root.expanduser()
        return _task(dataset, row.image_root(root), row.open(root), row.template)
    path = Path(dataset).expanduser()
    if path.is_dir():
        listing, place = read_folder(path, test_fraction, split_seed), path
    elif path.is_file() and path.suffix.lower() in SUFFIXES:
        listing, place = read_table(path, test_fraction, split_seed), path.parent
    elif path.exists():
        raise UserError(f"{path} is neither a folder nor a .csv or .jsonl file; give one of these")
    else:
        raise UserError(
            f"unknown dataset '{dataset}'{nearest(dataset, [BUNDLED, *BENCHMARKS])}; give "
            f"'bundled', a benchmark ({', '.join(BENCHMARKS)}), a folder, or a .csv or .jsonl file"
        )
    if class_names:
        listing = _renamed(listing, class_names, dataset)
    check_class_names(listing.class_names, dataset)
    # "." has a name too, and a folder's name may hold a dot
    name = path.resolve().name if path.is_dir() else path.stem
    return _task(name, place, listing, DEFAULT_TEMPLATE)


def _task(name: str, root: Path, listing: Listing, template: str) -> Task:
    names = listing.class_names
    parts = {
        part: tuple(Item(path, label, names[label]) for path, label in getattr(listing, part))
        for part in PARTS
    }
    return Task(name, root, names, template=template, **parts)


def _renamed(listing: Listing, file: Path, dataset: str) -> Listing:
    """The listing under the class names of a mapping file."""
    value, known = read_json(file, "class names file"), listing.class_names
    if isinstance(value, list) and len(value) != len(known):
        raise UserError(
            f"class names file {file} lists {len(value)} names but {dataset} has {len(known)} "
            "classes; list one for each"
        )
    if isinstance(value, list):
        value = dict(zip(known, value, strict=True))
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise UserError(f"class names file {file} must map folder names to class names")
    if unknown := sorted(set(value) - set(known)):
        raise UserError(
            f"class names file {file} renames '{unknown[0]}', which {dataset} does not have"
            f"{nearest(unknown[0], known)}; correct or remove it"
        )
    names = tuple(value.get(name, name) for name in known)
    return Listing(names, listing.train, listing.val, listing.test)


def _assets() -> Path:
    return Path(str(files("dapt") / "assets" / "task"))


@lru_cache
def _index(path: Path) -> dict[str, Any]:
    return dict(read_json(path, "bundled task"))


def bundled_domains() -> list[str]:
    """Styles of the bundled task, the source style first."""
    return list(_index(_assets() / "task.json")["domains"])


def _bundled(domain: str | None) -> Task:
    index, domains = _index(_assets() / "task.json"), bundled_domains()
    domain = domain or domains[0]
    if domain not in domains:
        raise UserError(
            f"unknown domain '{domain}' of the bundled task{nearest(domain, domains)}; use one of "
            f"{', '.join(domains)}"
        )
    parts = {
        part: tuple((path, label) for path, label in index["domains"][domain].get(part, []))
        for part in PARTS
    }
    name = BUNDLED if domain == domains[0] else f"{BUNDLED}-{domain}"
    return _task(name, _assets(), Listing(tuple(index["class_names"]), **parts), index["template"])
