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


def list_images(path: Path) -> list[str]:
    """Names of the images in an HDF5 file, at any depth, sorted.

    An image is a dataset HxW, HxWx1, HxWx3 or HxWx4 of uint8 or uint16. A stack NxHxWxC is N
    images, its rows named "name/000012". Links to other files are not followed. Raises
    StoreError where the file cannot be read.
    """
    names: list[str] = []

    def collect(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and _holds_images(item):
            rows = range(item.shape[0]) if len(item.shape) == 4 else None
            names.extend([name] if rows is None else [f"{name}/{row:06d}" for row in rows])

    try:
        with h5py.File(path, "r") as file:
            file.visititems(collect)
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError, ... for damage
        raise StoreError(
            f"{path} cannot be read as HDF5 ({error}): it is damaged, or was not closed by the "
            "program that wrote it"
        ) from error
    return sorted(names)


def read_image(path: Path, name: str) -> np.ndarray:
    """One image that `list_images` named, as stored: HxW or HxWxC, uint8 or uint16.

    Raises PhotoError where it is not there, is damaged, or would take more than 2 GiB.
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
            image = np.asarray(dataset[() if row is None else row])
    except PhotoError:
        raise
    except Exception as error:  # as above
        raise PhotoError(f"{name} in {path} cannot be read: {error}") from error
    return image.astype(image.dtype.newbyteorder("="), copy=False)


def _holds_images(dataset: h5py.Dataset) -> bool:
    shape = dataset.shape
    return (
        shape is not None
        and dataset.dtype.kind == "u"
        and dataset.dtype.itemsize in (1, 2)
        and min(shape, default=0) > 0
        and (len(shape) == 2 or (len(shape) in (3, 4) and shape[-1] in _CHANNELS))
    )


def _find(file: h5py.File, name: str) -> tuple[h5py.Dataset, int | None]:
    """The dataset of an image, and its row where the dataset is a stack."""
    parent, _, row = name.rpartition("/")
    if row.isdecimal() and parent in file and isinstance(file[parent], h5py.Dataset):
        dataset, index = file[parent], int(row)
    else:
        dataset, index = file.get(name), None
    if not isinstance(dataset, h5py.Dataset) or not _holds_images(dataset):
        raise PhotoError(f"{file.filename} holds no image named {name}")
    if (len(dataset.shape) == 4) != (index is not None):
        raise PhotoError(f"{file.filename} holds no image named {name}: it is a stack of images")
    return dataset, index
