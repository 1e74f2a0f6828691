"""What the judge reads of pixels, and the strengths in which it answers: no torch.

Tones are quantiles of three planes, with a few means.
"""

# H W pixels, T tones

import functools

import numpy as np
from numpy.typing import NDArray

STRENGTHS = np.arange(-22, 23) / 10  # of the film curve, 0 among them exactly
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
PERCENTILES = np.array(
    [0.1, 0.5, 1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50,
     55, 60, 65, 70, 75, 80, 85, 90, 95, 98, 99, 99.5, 99.9]
)  # fmt: skip
NUM_TONES = 3 * len(PERCENTILES) + 8


def tones(rgb_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Tones of a photo, T in [0, 1].  rgb: sRGB, H and W from 3 up.

    In order: quantiles at PERCENTILES of luma, of the largest and of the smallest channel; mean
    luma; mean saturation; shares of pixels with a blown channel, with all channels blown, and
    crushed; mean luma of the photo's centre (soft), of its upper and of its lower third.
    """
    luma_HW = rgb_HW3 @ LUMA
    red, green, blue = np.moveaxis(rgb_HW3, 2, 0)
    largest_HW = np.maximum(np.maximum(red, green), blue)
    smallest_HW = np.minimum(np.minimum(red, green), blue)
    counts = [
        np.bincount(plane.ravel(), minlength=256)
        for plane in (luma_HW.astype(np.uint8), largest_HW, smallest_HW)
    ]
    _, largest, smallest = (x / luma_HW.size for x in counts)
    y = np.linspace(-1, 1, len(luma_HW), dtype=np.float32)
    scalars = [
        luma_HW.mean(dtype=np.float64) / 255,
        (largest - smallest) @ np.arange(256) / 255,
        largest[254:].sum(),
        smallest[254:].sum(),
        largest[:2].sum(),
        np.average(luma_HW, weights=_centre(*luma_HW.shape)) / 255,
        luma_HW[y < -1 / 3].mean(dtype=np.float64) / 255,
        luma_HW[y > 1 / 3].mean(dtype=np.float64) / 255,
    ]
    return np.concatenate([*map(_quantiles, counts), scalars]).astype(np.float32)


def _quantiles(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    shares = np.cumsum(counts) / counts.sum()
    return np.interp(PERCENTILES / 100, shares, np.arange(256)) / 255


@functools.lru_cache(maxsize=64)
def _centre(height: int, width: int) -> NDArray[np.float32]:
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    return np.exp(-2 * (x**2 + y**2))
