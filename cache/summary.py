"""What a store holds, counted from its index and records."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from evenlight.cache.schema import EMPTY, FAILED, OK, PARTS, SCHEMA, Index, UnitRecord, fingerprint


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
        "source": index.source,
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

    Photos of units not yet written are new to it, and settings and source are empty.
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
