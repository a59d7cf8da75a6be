"""Says which packages are missing before anything needs one, then asks what it can."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

_PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def missing_packages() -> list[str]:
    """Packages that pyproject.toml lists and this Python has not."""
    # Python 3.10 reads no TOML by itself.
    listed = re.search(r"^dependencies = \[(.*?)^\]", _PROJECT.read_text(), re.S | re.M)
    names = re.findall(r'"([\w-]+)', listed[1]) if listed else []
    return [name for name in names if not _there(name)]


def _there(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def main() -> int:
    """Exit code of all checks; 2 where none can be asked."""
    missing = missing_packages()
    for name in missing:
        print(f"missing: {name}")
    if "torch" in missing:
        return 2
    from benchmarks.gpu import command

    return command.main()


if __name__ == "__main__":
    raise SystemExit(main())
