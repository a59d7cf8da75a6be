"""A task from packed images: a Hugging Face dataset on disk, or WebDataset shards.

Images are unpacked once into a cache that is named by the hash of what they were unpacked from, and
are ordinary files from there on. Both are read by their own libraries, as bytes: nothing in them is
decoded to objects, and no name in them becomes a path.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from dapt.data.folders import split_by_class
from dapt.data.items import (
    PARTS,
    Listing,
    Pair,
    check_class_names,
    check_listing,
    check_path,
    label_order,
)
from dapt.errors import UserError, reason_of
from dapt.safe.files import (
    TEMPORARY,
    delete_abandoned,
    file_digest,
    open_regular,
    parse_json,
    read_json,
    read_text,
    user_path,
    write_atomic,
    write_json,
)

# What both formats call parts, and what we call them.
_PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Names that columns of images and labels have, the usual ones first.
IMAGE_COLUMNS = ("image", "img", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
# In the folder of shards whose .cls are numbers: a class name a line, in label order.
_NAMES_FILE = "classnames.txt"
_LISTING = "listing.json"
_LARGEST_IMAGE = 2**30  # bytes of a file
_PLAIN = re.compile("u?int[0-9]+|(large_)?string")  # types of a column of labels
_META = re.compile(r"__[^/]*__(/|$)")  # names in a shard that say something of it

# part (or "" where nothing is split), class name, bytes of an image file
_Image = tuple[str, str, bytes]


def is_hugging_face(path: Path) -> bool:
    """Whether ``save_to_disk`` of a Hugging Face dataset wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )


def is_webdataset(path: Path) -> bool:
    """Whether this is a ``.tar`` file, or a folder that holds some (in parts' folders or not).

    A folder with class folders is none, whatever archive lies beside them.
    """
    if path.is_dir():
        shards = _shards(path)
        places = {path, *(shard.parent for shard in shards)}
        folders = {d for p in places for d in p.iterdir() if d.is_dir() and d.name[0] != "."}
        return bool(shards) and folders <= places
    return path.suffix.lower() == ".tar" and path.is_file()


def read_packed(path: Path, test_fraction: float, split_seed: int) -> tuple[Path, Listing, str]:
    """Unpack a source, if that was not done before, and read what is in it.

    Args:
        path: a folder that ``save_to_disk`` wrote; a ``.tar`` shard; or a folder of shards, whose
            part is the start of their name or the folder they are in (``train-000.tar``,
            ``train/0.tar``).
        test_fraction, split_seed: where there are no parts, `split_by_class` makes them.

    Returns:
        The folder that images are unpacked in, their listing, and the SHA-256 of the source.

    Raises:
        UserError: a library is missing, or the source is damaged or has no images or labels.
    """
    digest = _fingerprint(path)
    folder = cache_folder() / digest[:32]
    if not (folder / _LISTING).is_file():
        _unpack(path, folder)
    value = read_json(folder / _LISTING, "listing of unpacked images")
    try:
        classes = [str(name) for name in value["class_names"]]
        parts: dict[str, tuple[Pair, ...]] = {
            part: tuple((check_path(p, str(folder)), int(label)) for p, label in pairs)
            for part, pairs in value["parts"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is damaged; delete it, and it is unpacked anew") from error
    if (unsplit := parts.pop("", None)) is not None:
        train, test = split_by_class(unsplit, classes, test_fraction, split_seed)
        parts = {"train": train, "test": test}
    listing = Listing(tuple(classes), **parts)
    check_class_names(listing.class_names, f"dataset {path}", distinct=False)
    check_listing(listing, f"dataset {path}", tuned=test_fraction < 1)
    return folder, listing, digest


def cache_folder() -> Path:
    """Where unpacked images are kept: $DAPT_CACHE, or dapt in the user's cache folder.

    Raises:
        UserError: the user has no home, or $DAPT_CACHE is no path.
    """
    if given := os.environ.get("DAPT_CACHE"):
        return user_path(given)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return user_path(base) / "dapt"
    except UserError as error:
        raise UserError(
            f"there is no folder for unpacked images ({error}); name one in DAPT_CACHE"
        ) from error


def _fingerprint(path: Path) -> str:
    """SHA-256 over the names and contents of all files of a source.

    It is remembered in the cache by the files' places, sizes and times: making it reads them all.
    """
    if path.is_file():
        files = [path]
    elif is_hugging_face(path):
        files = [
            p for p in path.rglob("*") if p.is_file() and not p.name.startswith(("cache-", "."))
        ]
    else:
        names = path / _NAMES_FILE
        files = [*_shards(path), *([names] if names.is_file() else [])]
    total, seen = hashlib.sha256(), hashlib.sha256()
    try:
        for file in sorted(files):
            stat = file.stat()
            known = (os.fsencode(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            seen.update(repr(known).encode())
        memory = cache_folder() / f"{seen.hexdigest()[:32]}.sha256"
        with suppress(OSError, ValueError):
            if re.fullmatch("[0-9a-f]{64}", remembered := read_text(memory)):
                return remembered
        for file in sorted(files):
            name = file.name if path.is_file() else file.relative_to(path).as_posix()
            one = file_digest(file)
            total.update(f"{len(os.fsencode(name))} ".encode() + os.fsencode(name) + one)
    except OSError as error:
        raise UserError(f"dataset {path} cannot be read ({error}); check it") from error
    with suppress(OSError):  # a cache that is only read still serves
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, total.hexdigest())
    return total.hexdigest()


def _unpack(path: Path, folder: Path) -> None:
    """Write a source's images and their listing into ``folder``, all or nothing."""
    images = _hugging_face(path) if is_hugging_face(path) else _webdataset(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}."
    delete_abandoned(folder.parent, prefix)
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix, suffix=TEMPORARY))
    try:
        found: list[tuple[str, str, str]] = []
        for number, (part, name, content) in enumerate(images):
            file = f"{part or 'all'}-{number // 1000:04d}/{number:07d}.img"
            (place / file).parent.mkdir(exist_ok=True)
            (place / file).write_bytes(content)
            found.append((part, file, name))
        if not found:
            raise UserError(f"dataset {path} holds no images; check that it is complete")
        split = {part for part, _, _ in found}
        if "" in split and len(split) > 1:
            raise UserError(
                f"dataset {path}: either every shard's name starts with train, val or test, or none"
            )
        classes = label_order({name for _, _, name in found})
        number_of = {name: label for label, name in enumerate(classes)}
        parts = {
            part: [[file, number_of[name]] for p, file, name in found if p == part]
            for part in ("", *PARTS)
            if part in split
        }
        write_json(place / _LISTING, {"class_names": classes, "parts": parts})
        if hasattr(os, "sync"):  # the images must be on disk before the name says so
            os.sync()
        try:
            place.rename(folder)
        except OSError as error:
            if not (folder / _LISTING).is_file():  # not just another process that was faster
                raise UserError(
                    f"{folder} cannot be written ({error}); delete it, and it is unpacked anew"
                ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


# -- Hugging Face ----------------------------------------------------------------------------


def _hugging_face(path: Path) -> Iterator[_Image]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path} is a Hugging Face dataset, which needs {error.name}: pip install "
            "'dapt[sources]'"
        ) from error
    _check_names(path)
    try:
        yield from _rows(datasets.load_from_disk(str(path)), path)
    except UserError:
        raise
    except Exception as error:  # Arrow's errors are a wide family
        raise UserError(
            f"dataset {path} cannot be loaded ({reason_of(error)}); save it anew"
        ) from error


