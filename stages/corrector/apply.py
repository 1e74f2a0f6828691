"""Apply a correction at full size: predicted at the working size, carried up strip by strip.

Strength and residual are carried by the lines a * luma + b of a guided filter fitted at the working
size (stages/pixels.py), so that they follow the photo's own edges.  Fills are smooth: which pixels
they fill is told by the photo's values at full size.  Grain is taken out there, before shadows are
lifted (grain.py).  The cost per pixel is constant and memory is bounded by the photo itself.
"""

# H W full-size pixels, h w working-size pixels

from dataclasses import dataclass
from typing import Any

import numpy as np

from evenlight.stages.arrays import Array, from_numpy, like, namespace, to_numpy
from evenlight.stages.corrector import grain
from evenlight.stages.corrector.correction import Correction, correct
from evenlight.stages.pixels import coefficients, enlarged, luma

STRIP_PIXELS = 2**20
NUMPY_STRIP = 2**18  # its maps, one after the other, take .6 of the time of the larger ones
GUIDE_RADIUS = 4  # working-size pixels
GUIDE_EPS = 1e-3
LIFTED = 0.5  # strength of the photo from which on all grain is taken out, below in proportion


@dataclass(frozen=True, kw_only=True)
class Maps:
    """A predicted correction at the working size, float32.

    whole: strength of the photo, 1.  a, b: 1,6,h,w, lines over luma; channels 0-2 give the strength
    per RGB channel, 3-5 the residual.  fill: 1,4,h,w; cover, then the shift per RGB channel.
    """

    whole: Array
    a: Array
    b: Array
    fill: Array
    family: str


def fit_maps(photo_13hw: Array, correction: Correction, family: str) -> Maps:
    """What is carried up of the correction of one photo at the working size."""
    xp = namespace(photo_13hw)
    guided = xp.concat([correction.strength_B3HW, correction.residual_B3HW], 1)
    a, b = coefficients(luma(photo_13hw), guided, radius=GUIDE_RADIUS, eps=GUIDE_EPS)
    fill = xp.concat([correction.cover_B1HW, correction.shift_B3HW], 1)
    return Maps(whole=correction.whole_B, a=a, b=b, fill=fill, family=family)


def apply_maps(
    pixels_HW3: np.ndarray,
    maps: Maps,
    strength: float = 1.0,
    window: tuple[slice, slice] | None = None,
) -> np.ndarray:
    """The corrected photo, same shape and dtype (uint8 or uint16, RGB, sRGB-encoded).

    strength: 0 leaves every value as it is, 1 applies the whole correction.  window: rows and
    columns that are wanted, within the photo, each with a start and a stop; None: all.
    """
    height, width = pixels_HW3.shape[:2]
    rows, columns = window or (slice(0, height), slice(0, width))
    xp = namespace(maps.a)
    step = max(1, (NUMPY_STRIP if xp is np else STRIP_PIXELS) // (columns.stop - columns.start))
    share = min(1.0, strength * maps.whole.item() / LIFTED)
    deviation = grain.grain_of(pixels_HW3) if share > 0 else 0.0
    out = np.empty_like(pixels_HW3[rows, columns])
    for top in range(rows.start, rows.stop, step):
        place = slice(top, min(top + step, rows.stop)), columns
        rgb = _calm(pixels_HW3, place, deviation, share, xp)
        corrected = _corrected(rgb, place, (height, width), maps, strength)
        scaled = xp.clip(xp.moveaxis(corrected[0], 0, 2), 0, 1) * np.iinfo(out.dtype).max
        out[top - rows.start :][: len(scaled)] = to_numpy(xp.round(scaled)).astype(out.dtype)
    return out


def _calm(
    pixels: np.ndarray, place: tuple[slice, slice], deviation: float, share: float, xp: Any
) -> Array:
    """The photo at that place, 1,3,h,w in [0, 1] of xp, without grain of that deviation."""
    reach = grain.REACH if deviation else 0
    top, left = (max(0, side.start - reach) for side in place)
    rows, columns = place
    around = pixels[top : rows.stop + reach, left : columns.stop + reach]
    values = around.astype(np.float32) / np.iinfo(pixels.dtype).max
    if deviation:
        values = grain.smoothed(values, deviation, share)
    values = values[rows.start - top :, columns.start - left :]
    values = values[: rows.stop - rows.start, : columns.stop - columns.start]
    return xp.moveaxis(from_numpy(values, xp), 2, 0)[None]


def _corrected(
    rgb: Array, place: tuple[slice, slice], size: tuple[int, int], maps: Maps, strength: float
) -> Array:
    """size: of the whole photo, pixels."""
    (height, width), (strip, columns) = size, place
    a, b, fill = (
        _strip_of(x, strip, height, width)[..., columns] for x in (maps.a, maps.b, maps.fill)
    )
    lines = a * luma(rgb) + b
    correction = Correction(maps.whole, lines[:, :3], fill[:, :1], fill[:, 1:], lines[:, 3:])
    return correct(rgb, correction.scaled(strength), maps.family)


def _strip_of(low_1Chw: Array, strip: slice, height: int, width: int) -> Array:
    """Rows `strip` of a map bilinearly enlarged to height x width, without the other rows."""
    xp, source_rows = namespace(low_1Chw), low_1Chw.shape[2]
    position = xp.arange(strip.start, strip.stop, dtype=xp.float32) + 0.5
    position = xp.clip(position * (source_rows / height) - 0.5, 0, source_rows - 1)
    upper = np.floor(to_numpy(position)).astype(int)
    lower = np.minimum(upper + 1, source_rows - 1)
    share = (position - like(upper, position)).reshape(1, 1, -1, 1)
    rows = low_1Chw[:, :, upper] * (1 - share) + low_1Chw[:, :, lower] * share
    return enlarged(rows, rows.shape[2], width)
