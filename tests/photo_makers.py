"""Photo files of every kind, made from noise, for the tests of photos in and out."""

import io
import struct
from typing import Any

import cv2
import numpy as np
import pillow_heif
import tifffile
from PIL import Image

from evenlight.stages.photos.containers import PNG_SIGNATURE, png_chunk


def picture(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    """A smooth picture with some noise, so that every codec has something to do."""
    rng = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    coarse = rng.uniform(0, top, (6, 8, *shape[2:]))
    smooth = cv2.resize(coarse, (shape[1], shape[0])).reshape(shape)
    return np.clip(smooth + rng.normal(0, top / 50, shape), 0, top).astype(dtype)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def heic(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=95, **options)
    return stream.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    """HxWx3 uint8 without noise, which lossy formats keep."""
    coarse = np.random.default_rng(0).uniform(40, 210, (4, 5, 3)).astype(np.float32)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.uint8)


def tiff(samples: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, samples, metadata=None, **options)
    return stream.getvalue()


def png(data: bytes, width: int, height: int, bits: int, colour: int) -> bytes:
    """data: compressed image data, any."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(png_chunk(kind, content) for kind, content in chunks)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    tags[271] = "Maker"
    return tags


def with_thumbnail(orientation: int) -> bytes:
    """An EXIF block whose thumbnail holds an end-of-image marker of its own."""
    thumbnail = saved(Image.fromarray(picture(24, 32, 3)), "JPEG")
    first = struct.pack("<HHHIHHI", 1, 274, 3, 1, orientation, 0, 26)
    second = struct.pack("<H", 2)
    second += struct.pack("<HHII", 513, 4, 1, 26 + 30) + struct.pack(
        "<HHII", 514, 4, 1, len(thumbnail)
    )
    return b"Exif\0\0II*\0\x08\0\0\0" + first + second + bytes(4) + thumbnail


def base_files() -> dict[str, bytes]:
    colour = Image.fromarray(picture(60, 80, 3))
    deep = picture(60, 80, 3, dtype=np.uint16)
    return {
        "baseline.jpg": saved(colour, "JPEG", exif=with_thumbnail(1)),
        "progressive.jpg": saved(colour, "JPEG", progressive=True),
        "eight.png": saved(colour, "PNG", exif=exif(1).tobytes()),
        "sixteen.png": cv2.imencode(".png", deep)[1].tobytes(),
        "plain.tif": saved(colour, "TIFF", exif=exif(1)),
        "lzw.tif": saved(colour, "TIFF", compression="tiff_lzw"),
        "sixteen.tif": tiff(deep, photometric="rgb", compression="zlib", rowsperstrip=16),
        "sixteen-plain.tif": tiff(deep, photometric="rgb", byteorder=">"),
        "lossy.webp": saved(colour, "WEBP", exif=exif(1)),
        "lossless.webp": saved(colour, "WEBP", lossless=True),
    }


def jpeg_header(width: int, height: int, marker: int = 0xC0) -> bytes:
    frame = struct.pack(">BBHBHHB", 0xFF, marker, 17, 8, height, width, 3)
    return b"\xff\xd8" + frame + b"\1\x11\0\2\x11\0\3\x11\0" + b"\xff\xd9"


def tiff_header(
    width: int, height: int, bits: int = 8, repeated: tuple[int, ...] = (), text: bytes = b""
) -> bytes:
    """One plain gray strip of 256 bytes; repeated: a second, lying width and height; text: a
    description, stored last."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 256)]
    tags += [(256 + i, 4, 1, side) for i, side in enumerate(repeated)]
    if text:
        tags += [(270, 2, len(text), 264 + 2 + 12 * (len(tags) + 1) + 4)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", 264) + bytes(256)
    return head + struct.pack("<H", len(tags)) + entries + bytes(4) + text
