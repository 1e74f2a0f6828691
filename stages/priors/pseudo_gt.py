"""Pseudo-ground-truth from cached embeddings: one strength per photo, then per region.

The meter and CLIP say together whether a photo needs correcting at all.  The strength is a mix of
what the meter asks for and of where the exposure coordinate d = logit_over - logit_under crosses
zero on the tone ladder (method.md 4.2); the highest "well-exposed" probability stops too early and
only breaks ties (4.5).  Regions then move towards their own strength as far as the scores vouch for
it and the order of brightness allows (4.3). No image passes through a network of the priors here.
"""

# K ladder strengths, R regions, J region strengths, D embedding, H W pixels

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from evenlight.stages.pixels import guided_filter, luma, resize, to_bytes, to_float
from evenlight.stages.priors import meter, tone
from evenlight.stages.priors.ladder import CLIPPED_HIGH, CLIPPED_LOW
from evenlight.stages.settings import LadderSettings, PseudoGTSettings

MAP_SCALE = 4  # the t map is kept at 1/4 of the photo's side
# How much the judges' log-odds that a photo is good count, and by how much strength the meter errs
# on good photos (standard deviation).
CLIP_SHARE = 0.5
METER_ERROR = 0.35
MOST_SURE = 9.0  # log-odds beyond which CLIP counts no more
ORDER_MARGIN = 0.05  # luma difference above which two regions must keep their order
TRUSTED_GAIN = 0.5  # rise of the score at which a region is trusted fully
TRUSTED_AREA = 0.05  # area share at which a region is trusted fully
CONFIDENCE_SCALE = 0.25  # rise of the score that takes confidence from 0.5 to 0.73
PROPOSAL_GAIN = 0.05  # rise of the score above which a proposal replaces a region's strength


class Scorer(Protocol):
    """Prompts that judge exposure: embeddings B,D -> logits B,3 (under, normal, over)."""

    fingerprint: str

    def logits(self, embedding_BD: Tensor) -> Tensor: ...


def crossings(strengths: np.ndarray, d: np.ndarray) -> list[float]:
    """Strengths at which d rises through zero, linearly interpolated; ends if it never does."""
    found = [
        float(strengths[k] - d[k] * (strengths[k + 1] - strengths[k]) / (d[k + 1] - d[k]))
        for k in range(len(d) - 1)
        if d[k] < 0 <= d[k + 1]
    ]
    if found:
        return found
    return [float(strengths[-1] if d[-1] < 0 else strengths[0])]


def vertex(strengths: np.ndarray, score: np.ndarray) -> float:
    """Strength at the top of a parabola through the best ladder step and its neighbours."""
    best = int(score.argmax())
    if best in (0, len(score) - 1):
        return float(strengths[best])
    x, y = strengths[best - 1 : best + 2], score[best - 1 : best + 2]
    a, b, _ = np.polyfit(x - x[1], y, 2)
    return float(x[1] - b / (2 * a)) if a < 0 else float(x[1])


def candidate_score(
    logits_K3: np.ndarray, strengths: np.ndarray, added_clipping: np.ndarray
) -> np.ndarray:
    """Score of each candidate: log p_normal, less for strength and for newly clipped pixels."""
    shifted = logits_K3 - logits_K3.max(1, keepdims=True)
    log_p = shifted[:, 1] - np.log(np.exp(shifted).sum(1))
    return log_p - 0.05 * strengths**2 - 2 * np.maximum(0, added_clipping)


def well_exposed(photo_logits_3: np.ndarray, meter_log_odds: float, metered: float) -> bool:
    """Whether a photo should stay as it is: the evidence of meter, CLIP and strength together.

    photo_logits: of the photo as it is.  meter_log_odds: that it is good, by its tones.  metered:
    strength that the meter asks for; of a good photo it would be about 0.
    """
    under, normal, over = photo_logits_3
    clip_log_odds = float(np.clip(normal - np.logaddexp(under, over), -MOST_SURE, MOST_SURE))
    evidence = meter_log_odds + CLIP_SHARE * clip_log_odds - (metered / METER_ERROR) ** 2 / 2
    return bool(evidence > 0)


