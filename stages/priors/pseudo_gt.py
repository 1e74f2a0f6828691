"""Pseudo-ground-truth from cached tensors: one strength per photo, then one per region.

The judge says whether a photo is good as it is, and else by what strength it becomes what it is
meant to be; then how far each region should differ (docs/method.md).  In preset `paper` the rung
that CLIP's prompts like best is taken instead, for the photo as a whole.  No image passes through
a network of the priors here.
"""

# K ladder strengths, R regions, S strengths, D embedding, H W pixels

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from evenlight.stages.arrays import Array, from_numpy, to_numpy, without_gradients
from evenlight.stages.pixels import coefficients, luma, resize, to_bytes, to_float
from evenlight.stages.priors import opinion as judging
from evenlight.stages.priors import tone
from evenlight.stages.priors.protocols import Opinions
from evenlight.stages.priors.scores import grid_strength
from evenlight.stages.settings import Settings

if TYPE_CHECKING:
    from evenlight.stages.priors.judge import Judge

MAP_SCALE = 4  # the t map is kept at 1/4 of the photo's side
BORDER = 3  # reach of the lines by which strengths pass from region to region, pixels
PATCH = 0.01  # share of a photo: what is in no region embedded, and less, goes with the nearest
EDGES = 1e-2  # variance of luma within it from which on they follow edges: wider leaves halos


