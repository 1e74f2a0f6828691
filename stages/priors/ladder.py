"""What CLIP sees of a photo: itself, the rungs of its tone ladder, and its regions.

Everything a judge or a choice of prompts could later ask for is embedded here once, so that new
ones choose again without an image passing through CLIP.  The tones of all that is embedded are
cached beside.
"""

# K ladder strengths, R regions, D embedding, E embedding of a region, T tones, H W pixels,
# S side of the square, h w its cells

from typing import Any

import numpy as np

from evenlight.stages.arrays import Array, float32, from_numpy, like, namespace, to_numpy
from evenlight.stages.photos.visible import inside_border
from evenlight.stages.pixels import luma, resize, to_bytes, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.protocols import Embedder
from evenlight.stages.priors.tones import tones
from evenlight.stages.settings import LadderSettings

REGION_SIDE, REGION_CELL = 160, 4  # of the square that regions are embedded from, pixels
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
    """What the judge reads of the largest regions, and of all the rest as one more.

    labels: uint8 H,W, from 1.  rule: the photo's rule strength: regions are embedded after it, so
    that dark ones can be seen.  xp: as in `embed_ladder`.  Returns clip_regions R+1,E, the rest
    last, region_labels and region_areas R; rows of absent regions are zero.
    """
    regions, areas = largest_regions(labels_HW, settings)
    count = len(regions)
    found: dict[str, np.ndarray] = {
        "region_labels": np.zeros(settings.regions, np.uint8),
        "region_areas": np.zeros(settings.regions, np.float32),
    }
    found["region_labels"][:count], found["region_areas"][:count] = regions, areas
    small = resize(to_float(photo_HW3, xp), REGION_SIDE, REGION_SIDE)
    ruled = tone.apply(settings.family, small, rule)
    cells = from_numpy(region_cells(labels_HW, regions, settings.regions)[None], xp)
    embedded = to_numpy(clip.embed_regions(ruled, small, cells))[0]
    return found | {"clip_regions": embedded.astype(np.float16)}


def region_cells(labels_HW: np.ndarray, regions: list[int], most: int) -> np.ndarray:
    """Which cells are of which region, by their middle: 1, else 0.  float32 most+1,h,w, those of
    no region listed last."""
    count = REGION_SIDE // REGION_CELL
    rows, columns = (
        ((np.arange(count) + 0.5) * side / count).astype(int) for side in labels_HW.shape
    )
    labels_hw = labels_HW[np.ix_(rows, columns)]
    cells = np.zeros((most + 1, count, count), np.float32)
    for row, label in zip(cells, regions, strict=False):
        row[labels_hw == label] = 1
    cells[-1] = 1 - cells[:-1].sum(0)
    return cells


def embed_photo(
    photo_HW3: np.ndarray, labels_HW: np.ndarray, clip: Embedder, settings: LadderSettings
) -> dict[str, np.ndarray]:
    """The embeddings part of one photo.

    photo: uint8 H,W,3 sRGB, true extent only.  labels: uint8 H,W, from 1.
    """
    whole = embed_ladder(photo_HW3, clip, settings, settings.offsets)
    rule = float(whole["rule_strength"])
    return whole | embed_regions(photo_HW3, labels_HW, clip, settings, rule)
