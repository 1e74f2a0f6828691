"""Metadata of photos: what is kept from the file, made to fit pixels that stand upright."""

import io
import re
import struct
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image, ImageFile, TiffImagePlugin

from evenlight.cache.errors import PhotoError
from evenlight.stages.photo_headers import png_chunks, webp_chunks
from evenlight.stages.tiff_tags import Ifd, read_ifds

ORIENTATION = 274
_MAX_ICC = 16 << 20  # bytes; printers' profiles reach a few MB
# PNG chunks that are copied as they are: colour without a profile, and words about the photo.
_PNG_COPIED = (b"sRGB", b"gAMA", b"cHRM", b"cICP", b"tEXt", b"zTXt", b"iTXt")
_XMP_KEYWORD = b"XML:com.adobe.xmp"
# IFD0 tags of a TIFF that describe the photo, not how the file stores it.
_TIFF_KEPT = (269, 270, 271, 272, 285, 305, 306, 315, 316, 33432, 34665, 34853, 18246, 18249)
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:=[\"']|>)\s*)[1-8]")
_PAIRS = ((256, 257), (40962, 40963))  # width and height, in IFD0 and in the Exif IFD


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """exif: a TIFF block without the "Exif" prefix, its Orientation 1 and its thumbnail gone.
    icc: ICC profile.  xmp: packet, orientation 1.  dpi: dots per inch (x, y).  png: copied chunks
    (type, content).  notes: sentences about what could not be kept."""

    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    png: tuple[tuple[bytes, bytes], ...] = ()
    notes: tuple[str, ...] = field(default=())


def read_metadata(data: bytes, format: str, ifds: tuple[Ifd, ...]) -> tuple[Metadata, int]:
    """Metadata of a whole photo file, and the EXIF orientation (1 to 8) of the pixels as stored.

    The orientation in the metadata is already 1: the caller turns the pixels.  Damaged metadata
    never costs the photo; a note says what was dropped.
    """
    readers = {"jpeg": _of_jpeg, "png": _of_png, "webp": _of_webp}
    if format == "array":
        return Metadata(), 1
    metadata = _of_tiff(data, ifds[0]) if format == "tiff" else readers[format](data)
    orientation = 1
    if metadata.exif is not None:
        try:
            orientation, exif = upright_exif(metadata.exif)
            metadata = replace(metadata, exif=exif)
        except (PhotoError, struct.error):
            note = "its EXIF block is damaged and was not kept"
            metadata = replace(metadata, exif=None, notes=(*metadata.notes, note))
    if metadata.xmp is not None and orientation != 1:  # where EXIF is silent, viewers heed neither
        metadata = replace(metadata, xmp=_XMP_ORIENTATION.sub(rb"\g<1>1", metadata.xmp))
    return metadata, orientation


def upright_exif(exif: bytes) -> tuple[int, bytes]:
    """(orientation as it was, the block for upright pixels): Orientation 1, no thumbnail, and
    width and height exchanged where turning exchanges them.

    exif: a TIFF block.  Raises PhotoError or struct.error when it is damaged.
    """
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        raise PhotoError("no TIFF header")
    block = bytearray(exif)
    ifds = read_ifds(exif)
    stored = ifds[0].numbers(ORIENTATION)
    orientation = stored[0] if stored and 1 <= stored[0] <= 8 else 1
    if stored:
        struct.pack_into(ifds[0].order + "H", block, ifds[0].entries[ORIENTATION].at, 1)
    for ifd in ifds:
        for wide, high in _PAIRS:
            if orientation >= 5 and ifd.page == 0 and wide in ifd.entries and high in ifd.entries:
                _exchange(block, ifd.entries[wide].where, ifd.entries[high].where)
    thumbnails = [ifd for ifd in ifds if ifd.page == 1]
    struct.pack_into(ifds[0].order + "I", block, ifds[0].next_at, 0)
    return orientation, _without_thumbnail(block, thumbnails)


