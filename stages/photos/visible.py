"""What of a photo counts when it is looked at: not hidden colours, not the border of a scan."""

import cv2
import numpy as np

from evenlight.stages.photos.canvas import working

BLOCK = 8  # side of the patches that stand for invisible pixels
SEED = 0
BORDER_TONES = (4, 251)  # of 255: a border is blacker or whiter, all of it
LONGEST_BORDER = 0.35  # of a side; more is no border
EDGE = 12  # of 255: how far the picture differs from its border, where it begins
EDGE_SHARE = 0.6  # of the picture's first row that must differ so: objects on a ground do not


def visible(pixels_HW3: np.ndarray, alpha_HW: np.ndarray | None, size: int) -> np.ndarray:
    """The photo at working size (canvas.working), as priors and network should see it.

    pixels, alpha: uint8 or uint16.  Where alpha hides the photo, colours stand that nobody sees:
    patches of the visible ones take their place, as dark and as bright as those, so that a cut-out
    over black and one over white are one photo.  A photo without a visible pixel stays.
    """
    if alpha_HW is None:
        return working(pixels_HW3, size)
    shown = alpha_HW > np.iinfo(alpha_HW.dtype).max // 2
    if shown.all() or not shown.any():
        return working(pixels_HW3, size)
    mean = pixels_HW3[shown].mean(0).astype(pixels_HW3.dtype)  # what borders blend with
    small = working(np.where(shown[..., None], pixels_HW3, mean), size)
    mask = cv2.resize(shown.astype(np.uint8), small.shape[1::-1], interpolation=cv2.INTER_AREA) > 0
    colours = small[mask]
    rows, columns = (-(-side // BLOCK) for side in small.shape[:2])
    picked = np.random.default_rng(SEED).integers(0, len(colours), (rows, columns))
    patches = colours[picked].repeat(BLOCK, 0).repeat(BLOCK, 1)[: small.shape[0], : small.shape[1]]
    return np.where(mask[..., None], small, patches)


def inside_border(rgb_HW3: np.ndarray) -> np.ndarray:
    """The picture inside a black or white border on all sides, or on two: the rest says nothing
    about its exposure.  uint8 in; a view of it out, the whole where there is no such border.

    An object on a white ground has no border: a border ends along a line, all along it.
    """
    top, bottom = _border(rgb_HW3), _border(rgb_HW3[::-1])
    rows = slice(top, rgb_HW3.shape[0] - bottom) if top and bottom else slice(None)
    turned = rgb_HW3[rows].transpose(1, 0, 2)
    left, right = _border(turned), _border(turned[::-1])
    columns = slice(left, turned.shape[0] - right) if left and right else slice(None)
    return rgb_HW3[rows, columns]


def _border(rgb_HW3: np.ndarray) -> int:
    """Rows of the border at the top; 0 where there is none."""
    black, white = BORDER_TONES
    most = int(LONGEST_BORDER * len(rgb_HW3))
    strip = rgb_HW3[: most + 1]
    levels = strip.reshape(len(strip), -1)
    dark, bright = levels.max(1) <= black, levels.min(1) >= white
    uniform = dark if dark[0] else bright
    depth = int(uniform.argmin()) if not uniform.all() else 0
    if not depth:
        return 0
    # the first row may be half border, half picture: the one after it is picture
    begins = strip[min(depth + 1, most)].astype(np.int16) - strip[0].astype(np.int16)
    differs = (np.abs(begins).max(1) > EDGE).mean()
    return depth + 1 if differs >= EDGE_SHARE else 0
