"""The store's own files beside its arrays, and what they say: groups, index, records, notes.

Checks against them, counts and digests are here too. Every file is sealed JSON.
"""

import base64
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from evenlight.cache import files, schema, shards
from evenlight.cache.errors import StoreError
from evenlight.cache.schema import (
    EMPTY,
    FAILED,
    OK,
    PARTS,
    SCHEMA,
    Damage,
    Index,
    StoredArray,
    UnitRecord,
    fingerprint,
)

_SOFTWARE = ("evenlight", "numpy", "open_clip_torch", "torch", "ultralytics", "zarr")

_NO_NOTES = ("index", "zarr")
_ARRAY = "array of"  # key by which a note's value is an array: its dtype

Note = Mapping[str, Any]
"""JSON values and numeric arrays by name."""

_log = logging.getLogger(__name__)


def lock_path(store: Path) -> Path:
    return store / shards.OURS / "lock"


def index_path(store: Path) -> Path:
    return store / shards.OURS / "index.json"


def units_folder(store: Path) -> Path:
    return store / shards.OURS / "units"


def record_path(store: Path, unit: int) -> Path:
    return units_folder(store) / f"{unit:06d}.json"


def read_record(store: Path, unit: int, unit_size: int) -> UnitRecord:
    path = record_path(store, unit)
    record = UnitRecord.from_json(files.read_json(path), path)
    if record.unit != unit or len(record.photos) != unit_size:
        raise StoreError(
            f"{path} is the record of unit {record.unit} with "
            f"{len(record.photos)} photos, expected unit {unit} with {unit_size}"
        )
    return record


def write_record(store: Path, record: UnitRecord) -> None:
    files.write_json(record_path(store, record.unit), record.to_json())


def may_become_store(folder: Path) -> bool:
    """It is a store, or is empty but for what a kill at its making left."""
    if not folder.is_dir():
        return False
    ours = folder / shards.OURS
    return units_folder(folder).is_dir() or (
        all(path == ours for path in folder.iterdir())
        and not (ours.exists() and any(ours.iterdir()))
    )


def write_groups(store: Path) -> None:
    for folder in (store, store / shards.OURS):
        try:
            document = shards.read_document(folder)
        except StoreError:  # not written yet, or damaged: its content is known
            shards.write_document(folder, shards.group_document())
        else:
            schema.check_schema(shards.about(document).get("schema"), str(store))


def group_damages(store: Path) -> list[str]:
    reasons = []
    for folder in (store, store / shards.OURS):
        try:
            document = shards.read_document(folder)
            schema.check_schema(shards.about(document).get("schema"), str(store))
        except StoreError as error:
            reasons.append(str(error))
    return reasons


def read_index(store: Path) -> Index:
    path = index_path(store)
    return Index.from_json(files.read_json(path), path)


def read_or_recover_index(store: Path, unit_size: int) -> Index:
    try:
        return read_index(store)
    except StoreError as error:
        records = []
        for file in sorted(units_folder(store).glob("*.json")):
            with suppress(StoreError):
                records.append(UnitRecord.from_json(files.read_json(file), file))
        if records:
            _log.warning("%s; rebuilt from the records of %d units", error, len(records))
        return recovered_index(records, unit_size)


@cache
def software() -> dict[str, str]:
    versions = {}
    for package in _SOFTWARE:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def check_bytes(store: Path, unit: int, name: str, stored: StoredArray) -> None:
    """Raise StoreError unless the shard on disk is byte for byte what the record says."""
    path = shards.shard_path(store / name, unit, len(stored.shape))
    what = f"array {name!r} of unit {unit} ({path})"
    try:
        size = path.stat().st_size
        digest = files.sha256_file(path) if size == stored.bytes else ""
    except FileNotFoundError:
        raise StoreError(f"{what} is missing") from None
    except OSError as error:
        raise StoreError(f"{what} cannot be read: {error.strerror}") from error
    if size != stored.bytes:
        raise StoreError(f"{what} is damaged: {size} bytes, expected {stored.bytes}")
    if digest != stored.sha256:
        raise StoreError(f"{what} is damaged: sha256 {digest}, expected {stored.sha256}")


# Notes


def note_path(store: Path, name: str) -> Path:
    """Where the note of this name lies; index and zarr.json are none."""
    assert name.isidentifier() and name not in _NO_NOTES, name
    return store / shards.OURS / f"{name}.json"


def note_names(store: Path) -> list[str]:
    """Notes that are there, damaged ones too."""
    found = (path.stem for path in (store / shards.OURS).glob("*.json"))
    return sorted(name for name in found if name.isidentifier() and name not in _NO_NOTES)


def write_note(store: Path, name: str, note: Note) -> None:
    """One sealed file, replaced whole.  Arrays among its values are kept bit for bit."""
    plain = {
        key: _packed(value) if isinstance(value, np.ndarray) else value
        for key, value in note.items()
    }
    files.write_json(note_path(store, name), plain)


