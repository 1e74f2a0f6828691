"""What a store holds: parts, arrays, the index of photos, and the records of units."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from evenlight.cache.errors import StoreError
from evenlight.cache.files import canonical_json, checked, sha256_bytes

SCHEMA = 3  # raised when an older store could be misread, or what a part computes has changed
OURS = "evenlight"  # the key of ours in attributes, and the folder of index, records and lock
PARTS = ("photo", "regions", "embeddings", "pseudo_gt")  # each is made from those before it
MOST_PHOTOS = 10**8  # of a store; more is a damaged number
OK, FAILED, EMPTY = "ok", "failed", "empty"
STATUSES = (OK, FAILED, EMPTY)


def parts_from(part: str) -> tuple[str, ...]:
    """The part and those made from it, which go stale with it."""
    return PARTS[PARTS.index(part) :]


def fingerprint(**fields: Any) -> str:
    """Hex sha256 of named JSON values: what a part was made from. Order does not matter."""
    return sha256_bytes(canonical_json(fields))


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store. shape is that of one photo's entry, without the leading axis."""

    name: str
    part: str
    shape: tuple[int, ...]
    dtype: str  # a numpy name: "uint8", "float16", ...
    fill: float = 0  # what absent photos read as; not a legal value where there is one

    def __post_init__(self) -> None:
        assert self.part in PARTS, self.part
        assert self.name.isidentifier() and self.name != OURS, self.name
        assert all(side > 0 for side in self.shape), self.shape
        assert np.dtype(self.dtype).name == self.dtype, self.dtype


@dataclass(frozen=True)
class Index:
    """Which photo is in which slot. Slot s is row s of every array, in unit s // unit_size."""

    names: tuple[str | None, ...]  # None is a hole: a photo that was there and is gone
    unit_size: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    sources: tuple[str, ...] = ()  # folders and files that photos came from

    def __post_init__(self) -> None:
        assert 1 <= self.unit_size <= MOST_PHOTOS, f"unit_size {self.unit_size}"
        named = [name for name in self.names if name is not None]
        assert len(named) == len(set(named)), "a photo has two slots"

    @property
    def num_units(self) -> int:
        return math.ceil(len(self.names) / self.unit_size)

    @property
    def num_slots(self) -> int:
        """Rows of every array: whole units."""
        return self.num_units * self.unit_size

    def unit_names(self, unit: int) -> tuple[str | None, ...]:
        """The unit_size names of a unit, None for holes and behind the end."""
        names = self.names[unit * self.unit_size : (unit + 1) * self.unit_size]
        return names + (None,) * (self.unit_size - len(names))

    def from_folder(self, source: str) -> Self:
        """The index with one more source of photos."""
        return dataclasses.replace(self, sources=tuple(dict.fromkeys([*self.sources, source])))

    def updated(self, names: Iterable[str], *, closed: Collection[int] = ()) -> Self:
        """The index of the photos named now.

        Photos known before keep their slots, so that their units stay valid; those gone leave
        holes; new ones, sorted, fill holes first and then the end.  closed: units that must stay
        as they are, and so take no new photo.
        """
        wanted = set(names)
        slots = [name if name in wanted else None for name in self.names]
        new = sorted(wanted.difference(self.names), reverse=True)
        if new and self.num_units - 1 in closed:
            slots += [None] * (self.num_slots - len(slots))
        for slot, name in enumerate(slots):
            if name is None and new and slot // self.unit_size not in closed:
                slots[slot] = new.pop()
        return dataclasses.replace(self, names=(*slots, *reversed(new)))

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str) -> Self:
        """Raises StoreError where the document, read from there, is of another schema or shape."""
        check_schema(document.get("schema"), where)
        if "source" in document:  # of an evenlight that knew the last one alone
            document = {**document, "sources": [document["source"]]}
        return checked(cls, document, where)


@dataclass(frozen=True)
class PhotoRecord:
    """What became of the photo in one slot of a unit."""

    name: str | None
    sha256: str = ""  # of the input file's bytes
    status: str = OK
    reason: str = ""  # for status "failed"
    part: str = ""  # that could not be made of it, for status "failed"

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert self.part in ("", *PARTS), self.part
        assert (self.name is None) == (self.status == EMPTY), self


EMPTY_SLOT = PhotoRecord(name=None, status=EMPTY)


@dataclass(frozen=True)
class StoredArray:
    """One shard: its size and digest on disk, and what it decodes to (without leading axis)."""

    bytes: int
    sha256: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        assert self.bytes >= 0 and all(side > 0 for side in self.shape), self


@dataclass(frozen=True)
class PartRecord:
    fingerprint: str
    arrays: dict[str, StoredArray]
    software: dict[str, str] = dataclasses.field(default_factory=dict)  # package -> version
    notes: tuple[str, ...] = ()  # names of notes that it was made by

    def __post_init__(self) -> None:
        assert all(name.isidentifier() for name in (*self.arrays, *self.notes)), self


@dataclass(frozen=True)
class UnitRecord:
    """Says that parts of a unit are whole, and what they were made from. Written last."""

    unit: int
    photos: tuple[PhotoRecord, ...]  # unit_size of them
    parts: dict[str, PartRecord]

    def __post_init__(self) -> None:
        assert 0 <= self.unit * len(self.photos) < MOST_PHOTOS, f"unit {self.unit}"
        assert set(self.parts) == set(PARTS[: len(self.parts)]), f"parts {sorted(self.parts)}"

    @property
    def complete(self) -> bool:
        """Every part is there."""
        return set(self.parts) == set(PARTS)

    def holds(self, part: str, expected_fingerprint: str) -> bool:
        """The part is there and was made from what the fingerprint stands for."""
        return part in self.parts and self.parts[part].fingerprint == expected_fingerprint

    def without(self, part: str) -> Self:
        """The record less this part and those made from it."""
        gone = parts_from(part)
        kept = {name: value for name, value in self.parts.items() if name not in gone}
        return dataclasses.replace(self, parts=kept)

    def same_photos(self, photos: Iterable[PhotoRecord]) -> bool:
        """The same input bytes under the same names; outcomes may differ."""
        return [(p.name, p.sha256) for p in self.photos] == [(p.name, p.sha256) for p in photos]

    def arrays(self) -> dict[str, StoredArray]:
        """The entries of all arrays, whichever part they are of."""
        return {name: one for part in self.parts.values() for name, one in part.arrays.items()}

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA} | dataclasses.asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str) -> Self:
        """Raises StoreError where the document, read from there, is of another schema or shape."""
        check_schema(document.get("schema"), where)
        return checked(cls, document, where)


@dataclass(frozen=True)
class Damage:
    """Something `Store.verify` found. part and array are "" where another file is hit."""

    unit: int | None  # None: a file of the whole store
    part: str
    array: str
    reason: str
    note: str = ""  # the note that is damaged or missing


def check_schema(found: Any, what: str) -> None:
    """Raise StoreError unless this version reads the schema."""
    if isinstance(found, int) and found > SCHEMA:
        raise StoreError(
            f"{what} was written by a newer evenlight (schema {found}, this one reads {SCHEMA}): "
            "update evenlight"
        )
    if found != SCHEMA:
        raise StoreError(f"{what} has schema {found!r}, expected {SCHEMA}: make the store anew")