def global_strength(
    logits_K3: np.ndarray,
    photo_logits_3: np.ndarray,
    strengths: np.ndarray,
    added_clipping: np.ndarray,
    meter_log_odds: float,
    metered: float,
    settings: PseudoGTSettings,
) -> float:
    """The photo's one strength; 0 for a photo that is well exposed already.

    meter_log_odds: that it is.  metered: strength that the meter asks for.
    """
    if well_exposed(photo_logits_3, meter_log_odds, metered):
        return 0.0
    score = candidate_score(logits_K3, strengths, added_clipping)
    if settings.search == "grid":
        chosen = vertex(strengths, score)
    else:
        rising = crossings(strengths, logits_K3[:, 2] - logits_K3[:, 0])
        judged = max(rising, key=lambda t: float(np.interp(t, strengths, score)))
        chosen = (1 - settings.meter_weight) * judged + settings.meter_weight * metered
    return float(np.clip(chosen, -settings.max_strength, settings.max_strength))


def region_strength(
    logits_J3: np.ndarray,
    strengths: np.ndarray,
    start: float,
    area: float,
    settings: PseudoGTSettings,
) -> float:
    """One region's strength: from `start` towards its own, as far as the score vouches for it."""
    score = candidate_score(logits_J3, strengths, np.zeros(len(strengths)))
    d = logits_J3[:, 2] - logits_J3[:, 0]
    wanted = max(crossings(strengths, d), key=lambda t: float(np.interp(t, strengths, score)))
    gain = float(np.interp(wanted, strengths, score) - np.interp(start, strengths, score))
    trust = np.clip(gain / TRUSTED_GAIN, 0, 1) * min(1.0, area / TRUSTED_AREA)
    moved = start + settings.blend * float(trust) * (wanted - start)
    return float(np.clip(moved, -settings.max_strength, settings.max_strength))


def keep_order(
    strengths: np.ndarray,
    start: float,
    before: np.ndarray,
    luma_after: Callable[[int, float], float],
) -> np.ndarray:
    """Pull regions back towards `start` by halves until none overtakes a brighter one.

    strengths: R.  before: R mean luma in the photo.  luma_after(r, t): mean luma of region r
    re-exposed by t.  Pairs that differ by less than ORDER_MARGIN are free.
    """
    kept = strengths.copy()
    order = np.argsort(-before)
    for _ in range(8):
        after = np.array([luma_after(r, kept[r]) for r in range(len(kept))])
        broken = {
            int(r)
            for position, brighter in enumerate(order)
            for darker in order[position + 1 :]
            if before[brighter] - before[darker] > ORDER_MARGIN and after[brighter] < after[darker]
            for r in (brighter, darker)
        }
        if not broken:
            return kept
        for r in broken:
            kept[r] = (kept[r] + start) / 2
    return np.full_like(strengths, start)


