"""How good corrected photos are: metrics, the sets they are measured on, and honest baselines.

PSNR and SSIM on 8-bit rounded RGB at the reference's own size (range 255; SSIM 11x11 Gaussian,
sigma 1.5, mean over channels), colour difference as CIEDE2000 in CIELAB, all as means over photos.
"""

# H W pixels

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from evenlight.cache.errors import UsageError
from evenlight.stages.images import SUFFIXES
from evenlight.stages.pixels import resize, to_bytes, to_float
from evenlight.stages.priors import tone

GAMMA_SEARCH = np.linspace(-2.5, 2.5, 101)
PROTOCOL = (
    "PSNR, SSIM (11x11 Gaussian, sigma 1.5) on RGB rounded to 8 bits, range 255, native size, "
    "no crop, no gain matching; colour difference CIEDE2000; mean over photos"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One badly exposed photo and its reference.  side: "under", "over", or "" to be measured."""

    name: str
    side: str
    photo: Path
    reference: Path


@dataclass(frozen=True, kw_only=True)
class Figures:
    psnr: float  # dB, higher is better
    ssim: float  # at most 1, higher is better
    colour: float  # CIEDE2000, lower is better


def measure(output_HW3: np.ndarray, reference_HW3: np.ndarray) -> Figures:
    """Figures of one output.  uint8 H,W,3 sRGB, same size."""
    output, reference = (to_float(x) * 255 for x in (output_HW3, reference_HW3))
    mse = float(((output - reference) ** 2).mean())
    psnr = peak_signal_noise_ratio(output, reference, data_range=255.0) if mse else torch.inf
    ssim = structural_similarity_index_measure(
        output, reference, data_range=255.0, kernel_size=11, sigma=1.5
    )
    colour = deltaE_ciede2000(rgb2lab(output_HW3), rgb2lab(reference_HW3)).mean()
    assert isinstance(ssim, torch.Tensor)
    return Figures(psnr=float(psnr), ssim=float(ssim), colour=float(colour))


Method = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(photo, reference) -> output, all uint8 H,W,3; only an oracle looks at the reference."""


def identity(photo: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return photo


def film_rule(photo: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Mean luma to 119/255 by the film curve: no training, no reference."""
    rgb = to_float(photo)
    strength = tone.rule_strength(resize(rgb, 128, 128), "film")
    return to_bytes(tone.apply("film", rgb, strength.view(1, 1, 1, 1))).numpy()


def best_gamma(photo: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The single gamma nearest to the reference: chosen with the answer in hand."""
    levels = torch.arange(256) / 255
    target = reference.astype(np.int32)
    curves = [to_bytes(tone.apply("gamma", levels.expand(1, 3, 1, 256), float(t))).numpy()[0, :, 0]
              for t in GAMMA_SEARCH]  # fmt: skip
    errors = [np.square(curve[photo].astype(np.int32) - target).mean() for curve in curves]
    return curves[int(np.argmin(errors))][photo]


BASELINES: dict[str, Method] = {
    "identity": identity,
    "film rule": film_rule,
    "best gamma (answer in hand)": best_gamma,
}


def samples(layout: str, root: Path) -> list[Sample]:
    """Photos and references of a set, sorted by name.  layout: a key of LAYOUTS."""
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise UsageError(f"{layout}:{root} is not a folder")
    found = sorted(LAYOUTS[layout](root), key=lambda s: (s.name, s.side))
    if not found:
        raise UsageError(
            f"{root} holds no photo with a reference in the layout {layout!r}: "
            f"{LAYOUTS[layout].__doc__}"
        )
    return found


def pairs(root: Path) -> list[Sample]:
    """input/NAME.* and reference/NAME.*"""
    return _matched(root / "input", root / "reference")


def lcdp(root: Path) -> list[Sample]:
    """input/NAME.* and gt/NAME.* (LCDP test split)"""
    return _matched(root / "input", root / "gt")


def triplets(root: Path) -> list[Sample]:
    """SCENE/under.*, SCENE/ref.*, SCENE/over.*"""
    found = []
    for scene in sorted(p for p in root.iterdir() if p.is_dir()):
        photos = _by_stem(scene)
        found += [
            Sample(name=scene.name, side=side, photo=photos[side], reference=photos["ref"])
            for side in ("under", "over")
            if side in photos and "ref" in photos
        ]
    return found


def msec(root: Path) -> list[Sample]:
    """testing/INPUT_IMAGES/NAME_EV.* and testing/expert_c_testing_set/NAME.* (preset msec_enc)"""
    sides = {"_N1.5": "under", "_N1": "under", "_0": "over", "_P1": "over", "_P1.5": "over"}
    inputs = root / "testing" / "INPUT_IMAGES"
    references = root / "testing" / "expert_c_testing_set"
    found = []
    for suffix, side in sides.items():
        found += _matched(inputs, references, suffix=suffix, side=side)
    return found


def sice(root: Path) -> list[Sample]:
    """low/NAME.*, over/NAME.* and mid/NAME.* (preset sice_enc)"""
    references = root / "mid"
    low = _matched(root / "low", references, side="under")
    return low + _matched(root / "over", references, side="over")


LAYOUTS: dict[str, Callable[[Path], list[Sample]]] = {
    "pairs": pairs,
    "triplets": triplets,
    "msec": msec,
    "sice": sice,
    "lcdp": lcdp,
}


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is missing")
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES}


def _matched(inputs: Path, references: Path, *, suffix: str = "", side: str = "") -> list[Sample]:
    """Samples whose input stem, less `suffix`, names a reference."""
    answers = _by_stem(references)
    return [
        Sample(name=stem, side=side, photo=path, reference=answers[stem.removesuffix(suffix)])
        for stem, path in _by_stem(inputs).items()
        if stem.endswith(suffix) and stem.removesuffix(suffix) in answers
    ]
