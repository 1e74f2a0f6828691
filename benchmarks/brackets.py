"""Pairs out of real brackets that no recipe sees, and intervals over scenes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from recipes.clip_lite0.photos import well_exposedness
from recipes.judge.photos import HOLD_OUT, scene_folders

Photo = NDArray[np.uint8]
RESAMPLED = 10_000  # bootstrap


def draw_brackets(root: Path, seed: int) -> Iterator[tuple[str, str, Photo, Photo]]:
    """Scene, side, photo, reference: a darker and a brighter frame of each held-out scene."""
    random = np.random.default_rng(seed)
    for index, folder in enumerate(scene_folders(root)):
        if index % HOLD_OUT != HOLD_OUT - 1:
            continue
        frames = [cv2.imread(str(path))[..., ::-1] for path in sorted(folder.iterdir())]
        frames = sorted((np.ascontiguousarray(frame) for frame in frames), key=np.mean)
        best = int(np.argmax([well_exposedness(frame) for frame in frames]))
        for side, others in (("under", frames[:best]), ("over", frames[best + 1 :])):
            if others:
                yield folder.name, side, others[random.integers(len(others))], frames[best]


def bootstrap(gains: NDArray[np.float64], scenes: Sequence[str]) -> tuple[float, float]:
    """95 % interval of the mean gain, scenes drawn with replacement."""
    names, index = np.unique(scenes, return_inverse=True)
    sums, counts = np.bincount(index, gains), np.bincount(index)
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLED, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
