"""Photos in: decoded, turned upright and placed on the canvas.

Pillow decodes 8 bits per sample; it turns 16-bit colour into 8 without a word, so photo_samples.py
decodes 16. What a file claims is checked from its bytes first
(photo_headers.py), with no image library. Finding photos: photo_sources.py, offered here too.
Writing them: photo_files.py.
"""

import io
import struct
import warnings
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
from PIL import Image, ImageCms, JpegImagePlugin

from evenlight.cache.errors import PhotoError
from evenlight.stages.photo_headers import (
    Header,
    png_pixels_only,
    read_header,
    refuse_damage,
    refuse_size,
)
from evenlight.stages.photo_metadata import ORIENTATION, Metadata, read_metadata
from evenlight.stages.photo_samples import png_samples, tiff_samples
from evenlight.stages.photo_sources import (
    SUFFIXES,
    Found,
    PhotoSource,
    find_photos,
    list_photos,
)

__all__ = [
    "SUFFIXES",
    "Encoding",
    "Extent",
    "Found",
    "Metadata",
    "Photo",
    "PhotoSource",
    "decode",
    "find_photos",
    "list_photos",
    "place",
    "working",
]

# Sizes are checked from our own reading of the header, before Pillow opens anything; its limit
# would only overrule photo.max_megapixels.
Image.MAX_IMAGE_PIXELS = None
# A note in the metadata says it, by photo.
warnings.filterwarnings("ignore", message="(Corrupt EXIF|Metadata Warning|Truncated File Read)")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How the file was compressed, for writing it back alike."""

    jpeg_tables: dict[int, list[int]] | None = None
    jpeg_subsampling: int = 0  # as Pillow: 0 is 4:4:4, 1 is 4:2:2, 2 is 4:2:0
    lossless: bool = True  # of WebP


@dataclass(frozen=True, kw_only=True, eq=False)
class Photo:
    """pixels: HxWx3 RGB, sRGB-encoded, uint8 or uint16 as bit_depth (8 or 16) says, upright.
    Photos with an ICC profile of another colour space stay in their own (metadata.icc).
    alpha: HxW of the same type, not premultiplied, or None.  gray: stored with one channel.
    format: jpeg, png, tiff, webp, or array for an image of an HDF5 file."""

    pixels: np.ndarray
    bit_depth: int
    format: str
    alpha: np.ndarray | None = None
    gray: bool = False
    metadata: Metadata = field(default_factory=Metadata)
    encoding: Encoding = field(default_factory=Encoding)


def decode(data: bytes, name: str, *, max_megapixels: float = 128) -> Photo:
    """Decode one whole photo file, or array from PhotoSource.read_bytes; content decides.

    The first page of a TIFF counts. CMYK becomes sRGB (the note in its metadata says so).
    Raises PhotoError with a sentence that leaves the name for the caller to add: no photo,
    truncated, damaged, an animation, above max_megapixels (from the header, before anything is
    allocated) or under 16 pixels a side. Damage inside a JPEG scan cannot be seen.
    """
    header = read_header(data, name)
    refuse_size(header, max_megapixels)
    refuse_damage(data, header)
    try:
        metadata, orientation = read_metadata(data, header.format, header.ifds)
        photo = _decode_pixels(data, header, metadata)
    except (PhotoError, MemoryError):
        raise
    # Decoders raise whatever hostile bytes lead to: OSError, SyntaxError, KeyError, cv2.error ...
    except Exception as error:
        raise PhotoError(f"the {header.format.upper()} decoder gave up: {error}") from error
    return replace(
        photo,
        pixels=_upright(photo.pixels, orientation),
        alpha=None if photo.alpha is None else _upright(photo.alpha, orientation),
    )


def _decode_pixels(data: bytes, header: Header, metadata: Metadata) -> Photo:
    if header.format == "array":
        samples = np.load(io.BytesIO(data), allow_pickle=False)
        return _from_samples(samples.reshape(*samples.shape[:2], -1), header, metadata)
    if header.format == "tiff":
        data = _without_orientation(data, header)
    if header.format == "png":
        data = png_pixels_only(data)
    if header.bits < 16:
        return _decode_8_bit(data, header, metadata)
    if header.format == "png":
        return _from_samples(png_samples(data), header, metadata)
    samples, notes = tiff_samples(data, header)
    return _from_samples(samples, header, replace(metadata, notes=(*metadata.notes, *notes)))


def _without_orientation(data: bytes, header: Header) -> bytes:
    """A TIFF that says it is upright: Pillow and OpenCV turn TIFFs (and only those) unasked."""
    first = header.ifds[0]
    if not first.numbers(ORIENTATION):
        return data
    upright = bytearray(data)
    entry = first.entries[ORIENTATION]
    struct.pack_into(first.order + ("H" if entry.kind == 3 else "I"), upright, entry.at, 1)
    return bytes(upright)


def _decode_8_bit(data: bytes, header: Header, metadata: Metadata) -> Photo:
    # Only the plugin of the format that was checked may look at the bytes.
    image: Image.Image = Image.open(io.BytesIO(data), formats=(header.format.upper(),))
    if image.size != (header.width, header.height):
        raise PhotoError(
            f"its headers disagree about its size: {header.width} x {header.height} pixels"
            f" or {image.width} x {image.height}"
        )
    image.load()
    encoding = Encoding(lossless=b"VP8L" in data[12:4096])
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode in ("L", "RGB"):
        subsampling = JpegImagePlugin.get_sampling(image)
        if image.mode == "L" or subsampling in (0, 1, 2):
            encoding = Encoding(
                jpeg_tables=image.quantization, jpeg_subsampling=max(subsampling, 0)
            )
    gray = image.mode in ("1", "L", "LA")
    if image.mode == "CMYK":
        image, metadata = _cmyk_to_srgb(image, metadata)
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        pixels, alpha = np.ascontiguousarray(rgba[..., :3]), rgba[..., 3].copy()
    elif image.mode in ("1", "L", "P", "RGB", "RGBX", "YCbCr"):
        pixels, alpha = np.array(image.convert("RGB")), None
    else:
        raise PhotoError(f"its colour mode {image.mode} cannot be read")
    return Photo(
        pixels=pixels,
        bit_depth=8,
        format=header.format,
        alpha=alpha,
        gray=gray,
        metadata=metadata,
        encoding=encoding,
    )


def _cmyk_to_srgb(image: Image.Image, metadata: Metadata) -> tuple[Image.Image, Metadata]:
    """Through the photo's own profile where it has a usable one."""
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
    note = f"CMYK was converted to sRGB {how}"
    converted = rgb if rgb is not None else image.convert("RGB")
    return converted, replace(metadata, icc=None, notes=(*metadata.notes, note))


