"""Photos out: in their own format and bit depth, with their metadata, whole or not at all."""

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image

from evenlight.cache.files import atomic_write
from evenlight.stages.photos.containers import (
    PNG_SIGNATURE,
    image_resource,
    jpeg_segment,
    png_chunk,
)
from evenlight.stages.photos.decode import Encoding, Photo
from evenlight.stages.photos.exif import first_ifd, relocated, without_orientation
from evenlight.stages.photos.heic import heic_bytes
from evenlight.stages.photos.metadata import (
    EXIF_PREFIX,
    EXTENDED_PREFIX,
    IPTC,
    RESOURCES_PREFIX,
    XMP_PREFIX,
    Metadata,
    without_extended,
)

_XMP, _IPTC, _RESOURCES = 700, 33723, 34377  # TIFF tags
_SEGMENT = 65533  # bytes in one segment of a JPEG
_KINDS = {  # fields of Metadata, in words
    "exif": "EXIF", "icc": "colour profile", "xmp": "XMP", "extended": "long XMP", "iptc": "IPTC",
    "resources": "Photoshop data", "comments": "comment", "dpi": "resolution", "png": "PNG chunks",
}  # fmt: skip
_COLOURS = (b"sRGB", b"gAMA", b"cHRM", b"cICP")  # chunks that only say what the numbers mean
_LISTS = ("extended", "comments", "png")
_PLACES: dict[str, tuple[str, ...]] = {
    "jpeg": ("exif", "icc", "xmp", "extended", "iptc", "resources", "comments", "dpi"),
    **dict.fromkeys(("png", "array"), ("exif", "icc", "xmp", "dpi", "png")),
    "tiff": ("exif", "icc", "xmp", "iptc", "resources", "dpi"),
    **dict.fromkeys(("webp", "avif", "heic"), ("exif", "icc", "xmp")),
    **dict.fromkeys(("gif", "bmp"), ()),
}
_GIF_CLEAR = 255  # the palette's last index


def encode(photo: Photo, path: Path, quality: int = 95) -> None:
    """Write a photo to path in the format it was read in (an array: PNG), whole or not at all.

    Bit depth, alpha, ICC profile, EXIF (orientation 1, no thumbnail), XMP and dpi are kept where
    the format has a place for them. A photo stored gray stays so while its pixels are gray.
    quality: for JPEGs whose own tables and subsampling are not known, and lossy WebP.
    Raises OSError when it cannot be written.
    """
    atomic_write(path, encoded(photo, quality))


def encoded(photo: Photo, quality: int = 95) -> bytes:
    """The file that encode writes."""
    assert photo.pixels.dtype == (np.uint16 if photo.bit_depth == 16 else np.uint8)
    writers = {"jpeg": _jpeg, "png": _png, "array": _png, "tiff": _tiff, "webp": _webp}
    writers |= {"gif": _gif, "bmp": _bmp, "avif": _avif, "heic": _heic}
    return writers[photo.format](photo, _samples(photo), quality)


def jpeg_bytes(rgb: np.ndarray, quality: int = 95) -> bytes:
    """A bare JPEG, 4:4:4.  rgb: HxWx3 uint8, sRGB-encoded."""
    return encoded(Photo(pixels=rgb, bit_depth=8, format="jpeg"), quality)


def in_format(photo: Photo, format: str, quality: int | None = None) -> Photo:
    """The photo as it is written in a format: jpeg, png, tiff, webp or its own.  Notes say what is
    lost.  quality: asked for, in place of what the file was compressed with."""
    if format not in (photo.format, "png" if photo.format == "array" else ""):
        photo = _in_other_format(photo, format)
    metadata, encoding = photo.metadata, photo.encoding
    if quality is not None:
        encoding = replace(encoding, jpeg_tables=None, lossless=False)
    lost = [kind for kind in _KINDS if getattr(metadata, kind) and kind not in _PLACES[format]]
    if format == "jpeg" and len(metadata.xmp or b"") > _SEGMENT - len(XMP_PREFIX):
        lost.append("xmp")
    if lost:
        words = ", ".join(_KINDS[kind] for kind in lost)
        emptied: dict[str, Any] = {kind: () if kind in _LISTS else None for kind in lost}
        metadata = replace(metadata, **emptied).noting(f"{format} has no place for its {words}")
    if not metadata.extended:
        metadata = without_extended(metadata)
    return replace(photo, format=format, metadata=metadata, encoding=encoding)


