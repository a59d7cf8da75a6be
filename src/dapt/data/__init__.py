"""Tasks (bundled, benchmarks, folders, tables, packed), support sets, and images.

What is named here is imported when asked for: who only decodes pictures needs no torch.
"""

# ruff: noqa: F401

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dapt.data.folders import images_below
    from dapt.data.images import Allowance, ImageStore, sampled_grey, spread
    from dapt.data.items import (
        Item,
        SupportSet,
        Task,
        content_digest,
        draw_support_set,
        images_in_both,
        load_support_set,
        subset_classes,
        support_digest,
    )
    from dapt.data.pictures import (
        BadImage,
        TooManyPixels,
        decode_image,
        has_image_name,
        open_image,
    )
    from dapt.data.tasks import BENCHMARKS, bundled_domains, open_task, read_split, usual_template
    from dapt.data.views import centre_view

_NAMES = {
    "folders": ("images_below",),
    "images": ("Allowance", "ImageStore", "sampled_grey", "spread"),
    "items": ("Item", "SupportSet", "Task", "content_digest", "draw_support_set", "images_in_both",
              "load_support_set", "subset_classes", "support_digest"),
    "pictures": ("BadImage", "TooManyPixels", "decode_image", "has_image_name", "open_image"),
    "tasks": ("BENCHMARKS", "bundled_domains", "open_task", "read_split",
              "usual_template"),
    "views": ("centre_view",),
}  # fmt: skip
_ROOMS = {name: room for room, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """What another module here has under this name."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'dapt.data' has no attribute '{name}'")
    found = globals()[name] = getattr(import_module(f"dapt.data.{_ROOMS[name]}"), name)
    return found