def region_strengths(
    rgb_13HW: Tensor,
    masks: list[Tensor],
    logits_RJ3: np.ndarray,
    strengths_J: np.ndarray,
    start: float,
    family: str,
    settings: PseudoGTSettings,
    proposed: np.ndarray | None = None,
) -> np.ndarray:
    """Strength of every embedded region (R), order of brightness kept.  masks: bool H,W.

    The photo's brightness is the global stage's answer, so the area mean of all moves is taken
    out: regions only say how they differ.  (Crops alone are judged towards mid gray: measured
    0.1 to 0.25 dB better on 30 real brackets.)
    proposed: how far a trained corrector would move each region from the photo's strength (R).
    With proposals the regions' score, weighted by area, is never lower than without.
    """
    pixels = [rgb_13HW[..., mask][..., None] for mask in masks]  # 1,3,n,1 each

    def luma_after(region: int, t: float) -> float:
        return float(luma(tone.apply(family, pixels[region], torch.tensor(t))).mean())

    areas = np.array([float(mask.float().mean()) for mask in masks])
    wanted = np.array(
        [
            region_strength(logits_RJ3[r], strengths_J, start, area, settings)
            for r, area in enumerate(areas)
        ]
    )
    before = np.array([luma_after(r, 0.0) for r in range(len(masks))])

    def settled(moved: np.ndarray) -> np.ndarray:
        centred = moved - ((moved - start) * areas).sum()
        bounded = centred.clip(-settings.max_strength, settings.max_strength)
        return keep_order(bounded, start, before, luma_after)

    fresh = settled(wanted)
    if proposed is None:
        return fresh
    replaced = take_proposals(fresh, start + proposed, logits_RJ3, strengths_J)
    if np.array_equal(replaced, fresh):
        return fresh
    replaced = settled(replaced)
    rise = scores_at(replaced, logits_RJ3, strengths_J) - scores_at(fresh, logits_RJ3, strengths_J)
    return replaced if (rise * areas).sum() > 0 else fresh


