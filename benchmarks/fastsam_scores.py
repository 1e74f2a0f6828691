"""How well region maps agree with the segment maps that people drew.

Maps: HxW integers, one label a region; truth from every annotator of the photo.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

TOLERANCE = 2  # pixels that a border may be off


def covering(labels: NDArray[np.uint8], truth: NDArray[np.uint16]) -> float:
    """Segmentation covering (Arbelaez et al. 2011): mean over the pixels of the truth of their
    segment's best IoU with a region."""
    count = int(labels.max()) + 1
    both = np.bincount(
        truth.ravel().astype(np.int64) * count + labels.ravel(),
        minlength=(int(truth.max()) + 1) * count,
    ).reshape(-1, count)
    segments, regions = both.sum(1, keepdims=True), both.sum(0, keepdims=True)
    overlap = both / np.maximum(segments + regions - both, 1)
    return float((overlap.max(1) * segments[:, 0]).sum() / truth.size)


def mean_covering(labels: NDArray[np.uint8], truths: list[NDArray[np.uint16]]) -> float:
    return float(np.mean([covering(labels, truth) for truth in truths]))


def border_f(labels: NDArray[np.uint8], truths: list[NDArray[np.uint16]]) -> float:
    """F-measure of borders: precision against the borders of all people together, recall over
    those of each, within TOLERANCE pixels."""
    size = 2 * TOLERANCE + 1
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    found, drawn = _borders(labels), [_borders(truth) for truth in truths]
    near_found = cv2.dilate(found.astype(np.uint8), disc) > 0
    near_drawn = cv2.dilate(np.any(drawn, 0).astype(np.uint8), disc) > 0
    precision = (found & near_drawn).sum() / max(found.sum(), 1)
    recall = sum((one & near_found).sum() for one in drawn) / max(np.sum(drawn), 1)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def _borders(labels: NDArray) -> NDArray[np.bool_]:
    """Pixels on either side of a border."""
    borders = np.zeros(labels.shape, np.bool_)
    rows, columns = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    borders[1:] |= rows
    borders[:-1] |= rows
    borders[:, 1:] |= columns
    borders[:, :-1] |= columns
    return borders
