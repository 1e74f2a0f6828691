"""Photos in: decoded and turned upright.

Content decides the format, by its first bytes; the pixels come from libvips (libvips.py). What a
header claims is checked before anything of its size is allocated.
"""

import io
import itertools
import struct
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageCms, JpegImagePlugin

from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.colour import (
    LINEAR,
    Transfer,
    refuse_hdr,
    transfer_of_png,
    transfer_of_profile,
)
from evenlight.stages.photos.containers import (
    PNG_SIGNATURE,
    jpeg_segment,
    jpeg_segments,
    png_chunks,
    printable,
)
from evenlight.stages.photos.exif import Ifd, read_ifds
from evenlight.stages.photos.gamut import inside_srgb, primaries_of
from evenlight.stages.photos.heic import open_heic
from evenlight.stages.photos.libvips import Opened, open_photo
from evenlight.stages.photos.memory import free_memory
from evenlight.stages.photos.metadata import Metadata, read_metadata
from evenlight.stages.photos.plain import open_array, open_bmp
from evenlight.stages.photos.tables import Tables, tables_of_profile

Image.MAX_IMAGE_PIXELS = None  # Pillow's limit would only overrule photo.max_megapixels
# Pillow says so of metadata that a note speaks of.
warnings.filterwarnings("ignore", message="(Corrupt EXIF|Metadata Warning|Truncated File Read)")

READABLE = "JPEG, PNG, TIFF, WebP, GIF, BMP, AVIF and HEIC"
MIN_SIDE = 16  # pixels; nothing smaller has regions
_MIN_BYTES = 32  # every format needs more
_MAX_CHANNELS = 16
_COPIES = 4  # of the samples that are held at once: decoded, corrected, and twice while encoding
_MANY_SCANS, _MAX_SCANNED = 50, 10**10  # cameras write 10 scans; pixels x scans, some 2 seconds
_COLOUR_CHANNELS = {"gray": 1, "rgb": 3, "cmyk": 4}
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_STARTS = {  # first bytes: format; others say what they are further on
    b"\xff\xd8\xff": "jpeg",
    PNG_SIGNATURE: "png",
    b"\x93NUMPY": "array",
    **dict.fromkeys((b"GIF87a", b"GIF89a"), "gif"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "tiff"),
}


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the file was compressed, for writing it back alike."""

    jpeg_tables: dict[int, list[int]] | None = None
    jpeg_subsampling: int = 0  # as Pillow: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0
    lossless: bool = True  # of WebP
    # Where its primaries are not sRGB's: `gamut.primaries_of`.
    primaries: np.ndarray | None = None
    # Where the file's numbers are not sRGB-encoded: its curves, and the type of its samples.
    transfer: Transfer | Tables | None = None
    stored: np.dtype | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Photo:
    """pixels: HxWx3 RGB, sRGB-encoded, uint8 or uint16 as bit_depth (8 or 16) says, upright.
    The curve is sRGB's; primaries stay those of the ICC profile (metadata.icc).
    alpha: HxW of the same type, not premultiplied, or None.  gray: stored with one channel.
    format: jpeg, png, tiff, webp, gif, bmp, avif, heic, or array for an image of an HDF5 file."""

    pixels: np.ndarray
    bit_depth: int
    format: str
    alpha: np.ndarray | None = None
    gray: bool = False
    metadata: Metadata = field(default_factory=Metadata)
    encoding: Encoding = field(default_factory=Encoding)

    @property
    def in_srgb(self) -> np.ndarray:
        """The pixels as they are in sRGB's primaries: HxWx3, uint16 where theirs are others."""
        primaries = self.encoding.primaries
        return self.pixels if primaries is None else inside_srgb(self.pixels, primaries)


