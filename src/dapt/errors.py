"""The one exception a user is meant to read, and text from elsewhere made fit for its sentence."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec

# What pip calls this package: its index has another one by the name of dapt.
DISTRIBUTION = "dapt-clip"

# Nobody reads on; names from files may be of any length.
_LONGEST = 4000
# Controls, lone surrogates, line and paragraph separators, and what turns the line around.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """``text`` on one line that a terminal shows as it stands: what would not be is escaped."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _UNPRINTABLE else c
        for c in text
    )


def readable(name: str) -> str:
    """A class's or dataset's name as people, and text prompts, read it: spaces, no underscores."""
    return name.replace("_", " ")


# What makes a spreadsheet take a cell for a formula: signs, wide ones, and what some skip.
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def spreadsheet_cell(text: str) -> str:
    """``text`` as a spreadsheet shows it: one that it would take for a formula after a quote."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def spreadsheet_path(path: str) -> str:
    """A relative path in the same way, and still the path of that file."""
    return f"./{path}" if path.startswith(_FORMULA) else path


class UserError(Exception):
    """Bad input, explained in one sentence that names what is wrong and the way out.

    The command line prints the sentence and exits with code 2; in Python it is an
    ordinary exception. Line breaks and control characters in names of files and folders are
    escaped, so that the sentence is one line and cannot control a terminal.
    """

    def __init__(self, sentence: str) -> None:
        said = printable(sentence)
        if len(said) > _LONGEST:
            said = f"{said[: _LONGEST // 2]}…{said[-_LONGEST // 2 :]}"
        super().__init__(said)


class PictureWarning(UserWarning):
    """A picture is seen in a way that is a guess, or not all of it is."""


class InputError(UserError, ValueError):
    """Bad input from Python; a ValueError too, as scikit-learn wants it."""


def reason_of(error: Exception) -> str:
    """What another library says of its error, on one line and cut short, for a sentence of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def shown(value: object) -> str:
    """A value as it is written in Python, cut short, for a sentence that refuses it."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, say
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}…"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known word closest to ``word``, or ``""``."""
    match = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean '{match[0]}'?)" if match else ""


@contextmanager
def refusing(what: str, hint: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn such errors, or those of reading a file, into the sentence "what (reason); hint"."""
    try:
        yield
    except Exception as error:
        sought = isinstance(error, errors or (OSError, ValueError))
        if not sought or isinstance(error, UserError | MemoryError):
            raise
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise UserError(f"{what} ({reason}); {hint}") from error


# Packages that libraries ask for, by their modules, and what pip is to be told.
_EXTRAS = {"sentencepiece": f"{DISTRIBUTION}[siglip]", "transformers": f"{DISTRIBUTION}[siglip]",
           "tiktoken": "tiktoken", "google": "protobuf"}  # fmt: skip


def install(extra: str) -> str:
    """The line that installs an extra of this package, such as "onnx"."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


@contextmanager
def lacking(what: str) -> Iterator[None]:
    """Turn an error for want of a package into a sentence with the line that installs it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or (name := _absent_package(error)) is None:
            raise
        way = f"pip install '{_EXTRAS.get(name, name)}'"
        raise UserError(
            f"{what} needs the package {name}, which is not installed: {way}"
        ) from error


def _absent_package(error: Exception) -> str | None:
    """The module for want of which a library gave up; None if there was another reason."""
    # Some say it with an `ImportError` and the module's name, others only in their sentence.
    said = str(error).replace("`", " ")
    advised = said.partition("pip install ")[2].split()[:1]
    named = [str(error.name).partition(".")[0]] if isinstance(error, ImportError) else []
    told = [*named, *advised, *(name for name in _EXTRAS if name in said.lower())]
    modules = (word.strip(".,;:'\"()").replace("-", "_") for word in told)
    return next(
        (m for m in modules if m.isidentifier() and m != "None" and not _installed(m)), None
    )


def _installed(module: str) -> bool:
    return find_spec(module) is not None
