"""What the corrector sees of a photo, the same in training and when correcting.

FastSAM features come from the photo after the mean-luma rule, since dark photos give poor
masks (docs/method.md 2); photo and features are then brought to the working size together.
"""

# B batch, H W pixels, h w feature cells

import numpy as np
from torch import Tensor

from evenlight.stages.photos.canvas import Extent
from evenlight.stages.pixels import resize, to_float
from evenlight.stages.priors import tone

RULE_FAMILY = "film"


def rule_corrected(photo_HW3: np.ndarray) -> np.ndarray:
    """The photo re-exposed to mean luma 119/255 by the film curve.  uint8 H,W,3 in and out."""
    strength = tone.rule_strength(resize(to_float(photo_HW3), 64, 64), RULE_FAMILY)
    return tone.on_bytes(RULE_FAMILY, photo_HW3, float(strength[0]))


def at_working_size(
    photo_HW3: np.ndarray, proto_1chw: Tensor, p3_1chw: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Photo (float 1,3,H,W in [0, 1], rounded to 8 bits), proto and P3 at the working size."""
    extent = Extent.of(photo_HW3.shape[0], photo_HW3.shape[1], size)
    height, width = extent.height, extent.width
    photo = (resize(to_float(photo_HW3), height, width).clamp(0, 1) * 255).round() / 255
    return (
        photo,
        resize(proto_1chw, height // 4, width // 4),
        resize(p3_1chw, height // 8, width // 8),
    )
