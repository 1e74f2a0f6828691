"""The pictures of a report: photos shrunk, thumbnails, and what priors say as overlays."""

import base64
import colorsys
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import cv2
import numpy as np
from PIL import Image

from evenlight.cache.files import make_folder
from evenlight.stages.photos.decode import Photo
from evenlight.stages.photos.encode import encoded, in_format, jpeg_bytes
from evenlight.stages.photos.metadata import Metadata
from evenlight.stages.priors.tones import STRENGTHS

THUMB = 240  # pixels, the longer side
QUALITY = 88
# RGB at equal steps from the least to the greatest value: report.html shows the same
DARKER_TO_BRIGHTER = ((30, 100, 255), (128, 128, 128), (255, 150, 0))
UNSURE_TO_SURE = ((60, 0, 90), (220, 60, 90), (255, 230, 90))


class Pictures:
    """Where the pictures of a page go: into a folder beside it; None: into the page itself."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._kept: set[str] = set()
        if folder is not None:
            make_folder(folder)

    def keep(self, name: str, data: bytes) -> str:
        """The address of a picture, for the page.  data: a JPEG (name.jpg) or PNG (name.png)."""
        if self.folder is None:
            kind = "png" if name.endswith(".png") else "jpeg"
            return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        (self.folder / name).write_bytes(data)
        self._kept.add(name)
        return quote(f"{self.folder.name}/{name}")

    def remove_others(self) -> None:
        """Take away pictures that an earlier page left in the folder."""
        for path in self.folder.glob("[0-9]" * 6 + "-*.*") if self.folder else ():
            if path.name not in self._kept:
                path.unlink()


def shrunk(photo: Photo, side: int) -> Photo:
    """The photo with a longer side of so many pixels at most."""
    height, width = photo.pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return photo
    size = max(1, round(width * scale)), max(1, round(height * scale))
    pixels, alpha = (
        None if x is None else cv2.resize(x, size, interpolation=cv2.INTER_AREA)
        for x in (photo.pixels, photo.alpha)
    )
    assert pixels is not None
    return replace(photo, pixels=pixels, alpha=alpha)


def jpeg(photo: Photo) -> bytes:
    """The photo as a JPEG in its own colours: of its metadata the profile alone is kept."""
    bare = replace(photo, metadata=Metadata(icc=photo.metadata.icc))
    return encoded(in_format(bare, "jpeg", QUALITY), QUALITY)


def halves(before: Photo, after: Photo) -> tuple[bytes, float]:
    """A JPEG whose left half is the photo before, its right half after; and the mean difference
    of the two, of 255."""
    one, other = (shrunk(photo, THUMB).pixels for photo in (before, after))
    one, other = (x if x.dtype == np.uint8 else (x >> 8).astype(np.uint8) for x in (one, other))
    middle = one.shape[1] // 2
    both = np.concatenate([one[:, :middle], other[:, middle:]], axis=1)
    return jpeg_bytes(both, QUALITY), float(np.abs(one.astype(float) - other).mean())


def overlays(priors: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """PNGs of a photo's regions (uint8), t_map and confidence (float), each H,W of any size.
    Where the strength is 0, and outside of all regions, they are transparent."""
    t_map, confidence = (priors[name].astype(np.float32) for name in ("t_map", "confidence"))
    steps = np.arange(256)
    apart = np.abs(steps / 127.5 - 1) ** 0.5  # of a strength from 0
    return {
        "regions": _png(priors["regions"], _region_colours(), np.minimum(steps, 1)),
        "strength": _png((t_map / STRENGTHS[-1] + 1) * 127.5, _blended(DARKER_TO_BRIGHTER), apart),
        "confidence": _png(confidence * 255, _blended(UNSURE_TO_SURE), np.ones(256)),
    }


def _png(levels_HW: np.ndarray, palette_256x3: np.ndarray, opacity_256: np.ndarray) -> bytes:
    """levels, palette: in [0, 255].  opacity: in [0, 1]."""
    image = Image.fromarray(np.rint(levels_HW).clip(0, 255).astype(np.uint8))
    image.putpalette(palette_256x3.astype(np.uint8).tobytes())
    stream = io.BytesIO()
    image.save(stream, "png", transparency=(opacity_256 * 255).astype(np.uint8).tobytes())
    return stream.getvalue()


def _region_colours() -> np.ndarray:
    """One colour per label, neighbours far apart, label 0 black.  256,3 in [0, 255]."""
    hues = (label * 0.618034 % 1 for label in range(1, 256))
    return np.array([(0, 0, 0), *(colorsys.hsv_to_rgb(hue, 0.65, 0.95) for hue in hues)]) * 255


def _blended(stops: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """Colours from the first stop to the last.  256,3 in [0, 255]."""
    at, where = np.linspace(0, 1, 256), np.linspace(0, 1, len(stops))
    return np.stack([np.interp(at, where, channel) for channel in zip(*stops, strict=True)], 1)
