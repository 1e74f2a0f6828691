"""How good corrected photos are: metrics (PROTOCOL says which), the sets they are measured on, and
honest baselines.
"""

# H W pixels

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from evenlight.cache.errors import UsageError
from evenlight.stages.photos.find import SUFFIXES
from evenlight.stages.pixels import luma, resize, to_bytes, to_float
from evenlight.stages.priors import meter, tone

GAMMA_SEARCH = np.linspace(-2.5, 2.5, 101)
MAX_PSNR = 100.0  # dB, of an output without an error, so that means stay finite
COLOUR_PIXELS = 2**20  # at a time: CIEDE2000 takes some 200 bytes a pixel
BLOWN = 254  # of 255: a pixel with all channels from here on is clipped
PROTOCOL = (
    "PSNR (at most 100 dB) and SSIM (11x11 Gaussian, sigma 1.5, borders reflected, mean over "
    "channels) on sRGB rounded to 8 bits, range 255, native size, no resizing, no crop, no gain "
    "matching; colour difference CIEDE2000 (D65); PSNR/gain: after the one gain of least squared "
    "error (structure apart from brightness); change: mean absolute difference from the photo, "
    "of 255; tint: mean of largest less smallest channel, of 255, where the photo is blown; "
    "luma: mean luma of the output, of 255; agreement: PSNR between the outputs of a scene's "
    "photos; means over photos; -: no photo has it (without a reference: only change to luma)"
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One badly exposed photo and its reference, None where there is none.

    side: "under", "over", "all" for neither, or "" to be measured against the reference.
    ev: the photo is its file re-exposed by so many EV.  fused: the reference is the exposure
    fusion of photo and reference.
    """

    name: str
    side: str
    photo: Path
    reference: Path | None
    ev: float = 0.0
    fused: bool = False

    def prepare(
        self, photo: np.ndarray, reference: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """What is measured, from the decoded files: uint8 H,W,3 each."""
        if self.ev:
            t = self.ev / tone.EV_PER_STRENGTH
            photo = to_bytes(tone.apply("ev", to_float(photo), t)).numpy()
        if self.fused:
            assert reference is not None
            reference = exposure_fusion([photo, reference])
        return photo, reference


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one output; the first four compare it with the reference: nan without one."""

    psnr: float = math.nan  # dB, higher is better
    ssim: float = math.nan  # at most 1, higher is better
    colour: float = math.nan  # CIEDE2000, lower is better
    gain_psnr: float = math.nan  # dB after the best gain, higher is better
    change: float  # of 255
    tint: float  # of 255 where the photo is blown; nan where it is nowhere
    luma: float  # of 255


def measure(
    photo_HW3: np.ndarray, output_HW3: np.ndarray, reference_HW3: np.ndarray | None
) -> Figures:
    """Figures of one output (PROTOCOL).  uint8 H,W,3 sRGB, same size, 16 pixels or more a side.

    reference: None where the photo has none.
    """
    for other in (output_HW3, photo_HW3 if reference_HW3 is None else reference_HW3):
        assert photo_HW3.dtype == other.dtype == np.uint8
        assert photo_HW3.shape == other.shape, (photo_HW3.shape, other.shape)
    photo, output = (to_float(x) * 255 for x in (photo_HW3, output_HW3))
    return Figures(
        **({} if reference_HW3 is None else _compared(output_HW3, reference_HW3)),
        change=float((output - photo).abs().mean()),
        tint=float((output.amax(1) - output.amin(1))[(photo >= BLOWN).all(1)].mean()),
        luma=float(luma(output).mean()),
    )


def _compared(output_HW3: np.ndarray, reference_HW3: np.ndarray) -> dict[str, float]:
    """The figures that need a reference."""
    output, reference = (to_float(x) * 255 for x in (output_HW3, reference_HW3))
    gain = (output * reference).sum() / (output * output).sum().clamp_min(1)
    ssim = structural_similarity_index_measure(
        output, reference, data_range=255.0, kernel_size=11, sigma=1.5
    )
    assert isinstance(ssim, torch.Tensor)
    return {
        "psnr": _psnr(output, reference),
        "ssim": float(ssim),
        "colour": _colour_difference(output_HW3, reference_HW3),
        "gain_psnr": _psnr((gain * output).clamp(0, 255), reference),
    }


def agreement(outputs: list[np.ndarray]) -> float:
    """Mean PSNR in dB over all pairs of the outputs (uint8, one shape) of one scene's photos."""
    pairs_of = itertools.combinations([to_float(x) * 255 for x in outputs], 2)
    return fmean(_psnr(one, other) for one, other in pairs_of)


def exposure_fusion(photos: list[np.ndarray]) -> np.ndarray:
    """Mertens, Kautz, Van Reeth, "Exposure Fusion" (2007), by OpenCV.  uint8 H,W,3 of one size."""
    fused = cv2.createMergeMertens().process(photos)  # symmetric in the channels
    return (fused.clip(0, 1) * 255).round().astype(np.uint8)


def _psnr(output: torch.Tensor, reference: torch.Tensor) -> float:
    psnr = peak_signal_noise_ratio(output, reference, data_range=255.0)
    return min(float(psnr), MAX_PSNR)


def _colour_difference(output_HW3: np.ndarray, reference_HW3: np.ndarray) -> float:
    """Mean CIEDE2000 over all pixels."""
    height, width = output_HW3.shape[:2]
    rows = max(1, COLOUR_PIXELS // width)
    total = 0.0
    for top in range(0, height, rows):
        output, reference = (rgb2lab(x[top : top + rows]) for x in (output_HW3, reference_HW3))
        total += float(deltaE_ciede2000(output, reference).sum())
    return total / (height * width)


Method = Callable[[np.ndarray, np.ndarray | None], np.ndarray]
"""(photo, reference) -> output, all uint8 H,W,3; only ORACLES look at the reference."""


def identity(photo: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    return photo


def metered(photo: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    """Mean luma to what the meter asks for, by the film curve: no network, no reference."""
    rgb = to_float(photo)
    t = meter.read(rgb, "film").strength
    return to_bytes(tone.apply("film", rgb, t.view(1, 1, 1, 1))).numpy()


def film_rule(photo: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    """Mean luma to 119/255 by the film curve: no training, no reference."""
    rgb = to_float(photo)
    strength = tone.rule_strength(resize(rgb, 128, 128), "film")
    return to_bytes(tone.apply("film", rgb, strength.view(1, 1, 1, 1))).numpy()


def best_gamma(photo: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
    """The single gamma of least squared error to the reference: chosen with the answer in hand."""
    assert reference is not None
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
    "film meter": metered,
    "best gamma (answer in hand)": best_gamma,
}
ORACLES = {"best gamma (answer in hand)"}  # cannot run without a reference


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
        found = sorted(LAYOUTS[layout](root), key=lambda s: (s.name, s.side, s.ev))
    except UsageError as error:
        raise UsageError(f"{error}: {expected}") from error
    if not found:
        raise UsageError(f"{root} holds no photo: {expected}")
    return found


def pairs(root: Path) -> list[Sample]:
    """input/NAME.* and reference/NAME.*"""
    return _matched(root / "input", root / "reference", {"": ""})


def good(root: Path) -> list[Sample]:
    """NAME.*: well-exposed photos, which must stay as they are"""
    return [
        Sample(name=stem, side="all", photo=path, reference=path)
        for stem, path in _by_stem(root).items()
    ]


def unpaired(root: Path) -> list[Sample]:
    """NAME.*: badly exposed photos without a reference"""
    return [
        Sample(name=stem, side="all", photo=path, reference=None)
        for stem, path in _by_stem(root).items()
    ]


def reexposed(root: Path) -> list[Sample]:
    """NAME.*: well-exposed photos, re-exposed by -2, -1, 0, +1 and +2 EV in linear light"""
    return [
        Sample(
            name=stem,
            side="under" if ev < 0 else "over" if ev > 0 else "all",
            photo=path,
            reference=path,
            ev=ev,
        )
        for stem, path in _by_stem(root).items()
        for ev in REEXPOSURES
    ]


def fusion(root: Path) -> list[Sample]:
    """SCENE/under.*, SCENE/over.*; the reference is their exposure fusion"""
    found = []
    for scene in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        photos = _by_stem(scene)
        if not {"under", "over"} <= photos.keys():
            raise UsageError(f"scene {scene} needs under.* and over.*")
        found += [
            Sample(
                name=scene.name, side=side, photo=photos[side], reference=photos[other], fused=True
            )
            for side, other in (("under", "over"), ("over", "under"))
        ]
    return found


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
REEXPOSURES = (-2, -1, 0, 1, 2)  # EV
LAYOUTS: dict[str, Callable[[Path], list[Sample]]] = {
    "pairs": pairs,
    "triplets": triplets,
    "msec": msec,
    "sice": sice,
    "lcdp": lcdp,
    "good": good,
    "reexposed": reexposed,
    "fusion": fusion,
    "unpaired": unpaired,
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