def kept_of(metadata: Metadata) -> list[str]:
    """What there is beside the pixels, in words."""
    return [words for kind, words in _KINDS.items() if getattr(metadata, kind)]


def _in_other_format(photo: Photo, format: str) -> Photo:
    """Pixels, alpha and curves that the format can hold."""
    encoding, metadata, pixels, alpha = photo.encoding, photo.metadata, photo.pixels, photo.alpha
    chunks = tuple(chunk for chunk in metadata.png if chunk[0] not in _COLOURS)
    metadata = replace(metadata, png=chunks)
    primaries = encoding.primaries if metadata.icc is not None else None
    if primaries is None:
        pixels = photo.in_srgb
    deep = format in ("png", "tiff")
    stored = encoding.stored or photo.pixels.dtype
    if not deep and stored != np.uint8:
        metadata = metadata.noting(f"of its {8 * stored.itemsize} bits per sample 8 were kept")
    # only a profile can say in another format that the numbers are not sRGB-encoded
    transfer = encoding.transfer if metadata.icc is not None else None
    if transfer is None and not deep:
        pixels, alpha = _to_8_bits(pixels), None if alpha is None else _to_8_bits(alpha)
    if transfer is not None:
        stored = np.dtype(np.uint16 if deep and stored != np.uint8 else np.uint8)
    if alpha is not None and format == "jpeg":
        white = np.iinfo(pixels.dtype).max
        cover = alpha[..., None] / np.float32(white)
        pixels = np.rint(pixels * cover + white * (1 - cover)).astype(pixels.dtype)
        alpha, metadata = None, metadata.noting("what was transparent is white: jpeg has no alpha")
    return replace(
        photo,
        pixels=pixels,
        alpha=alpha,
        bit_depth=8 * pixels.itemsize,
        metadata=metadata,
        encoding=Encoding(
            primaries=primaries,
            transfer=transfer,
            stored=stored if transfer else None,
            lossless=False,
        ),
    )


def _to_8_bits(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.uint8:
        return samples
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _samples(photo: Photo) -> np.ndarray:
    """HxWxC as stored: 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA."""
    samples, alpha = photo.pixels, photo.alpha
    transfer, stored = photo.encoding.transfer, photo.encoding.stored
    if transfer is not None and stored is not None:
        samples = transfer.from_srgb(samples, stored)
        if alpha is not None and stored != np.uint16:
            alpha = (alpha / np.float32(65535 if stored.kind == "f" else 257)).astype(stored)
    if photo.gray and (samples == samples[..., :1]).all():
        samples = samples[..., :1]
    if alpha is not None:
        samples = np.concatenate([samples, alpha[..., None]], axis=2)
    return samples


def _icc(photo: Photo, samples: np.ndarray) -> bytes | None:
    """The profile, unless it is for gray and the pixels are coloured."""
    icc = photo.metadata.icc
    if icc is not None and icc[16:20] == b"GRAY" and samples.shape[2] >= 3:
        return None
    return icc


def _image(samples: np.ndarray) -> Image.Image:
    return Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **{key: value for key, value in options.items() if value})
    return stream.getvalue()


