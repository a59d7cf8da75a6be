"""Support sets: the few labelled images a run is tuned on, drawn exactly as published."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapt.data.items import Item, Task, check_path
from dapt.errors import UserError
from dapt.files import read_json, write_json

VAL_SHOTS = 4


@dataclass(frozen=True)
class SupportSet:
    """Images drawn from a task's train and val parts.

    Attributes:
        dataset: name of the task; ``shots`` images a class; ``seed`` of the draw.
        train: tuned on; ``val``: for choosing settings, at most four a class.
    """

    dataset: str
    shots: int
    seed: int
    train: tuple[Item, ...]
    val: tuple[Item, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `save` writes them."""
        head = {"dataset": self.dataset, "shots": self.shots, "seed": self.seed}
        return {
            **head,
            **{
                part: [
                    {"path": i.path, "label": i.label, "class_name": i.class_name} for i in items
                ]
                for part, items in (("train", self.train), ("val", self.val))
            },
        }

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, self.to_json())


def draw_support_set(task: Task, shots: int, seed: int) -> SupportSet:
    """Draw ``shots`` images a class by the published protocol.

    ``random.Random(seed)`` walks the classes in order of first appearance in the train list and
    samples ``shots`` items of each (all, where a class has fewer); then the same generator draws
    min(shots, 4) a class from val.
    """
    generator = random.Random(seed)
    train = _draw(task.train, shots, generator)
    val = _draw(task.val, min(shots, VAL_SHOTS), generator)
    return SupportSet(task.name, shots, seed, train, val)


def _draw(items: Iterable[Item], shots: int, generator: random.Random) -> tuple[Item, ...]:
    by_label: dict[int, list[Item]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    drawn: list[Item] = []
    for members in by_label.values():
        drawn += generator.sample(members, shots) if len(members) >= shots else members
    return tuple(drawn)


def load_support_set(path: Path, task: Task) -> SupportSet:
    """Read a saved support set for ``task``.

    Raises:
        UserError: the file is malformed, or names classes that the task does not have.
    """
    value = read_json(path, "support set")
    if not isinstance(value, dict):
        raise UserError(f"support set {path} must be an object with train and val lists")
    parts = {}
    for part in ("train", "val"):
        rows = value.get(part)
        if not isinstance(rows, list):
            raise UserError(f"support set {path} must map '{part}' to a list")
        parts[part] = tuple(
            _item(row, f"support set {path}, {part}[{i}]", task) for i, row in enumerate(rows)
        )
    shots, seed = value.get("shots", 0), value.get("seed", 0)
    if type(shots) is not int or type(seed) is not int:
        raise UserError(f"support set {path}: shots and seed must be whole numbers")
    if not parts["train"]:
        raise UserError(f"support set {path} holds no train images")
    return SupportSet(task.name, shots, seed, **parts)


def _item(row: Any, where: str, task: Task) -> Item:
    if not isinstance(row, dict):
        raise UserError(f"{where} must be an object with path, label and class_name")
    label, name = row.get("label"), row.get("class_name")
    if type(label) is not int or not 0 <= label < len(task.class_names):
        raise UserError(
            f"{where}: label {label!r} must be 0 to {len(task.class_names) - 1}, as '{task.name}' "
            "has no others"
        )
    if name != task.class_names[label]:
        raise UserError(
            f"{where}: label {label} is '{task.class_names[label]}' in '{task.name}', not {name!r}"
        )
    path = row.get("path")
    if not isinstance(path, str):
        raise UserError(f"{where}: path must be text, not {path!r:.80}")
    return Item(check_path(path, where), label, str(name))
