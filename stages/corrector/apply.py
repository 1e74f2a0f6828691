"""Apply a correction at full size: predicted at the working size, carried up strip by strip.

Strength and residual are carried by the lines a * luma + b of a guided filter fitted at the working
size (stages/pixels.py), so that they follow the photo's own edges.  Fills are smooth: which pixels
they fill is told by the photo's values at full size.  Grain is taken out there, before shadows are
lifted (grain.py).  The cost per pixel is constant and memory is bounded by the photo itself.
"""

# H W full-size pixels, h w working-size pixels

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np

from evenlight.stages.arrays import Array, from_numpy, like, namespace, to_numpy
from evenlight.stages.corrector import grain
from evenlight.stages.corrector.correction import Correction, filled, ground
from evenlight.stages.pixels import coefficients, enlarged, luma, resize
from evenlight.stages.priors import tone

STRIP_PIXELS = 2**18  # whose maps fit the cache
WIDEST = 4.0  # range of strengths that a table serves
GUIDE_RADIUS = 4  # working-size pixels
GUIDE_EPS = 1e-3
LIFTED = 0.5  # strength of the photo from which on all grain is taken out, below in proportion
Curve = Callable[[Array, Array], Array]  # of values and strengths


@dataclass(frozen=True, kw_only=True)
class Maps:
    """A predicted correction at the working size, float32.

    photo: 1,3,h,w in [0, 1].  given: 1,1,h,w, the judge's strengths.  a, b: 1,6,h,w or larger,
    lines over luma; channels 0-2 give the strength per RGB channel, 3-5 the residual.  fill:
    1,4,h,w; cover, then the shift per RGB channel.
    """

    photo: Array
    given: Array
    a: Array
    b: Array
    fill: Array
    family: str

    def scaled(self, share: float) -> "Maps":
        """So much of the correction: 0 changes nothing."""
        given, a, b, fill = (share * x for x in (self.given, self.a, self.b, self.fill))
        return replace(self, given=given, a=a, b=b, fill=fill)

    def ground(self) -> Array:
        """`correction.ground` of the photo as its strengths tone it, 1,1,h,w."""
        a, b = (resize(x[:, :3], *self.photo.shape[2:]) for x in (self.a, self.b))
        toned = tone.apply(self.family, self.photo, a * luma(self.photo) + b)
        return ground(toned, self.given, self.family)


