"""Views of pictures: the square that is looked at in evaluation, and random crops to tune on."""

from __future__ import annotations

import math
import random

from PIL import Image

from dapt.errors import UserError

CROP_MIN = 0.08  # least share of an image's area in a training crop (Szegedy et al., 2015)
_RESIZING = {
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
    "resize mode": ("shortest", "squash"),
}


def check_resizing(*ways: str) -> None:
    """Refuse ways of resizing that are not known: an interpolation, and a resize mode."""
    for way, (what, known) in zip(ways, _RESIZING.items(), strict=True):
        if way not in known:
            raise UserError(f"{what} '{way}' is none of {', '.join(known)}; use another backbone")


def centre_view(
    image: Image.Image, size: int, *, interpolation: str = "bicubic", resize_mode: str = "shortest"
) -> Image.Image:
    """The square of ``size`` px that is looked at in evaluation.

    ``shortest`` is torchvision's ``Resize`` and ``CenterCrop`` of a PIL image, to the bit;
    ``squash`` resizes both sides. Other ways are a `UserError`.
    """
    check_resizing(interpolation, resize_mode)
    resample = Image.Resampling[interpolation.upper()]
    if resize_mode == "squash":
        return image.resize((size, size), resample)
    short = min(image.size)
    # Longer strips are cut to their middle before the short side is resized, or one of a few bytes
    # would become gigabytes. What is cut lies far outside the centre crop.
    if max(image.size) > (keep := 16 * short):
        width, height = (min(side, keep) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), resample).crop((left, top, left + size, top + size))


def train_view(
    image: Image.Image,
    size: int,
    generator: random.Random,
    *,
    interpolation: str = "bicubic",
    crop_min: float = CROP_MIN,
) -> Image.Image:
    """A random crop resized to ``size`` px, mirrored half the time.

    As torchvision's ``RandomResizedCrop`` and ``RandomHorizontalFlip`` are distributed. Only
    ``generator.random()`` is called: the one method whose values Python promises to keep.
    """
    box = crop_box(*image.size, generator, crop_min)
    view = image.crop(box).resize((size, size), Image.Resampling[interpolation.upper()])
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else view


def crop_box(
    width: int, height: int, generator: random.Random, crop_min: float = CROP_MIN
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random crop of a width x height px image.

    Area is uniform in ``crop_min`` .. 1, aspect log-uniform in 3/4 .. 4/3; after ten that do not
    fit, it is the largest centred one of an allowed aspect.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area = width * height * (crop_min + (1 - crop_min) * generator.random())
        aspect = math.exp(low + (high - low) * generator.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.random() * (height - h + 1))
            left = int(generator.random() * (width - w + 1))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * (4 / 3))))
    h = min(height, max(1, round(width / (3 / 4))))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