def decode(data: bytes, name: str, *, max_megapixels: float = 250) -> Photo:
    """Decode one whole photo file, or array from PhotoSource.read_bytes; content decides.

    The first page of a TIFF counts, and the first frame of a GIF or AVIF. CMYK becomes sRGB. Notes
    in the metadata say what a copy of the photo will lack.
    Raises PhotoError with a sentence that leaves the name for the caller to add: no photo,
    truncated, damaged, an animation, above max_megapixels or too large for the memory that is free
    (from the header, before anything is allocated), or under 16 pixels a side. Damage inside a
    JPEG scan cannot be seen.
    """
    format = _format_of(data, name)
    try:
        ifds = tuple(read_ifds(data)) if format == "tiff" else ()
        opened = _OPENERS[format](data) if format in _OPENERS else open_photo(data, format)
        _refuse_size(opened, max_megapixels)
        _refuse_animation(data, opened, format)
        _refuse_scans(data, opened, format)
        metadata, orientation = read_metadata(data, format, ifds, opened.embedded)
        for note in _losses(data, opened, format, ifds):
            metadata = metadata.noting(note)
        photo = _photo(opened, format, metadata, _alpha_follows(opened, ifds))
        primaries = primaries_of(metadata) if opened.colours == "rgb" else None
        encoding = replace(_encoding(data, format), primaries=primaries)
        photo = _srgb_encoded(replace(photo, encoding=encoding), data, ifds)
    except (PhotoError, MemoryError):
        raise
    # Hostile bytes lead to any error of the libraries: struct.error, KeyError, SyntaxError ...
    except Exception as error:
        raise PhotoError(f"the {format.upper()} decoder gave up: {error}") from error
    return replace(
        photo,
        pixels=_upright(photo.pixels, orientation),
        alpha=None if photo.alpha is None else _upright(photo.alpha, orientation),
    )


def _format_of(data: bytes, name: str) -> str:
    if not data:
        raise PhotoError("the file is empty (0 bytes)")
    if len(data) < _MIN_BYTES:
        raise PhotoError(f"the file has {len(data)} bytes: it is truncated, or no photo")
    for start, format in _STARTS.items():
        if data.startswith(start):
            return format
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith(b"BM") and data[6:10] == bytes(4):
        return "bmp"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
        if b"avif" in brands or b"avis" in brands:
            return "avif"
        if brands[:4] in _HEIC_BRANDS:
            return "heic"
    raise PhotoError(_what_it_is_instead(data, name))


def _refuse_size(opened: Opened, max_megapixels: float) -> None:
    size = f"{opened.width} x {opened.height} pixels"
    if opened.width * opened.height > max_megapixels * 1e6:
        raise PhotoError(
            f"the header says {size}, over the limit of {max_megapixels:g} megapixels:"
            " raise photo.max_megapixels to use it"
        )
    if min(opened.width, opened.height) < MIN_SIDE:
        raise PhotoError(f"the photo is {size}; each side must be at least {MIN_SIDE}")
    if opened.channels > _MAX_CHANNELS:
        raise PhotoError(f"a photo of {opened.channels} channels; at most {_MAX_CHANNELS} are read")
    needed = opened.width * opened.height * opened.channels * opened.bits // 8 * _COPIES
    free = free_memory()
    if needed > free:
        raise PhotoError(
            f"{size} need {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
        )


def _refuse_animation(data: bytes, opened: Opened, format: str) -> None:
    frames = opened.pages if format == "webp" else 1
    if format == "png":
        ahead = itertools.takewhile(lambda chunk: chunk[0] != b"IDAT", png_chunks(data))
        frames = next((struct.unpack_from(">I", it)[0] for kind, it in ahead if kind == b"acTL"), 1)
    if frames > 1:
        raise PhotoError("the file is an animation; only still photos can be used")


def _refuse_scans(data: bytes, opened: Opened, format: str) -> None:
    """A progressive JPEG of 100 kB can hold 1,000 scans that each go over every pixel."""
    scans = data.count(b"\xff\xda") if format == "jpeg" else 1
    pixels = opened.width * opened.height
    if scans > _MANY_SCANS and scans * pixels > _MAX_SCANNED:
        raise PhotoError(
            f"it has {scans} scans of {opened.width} x {opened.height} pixels: more than any camera"
            " writes, and a minute's work"
        )


