"""A task from packed images: a Hugging Face dataset on disk, or WebDataset shards.

Images are unpacked once, into a cache named by the hash of what they were unpacked from, and are
ordinary files from there on. Both are read by their own libraries, as bytes: nothing in them is
decoded to objects, and no name in them becomes a path.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from dapt.data import items
from dapt.data.images import IMAGE_COLUMNS, first_of
from dapt.data.items import check_path, make_task
from dapt.data.spellings import LABEL_COLUMNS, PART_WORDS, is_service, plain_part
from dapt.errors import UserError, install, refusing
from dapt.safe import files

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
_NAMES_FILE = "classnames.txt"  # beside shards whose .cls are numbers: in label order
_LISTING = "listing.json"
_DICTIONARY, _INFO = "dataset_dict.json", "dataset_info.json"  # of a Hugging Face dataset
_LARGEST_IMAGE = 2**30  # bytes of a file
_PLAIN = re.compile("u?int[0-9]+|(large_)?string")  # types of a column of labels
_META = re.compile(r"__[^/]*__(/|$)")  # names in a shard that say something of it
_INSTALL = install("sources")
_ANEW = "delete it, and it is unpacked anew"
_Image = tuple[str, str, bytes]  # part ("" where nothing is split), class name, the file's bytes


def is_hugging_face(path: Path) -> bool:
    """Whether ``save_to_disk`` of a Hugging Face dataset wrote this folder."""
    whole = all((path / name).is_file() for name in ("state.json", _INFO))
    return whole or (path / _DICTIONARY).is_file()  # with parts


def is_webdataset(path: Path) -> bool:
    """Whether this is a ``.tar`` file, or a folder that holds some, and no folders but parts'."""
    if not path.is_dir():
        return path.suffix.lower() == ".tar" and path.is_file()
    shards = _shards(path)
    places = {path, *(shard.parent for shard in shards)}
    found = (d for p in places for d in p.iterdir() if d.is_dir())
    folders = {d for d in found if d.name[0] != "." and not is_service(d.name)}
    return bool(shards) and folders <= places


def read_packed(path: Path, split: items.Split) -> items.Task:
    """Unpack a source, if that was not done before, and read what is in it.

    It is a folder that ``save_to_disk`` wrote; a ``.tar`` shard; or a folder of shards, whose part
    is the start of their name or the folder they are in (``train-000.tar``, ``train/0.tar``).
    """
    digest = _fingerprint(path)
    folder = cache_folder() / digest[:32]
    if not (folder / _LISTING).is_file():
        _unpack(path, folder)
    listing = files.read_json(folder / _LISTING, "listing of unpacked images")
    with refusing(f"{folder} is damaged", _ANEW, Exception):
        names, parts = listing["class_names"], listing["parts"]
        rows = [(part, file, str(names[k])) for part in parts for file, k in parts[part]]
        name, where = path.resolve().stem, f"dataset {path}"
        return make_task(name, folder, rows, where, split=split, source_sha256=digest)


def cache_folder() -> Path:
    """Where unpacked images are kept: $DAPT_CACHE, or dapt in the user's cache folder."""
    usual = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/dapt"
    try:
        return files.user_path(os.environ.get("DAPT_CACHE") or usual)
    except UserError as error:
        raise UserError(
            f"no folder for unpacked images ({error}); name one in DAPT_CACHE"
        ) from error