def _rows(loaded: Any, path: Path) -> Iterator[_Image]:
    from datasets import DatasetDict, Image

    split = isinstance(loaded, DatasetDict)
    for part, rows in loaded.items() if split else [("", loaded)]:
        if split and part not in _PARTS:
            raise UserError(
                f"dataset {path}: split '{part}' is none of train, validation, test; rename it, or "
                "take it out"
            )
        where = f"dataset {path}{f', {part}' if part else ''}"
        image = _column(rows, IMAGE_COLUMNS, where, "images")
        label = _column(rows, LABEL_COLUMNS, where, "labels")
        kind = rows.features[label]
        names = getattr(kind, "names", None)
        # The library would decode others, with whatever program or address an image there asks for.
        if names is None and not _PLAIN.fullmatch(str(getattr(kind, "dtype", None))):
            raise UserError(
                f"{where}: column '{label}' is of type {type(kind).__name__}; make it a "
                "ClassLabel, whole numbers or text"
            )
        rows = rows.select_columns([image, label]).cast_column(image, Image(decode=False))
        for number, row in enumerate(rows):
            line = f"{where}, row {number}"
            content = _content(row[image], line, path)
            yield _PARTS.get(part, ""), _named(row[label], names, line), content


def _check_names(path: Path) -> None:
    """Raise `UserError` where a dataset's records name files outside its folder, or no files.

    The library opens whatever they name, and would wait for a FIFO without end.
    """
    places = [path]
    if (path / "dataset_dict.json").is_file():
        record = read_json(path / "dataset_dict.json", "list of splits")
        names = record.get("splits") if isinstance(record, dict) else None
        if not isinstance(names, list):
            raise UserError(f"dataset {path}: dataset_dict.json lists no splits; save it anew")
        places = [path / _inside(name, path) for name in names]
    for place in places:
        record = read_json(place / "state.json", "state of the dataset")
        files = record.get("_data_files") if isinstance(record, dict) else None
        if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
            raise UserError(f"{place / 'state.json'} lists no data files; save the dataset anew")
        data = [_inside(file.get("filename"), place) for file in files]
        for file in (place / name for name in ("dataset_info.json", *data)):
            try:
                open_regular(file).close()
            except OSError as error:
                raise UserError(
                    f"dataset {path} cannot be loaded: {file} cannot be opened ({error}); save it "
                    "anew"
                ) from error


