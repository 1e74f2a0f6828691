"""Figures of one output.  PROTOCOL says how each is measured; every table prints it."""

# H W pixels, n pixels that are scored

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from evenlight.stages.pixels import box_mean, luma, to_float

MAX_PSNR = 100.0  # dB, of an output without an error, so that means stay finite
COLOUR_PIXELS = 2**20  # at a time: CIEDE2000 takes some 200 bytes a pixel
BLOWN = 254  # of 255: a channel from here on is clipped, a pixel with all of them blown
WHITE = 230  # of 255: a blown pixel that comes out darker is grey
SHADOW = 25  # of 255: luma below which noise is lifted
BORDER = 2  # of what is clipped, pixels to either side
ALEXNET = "alexnet-owt-7be5be79.pth"  # of torchvision, in the folder of torch.hub
LPIPS_SIDE = 64  # pixels a side, the least that AlexNet takes
FEWEST = 50  # pixels, for a figure of some of them
PROTOCOL = (
    "PSNR (at most 100 dB) and SSIM (11x11 Gaussian, sigma 1.5, borders reflected, mean over "
    "channels) on sRGB rounded to 8 bits, range 255, native size, no resizing, no crop, no gain "
    "matching; colour difference CIEDE2000 (D65); PSNR/gain: after the one gain of least squared "
    "error (structure apart from brightness); LPIPS: of AlexNet, learned weights 0.1; "
    "change: mean absolute difference from the photo, "
    "of 255; tint: mean of largest less smallest channel, of 255, where the photo is blown; "
    "lost/colour and lost/chroma: CIEDE2000 and distance in a*b* where a channel of the photo is "
    "clipped (254 on); bands: differences of a*b* between neighbours along the borders of what is "
    "clipped (2 pixels to either side), as a ratio to the reference's, 1 is right; grey: share of "
    "blown pixels whose luma comes out below 230 of 255 though the reference's is not; noise: mean "
    "absolute difference of luma from its 3x3 mean, of 255, where the photo's is below 25; "
    "luma: mean luma of the output, of 255; agreement: PSNR between the outputs of a scene's "
    "photos; where a scene has a mask, all of them over its pixels that are not black (SSIM: its "
    "map over them, no LPIPS); means over photos; -: no photo has it (without a reference: only "
    "change to noise)"
)

NO_REFERENCE = (
    "NIQE and BRISQUE are not available: libraries that run on this NumPy fetch their models from "
    "the network, which evenlight does not (docs/results.md)"
)