def choose(
    photo_HW3: np.ndarray,
    labels_HW: np.ndarray,
    cached: dict[str, np.ndarray],
    judge: "Judge",
    settings: Settings,
) -> dict[str, np.ndarray]:
    """The pseudo_gt part of one photo, from its cached embeddings and tones.

    photo: uint8 H,W,3 sRGB, true extent, H and W multiples of 8.  labels: uint8 H,W.
    cached: the embeddings part of the photo (`ladder.embed_photo`).
    Returns scores (K,3 logits), p_good and judged (S; both 0 in preset `paper`), strength,
    region_strengths (R), t_map and confidence at 1/4 size (float16) and pseudo_gt (uint8 H,W,3).
    """
    ladder, wanted = settings.ladder, settings.pseudo_gt
    scores = _logits(judge, cached["clip_ladder"])
    p_good, judged, regional = 0.0, np.zeros(len(judging.STRENGTHS)), 1.0
    if wanted.search == "grid":
        photo_logits = _logits(judge, cached["clip_photo"][None])[0]
        strengths = float(cached["rule_strength"]) + np.array(ladder.offsets)
        added = cached["ladder_clipped"] - cached["clipped"]
        start, certainty = grid_strength(scores, photo_logits, strengths, added), 1.0
    else:
        opinion = opinion_with_regions(cached, judge, settings)
        p_good, judged = opinion.p_good, opinion.p_S
        start = judging.decide(opinion, settings.judge.prior_good)
        certainty = opinion.certainty(start, settings.judge.prior_good)
        regional = judging.regional_share(opinion, settings.judge.prior_good, start)
    start = float(np.clip(start, -wanted.max_strength, wanted.max_strength))

    height, width = (side // MAP_SCALE for side in labels_HW.shape)
    chosen = np.full(len(cached["region_labels"]), start, np.float32)
    t_map = from_numpy(np.full((1, 1, height, width), start, np.float32))
    if wanted.search == "judge" and (start or regional):
        apart = regional * apart_by_region(cached, judge, settings, start)
        chosen[: len(apart) - 1] += apart[:-1]
        a, b = painted(photo_HW3, labels_HW, cached, apart)
        t_map = start + resize(a * luma(to_float(photo_HW3)) + b, height, width)
    confidence = certainty * _unclipped_weight(photo_HW3, height, width)
    return {
        "scores": scores.astype(np.float32),
        "p_good": np.array(p_good, np.float32),
        "judged": judged.astype(np.float32),
        "strength": np.array(start, np.float32),
        "region_strengths": chosen,
        "t_map": t_map[0, 0].numpy().astype(np.float16),
        "confidence": confidence[0, 0].numpy().astype(np.float16),
        "pseudo_gt": re_expose(photo_HW3, t_map[0, 0].half(), ladder.family),
    }


def opinion_with_regions(
    cached: dict[str, np.ndarray], judge: Opinions, settings: Settings
) -> judging.Opinion:
    """What the judge says of one photo and of its regions, from its cached embeddings."""
    opinion = judge.opinion(cached, settings.ladder.offsets)
    opinion = judging.seconded(opinion, judge.second_opinion(cached))
    if not settings.pseudo_gt.regional or judging.is_on_white(cached["tones"][0]):
        return opinion
    p_RS = judge.region_opinions(cached, judging.decide(opinion, 0.0))
    return judging.in_view_of_regions(opinion, p_RS, judging.region_areas(cached))


def apart_by_region(
    cached: dict[str, np.ndarray], judge: Opinions, settings: Settings, start: float
) -> np.ndarray:
    """How far the strengths of the embedded regions and, last, of the rest are from the photo's,
    `start`, which they keep on average; 0 in a picture on white.  R+1 for the regions there are,
    float32."""
    areas, most = judging.region_areas(cached), settings.pseudo_gt.max_strength
    alike = not settings.pseudo_gt.regional or judging.is_on_white(cached["tones"][0])
    if len(areas) == 1 or alike:
        return np.zeros(len(areas), np.float32)
    apart = judging.strengths_apart(judge.region_opinions(cached, start), areas)
    return ((start + apart).clip(-most, most) - start).astype(np.float32)


def painted(
    photo_HW3: np.ndarray,
    labels_HW: np.ndarray,
    cached: dict[str, np.ndarray],
    apart: np.ndarray,
    xp: Any = None,
) -> tuple[Array, Array]:
    """What `apart_by_region` says, for every pixel: lines a * luma + b over the photo's luma,
    1,1,H,W float32 each, that pass from region to region along its edges.

    xp: whose arrays they are: numpy's, or torch's (None).
    """
    embedded = cached["region_labels"][: len(apart) - 1]
    of_label = np.full(256, apart[-1], np.float32)
    of_label[embedded] = apart[:-1]
    painted_HW = of_label[_without_patches(labels_HW, embedded)]
    apart_11HW = from_numpy(painted_HW[None, None], xp)
    return coefficients(luma(to_float(photo_HW3, xp)), apart_11HW, radius=BORDER, eps=EDGES)


def _without_patches(labels_HW: np.ndarray, embedded: np.ndarray) -> np.ndarray:
    """The labels, where patches that are in no region embedded are gone: a spot on water is judged
    with the water, not with spots elsewhere."""
    rest_HW = (~np.isin(labels_HW, embedded)).astype(np.uint8)
    if rest_HW.all():
        return labels_HW
    _, patches_HW, stats, _ = cv2.connectedComponentsWithStats(rest_HW)
    is_small = stats[:, cv2.CC_STAT_AREA] < PATCH * labels_HW.size
    _, nearest_HW = cv2.distanceTransformWithLabels(
        rest_HW, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    label_of = np.zeros(nearest_HW.max() + 1, labels_HW.dtype)  # of each pixel that is embedded
    label_of[nearest_HW[rest_HW == 0]] = labels_HW[rest_HW == 0]
    gone_HW = is_small[patches_HW] & (rest_HW > 0)
    return np.where(gone_HW, label_of[nearest_HW], labels_HW)


def re_expose(photo_HW3: np.ndarray, t_map: Array, family: str) -> np.ndarray:
    """Pseudo-GT of a photo from its t map (float16, 1/4 size).  uint8 H,W,3 in and out."""
    low, high = float(t_map.amin()), float(t_map.amax())
    if low == high:
        return tone.on_bytes(family, photo_HW3, low)
    t = resize(t_map[None, None].float(), *photo_HW3.shape[:2])
    return to_bytes(tone.Table(family, low, high).apply(to_float(photo_HW3), t)).numpy()


def _logits(judge: "Judge", embeddings: np.ndarray) -> np.ndarray:
    """Logits of cached embeddings, whatever the leading axes.  ...,D -> ...,3 float64."""
    flat = from_numpy(embeddings.astype(np.float32).reshape(-1, embeddings.shape[-1]))
    with without_gradients(flat):
        logits = to_numpy(judge.prompts.logits(flat))
    return logits.astype(np.float64).reshape(*embeddings.shape[:-1], 3)


def _unclipped_weight(photo_HW3: np.ndarray, height: int, width: int) -> Array:
    """1 where the photo holds information, 0.2 where it is clipped.  1,1,height,width."""
    red, green, blue = np.moveaxis(photo_HW3, 2, 0)
    largest_HW = np.maximum(np.maximum(red, green), blue)
    lost_HW = (largest_HW >= 254) | (largest_HW <= 1)  # a channel blown, or all crushed
    lost_11HW = from_numpy(lost_HW.astype(np.float32))[None, None]
    return 1 - 0.8 * resize(lost_11HW, height, width)
