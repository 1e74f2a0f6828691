"""Grain in shadows, which lifting them would show: measured in the photo, and taken out of it.

It is measured by a difference of two Laplacians, which lines and soft texture do not answer to
(Immerkaer, "Fast Noise Variance Estimation", 1996), where the photo is quietest.  Guided filters of
luma and of colour by themselves take it out, eps a multiple of the variance of the grain: what
varies less is averaged, edges stay (He, Sun, Tang, "Guided Image Filtering", 2013).
"""

# H W pixels

import cv2
import numpy as np

from evenlight.stages.pixels import LUMA_WEIGHTS

DARK = (2 / 255, 0.15)  # luma of the pixels that grain is measured in; below lies clipped black
QUIET = 0.25  # quantile of the local deviations that is grain alone, without detail
LAPLACIANS = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6  # answers to grain as it is
WINDOW = 3  # radius within which grain is measured, pixels
FEWEST = 0.005  # share of dark pixels from which there is grain to speak of
BANDS = 16  # of rows, in which it is measured
BAND_PIXELS = 2**16  # of each
RADIUS = 2  # pixels
REACH = 2 * RADIUS  # how far away a pixel may lie that smoothing looks at
SMOOTHED = (5.0, 10.0)  # of the grain's deviation: what counts as grain in luma, in colour
FADES_AT = 0.4  # luma of the photo from which on nothing is smoothed


def grain_of(pixels_HW3: np.ndarray) -> float:
    """Standard deviation of the luma of grain in a photo's shadows, of the range 0 to 1.

    pixels: uint8 or uint16.  0 where it has no shadows.
    """
    height, width = pixels_HW3.shape[:2]
    rows = max(2 * WINDOW + 1, BAND_PIXELS // width)
    tops = np.linspace(0, max(0, height - rows), min(BANDS, -(-height // rows))).astype(int)
    found, total = [], 0
    for top in tops:
        level = _luma(pixels_HW3[top : top + rows].astype(np.float32))
        level /= np.iinfo(pixels_HW3.dtype).max
        mean = _mean(level, WINDOW)
        answer = cv2.filter2D(level, -1, LAPLACIANS)
        deviation = np.sqrt(_mean(answer * answer, WINDOW).clip(0))
        found.append(deviation[(mean > DARK[0]) & (mean < DARK[1])])
        total += level.size
    deviations = np.concatenate(found)
    return float(np.quantile(deviations, QUIET)) if len(deviations) >= FEWEST * total else 0.0


def smoothed(rgb_3HW: np.ndarray, grain: float, share: float) -> np.ndarray:
    """The photo without the grain of its shadows, float32 of the same shape, range 0 to 1.

    grain: as `grain_of` tells.  share: how much of it to take out, 0 to 1.
    """
    level = np.tensordot(np.array(LUMA_WEIGHTS, np.float32), rgb_3HW, 1)
    dark = share * (1 - level / FADES_AT).clip(0, 1)
    if not dark.any():
        return rgb_3HW
    in_luma, in_colour = (times * grain for times in SMOOTHED)
    calm = _calmed(level, in_luma)
    return np.stack([x + dark * (calm + _calmed(x - level, in_colour) - x) for x in rgb_3HW])


def _calmed(x: np.ndarray, deviation: float) -> np.ndarray:
    """A plane, guided by itself: what varies by less than `deviation` is averaged."""
    mean = _mean(x, RADIUS)
    variance = (_mean(x * x, RADIUS) - mean * mean).clip(0)
    a = variance / (variance + deviation * deviation)
    return _mean(a, RADIUS) * x + _mean(mean - a * mean, RADIUS)


def _luma(rgb_HW3: np.ndarray) -> np.ndarray:
    return rgb_HW3 @ np.array(LUMA_WEIGHTS, np.float32)


def _mean(x: np.ndarray, radius: int) -> np.ndarray:
    """Over a square window, borders mirrored."""
    return cv2.blur(x, (2 * radius + 1, 2 * radius + 1))
