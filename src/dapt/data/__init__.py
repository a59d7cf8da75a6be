"""Tasks (bundled, benchmarks, folders, tables, packed), support sets, and images."""
# ruff: noqa: F401

from dapt.data.benchmarks import BENCHMARKS, read_split
from dapt.data.images import (
    BadImage,
    TooManyPixels,
    centre_view,
    decode_image,
    has_image_name,
    open_image,
)
from dapt.data.items import Item, Task, subset_classes
from dapt.data.store import Allowance, ImageStore
from dapt.data.support import (
    SupportSet,
    draw_support_set,
    images_in_both,
    load_support_set,
    support_digest,
)
from dapt.data.tasks import bundled_domains, images_below, open_task
