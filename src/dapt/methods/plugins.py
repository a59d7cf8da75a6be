"""Methods of one's own: rows that a file of the user's adds, or an installed package.

A file is executed only where its user names it (``--plugin``, a suite's ``plugins``), in this
process and in those that work for it. A run tells which plugin its method is of, and nothing that
is read from a run, or from anybody else's file, makes one be loaded.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from dapt.errors import UserError, reason_of, refusing
from dapt.safe.files import read_text, user_path

# Entry points of packages whose import adds rows.
GROUP = "dapt.methods"


@dataclass(frozen=True)
class Plugin:
    """Where rows of the table come from, if not from here."""

    name: str  # of the file, without its folder; or of the entry point's package
    sha256: str | None = None  # of the file
    file: Path | None = None


_ROWS: dict[str, Plugin] = {}  # by names of methods
_FILES: dict[Path, Plugin] = {}


def files() -> tuple[str, ...]:
    """Those that were loaded, for processes that are to know the same methods."""
    return tuple(map(str, _FILES))


def plugin_of(method: str) -> Plugin | None:
    """The plugin that a method is of, or either row of one that is put together."""
    return next((_ROWS[n] for n in (method, *method.partition("+")[::2]) if n in _ROWS), None)


def load(given: Iterable[Path | str], table: dict[str, Any]) -> None:
    """Execute files, each once, that add rows to the table of methods.

    Raises:
        UserError: a file cannot be read or executed, adds nothing, or changes another's row.
    """
    for file in (user_path(one).resolve() for one in given):
        if file in _FILES:
            continue
        with refusing(f"plugin {file} cannot be read", "give a Python file that adds a method"):
            source = read_text(file)
        plugin = Plugin(file.name, sha256(source.encode()).hexdigest(), file)
        before, name = dict(table), f"dapt_plugin_{len(_FILES)}_{file.stem}"
        module = sys.modules[name] = ModuleType(name)  # classes look there for their names
        module.__file__ = str(file)
        try:
            exec(compile(source, str(file), "exec"), vars(module))
            _adopt(plugin, before, table)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            table.clear()
            table.update(before)
            raise UserError(f"plugin {file} cannot be used: {_why(error, file)}") from error
        _FILES[file] = plugin


def load_installed(table: dict[str, Any]) -> None:
    """Import what installed packages name as entry points; one that fails is told of and left."""
    for point in entry_points(group=GROUP):
        before = dict(table)
        try:
            point.load()
            _adopt(Plugin(point.dist.name if point.dist else point.module), before, table)
        except Exception as error:
            table.clear()
            table.update(before)
            what = f"dapt: methods of the installed package '{point.value}' are left out"
            warnings.warn(f"{what}: {_why(error, None)}", stacklevel=2)


def _adopt(plugin: Plugin, before: dict[str, Any], table: dict[str, Any]) -> None:
    if changed := next((n for n in before if table.get(n) is not before[n]), None):
        raise UserError(f"it changes method '{changed}', which was there; give its own a new name")
    if not (added := table.keys() - before.keys()):
        way = 'METHODS["name"] = Method(...), as docs/how-to/plugins.md shows'
        raise UserError(f"it adds no method; write {way}")
    _ROWS.update(dict.fromkeys(added, plugin))


def _why(error: BaseException, file: Path | None) -> str:
    """What is wrong, and at which of the file's lines, where Python tells."""
    if isinstance(error, UserError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if file and frame.filename == str(file)]
    if isinstance(error, SyntaxError):
        lines, said = [error.lineno], error.msg
    else:
        said = reason_of(error) if isinstance(error, Exception) else "it ends the program"
    at = f"line {lines[-1]}: " if lines else ""
    return f"{at}{type(error).__name__}: {said}"
