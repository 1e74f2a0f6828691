"""What the judge reads of pixels, and the strengths in which it answers: no torch.

Tones are quantiles of three planes, with a few means.
"""

# H W pixels, T tones, R regions

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STRENGTHS = np.arange(-22, 23) / 10  # of the film curve, 0 among them exactly
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
PERCENTILES = np.array(
    [0.1, 0.5, 1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50,
     55, 60, 65, 70, 75, 80, 85, 90, 95, 98, 99, 99.5, 99.9]
)  # fmt: skip
NUM_TONES = 3 * len(PERCENTILES) + 8


def tones(
    rgb_HW3: NDArray[np.uint8], visible_HW: NDArray[np.bool_] | None = None
) -> NDArray[np.float32]:
    """Tones of a photo, T in [0, 1].  rgb: sRGB, H and W from 3 up.

    visible: pixels that count, one at least; None: all.
    """
    shown = np.ones(rgb_HW3.shape[:2], bool) if visible_HW is None else visible_HW
    return region_tones(rgb_HW3, shown.astype(np.uint8), [1])[0]


def region_tones(
    rgb_HW3: NDArray[np.uint8], labels_HW: NDArray[np.uint8], regions: Sequence[int]
) -> NDArray[np.float32]:
    """Tones of regions of a photo, R,T in [0, 1].

    regions: labels of them, each of one pixel at least.  In order: quantiles at PERCENTILES of
    luma, of the largest and of the smallest channel; mean luma; mean saturation; shares of pixels
    with a blown channel, with all channels blown, and crushed; mean luma of the photo's centre
    (soft), of its upper and of its lower third, 0 where the region has no pixel there.
    """
    luma_HW = rgb_HW3 @ LUMA
    red, green, blue = np.moveaxis(rgb_HW3, 2, 0)
    largest_HW = np.maximum(np.maximum(red, green), blue)
    smallest_HW = np.minimum(np.minimum(red, green), blue)
    labels = labels_HW.astype(np.intp)  # as bincount counts: converted once
    start_HW, count = labels * 256, int(labels.max()) + 1
    counts = [
        np.bincount((start_HW + plane).ravel(), minlength=count * 256).reshape(count, 256)[regions]
        for plane in (luma_HW.astype(np.uint8), largest_HW, smallest_HW)
    ]
    _, largest, smallest = (x / x.sum(1, keepdims=True) for x in counts)
    levels = np.arange(256)
    scalars = [
        _means(luma_HW, labels, None, regions) / 255,
        (largest - smallest) @ levels / 255,
        largest[:, 254:].sum(1),
        smallest[:, 254:].sum(1),
        largest[:, :2].sum(1),
    ]
    y = np.linspace(-1, 1, len(labels), dtype=np.float32)
    for rows, weights in ((..., _centre(*labels.shape)), (y < -1 / 3, None), (y > 1 / 3, None)):
        scalars.append(_means(luma_HW[rows], labels[rows], weights, regions) / 255)
    quantiles = [np.stack([_quantiles(row) for row in plane]) for plane in counts]
    return np.concatenate([*quantiles, np.stack(scalars, 1)], 1).astype(np.float32)


def _quantiles(counts: NDArray[np.integer]) -> NDArray[np.float64]:
    shares = np.cumsum(counts) / counts.sum()
    return np.interp(PERCENTILES / 100, shares, np.arange(256)) / 255


@functools.lru_cache(maxsize=64)
def _centre(height: int, width: int) -> NDArray[np.float32]:
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None]
    return np.exp(-2 * (x**2 + y**2))


def _means(
    values: NDArray[np.float32],
    labels: NDArray[np.intp],
    weights: NDArray[np.float32] | None,
    regions: Sequence[int],
) -> NDArray[np.float64]:
    """Weighted means of values over regions, 0 where a region has no weight."""
    flat = labels.ravel()
    weighed = values if weights is None else values * weights
    least = max(regions) + 1
    totals = np.bincount(flat, None if weights is None else weights.ravel(), least)[regions]
    sums = np.bincount(flat, weighed.ravel(), least)[regions]
    return np.divide(sums, totals, out=np.zeros(len(totals)), where=totals > 0)
