"""The one geometry: how a photo of any size lies on the square canvas of the store.

Photo, region map, features and strength maps are all cut and padded by the same Extent, so that
they cannot drift apart.
"""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class Extent:
    """Size in pixels of a photo on the canvas; the geometry of photo, region map and t map.

    height and width are multiples of 8, so maps at 1/4 and 1/8 slice exactly; the longer one is
    size, the side of the square canvas.
    """

    height: int
    width: int
    size: int

    @classmethod
    def of(cls, height: int, width: int, size: int) -> "Extent":
        """Extent of a photo of height x width pixels.  Smaller photos are enlarged, so that
        features see scenes at one scale.  size: a multiple of 8."""
        assert size % 8 == 0, size
        scale = size / max(height, width)

        def fit(side: int) -> int:
            return min(size, max(8, int(side * scale / 8 + 0.5) * 8))

        return cls(fit(height), fit(width), size)

    def slices(self, stride: int = 1) -> tuple[slice, slice]:
        """Rows and columns of the photo in a map of the canvas at 1/stride (1, 2, 4 or 8)."""
        return slice(0, self.height // stride), slice(0, self.width // stride)

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """pixels: HxW or HxWxC, uint8, uint16 or float32.  Returns height x width, same type:
        area averages when shrinking, cubic when enlarging."""
        if pixels.shape[:2] == (self.height, self.width):
            return pixels
        shrinks = max(pixels.shape[:2]) >= self.size
        how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        return cv2.resize(pixels, (self.width, self.height), interpolation=how)

    def pad(self, pixels: np.ndarray, stride: int = 1) -> np.ndarray:
        """pixels: (height/stride) x (width/stride) [xC].  Returns the canvas at 1/stride, the
        photo top left and its last row and column repeated over the rest."""
        side = self.size // stride
        rest = [(0, side - pixels.shape[0]), (0, side - pixels.shape[1])]
        return np.pad(pixels, rest + [(0, 0)] * (pixels.ndim - 2), mode="edge")


def working(rgb: np.ndarray, size: int) -> np.ndarray:
    """A photo at working size, unpadded.  rgb: HxWx3 uint8 or uint16, sRGB-encoded; resized in its
    own depth.  Returns hxwx3 uint8, h and w multiples of 8, the longer one size."""
    resized = Extent.of(rgb.shape[0], rgb.shape[1], size).resize(rgb)
    if resized.dtype == np.uint16:
        resized = ((resized.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 is 255
    return np.ascontiguousarray(resized)


def place(rgb: np.ndarray, size: int) -> tuple[np.ndarray, Extent]:
    """A photo on the canvas.  rgb: as in working.  Returns (size x size x 3 uint8, extent)."""
    extent = Extent.of(rgb.shape[0], rgb.shape[1], size)
    return extent.pad(working(rgb, size)), extent
