"""Tone operators: one signed strength t re-exposes a photo.

t > 0 brightens, t < 0 darkens, t = 0 is the identity; monotone in the pixel value and in t (`ev`
in t only to 4e-4, a tenth of an 8-bit level, where its shoulder sets in at white). Formulas:
docs/method.md 1, computed in float32 (or float64 when given it), also under autocast.
"""

# B batch, C channels, H W pixels

from collections.abc import Callable
from typing import Any

import numpy as np

from evenlight.stages.arrays import (
    Array,
    float32,
    from_numpy,
    full_precision,
    like,
    namespace,
    to_numpy,
    without_gradients,
)
from evenlight.stages.pixels import LUMA_WEIGHTS

FILM_B = 1.6
EV_PER_STRENGTH = 1.6  # of the family `ev`
END = 1e-4  # each curve is a chord over the last END of either side, where slopes run to infinity
CLIPPED_WHITE = 1 / 510  # half an 8-bit step: how far below white a clipped value may lie
MAX_RULE_STRENGTH = 3.0
TABLE_STEP = 1e-3  # of strength between two rows of a table: moves no value by .1 of an 8-bit level
LEVELS = 4096  # of the rule's histogram: strengths come out within .001 of those of all pixels
RULE_TARGET = 119 / 255  # mean luma the rule aims at; best of a sweep on real brackets


def apply(family: str, x: Array, t: Array | float) -> Array:
    """Re-expose pixel values.

    x: any shape, float, sRGB-encoded in [0, 1]; t: a number or an array that broadcasts with x.
    Returns float32 (float64 for float64 x) in [0, 1]. Gradients to x and t are finite everywhere;
    values outside [0, 1] follow the end chords.
    """
    xp = namespace(x)
    x = x if x.dtype == xp.float64 else float32(x)
    t = like(t, x)
    with full_precision(x):
        curve = CURVES[family]
        if family == "ev":  # finite slopes at both ends, and its shoulder does not reach 1
            return curve(x, t)
        if family == "film":  # infinitely steep at white
            x = x * _white_point(t)
        y = curve(xp.clip(x, END, 1 - END), t)
        y = y * xp.clip(x / END, None, 1)
        return 1 - (1 - y) * xp.clip((1 - x) / END, None, 1)


def at_levels(family: str, pixels: np.ndarray, t: float, xp: Any = None) -> np.ndarray:
    """`apply` on uint8 pixels of any shape, by a table of their 256 levels.  float32 in [0, 1].

    xp: where the table is made: numpy, or torch (None).
    """
    levels = from_numpy(np.arange(256, dtype=np.float32), xp) / 255
    return to_numpy(apply(family, levels, t))[pixels]


def on_bytes(family: str, pixels: np.ndarray, t: float, xp: Any = None) -> np.ndarray:
    """Pixels re-exposed by one strength, uint8 in and out.  xp: as in `at_levels`."""
    table = at_levels(family, np.arange(256), t, xp)
    return np.rint(table * 255).astype(np.uint8)[pixels]


