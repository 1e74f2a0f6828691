"""Honest baselines: what a photo becomes without any learning, or with the answer in hand."""

import functools
from collections.abc import Callable

import cv2
import numpy as np

from evenlight.stages.pixels import resize, to_float
from evenlight.stages.priors import tone

SEARCH = np.linspace(-2.5, 2.5, 101)  # strengths, or logs of gammas
CLAHE_LIMIT, CLAHE_TILES = 2.0, (8, 8)  # of contrast; OpenCV's usual tiles

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


def clahe(photo: np.ndarray) -> np.ndarray:
    """Contrast-limited equalisation of the lightness in CIELAB, by OpenCV."""
    lightness, *colour = cv2.split(cv2.cvtColor(photo, cv2.COLOR_RGB2LAB))
    equalised = cv2.createCLAHE(CLAHE_LIMIT, CLAHE_TILES).apply(lightness)
    return cv2.cvtColor(cv2.merge([equalised, *colour]), cv2.COLOR_LAB2RGB)


def best_curve(
    family: str, photo: np.ndarray, reference: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """The single curve of least squared error to the reference: chosen with the answer in hand."""
    curves = _curves(family)
    levels, answers = (x.ravel() if mask is None else x[mask].ravel() for x in (photo, reference))
    # sum (curve[p] - r)^2 over pixels, less the part no curve changes, from sums per level of p
    counts = np.bincount(levels, minlength=256)
    sums = np.bincount(levels, weights=answers, minlength=256)
    errors = (curves**2) @ counts - 2 * curves @ sums
    return curves[int(np.argmin(errors))].astype(np.uint8)[photo]


BASELINES: dict[str, Baseline] = {
    "identity": untouched,
    "film rule": film_rule,
    "CLAHE": clahe,
}
ORACLES: dict[str, Oracle] = {
    f"best {family} (answer in hand)": functools.partial(best_curve, family)
    for family in ("gamma", "film")
}


@functools.cache
def _curves(family: str) -> np.ndarray:
    """float64 of whole numbers: a row per strength of the search, a column per 8-bit level."""
    levels = np.arange(256, dtype=np.uint8)
    return np.stack([tone.on_bytes(family, levels, t) for t in SEARCH]).astype(np.float64)