def take_proposals(
    fresh: np.ndarray, proposed: np.ndarray, logits_RJ3: np.ndarray, strengths_J: np.ndarray
) -> np.ndarray:
    """Strengths of regions (R), at most half of them replaced by proposals (method.md 4.4).

    A proposal is taken where the region's score rises by more than PROPOSAL_GAIN, the largest
    rises first; one beyond the strengths that were embedded cannot be judged and is not taken.
    """
    rise = scores_at(proposed, logits_RJ3, strengths_J) - scores_at(fresh, logits_RJ3, strengths_J)
    rise[(proposed < strengths_J[0]) | (proposed > strengths_J[-1])] = -np.inf
    largest = np.argsort(-rise, kind="stable")[: len(fresh) // 2]
    taken = largest[rise[largest] > PROPOSAL_GAIN]
    replaced = fresh.copy()
    replaced[taken] = proposed[taken]
    return replaced


def scores_at(chosen: np.ndarray, logits_RJ3: np.ndarray, strengths_J: np.ndarray) -> np.ndarray:
    """Candidate score of each region (R) at its chosen strength, interpolated on its ladder."""
    unclipped = np.zeros(len(strengths_J))
    return np.array(
        [
            np.interp(t, strengths_J, candidate_score(logits_J3, strengths_J, unclipped))
            for t, logits_J3 in zip(chosen, logits_RJ3, strict=True)
        ]
    )


def paint(shape: Sequence[int], masks: list[Tensor], values: np.ndarray, base: float) -> Tensor:
    """A 1,1,H,W map: each region its value, the rest `base`."""
    painted = torch.full((1, 1, *shape), base)
    for mask, value in zip(masks, values, strict=True):
        painted[0, 0][mask] = float(value)
    return painted


def choose(
    photo_HW3: np.ndarray,
    labels_HW: np.ndarray,
    cached: dict[str, np.ndarray],
    scorer: Scorer,
    ladder: LadderSettings,
    settings: PseudoGTSettings,
    proposed: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The pseudo_gt part of one photo, from its cached embeddings.

    photo: uint8 H,W,3 sRGB, true extent, H and W multiples of 8.  labels: uint8 H,W.
    cached: the embeddings part of the photo (`ladder.embed_photo`).
    proposed: a corrector's moves of the embedded regions (`region_strengths`).
    Returns scores (K,3 logits), strength, region_strengths (R), t_map and confidence at 1/4
    size (float16) and pseudo_gt (uint8 H,W,3).
    """
    rule = float(cached["rule_strength"])
    strengths = rule + np.array(ladder.offsets)
    scores = _logits(scorer, cached["clip_ladder"])
    photo_logits = _logits(scorer, cached["clip_photo"][None])[0]
    added = cached["ladder_clipped"] - cached["clipped"]
    rgb = to_float(photo_HW3)
    reading = meter.read(rgb, ladder.family)
    log_odds, metered = float(reading.log_odds[0]), float(reading.strength[0])
    start = global_strength(scores, photo_logits, strengths, added, log_odds, metered, settings)

    num_regions = int((cached["region_labels"] > 0).sum())
    chosen = np.full(len(cached["region_labels"]), start, np.float32)
    height, width = photo_HW3.shape[0] // MAP_SCALE, photo_HW3.shape[1] // MAP_SCALE
    t_map = torch.full((1, 1, height, width), start)
    score = candidate_score(scores, strengths, added)
    untouched = candidate_score(photo_logits[None], np.zeros(1), np.zeros(1))[0]
    gain = np.interp(start, strengths, score) - untouched if start else 0.0
    confidence = torch.full((1, 1, height, width), _confidence(gain))

    if settings.regional and num_regions and start != 0.0:
        region_labels = cached["region_labels"][:num_regions]
        masks = [torch.from_numpy(labels_HW == label) for label in region_labels]
        steps = rule + np.array(ladder.region_offsets)
        logits = _logits(scorer, cached["clip_regions"][:num_regions])
        chosen[:num_regions] = region_strengths(
            rgb, masks, logits, steps, start, ladder.family, settings, proposed
        )
        t_map = _smooth_map(rgb, masks, chosen[:num_regions], start, ladder.family)
        gains = [
            np.interp(chosen[r], steps, candidate_score(logits[r], steps, np.zeros(len(steps))))
            - untouched
            for r in range(num_regions)
        ]
        regional = np.array([_confidence(value) for value in gains])
        whole = paint(labels_HW.shape, masks, regional, _confidence(gain))
        confidence = resize(whole, height, width)

    confidence = confidence * _unclipped_weight(rgb, height, width)
    return {
        "scores": scores.astype(np.float32),
        "strength": np.array(start, np.float32),
        "region_strengths": chosen,
        "t_map": t_map[0, 0].numpy().astype(np.float16),
        "confidence": confidence[0, 0].numpy().astype(np.float16),
        "pseudo_gt": re_expose(photo_HW3, t_map[0, 0].half(), ladder.family),
    }


def re_expose(photo_HW3: np.ndarray, t_map: Tensor, family: str) -> np.ndarray:
    """Pseudo-GT of a photo from its t map (float16, 1/4 size).  uint8 H,W,3 in and out."""
    t = resize(t_map[None, None].float(), *photo_HW3.shape[:2])
    return to_bytes(tone.apply(family, to_float(photo_HW3), t)).numpy()


def _logits(scorer: Scorer, embeddings: np.ndarray) -> np.ndarray:
    """Logits of cached embeddings, whatever the leading axes.  ...,D -> ...,3 float64."""
    flat = torch.from_numpy(embeddings.astype(np.float32)).flatten(0, -2)
    with torch.no_grad():
        logits = scorer.logits(flat)
    return logits.double().numpy().reshape(*embeddings.shape[:-1], 3)


def _confidence(gain: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(gain / CONFIDENCE_SCALE, -30, 30))))


def _smooth_map(
    rgb: Tensor, masks: list[Tensor], values: np.ndarray, start: float, family: str
) -> Tensor:
    """The regions' strengths as one smooth map at 1/4 size that follows the photo's edges."""
    height, width = rgb.shape[2] // MAP_SCALE, rgb.shape[3] // MAP_SCALE
    painted = resize(paint(rgb.shape[2:], masks, values, start), height, width)
    guide = luma(tone.apply(family, resize(rgb, height, width), torch.tensor(start)))
    return guided_filter(guide, painted, radius=max(height, width) // 16)


def _unclipped_weight(rgb: Tensor, height: int, width: int) -> Tensor:
    """1 where the photo holds information, 0.2 where it is clipped.  1,1,height,width."""
    lost = (rgb >= CLIPPED_HIGH).any(1, keepdim=True) | (rgb <= CLIPPED_LOW).all(1, keepdim=True)
    return 1 - 0.8 * resize(lost.float(), height, width)
