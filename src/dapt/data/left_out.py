"""What a reader leaves out, by reason: nothing is dropped without a word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from dapt.data.pictures import missing_extras

# reason: what is told of so many, and the way out
REASONS = {
    "no image's name": (
        "files in the class folders of {where} have no image's name and are left out",
        "convert them, or give them the extension that they should have",
    ),
    "service folder": (
        "images below {where} are in folders that a system keeps for itself and are left out",
        "move them if they are photos",
    ),
    "hidden": (
        "images below {where} are hidden and are left out",
        "rename them if they are photos",
    ),
    "in no class folder": (
        "images of {where} lie in no class folder and are left out",
        "move them into one if they belong there",
    ),
    "beside the parts": (
        "images of {where} lie in folders beside its parts and are left out",
        "move them into a part if they belong there",
    ),
    "link to a folder": (
        "links to folders in the class folders of {where} are not followed",
        "put what they lead to there instead",
    ),
    "folder not readable": (
        "folders below {where} cannot be read and are left out",
        "check their permissions",
    ),
    "no label": (
        "images of {where} have no label and are left out",
        "label them if they are to be used",
    ),
}


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
            what, hint = REASONS[reason]
            if reason == "no image's name":
                hint = "; or ".join(filter(None, (missing_extras(paths), hint)))
            told.append(f"{len(paths):,} {what.format(where=where)} (such as {min(paths)}); {hint}")
        counts = tuple((reason, len(paths)) for reason, paths in found.items())
        return {"notes": tuple(told), "left_out": counts}
