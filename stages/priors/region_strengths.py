"""One strength per region: towards its own as far as the scores vouch for it, in order of
brightness (docs/method.md 5).
"""

# R regions, J region strengths, H W pixels

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from evenlight.stages.pixels import luma
from evenlight.stages.priors import tone
from evenlight.stages.priors.scores import candidate_score, crossings
from evenlight.stages.settings import PseudoGTSettings

ORDER_MARGIN = 0.05  # luma difference above which two regions must keep their order
TRUSTED_GAIN = 0.5  # rise of the score at which a region is trusted fully
TRUSTED_AREA = 0.05  # area share at which a region is trusted fully


def region_strengths(
    rgb_13HW: Tensor,
    masks: list[Tensor],
    logits_RJ3: np.ndarray,
    strengths_J: np.ndarray,
    start: float,
    family: str,
    settings: PseudoGTSettings,
) -> np.ndarray:
    """Strength of every embedded region (R), order of brightness kept.  masks: bool H,W.

    The photo's brightness is the global stage's answer, so the area mean of all moves is taken
    out: regions only say how they differ.  (Crops alone are judged towards mid gray: measured
    0.1 to 0.25 dB better on 30 real brackets.)
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
    centred = wanted - ((wanted - start) * areas).sum()
    bounded = centred.clip(-settings.max_strength, settings.max_strength)
    return keep_order(bounded, start, before, luma_after)


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
