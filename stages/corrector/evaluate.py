"""How good corrected photos are: metrics (PROTOCOL says which), the sets they are measured on, and
honest baselines.
"""

# H W pixels

import functools
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
MAX_PSNR = 100.0  # dB, of an output without an error, so that means stay finite
COLOUR_PIXELS = 2**20  # at a time: CIEDE2000 takes some 200 bytes a pixel
PROTOCOL = (
    "PSNR (at most 100 dB) and SSIM (11x11 Gaussian, sigma 1.5, borders reflected, mean over "
    "channels) on sRGB rounded to 8 bits, range 255, native size, no resizing, no crop, no gain "
    "matching; colour difference CIEDE2000 (D65); means over photos"
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
    """Figures of one output.  uint8 H,W,3 sRGB, same size, 16 pixels a side or more."""
    assert output_HW3.dtype == reference_HW3.dtype == np.uint8, (output_HW3.dtype,)
    assert output_HW3.shape == reference_HW3.shape, (output_HW3.shape, reference_HW3.shape)
    output, reference = (to_float(x) * 255 for x in (output_HW3, reference_HW3))
    psnr = peak_signal_noise_ratio(output, reference, data_range=255.0)
    ssim = structural_similarity_index_measure(
        output, reference, data_range=255.0, kernel_size=11, sigma=1.5
    )
    assert isinstance(ssim, torch.Tensor)
    return Figures(
        psnr=min(float(psnr), MAX_PSNR),
        ssim=float(ssim),
        colour=_colour_difference(output_HW3, reference_HW3),
    )


def _colour_difference(output_HW3: np.ndarray, reference_HW3: np.ndarray) -> float:
    """Mean CIEDE2000 over all pixels."""
    height, width = output_HW3.shape[:2]
    rows = max(1, COLOUR_PIXELS // width)
    total = 0.0
    for top in range(0, height, rows):
        output, reference = (rgb2lab(x[top : top + rows]) for x in (output_HW3, reference_HW3))
        total += float(deltaE_ciede2000(output, reference).sum())
    return total / (height * width)


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
    """The single gamma of least squared error to the reference: chosen with the answer in hand."""
    curves = _gamma_curves()
    levels = photo.ravel()
    # sum (curve[p] - r)^2 over pixels, less the part no curve changes, from sums per level of p
    counts = np.bincount(levels, minlength=256)
    sums = np.bincount(levels, weights=reference.ravel(), minlength=256)
    errors = (curves**2) @ counts - 2 * curves @ sums
    return curves[int(np.argmin(errors))].astype(np.uint8)[photo]


@functools.cache
def _gamma_curves() -> np.ndarray:
    """float64 of whole numbers: a row per strength of the search, a column per 8-bit level."""
    levels = (torch.arange(256) / 255).expand(1, 3, 1, 256)
    curves = [to_bytes(tone.apply("gamma", levels, float(t))).numpy() for t in GAMMA_SEARCH]
    return np.stack([curve[0, :, 0] for curve in curves]).astype(np.float64)


BASELINES: dict[str, Method] = {
    "identity": identity,
    "film rule": film_rule,
    "best gamma (answer in hand)": best_gamma,
}


def samples(layout: str, root: Path) -> list[Sample]:
    """Photos and references of a set, sorted by name.  layout: a key of LAYOUTS.

    Raises UsageError where the folder is not in that layout or a photo lacks its reference.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise UsageError(f"{layout}:{root} is not a folder")
    expected = f"the layout {layout!r} is {LAYOUTS[layout].__doc__}"
    try:
        found = sorted(LAYOUTS[layout](root), key=lambda s: (s.name, s.side))
    except UsageError as error:
        raise UsageError(f"{error}: {expected}") from error
    if not found:
        raise UsageError(f"{root} holds no photo with a reference: {expected}")
    return found


def pairs(root: Path) -> list[Sample]:
    """input/NAME.* and reference/NAME.*"""
    return _matched(root / "input", root / "reference", {"": ""})


def lcdp(root: Path) -> list[Sample]:
    """input/NAME.* and gt/NAME.* (LCDP test split)"""
    return _matched(root / "input", root / "gt", {"": ""})


def triplets(root: Path) -> list[Sample]:
    """SCENE/under.*, SCENE/ref.*, SCENE/over.* (one of under and over may be missing)"""
    found = []
    for scene in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        photos = _by_stem(scene)
        sides = [side for side in ("under", "over") if side in photos]
        if not sides or "ref" not in photos:
            raise UsageError(f"scene {scene} needs ref.* and under.* or over.*")
        found += [
            Sample(name=scene.name, side=side, photo=photos[side], reference=photos["ref"])
            for side in sides
        ]
    return found


def msec(root: Path) -> list[Sample]:
    """testing/INPUT_IMAGES/NAME_EV.* and testing/expert_c_testing_set/NAME.* (preset msec_enc)"""
    inputs, references = root / "testing" / "INPUT_IMAGES", root / "testing/expert_c_testing_set"
    return _matched(inputs, references, MSEC_SIDES)


def sice(root: Path) -> list[Sample]:
    """low/NAME.*, over/NAME.* and mid/NAME.* (preset sice_enc)"""
    low = _matched(root / "low", root / "mid", {"": "under"})
    return low + _matched(root / "over", root / "mid", {"": "over"})


# Ends of names; 0 EV counts as over (preset msec_enc).
MSEC_SIDES = {"_N1.5": "under", "_N1": "under", "_0": "over", "_P1": "over", "_P1.5": "over"}
LAYOUTS: dict[str, Callable[[Path], list[Sample]]] = {
    "pairs": pairs,
    "triplets": triplets,
    "msec": msec,
    "sice": sice,
    "lcdp": lcdp,
}


def _by_stem(folder: Path) -> dict[str, Path]:
    """Photos of a folder by name without suffix."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise UsageError(f"{found[path.stem]} and {path.name} have one name: keep one")
            found[path.stem] = path
    return found


def _matched(inputs: Path, references: Path, sides: dict[str, str]) -> list[Sample]:
    """A sample for every input.  sides: ends that input names have beyond the reference's, and
    what each says about the exposure."""
    answers = _by_stem(references)
    found = []
    for stem, path in _by_stem(inputs).items():
        ends = [end for end in sides if stem.endswith(end) and stem.removesuffix(end) in answers]
        if not ends:
            raise UsageError(f"{path} has no reference in {references}")
        reference = answers[stem.removesuffix(ends[0])]
        found.append(Sample(name=stem, side=sides[ends[0]], photo=path, reference=reference))
    return found
