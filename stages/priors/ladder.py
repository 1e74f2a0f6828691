"""What CLIP sees of a photo: itself, its tone ladder, and its regions at five strengths.

Everything a choice of prompts could later ask for is embedded here once, so that new prompts
re-score and re-choose without an image passing through CLIP again.
"""

# K ladder strengths, R regions, J region strengths, D embedding, H W pixels

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.pixels import luma, resize, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.protocols import ClipModel
from evenlight.stages.settings import LadderSettings

REGION_GROWTH = 1.5  # crop side over region box side
CLIPPED_HIGH = 254 / 255
CLIPPED_LOW = 1 / 255


def clipped(rgb_B3HW: Tensor) -> Tensor:
    """Share of pixels with any channel blown or all channels crushed.  B,3,H,W -> B."""
    blown = (rgb_B3HW >= CLIPPED_HIGH).any(1)
    crushed = (rgb_B3HW <= CLIPPED_LOW).all(1)
    return (blown | crushed).float().mean((1, 2))


def largest_regions(labels_HW: np.ndarray, settings: LadderSettings) -> list[tuple[int, float]]:
    """(label, area share) of the regions worth embedding, the largest first."""
    counts = np.bincount(labels_HW.ravel())
    shares = [(label, counts[label] / labels_HW.size) for label in range(1, len(counts))]
    large = [row for row in shares if row[1] >= settings.min_region_area]
    return sorted(large, key=lambda row: (-row[1], row[0]))[: settings.regions]


def region_crop(rgb_13HW: Tensor, mask_HW: Tensor, size: int) -> Tensor:
    """The region with a little surrounding, what is outside blurred.

    rgb: float 1,3,H,W in [0, 1].  mask: bool H,W, not empty.  Returns 1,3,size,size.
    """
    rows, columns = mask_HW.any(1).nonzero().ravel(), mask_HW.any(0).nonzero().ravel()
    spans = []
    for low, high, limit in (
        (int(rows[0]), int(rows[-1]) + 1, mask_HW.shape[0]),
        (int(columns[0]), int(columns[-1]) + 1, mask_HW.shape[1]),
    ):
        grow = int((high - low) * (REGION_GROWTH - 1) / 2)
        spans.append(slice(max(0, low - grow), min(limit, high + grow)))
    crop = resize(rgb_13HW[..., spans[0], spans[1]], size, size)
    inside = resize(mask_HW[None, None, spans[0], spans[1]].float(), size, size)
    small = F.avg_pool2d(crop, size // 16)
    blurred = resize(small, size, size, "bicubic").clamp(0, 1)
    return inside * crop + (1 - inside) * blurred


def embed_photo(
    photo_HW3: np.ndarray, labels_HW: np.ndarray, clip: ClipModel, settings: LadderSettings
) -> dict[str, np.ndarray]:
    """The embeddings part of one photo.

    photo: uint8 H,W,3 sRGB, true extent only.  labels: uint8 H,W, from 1.
    Returns the arrays of the part (docs/architecture.md); rows of absent regions are zero.
    """
    rgb = to_float(photo_HW3)
    small = resize(rgb, clip.size, clip.size)
    rule = float(tone.rule_strength(small, settings.family)[0])
    strengths = rule + torch.tensor(settings.offsets)
    ladder = tone.apply(settings.family, small, strengths.view(-1, 1, 1, 1))

    regions = largest_regions(labels_HW, settings)
    offsets = rule + torch.tensor(settings.region_offsets)
    labels = torch.from_numpy(labels_HW)
    crops = [region_crop(rgb, labels == label, clip.size) for label, _ in regions]
    shifted = [tone.apply(settings.family, crop, offsets.view(-1, 1, 1, 1)) for crop in crops]

    embeddings = clip.embed(torch.cat([small, ladder, *shifted])).cpu().numpy()
    num_ladder = len(settings.offsets)
    clip_regions = np.zeros((settings.regions, len(settings.region_offsets), clip.dim), np.float16)
    clip_regions[: len(regions)] = embeddings[1 + num_ladder :].reshape(
        len(regions), len(settings.region_offsets), clip.dim
    )
    region_labels = np.zeros(settings.regions, np.uint8)
    region_labels[: len(regions)] = [label for label, _ in regions]
    return {
        "clip_photo": embeddings[0].astype(np.float32),
        "clip_ladder": embeddings[1 : 1 + num_ladder].astype(np.float16),
        "clip_regions": clip_regions,
        "region_labels": region_labels,
        "rule_strength": np.float32(rule),
        "ladder_clipped": clipped(ladder).numpy().astype(np.float32),
        "mean_luma": luma(small).mean().numpy().astype(np.float32),
        "clipped": clipped(small)[0].numpy().astype(np.float32),
    }
