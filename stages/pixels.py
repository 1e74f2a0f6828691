"""Operations on pixels that both stages share: luma, resizing, the guided filter.

The guided filter smooths a map without crossing the edges of a guide picture: it fits local lines
over the guide.  All work on torch tensors and on NumPy arrays (arrays.py).

He, Sun, Tang, "Guided Image Filtering" (2013); applying low-resolution coefficients at full
resolution: He, Sun, "Fast Guided Filter" (2015).
"""

# B batch, C map channels, H W pixels

import functools
from typing import Any

import cv2
import numpy as np

from evenlight.stages.arrays import Array, like, namespace

LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # Rec. 601, as cv2 and JPEG


def luma(rgb_B3HW: Array) -> Array:
    """Rec. 601 luma of sRGB-encoded pixels.  B,3,H,W -> B,1,H,W, same range."""
    weights = like(LUMA_WEIGHTS, rgb_B3HW).reshape(1, 3, 1, 1)
    return (rgb_B3HW * weights).sum(1, keepdims=True)


def box_mean(x_BCHW: Array, radius: int) -> Array:
    """Mean over a (2 radius + 1) square window, cut off at the borders.  Same shape."""
    size = 2 * radius + 1
    if isinstance(x_BCHW, np.ndarray):
        sums, counts = (
            cv2.boxFilter(x, -1, (size, size), normalize=False, borderType=cv2.BORDER_CONSTANT)
            for x in (_interleaved(x_BCHW), np.ones(x_BCHW.shape[2:], np.float32))
        )
        return _planes(sums, x_BCHW.shape) / counts
    from torch.nn import functional as F

    mean = F.avg_pool2d(x_BCHW, (size, 1), 1, (radius, 0), count_include_pad=False)
    return F.avg_pool2d(mean, (1, size), 1, (0, radius), count_include_pad=False)


def coefficients(
    guide_B1HW: Array, map_BCHW: Array, *, radius: int, eps: float
) -> tuple[Array, Array]:
    """Local lines a, b with map = a * guide + b.

    guide: float32 in [0, 1].  map: any range.  radius: pixels.  eps: variance of the guide
    below which an edge is smoothed away.  Returns a, b of the shape of the map.
    """
    xp = namespace(guide_B1HW)
    radius = min(radius, (min(guide_B1HW.shape[-2:]) - 1) // 2)
    guide_mean = box_mean(guide_B1HW, radius)
    map_mean = box_mean(map_BCHW, radius)
    covariance = box_mean(guide_B1HW * map_BCHW, radius) - guide_mean * map_mean
    variance = box_mean(guide_B1HW * guide_B1HW, radius) - guide_mean * guide_mean
    a = covariance / (xp.clip(variance, 0, None) + eps)
    b = map_mean - a * guide_mean
    return box_mean(a, radius), box_mean(b, radius)


def resize(x_BCHW: Array, height: int, width: int, mode: str = "bilinear") -> Array:
    """Resize without aligned corners; antialiased where it shrinks (bilinear, bicubic).

    A NumPy array: float32, bilinear alone.
    """
    if x_BCHW.shape[-2:] == (height, width):
        return x_BCHW
    if isinstance(x_BCHW, np.ndarray):
        assert mode == "bilinear", mode
        rows, columns = _triangles(x_BCHW.shape[2], height), _triangles(x_BCHW.shape[3], width)
        return rows @ x_BCHW @ columns.T
    from torch.nn import functional as F

    if mode == "nearest":
        return F.interpolate(x_BCHW, (height, width), mode="nearest")
    shrinks = height < x_BCHW.shape[-2] or width < x_BCHW.shape[-1]
    return F.interpolate(x_BCHW, (height, width), mode=mode, align_corners=False, antialias=shrinks)


def enlarged(x_1CHW: Array, height: int, width: int) -> Array:
    """Resize bilinearly, never antialiased."""
    if isinstance(x_1CHW, np.ndarray):
        pixels = cv2.resize(_interleaved(x_1CHW), (width, height), interpolation=cv2.INTER_LINEAR)
        return _planes(pixels, (*x_1CHW.shape[:2], height, width))
    from torch.nn import functional as F

    return F.interpolate(x_1CHW, (height, width), mode="bilinear", align_corners=False)


def pooled(x_BCHW: Array, cell: int) -> Array:
    """Means of whole square cells, of so many pixels a side."""
    if isinstance(x_BCHW, np.ndarray):
        rows, columns = (side // cell for side in x_BCHW.shape[2:])
        whole = x_BCHW[..., : rows * cell, : columns * cell]
        return whole.reshape(*x_BCHW.shape[:2], rows, cell, columns, cell).mean((3, 5))
    from torch.nn import functional as F

    return F.avg_pool2d(x_BCHW, cell)


def mixed(one: Array, other: Array, share: Array) -> Array:
    """From one (share 0) to the other (1)."""
    xp = namespace(one)
    return one + share * (other - one) if xp is np else xp.lerp(one, other, share)


def fit(x_BCHW: Array, height: int, width: int) -> Array:
    """Crop at the bottom and right to the size, or repeat the last row and column up to it."""
    x_BCHW = x_BCHW[..., :height, :width]
    bottom, right = height - x_BCHW.shape[2], width - x_BCHW.shape[3]
    if not bottom and not right:
        return x_BCHW
    if isinstance(x_BCHW, np.ndarray):
        return np.pad(x_BCHW, [(0, 0), (0, 0), (0, bottom), (0, right)], mode="edge")
    from torch.nn import functional as F

    return F.pad(x_BCHW, (0, right, 0, bottom), mode="replicate")


def to_float(rgb_u8_HW3: Array, xp: Any = None) -> Array:
    """uint8 H,W,3 (NumPy or torch) -> float32 1,3,H,W in [0, 1], of xp: numpy, or torch (None)."""
    if xp is np:
        return np.ascontiguousarray(rgb_u8_HW3.transpose(2, 0, 1), np.float32)[None] / 255
    import torch

    return torch.as_tensor(rgb_u8_HW3).permute(2, 0, 1)[None].float() / 255


def to_bytes(rgb_13HW: Array) -> Array:
    """float 1,3,H,W in [0, 1] -> uint8 H,W,3, rounded."""
    xp = namespace(rgb_13HW)
    levels = xp.round(xp.clip(xp.moveaxis(rgb_13HW[0], 0, 2), 0, 1) * 255)
    return levels.astype(np.uint8) if xp is np else levels.to(xp.uint8)


@functools.lru_cache(maxsize=128)
def _triangles(source: int, target: int) -> np.ndarray:
    """Bilinear resizing along one axis as a matrix, float32 target,source: triangles that reach
    from sample to sample of the coarser side, which antialiases."""
    step = source / target
    centres = (np.arange(target)[:, None] + 0.5) * step
    weights = 1 - np.abs(np.arange(source) + 0.5 - centres) / max(step, 1.0)
    weights = weights.clip(0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _interleaved(x_1CHW: np.ndarray) -> np.ndarray:
    """As OpenCV has it, H,W,C."""
    return np.ascontiguousarray(x_1CHW[0].transpose(1, 2, 0))


def _planes(x_HWC: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Back from OpenCV, which drops an axis of one channel."""
    x_HWC = x_HWC.reshape(shape[2], shape[3], shape[1])
    return np.ascontiguousarray(x_HWC.transpose(2, 0, 1))[None]
