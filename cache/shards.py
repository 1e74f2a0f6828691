"""The Zarr side of a store: documents, shards and their bytes. The only importer of zarr.

The documents (zarr.json) are written here and not by zarr, so that a store has the same bytes
under every version of it, and each is sealed: one flipped bit in one (the separator "." made
"/") would make every shard read as fill. zarr encodes and decodes the shards.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer as AnyBuffer
from zarr.buffer.cpu import Buffer
from zarr.storage import LocalStore, MemoryStore

from evenlight.cache import files
from evenlight.cache.errors import StoreError
from evenlight.cache.schema import SCHEMA, ArraySpec
from evenlight.cache.system import sync_folder

OURS = "evenlight"  # our key in "attributes", and the sub-group with index, records and lock
Document = dict[str, Any]


@dataclass(frozen=True)
class _Form:
    """What every zarr.json of ours holds that is used here; arrays have all of it."""

    node_type: str
    attributes: dict[str, dict[str, Any]]
    shape: tuple[int, ...] = ()
    data_type: str = ""

    def __post_init__(self) -> None:
        is_array = self.node_type == "array"
        assert is_array == ("part" in self.attributes[OURS]), self.node_type
        assert is_array == bool(self.shape and self.data_type), self.shape
        assert all(side >= 0 for side in self.shape), self.shape


def group_document() -> Document:
    """The zarr.json of a group."""
    return _sealed({"zarr_format": 3, "node_type": "group"}, {"schema": SCHEMA})


def array_document(spec: ArraySpec, *, unit_size: int, num_slots: int) -> Document:
    """The zarr.json of an array: one photo per chunk, one unit per shard.

    zstd carries a checksum in each chunk and crc32c guards the shard's table of chunks: without
    them zarr returns flipped bits silently. All shards lie in the array's own folder.
    """
    number = np.dtype(spec.dtype)
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {
        "chunk_shape": [1, *spec.shape],
        "codecs": [
            little_endian if number.itemsize > 1 else {"name": "bytes"},
            {"name": "zstd", "configuration": {"level": 1, "checksum": True}},
        ],
        "index_codecs": [little_endian, {"name": "crc32c"}],
        "index_location": "end",
    }
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_slots, *spec.shape],
        "data_type": number.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [unit_size, *spec.shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if math.isnan(spec.fill) else number.type(spec.fill).item(),
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return _sealed(document, {"schema": SCHEMA, "part": spec.part})


def read_document(folder: Path) -> Document:
    """The zarr.json of ours in a folder. Raises StoreError where a bit of it has changed."""
    path = folder / "zarr.json"
    document = files.parse_json_object(path)
    try:
        ours = dict(document["attributes"][OURS])
        seal = ours.pop("sha256")
        rest = {key: value for key, value in document.items() if key != "attributes"}
        intact = _sealed(rest, ours)["attributes"][OURS]["sha256"] == seal
    except (KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise StoreError(f"{path} is damaged: its content does not match its own digest")
    files.checked(_Form, document, path)
    return document


def write_document(folder: Path, document: Document) -> None:
    """Write a zarr.json, making its folder. Raises OSError."""
    files.make_folder(folder)
    files.atomic_write(folder / "zarr.json", json.dumps(document, indent=1).encode("ascii"))


def about(document: Document) -> dict[str, Any]:
    """What a document says of itself: "schema", and for arrays "part"."""
    return dict(document["attributes"][OURS])


def remove_array(folder: Path) -> None:
    """Delete an array, its document last: a kill on the way leaves it known as ours."""
    for path in sorted(folder.iterdir()):
        if path.name != "zarr.json":
            path.unlink()
    (folder / "zarr.json").unlink()
    folder.rmdir()
    sync_folder(folder.parent)


def shard_path(array_folder: Path, unit: int, rank: int) -> Path:
    """Where the shard of a unit lies; rank: dimensions of one photo's entry."""
    return array_folder / ".".join(["c", str(unit), *["0"] * rank])


def encode_shard(document: Document, rows: np.ndarray) -> bytes:
    """The bytes of one shard: a function of document and rows (unit_size first) alone."""
    one_shard = document | {"shape": list(rows.shape)}
    memory: dict[str, AnyBuffer] = {"zarr.json": Buffer.from_bytes(json.dumps(one_shard).encode())}
    array = zarr.open_array(MemoryStore(memory), mode="r+", zarr_format=3)
    # Else zarr leaves out chunks equal to fill, and an empty mask looks like a lost one.
    array = array.with_config({"write_empty_chunks": True})
    array[...] = rows
    key = shard_path(Path(), 0, rows.ndim - 1).name
    return memory[key].to_bytes()


class ArrayReader:
    """One array of a store, opened for reading. Raises StoreError where its document is bad."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        document = read_document(folder)
        self.shape = tuple(document["shape"])  # slots first
        self.dtype = document["data_type"]
        try:
            store = LocalStore(folder, read_only=True)
            self._array = zarr.open_array(store, mode="r", zarr_format=3)
        except Exception as error:  # zarr has no common base of errors
            raise StoreError(f"{folder} does not open: {error}") from error

    def span(self, start: int, stop: int) -> np.ndarray:
        """Rows from start up to stop. Raises StoreError where a shard does not decode."""
        try:
            return np.asarray(self._array[start:stop])
        except Exception as error:  # zarr and its codecs have no common base of errors
            raise StoreError(f"{self.folder} does not decode: {error}") from error

    def pick(self, slots: np.ndarray) -> np.ndarray:
        """Rows of the slots, in any order; neighbours are read together.

        Not through zarr's integer indexing: 2.6 s against 0.04 s for 8 photos of 512x512x3.
        """
        unique, order = np.unique(slots, return_inverse=True)
        rows = np.empty((len(unique), *self.shape[1:]), self.dtype)
        first = 0
        for run in np.split(unique, np.flatnonzero(np.diff(unique) > 1) + 1):
            if len(run):
                rows[first : first + len(run)] = self.span(int(run[0]), int(run[-1]) + 1)
            first += len(run)
        return rows[order]


def _sealed(document: Mapping[str, Any], about: Mapping[str, Any]) -> Document:
    seal = files.sha256_bytes(files.canonical_json([document, about]))
    return {**document, "attributes": {OURS: {**about, "sha256": seal}}}