class Table:
    """`apply` on levels of 8 bits, strengths rounded to TABLE_STEP: in a fourth of the time.

    low, high: the strengths that it serves.  xp: whose arrays it reads: numpy's, or torch's (None).
    """

    def __init__(self, family: str, low: float, high: float, xp: Any = None) -> None:
        self.low = low
        strengths = low + TABLE_STEP * np.arange(2 + (high - low) // TABLE_STEP, dtype=np.float32)
        levels = from_numpy(np.arange(256, dtype=np.float32), xp) / 255
        self.values = apply(family, levels, from_numpy(strengths[:, None], xp)).reshape(-1)

    def apply(self, x: Array, t: Array) -> Array:
        """x: float32, k / 255 of whole k; t: float32 that broadcasts with x.  float32 in [0, 1]."""
        xp = namespace(x)
        row = xp.round((t - self.low) / TABLE_STEP)
        return xp.take(self.values, xp.asarray(256 * row + 255 * x + 0.5, dtype=xp.int64))


def rule_strength(
    x_B3HW: Array,
    family: str,
    target: float | Array = RULE_TARGET,
    weight_B1HW: Array | None = None,
) -> Array:
    """Strength per photo at which the mean luma of the re-exposed photo equals `target`.

    x_B3HW: float RGB in [0, 1]; a small copy (about 64 pixels) serves.  target: mean luma in
    [0, 1], one for all or B.  weight: of each pixel in the mean; default: all count the same.
    Bisection on [-3, 3], to .001; where the target is out of reach the nearer end is returned, and
    0 for a photo that no strength changes (all black, all white).  Returns float32 B.
    """
    xp = namespace(x_B3HW)
    with without_gradients(x_B3HW):
        weight = xp.ones_like(x_B3HW[:, :1]) if weight_B1HW is None else weight_B1HW
        weight = weight / xp.clip(weight.sum((1, 2, 3), keepdims=True), 1e-6, None)
        shares_BL = _shares(float32(x_B3HW), weight)
        levels_L = xp.linspace(0, 1, LEVELS, dtype=xp.float32, device=x_B3HW.device)
        low = xp.full_like(shares_BL[:, 0], -MAX_RULE_STRENGTH)
        high = -low

        def mean_luma(t_B: Array) -> Array:
            return (apply(family, levels_L, t_B[:, None]) * shares_BL).sum(1)

        unmoved = abs(mean_luma(high) - mean_luma(low)) < 1e-4
        for _ in range(22):  # 6 / 2**22: under 2e-6
            middle = (low + high) / 2
            dark = mean_luma(middle) < target
            low, high = xp.where(dark, middle, low), xp.where(dark, high, middle)
        return xp.where(unmoved, xp.zeros_like(low), (low + high) / 2)


def _shares(x_B3HW: Array, weight_B1HW: Array) -> Array:
    """What share of the mean luma each of LEVELS levels stands for, values between two divided
    among them: a curve is then run on the levels, not on the pixels.  B,L."""
    xp, count = namespace(x_B3HW), len(x_B3HW)
    weights_B3HW = weight_B1HW * like(LUMA_WEIGHTS, x_B3HW).reshape(1, 3, 1, 1)
    at = xp.clip(x_B3HW, 0, 1) * (LEVELS - 1)
    low = xp.clip(xp.floor(at), None, LEVELS - 2)
    above = at - low
    below_BN, above_BN = ((weights_B3HW * share).reshape(count, -1) for share in (1 - above, above))
    if isinstance(x_B3HW, np.ndarray):
        index = low.astype(np.intp).reshape(count, -1)
        rows = zip(index, below_BN, above_BN, strict=True)
        counts = [np.bincount(i, b, LEVELS) + np.bincount(i + 1, a, LEVELS) for i, b, a in rows]
        return np.stack(counts).astype(np.float32)
    index = low.long().flatten(1)
    shares = x_B3HW.new_zeros(count, LEVELS).scatter_add_(1, index, below_BN)
    return shares.scatter_add_(1, index + 1, above_BN)


def _white_point(t: Array) -> Array:
    """What clipped white counts as: 1 when brightening, falling to 1 - 1/510 when darkening.

    Without it 255 stays 255 while 254 falls to 212 at t = -1: coloured rims around highlights.
    Measured on 30 real brackets: the film mean-luma rule gains 1.3 dB on over-exposed photos.
    """
    xp = namespace(t)
    return 1 + CLIPPED_WHITE * xp.expm1(10 * xp.clip(t, None, 0))


def _film(x: Array, t: Array) -> Array:
    """(1 - (1 - x^(1/b))^g)^b, g = exp(t): exponential saturation with the exposure scaled by g."""
    xp = namespace(x)
    unexposed = -xp.expm1(xp.log(x) / FILM_B)  # 1 - x^(1/b), exact near x = 1
    exposed = -xp.expm1(xp.exp(t) * xp.log(unexposed))
    return xp.exp(FILM_B * xp.log(exposed))


def _gamma(x: Array, t: Array) -> Array:
    """x^exp(-t)."""
    xp = namespace(x)
    return xp.exp(xp.exp(-t) * xp.log(x))


def _ev(x: Array, t: Array) -> Array:
    """Exposure shift of 1.6 t stops in linear light, with a soft shoulder when brightening."""
    xp = namespace(x)
    exposure_ev = EV_PER_STRENGTH * t
    linear = xp.exp2(exposure_ev) * srgb_to_linear(x)
    knee = 1 - 0.2 * xp.clip(exposure_ev, 0, 1)
    room = xp.clip(1 - knee, 1e-6, None)  # 0 at t <= 0, where nothing is above the knee
    over = xp.clip(linear - knee, 0, None)
    return linear_to_srgb(xp.minimum(linear, knee) - room * xp.expm1(-over / room))


def srgb_to_linear(x: Array) -> Array:
    """IEC 61966-2-1 decoding of values in [0, 1]."""
    xp = namespace(x)
    power = ((xp.clip(x, 0.04045, None) + 0.055) / 1.055) ** 2.4
    return xp.where(x <= 0.04045, x / 12.92, power)


def linear_to_srgb(x: Array) -> Array:
    """IEC 61966-2-1 encoding of values in [0, 1]."""
    xp = namespace(x)
    power = 1.055 * xp.clip(x, 0.0031308, None) ** (1 / 2.4) - 0.055
    return xp.where(x <= 0.0031308, x * 12.92, power)


CURVES: dict[str, Callable[[Array, Array], Array]] = {
    "film": _film,
    "ev": _ev,
    "gamma": _gamma,
}
