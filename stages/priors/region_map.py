"""Region maps: overlapping masks painted into one label per pixel, completed, and refined."""

import cv2
import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]

# FastSAM's authors paint what scores 0.4 or more; what scores less is used to cover the rest.
# An unsure mask that finds under MIN_NEW_SHARE of its pixels not yet held by better-scored ones
# repeats what is known and would cut up good regions.
SURE = 0.3
MIN_NEW_SHARE = 0.15
# Uncovered seams narrower than twice this (share of the long side) belong to what lies beside
# them; wider remainders are regions.
SEAM = 0.012
EDGE_REACH = 1 / 60  # how far a border may move to an edge of the photo, share of the long side
EDGE_EPS = 3e-4  # variance of luma in [0, 1] below which nothing is an edge


def distinct(
    masks_KHW: NDArray[np.float32], scores_K: NDArray[np.float32], *, iou: float
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Masks that overlap no better-scored one by more than `iou`, and their scores.

    masks_KHW: probabilities; a mask holds where they are above 0.5.  A score is first
    multiplied by the mask's mean probability there (as in SOLO, arXiv 1912.04488): what is
    unsure of its pixels is no sure object.  Returns K'xHxW masks and K' scores.
    """
    held_KHW = masks_KHW > 0.5
    area_K = np.maximum(np.count_nonzero(held_KHW, axis=(1, 2)), 1)
    scores = scores_K * np.einsum("khw,khw->k", masks_KHW, held_KHW) / area_K
    held = held_KHW.astype(np.float32)
    both_KK = np.tensordot(held, held, axes=((1, 2), (1, 2)))
    repeats_KK = both_KK > iou * (area_K[:, None] + area_K - both_KK)
    kept: list[int] = []
    for mask in np.argsort(-scores, kind="stable"):
        if not repeats_KK[mask, kept].any():
            kept.append(int(mask))
    return held_KHW[kept], scores[kept].astype(np.float32)


def region_map(
    masks_KHW: NDArray[np.bool_],
    scores_K: NDArray[np.floating],
    *,
    min_area: float,
    max_regions: int,
) -> tuple[NDArray[np.uint8], float]:
    """Label every pixel with its region.

    masks_KHW: K masks, in any order, which may overlap.  scores_K: 0 to 1; unsure masks that
    repeat better-scored ones are dropped.  min_area: share of the photo under which a mask,
    what is left of it after painting, or a remainder, is no region.  max_regions: 1 to 255;
    regions beyond the largest are merged.

    Each connected remainder that no mask covers is a region of its own; seams and crumbs of it
    go to the nearest region.  Returns HxW uint8 labels, 1 the largest region, and so on down,
    and the share of pixels that some mask covers.
    """
    assert 1 <= max_regions <= 255, max_regions
    height, width = masks_KHW.shape[1:]
    least = max(min_area * height * width, 1)
    areas_K = np.count_nonzero(masks_KHW, axis=(1, 2))
    kept = _worth_keeping(masks_KHW, scores_K, areas_K, least)
    labels = np.zeros((height, width), np.int64)
    # Largest first, so that an object stays visible on what it stands on (docs/method.md 2).
    for number, mask in enumerate(sorted(kept, key=lambda mask: -areas_K[mask]), start=1):
        labels[masks_KHW[mask]] = number
    covered = np.count_nonzero(labels) / labels.size
    labels = _by_area(_completed(labels, least))
    return _merged(labels, least, max_regions).astype(np.uint8), covered


def on_edges(labels_HW: NDArray[np.uint8], rgb_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The same regions with their borders on the photo's own edges.

    Each region's mask is smoothed by a guided filter along the luma of the photo, and a pixel
    goes to the region that is strongest there (He, Sun, Tang, "Guided Image Filtering", 2013;
    written with OpenCV's running sums, on the box of each region, to take 10 ms for a photo).
    labels, rgb: HxW, HxWx3 uint8.  Returns HxW uint8, numbered from the largest again.
    """
    radius = max(round(EDGE_REACH * max(labels_HW.shape)), 1)
    guide = cv2.cvtColor(rgb_HW3, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    mean = _box_mean(guide, radius)
    precision = 1 / (_box_mean(guide * guide, radius) - mean * mean + EDGE_EPS)
    strongest = np.full(labels_HW.shape, -1, np.float32)
    refined = labels_HW.copy()
    for label in np.unique(labels_HW):
        mask = labels_HW == label
        box = _box_of(mask, margin=2 * radius + 1)
        region, luma = mask[box].astype(np.float32), guide[box]
        region_mean = _box_mean(region, radius)
        slope = (_box_mean(luma * region, radius) - mean[box] * region_mean) * precision[box]
        offset = region_mean - slope * mean[box]
        strength = _box_mean(slope, radius) * luma + _box_mean(offset, radius)
        wins = strength > strongest[box]
        strongest[box][wins] = strength[wins]
        refined[box][wins] = label
    return _by_area(refined.astype(np.int64)).astype(np.uint8)


def _box_mean(map_HW: NDArray[np.floating], radius: int) -> NDArray[np.float32]:
    size = (2 * radius + 1, 2 * radius + 1)
    return np.asarray(cv2.boxFilter(map_HW, -1, size, borderType=cv2.BORDER_REFLECT), np.float32)


def _box_of(mask_HW: NDArray[np.bool_], margin: int) -> tuple[slice, slice]:
    """Rows and columns that hold the mask, and `margin` more on each side."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return (
        slice(max(int(rows[0]) - margin, 0), int(rows[-1]) + margin + 1),
        slice(max(int(columns[0]) - margin, 0), int(columns[-1]) + margin + 1),
    )


def _worth_keeping(
    masks_KHW: NDArray[np.bool_],
    scores_K: NDArray[np.floating],
    areas_K: NDArray[np.integer],
    least: float,
) -> list[int]:
    """Indices of masks large enough, and sure or adding to better-scored ones; surest first."""
    held = np.zeros(masks_KHW.shape[1:], np.bool_)
    kept = []
    for mask in np.argsort(-scores_K, kind="stable"):
        if areas_K[mask] < least:
            continue
        new = np.count_nonzero(masks_KHW[mask] & ~held)
        if scores_K[mask] >= SURE or new >= MIN_NEW_SHARE * areas_K[mask]:
            kept.append(int(mask))
            held |= masks_KHW[mask]
    return kept


def _completed(labels: Labels, least: float) -> Labels:
    """Remainders of `least` pixels or more as regions, every other 0 as its nearest region."""
    radius = round(SEAM * max(labels.shape))
    rest = (labels == 0).astype(np.uint8)
    if radius:
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
        rest = cv2.morphologyEx(rest, cv2.MORPH_OPEN, disc)
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(rest, connectivity=4)
    large = statistics[:, cv2.CC_STAT_AREA] >= least
    large[0] = False
    numbers = np.where(large, labels.max() + np.cumsum(large), 0)
    complete = np.where(labels > 0, labels, numbers[parts])
    return _from_nearest(complete) if complete.any() else np.ones_like(labels)


def _from_nearest(labels: Labels) -> Labels:
    """Every 0 replaced by the nearest label; some pixel is not 0."""
    empty = (labels == 0).astype(np.uint8)
    _, nearest = cv2.distanceTransformWithLabels(
        empty, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    held = labels > 0
    label_of = np.zeros(int(nearest.max()) + 1, np.int64)
    label_of[nearest[held]] = labels[held]
    return label_of[nearest]


def _by_area(labels: Labels) -> Labels:
    """The same regions numbered 1, 2, ... from the largest."""
    areas = np.bincount(labels.ravel())
    order = np.argsort(-areas, kind="stable")
    order = order[areas[order] > 0]
    rank = np.zeros(len(areas), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    return rank[labels]


def _merged(labels: Labels, least: float, max_regions: int) -> Labels:
    """Regions under `least` pixels or beyond `max_regions`, smallest first, join the region
    with which they share most border."""
    areas = np.bincount(labels.ravel())
    count = len(areas) - 1
    borders = _borders(labels, count + 1)
    joined = np.arange(count + 1)
    for label in range(count, 0, -1):
        if (areas[label] >= least and label <= max_regions) or not borders[label].any():
            continue
        target = int(np.argmax(borders[label]))
        joined[joined == label] = target
        areas[target] += areas[label]
        borders[target] += borders[label]
        borders[:, target] += borders[:, label]
        borders[label] = borders[:, label] = 0
        borders[target, target] = 0
    return _by_area(joined[labels])


def _borders(labels: Labels, count: int) -> NDArray[np.int64]:
    """Pixel edges that two labels share: count x count, symmetric, 0 on the diagonal."""
    pairs = np.zeros(count * count, np.int64)
    for one, other in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        pairs += np.bincount((one * count + other).ravel(), minlength=count * count)
    borders = pairs.reshape(count, count)
    borders += borders.T.copy()
    np.fill_diagonal(borders, 0)
    return borders