def _exchange(block: bytearray, first: int, second: int) -> None:
    """Swap type, count and value of two entries and leave their tags where they are."""
    a, b = slice(first + 2, first + 12), slice(second + 2, second + 12)
    block[a], block[b] = block[b], block[a]


def _without_thumbnail(block: bytearray, thumbnails: list[Ifd]) -> bytes:
    for ifd in thumbnails:
        start, length = ifd.numbers(513), ifd.numbers(514)
        if start and length and start[0] + length[0] <= len(block):
            block[start[0] : start[0] + length[0]] = bytes(length[0])
            if start[0] + length[0] == len(block):
                del block[start[0] :]
    return bytes(block)


def _of_jpeg(data: bytes) -> Metadata:
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    return _of_info(image)


def _of_webp(data: bytes) -> Metadata:
    found = {kind: data[at : at + length] for kind, at, length in webp_chunks(data)}
    return Metadata(exif=_bare(found.get(b"EXIF")), icc=found.get(b"ICCP"), xmp=found.get(b"XMP "))


def _of_info(image: ImageFile.ImageFile) -> Metadata:
    dpi = image.info.get("dpi")
    return Metadata(
        exif=_bare(image.info.get("exif")),
        icc=image.info.get("icc_profile"),
        xmp=image.info.get("xmp"),
        dpi=(float(dpi[0]), float(dpi[1])) if dpi else None,
    )


def _of_png(data: bytes) -> Metadata:
    metadata = Metadata()
    copied, notes = [], []
    for kind, content in png_chunks(data):
        if kind == b"eXIf":
            metadata = replace(metadata, exif=_bare(content))
        elif kind == b"iCCP":
            icc = _inflate(content.partition(b"\0")[2][1:])
            metadata = replace(metadata, icc=icc)
            if icc is None:
                notes.append("its colour profile is damaged and was not kept")
        elif kind == b"iTXt" and content.startswith(_XMP_KEYWORD + b"\0\0"):
            metadata = replace(metadata, xmp=content[len(_XMP_KEYWORD) + 3 :].split(b"\0", 2)[2])
        elif kind == b"pHYs" and content[8:9] == b"\x01":
            x, y = struct.unpack_from(">II", content)
            metadata = replace(metadata, dpi=(x * 0.0254, y * 0.0254))  # per metre to per inch
        elif kind in _PNG_COPIED and not content.startswith(b"Raw profile type"):
            copied.append((kind, content))
    return replace(metadata, png=tuple(copied), notes=tuple(notes))


def _inflate(packed: bytes) -> bytes | None:
    """Profile of an iCCP chunk; None when it is damaged or swells past any real profile."""
    inflater = zlib.decompressobj()
    try:
        icc = inflater.decompress(packed, _MAX_ICC)
    except zlib.error:
        return None
    return icc if inflater.eof else None


def _of_tiff(data: bytes, first: Ifd) -> Metadata:
    source, kept = _directory(data, first.at), Image.Exif()
    for tag in (ORIENTATION, *_TIFF_KEPT):
        if tag in source:
            sub_ifd = tag in (34665, 34853)
            kept[tag] = _directory(data, first.number(tag), tag) if sub_ifd else source[tag]
    x, y = source.get(282), source.get(283)
    to_inches = {2: 1.0, 3: 2.54}.get(source.get(296, 2))
    return Metadata(
        exif=_bare(kept.tobytes()) if kept else None,
        icc=first.raw(34675),
        xmp=first.raw(700),
        dpi=(float(x) * to_inches, float(y) * to_inches) if x and y and to_inches else None,
    )


def _directory(data: bytes, at: int, group: int | None = None) -> dict[int, Any]:
    """Values of a tag directory as Pillow reads them; group: the tag that points to it."""
    big = data[2:4] in (b"+\0", b"\0+")
    ifd = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8], group=group)
    stream = io.BytesIO(data)
    stream.seek(at)
    ifd.load(stream)
    return dict(ifd)


def _bare(exif: bytes | None) -> bytes | None:
    """An EXIF block without its JPEG prefix; None for an empty one."""
    return exif.removeprefix(b"Exif\0\0") or None if exif else None
