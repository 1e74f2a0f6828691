"""What the corrector sees of a photo, the same in training and when correcting.

FastSAM features come from the photo after the mean-luma rule, since dark photos give poor
masks (docs/method.md 2); photo and features are then brought to the working size together.
"""

# B batch, H W pixels, h w feature cells

from typing import Any

import numpy as np

from evenlight.stages.arrays import Array, namespace
from evenlight.stages.photos.canvas import Extent
from evenlight.stages.pixels import fit, resize, to_float
from evenlight.stages.priors import tone

RULE_FAMILY = "film"


def rule_corrected(photo_HW3: np.ndarray, xp: Any = None) -> np.ndarray:
    """The photo re-exposed to mean luma 119/255 by the film curve.  uint8 H,W,3 in and out.

    xp: what it is worked out in: numpy, or torch (None).
    """
    strength = tone.rule_strength(resize(to_float(photo_HW3, xp), 64, 64), RULE_FAMILY)
    return tone.on_bytes(RULE_FAMILY, photo_HW3, float(strength[0]), xp)


def photo_at_working_size(photo_HW3: np.ndarray, size: int, xp: Any = None) -> Array:
    """The photo (uint8) at the working size: float 1,3,H,W in [0, 1], rounded to 8 bits."""
    extent = Extent.of(photo_HW3.shape[0], photo_HW3.shape[1], size)
    photo = resize(to_float(photo_HW3, xp), extent.height, extent.width)
    xp = namespace(photo)
    return xp.round(xp.clip(photo, 0, 1) * 255) / 255


def at_working_size(
    photo_HW3: np.ndarray, proto_1chw: Array, p3_1chw: Array, size: int
) -> tuple[Array, Array, Array]:
    """The photo as `photo_at_working_size`, proto and P3 at the same."""
    photo = photo_at_working_size(photo_HW3, size, namespace(proto_1chw))
    height, width = photo.shape[2:]
    return (
        photo,
        resize(proto_1chw, height // 4, width // 4),
        resize(p3_1chw, height // 8, width // 8),
    )


def padded(
    photo_B3HW: Array, proto_B32hw: Array, p3_BChw: Array, given_B1HW: Array, multiple: int
) -> tuple[Array, Array, Array, Array]:
    """The same, the sides of the photo brought to multiples (of 8) by repeating its edges."""
    height, width = (side + -side % multiple for side in photo_B3HW.shape[2:])
    return (
        fit(photo_B3HW, height, width),
        fit(proto_B32hw, height // 4, width // 4),
        fit(p3_BChw, height // 8, width // 8),
        fit(given_B1HW, height, width),
    )
