"""Pseudo-ground-truth from cached embeddings: one strength per photo, then per region.

The meter and CLIP say together whether a photo needs correcting at all.  The strength is a mix of
what the meter asks for and of where the exposure coordinate d = logit_over - logit_under crosses
zero on the tone ladder (docs/method.md 5); the highest "well-exposed" probability stops too early
and only breaks ties.  Regions then move towards their own strength as far as the scores vouch for
it and the order of brightness allows. No image passes through a network of the priors here.
"""

# K ladder strengths, R regions, J region strengths, D embedding, H W pixels

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from evenlight.stages.pixels import guided_filter, luma, resize, to_bytes, to_float
from evenlight.stages.priors import meter, tone
from evenlight.stages.priors.ladder import CLIPPED_HIGH, CLIPPED_LOW
from evenlight.stages.priors.protocols import Judge
from evenlight.stages.priors.region_strengths import region_strengths
from evenlight.stages.priors.scores import candidate_score, crossings, vertex
from evenlight.stages.settings import LadderSettings, PseudoGTSettings

MAP_SCALE = 4  # the t map is kept at 1/4 of the photo's side
# How much the judges' log-odds that a photo is good count, and by how much strength the meter errs
# on good photos (standard deviation).
CLIP_SHARE = 0.5
METER_ERROR = 0.35
MOST_SURE = 9.0  # log-odds beyond which CLIP counts no more
CONFIDENCE_SCALE = 0.25  # rise of the score that takes confidence from 0.5 to 0.73


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
    scorer: Judge,
    ladder: LadderSettings,
    settings: PseudoGTSettings,
) -> dict[str, np.ndarray]:
    """The pseudo_gt part of one photo, from its cached embeddings.

    photo: uint8 H,W,3 sRGB, true extent, H and W multiples of 8.  labels: uint8 H,W.
    cached: the embeddings part of the photo (`ladder.embed_photo`).
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
            rgb, masks, logits, steps, start, ladder.family, settings
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


def _logits(scorer: Judge, embeddings: np.ndarray) -> np.ndarray:
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
