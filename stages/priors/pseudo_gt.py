"""Pseudo-ground-truth from cached tensors: one strength per photo, then one per region.

The judge says whether a photo is good as it is, and else by what strength it becomes what it is
meant to be; then how far each region should differ (docs/method.md).  In preset `paper` the rung
that CLIP's prompts like best is taken instead, for the photo as a whole.  No image passes through
a network of the priors here.
"""

# K ladder strengths, R regions, S strengths, D embedding, H W pixels

from typing import TYPE_CHECKING, Any

import numpy as np

from evenlight.stages.arrays import Array, from_numpy, to_numpy, without_gradients
from evenlight.stages.pixels import guided_filter, luma, resize, to_bytes, to_float
from evenlight.stages.priors import opinion as judging
from evenlight.stages.priors import tone
from evenlight.stages.priors.protocols import Opinions
from evenlight.stages.priors.scores import grid_strength
from evenlight.stages.settings import Settings

if TYPE_CHECKING:
    from evenlight.stages.priors.judge import Judge

MAP_SCALE = 4  # the t map is kept at 1/4 of the photo's side
EDGES = 1e-4  # variance of luma from which on they bound regions: wider and softer leaves halos


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

    if wanted.search == "judge" and (start or regional):
        whole = by_region(photo_HW3, labels_HW, cached, judge, settings, start)
        chosen, t_map = (start + regional * (x - start) for x in whole)
    else:
        chosen, t_map = _everywhere(photo_HW3, cached, start)
    confidence = certainty * _unclipped_weight(photo_HW3, *t_map.shape[2:])
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
    if not settings.pseudo_gt.regional:
        return opinion
    p_RS = judge.region_opinions(cached, judging.decide(opinion, 0.0))
    return judging.in_view_of_regions(opinion, p_RS, judging.region_areas(cached))


def by_region(
    photo_HW3: np.ndarray,
    labels_HW: np.ndarray,
    cached: dict[str, np.ndarray],
    judge: Opinions,
    settings: Settings,
    start: float,
    xp: Any = None,
) -> tuple[np.ndarray, Array]:
    """Strengths of the embedded regions (R) and, at 1/4 size, of every pixel (1,1,h,w float32).

    Arguments as `choose`.  start: the photo's strength, which regions keep on average.  xp: whose
    array the map is: numpy's, or torch's (None).
    """
    chosen, t_map = _everywhere(photo_HW3, cached, start, xp)
    count = int((cached["region_labels"] > 0).sum())
    if not count or not settings.pseudo_gt.regional:
        return chosen, t_map
    p_RS, areas = judge.region_opinions(cached, start), judging.region_areas(cached)
    apart = judging.strengths_apart(p_RS, areas)
    most = settings.pseudo_gt.max_strength
    *of_regions, rest = (start + apart).clip(-most, most)
    chosen[:count] = of_regions
    strength_of = np.full(256, rest, np.float32)  # label -> strength
    strength_of[cached["region_labels"][:count]] = of_regions
    return chosen, _smooth(strength_of[labels_HW], photo_HW3, start, settings.ladder.family, xp)


def _everywhere(
    photo_HW3: np.ndarray, cached: dict[str, np.ndarray], strength: float, xp: Any = None
) -> tuple[np.ndarray, Array]:
    """The photo's strength for every region, and every pixel at 1/4 size."""
    height, width = photo_HW3.shape[0] // MAP_SCALE, photo_HW3.shape[1] // MAP_SCALE
    chosen = np.full(len(cached["region_labels"]), strength, np.float32)
    return chosen, from_numpy(np.full((1, 1, height, width), strength, np.float32), xp)


def re_expose(photo_HW3: np.ndarray, t_map: Array, family: str) -> np.ndarray:
    """Pseudo-GT of a photo from its t map (float16, 1/4 size).  uint8 H,W,3 in and out."""
    low, high = float(t_map.amin()), float(t_map.amax())
    if low == high:
        return tone.on_bytes(family, photo_HW3, low)
    t = resize(t_map[None, None].float(), *photo_HW3.shape[:2])
    return to_bytes(tone.Table(family, low, high).apply(to_float(photo_HW3), t)).numpy()


def _smooth(
    painted_HW: np.ndarray, photo_HW3: np.ndarray, start: float, family: str, xp: Any
) -> Array:
    """Strengths as one smooth map at 1/4 size (1,1,h,w) that follows the edges of the photo."""
    height, width = (side // MAP_SCALE for side in painted_HW.shape)
    small = resize(to_float(photo_HW3, xp), height, width)
    guide = luma(tone.apply(family, small, start))
    painted = resize(from_numpy(painted_HW, xp)[None, None], height, width)
    return guided_filter(guide, painted, radius=max(1, max(height, width) // 64), eps=EDGES)


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
