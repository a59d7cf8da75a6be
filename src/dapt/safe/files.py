"""Files read with mistrust, and written so that a crash leaves the old or the new one whole."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from dapt.errors import UserError, reason_of, shown

LARGEST_TEXT = 2**28  # listings, settings, records: none that anybody wrote comes near
LARGEST_YAML = 2**20  # written by hand, and read slowly
TEMPORARY = ".dapt-part"  # ends the names of what is not whole yet
_ABANDONED = 24 * 3600.0  # seconds after which nobody is at work on it


def open_regular(path: Path | str, limit: int | None = None) -> BinaryIO:
    """Open an ordinary file of at most ``limit`` bytes; else an `OSError`, without any waiting."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            folder = stat.S_ISDIR(found.st_mode)
            raise OSError("it is a folder" if folder else "it is no ordinary file")
        if limit is not None and found.st_size > limit:
            raise OSError(f"it has {found.st_size:,} bytes, and {limit:,} are read at most")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_text(path: Path, *, encoding: str = "utf-8", limit: int = LARGEST_TEXT) -> str:
    """An ordinary file's text, line breaks as they are; else `OSError` or `UnicodeDecodeError`."""
    with open_regular(path, limit) as file:
        return file.read(limit + 1).decode(encoding)


def file_size(path: Path | str) -> int | None:
    """Bytes of an ordinary file, None where there is none that can be seen."""
    with suppress(OSError, ValueError):
        if stat.S_ISREG((found := os.stat(path)).st_mode):
            return found.st_size
    return None


def file_digest(path: Path | str) -> bytes:
    """SHA-256 of an ordinary file's content; an `OSError` as of `open_regular`."""
    found = hashlib.sha256()
    with open_regular(path) as content:
        while block := content.read(2**20):
            found.update(block)
    return found.digest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` beside ``path``, flush it to disk, and put it in place in one move.

    A file that is replaced keeps its permissions; what a link leads to gives none. What an earlier
    write of ``path`` left beside it when it was killed is deleted.
    """
    prefix = f".{path.name}."
    delete_abandoned(path.parent, prefix)
    temporary = path.parent / f"{prefix}{secrets.token_hex(4)}{TEMPORARY}"
    try:
        with temporary.open("xb") as file:
            with suppress(FileNotFoundError):
                if stat.S_ISREG(mode := path.lstat().st_mode):
                    temporary.chmod(mode & 0o777)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Let the move survive a loss of power, as far as the system can: the file is safe either way.
    with suppress(OSError):
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def delete_abandoned(folder: Path, prefix: str, seconds: float = _ABANDONED) -> None:
    """Delete what killed processes left of writing; what is young may be another's at work."""
    # Of a folder that may be written to but not listed, nothing is found.
    for place in folder.glob(f"{glob.escape(prefix)}*{TEMPORARY}"):
        with suppress(OSError):
            if time.time() - place.stat().st_mtime >= seconds:
                (shutil.rmtree if place.is_dir() else os.unlink)(place)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; a number that JSON lacks is a `UserError`."""
    try:
        content = to_json(value, indent=1)
    except ValueError as error:
        raise UserError(f"{path} is not written: a figure in it is no number ({error})") from error
    write_atomic(path, content + b"\n")


def to_json(value: Any, *, indent: int | None = None) -> bytes:
    """``value`` as JSON in UTF-8; a `ValueError` if a number in it is NaN or infinite."""
    # File names that are no UTF-8 hold lone surrogates in Python; JSON has an escape for those.
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def read_json(path: Path, what: str, form: str = "JSON") -> Any:
    """The value of a JSON file, as `parse_json`; a `UserError` says ``what`` it is for."""
    parse, limit = (parse_json, LARGEST_TEXT) if form == "JSON" else (parse_yaml, LARGEST_YAML)
    try:
        return parse(read_text(path, limit=limit))
    except FileNotFoundError as error:
        raise UserError(f"{what} {path} does not exist; check the path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not readable {form} ({error})") from error


def read_yaml(path: Path, what: str) -> Any:
    """The value of a YAML file, as `parse_yaml`; a `UserError` says ``what`` it is for."""
    return read_json(path, what, "YAML")


def parse_json(text: str) -> Any:
    """The value of JSON of distinct keys, finite numbers; else `ValueError` or `RecursionError`."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        found[key] = value
    return found


def _finite(digits: str) -> float:
    if not isfinite(number := float(digits)):
        raise ValueError(f"{digits[:80]} is no finite number")
    return number


class _Loader(yaml.SafeLoader):
    """YAML without aliases, whose values could be exponentially many, and with distinct keys."""

    def fetch_alias(self) -> None:
        raise ValueError("it has an alias (*name); write out what it stands for")

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep=deep)
        if len(found) < len(node.value):
            raise ValueError("a mapping has a key twice")
        return found

    def construct_yaml_str(self, node: Any) -> str:
        # JSON writes what lies beyond the first plane as two escapes.
        text = super().construct_yaml_str(node)
        return text.encode("utf-16", "surrogatepass").decode("utf-16")

    def construct_yaml_int(self, node: Any) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**64:
            raise ValueError("it has a whole number of more than 64 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)


def parse_yaml(text: str) -> Any:
    """The value of YAML of distinct keys, without aliases; else a `ValueError` of few words."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except Exception as error:  # constructors of PyYAML fail in many ways
        raise ValueError(reason_of(error)) from error


def user_path(text: str | Path) -> Path:
    """A user's path, which need not exist, ``~`` being their home; a `UserError` if it cannot."""
    try:
        path = Path(text).expanduser()
        os.stat(path)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{shown(str(text))} is no path ({error}); give another") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{shown(str(text))} is too long for a path; give another") from error
    return path


def require_there(path: Path, what: str, hint: str = "check the path") -> Path:
    """``path``, if there is anything; else a `UserError` that names what is called alike there."""
    if not path.exists():
        raise UserError(f"{what} {path} does not exist{nearest_path(path)}; {hint}")
    return path


def nearest_path(path: Path) -> str:
    """``" (did you mean 'photos/cat'?)"``: the existing path most like one that is none, or ``""``.

    Only where the path first leads nowhere, another name is looked for.
    """
    parts = path.absolute().parts
    depth = next(n for n in range(len(parts), 0, -1) if os.path.lexists(Path(*parts[:n])))
    parent, there = path, dict[str, str]()
    for _ in parts[depth:]:
        parent = parent.parent
    with suppress(OSError):
        there = {name.casefold(): name for name in os.listdir(parent) if name[0] != "."}
    wrong, *rest = parts[depth:] or ("",)
    if not (match := get_close_matches(wrong.casefold(), there, n=1, cutoff=0.6)):
        return ""
    found = parent / there[match[0]]
    whole = found.joinpath(*rest)
    return f" (did you mean '{whole if whole.exists() else found}'?)"