def fit_maps(
    photo_13hw: Array, correction: Correction, family: str, given: tuple[Array, Array] | None = None
) -> Maps:
    """What is carried up of the correction of one photo at the working size.

    given: lines of what is given, 1,1,H,W each and of no smaller size; None: they are flat.
    """
    xp = namespace(photo_13hw)
    apart = correction.strength_B3HW - correction.given_B1HW
    guided = xp.concat([apart, correction.residual_B3HW], 1)
    lines = coefficients(luma(photo_13hw), guided, radius=GUIDE_RADIUS, eps=GUIDE_EPS)
    given = given or (0 * correction.given_B1HW, correction.given_B1HW)
    size = given[0].shape[2:]
    a, b = (
        xp.concat([x[:, :3] + of_given, x[:, 3:]], 1)
        for x, of_given in zip((enlarged(x, *size) for x in lines), given, strict=True)
    )
    fill = xp.concat([correction.cover_B1HW, correction.shift_B3HW], 1)
    return Maps(photo=photo_13hw, given=correction.given_B1HW, a=a, b=b, fill=fill, family=family)


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
    maps, xp = maps.scaled(strength), namespace(maps.a)
    step = max(1, STRIP_PIXELS // (columns.stop - columns.start))
    share = min(1.0, float(maps.given.mean()) / LIFTED)
    deviation = grain.grain_of(pixels_HW3) if share > 0 else 0.0
    fill = xp.concat([maps.fill, maps.ground()], 1) if maps.fill.any() else None
    curve = _curve(maps, by_table=pixels_HW3.dtype == np.uint8 and not deviation)
    out = np.empty_like(pixels_HW3[rows, columns])
    for top in range(rows.start, rows.stop, step):
        place = slice(top, min(top + step, rows.stop)), columns
        rgb = _calm(pixels_HW3, place, deviation, share, xp)
        corrected = _corrected(rgb, place, (height, width), maps, fill, curve)
        scaled = xp.clip(xp.moveaxis(corrected[0], 0, 2), 0, 1) * np.iinfo(out.dtype).max
        out[top - rows.start :][: len(scaled)] = to_numpy(xp.round(scaled)).astype(out.dtype)
    return out


def _curve(maps: Maps, *, by_table: bool) -> Curve:
    """The tone operator, or its table for all strengths that the maps give."""
    xp = namespace(maps.a)
    strengths = xp.stack([maps.b[:, :3], (maps.a + maps.b)[:, :3]])  # of black, of white
    low, high = float(strengths.min()), float(strengths.max())
    if by_table and high - low <= WIDEST:
        return tone.Table(maps.family, low, high, xp).apply
    return partial(tone.apply, maps.family)


def _calm(
    pixels: np.ndarray, place: tuple[slice, slice], deviation: float, share: float, xp: Any
) -> Array:
    """The photo at that place, 1,3,h,w in [0, 1] of xp, without grain of that deviation."""
    reach = grain.REACH if deviation else 0
    top, left = (max(0, side.start - reach) for side in place)
    rows, columns = place
    around = pixels[top : rows.stop + reach, left : columns.stop + reach]
    values = np.moveaxis(around, 2, 0).astype(np.float32, order="C") / np.iinfo(pixels.dtype).max
    if deviation:
        values = grain.smoothed(values, deviation, share)
    values = values[:, rows.start - top :, columns.start - left :]
    values = values[:, : rows.stop - rows.start, : columns.stop - columns.start]
    return from_numpy(values[None], xp)


def _corrected(
    rgb: Array,
    place: tuple[slice, slice],
    size: tuple[int, int],
    maps: Maps,
    fill: Array | None,
    curve: Curve,
) -> Array:
    """size: of the whole photo, pixels.  fill: that of the maps, with `ground` behind it."""
    (height, width), (strip, columns) = size, place
    a, b = (_strip_of(x, strip, height, width)[..., columns] for x in (maps.a, maps.b))
    lines = a * luma(rgb) + b
    strength, residual = lines[:, :3], lines[:, 3:]
    toned = curve(rgb, strength)
    if fill is None:
        return toned + residual
    fill = _strip_of(fill, strip, height, width)[..., columns]
    correction = Correction(maps.given, strength, fill[:, :1], fill[:, 1:4], residual)
    return filled(rgb, toned, fill[:, 4:], correction)


def _strip_of(low_1Chw: Array, strip: slice, height: int, width: int) -> Array:
    """Rows `strip` of a map bilinearly enlarged to height x width, without the other rows."""
    xp, source_rows = namespace(low_1Chw), low_1Chw.shape[2]
    position = xp.arange(strip.start, strip.stop, dtype=xp.float32) + 0.5
    position = xp.clip(position * (source_rows / height) - 0.5, 0, source_rows - 1)
    upper = np.floor(to_numpy(position)).astype(int)
    lower = np.minimum(upper + 1, source_rows - 1)
    share = (position - like(upper, position)).reshape(1, 1, -1, 1)
    rows = to_numpy(low_1Chw[:, :, upper] * (1 - share) + low_1Chw[:, :, lower] * share)
    wide = np.empty((*rows.shape[:3], width), np.float32)
    for row, into in zip(rows[0], wide[0], strict=True):  # a plane each: half of torch's time
        cv2.resize(row, into.shape[::-1], dst=into, interpolation=cv2.INTER_LINEAR)
    return from_numpy(wide, xp)
