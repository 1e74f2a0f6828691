"""Samples of 16 bits, out of PNG by OpenCV and out of TIFF by tifffile; each misreads some kinds.

What they misread without a word (measured, OpenCV 5.0): OpenCV turns TIFFs by their orientation
tag, scrambles separate planes, makes gray with alpha 8-bit, and drops the transparency of gray
PNGs. tifffile without imagecodecs refuses LZW.
"""

import io
import struct
import zlib

import cv2
import numpy as np
import tifffile

from evenlight.cache.errors import PhotoError
from evenlight.stages.photo_headers import Header, png_chunks
from evenlight.stages.tiff_tags import Ifd

_PLAIN, _PACKBITS, _DEFLATE = 1, 32773, (8, 32946)  # TIFF compressions
# OpenCV prints what the PhotoError already says.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def png_samples(data: bytes) -> np.ndarray:
    """HxWxC uint16, C = 1, 3 or 4; gray with alpha comes as RGBA."""
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16:
        raise PhotoError("the PNG decoder gave up: its image data is damaged or incomplete")
    if stored.ndim == 3:
        return stored[..., [2, 1, 0, 3][: stored.shape[2]]]  # OpenCV keeps BGR
    transparent = [content for kind, content in png_chunks(data) if kind == b"tRNS"]
    if transparent:  # one gray value is clear; OpenCV leaves it out for gray only
        (clear,) = struct.unpack_from(">H", transparent[0])
        alpha = np.where(stored == clear, 0, 65535).astype(np.uint16)
        return np.stack([stored, stored, stored, alpha], axis=2)
    return stored[..., None]


def tiff_samples(data: bytes, header: Header) -> tuple[np.ndarray, tuple[str, ...]]:
    """HxWxC uint16, C = 1 to 4, alpha last and not premultiplied, zero black; and notes."""
    first = header.ifds[0]
    notes: tuple[str, ...] = ()
    photometric = first.number(262)
    if photometric not in (0, 1, 2):
        raise PhotoError(f"a 16-bit TIFF of photometric {photometric}; only gray and RGB are read")
    samples = _read_tiff(data, header)
    samples = samples.astype(np.uint16, copy=False).reshape(header.height, header.width, -1)
    if photometric == 0:
        samples = 65535 - samples  # white is zero
    colours = 3 if photometric == 2 else 1
    extra = first.numbers(338)
    if samples.shape[2] > colours and (not extra or extra[0] not in (1, 2)):
        notes = ("channels that are neither colour nor alpha were not kept",)
        samples = samples[..., :colours]
    samples = samples[..., : colours + 1]
    if samples.shape[2] > colours and extra[0] == 1:
        samples = _unmultiplied(samples)
    return samples, notes


def _read_tiff(data: bytes, header: Header) -> np.ndarray:
    """Samples as stored.  OpenCV where it is right and a compression could swell in memory (its
    libtiff stops at the end of a strip), tifffile elsewhere."""
    first = header.ifds[0]
    compression = (first.numbers(259) or (_PLAIN,))[0]
    channels = (first.numbers(277) or (1,))[0]
    planar = (first.numbers(284) or (1,))[0] == 2 and channels > 1
    if compression not in (_PLAIN, _PACKBITS) and not planar and channels in (1, 3, 4):
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if samples is None or samples.dtype != np.uint16:
            raise PhotoError("the TIFF decoder gave up: its image data is damaged or incomplete")
        return samples if samples.ndim == 2 else samples[..., [2, 1, 0, 3][: samples.shape[2]]]
    if compression in _DEFLATE:
        _refuse_swelling(data, first, 2 * header.width * header.height * channels)
    elif compression not in (_PLAIN, _PACKBITS):
        raise PhotoError(
            f"a 16-bit TIFF of compression {compression} with {channels} channels"
            f"{' in separate planes' * planar} cannot be read: save it uncompressed"
        )
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        samples = tiff.pages[0].asarray()
    return np.moveaxis(samples, 0, 2) if planar else samples


def _refuse_swelling(data: bytes, ifd: Ifd, limit: int) -> None:
    """Raise PhotoError when a deflated strip is damaged or inflates past limit bytes, without
    inflating it further: tifffile would."""
    strips = zip(
        ifd.numbers(273) or ifd.numbers(324), ifd.numbers(279) or ifd.numbers(325), strict=True
    )
    for offset, count in strips:
        inflater = zlib.decompressobj()
        inflater.decompress(data[offset : offset + count], limit + 1_000_000)  # tiles overhang
        if not inflater.eof:
            raise PhotoError("its compressed data is damaged, or larger than its header says")


def _unmultiplied(samples: np.ndarray) -> np.ndarray:
    """Colours stored as colour times alpha, divided by it again.  HxWxC uint16, alpha last."""
    alpha = samples[..., -1:].astype(np.float64)
    colours = np.minimum(samples[..., :-1] * (65535 / np.maximum(alpha, 1)), 65535)
    return np.concatenate([np.rint(colours).astype(np.uint16), samples[..., -1:]], axis=2)
