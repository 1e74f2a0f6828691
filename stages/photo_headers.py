"""What a photo file says about itself before anything is decoded: format, size, wholeness.

Decoders allocate what a header asks for and forgive files that end early (OpenCV returns grey
rows for half a JPEG), so both are settled here from the bytes alone, with no image library.
Formats: JPEG (ITU T.81), PNG (W3C), TIFF 6.0 and BigTIFF, WebP (RFC 9649), NumPy arrays (NEP 1).
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np

from evenlight.cache.errors import PhotoError
from evenlight.stages.tiff_tags import Ifd, read_ifds, refuse_missing_strips

MIN_SIDE = 16  # pixels; nothing smaller has regions
_MIN_BYTES = 32  # every format needs more, and headers are read without further care
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A marker inside JPEG scan data: 0xFF not followed by stuffing, a restart marker or fill.
_SCAN_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True, kw_only=True)
class Header:
    """format: jpeg, png, tiff, webp or array.  Sizes in pixels, before EXIF orientation.  bits: per
    sample, as stored.  gray: of a PNG.  ifds: of a TIFF, all of them, the photo's first."""

    format: str
    width: int
    height: int
    bits: int = 8
    gray: bool = False
    ifds: tuple[Ifd, ...] = ()


def read_header(data: bytes, name: str) -> Header:
    """The header of a photo file held in memory; content decides, the suffix of name is not asked.

    Raises PhotoError, whose sentence does not repeat the name, when this is no photo.
    """
    if not data:
        raise PhotoError("the file is empty (0 bytes)")
    if len(data) < _MIN_BYTES:
        raise PhotoError(f"the file has {len(data)} bytes: it is truncated, or no photo")
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg_header(data)
        if data.startswith(PNG_SIGNATURE):
            return _png_header(data)
        if data[:4] in _TIFF_MAGICS:
            return _tiff_header(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp_header(data)
        if data.startswith(b"\x93NUMPY"):
            return _array_header(data)
    except (struct.error, IndexError) as error:
        raise PhotoError("the file ends inside its header: it is truncated") from error
    raise PhotoError(_what_it_is_instead(data, name))


def refuse_size(header: Header, max_megapixels: float) -> None:
    """Raise PhotoError when a photo is above max_megapixels (10^6 pixels) or too small to use."""
    size = f"{header.width} x {header.height} pixels"
    if header.width * header.height > max_megapixels * 1e6:
        raise PhotoError(
            f"the header says {size}, over the limit of {max_megapixels:g} megapixels:"
            " raise photo.max_megapixels to use it"
        )
    if min(header.width, header.height) < MIN_SIDE:
        raise PhotoError(f"the photo is {size}; each side must be at least {MIN_SIDE}")


def refuse_damage(data: bytes, header: Header) -> None:
    """Raise PhotoError when the container ends early, fails its checksums or holds an animation.

    PNG: every chunk's CRC.  JPEG: segments up to the end-of-image marker.  WebP: chunks within
    the RIFF length within the file.  TIFF: every tag and every strip or tile within the file.
    """
    try:
        if header.format == "jpeg":
            _walk_jpeg(data)
        elif header.format == "png":
            _check_png(data)
        elif header.format == "tiff":
            refuse_missing_strips(header.ifds)
        elif header.format == "webp":
            _check_webp(data)
    except (struct.error, IndexError) as error:
        raise PhotoError("the file ends early: it is truncated") from error


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(type, content) of each chunk up to IEND, CRC checked; raises PhotoError on damage."""
    at = len(PNG_SIGNATURE)
    while True:
        if at + 12 > len(data):
            raise PhotoError("the file ends before its IEND chunk: it is truncated")
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data):
            raise PhotoError(f"the file ends inside a {_printable(kind)} chunk: it is truncated")
        (crc,) = struct.unpack_from(">I", data, end)
        if zlib.crc32(memoryview(data)[at + 4 : end]) != crc:
            raise PhotoError(f"the checksum of a {_printable(kind)} chunk is wrong: it is damaged")
        yield kind, data[at + 8 : end]
        if kind == b"IEND":
            return
        at = end + 4


def png_pixels_only(data: bytes) -> bytes:
    """The PNG without ancillary chunks but transparency: decoders act on some (orientation) and
    fail on others (text that inflates to megabytes), and neither is theirs to decide."""
    kept = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
    return PNG_SIGNATURE + b"".join(
        png_chunk(kind, content) for kind, content in png_chunks(data) if kind in kept
    )


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk with its length and checksum."""
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return b"".join((struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)))


def webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, length) of each chunk inside the RIFF length."""
    (riff,) = struct.unpack_from("<I", data, 4)
    if riff + 8 > len(data):
        raise PhotoError(
            f"the file has {len(data)} bytes but its header promises {riff + 8}: it is truncated"
        )
    at = 12
    while at + 8 <= riff + 8:
        (length,) = struct.unpack_from("<I", data, at + 4)
        if at + 8 + length > riff + 8:
            raise PhotoError(f"a {_printable(data[at : at + 4])} chunk ends past the file")
        yield data[at : at + 4], at + 8, length
        at += 8 + length + length % 2


def _jpeg_header(data: bytes) -> Header:
    for marker, at in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width = struct.unpack_from(">BHH", data, at + 2)
            if bits != 8:
                raise PhotoError(f"a JPEG of {bits} bits per sample; only 8 can be read")
            return Header(format="jpeg", width=width, height=height)
        if marker in (0xD9, 0xDA):
            raise PhotoError("a JPEG without a frame header: it is damaged")
    raise PhotoError("the JPEG ends before its frame header: it is truncated")


def _walk_jpeg(data: bytes) -> None:
    if not any(marker == 0xD9 for marker, _ in _jpeg_segments(data)):
        raise PhotoError("the JPEG has no end-of-image marker: it is truncated")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, offset of its length field) in file order; walking over lengths keeps the
    end-of-image marker of an embedded thumbnail from passing for the photo's own."""
    at = 2
    while at + 2 <= len(data):
        if data[at] != 0xFF:
            raise PhotoError(f"byte {at} of the JPEG should begin a marker: it is damaged")
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        yield marker, at + 2
        if marker == 0xD9:
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # no length field
            at += 2
            continue
        (length,) = struct.unpack_from(">H", data, at + 2)
        at += 2 + length
        if marker == 0xDA:
            found = _SCAN_MARKER.search(data, at)
            if found is None:
                return
            at = found.start()


def _png_header(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise PhotoError("a PNG that does not begin with its IHDR chunk: it is damaged")
    width, height, bits, colour = struct.unpack_from(">IIBB", data, 16)
    gray = colour in (0, 4)
    return Header(format="png", width=width, height=height, bits=bits, gray=gray)


def _check_png(data: bytes) -> None:
    for kind, content in png_chunks(data):
        if kind == b"acTL" and struct.unpack_from(">I", content)[0] > 1:
            raise PhotoError("the file is an animation; only still photos can be used")


def _tiff_header(data: bytes) -> Header:
    ifds = tuple(read_ifds(data))
    first = ifds[0]
    if sum(first.numbers(254)) & 1:
        raise PhotoError("the first image of the TIFF is a thumbnail: is this a raw file?")
    bits = first.numbers(258) or (1,)
    formats = first.numbers(339) or (1,)
    if len(set(bits)) != 1 or set(formats) - {1, 4} or bits[0] not in (1, 2, 4, 8, 16):
        raise PhotoError(
            f"a TIFF of {'/'.join(map(str, bits))} bits per sample (sample format"
            f" {formats[0]}); only unsigned integers of up to 8 or of 16 bits can be read"
        )
    return Header(
        format="tiff", width=first.number(256), height=first.number(257), bits=bits[0], ifds=ifds
    )


def _webp_header(data: bytes) -> Header:
    kind, at = data[12:16], 20
    if kind == b"VP8X":
        width = int.from_bytes(data[at + 4 : at + 7], "little") + 1
        height = int.from_bytes(data[at + 7 : at + 10], "little") + 1
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, at + 6))
    elif kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, at + 1)
        width, height = (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    else:
        raise PhotoError(f"a WebP that begins with a {_printable(kind)} chunk: it is damaged")
    return Header(format="webp", width=width, height=height)


def _check_webp(data: bytes) -> None:
    kinds = [kind for kind, _, _ in webp_chunks(data)]
    if b"ANIM" in kinds or b"ANMF" in kinds:
        raise PhotoError("the file is an animation; only still photos can be used")
    if not {b"VP8 ", b"VP8L"} & set(kinds):
        raise PhotoError("a WebP without image data: it is truncated")


def _array_header(data: bytes) -> Header:
    stream = BytesIO(data)
    try:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except ValueError as error:
        raise PhotoError(f"an array whose header cannot be read: {error}") from error
    if dtype not in (np.uint8, np.uint16) or not _is_image_shape(shape):
        raise PhotoError(
            f"an array of {dtype} and shape {shape}; expected uint8 or uint16 of"
            " HxW, HxWx1, HxWx3 or HxWx4"
        )
    expected = stream.tell() + int(np.prod(shape)) * dtype.itemsize
    if len(data) != expected:
        raise PhotoError(f"an array of {len(data)} bytes, its header promises {expected}")
    return Header(format="array", width=shape[1], height=shape[0], bits=8 * dtype.itemsize)


def _is_image_shape(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))


def _what_it_is_instead(data: bytes, name: str) -> str:
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        what = "an HTML page"
    elif not any(data):
        what = f"{len(data)} zero bytes"
    elif start.startswith((b"gif8", b"bm", b"%pdf", b"{", b"<?xml", b"<svg")):
        what = f"another kind of file (it begins with {_printable(data[:8])})"
    elif data[4:8] == b"ftyp":
        what = f"a {_printable(data[8:12]).strip()} file (HEIF, AVIF or video)"
    else:
        what = f"no photo (it begins with {_printable(data[:8])})"
    suffix = name.rpartition(".")[2].lower() if "." in name else "a photo"
    return f"named {suffix}, but holds {what}; JPEG, PNG, TIFF and WebP can be read"


def _printable(raw: bytes) -> str:
    return raw.decode("latin-1").encode("unicode_escape").decode("ascii")
