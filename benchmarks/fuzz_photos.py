"""Photos for benchmarks.fuzz: seeds of every format that is read, and how they are mutated."""

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
import tifffile
from PIL import Image, ImageCms

from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.containers import PNG_SIGNATURE, jpeg_segment, png_chunk
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.encode import encoded, in_format

HEIGHT, WIDTH = 60, 80
INTERESTING = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/' hdrgm:Version='1.0' tiff:Orientation='6'></x:xmpmeta>"


def photos(folder: Path) -> Callable[[random.Random, Path], str]:
    """A trial: a photo, mutated, is decoded and written."""
    seeds = list(_seeds().items())

    def trial(rng: random.Random, tried: Path) -> str:
        name, data = rng.choice(seeds)
        data = mutated(data, rng.choice(seeds)[1], rng)
        tried.write_bytes(data)
        format = rng.choice(["jpeg", "png", "tiff", "webp"])
        try:
            photo = decode(data, name, max_megapixels=16)
        except PhotoError:
            return "refused"
        except MemoryError:
            return "more memory than there is"
        top = 65535 if photo.bit_depth == 16 else 255
        brighter = (photo.pixels * np.float32(0.7) + top // 5).astype(photo.pixels.dtype)
        photo = replace(photo, pixels=brighter)
        for target in {photo.format, format} - {"array"}:
            written = in_format(photo, target)
            again = decode(encoded(written), f"a.{target}")
            assert again.pixels.shape == photo.pixels.shape, "the output has another size"
        return "written"

    return trial


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to eight changes, most where headers are; a PNG's checksums may be put right again."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        if len(changed) >= 8:
            at = rng.randrange(min(len(changed) - 4, rng.choice((64, 512, 1 << 30))))
            rng.choice((_flip, _number, _number, _cut, _noise, _repeat, _splice))(
                changed, at, other, rng
            )
    if data.startswith(PNG_SIGNATURE) and rng.random() < 0.8:
        return _with_checksums(bytes(changed))
    return bytes(changed)


def _flip(changed: bytearray, at: int, _: bytes, rng: random.Random) -> None:
    changed[at] ^= 1 << rng.randrange(8)


def _number(changed: bytearray, at: int, _: bytes, rng: random.Random) -> None:
    """A number at the edge of what its bytes hold."""
    code, mask = rng.choice((("B", 255), ("<H", 0xFFFF), (">H", 0xFFFF), ("<I", -1), (">I", -1)))
    struct.pack_into(code, changed, at, rng.choice(INTERESTING) & mask)


def _cut(changed: bytearray, at: int, _: bytes, rng: random.Random) -> None:
    del changed[at : at + rng.choice((1, 2, 4, 64, 1000))]


def _noise(changed: bytearray, at: int, _: bytes, rng: random.Random) -> None:
    changed[at:at] = rng.randbytes(rng.choice((1, 2, 4, 64, 1000)))


def _repeat(changed: bytearray, at: int, _: bytes, rng: random.Random) -> None:
    changed[at:at] = changed[at : at + rng.choice((4, 64, 4000))]


def _splice(changed: bytearray, at: int, other: bytes, rng: random.Random) -> None:
    """A piece of another seed in place of what stood there."""
    start = rng.randrange(len(other))
    piece = other[start : start + rng.choice((4, 64, 1000))]
    changed[at : at + len(piece)] = piece


def _with_checksums(data: bytes) -> bytes:
    out, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        body = data[at + 4 : at + 8 + length]
        if len(body) < length + 4:
            break
        out += [struct.pack(">I", length), body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(out) + data[at:]


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _tiff(samples: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, samples, metadata=None, **options)
    return stream.getvalue()


def _heic(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=90, **options)
    return stream.getvalue()


def _seeds() -> dict[str, bytes]:
    """About sixty small photos by name: every format, kind of samples and block of metadata."""
    coarse = np.random.default_rng(0).integers(0, 65536, (6, 8, 4)).astype(np.uint16)
    deep = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
    rgba, rgb = (deep >> 8).astype(np.uint8), (deep[..., :3] >> 8).astype(np.uint8)
    colour, clear = Image.fromarray(rgb), Image.fromarray(rgba)
    gray, exif = colour.convert("L"), _exif()
    blocks: dict[str, Any] = {"exif": exif, "icc_profile": ICC, "xmp": XMP}
    files = _jpegs(colour, gray, blocks) | _tiffs(rgb, deep, exif)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = clear.convert("L").convert("I;16") if mode == "I;16" else clear.convert(mode)
        files[f"{mode}.png"] = _saved(image, "PNG", exif=exif, icc_profile=ICC)
    files["deep.png"] = cv2.imencode(".png", deep)[1].tobytes()
    for kind, content in _png_chunks(exif).items():
        data = _saved(colour, "PNG")
        files[f"{kind}.png"] = data[:33] + content + data[33:]
    for lossless in (False, True):
        for name, image in (("rgb", colour), ("rgba", clear)):
            files[f"{name}-{lossless}.webp"] = _saved(image, "WEBP", lossless=lossless, **blocks)
    files["rgb.avif"], files["rgba.avif"] = (
        _saved(image, "AVIF", **blocks) for image in (colour, clear)
    )
    files["rgb.heic"] = _heic(colour, exif=exif, xmp=XMP)
    files["rgba.heic"] = _heic(clear)
    files["gray.heic"] = _heic(gray)
    for name, image in (("p", colour.convert("P")), ("l", gray)):
        files[f"{name}.gif"] = _saved(image, "GIF")
    files["moving.gif"] = _saved(colour, "GIF", save_all=True, append_images=[gray.convert("RGB")])
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        files[f"{mode}.bmp"] = _saved(clear.convert(mode), "BMP")
    for name, array in (("rgb", rgb), ("deep", deep), ("gray", rgb[..., 0])):
        stream = io.BytesIO()
        np.save(stream, array)
        files[f"{name}.npy"] = stream.getvalue()
    return files


def _exif() -> bytes:
    tags = Image.Exif()
    tags[274], tags[271], tags[282], tags[283] = 6, "Maker", 72.0, 72.0
    tags.get_ifd(34665).update({36867: "2026:01:01 00:00:00", 37500: bytes(range(200))})
    tags.get_ifd(34853).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return b"Exif\0\0" + tags.tobytes()


def _jpegs(colour: Image.Image, gray: Image.Image, blocks: dict[str, Any]) -> dict[str, bytes]:
    plain = _saved(colour, "JPEG", **blocks)
    cmyk = colour.convert("CMYK")
    segments = {
        "comment": jpeg_segment(0xFE, b"a comment"),
        "iptc": jpeg_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\x05hello\0"),
        "extended": jpeg_segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(40) + XMP),
        "mpf": jpeg_segment(0xE2, b"MPF\0II*\0\x08\0\0\0" + bytes(50)),
        "jumbf": jpeg_segment(0xEB, b"JP\0\1" + bytes(40)),
    }
    files = {f"{name}.jpg": plain[:2] + part + plain[2:] for name, part in segments.items()}
    return files | {
        "plain.jpg": plain,
        "progressive.jpg": _saved(colour, "JPEG", progressive=True, **blocks),
        "subsampled.jpg": _saved(colour, "JPEG", subsampling="4:2:0", quality=60),
        "restarts.jpg": _saved(colour, "JPEG", restart_marker_rows=1),
        "gray.jpg": _saved(gray, "JPEG", **blocks),
        "cmyk.jpg": _saved(cmyk, "JPEG"),
        "motion.jpg": plain + b"\0\0\0\x18ftypmp42" + bytes(100),
        "gainmap.jpg": plain + plain,
    }


def _tiffs(rgb: np.ndarray, deep: np.ndarray, exif: bytes) -> dict[str, bytes]:
    image = Image.fromarray(rgb)
    files: dict[str, bytes] = {
        "exif.tif": _saved(image, "TIFF", exif=exif[6:], icc_profile=ICC),
        "big.tif": _tiff(deep[..., :3], photometric="rgb", bigtiff=True),
        "msb.tif": _tiff(deep[..., :3], photometric="rgb", byteorder=">", iccprofile=ICC),
        "tiled.tif": _tiff(rgb, photometric="rgb", tile=(16, 16), compression="zlib"),
        "planar.tif": _tiff(rgb.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        "rgba.tif": _tiff(deep, photometric="rgb", extrasamples=["unassalpha"]),
        "float.tif": _tiff((deep[..., :3] / 65535).astype(np.float32), photometric="rgb"),
        "half.tif": _tiff((deep[..., :3] / 65535).astype(np.float16), photometric="rgb"),
        "pages.tif": _tiff(np.stack([rgb, rgb]), photometric="rgb"),
        "cmyk.tif": _saved(image.convert("CMYK"), "TIFF"),
        "palette.tif": _saved(image.convert("P"), "TIFF"),
        "bilevel.tif": _saved(image.convert("1"), "TIFF", compression="group4"),
    }
    for compression in ("tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"):
        files[f"{compression}.tif"] = _saved(image, "TIFF", compression=compression)
    return files


def _png_chunks(exif: bytes) -> dict[str, bytes]:
    raw = b"\nexif\n%8d\n%s\n" % (len(exif), exif.hex().encode())
    return {
        "gama": png_chunk(b"gAMA", struct.pack(">I", 100_000)),
        "chrm": png_chunk(b"cHRM", struct.pack(">8I", *range(30000, 38000, 1000))),
        "cicp": png_chunk(b"cICP", bytes([1, 8, 0, 1])),
        "text": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"words" * 50)),
        "raw": png_chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        "xmp": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
    }
