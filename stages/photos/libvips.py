"""The door to libvips, which reads JPEG, PNG, TIFF, WebP, GIF, AVIF.  The only importer of pyvips.

The loader is chosen by the caller from the file's signature: the one that guesses would let any of
libvips' many loaders meet hostile bytes.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from evenlight.cache.errors import PhotoError

# Read when libvips starts: processes share the cores; the PhotoError says what warnings would.
os.environ.update(VIPS_CONCURRENCY="1", VIPS_WARNING="0")
import pyvips

pyvips.cache_set_max(0)  # it would keep the pixels of former photos
pyvips.block_untrusted_set(True)
# At every decode libvips would call Python to log: a signal that arrives meanwhile is handled, and
# lost, inside that call, so that Ctrl-C does not end a run.
pyvips._remove_log_handler()

_LOADERS = {
    "jpeg": pyvips.Image.jpegload_buffer,
    "png": pyvips.Image.pngload_buffer,
    "tiff": pyvips.Image.tiffload_buffer,
    "webp": pyvips.Image.webpload_buffer,
    "gif": pyvips.Image.gifload_buffer,
    "avif": pyvips.Image.heifload_buffer,  # its build has AV1, and no HEVC
}
_COLOURS = {"b-w": "gray", "grey16": "gray", "srgb": "rgb", "rgb": "rgb", "rgb16": "rgb",
            "cmyk": "cmyk", "scrgb": "rgb"}  # fmt: skip
_BLOCKS = {"exif": "exif-data", "icc": "icc-profile-data", "xmp": "xmp-data"}
_BITS = {"uchar": 8, "ushort": 16, "float": 32}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A photo whose header is read and whose pixels are not.

    width, height: pixels, as stored.  bits: per sample, as decoded: 8, 16, or 32 for floats.
    colours: gray, rgb or cmyk.  channels: colours and what follows them.  pages: images in the
    file.  embedded: of formats whose container only a decoder knows, the blocks "exif", "icc" and
    "xmp" that are there.  samples: decodes; HxWxC uint8, uint16 or float32 of linear light, alpha
    not premultiplied; raises PhotoError.
    """

    width: int
    height: int
    bits: int
    colours: str
    channels: int
    pages: int = 1
    embedded: Mapping[str, bytes] = field(default_factory=dict)
    samples: Callable[[], np.ndarray]


def open_photo(data: bytes, format: str) -> Opened:
    """Read the header of a file of a known format: jpeg, png, tiff, webp, gif or avif.

    The first page of several is opened.  Raises PhotoError when the header is damaged, or the
    samples are of a kind that no photo has.
    """
    try:
        # "error": what is cut short or fails a checksum is refused; "warning" would refuse TIFFs
        # for a description without its final zero.
        image = _LOADERS[format](data, fail_on="error", access="sequential")
    except pyvips.Error as error:
        raise _refusal(error) from error
    if image.format not in _BITS or image.interpretation not in _COLOURS:
        raise PhotoError(
            f"its samples are of type {image.format} and colour space {image.interpretation}; only"
            " unsigned integers of up to 8 or of 16 bits, or floats, gray, RGB or CMYK, can be read"
        )

    def samples() -> np.ndarray:
        try:
            decoded = image.numpy()
        except pyvips.Error as error:
            if format != "jpeg" or image.get("jpeg-multiscan"):
                raise _refusal(error) from error
            decoded = _with_end_marker(data, error)
        return decoded.reshape(image.height, image.width, image.bands)

    return Opened(
        width=image.width,
        height=image.height,
        bits=_BITS[image.format],
        colours=_COLOURS[image.interpretation],
        channels=image.bands,
        pages=image.get("n-pages") if image.get_typeof("n-pages") else 1,
        embedded={
            kind: image.get(name) for kind, name in _BLOCKS.items() if image.get_typeof(name)
        },
        samples=samples,
    )


def _with_end_marker(data: bytes, error: pyvips.Error) -> np.ndarray:
    """The pixels of a JPEG of one scan that ends with its last pixel (some phones' panoramas): the
    decoder looks for the marker behind it.  Where pixels are missing it warns, and that refuses."""
    try:
        return pyvips.Image.jpegload_buffer(data + b"\xff\xd9", fail_on="warning").numpy()
    except pyvips.Error:
        raise _refusal(error) from error


def _refusal(error: pyvips.Error) -> Exception:
    lines = [line.strip() for line in str(error.detail).splitlines() if line.strip()]
    reason = lines[-1] if lines else "its data ends early"
    if "out of memory" in reason:
        return MemoryError(reason)
    reason = reason.partition(": ")[2] or reason  # without the name of libvips' own part
    return PhotoError(f"the file is truncated or damaged: {reason}")
