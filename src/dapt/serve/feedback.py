"""Corrected photos that visitors send, kept in class folders, ready for the next training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dapt.errors import UserError
from dapt.safe.files import user_path, write_atomic

MOST = 10_000  # photos in the folder, whatever their size
# How files of the formats that are decoded begin, from a byte on, and how names of such end.
_KINDS = (
    (0, b"\xff\xd8", ".jpg"),
    (0, b"\x89PNG", ".png"),
    (0, b"GIF8", ".gif"),
    (0, b"BM", ".bmp"),
    (8, b"WEBP", ".webp"),
    (4, b"ftypavi", ".avif"),
    (4, b"ftyp", ".heic"),
)


@dataclass(frozen=True)
class Feedback:
    """A folder below which each class has one, and how much may lie there.

    A photo's name is the digest of its bytes, so that it lies there once; of two corrections of
    one photo, the last counts. Nothing that a visitor sends decides where anything is written.
    """

    folder: Path
    room: int  # bytes of all photos

    def keep(self, photos: Sequence[bytes], name: str) -> bool:
        """Write photos into the folder of the class ``name``, all or, for want of room, none.

        They have been decoded, and the class is one that `open_feedback` saw.
        """
        with FileLock(self.folder / ".lock"):  # other workers keep photos, too
            there = [file for file in self.folder.glob("*/*") if file.is_file()]
            used = sum(file.stat().st_size for file in there)
            if used + sum(map(len, photos)) > self.room or len(there) + len(photos) > MOST:
                return False
            (self.folder / name).mkdir(exist_ok=True)
            for content in photos:
                digest = hashlib.sha256(content).hexdigest()[:32]
                for before in there:
                    if before.stem == digest and before.parent.name != name:
                        before.unlink(missing_ok=True)
                write_atomic(self.folder / name / f"{digest}{_ending(content)}", content)
        return True


def _ending(content: bytes) -> str:
    found = (end for at, start, end in _KINDS if content[at : at + len(start)] == start)
    return next(found, ".img")


def open_feedback(folder: Path, room: int, class_names: Sequence[str]) -> Feedback:
    """A folder to keep photos in, made if need be.

    A `UserError` where it cannot be, or a class's name is none that a folder can have.
    """
    folder = user_path(folder)
    odd = (n for n in class_names if n.startswith(".") or "/" in n or "\\" in n or len(n) > 200)
    if (name := next(odd, None)) is not None:
        raise UserError(f"--feedback needs a folder a class, and none can be called '{name}'")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--feedback {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return Feedback(folder, room)
