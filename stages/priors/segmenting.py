"""From a FastSAM's answers to the region map of a photo: what torch's and an exported one share.

Shapes: C channels, H W pixels, h w = H/4 W/4, N boxes, K masks.
The caller gives photos after the mean-luma rule; nothing here corrects exposure.  No torch.
"""

from abc import ABC, abstractmethod
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from evenlight.stages.arrays import Array, like, namespace, sigmoid, to_numpy
from evenlight.stages.pixels import enlarged, fit, to_float
from evenlight.stages.priors.protocols import Regions
from evenlight.stages.priors.region_map import distinct, on_edges, region_map
from evenlight.stages.settings import RegionSettings

BOX_IOU = 0.8  # boxes nearer than this are one; masks decide the rest
MAX_MASKS = 300  # as ultralytics' max_det
EDGE_SNAP = 0.03  # boxes ending this near the frame's edge (share of the side) reach it


class Segmenting(ABC):
    """Regions and features of photos, from what a network finds.

    settings: how masks are chosen.  fingerprint: hex sha256 of what decides its answers.
    p3_channels: C of the P3 features.  xp: whose arrays its network takes: numpy's, or torch's
    (None).
    """

    settings: RegionSettings
    fingerprint: str
    p3_channels: int
    xp: Any = None

    @abstractmethod
    def features(self, rgb_B3HW: Array) -> tuple[Array, Array]:
        """Prototypes B,32,h,w at /4 and P3 features B,C,h,w at /8.

        rgb: sRGB in [0, 1], H and W multiples of 32.
        """

    @abstractmethod
    def boxes(self, rgb_13HW: Array) -> tuple[Array, Array, Array, Array]:
        """Prototypes 32,h,w; boxes N,4 (x1 y1 x2 y2, pixels), their scores N and the coefficients
        N,32 of their masks.  rgb: as in `features`."""

    def segment(self, rgb_HW3: NDArray[np.uint8], extent: tuple[int, int] | None = None) -> Regions:
        """Region map and features of one photo.

        rgb_HW3: uint8 sRGB, H and W multiples of 8.  extent: (height, width) of the true photo
        in the top-left corner, multiples of 8; outside it labels and features are 0.
        """
        height, width, _ = rgb_HW3.shape
        h, w = extent or (height, width)
        assert not any(side % 8 for side in (height, width, h, w)), (rgb_HW3.shape, extent)
        labels = np.zeros((height, width), np.uint8)
        labels[:h, :w] = self.regions(rgb_HW3[:h, :w])
        photo = to_float(np.ascontiguousarray(rgb_HW3[:h, :w]), self.xp)
        proto_132hw, p3_1Chw = self.features(fit(photo, h + -h % 32, w + -w % 32))
        return Regions(
            labels=labels,
            proto=_on_canvas(proto_132hw[0], (h // 4, w // 4), (height // 4, width // 4)),
            p3=_on_canvas(p3_1Chw[0], (h // 8, w // 8), (height // 8, width // 8)),
        )

    def regions(self, rgb_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Region map of a photo of any size, HxW uint8, borders on the photo's edges."""
        labels_hw, _ = self.painted(rgb_HW3)
        labels = _resized(labels_hw, rgb_HW3.shape[:2], cv2.INTER_NEAREST)
        return on_edges(labels, np.ascontiguousarray(rgb_HW3))

    def painted(self, rgb_HW3: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
        """Region map before its borders are refined, and the share that some mask covers.

        Masks are found at long side `settings.side`, whatever the photo's own size: the network
        knows objects at the sizes it was trained on.  The map has half that side.
        """
        height, width, _ = rgb_HW3.shape
        scale = self.settings.side / max(height, width)
        h, w = (max(round(side * scale / 32) * 32, 32) for side in (height, width))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        small = _resized(rgb_HW3, (h, w), method)
        proto_32hw, boxes_N4, scores_N, coefficients_N32 = self.boxes(to_float(small, self.xp))
        boxes_N4 = snapped(boxes_N4, h, w)
        kept = surest(boxes_N4, scores_N)
        masks_Khw = to_numpy(masks(proto_32hw, coefficients_N32[kept], boxes_N4[kept]))
        return region_map(
            *distinct(masks_Khw, to_numpy(scores_N[kept]), iou=self.settings.iou),
            min_area=self.settings.min_area,
            max_regions=self.settings.max_regions,
        )


def snapped(boxes_N4: Array, h: int, w: int) -> Array:
    """Boxes clipped to the frame, sides near its edge moved onto it."""
    xp, limit = namespace(boxes_N4), like([w, h, w, h], boxes_N4)
    boxes = xp.minimum(xp.clip(boxes_N4, 0, None), limit)
    boxes = xp.where(boxes < EDGE_SNAP * limit, 0, boxes)
    return xp.where(boxes > (1 - EDGE_SNAP) * limit, limit, boxes)


def surest(boxes_N4: Array, scores_N: Array) -> list[int]:
    """Boxes that overlap no surer one by more than BOX_IOU, the surest first."""
    xp = namespace(boxes_N4)
    sized_N4 = xp.concat([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], 1)
    kept = cv2.dnn.NMSBoxes(sized_N4.tolist(), scores_N.tolist(), 0.0, BOX_IOU)
    return [int(box) for box in kept[:MAX_MASKS]]


def masks(proto_32hw: Array, coefficients_K32: Array, boxes_K4: Array) -> Array:
    """Probability of each mask inside its box, 0 outside: Kx2hx2w, half the photo's sides."""
    xp = namespace(proto_32hw)
    height, width = (2 * side for side in proto_32hw.shape[1:])
    proto = enlarged(proto_32hw[None], height, width)[0]
    found = sigmoid((coefficients_K32 @ proto.reshape(len(proto), -1)).reshape(-1, height, width))
    x1, y1, x2, y2 = (boxes_K4 / 2).T[..., None]
    columns, rows = (
        xp.arange(side, dtype=xp.float32, device=proto.device) + 0.5 for side in (width, height)
    )
    inside = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None]
    return found * inside


def _resized(
    pixels: NDArray[np.uint8], size: tuple[int, ...], interpolation: int
) -> NDArray[np.uint8]:
    resized = cv2.resize(np.ascontiguousarray(pixels), size[::-1], interpolation=interpolation)
    return np.asarray(resized, np.uint8)


def _on_canvas(
    x_Chw: Array, extent: tuple[int, int], canvas: tuple[int, int]
) -> NDArray[np.float16]:
    features = np.zeros((len(x_Chw), *canvas), np.float16)
    features[:, : extent[0], : extent[1]] = to_numpy(x_Chw[:, : extent[0], : extent[1]])
    return features
