"""Tasks (bundled, benchmarks, folders, tables, packed), support sets, and images."""
# ruff: noqa: F401

from dapt.data.images import (
    Allowance,
    BadImage,
    ImageStore,
    TooManyPixels,
    centre_view,
    decode_image,
    has_image_name,
    open_image,
)
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
from dapt.data.tasks import BENCHMARKS, bundled_domains, images_below, open_task, read_split
