"""Images kept in an HDF5 file, as a source of photos. The only importer of h5py.

HDF5 checks its raw data only where the writer asked for it (fletcher32): damage to the numbers
themselves cannot be seen here.
"""

import math
from pathlib import Path

import h5py
import numpy as np

from evenlight.cache.errors import PhotoError, StoreError

_CHANNELS = (1, 3, 4)
_MAX_BYTES = 2 << 30  # of one image: a compressed file of kilobytes can claim any size
_MAX_IMAGES = 1_000_000  # of one file
_MAX_SWELLING = 2000  # times; deflate reaches 1032
_SIDE = 16  # of an array that could be meant as an image
_AXES = {3: ("HWC", "CHW"), 4: ("NHWC", "NCHW")}  # by number of axes; the first that fits


def list_images(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Names of the images in an HDF5 file, at any depth, sorted; and (name, reason) of the other
    arrays that could be meant as images.

    An image is a dataset HxW, HxWxC or CxHxW of uint8 or uint16, C 1, 3 or 4. A stack NxHxWxC or
    NxCxHxW is N images, its rows named "name/000012". Links to other files are not followed. What
    a header promises is checked before it is believed. Raises StoreError where the file cannot be
    read.
    """
    names: list[str] = []
    passed_over: list[tuple[str, str]] = []

    def collect(name: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset) or len(item.shape or ()) < 2:
            return
        rows = item.shape[0] if len(item.shape) == 4 else 1
        if reason := _reason_to_pass_over(item, rows, len(names)):
            if sum(side >= _SIDE for side in item.shape) >= 2:  # not a table, say of labels
                passed_over.append((name, reason))
        elif len(item.shape) == 4:
            names.extend(f"{name}/{row:06d}" for row in range(rows))
        else:
            names.append(name)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(collect)
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, ... for damage
        raise StoreError(
            f"{path} cannot be read as HDF5 ({error}): it is damaged, or was not closed by the "
            "program that wrote it"
        ) from error
    return sorted(names), sorted(passed_over)


def read_image(path: Path, name: str, max_megapixels: float = math.inf) -> np.ndarray:
    """One image that `list_images` named: HxW or HxWxC, uint8 or uint16.

    Raises PhotoError where it is not there, is damaged, would take more than 2 GiB, or has
    more pixels than max_megapixels.
    """
    try:
        with h5py.File(path, "r") as file:
            dataset, row = _find(file, name)
            linked = dataset.file.filename != file.filename
            if linked or dataset.is_virtual or dataset.external:
                raise PhotoError(f"{name} in {path} keeps its data in other files: not read")
            shape = dataset.shape if row is None else dataset.shape[1:]
            num_bytes = math.prod(shape) * dataset.dtype.itemsize
            if num_bytes > _MAX_BYTES:
                raise PhotoError(f"{name} in {path} is {num_bytes} bytes; at most {_MAX_BYTES}")
            sides = dict(zip(_axes(dataset.shape), dataset.shape, strict=True))
            if sides["H"] * sides["W"] > max_megapixels * 1e6:
                raise PhotoError(
                    f"an array of shape {shape}, over the limit of {max_megapixels:g} megapixels:"
                    " raise photo.max_megapixels to use it"
                )
            image = np.asarray(dataset[() if row is None else row])
            if _axes(dataset.shape).endswith("CHW"):
                image = np.ascontiguousarray(image.transpose(1, 2, 0))
    except PhotoError:
        raise
    except Exception as error:  # as above
        raise PhotoError(f"{name} in {path} cannot be read: {error}") from error
    return image.astype(image.dtype.newbyteorder("="), copy=False)


def _axes(shape: tuple[int, ...]) -> str:
    """What the axes of an image, or a stack of them, mean; empty for another array."""
    if len(shape) == 2:
        return "HW"
    fitting = (axes for axes in _AXES.get(len(shape), ()) if shape[axes.index("C")] in _CHANNELS)
    return next(fitting, "")


def _reason_to_pass_over(dataset: h5py.Dataset, rows: int, already: int) -> str:
    """Why the images of an array cannot be read; empty where they can."""
    shape, dtype = dataset.shape, dataset.dtype
    if dtype.kind != "u" or dtype.itemsize > 2:
        return f"an array of {dtype}: only uint8 and uint16 say what black and white are"
    if not _axes(shape) or min(shape) < 1:
        return f"an array of shape {shape}: expected HxW, HxWxC, CxHxW, NxHxWxC or NxCxHxW"
    if rows + already > _MAX_IMAGES:
        return f"{rows} images; at most {_MAX_IMAGES} of a file are read"
    promised = math.prod(shape) * dtype.itemsize
    if rows > 1 and promised > _MAX_SWELLING * dataset.id.get_storage_size():
        return f"it promises {rows} images and holds few of them: it was not written whole"
    return ""


def _find(file: h5py.File, name: str) -> tuple[h5py.Dataset, int | None]:
    """The dataset of an image, and its row where the dataset is a stack."""
    parent, _, row = name.rpartition("/")
    if row.isdecimal() and parent in file and isinstance(file[parent], h5py.Dataset):
        dataset, index = file[parent], int(row)
    else:
        dataset, index = file.get(name), None
    if not isinstance(dataset, h5py.Dataset) or _reason_to_pass_over(dataset, 1, 0):
        raise PhotoError(f"{file.filename} holds no image named {name}")
    if (len(dataset.shape) == 4) != (index is not None):
        raise PhotoError(f"{file.filename} holds no image named {name}: it is a stack of images")
    return dataset, index