def _inside(name: Any, place: Path) -> str:
    """A name from a record, if it leads to what lies in a folder."""
    return check_path(name if isinstance(name, str) else "", f"dataset {place}")


def _column(rows: Any, known: tuple[str, ...], where: str, what: str) -> str:
    for name in known:
        if name in rows.column_names:
            return name
    raise UserError(
        f"{where} has no column of {what} ({', '.join(known)}), but {', '.join(rows.column_names)};"
        " rename one"
    )


def _content(value: Any, where: str, root: Path) -> bytes:
    value = value or {}
    if content := value.get("bytes"):
        return bytes(content)
    try:
        file = Path(value["path"])
        # Whoever wrote the dataset must not choose which of this machine's files are read.
        if not file.resolve().is_relative_to(root.resolve()):
            raise OSError("it is not in the dataset's folder")
        with open_regular(file) as opened:
            if os.fstat(opened.fileno()).st_size > _LARGEST_IMAGE:
                raise OSError("it is too large")
            return opened.read()
    except (KeyError, TypeError) as error:
        raise UserError(f"{where} has no image; take the row out") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}: its image {value['path']} cannot be read ({reason_of(error)}); save the "
            "dataset with its images in it"
        ) from error


# -- WebDataset ------------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("*.tar") if p.is_file()]
    for part in _PARTS:
        found += [p for p in (folder / part).glob("*.tar") if p.is_file()]
    return sorted(found)


def _part_of(shard: Path, root: Path) -> str:
    name = shard.relative_to(root).as_posix() if root.is_dir() else ""
    start = re.match(r"[a-z]+", name)
    return _PARTS.get(start[0], "") if start else ""


def _webdataset(path: Path) -> Iterator[_Image]:
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError as error:
        raise UserError(
            f"{path} is read as WebDataset shards, which needs {error.name}: pip install "
            "'dapt[sources]'"
        ) from error
    folder = path if path.is_dir() else path.parent
    names = _names_beside(folder)
    for shard in _shards(path) if path.is_dir() else [path]:
        # The file is opened here: the library would take some names for commands or addresses.
        try:
            with open_regular(shard) as stream:
                for sample in group_by_keys(_members(stream)):
                    where = f"shard {shard}, sample {sample['__key__']}"
                    image = next((sample[s] for s in _IMAGE_SUFFIXES if s in sample), None)
                    if image is None:
                        raise UserError(
                            f"{where} has no image (.{', .'.join(_IMAGE_SUFFIXES)}); take it out"
                        )
                    yield _part_of(shard, path), _named(_label(sample, where), names, where), image
        except UserError:
            raise
        except Exception as error:  # tarfile's errors, and the library's own
            raise UserError(
                f"shard {shard} cannot be read ({reason_of(error)}); copy it anew"
            ) from error


def _members(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The files in a tar that is not compressed, as webdataset's own reader gives them.

    That one would unpack what looks compressed, however much it becomes.

    Raises:
        ValueError: a header promises more than an image has.
    """
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.issparse() or member.size > _LARGEST_IMAGE:
                raise ValueError(f"{member.name[:80]!r} has {member.size:,} bytes")
            content = archive.extractfile(member) if member.isreg() else None  # links lead nowhere
            if content is not None and not _META.match(member.name):
                yield {"fname": member.name, "data": content.read(), "__url__": ""}


def _names_beside(folder: Path) -> list[str] | None:
    file = folder / _NAMES_FILE
    if not file.is_file():
        return None
    try:
        return [line.strip() for line in read_text(file).splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); save it as UTF-8 text") from error


def _label(sample: dict[str, Any], where: str) -> Any:
    """A sample's label: what its .cls says, or the entry of its .json."""
    try:
        if "cls" in sample:
            text = sample["cls"].decode().strip()
            return int(text) if text.isascii() and text.isdigit() else text
        if "json" in sample:
            value = parse_json(sample["json"].decode())
            return next(value[name] for name in LABEL_COLUMNS if name in value)
    except (ValueError, TypeError, StopIteration, RecursionError) as error:
        raise UserError(
            f"{where}: its label cannot be read; .cls must be text, .json an object with 'label'"
        ) from error
    raise UserError(f"{where} has no label; add a .cls, or a .json with 'label'")


def _named(label: Any, names: list[str] | None, where: str) -> str:
    """The class name of a label; a number without names is its own."""
    if type(label) is int and names is not None:
        if not 0 <= label < len(names):
            raise UserError(f"{where}: label {label} is none of 0 .. {len(names) - 1}; mend it")
        return names[label]
    if type(label) is int or (isinstance(label, str) and label.strip()):
        return str(label).strip()
    raise UserError(f"{where}: label {label!r} is neither a number nor a class name; mend it")