def _from_samples(samples: np.ndarray, header: Header, metadata: Metadata) -> Photo:
    """samples: HxWxC; C = 1 gray, 2 gray and alpha, 3 RGB, 4 RGBA."""
    channels = samples.shape[2]
    alpha = samples[..., -1].copy() if channels in (2, 4) else None
    pixels = samples[..., :3] if channels >= 3 else samples[..., :1].repeat(3, axis=2)
    return Photo(
        pixels=np.ascontiguousarray(pixels),
        bit_depth=header.bits,
        format=header.format,
        alpha=alpha,
        gray=channels <= 2 or header.gray,
        metadata=metadata,
    )


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (EXIF 2.32, table 6).  HxW or HxWxC."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


@dataclass(frozen=True)
class Extent:
    """Size in pixels of a photo on the canvas; the geometry of photo, region map and t map.

    height and width are multiples of 8, so maps at 1/4 and 1/8 slice exactly; the longer one is
    size, the side of the square canvas.
    """

    height: int
    width: int
    size: int

    @classmethod
    def of(cls, height: int, width: int, size: int) -> "Extent":
        """Extent of a photo of height x width pixels.  Smaller photos are enlarged, so that
        features see scenes at one scale.  size: a multiple of 8."""
        assert size % 8 == 0, size
        scale = size / max(height, width)

        def fit(side: int) -> int:
            return min(size, max(8, int(side * scale / 8 + 0.5) * 8))

        return cls(fit(height), fit(width), size)

    def slices(self, stride: int = 1) -> tuple[slice, slice]:
        """Rows and columns of the photo in a map of the canvas at 1/stride (1, 2, 4 or 8)."""
        return slice(0, self.height // stride), slice(0, self.width // stride)

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """pixels: HxW or HxWxC, uint8, uint16 or float32.  Returns height x width, same type:
        area averages when shrinking, cubic when enlarging."""
        if pixels.shape[:2] == (self.height, self.width):
            return pixels
        shrinks = max(pixels.shape[:2]) >= self.size
        how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        return cv2.resize(pixels, (self.width, self.height), interpolation=how)

    def pad(self, pixels: np.ndarray, stride: int = 1) -> np.ndarray:
        """pixels: (height/stride) x (width/stride) [xC].  Returns the canvas at 1/stride, the
        photo top left and its last row and column repeated over the rest."""
        side = self.size // stride
        rest = [(0, side - pixels.shape[0]), (0, side - pixels.shape[1])]
        return np.pad(pixels, rest + [(0, 0)] * (pixels.ndim - 2), mode="edge")


def working(rgb: np.ndarray, size: int) -> np.ndarray:
    """A photo at working size, unpadded.  rgb: HxWx3 uint8 or uint16, sRGB-encoded; resized in its
    own depth.  Returns hxwx3 uint8, h and w multiples of 8, the longer one size."""
    resized = Extent.of(rgb.shape[0], rgb.shape[1], size).resize(rgb)
    if resized.dtype == np.uint16:
        resized = ((resized.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 is 255
    return np.ascontiguousarray(resized)


def place(rgb: np.ndarray, size: int) -> tuple[np.ndarray, Extent]:
    """A photo on the canvas.  rgb: as in working.  Returns (size x size x 3 uint8, extent)."""
    extent = Extent.of(rgb.shape[0], rgb.shape[1], size)
    return extent.pad(working(rgb, size)), extent
