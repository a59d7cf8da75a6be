"""DICOM, in which clinics keep pictures, where pydicom is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file begins as DICOM does; it is at its beginning afterwards."""
    file.seek(128)
    found = file.read(4) == b"DICM"
    file.seek(0)
    return found


def first_frame(file: BinaryIO, check: Callable[[tuple[int, int]], None]) -> Image.Image:
    """The first frame, in modality units (Hounsfield's of a CT), or RGB.

    A larger value is always brighter. ``check`` is told width and height before pixels are read,
    and may refuse. A `ModuleNotFoundError` where pydicom is missing; else it fails as pydicom does.
    """
    import pydicom
    from pydicom.pixels import apply_rescale, pixel_array

    about = pydicom.dcmread(file, stop_before_pixels=True)
    if "Rows" not in about or "Columns" not in about:
        raise ValueError("it holds no picture")
    check((int(about.Columns), int(about.Rows)))
    file.seek(0)
    values = pixel_array(file, index=0)
    if values.ndim == 3:
        bits = int(about.BitsStored)
        return Image.fromarray((values >> max(0, bits - 8)).astype(np.uint8))
    if about.PhotometricInterpretation == "MONOCHROME1":  # where larger is darker
        signed = int(about.PixelRepresentation) == 1
        values = (-1 if signed else 2 ** int(about.BitsStored) - 1) - values.astype(np.int32)
        values = values.astype(np.uint8) if about.BitsStored <= 8 and not signed else values
    values = apply_rescale(values, about)
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    # Whole numbers stay such: their scale goes by bits.
    whole = values.dtype.kind != "f" or bool((values == np.rint(values)).all())
    return Image.fromarray(values.astype(np.int32 if whole else np.float32))
