"""Honest baselines: what a photo becomes without any learning, or with the answer in hand."""

import functools
from collections.abc import Callable

import numpy as np

from evenlight.stages.pixels import resize, to_float
from evenlight.stages.priors import tone

GAMMA_SEARCH = np.linspace(-2.5, 2.5, 101)

Baseline = Callable[[np.ndarray], np.ndarray]
"""photo -> output, uint8 H,W,3."""

Oracle = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]
"""(photo, reference, mask of what is scored or None) -> output, uint8 H,W,3."""


def untouched(photo: np.ndarray) -> np.ndarray:
    return photo


def film_rule(photo: np.ndarray) -> np.ndarray:
    """Mean luma to 119/255 by the film curve: no training, no reference."""
    strength = tone.rule_strength(resize(to_float(photo), 128, 128), "film")
    return tone.on_bytes("film", photo, float(strength[0]))


def best_gamma(
    photo: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """The single gamma of least squared error to the reference: chosen with the answer in hand."""
    curves = _gamma_curves()
    levels, answers = (x.ravel() if mask is None else x[mask].ravel() for x in (photo, reference))
    # sum (curve[p] - r)^2 over pixels, less the part no curve changes, from sums per level of p
    counts = np.bincount(levels, minlength=256)
    sums = np.bincount(levels, weights=answers, minlength=256)
    errors = (curves**2) @ counts - 2 * curves @ sums
    return curves[int(np.argmin(errors))].astype(np.uint8)[photo]


BASELINES: dict[str, Baseline] = {
    "identity": untouched,
    "film rule": film_rule,
}
ORACLES: dict[str, Oracle] = {"best gamma (answer in hand)": best_gamma}


@functools.cache
def _gamma_curves() -> np.ndarray:
    """float64 of whole numbers: a row per strength of the search, a column per 8-bit level."""
    levels = np.arange(256, dtype=np.uint8)
    return np.stack([tone.on_bytes("gamma", levels, t) for t in GAMMA_SEARCH]).astype(np.float64)
