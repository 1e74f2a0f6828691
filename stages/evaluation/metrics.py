"""Figures of one output.  PROTOCOL says how each is measured; every table prints it."""

# H W pixels, n pixels that are scored

import itertools
import math
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from evenlight.stages.pixels import luma, to_float

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
    "photos; where a scene has a mask, all of them over its pixels that are not black (SSIM: its "
    "map over them); means over photos; -: no photo has it (without a reference: only change to "
    "luma)"
)


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
    photo_HW3: np.ndarray,
    output_HW3: np.ndarray,
    reference_HW3: np.ndarray | None,
    mask_HW: np.ndarray | None = None,
) -> Figures:
    """Figures of one output (PROTOCOL).  uint8 H,W,3 sRGB, same size, 16 pixels or more a side.

    reference: None where the photo has none.  mask: bool, the pixels that are scored, at least
    one; None scores all.
    """
    for other in (output_HW3, photo_HW3 if reference_HW3 is None else reference_HW3):
        assert photo_HW3.dtype == other.dtype == np.uint8
        assert photo_HW3.shape == other.shape, (photo_HW3.shape, other.shape)
    photo, output = (_scored(x, mask_HW) for x in (photo_HW3, output_HW3))
    compared = {} if reference_HW3 is None else _compared(output_HW3, reference_HW3, mask_HW)
    return Figures(
        **compared,
        change=float((output - photo).abs().mean()),
        tint=float((output.amax(1) - output.amin(1))[(photo >= BLOWN).all(1)].mean()),
        luma=float(luma(output).mean()),
    )


def agreement(outputs: list[np.ndarray], mask_HW: np.ndarray | None = None) -> float:
    """Mean PSNR in dB over all pairs of the outputs (uint8, one shape) of one scene's photos."""
    pairs = itertools.combinations([_scored(x, mask_HW) for x in outputs], 2)
    return fmean(_psnr(one, other) for one, other in pairs)


def _scored(rgb_HW3: np.ndarray, mask_HW: np.ndarray | None) -> Tensor:
    """The pixels that count, range 255: 1,3,H,W, or 1,3,1,n with a mask."""
    rgb = to_float(rgb_HW3) * 255
    return rgb if mask_HW is None else rgb[:, :, torch.from_numpy(mask_HW)][:, :, None]


def _compared(
    output_HW3: np.ndarray, reference_HW3: np.ndarray, mask_HW: np.ndarray | None
) -> dict[str, float]:
    """The figures that need a reference."""
    output, reference = (_scored(x, mask_HW) for x in (output_HW3, reference_HW3))
    gain = (output * reference).sum() / (output * output).sum().clamp_min(1)
    return {
        "psnr": _psnr(output, reference),
        "ssim": _ssim(output_HW3, reference_HW3, mask_HW),
        "colour": _colour_difference(output_HW3, reference_HW3, mask_HW),
        "gain_psnr": _psnr((gain * output).clamp(0, 255), reference),
    }


def _psnr(output: Tensor, reference: Tensor) -> float:
    psnr = peak_signal_noise_ratio(output, reference, data_range=255.0)
    return min(float(psnr), MAX_PSNR)


def _ssim(output_HW3: np.ndarray, reference_HW3: np.ndarray, mask_HW: np.ndarray | None) -> float:
    """Windows reach beyond the mask, as the photo does: only their centres are chosen by it."""
    output, reference = (to_float(x) * 255 for x in (output_HW3, reference_HW3))
    found = structural_similarity_index_measure(
        output,
        reference,
        data_range=255.0,
        kernel_size=11,
        sigma=1.5,
        return_full_image=True,
    )
    ssim, map_13HW = found
    return float(ssim if mask_HW is None else map_13HW[:, :, torch.from_numpy(mask_HW)].mean())


def _colour_difference(
    output_HW3: np.ndarray, reference_HW3: np.ndarray, mask_HW: np.ndarray | None
) -> float:
    """Mean CIEDE2000 over the pixels that count."""
    height, width = output_HW3.shape[:2]
    weights = np.ones((height, width), bool) if mask_HW is None else mask_HW
    rows = max(1, COLOUR_PIXELS // width)
    total = 0.0
    for top in range(0, height, rows):
        strip = slice(top, top + rows)
        output, reference = (rgb2lab(x[strip]) for x in (output_HW3, reference_HW3))
        total += float(deltaE_ciede2000(output, reference)[weights[strip]].sum())
    return total / int(weights.sum())