def read_note(store: Path, name: str) -> dict[str, Any]:
    """What `write_note` wrote.  Raises StoreError where it is missing or damaged."""
    document = files.read_json(note_path(store, name))
    try:
        return {key: _unpacked(value) for key, value in document.items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{note_path(store, name)} is damaged: {error!r}") from error


def note_damages(store: Path, records: Iterable[UnitRecord]) -> list[Damage]:
    """Notes that do not read, and those that are gone though parts were made by them."""
    damages = []
    there = note_names(store)
    for name in there:
        try:
            read_note(store, name)
        except StoreError as error:
            damages.append(Damage(None, "", "", str(error), note=name))
    made_by: dict[str, list[int]] = {}
    for record in records:
        for name in sorted({name for part in record.parts.values() for name in part.notes}):
            made_by.setdefault(name, []).append(record.unit)
    for name, units in sorted(made_by.items()):
        if name not in there:
            reason = f"{note_path(store, name)} is missing, by which {len(units)} units were made"
            damages.append(Damage(None, "", "", reason, note=name))
    return damages


def _packed(array: np.ndarray) -> dict[str, Any]:
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    data = base64.b64encode(little.tobytes()).decode("ascii")
    return {_ARRAY: array.dtype.name, "shape": list(array.shape), "data": data}


def _unpacked(value: Any) -> Any:
    if not (isinstance(value, Mapping) and _ARRAY in value):
        return value
    kind = np.dtype(value[_ARRAY])
    if kind.kind not in "fiub":
        raise ValueError(f"arrays of {kind} are no numbers")
    numbers = np.frombuffer(base64.b64decode(value["data"], validate=True), kind.newbyteorder("<"))
    return numbers.astype(kind).reshape(value["shape"])


# Counts and digests


def summarise(index: Index, records: Iterable[UnitRecord]) -> dict[str, Any]:
    """Counts, sizes in bytes, and fingerprints with their number of units, as JSON values.

    A photo is "waiting" until its unit is written under its name.
    """
    statuses: Counter[str] = Counter()
    failed: dict[str, str] = {}
    parts: dict[str, dict[str, Any]] = {
        part: {"units": 0, "bytes": 0, "fingerprints": {}} for part in PARTS
    }
    complete = 0
    for record in records:
        complete += record.complete
        for photo, name in zip(record.photos, index.unit_names(record.unit), strict=True):
            if name is not None and photo.name == name:
                statuses[photo.status] += 1
                if photo.status == FAILED:
                    failed[name] = photo.reason
        for part, entry in record.parts.items():
            counts = parts[part]
            counts["units"] += 1
            counts["bytes"] += sum(array.bytes for array in entry.arrays.values())
            seen = counts["fingerprints"]
            seen[entry.fingerprint] = seen.get(entry.fingerprint, 0) + 1
    named = sum(name is not None for name in index.names)
    return {
        "schema": SCHEMA,
        "sources": list(index.sources),
        "unit_size": index.unit_size,
        "units": {"all": index.num_units, "complete": complete},
        "photos": {
            "ok": statuses[OK],
            "failed": statuses[FAILED],
            "waiting": named - statuses.total(),
            "holes": len(index.names) - named,
        },
        "failed": failed,
        "parts": parts,
    }


def usable_slots(index: Index, records: Iterable[UnitRecord], part: str) -> list[int]:
    """Slots of photos with status ok that the index still names, in units that hold the part."""
    return [
        record.unit * index.unit_size + row
        for record in records
        if part in record.parts
        for row, (photo, name) in enumerate(
            zip(record.photos, index.unit_names(record.unit), strict=True)
        )
        if photo.status == OK and photo.name == name
    ]


def content_digest(index: Index, records: Iterable[UnitRecord]) -> str:
    """One sha256 of all content: equal for any order, worker count and history of kills."""
    units = [
        {
            "unit": record.unit,
            "photos": [[photo.name, photo.sha256, photo.status] for photo in record.photos],
            "parts": {
                part: [entry.fingerprint, {k: v.sha256 for k, v in entry.arrays.items()}]
                for part, entry in record.parts.items()
            },
        }
        for record in records
    ]
    names = _without_holes_at_end(index.names)
    return fingerprint(schema=SCHEMA, unit_size=index.unit_size, names=names, units=units)


def recovered_index(records: Iterable[UnitRecord], unit_size: int) -> Index:
    """The index that records speak of, for a store that lost its own.

    Photos of units not yet written are new to it, and settings and sources are empty.
    """
    names: list[str | None] = []
    for record in records:
        unit_size = len(record.photos)
        start = record.unit * unit_size
        names += [None] * (start + unit_size - len(names))
        seen = set(names)
        for row, photo in enumerate(record.photos):
            if photo.status != EMPTY and photo.name not in seen:
                names[start + row] = photo.name
    return Index(names=_without_holes_at_end(names), unit_size=unit_size)


def _without_holes_at_end(names: Sequence[str | None]) -> tuple[str | None, ...]:
    last = max((slot for slot, name in enumerate(names) if name is not None), default=-1)
    return tuple(names[: last + 1])
