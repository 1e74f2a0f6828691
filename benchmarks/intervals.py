"""Intervals over scenes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Photo = NDArray[np.uint8]
RESAMPLED = 10_000  # bootstrap


def bootstrap(gains: NDArray[np.float64], scenes: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the mean gain, scenes drawn with replacement."""
    names, index = np.unique(scenes, return_inverse=True)
    sums, counts = np.bincount(index, gains), np.bincount(index)
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLED, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