def figure(heading: str, decimals: int = 2, default: Any = math.nan) -> Any:
    """A field of Figures, and how tables show it."""
    return field(default=default, metadata={"heading": heading, "decimals": decimals})


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one output, nan for those it has not; up to `grey` they need a reference."""

    psnr: float = figure("PSNR")  # dB, higher is better
    ssim: float = figure("SSIM", 3)  # at most 1, higher is better
    lpips: float = figure("LPIPS", 3)  # lower is better
    colour: float = figure("CIEDE2000")  # lower is better
    gain_psnr: float = figure("PSNR/gain")  # dB after the best gain, higher is better
    lost_colour: float = figure("lost/colour")  # CIEDE2000 where a channel of the photo is clipped
    lost_chroma: float = figure("lost/chroma")  # distance in a*b* there
    bands: float = figure("bands")  # colour edges along clipped borders over the reference's
    grey: float = figure("grey", 3)  # share of blown pixels below WHITE where the reference is not
    change: float = figure("change", default=MISSING)  # of 255
    tint: float = figure("tint", default=MISSING)  # of 255 where the photo is blown
    luma: float = figure("luma", 1, default=MISSING)  # of 255
    noise: float = figure("noise", default=MISSING)  # of 255, where the photo is dark

    def __str__(self) -> str:
        there = [(one, getattr(self, one.name)) for one in fields(self)]
        return ", ".join(
            f"{one.metadata['heading']} {value:.{one.metadata['decimals']}f}"
            for one, value in there
            if not math.isnan(value)
        )


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
    compared = (
        {} if reference_HW3 is None else _compared(photo_HW3, output_HW3, reference_HW3, mask_HW)
    )
    return Figures(
        **compared,
        change=float((output - photo).abs().mean()),
        tint=float((output.amax(1) - output.amin(1))[(photo >= BLOWN).all(1)].mean()),
        luma=float(luma(output).mean()),
        noise=_noise(photo_HW3, output_HW3, mask_HW),
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
    photo_HW3: np.ndarray, output_HW3: np.ndarray, reference_HW3: np.ndarray,
    mask_HW: np.ndarray | None,
) -> dict[str, float]:  # fmt: skip
    """The figures that need a reference."""
    output, reference = (_scored(x, mask_HW) for x in (output_HW3, reference_HW3))
    gain = (output * reference).sum() / (output * output).sum().clamp_min(1)
    scored = np.ones(photo_HW3.shape[:2], bool) if mask_HW is None else mask_HW
    colour_HW, chroma_HW, bands_HW2 = _colour_maps(output_HW3, reference_HW3)
    clipped_HW3 = photo_HW3 >= BLOWN
    lost_HW, border_HW = clipped_HW3.any(2) & scored, _borders(clipped_HW3) & scored
    edges, wanted = (_mean_where(bands_HW2[..., k], border_HW) for k in range(2))
    return {
        "psnr": _psnr(output, reference),
        "ssim": _ssim(output_HW3, reference_HW3, mask_HW),
        "lpips": _lpips(output_HW3, reference_HW3) if mask_HW is None else math.nan,
        "colour": float(colour_HW[scored].mean()),
        "gain_psnr": _psnr((gain * output).clamp(0, 255), reference),
        "lost_colour": _mean_where(colour_HW, lost_HW),
        "lost_chroma": _mean_where(chroma_HW, lost_HW),
        "bands": edges / wanted if wanted > 0 else math.nan,
        "grey": _grey(output_HW3, reference_HW3, clipped_HW3.all(2) & scored),
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


def lpips_lacks() -> str:
    """What LPIPS lacks here, in words; "" where it can be told."""
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    return "" if weights.is_file() else f"AlexNet's weights, {weights}"


def _lpips(output_HW3: np.ndarray, reference_HW3: np.ndarray) -> float:
    """Zhang et al. 2018, by torchmetrics, which carries the learned layers; nan without AlexNet."""
    if lpips_lacks() or min(output_HW3.shape[:2]) < LPIPS_SIDE:
        return math.nan
    with torch.inference_mode():
        return float(_alexnet()(to_float(output_HW3), to_float(reference_HW3)))


@functools.cache
def _alexnet() -> Callable[[Tensor, Tensor], Tensor]:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity as Lpips

    return Lpips(net_type="alex", normalize=True)  # pictures in [0, 1]


def _colour_maps(
    output_HW3: np.ndarray, reference_HW3: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CIEDE2000 (H,W), distance in a*b* (H,W), colour edges of both (H,W,2), float32."""
    height, width = output_HW3.shape[:2]
    colour, chroma = np.empty((2, height, width), np.float32)
    edges = np.empty((height, width, 2), np.float32)
    rows = max(1, COLOUR_PIXELS // width)
    for top in range(0, height, rows):
        strip, one_more = slice(top, top + rows), slice(top, top + rows + 1)
        labs = [rgb2lab(x[one_more]).astype(np.float32) for x in (output_HW3, reference_HW3)]
        output, reference = (lab[:rows] for lab in labs)
        colour[strip] = deltaE_ciede2000(output, reference)
        chroma[strip] = np.linalg.norm((output - reference)[..., 1:], axis=2)
        for k, lab in enumerate(labs):
            edges[strip, :, k] = _colour_edges(lab)[:rows]
    return colour, chroma, edges


def _colour_edges(lab_HW3: np.ndarray) -> np.ndarray:
    """Distance in a*b* from the neighbours below and to the right, summed.  H,W."""
    chroma = lab_HW3[..., 1:]
    down = np.linalg.norm(np.diff(chroma, axis=0, append=chroma[-1:]), axis=2)
    return down + np.linalg.norm(np.diff(chroma, axis=1, append=chroma[:, -1:]), axis=2)


def _borders(clipped_HW3: np.ndarray) -> np.ndarray:
    """Pixels within BORDER of where clipping of a channel begins.  bool H,W."""
    clipped = torch.from_numpy(clipped_HW3).permute(2, 0, 1)[None].float()
    side = 2 * BORDER + 1
    spread, shrunk = (F.max_pool2d(x, side, 1, BORDER) for x in (clipped, -clipped))
    return ((spread + shrunk) > 0).any(1)[0].numpy()


def _grey(output_HW3: np.ndarray, reference_HW3: np.ndarray, blown_HW: np.ndarray) -> float:
    """Share of blown pixels that come out grey though the reference's are white."""
    output, reference = (luma(to_float(x) * 255)[0, 0].numpy() for x in (output_HW3, reference_HW3))
    return _mean_where(output < WHITE, blown_HW & (reference >= WHITE))


def _noise(photo_HW3: np.ndarray, output_HW3: np.ndarray, mask_HW: np.ndarray | None) -> float:
    """Fine grain of the output where the photo is dark."""
    photo, output = (luma(to_float(x) * 255) for x in (photo_HW3, output_HW3))
    dark_HW = (photo[0, 0] < SHADOW).numpy()
    grain = (output - box_mean(output, 1)).abs()[0, 0].numpy()
    return _mean_where(grain, dark_HW if mask_HW is None else dark_HW & mask_HW)


def _mean_where(values_HW: np.ndarray, where_HW: np.ndarray) -> float:
    """nan where there are too few pixels to speak of."""
    return float(values_HW[where_HW].mean()) if where_HW.sum() >= FEWEST else math.nan
