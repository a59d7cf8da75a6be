"""Colours as a picture's profile means them, in sRGB, which is what models were shown."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# Levels of 255 that a profile may move a colour for its picture to be sRGB as it stands: the many
# profiles of sRGB differ by as much.
_SAME = 2
_LARGEST = 2**22  # bytes
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # and the mode that has their values


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What takes colours to sRGB; None where there is nothing to do, or nothing that can be done.

    A profile of calculations ("mpet") is not followed: they may take any time.
    """
    if len(profile) > _LARGEST or b"mpet" in profile:
        return None
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(own.profile.xcolor_space.strip()) != mode:
            return None
        srgb = ImageCms.createProfile("sRGB")
        found = ImageCms.buildTransform(own, srgb, mode, "RGB")
        seen, plain = found.apply(_swatches(mode)), _swatches(mode).convert("RGB")
    except Exception:  # a damaged profile must not cost the picture
        return None
    moved = np.asarray(seen).astype(int) - np.asarray(plain)
    return found if mode == "CMYK" or np.abs(moved).max() > _SAME else None


def _swatches(mode: str) -> Image.Image:
    """Colours from all over a mode's cube."""
    steps = np.arange(0, 256, 51 if mode == "CMYK" else 15 if mode == "RGB" else 1, dtype=np.uint8)
    grid = np.stack(np.meshgrid(*[steps] * len(Image.new(mode, (1, 1)).getbands())), -1)
    bands = [
        Image.fromarray(np.ascontiguousarray(b.reshape(1, -1))) for b in np.moveaxis(grid, -1, 0)
    ]
    return Image.merge(mode, bands)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image of mode L, RGB or CMYK as RGB in sRGB; without a profile of it, as PIL converts."""
    if profile and (transform := _transform(profile, image.mode)) is not None:
        return transform.apply(image)
    return image.convert("RGB")  # a copy, whatever the mode