def _jpeg(photo: Photo, samples: np.ndarray, quality: int) -> bytes:
    assert photo.alpha is None, "JPEG has no alpha"
    tables = photo.encoding.jpeg_tables
    image = _image(samples)
    how: dict[str, Any] = {"quality": quality, "subsampling": "4:4:4"}
    if tables is not None and (len(tables) > 1 or image.mode == "L"):
        how = {
            "qtables": [tables[key] for key in sorted(tables)][: 1 if image.mode == "L" else None],
            "subsampling": ("4:4:4", "4:2:2", "4:2:0")[photo.encoding.jpeg_subsampling],
        }
    metadata = photo.metadata
    dpi = metadata.dpi and (round(metadata.dpi[0]), round(metadata.dpi[1]))
    data = _saved(image, "JPEG", icc_profile=_icc(photo, samples), dpi=dpi, **how)
    resources = metadata.resources or b""
    if metadata.iptc is not None:
        resources = image_resource(IPTC, metadata.iptc) + resources
    segments = _segments(0xE1, EXIF_PREFIX, metadata.exif or b"")  # of which Pillow writes only one
    segments += [jpeg_segment(0xE1, XMP_PREFIX + metadata.xmp)] if metadata.xmp else []
    segments += [jpeg_segment(0xE1, EXTENDED_PREFIX + part) for part in metadata.extended]
    segments += _segments(0xED, RESOURCES_PREFIX, resources)
    segments += [jpeg_segment(0xFE, comment) for comment in metadata.comments]
    at = 4 + int.from_bytes(data[4:6], "big")  # behind the first, JFIF's
    return data[:at] + b"".join(segments) + data[at:]


def _segments(marker: int, prefix: bytes, content: bytes) -> list[bytes]:
    """As many as it takes, each with the prefix."""
    step = _SEGMENT - len(prefix)
    starts = range(0, len(content), step)
    return [jpeg_segment(marker, prefix + content[at : at + step]) for at in starts]


def _webp(photo: Photo, samples: np.ndarray, quality: int) -> bytes:
    return _saved(
        _image(_coloured(samples)),  # WebP has no gray
        "WEBP",
        lossless=photo.encoding.lossless,
        quality=quality,
        exact=True,  # colours under alpha 0 too
        exif=photo.metadata.exif,
        icc_profile=_icc(photo, samples),
        xmp=photo.metadata.xmp,
    )


def _gif(photo: Photo, samples: np.ndarray, quality: int) -> bytes:
    """The 256 colours that suit the picture, mixed by dithering; alpha is all or nothing."""
    image = _image(_coloured(samples)[..., :3])
    palette = image.quantize(_GIF_CLEAR)
    image = image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    if photo.alpha is None:
        return _saved(image, "GIF")
    image.paste(_GIF_CLEAR, mask=Image.fromarray(photo.alpha < 128))
    return _saved(image, "GIF", transparency=_GIF_CLEAR)


def _bmp(photo: Photo, samples: np.ndarray, quality: int) -> bytes:
    return _saved(_image(samples if samples.shape[2] == 1 else _coloured(samples)), "BMP")


def _avif(photo: Photo, samples: np.ndarray, quality: int) -> bytes:
    samples = _to_8_bits(samples)
    # Pillow would turn the picture by the tag and write the rest of the block anew.
    exif = photo.metadata.exif and without_orientation(photo.metadata.exif)
    return _saved(
        _image(_coloured(samples)),
        "AVIF",
        quality=quality,
        subsampling="4:4:4",
        exif=exif,
        icc_profile=_icc(photo, samples),
        xmp=photo.metadata.xmp,
    )


def _heic(photo: Photo, samples: np.ndarray, quality: int) -> bytes:
    metadata = photo.metadata
    return heic_bytes(
        _coloured(samples), quality, metadata.exif, _icc(photo, samples), metadata.xmp
    )


def _coloured(samples: np.ndarray) -> np.ndarray:
    """Three channels of colour where there is one."""
    if samples.shape[2] > 2:
        return samples
    return np.concatenate([samples[..., :1].repeat(3, axis=2), samples[..., 1:]], axis=2)


