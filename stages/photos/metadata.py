"""Metadata of photos: what is kept from the file, made to fit pixels that stand upright."""

import io
import re
import struct
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, SupportsFloat

from PIL import Image, TiffImagePlugin

from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.containers import (
    image_resources,
    jpeg_segments,
    png_chunks,
    webp_chunks,
)
from evenlight.stages.photos.exif import ORIENTATION, Ifd, lenient_orientation, upright_exif

_MAX_DPI = 65535  # as much as JFIF holds
_MAX_ICC = 16 << 20  # bytes; printers' profiles reach a few MB
# PNG chunks that are copied as they are: colour without a profile, and words about the photo.
_PNG_COPIED = (b"sRGB", b"gAMA", b"cHRM", b"cICP", b"tEXt", b"zTXt", b"iTXt")
_RAW_EXIF = (b"Raw profile type exif\0", b"Raw profile type APP1\0")
_XMP_KEYWORD = b"XML:com.adobe.xmp"
EXIF_PREFIX, XMP_PREFIX = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
EXTENDED_PREFIX, RESOURCES_PREFIX = b"http://ns.adobe.com/xmp/extension/\0", b"Photoshop 3.0\0"
_ICC_PREFIX = b"ICC_PROFILE\0"
IPTC = 0x0404  # number of its image resource
_THUMBNAILS = (1033, 1036)
_JPEG_BLOCKS = {  # marker and first bytes
    "exif": (0xE1, EXIF_PREFIX),
    "xmp": (0xE1, XMP_PREFIX),
    "extended": (0xE1, EXTENDED_PREFIX),
    "resources": (0xED, RESOURCES_PREFIX),
    "comments": (0xFE, b""),
    "credentials": (0xEB, b"JP"),
}
_GAIN_MAPS = (b"hdrgm:", b"HDRGainMap", b"urn:iso:std:iso:ts:21496")
# IFD0 tags of a TIFF that describe the photo, not how the file stores it.
_TIFF_KEPT = (269, 270, 271, 272, 285, 305, 306, 315, 316, 33432, 34665, 34853, 18246, 18249)
# What XMP says of things that stand beside the picture and are not kept: gain map, video.
_CLAIM = rb"(?:hdrgm:\w+|HDRGainMap:\w+|GCamera:(?:Motion|Micro)\w+|G?Container:Directory)"
_VALUE = rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')"
_CLAIMS = re.compile(
    rb"\s%b%b|<(%b)\b[^<>]*(?:/>|(?<!/)>[^<]*(?:<(?!/?%b)[^<]*)*</\1\s*>)"
    % (_CLAIM, _VALUE, _CLAIM, _CLAIM)
)
_HAS_EXTENDED = re.compile(
    rb"\sxmpNote:HasExtendedXMP%b|<(xmpNote:HasExtendedXMP)>[^<]*</\1>" % _VALUE
)
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:=[\"']|>)\s*)[1-8]")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """exif: a TIFF block without the "Exif" prefix, its Orientation 1 and its thumbnail gone.
    icc: ICC profile.  xmp: packet, orientation 1.  extended: segments of XMP over 64 kB, as they
    stand in a JPEG.  iptc: IIM records.  resources: Photoshop's blocks but IPTC and thumbnails.
    comments: of a JPEG.  dpi: dots per inch (x, y).  png: copied chunks (type, content).
    notes: sentences about what could not be kept."""

    exif: bytes | None = None
    icc: bytes | None = None
    xmp: bytes | None = None
    extended: tuple[bytes, ...] = ()
    iptc: bytes | None = None
    resources: bytes | None = None
    comments: tuple[bytes, ...] = ()
    dpi: tuple[float, float] | None = None
    png: tuple[tuple[bytes, bytes], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def noting(self, note: str) -> "Metadata":
        return replace(self, notes=(*self.notes, note))


def without_extended(metadata: Metadata) -> Metadata:
    """Without XMP over 64 kB, and without the word that there is some."""
    xmp = metadata.xmp and _HAS_EXTENDED.sub(b"", metadata.xmp)
    return replace(metadata, xmp=xmp, extended=())


def read_metadata(
    data: bytes, format: str, ifds: tuple[Ifd, ...], embedded: Mapping[str, bytes]
) -> tuple[Metadata, int]:
    """Metadata of a whole photo file, and the EXIF orientation (1 to 8) of the pixels as decoded.

    ifds: of a TIFF.  embedded: `Opened.embedded`.

    The orientation in the metadata is already 1: the caller turns the pixels.  Damaged metadata
    never costs the photo; a note says what was dropped.
    """
    readers = {"jpeg": _of_jpeg, "png": _of_png, "webp": _of_webp}
    if format == "tiff":
        metadata = _of_tiff(data, ifds[0])
    elif format in readers:
        metadata = readers[format](data)
    else:  # a decoder found it
        metadata = Metadata(
            exif=_bare(embedded.get("exif")), icc=embedded.get("icc"), xmp=embedded.get("xmp")
        )
    orientation, exif = 1, metadata.exif
    if exif is not None:
        try:
            orientation, exif = upright_exif(exif)
            metadata = replace(metadata, exif=exif)
        except (PhotoError, struct.error):
            # A photo on its side is worse than one without its camera's name.
            orientation = lenient_orientation(exif)
            metadata = replace(metadata, exif=None)
            metadata = metadata.noting("its EXIF block is damaged and was not kept")
    if metadata.xmp is not None and format in ("jpeg", "avif", "heic"):
        metadata = replace(metadata, xmp=_CLAIMS.sub(b"", metadata.xmp))
    metadata = metadata if metadata.extended else without_extended(metadata)
    turned = format in ("avif", "heic")  # by the decoder: the container says how, not EXIF
    if metadata.xmp is not None and (orientation != 1 or turned):
        # elsewhere, where EXIF is silent, viewers do not heed XMP either
        metadata = replace(metadata, xmp=_XMP_ORIENTATION.sub(rb"\g<1>1", metadata.xmp))
    return metadata, 1 if turned else orientation


def _of_jpeg(data: bytes) -> Metadata:
    found: defaultdict[str, list[bytes]] = defaultdict(list)
    icc, metadata = dict[int, bytes](), Metadata()
    for marker, content in jpeg_segments(data):
        if marker == 0xE0 and content.startswith(b"JFIF\0"):
            unit, x, y = struct.unpack_from(">BHH", content, 7)
            metadata = replace(metadata, dpi=_dpi(x, y, {1: 1.0, 2: 2.54}.get(unit, 0.0)))
        elif marker == 0xE2 and content.startswith(_ICC_PREFIX):
            icc[content[12]] = content[14:]
        elif marker == 0xDA:  # the picture ends at the first end marker
            found["behind"] = [content.partition(b"\xff\xd9")[2]]
        else:
            for kind, (where, prefix) in _JPEG_BLOCKS.items():
                if marker == where and content.startswith(prefix):
                    found[kind].append(content.removeprefix(prefix))
    profile = b"".join(icc[number] for number in sorted(icc))
    iptc, resources = _resources(b"".join(found["resources"]))
    metadata = replace(
        metadata,
        exif=b"".join(found["exif"]) or None,  # blocks over 64 kB go on in the next segment
        icc=profile or None,
        xmp=found["xmp"][-1] if found["xmp"] else None,
        extended=tuple(found["extended"]),
        iptc=iptc,
        resources=resources,
        comments=tuple(found["comments"]),
    )
    if found["credentials"]:
        metadata = metadata.noting("its content credentials (C2PA) were not kept")
    what = _behind(b"".join(found["behind"]), metadata.xmp or b"")
    return metadata.noting(f"{what} not kept") if what else metadata


def _behind(data: bytes, xmp: bytes) -> str:
    """What stands behind the picture of a JPEG, as a sentence begins; empty for nothing."""
    images, video = data.startswith(b"\xff\xd8\xff"), b"ftyp" in data
    gain_map = images and any(name in xmp + data for name in _GAIN_MAPS)
    found = ["its HDR gain map"] * gain_map + ["further images of the file"] * (images > gain_map)
    found += ["its video (motion photo)"] * video
    if not found and data.strip(b"\0"):
        found = [f"{len(data)} bytes behind its end"]
    verb = "was" if len(found) == 1 and found[0].startswith("its") else "were"
    return f"{' and '.join(found)} {verb}" if found else ""


def _resources(blocks: bytes) -> tuple[bytes | None, bytes | None]:
    """(IPTC, the blocks that are neither it nor a thumbnail)."""
    found = list(image_resources(blocks))
    iptc = next((content for number, _, content in found if number == IPTC), None)
    others = [block for number, block, _ in found if number not in (IPTC, *_THUMBNAILS)]
    return iptc, b"".join(others) or None


def _of_webp(data: bytes) -> Metadata:
    found = {kind: data[at : at + length] for kind, at, length in webp_chunks(data)}
    return Metadata(exif=_bare(found.get(b"EXIF")), icc=found.get(b"ICCP"), xmp=found.get(b"XMP "))


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
            metadata = replace(metadata, dpi=_dpi(x, y, 0.0254))  # per metre to per inch
        elif kind in (b"tEXt", b"zTXt") and content.startswith(_RAW_EXIF):
            exif = metadata.exif or _raw_profile(kind, content)
            metadata = replace(metadata, exif=exif)
            if exif is None:
                notes.append("its EXIF block is damaged and was not kept")
        elif kind in _PNG_COPIED:
            copied.append((kind, content))
    return replace(metadata, png=tuple(copied), notes=tuple(notes))


def _raw_profile(kind: bytes, content: bytes) -> bytes | None:
    """EXIF as ImageMagick and exiftool put it into text: a name, a length, hexadecimal digits."""
    text: bytes | None = content.partition(b"\0")[2]
    if kind == b"zTXt":
        text = _inflate((text or b"")[1:])
    try:
        return _bare(bytes.fromhex((text or b"").split(maxsplit=2)[2].decode("ascii")))
    except (IndexError, ValueError):
        return None


def _inflate(packed: bytes) -> bytes | None:
    """What is deflated in a chunk; None when it is damaged or swells past any real profile."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(packed, _MAX_ICC)
    except zlib.error:
        return None
    return content if inflater.eof else None


def _of_tiff(data: bytes, first: Ifd) -> Metadata:
    source, kept = _directory(data, first.at), Image.Exif()
    for tag in (ORIENTATION, *_TIFF_KEPT):
        if tag in source:
            sub_ifd = tag in (34665, 34853)
            kept[tag] = _directory(data, first.number(tag), tag) if sub_ifd else source[tag]
    to_inches = {2: 1.0, 3: 2.54}.get(source.get(296, 2), 0.0)
    inside, resources = _resources(first.raw(34377) or b"")
    return Metadata(
        exif=_bare(kept.tobytes()) if kept else None,
        icc=first.raw(34675),
        xmp=first.raw(700),
        iptc=first.raw(33723) or inside,
        resources=resources,
        dpi=_dpi(source.get(282, 0), source.get(283, 0), to_inches),
    )


def _directory(data: bytes, at: int, group: int | None = None) -> dict[int, Any]:
    """Values of a tag directory as Pillow reads them; group: the tag that points to it."""
    big = data[2:4] in (b"+\0", b"\0+")
    ifd = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8], group=group)
    stream = io.BytesIO(data)
    stream.seek(at)
    ifd.load(stream)
    return dict(ifd)


def _dpi(x: SupportsFloat, y: SupportsFloat, to_inches: float) -> tuple[float, float] | None:
    """Dots per inch; None where a file writes 0, or a fraction over 0."""
    both = float(x) * to_inches, float(y) * to_inches
    return both if all(0 < dots < _MAX_DPI for dots in both) else None


def _bare(exif: bytes | None) -> bytes | None:
    """An EXIF block without its JPEG prefix; None for an empty one."""
    return exif.removeprefix(EXIF_PREFIX) or None if exif else None
