"""What needs no decoder: BMP, and arrays out of HDF5 files."""

import io

import numpy as np
from PIL import Image

from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.libvips import Opened


def open_bmp(data: bytes) -> Opened:
    """Read the header of a BMP."""
    image = Image.open(io.BytesIO(data), formats=("BMP",))
    mode = "RGBA" if image.mode == "RGBA" else "L" if image.mode in ("1", "L") else "RGB"
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    return Opened(
        width=image.width,
        height=image.height,
        bits=8,
        colours="gray" if mode == "L" else "rgb",
        channels=channels,
        samples=lambda: np.array(image.convert(mode)).reshape(image.height, image.width, channels),
    )


def open_array(data: bytes) -> Opened:
    """Read the header of an array in NumPy's .npy format, as `PhotoSource.read_bytes` gives it.

    Raises PhotoError when it is no image of uint8 or uint16, or not whole.
    """
    stream = io.BytesIO(data)
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
    channels = shape[2] if len(shape) == 3 else 1
    return Opened(
        width=shape[1],
        height=shape[0],
        bits=8 * dtype.itemsize,
        colours="gray" if channels == 1 else "rgb",
        channels=channels,
        samples=lambda: np.load(io.BytesIO(data), allow_pickle=False).reshape(*shape[:2], channels),
    )


def _is_image_shape(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
