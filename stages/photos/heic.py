"""HEIC photos, as phones write them, through libheif.  The only importer of pillow_heif.

An optional extra: its wheel carries x265, and HEVC is covered by patents in some countries.
"""

import io

import numpy as np

from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.find import HEIC_NEEDED, heic_is_installed
from evenlight.stages.photos.libvips import Opened


def open_heic(data: bytes) -> Opened:
    """Read the header of a HEIC file; its main image counts, turned as the file says.

    Raises PhotoError when pillow_heif is not installed; libheif's errors pass through.
    """
    if not heic_is_installed():
        raise PhotoError(HEIC_NEEDED)
    import pillow_heif

    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)
    deep, channels = file.mode.endswith(";16"), len(file.mode.partition(";")[0])
    blocks = {"exif": "exif", "icc": "icc_profile", "xmp": "xmp"}

    def samples() -> np.ndarray:
        return np.array(file).reshape(file.size[1], file.size[0], channels)

    return Opened(
        width=file.size[0],
        height=file.size[1],
        bits=16 if deep else 8,
        colours="gray" if channels <= 2 else "rgb",
        channels=channels,
        pages=len(file),
        embedded={kind: file.info[name] for kind, name in blocks.items() if file.info.get(name)},
        samples=samples,
    )


def heic_bytes(
    samples: np.ndarray, quality: int, exif: bytes | None, icc: bytes | None, xmp: bytes | None
) -> bytes:
    """A HEIC file, 4:2:0 as phones write and show it.  samples: HxWx3 or HxWx4, uint8, or uint16
    of which 10 bits are kept."""
    import pillow_heif

    mode = ("RGB" if samples.shape[2] == 3 else "RGBA") + (";16" if samples.itemsize == 2 else "")
    height, width = samples.shape[:2]
    file = pillow_heif.from_bytes(mode, (width, height), np.ascontiguousarray(samples).tobytes())
    if icc is not None:
        file.info.update(icc_profile=icc, icc_profile_type="prof")
    stream = io.BytesIO()
    file.save(stream, quality=quality, exif=exif, xmp=xmp)
    return stream.getvalue()
