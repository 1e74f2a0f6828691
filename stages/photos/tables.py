"""Colour profiles of tables, as scanners, printers and some editors write them: brought to sRGB for
the work, and back, by libvips' colour engine.

Relative colorimetric, black to black.  Tables do not say what primaries are, so colours wider than
sRGB's are cut off on the way.  ICC.1:2022, 10.10 to 10.13.
"""

import struct
from dataclasses import dataclass

import numpy as np
import pyvips

from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.colour import icc_tags

_HOW = {"intent": "relative", "black_point_compensation": True}


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """An RGB profile with a table that leads to colours, and perhaps one that leads back."""

    icc: bytes
    lead_back: bool

    def to_srgb(self, samples: np.ndarray) -> np.ndarray:
        """HxWx3 uint8 or uint16 -> uint16, sRGB-encoded."""
        colours = self._tagged(_image(samples)).icc_import(embedded=True, **_HOW)
        return _pixels(colours.icc_export(output_profile="srgb", depth=16, **_HOW))

    def from_srgb(self, pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """HxWx3 uint16, sRGB-encoded -> uint8 or uint16 as stored."""
        colours = _image(pixels).icc_import(input_profile="srgb", **_HOW)
        return _pixels(self._tagged(colours).icc_export(depth=8 * dtype.itemsize, **_HOW))

    def _tagged(self, image: pyvips.Image) -> pyvips.Image:
        """The image as one of this profile."""
        image = image.copy()
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", self.icc)
        return image


def tables_of_profile(icc: bytes) -> Tables | None:
    """The tables of an ICC profile for RGB that has no curves, else None.

    Raises PhotoError, whose sentence is fit for a note, where the tables are damaged.
    """
    try:
        tags = icc_tags(icc) if icc[16:20] == b"RGB " else {}
    except struct.error:  # cut short: it has no curves either, which is told elsewhere
        return None
    if b"rTRC" in tags or b"A2B0" not in tags:
        return None
    tables = Tables(icc=icc, lead_back=b"B2A0" in tags)
    try:
        gray = tables.to_srgb(np.full((1, 1, 3), 128, np.uint8))
        if tables.lead_back:
            tables.from_srgb(gray, np.dtype(np.uint8))
    except pyvips.Error as error:
        raise PhotoError("its colour profile is damaged: it was taken to be like sRGB") from error
    return tables


def _image(samples: np.ndarray) -> pyvips.Image:
    kind = "srgb" if samples.dtype == np.uint8 else "rgb16"
    return pyvips.Image.new_from_array(samples, interpretation=kind)


def _pixels(image: pyvips.Image) -> np.ndarray:
    return np.ascontiguousarray(image.numpy())
