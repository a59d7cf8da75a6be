"""What a reader leaves out, by reason: nothing is dropped without a word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dapt.data.pictures import missing_extras
from dapt.progress import counted

# reason: what they are, where, and the way out
REASONS = {
    "no image's name": (
        "file", "without an image's name in the class folders of {where}",
        "convert them, or give them the extension that they should have",
    ),
    "service folder": (
        "image", "below {where} in folders that a system keeps for itself",
        "move them if they are photos",
    ),
    "hidden": ("hidden image", "below {where}", "rename them if they are photos"),
    "in no class folder": (
        "image", "of {where} in no class folder", "move them into one if they belong there"
    ),
    "beside the parts": (
        "image", "of {where} in folders beside its parts",
        "move them into a part if they belong there",
    ),
    "link to a folder": (
        "link", "to folders in the class folders of {where}", "put what they lead to there instead"
    ),
    "folder not readable": (
        "folder", "below {where} that cannot be read", "check their permissions"
    ),
    "no label": ("image", "of {where} without a label", "label them if they are to be used"),
}  # fmt: skip


@dataclass
class LeftOut:
    """Paths that are left out, by one of `REASONS`."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, paths: Iterable[str]) -> None:
        """More of a reason."""
        if paths := list(paths):
            self.found.setdefault(reason, []).extend(paths)

    def update(self, other: LeftOut) -> None:
        """Take over what another has found."""
        for reason, paths in other.found.items():
            self.add(reason, paths)

    def facts(self, where: str, notes: Iterable[str] = ()) -> dict[str, Any]:
        """Of the task read from ``where``: counts by reason, and sentences after the ``notes``."""
        found = {reason: self.found[reason] for reason in REASONS if reason in self.found}
        told = list(notes)
        for reason, paths in found.items():
            kind, place, hint = REASONS[reason]
            if reason == "no image's name":
                hint = "; or ".join(filter(None, (missing_extras(paths), hint)))
            what = f"{counted(len(paths), kind)} {place.format(where=where)}"
            told.append(f"left out: {what} (such as {min(paths)}); {hint}")
        counts = tuple((reason, len(paths)) for reason, paths in found.items())
        return {"notes": tuple(told), "left_out": counts}
