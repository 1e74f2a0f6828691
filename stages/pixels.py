"""Operations on pixels that both stages share: luma, resizing, the guided filter.

The guided filter smooths a map without crossing the edges of a guide picture.

He, Sun, Tang, "Guided Image Filtering" (2013); applying low-resolution coefficients at full
resolution: He, Sun, "Fast Guided Filter" (2015).
"""

# B batch, C map channels, H W pixels

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

LUMA_WEIGHTS = (0.299, 0.587, 0.114)  # Rec. 601, as cv2 and JPEG


def luma(rgb_B3HW: Tensor) -> Tensor:
    """Rec. 601 luma of sRGB-encoded pixels.  B,3,H,W -> B,1,H,W, same range."""
    weights = rgb_B3HW.new_tensor(LUMA_WEIGHTS).view(1, 3, 1, 1)
    return (rgb_B3HW * weights).sum(1, keepdim=True)


def box_mean(x_BCHW: Tensor, radius: int) -> Tensor:
    """Mean over a (2 radius + 1) square window, cut off at the borders.  Same shape."""
    size = 2 * radius + 1
    mean = F.avg_pool2d(x_BCHW, (size, 1), 1, (radius, 0), count_include_pad=False)
    return F.avg_pool2d(mean, (1, size), 1, (0, radius), count_include_pad=False)


def coefficients(
    guide_B1HW: Tensor, map_BCHW: Tensor, *, radius: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Local lines a, b with map = a * guide + b.

    guide: float32 in [0, 1].  map: any range.  radius: pixels.  eps: variance of the guide
    below which an edge is smoothed away.  Returns a, b of the shape of the map.
    """
    radius = min(radius, (min(guide_B1HW.shape[-2:]) - 1) // 2)
    guide_mean = box_mean(guide_B1HW, radius)
    map_mean = box_mean(map_BCHW, radius)
    covariance = box_mean(guide_B1HW * map_BCHW, radius) - guide_mean * map_mean
    variance = box_mean(guide_B1HW * guide_B1HW, radius) - guide_mean * guide_mean
    a = covariance / (variance.clamp_min(0) + eps)
    b = map_mean - a * guide_mean
    return box_mean(a, radius), box_mean(b, radius)


def guided_filter(
    guide_B1HW: Tensor, map_BCHW: Tensor, *, radius: int, eps: float = 1e-3
) -> Tensor:
    """The map smoothed along the guide.  Shapes and ranges as `coefficients`."""
    a, b = coefficients(guide_B1HW, map_BCHW, radius=radius, eps=eps)
    return a * guide_B1HW + b


def resize(x_BCHW: Tensor, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """Resize without aligned corners; antialiased where it shrinks (bilinear, bicubic)."""
    if x_BCHW.shape[-2:] == (height, width):
        return x_BCHW
    if mode == "nearest":
        return F.interpolate(x_BCHW, (height, width), mode="nearest")
    shrinks = height < x_BCHW.shape[-2] or width < x_BCHW.shape[-1]
    return F.interpolate(x_BCHW, (height, width), mode=mode, align_corners=False, antialias=shrinks)


def to_float(rgb_u8_HW3: np.ndarray | Tensor) -> Tensor:
    """uint8 H,W,3 (numpy or torch) -> float32 1,3,H,W in [0, 1]."""
    return torch.as_tensor(rgb_u8_HW3).permute(2, 0, 1)[None].float() / 255


def to_bytes(rgb_13HW: Tensor) -> Tensor:
    """float 1,3,H,W in [0, 1] -> uint8 H,W,3, rounded."""
    return (rgb_13HW[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8)
