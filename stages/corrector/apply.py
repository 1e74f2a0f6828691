"""A correction predicted at the working size, applied to a photo of any size.

The predicted maps are carried to full size by the lines a * luma + b of a guided filter fitted
at the working size (stages/pixels.py), row strip by row strip: the cost per pixel is constant
and memory is bounded by the photo itself.
"""

# C channels, H W full-size pixels, h w working-size pixels

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.pixels import coefficients, luma
from evenlight.stages.priors import tone

STRIP_PIXELS = 2**20
GUIDE_RADIUS = 4  # working-size pixels
GUIDE_EPS = 1e-3
NEARLY_BLOWN = 0.9  # of white: above it, maps lose their colour


@dataclass(frozen=True, kw_only=True)
class Maps:
    """A predicted correction at the working size, as lines over luma.

    a, b: float32 1,6,h,w; channels 0-2 give the strength t per RGB channel, 3-5 the residual.
    """

    a: Tensor
    b: Tensor
    family: str


def fit_maps(photo_13hw: Tensor, strength: Tensor, residual: Tensor, family: str) -> Maps:
    """Lines over luma for maps predicted at the working size (each 1,3,h,w)."""
    maps = torch.cat([strength, residual], 1)
    a, b = coefficients(luma(photo_13hw), maps, radius=GUIDE_RADIUS, eps=GUIDE_EPS)
    return Maps(a=a, b=b, family=family)


def apply_maps(pixels_HW3: np.ndarray, maps: Maps, strength: float = 1.0) -> np.ndarray:
    """The corrected photo, same shape and dtype (uint8 or uint16, RGB, sRGB-encoded).

    strength: 0 leaves every value as it is, 1 applies the whole correction.
    """
    height, width = pixels_HW3.shape[:2]
    out = np.empty_like(pixels_HW3)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = slice(top, min(top + rows, height))
        out[strip] = _corrected_strip(pixels_HW3[strip], strip, height, maps, strength)
    return out


def _corrected_strip(
    pixels: np.ndarray, strip: slice, height: int, maps: Maps, strength: float
) -> np.ndarray:
    top_value = np.iinfo(pixels.dtype).max
    values = torch.from_numpy(pixels.astype(np.float32)) / top_value
    rgb = values.permute(2, 0, 1)[None]
    a, b = (_strip_of(x, strip, height, pixels.shape[1]) for x in (maps.a, maps.b))
    full = _neutral_where_blown(rgb, (a * luma(rgb) + b) * strength)
    corrected = tone.apply(maps.family, rgb, full[:, :3]) + full[:, 3:]
    scaled = (corrected[0].permute(1, 2, 0).clamp(0, 1) * top_value).round()
    return scaled.numpy().astype(pixels.dtype)


def _neutral_where_blown(rgb_13HW: Tensor, maps_16HW: Tensor) -> Tensor:
    """The maps, their channels made one where the photo is blown: white holds no colour to correct,
    and lamps and skies would take on that of what surrounds them."""
    blown_11HW = ((rgb_13HW.amin(1, keepdim=True) - NEARLY_BLOWN) / (1 - NEARLY_BLOWN)).clamp(min=0)
    parts = [part.lerp(part.mean(1, keepdim=True), blown_11HW) for part in maps_16HW.split(3, 1)]
    return torch.cat(parts, 1)


def _strip_of(low_1Chw: Tensor, strip: slice, height: int, width: int) -> Tensor:
    """Rows `strip` of a map bilinearly enlarged to height x width, without the other rows."""
    source_rows = low_1Chw.shape[2]
    position = (torch.arange(strip.start, strip.stop) + 0.5) * (source_rows / height) - 0.5
    position = position.clamp(0, source_rows - 1)
    upper = position.floor().long()
    lower = (upper + 1).clamp(max=source_rows - 1)
    share = (position - upper).view(1, 1, -1, 1)
    rows = low_1Chw[:, :, upper] * (1 - share) + low_1Chw[:, :, lower] * share
    return F.interpolate(rows, (rows.shape[2], width), mode="bilinear", align_corners=False)
