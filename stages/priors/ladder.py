"""What CLIP sees of a photo: itself, the rungs of its tone ladder, and its regions.

Everything a judge or a choice of prompts could later ask for is embedded here once, so that new
ones choose again without an image passing through CLIP.  The tones of all that is embedded are
cached beside.
"""

# K ladder strengths, R regions, D embedding, T tones, H W pixels

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.photos.visible import inside_border
from evenlight.stages.pixels import luma, resize, to_bytes, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.protocols import ClipModel
from evenlight.stages.priors.tones import NUM_TONES, region_tones, tones
from evenlight.stages.settings import LadderSettings

REGION_GROWTH = 1.5  # crop side over region box side
CLIPPED_HIGH = 254 / 255
CLIPPED_LOW = 1 / 255


def clipped(rgb_B3HW: Tensor) -> Tensor:
    """Share of pixels with any channel blown or all channels crushed.  B,3,H,W -> B."""
    blown = (rgb_B3HW >= CLIPPED_HIGH).any(1)
    crushed = (rgb_B3HW <= CLIPPED_LOW).all(1)
    return (blown | crushed).float().mean((1, 2))


def largest_regions(
    labels_HW: np.ndarray, settings: LadderSettings
) -> tuple[list[int], list[float]]:
    """Labels and area shares of the regions worth embedding, the largest first."""
    shares = np.bincount(labels_HW.ravel()) / labels_HW.size
    large = [label for label in range(1, len(shares)) if shares[label] >= settings.min_region_area]
    labels = sorted(large, key=lambda label: -shares[label])[: settings.regions]
    return labels, [float(shares[label]) for label in labels]


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
    rows_of_Ss = _enlarging(small.shape[2], size)
    blurred = (rows_of_Ss @ small @ rows_of_Ss.T).clamp(0, 1)
    return torch.lerp(blurred, crop, inside)


@functools.cache
def _enlarging(cells: int, size: int) -> Tensor:
    """The bicubic enlargement of `cells` to `size` as a matrix, size,cells: on maps of few cells it
    takes a tenth of the time."""
    one_by_one = torch.eye(cells)[None, :, :, None]
    return F.interpolate(one_by_one, (size, 1), mode="bicubic", align_corners=False)[0, ..., 0].T


def embed_ladder(
    photo_HW3: np.ndarray, clip: ClipModel, settings: LadderSettings, offsets: tuple[float, ...]
) -> dict[str, np.ndarray]:
    """What the judge and the prompts read of a photo itself, at some rungs of its ladder.

    photo: uint8 H,W,3 sRGB; a border of it does not count.  offsets: of the rungs from the
    mean-luma rule.  Returns clip_photo,
    clip_ladder, tones (of the photo, then of each rung), rule_strength, ladder_clipped, mean_luma
    and clipped (docs/architecture.md).
    """
    small = resize(to_float(inside_border(photo_HW3)), clip.size, clip.size)
    rule = float(tone.rule_strength(small, settings.family)[0])
    strengths = rule + torch.tensor(offsets)
    ladder = tone.apply(settings.family, small, strengths.view(-1, 1, 1, 1))
    seen = torch.cat([small, ladder])
    embeddings = clip.embed(seen).cpu().numpy()
    return {
        "clip_photo": embeddings[0].astype(np.float32),
        "clip_ladder": embeddings[1:].astype(np.float16),
        "tones": np.stack([tones(to_bytes(rgb[None]).numpy()) for rgb in seen]),
        "rule_strength": np.array(rule, np.float32),
        "ladder_clipped": clipped(ladder).numpy().astype(np.float32),
        "mean_luma": luma(small).mean().numpy().astype(np.float32),
        "clipped": clipped(small)[0].numpy().astype(np.float32),
    }


def embed_regions(
    photo_HW3: np.ndarray,
    labels_HW: np.ndarray,
    clip: ClipModel,
    settings: LadderSettings,
    rule: float,
) -> dict[str, np.ndarray]:
    """What the judge reads of the largest regions: their embeddings, after the mean-luma rule of
    the whole photo so that dark ones can be seen, and their tones as they are.

    labels: uint8 H,W, from 1.  rule: the photo's rule strength.  Returns clip_regions,
    region_tones, region_labels and region_areas; rows of absent regions are zero.
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
    ruled = torch.from_numpy(tone.at_levels(settings.family, planes_3HW, rule))[None]
    labels = torch.from_numpy(labels_HW)
    crops = [region_crop(ruled, labels == label, clip.size) for label in regions]
    found["clip_regions"][:count] = clip.embed(torch.cat(crops)).cpu().numpy()
    found["region_tones"][:count] = region_tones(photo_HW3, labels_HW, regions)
    found["region_labels"][:count], found["region_areas"][:count] = regions, areas
    return found


def embed_photo(
    photo_HW3: np.ndarray, labels_HW: np.ndarray, clip: ClipModel, settings: LadderSettings
) -> dict[str, np.ndarray]:
    """The embeddings part of one photo.

    photo: uint8 H,W,3 sRGB, true extent only.  labels: uint8 H,W, from 1.
    """
    whole = embed_ladder(photo_HW3, clip, settings, settings.offsets)
    rule = float(whole["rule_strength"])
    return whole | embed_regions(photo_HW3, labels_HW, clip, settings, rule)
