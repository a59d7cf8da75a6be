"""Tasks (bundled, benchmarks, folders, tables), support sets, and images."""

from dapt.data.benchmarks import BENCHMARKS, Benchmark
from dapt.data.folders import images_below
from dapt.data.images import (
    Allowance,
    BadImage,
    ImageStore,
    TooManyPixels,
    centre_view,
    decode_image,
    has_image_name,
    open_image,
    upright_rgb,
)
from dapt.data.items import Item, Task, subset_classes
from dapt.data.splits import read_split
from dapt.data.support import (
    SupportSet,
    draw_support_set,
    images_in_both,
    load_support_set,
    support_digest,
)
from dapt.data.tasks import bundled_domains, open_task

__all__ = [
    "BENCHMARKS",
    "Allowance",
    "BadImage",
    "Benchmark",
    "ImageStore",
    "Item",
    "SupportSet",
    "Task",
    "TooManyPixels",
    "bundled_domains",
    "centre_view",
    "decode_image",
    "draw_support_set",
    "has_image_name",
    "images_below",
    "images_in_both",
    "load_support_set",
    "open_image",
    "open_task",
    "read_split",
    "subset_classes",
    "support_digest",
    "upright_rgb",
]
