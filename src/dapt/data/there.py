"""What datasets are called, and whether one is there: told without torch, so within a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dapt.data.spellings import TABLES
from dapt.errors import UserError, nearest
from dapt.safe import files

BUNDLED = "bundled"
TABLE: dict[str, Any] = files.read_yaml(
    Path(__file__).with_name("benchmarks.yaml"), "table of benchmarks"
)


def require_dataset(dataset: str) -> None:
    """Raise `UserError` unless ``dataset`` is known by name, or a file or folder is there."""
    path, known = files.user_path(dataset), (BUNDLED, *TABLE)
    if dataset in known or path.exists():
        return
    if path.suffix.lower() in TABLES or len(path.parts) > 1:
        files.require_there(path, "dataset")
    hint = f"give a folder, a .csv or .jsonl file, or one of {', '.join(known)}"
    near = nearest(dataset, known) or files.nearest_path(path)
    raise UserError(f"unknown dataset '{dataset}'{near}: it is no folder or file here; {hint}")