def _png(photo: Photo, samples: np.ndarray, quality: int) -> bytes:
    """Pixels from a library, metadata inserted after the header: OpenCV keeps no text or density,
    Pillow no 16-bit colour."""
    plain = _saved(_image(samples), "PNG") if samples.itemsize == 1 else _png_16_bit(samples)
    at = len(PNG_SIGNATURE) + 25  # past IHDR
    inserted = b"".join(png_chunk(kind, data) for kind, data in _png_metadata(photo, samples))
    return plain[:at] + inserted + plain[at:]


def _png_16_bit(samples: np.ndarray) -> bytes:
    if samples.shape[2] == 2:  # OpenCV has no gray with alpha
        samples = samples[..., [0, 0, 0, 1]]
    elif samples.shape[2] == 1:
        samples = samples[..., 0]
    if samples.ndim == 3:
        samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]  # OpenCV keeps BGR
    done, buffer = cv2.imencode(".png", np.ascontiguousarray(samples))
    if not done:
        raise OSError("OpenCV could not encode the photo as PNG")
    return buffer.tobytes()


def _png_metadata(photo: Photo, samples: np.ndarray) -> list[tuple[bytes, bytes]]:
    metadata, icc = photo.metadata, _icc(photo, samples)
    chunks = []
    if icc is not None:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(icc)))
    if metadata.exif is not None:
        chunks.append((b"eXIf", metadata.exif))
    if metadata.xmp is not None:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp))
    if metadata.dpi is not None:
        x, y = (round(dots / 0.0254) for dots in metadata.dpi)  # per inch to per metre
        chunks.append((b"pHYs", struct.pack(">IIB", x, y, 1)))
    return chunks + list(metadata.png)


def _tiff(photo: Photo, samples: np.ndarray, quality: int) -> bytes:
    """Deflate with horizontal differences; what EXIF says follows the pixels."""
    metadata, channels = photo.metadata, samples.shape[2]
    blocks = {_XMP: metadata.xmp, _IPTC: metadata.iptc, _RESOURCES: metadata.resources}
    stream = io.BytesIO()
    tifffile.imwrite(
        stream,
        samples[..., 0] if channels == 1 else samples,
        photometric="rgb" if channels >= 3 else "minisblack",
        planarconfig="contig" if channels > 1 else None,
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        byteorder=first_ifd(metadata.exif).order if metadata.exif else "<",
        compression="zlib",
        predictor=samples.dtype.kind != "f",  # tifffile alone has none for floats
        resolution=metadata.dpi,
        resolutionunit="INCH" if metadata.dpi else None,
        iccprofile=_icc(photo, samples),
        software=False,
        metadata=None,
        extratags=[(tag, 1, len(block), block, True) for tag, block in blocks.items() if block],
    )
    tiff = stream.getvalue()
    return _with_exif(tiff, metadata.exif) if metadata.exif else tiff


def _with_exif(tiff: bytes, exif: bytes) -> bytes:
    """A TIFF with the tags of an EXIF block (of the same byte order) it does not have itself.

    tifffile writes no Exif directory, so the block follows the image data, and behind it stands
    a first directory that leads to both.
    """
    base = len(tiff) + len(tiff) % 2  # directories begin on even bytes
    block = relocated(exif, base)
    block += bytes(len(block) % 2)
    own, added = first_ifd(tiff), first_ifd(exif)
    records = {tag: block[at.where : at.where + 12] for tag, at in added.entries.items()}
    records |= {tag: tiff[at.where : at.where + 12] for tag, at in own.entries.items()}
    directory = struct.pack(own.order + "H", len(records))
    directory += b"".join(records[tag] for tag in sorted(records)) + bytes(4)
    first = struct.pack(own.order + "I", base + len(block))
    return tiff[:4] + first + tiff[8:].ljust(base - 8, b"\0") + block + directory
