"""What CLIP sees of a photo: itself, the rungs of its tone ladder, and its regions.

Everything a judge or a choice of prompts could later ask for is embedded here once, so that new
ones choose again without an image passing through CLIP.  The tones of all that is embedded are
cached beside.
"""

# K ladder strengths, R regions, D embedding, T tones, H W pixels

import functools
from typing import Any

import cv2
import numpy as np

from evenlight.stages.arrays import Array, float32, from_numpy, like, namespace, to_numpy
from evenlight.stages.photos.visible import inside_border
from evenlight.stages.pixels import luma, mixed, pooled, resize, to_bytes, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.protocols import Embedder
from evenlight.stages.priors.tones import NUM_TONES, region_tones, tones
from evenlight.stages.settings import LadderSettings

REGION_GROWTH = 1.5  # crop side over region box side
BLUR_CELLS = 16  # a side: what the surrounding of a region is blurred to
CLIPPED_HIGH = 254 / 255
CLIPPED_LOW = 1 / 255


def clipped(rgb_B3HW: Array) -> Array:
    """Share of pixels with any channel blown or all channels crushed.  B,3,H,W -> B."""
    blown = (rgb_B3HW >= CLIPPED_HIGH).any(1)
    crushed = (rgb_B3HW <= CLIPPED_LOW).all(1)
    return float32(blown | crushed).mean((1, 2))


def largest_regions(
    labels_HW: np.ndarray, settings: LadderSettings
) -> tuple[list[int], list[float]]:
    """Labels and area shares of the regions worth embedding, the largest first."""
    shares = np.bincount(labels_HW.ravel()) / labels_HW.size
    large = [label for label in range(1, len(shares)) if shares[label] >= settings.min_region_area]
    labels = sorted(large, key=lambda label: -shares[label])[: settings.regions]
    return labels, [float(shares[label]) for label in labels]


def region_crop(rgb_13HW: Array, mask_HW: np.ndarray, size: int) -> Array:
    """The region with a little surrounding, what is outside blurred.

    rgb: float 1,3,H,W in [0, 1].  mask: bool H,W, not empty.  Returns 1,3,size,size.
    """
    xp = namespace(rgb_13HW)
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    spans = []
    for low, high, limit in (
        (int(rows[0]), int(rows[-1]) + 1, mask_HW.shape[0]),
        (int(columns[0]), int(columns[-1]) + 1, mask_HW.shape[1]),
    ):
        grow = int((high - low) * (REGION_GROWTH - 1) / 2)
        spans.append(slice(max(0, low - grow), min(limit, high + grow)))
    crop = resize(rgb_13HW[..., spans[0], spans[1]], size, size)
    inside = resize(like(mask_HW[None, None, spans[0], spans[1]], rgb_13HW), size, size)
    small = pooled(crop, size // BLUR_CELLS)
    rows_of_Ss = _enlarging(small.shape[2], size, xp)
    blurred = xp.clip(rows_of_Ss @ small @ rows_of_Ss.T, 0, 1)
    return mixed(blurred, crop, inside)


@functools.cache
def _enlarging(cells: int, size: int, xp: Any) -> Array:
    """The bicubic enlargement of `cells` to `size` as a matrix, size,cells: on maps of few cells it
    takes a tenth of the time."""
    one_by_one = np.eye(cells, dtype=np.float32)
    if xp is np:
        return cv2.resize(one_by_one, (cells, size), interpolation=cv2.INTER_CUBIC)
    return resize(from_numpy(one_by_one)[None, :, :, None], size, 1, "bicubic")[0, ..., 0].T


def embed_ladder(
    photo_HW3: np.ndarray,
    clip: Embedder,
    settings: LadderSettings,
    offsets: tuple[float, ...],
    xp: Any = None,
) -> dict[str, np.ndarray]:
    """What the judge and the prompts read of a photo itself, at some rungs of its ladder.

    photo: uint8 H,W,3 sRGB; a border of it does not count.  offsets: of the rungs from the
    mean-luma rule.  xp: whose arrays the clip takes: numpy's, or torch's (None).  Returns
    clip_photo, clip_ladder, tones (of the photo, then of each rung), rule_strength,
    ladder_clipped, mean_luma and clipped (docs/architecture.md).
    """
    small = resize(to_float(inside_border(photo_HW3), xp), clip.size, clip.size)
    rule = float(tone.rule_strength(small, settings.family)[0])
    strengths = rule + like(offsets, small)
    ladder = tone.apply(settings.family, small, strengths.reshape(-1, 1, 1, 1))
    seen = namespace(small).concat([small, ladder])
    embeddings = to_numpy(clip.embed(seen))
    return {
        "clip_photo": embeddings[0].astype(np.float32),
        "clip_ladder": embeddings[1:].astype(np.float16),
        "tones": np.stack([tones(to_numpy(to_bytes(rgb[None]))) for rgb in seen]),
        "rule_strength": np.array(rule, np.float32),
        "ladder_clipped": to_numpy(clipped(ladder)),
        "mean_luma": np.array(float(luma(small).mean()), np.float32),
        "clipped": to_numpy(clipped(small))[0],
    }


def embed_regions(
    photo_HW3: np.ndarray,
    labels_HW: np.ndarray,
    clip: Embedder,
    settings: LadderSettings,
    rule: float,
    xp: Any = None,
) -> dict[str, np.ndarray]:
    """What the judge reads of the largest regions: their embeddings, after the mean-luma rule of
    the whole photo so that dark ones can be seen, and their tones as they are.

    labels: uint8 H,W, from 1.  rule: the photo's rule strength.  xp: as in `embed_ladder`.
    Returns clip_regions, region_tones, region_labels and region_areas; rows of absent regions are
    zero.
    """
    regions, areas = largest_regions(labels_HW, settings)
    count = len(regions)
    found: dict[str, np.ndarray] = {
        "clip_regions": np.zeros((settings.regions, clip.dim), np.float16),
        "region_tones": np.zeros((settings.regions, NUM_TONES), np.float32),
        "region_labels": np.zeros(settings.regions, np.uint8),
        "region_areas": np.zeros(settings.regions, np.float32),
    }
    if not count:
        return found
    planes_3HW = np.ascontiguousarray(photo_HW3.transpose(2, 0, 1))
    ruled = from_numpy(tone.at_levels(settings.family, planes_3HW, rule, xp), xp)[None]
    crops = [region_crop(ruled, labels_HW == label, clip.size) for label in regions]
    found["clip_regions"][:count] = to_numpy(clip.embed(namespace(ruled).concat(crops)))
    found["region_tones"][:count] = region_tones(photo_HW3, labels_HW, regions)
    found["region_labels"][:count], found["region_areas"][:count] = regions, areas
    return found


def embed_photo(
    photo_HW3: np.ndarray, labels_HW: np.ndarray, clip: Embedder, settings: LadderSettings
) -> dict[str, np.ndarray]:
    """The embeddings part of one photo.

    photo: uint8 H,W,3 sRGB, true extent only.  labels: uint8 H,W, from 1.
    """
    whole = embed_ladder(photo_HW3, clip, settings, settings.offsets)
    rule = float(whole["rule_strength"])
    return whole | embed_regions(photo_HW3, labels_HW, clip, settings, rule)