def _losses(data: bytes, opened: Opened, format: str, ifds: tuple[Ifd, ...]) -> list[str]:
    """What a copy of the photo will lack that its file has."""
    notes = []
    pages = opened.pages
    if format == "tiff":  # the photo again, only smaller, is no page
        whole = [
            ifd for ifd in ifds if 256 in ifd.entries and not (ifd.numbers(254) or (0,))[0] & 1
        ]
        pages = len({ifd.page for ifd in whole})
    if pages > 1 and format in ("gif", "avif", "tiff", "heic"):
        kind = "pages" if format == "tiff" else "frames"
        notes.append(f"the first of its {pages} {kind} was kept, the others were not")
    if format in ("avif", "heic") and (b"hdrgainmap" in data or b"\0\0\0\0tmap" in data):
        notes.append("its HDR gain map was not kept")
    if format == "gif":
        notes.append("a GIF holds 256 colours: the result was brought back to as many")
    if format == "avif" and opened.bits > 8:
        notes.append("of its bits per sample 8 were kept")
    return notes


def _alpha_follows(opened: Opened, ifds: tuple[Ifd, ...]) -> bool:
    """Whether the channel behind the colours is alpha; a TIFF can hold any other."""
    if not ifds:
        return True
    extra = ifds[0].numbers(338)
    return bool(extra) and extra[0] in (1, 2)


def _photo(opened: Opened, format: str, metadata: Metadata, alpha_follows: bool) -> Photo:
    samples, count = opened.samples(), _COLOUR_CHANNELS[opened.colours]
    alpha = None
    if opened.channels > count and alpha_follows:
        alpha = samples[..., count].copy()
    elif opened.channels > count:
        metadata = metadata.noting("channels that are neither colour nor alpha were not kept")
    pixels = samples[..., :count]
    if opened.colours == "cmyk":
        pixels, metadata = _cmyk_to_srgb(pixels, metadata)
    elif opened.colours == "gray":
        pixels = pixels.repeat(3, axis=2)
    return Photo(
        pixels=np.ascontiguousarray(pixels),
        bit_depth=opened.bits,
        format=format,
        alpha=alpha,
        gray=opened.colours == "gray",
        metadata=metadata,
    )


def _srgb_encoded(photo: Photo, data: bytes, ifds: tuple[Ifd, ...]) -> Photo:
    """The photo with its own curve exchanged for sRGB's, where it has another; 16 bits then."""
    photo, transfer = _transfer(photo, data)
    if transfer is None:
        return photo
    pixels, alpha, notes = photo.pixels, photo.alpha, photo.metadata
    stored = pixels.dtype
    if stored.kind == "f":
        stored = np.dtype(np.float16 if ifds[0].numbers(258)[0] == 16 else np.float32)
        if (pixels > 1).any():
            notes = notes.noting("light above white was cut off")
    if alpha is not None and alpha.dtype != np.uint16:
        scale = 65535 if alpha.dtype.kind == "f" else 257
        alpha = np.rint(np.clip(alpha * np.float32(scale), 0, 65535)).astype(np.uint16)
    return replace(
        photo,
        pixels=transfer.to_srgb(pixels),
        alpha=alpha,
        bit_depth=16,
        metadata=notes,
        encoding=replace(photo.encoding, transfer=transfer, stored=stored),
    )


