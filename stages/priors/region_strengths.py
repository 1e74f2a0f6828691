"""One strength per region: as far from the photo's as the judge is certain, in order of brightness.

The judge's certainty is the trust: where it does not know, the strength of least expected loss
between a region and its photo is about 0.
"""

# R regions, T tones, S strengths

import numpy as np

from evenlight.stages.priors import opinion, tone
from evenlight.stages.priors.tones import PERCENTILES

# Of what the judge says: between .6 and 1, brackets lose .2 dB and unevenly exposed photos gain .3.
SHARE = 0.8
ORDER_MARGIN = 0.05  # luma difference above which two regions must keep their order
HALVINGS = 8  # of a move that breaks the order, before it is given up


def region_strengths(
    tones_RT: np.ndarray, p_RS: np.ndarray, start: float, family: str, max_strength: float
) -> np.ndarray:
    """Strength of every embedded region (R), order of brightness kept.

    tones: of each region as it is.  p: of the strength between each region and the photo, which is
    given `start`.
    """
    wanted = np.array([start + SHARE * opinion.between(p_S) for p_S in p_RS])
    return keep_order(wanted.clip(-max_strength, max_strength), start, tones_RT, family)


def keep_order(
    strengths: np.ndarray, start: float, tones_RT: np.ndarray, family: str
) -> np.ndarray:
    """Pull regions back towards `start` by halves until none overtakes one that is brighter there.

    strengths: R.  Pairs whose mean luma differs by less than ORDER_MARGIN are free.  Beside others
    a region may be brighter as it is and darker at `start`: means do not keep their order.
    """
    kept = strengths.copy()
    before = mean_luma(tones_RT, np.full(len(kept), start), family)
    order = np.argsort(-before)
    for _ in range(HALVINGS):
        after = mean_luma(tones_RT, kept, family)
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


def mean_luma(tones_RT: np.ndarray, strengths: np.ndarray, family: str) -> np.ndarray:
    """Mean luma of regions re-exposed by a strength each (R), from the quantiles of their luma."""
    toned = tone.apply(family, tones_RT[:, : len(PERCENTILES)], strengths[:, None])
    return np.trapezoid(toned, PERCENTILES / 100, axis=1)
