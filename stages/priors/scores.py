"""How CLIP's answers on the tone ladder become a score and a strength (docs/method.md 5)."""

# K ladder strengths

import numpy as np


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