def _transfer(photo: Photo, data: bytes) -> tuple[Photo, Transfer | Tables | None]:
    """The curves of the photo's numbers, None for sRGB's; HDR is refused."""
    if photo.format in ("avif", "heic") and photo.bit_depth > 8:
        at = data.find(b"colrnclx")
        refuse_hdr(int.from_bytes(data[at + 10 : at + 12], "big") if at >= 0 else 0)
    if photo.format == "png" and any(kind == b"cICP" for kind, _ in photo.metadata.png):
        return photo, transfer_of_png(photo.metadata.png)
    if photo.pixels.dtype.kind == "f":
        return photo, LINEAR
    if photo.metadata.icc is None:
        return photo, transfer_of_png(photo.metadata.png)
    try:
        tables = tables_of_profile(photo.metadata.icc)
        if tables is not None and not tables.lead_back:
            return _without_profile(photo, tables), None
        return photo, tables or transfer_of_profile(photo.metadata.icc)
    except PhotoError as error:
        return replace(photo, metadata=photo.metadata.noting(str(error))), None


def _without_profile(photo: Photo, tables: Tables) -> Photo:
    """The photo in sRGB, since its profile only leads there."""
    pixels = tables.to_srgb(photo.pixels)
    if photo.bit_depth == 8:
        pixels = np.rint(pixels / np.float32(257)).astype(np.uint8)
    metadata = replace(photo.metadata, icc=None)
    note = "its colours were converted to sRGB: its profile has no table that leads back"
    return replace(photo, pixels=pixels, metadata=metadata.noting(note))


def _cmyk_to_srgb(cmyk: np.ndarray, metadata: Metadata) -> tuple[np.ndarray, Metadata]:
    """Through the photo's own profile where it has a usable one."""
    if cmyk.dtype != np.uint8:
        raise PhotoError("CMYK of 16 bits per sample cannot be read: save it with 8")
    image = Image.fromarray(np.ascontiguousarray(cmyk), "CMYK")
    how = "without a profile, approximately"
    rgb = None
    if metadata.icc is not None:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(metadata.icc))
            srgb = ImageCms.createProfile("sRGB")
            rgb = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
            how = "through its profile"
        except (ImageCms.PyCMSError, OSError):
            how = "approximately, its profile being damaged"
    converted = np.array(rgb if rgb is not None else image.convert("RGB"))
    return converted, replace(metadata, icc=None).noting(f"CMYK was converted to sRGB {how}")


def _encoding(data: bytes, format: str) -> Encoding:
    if format == "webp":
        return Encoding(lossless=b"VP8L" in data[12:4096])
    if format != "jpeg":
        return Encoding()
    image = _bare_header(data)
    subsampling = JpegImagePlugin.get_sampling(image)
    if image.mode == "L" or (image.mode == "RGB" and subsampling in (0, 1, 2)):
        return Encoding(jpeg_tables=image.quantization, jpeg_subsampling=max(subsampling, 0))
    return Encoding()


def _bare_header(data: bytes) -> JpegImagePlugin.JpegImageFile:
    """The JPEG's tables and frame header as Pillow reads them, without its pixels and metadata
    (it is slow on the megabytes of metadata that a hostile file can hold)."""
    kept = [
        jpeg_segment(marker, content)
        for marker, content in jpeg_segments(data)
        if marker == 0xDB or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC))
    ]
    bare = b"\xff\xd8" + b"".join(kept) + jpeg_segment(0xDA, b"")
    image = Image.open(io.BytesIO(bare), formats=("JPEG",))
    assert isinstance(image, JpegImagePlugin.JpegImageFile)
    return image


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (EXIF 2.32, table 6).  HxW or HxWxC."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


_OPENERS = {"array": open_array, "bmp": open_bmp, "heic": open_heic}


def _what_it_is_instead(data: bytes, name: str) -> str:
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        what = "an HTML page"
    elif not any(data):
        what = f"{len(data)} zero bytes"
    elif start.startswith((b"%pdf", b"{", b"<?xml", b"<svg", b"8bps")):
        what = f"another kind of file (it begins with {printable(data[:8])})"
    elif data[4:8] == b"ftyp":
        what = f"a {printable(data[8:12]).strip()} file (video?)"
    else:
        what = f"no photo (it begins with {printable(data[:8])})"
    suffix = name.rpartition(".")[2].lower() if "." in name else "a photo"
    return f"named {suffix}, but holds {what}; {READABLE} can be read"