def _fingerprint(path: Path) -> str:
    """SHA-256 over a source's file names and contents, remembered by places, sizes and times."""
    found = [path]
    if is_hugging_face(path):
        found = [p for p in path.rglob("*") if not p.name.startswith(("cache-", "."))]
    elif path.is_dir():
        found = [*_shards(path), path / _NAMES_FILE]
    found = sorted(file for file in found if file.is_file())
    total, seen = sha256(), sha256()
    with refusing(f"dataset {path} cannot be read", "check it"):
        for file in found:
            stat = file.stat()
            known = (os.fsencode(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            seen.update(repr(known).encode())
        memory = cache_folder() / f"{seen.hexdigest()[:32]}.sha256"
        with suppress(OSError, ValueError):
            if re.fullmatch("[0-9a-f]{64}", remembered := files.read_text(memory)):
                return remembered
        for file in found:
            name = os.fsencode(file.name if file == path else file.relative_to(path).as_posix())
            total.update(f"{len(name)} ".encode() + name + files.file_digest(file))
    with suppress(OSError):  # a cache that is only read still serves
        memory.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(memory, total.hexdigest())
    return total.hexdigest()


def _unpack(path: Path, folder: Path) -> None:
    """Write a source's images and their listing into ``folder``, all or nothing."""
    cache, prefix = folder.parent, f".{folder.name}."
    cache.mkdir(parents=True, exist_ok=True)
    files.delete_abandoned(cache, prefix)
    found: dict[str, list[tuple[str, str]]] = {}  # part -> (file, class name)
    with TemporaryDirectory(files.TEMPORARY, prefix, cache, ignore_cleanup_errors=True) as place:
        images = _hugging_face(path) if is_hugging_face(path) else _webdataset(path)
        for number, (part, name, content) in enumerate(images):
            file = f"{part or 'all'}-{number // 1000:04d}/{number:07d}.img"
            Path(place, file).parent.mkdir(exist_ok=True)
            Path(place, file).write_bytes(content)
            found.setdefault(part, []).append((file, name))
        if not found:
            raise UserError(f"dataset {path} holds no images; check that it is complete")
        if "" in found and len(found) > 1:
            raise UserError(f"dataset {path}: either every shard is named for its part, or none")
        classes = items.label_order({name for pairs in found.values() for _, name in pairs})
        labels = {name: label for label, name in enumerate(classes)}
        parts = {p: [[f, labels[n]] for f, n in found[p]] for p in ("", *items.PARTS) if p in found}
        files.write_json(Path(place, _LISTING), {"class_names": classes, "parts": parts})
        if hasattr(os, "sync"):  # the images must be on disk before the name says so
            os.sync()
        with refusing(f"{folder} cannot be written", _ANEW):
            try:
                os.rename(place, folder)
            except OSError:
                if not (folder / _LISTING).is_file():  # not just another process that was faster
                    raise


def _named(label: Any, names: list[str] | None, where: str) -> str:
    """The class name of a label; a number without names is its own."""
    if not (type(label) is int or (isinstance(label, str) and label.strip())):
        raise UserError(f"{where}: label {label!r} is neither a number nor a class name; mend it")
    if type(label) is not int or names is None:
        return str(label).strip()
    if not 0 <= label < len(names):
        raise UserError(f"{where}: label {label} is none of 0 .. {len(names) - 1}; mend it")
    return names[label]


def _hugging_face(path: Path) -> Iterator[_Image]:
    with refusing(f"{path} is a Hugging Face dataset", _INSTALL, ImportError):
        import datasets
    # The library opens whatever the records name, and would wait for a FIFO without end.
    parted = (path / _DICTIONARY).is_file()
    for place in _listed(path / _DICTIONARY, "splits") if parted else [path]:
        for file in (place / _INFO, *_listed(place / "state.json", "_data_files")):
            what = f"dataset {path} cannot be loaded: {file} cannot be opened"
            with refusing(what, "save it anew"):
                files.open_regular(file).close()
    # Arrow's errors are a wide family.
    with refusing(f"dataset {path} cannot be loaded", "save it anew", Exception):
        loaded = datasets.load_from_disk(str(path))
        parted = isinstance(loaded, datasets.DatasetDict)
        for part, rows in loaded.items() if parted else [("", loaded)]:
            where, there = f"dataset {path}{f', {part}' if part else ''}", rows.column_names
            if parted and not plain_part(part):
                known = ", ".join(PART_WORDS)
                raise UserError(f"{where}: split '{part}' is none of {known}; rename")
            image, label = (first_of(known, there) for known in (IMAGE_COLUMNS, LABEL_COLUMNS))
            for what, column in (("images", image), ("labels", label)):
                if column is None:
                    raise UserError(f"{where} has no column of {what}; rename one of {there}")
            kind = rows.features[label]
            names = getattr(kind, "names", None)
            # Others would be decoded, with whatever program or address an image there asks for.
            if names is None and not _PLAIN.fullmatch(str(getattr(kind, "dtype", None))):
                what = f"column '{label}' is of type {type(kind).__name__}"
                raise UserError(f"{where}: {what}; make it a ClassLabel, whole numbers or text")
            rows = rows.select_columns([image, label])
            for number, row in enumerate(rows.cast_column(image, datasets.Image(decode=False))):
                line = f"{where}, row {number}"
                name = _named(row[label], names, line)
                yield plain_part(part), name, _content(row[image], line, path)


def _listed(file: Path, key: str) -> list[Path]:
    """What a dataset's record lists under a key; a `UserError` if it is not in its own folder."""
    record, where = files.read_json(file, "record of the dataset"), f"dataset {file.parent}"
    with refusing(f"{file} has no list of '{key}'", "save it anew", LookupError, TypeError):
        names = [entry["filename"] if isinstance(entry, dict) else entry for entry in record[key]]
    return [file.parent / check_path(n if isinstance(n, str) else "", where) for n in names]


def _content(value: Any, where: str, root: Path) -> bytes:
    """The bytes of an image in a row: those in it, or of the file that it names."""
    if content := (value or {}).get("bytes"):
        return bytes(content)
    if not (value or {}).get("path"):
        raise UserError(f"{where} has no image; take the row out")
    file = Path(value["path"])
    with refusing(f"{where}: its image {file} cannot be read", "save the dataset with its images"):
        # Whoever wrote the dataset must not choose which of this machine's files are read.
        if not file.resolve().is_relative_to(root.resolve()):
            raise OSError("it is not in the dataset's folder")
        with files.open_regular(file) as opened:
            if os.fstat(opened.fileno()).st_size > _LARGEST_IMAGE:
                raise OSError("it is too large")
            return opened.read()


def _shards(folder: Path) -> list[Path]:
    places = (folder, *(place for place in folder.glob("*/") if plain_part(place.name)))
    return sorted(p for place in places for p in place.glob("*.tar") if p.is_file())


def _webdataset(path: Path) -> Iterator[_Image]:
    with refusing(f"{path} is read as WebDataset shards", _INSTALL, ImportError):
        from webdataset.tariterators import group_by_keys
    folder, shards = (path, _shards(path)) if path.is_dir() else (path.parent, [path])
    names = None
    if (file := folder / _NAMES_FILE).is_file():
        names = [line.strip() for line in items.text_of(file).splitlines()]
    for shard in shards:
        # Of a single shard, the name says nothing.
        part = plain_part(re.split("[^a-zA-Z]", shard.relative_to(path).as_posix())[0])
        # The file is opened here: the library would take some names for commands or addresses.
        refuse = refusing(f"shard {shard} cannot be read", "copy it anew", Exception)
        with refuse, files.open_regular(shard) as stream:
            for sample in group_by_keys(_members(stream)):
                where = f"shard {shard}, sample {sample['__key__']}"
                if (suffix := first_of(_IMAGE_SUFFIXES, sample)) is None:
                    known = ", .".join(_IMAGE_SUFFIXES)
                    raise UserError(f"{where} has no image (.{known}); take it out")
                yield part, _named(_label(sample, where), names, where), sample[suffix]


def _members(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The files in a tar, as webdataset's own reader, which would unpack compressed ones too."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.issparse() or member.size > _LARGEST_IMAGE:
                raise ValueError(f"{member.name[:80]!r} has {member.size:,} bytes")
            content = archive.extractfile(member) if member.isreg() else None  # links lead nowhere
            if content is not None and not _META.match(member.name):
                yield {"fname": member.name, "data": content.read(), "__url__": ""}


def _label(sample: dict[str, Any], where: str) -> Any:
    """A sample's label: what its .cls says, or the entry of its .json."""
    hint = "it is a .cls of text, or a .json with 'label'"
    if "cls" not in sample and "json" not in sample:
        raise UserError(f"{where} has no label; {hint}")
    with refusing(f"{where}: its label cannot be read", hint, Exception):
        if "cls" in sample:
            text = sample["cls"].decode().strip()
            return int(text) if text.isascii() and text.isdigit() else text
        value = files.parse_json(sample["json"].decode())
        return value[first_of(LABEL_COLUMNS, value) or "label"]
