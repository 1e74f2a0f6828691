"""The choice of preset `paper`: the rung of the ladder that the prompts like best."""

# K ladder strengths

import numpy as np

SURE_NORMAL = 0.6  # probability of "well exposed" from which a photo stays as it is
NEARLY_EVEN = 1.0  # |logit_over - logit_under| below which it does


def grid_strength(
    logits_K3: np.ndarray,
    photo_logits_3: np.ndarray,
    strengths: np.ndarray,
    added_clipping: np.ndarray,
) -> float:
    """The strength of highest score on the ladder; 0 for a photo that is well exposed already."""
    under, normal, over = photo_logits_3
    p_normal = 1 / (1 + np.exp(under - normal) + np.exp(over - normal))
    if p_normal >= SURE_NORMAL and abs(over - under) < NEARLY_EVEN:
        return 0.0
    return vertex(strengths, candidate_score(logits_K3, strengths, added_clipping))


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
