"""The store's own files beside its arrays, and what they say: groups, index, records, notes.

Checks against them, counts and digests are here too. Every file is sealed JSON.
"""

import base64
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np

from evenlight.cache import files, schema, shards
from evenlight.cache.errors import StoreError
from evenlight.cache.place import Place, given
from evenlight.cache.schema import (
    EMPTY,
    FAILED,
    OK,
    OURS,
    PARTS,
    SCHEMA,
    Damage,
    Index,
    StoredArray,
    UnitRecord,
    fingerprint,
)

_SOFTWARE = ("evenlight", "numpy", "open_clip_torch", "torch", "ultralytics", "zarr")

INDEX = f"{OURS}/index.json"
UNITS = f"{OURS}/units"  # the folder of records
_MARKS = {"units", "lock"}  # in our folder: what the making of a store begins with
_GROUPS = ("", OURS)
_NO_NOTES = ("index", "zarr")
_ARRAY = "array of"  # key by which a note's value is an array: its dtype

Note = Mapping[str, Any]
"""JSON values and numeric arrays by name."""

_log = logging.getLogger(__name__)


def is_store(place: Place) -> bool:
    """It holds a store, whole or not.  Raises OSError."""
    return not _MARKS.isdisjoint(place.names(OURS))


def may_become_store(place: Place) -> bool:
    """It is a store, or is empty but for what a kill at its making left.  Raises OSError."""
    return is_store(place) or (set(place.names()) <= {OURS} and not place.names(OURS))


def record_name(unit: int) -> str:
    return f"{UNITS}/{unit:06d}.json"


def read_record(place: Place, unit: int, unit_size: int) -> UnitRecord:
    name = record_name(unit)
    with files.reading(place.at(name)):
        data = place.read(name)
    return _as_record(data, place.at(name), unit, unit_size)


def read_records(place: Place, units: int, unit_size: int) -> Iterator[UnitRecord]:
    """The whole records there are of so many units, in order of units."""
    there = set(_json_names(place, UNITS))
    found = [unit for unit in range(units) if record_name(unit) in there]
    for unit, data in zip(found, place.read_many(list(map(record_name, found))), strict=True):
        if isinstance(data, bytes):
            with suppress(StoreError):
                yield _as_record(data, place.at(record_name(unit)), unit, unit_size)


def _as_record(data: bytes, where: str, unit: int, unit_size: int) -> UnitRecord:
    record = UnitRecord.from_json(files.unsealed_json(data, where), where)
    if record.unit != unit or len(record.photos) != unit_size:
        raise StoreError(
            f"{where} is the record of unit {record.unit} with "
            f"{len(record.photos)} photos, expected unit {unit} with {unit_size}"
        )
    return record


def write_record(place: Place, record: UnitRecord) -> None:
    place.write(record_name(record.unit), files.sealed_json(record.to_json()))


def write_groups(place: Place) -> None:
    for folder in _GROUPS:
        try:
            document = shards.read_document(place, folder)
        except StoreError:  # not written yet, or damaged: its content is known
            shards.write_document(place, folder, shards.group_document())
        else:
            schema.check_schema(shards.about(document).get("schema"), place.where)


def group_damages(place: Place) -> list[str]:
    reasons = []
    for folder in _GROUPS:
        try:
            document = shards.read_document(place, folder)
            schema.check_schema(shards.about(document).get("schema"), place.where)
        except StoreError as error:
            reasons.append(str(error))
    return reasons


def read_index(place: Place) -> Index:
    return Index.from_json(_read_json(place, INDEX), place.at(INDEX))


def write_index(place: Place, index: Index) -> None:
    place.write(INDEX, files.sealed_json(index.to_json()))


def read_or_recover_index(place: Place, unit_size: int) -> Index:
    try:
        return read_index(place)
    except StoreError as error:
        records = []
        names = _json_names(place, UNITS)
        for name, data in zip(names, place.read_many(names), strict=True):
            if isinstance(data, bytes):
                with suppress(StoreError):
                    document = files.unsealed_json(data, place.at(name))
                    records.append(UnitRecord.from_json(document, place.at(name)))
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


def read_shards(
    place: Place, unit: int, arrays: Mapping[str, StoredArray]
) -> Iterator[tuple[str, bytes | StoreError]]:
    """Array and shard of a unit, byte for byte what its record says; or how it differs."""
    names = [shards.shard_name(name, unit, len(x.shape)) for name, x in arrays.items()]
    for (array, stored), name, data in zip(
        arrays.items(), names, place.read_many(names), strict=True
    ):
        shard: bytes | StoreError
        try:
            shard = _checked(data, stored, f"array {array!r} of unit {unit} ({place.at(name)})")
        except StoreError as error:
            shard = error
        yield array, shard


def _checked(data: bytes | OSError, stored: StoredArray, what: str) -> bytes:
    data = given(data, what)
    if len(data) != stored.bytes:
        raise StoreError(f"{what} is damaged: {len(data)} bytes, expected {stored.bytes}")
    digest = files.sha256_bytes(data)
    if digest != stored.sha256:
        raise StoreError(f"{what} is damaged: sha256 {digest}, expected {stored.sha256}")
    return data


def _read_json(place: Place, name: str) -> dict[str, Any]:
    with files.reading(place.at(name)):
        data = place.read(name)
    return files.unsealed_json(data, place.at(name))


def _json_names(place: Place, folder: str) -> list[str]:
    with files.reading(place.at(folder)):
        return [f"{folder}/{name}" for name in place.names(folder) if name.endswith(".json")]


# Notes


def note_name(name: str) -> str:
    """Where the note of this name lies; index and zarr.json are none."""
    assert name.isidentifier() and name not in _NO_NOTES, name
    return f"{OURS}/{name}.json"


def note_names(place: Place) -> list[str]:
    """Notes that are there, damaged ones too."""
    found = (name.rpartition("/")[2][: -len(".json")] for name in _json_names(place, OURS))
    return [name for name in found if name.isidentifier() and name not in _NO_NOTES]


def write_note(place: Place, name: str, note: Note) -> None:
    """One sealed file, replaced whole.  Arrays among its values are kept bit for bit."""
    plain = {
        key: _packed(value) if isinstance(value, np.ndarray) else value
        for key, value in note.items()
    }
    place.write(note_name(name), files.sealed_json(plain))


def read_note(place: Place, name: str) -> dict[str, Any]:
    """What `write_note` wrote.  Raises StoreError where it is missing or damaged."""
    document = _read_json(place, note_name(name))
    try:
        return {key: _unpacked(value) for key, value in document.items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{place.at(note_name(name))} is damaged: {error!r}") from error


def note_damages(place: Place, records: Iterable[UnitRecord]) -> list[Damage]:
    """Notes that do not read, and those that are gone though parts were made by them."""
    damages = []
    there = note_names(place)
    for name in there:
        try:
            read_note(place, name)
        except StoreError as error:
            damages.append(Damage(None, "", "", str(error), note=name))
    made_by: dict[str, list[int]] = {}
    for record in records:
        for name in sorted({name for part in record.parts.values() for name in part.notes}):
            made_by.setdefault(name, []).append(record.unit)
    for name, units in sorted(made_by.items()):
        if name not in there:
            where = place.at(note_name(name))
            reason = f"{where} is missing, by which {len(units)} units were made"
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
