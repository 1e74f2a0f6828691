"""The store of priors: a Zarr group whose shards are committed unit by unit.

A unit is one shard of every array, written by one process. Its record is written last and holds
the size and sha256 of each shard, so that a kill, a lost file or a flipped bit is always seen.
Every byte is written by `files.atomic_write`; zarr only encodes and decodes.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from evenlight.cache import files, records, schema, shards
from evenlight.cache.errors import StoreError
from evenlight.cache.schema import (
    ArraySpec,
    Damage,
    Index,
    PartRecord,
    PhotoRecord,
    StoredArray,
    UnitRecord,
)
from evenlight.cache.system import sync_folder

PartData = tuple[str, Mapping[str, np.ndarray]]  # fingerprint, array name -> rows of the unit

_CURE = "run `evenlight precompute` on the store to remake it"
_REPAIR = (
    "'evenlight cache verify --repair' forgets it and what was made by it, 'evenlight precompute' "
    "then remakes that"
)


class Store:
    """A store at a local path. Make one with `create_or_open`, `open` or `attach`."""

    def __init__(self, path: Path, index: Index, *, lock: files.Lock | None, token: str) -> None:
        self.path = path
        self.index = index
        self._lock = lock
        self._token = token  # "" for a reader
        self._arrays: dict[str, shards.ArrayReader] = {}
        self._trusted: set[tuple[str, int]] = set()  # (array, unit) whose digest was checked

    @classmethod
    def create_or_open(cls, path: str | Path, *, unit_size: int = 32) -> Self:
        """The store at path, made if there is none; the one writing run until it is closed.

        unit_size counts only for a new store. Litter of killed runs is removed, and a damaged
        index is rebuilt from the records. Raises StoreError where another run writes to the
        store, the folder holds something else, or a newer evenlight made it.
        """
        path = Path(path).absolute()
        if path.exists() and not records.may_become_store(path):
            raise StoreError(f"{path} holds something else than a store: name a new folder")
        try:
            files.make_folder(records.units_folder(path))
            lock = files.Lock(records.lock_path(path), f"store {path}")
            lock.__enter__()
            try:
                files.clean_temporaries(path)
                records.write_groups(path)
                index = records.read_or_recover_index(path, unit_size)
            except BaseException:
                lock.__exit__(None, None, None)
                raise
        except OSError as error:
            raise StoreError(f"store {path} cannot be written: {error.strerror}") from error
        return cls(path, index, lock=lock, token=lock.token)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The store at path for reading. Raises StoreError where it is missing or damaged."""
        path = Path(path).absolute()
        if not path.is_dir():
            raise StoreError(f"there is no store at {path}: `evenlight precompute` makes one")
        if not records.units_folder(path).is_dir():
            raise StoreError(f"{path} is not a store of evenlight: name another folder")
        try:
            for reason in records.group_damages(path):
                raise StoreError(reason)
            index = records.read_index(path)
        except StoreError as error:
            raise StoreError(f"store {path}: {error}; {_CURE}") from error
        return cls(path, index, lock=None, token="")

    @classmethod
    def attach(cls, path: str | Path) -> Self:
        """The store at path for a worker of the run that holds its lock.

        It stops writing, by StoreError, once that run no longer holds it.
        """
        store = cls.open(path)
        store._token = files.read_token(records.lock_path(store.path))
        if not store._token:
            raise StoreError(f"store {store.path} is not being written to by any run")
        return store

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the lock, and remove what killed workers left."""
        if self._lock is not None and self._lock.held:
            files.clean_temporaries(self.path)
            self._lock.__exit__(None, None, None)
        self._token = ""

    # Writing

    def write_index(self, index: Index) -> None:
        """Make index the store's own. Call `ensure_arrays` after it."""
        if self.index.names and index.unit_size != self.index.unit_size:
            raise StoreError(
                f"store {self.path} has {self.index.unit_size} photos a unit, got "
                f"{index.unit_size}: the unit size is fixed when a store is made"
            )
        with self._writing("the index"):
            files.write_json(records.index_path(self.path), index.to_json())
        self.index = index

    def ensure_arrays(self, specs: Sequence[ArraySpec]) -> None:
        """Make the arrays of the store just these, grown to the index.

        Where the shape or dtype of an array changed, units keep what they have of it until it is
        written anew: their records say what their shards are, so that nothing is lost if the
        change is taken back.  An array that is not wanted goes once no unit has it.
        """
        size = {"unit_size": self.index.unit_size, "num_slots": self.index.num_slots}
        wanted = {spec.name: shards.array_document(spec, **size) for spec in specs}
        assert len(wanted) == len(specs), "two arrays of one name"
        with self._writing("the arrays"):
            found = self._documents()
            if found == wanted:
                return
            held = {name for record in self.records() for name in record.arrays()}
            for name in found.keys() - wanted.keys() - held:
                shards.remove_array(self.path / name)
            for name, document in wanted.items():
                if found.get(name) != document:
                    shards.write_document(self.path / name, document)
        self._arrays.clear()
        self._trusted.clear()

    def write_parts(
        self,
        unit: int,
        photos: Sequence[PhotoRecord],
        parts: Mapping[str, PartData],
        *,
        notes: Mapping[str, Sequence[str]] | None = None,
    ) -> UnitRecord:
        """Write whole parts of a unit and commit them; returns the new record.

        photos: what became of each slot, unit_size of them. parts: part -> (fingerprint,
        {array: rows}), rows with leading axis unit_size, every array of the part. notes: part ->
        names of the notes it was made by, without which it counts as damaged. Earlier parts
        of the unit stay if its photos are the same bytes, later ones are dropped. Raises
        StoreError where the disk is full or the earlier parts are not there.
        """
        assert 0 <= unit < self.index.num_units, unit
        assert len(photos) == self.index.unit_size, len(photos)
        first = min(parts, key=schema.PARTS.index)
        before = self.record(unit)
        kept: dict[str, PartRecord] = {}
        if before is not None and before.same_photos(photos):
            kept = before.without(first).parts
        num_parts = len(kept) + len(parts)
        if {*kept, *parts} != set(schema.PARTS[:num_parts]):
            raise StoreError(
                f"unit {unit} of store {self.path} has no parts before {first!r} "
                f"of the same photos: {_CURE}"
            )
        self._distrust(unit)
        with self._writing(f"unit {unit}"):
            if before is not None and kept != before.parts:
                records.write_record(self.path, UnitRecord(unit, before.photos, kept))
            written = {
                part: PartRecord(
                    fingerprint,
                    self._write_arrays(unit, part, arrays),
                    records.software(),
                    tuple((notes or {}).get(part, ())),
                )
                for part, (fingerprint, arrays) in parts.items()
            }
            self._check_holder()  # else a run that took over could meet our shards
            record = UnitRecord(unit, tuple(photos), kept | written)
            records.write_record(self.path, record)
        return record

    def drop(self, unit: int, part: str) -> None:
        """Forget a part of a unit and those made from it, so that they are remade."""
        record = self.record(unit)
        if record is not None and part in record.parts:
            self._distrust(unit)
            with self._writing(f"unit {unit}"):
                records.write_record(self.path, record.without(part))

    def write_note(self, name: str, note: records.Note) -> None:
        """Keep a small named document of JSON values and arrays: what parts are made by."""
        with self._writing(f"note {name}"):
            records.write_note(self.path, name, note)

    def forget_note(self, name: str) -> None:
        """Remove a note, whole or damaged, and first the parts that were made by it."""
        for record in self.records():
            for part in schema.PARTS:
                if part in record.parts and name in record.parts[part].notes:
                    self.drop(record.unit, part)
                    break
        with self._writing(f"note {name}"):
            path = records.note_path(self.path, name)
            if path.exists():
                path.unlink()
                sync_folder(path.parent)

    # Reading

    def note(self, name: str) -> dict[str, Any] | None:
        """A note as it was written; None where there is none and no part was made by one.

        Raises StoreError where it is damaged, or missing and a record names it.
        """
        if name in records.note_names(self.path):
            try:
                return records.read_note(self.path, name)
            except StoreError as error:
                raise StoreError(f"store {self.path}: {error}; {_REPAIR}") from error
        for damage in records.note_damages(self.path, self.records()):
            if damage.note == name:
                raise StoreError(f"store {self.path}: {damage.reason}; {_REPAIR}")
        return None

    def notes(self) -> list[str]:
        """Names of the notes that are there, damaged ones too."""
        return records.note_names(self.path)

    def record(self, unit: int) -> UnitRecord | None:
        """The record of a unit; None where it is missing, damaged or another unit's."""
        try:
            return records.read_record(self.path, unit, self.index.unit_size)
        except StoreError:
            return None

    def records(self) -> Iterator[UnitRecord]:
        """The records there are, in order of units."""
        for unit in range(self.index.num_units):
            record = self.record(unit)
            if record is not None:
                yield record

    def read(self, unit: int, arrays: Iterable[str]) -> dict[str, np.ndarray]:
        """The rows of a unit: array name -> leading axis unit_size, as they were written.

        Size and digest of a shard are checked the first time this object reads it. Raises
        StoreError where the unit lacks an array or a byte of it has changed.
        """
        start = unit * self.index.unit_size
        stop = start + self.index.unit_size
        return {name: self._checked(name, [unit]).span(start, stop) for name in arrays}

    def rows(self, array: str, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """Single photos' rows of one array, in the order asked. Checked as `read` does."""
        slots = np.asarray(slots, dtype=np.int64)
        units = np.unique(slots // self.index.unit_size).tolist()
        return self._checked(array, units).pick(slots)

    def slots(self, part: str) -> list[int]:
        """Slots of usable photos: status ok, named by the index, in a unit that holds part."""
        return records.usable_slots(self.index, self.records(), part)

    def info(self, found: Iterable[UnitRecord] | None = None) -> dict[str, Any]:
        """Counts, sizes and fingerprints, as JSON values (keys: see `records.summarise`).

        found: the records, where they have been read.
        """
        found = self.records() if found is None else found
        return {"path": str(self.path), **records.summarise(self.index, found)}

    def digest(self) -> str:
        """One sha256 of all content: equal for any order, worker count and history of kills."""
        return records.content_digest(self.index, self.records())

    def verify(self) -> list[Damage]:
        """Check every byte of every part against its record, and the store's own files.

        To repair: `drop` what names a unit and a part, `forget_note` what names a note, then
        precompute remakes it and the rest.
        """
        damages = [Damage(None, "", "", reason) for reason in records.group_damages(self.path)]
        for name in sorted({name for record in self.records() for name in record.arrays()}):
            try:
                shards.read_document(self.path / name)
            except StoreError as error:
                damages.append(Damage(None, "", name, str(error)))
        damages += records.note_damages(self.path, self.records())
        for unit in range(self.index.num_units):
            damages += self.verify_unit(unit)
        return damages

    def verify_unit(self, unit: int) -> list[Damage]:
        """What is damaged in one unit. A unit without a record is not made yet: no damage."""
        if not records.record_path(self.path, unit).exists():
            return []
        try:
            record = records.read_record(self.path, unit, self.index.unit_size)
        except StoreError as error:
            return [Damage(unit, "", "", str(error))]
        damages = []
        for part, entry in record.parts.items():
            for name, stored in entry.arrays.items():
                try:
                    records.check_bytes(self.path, unit, name, stored)
                except StoreError as error:
                    damages.append(Damage(unit, part, name, str(error)))
        return damages

    # Inside

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        self._check_holder()
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.path).free / 1e6 if self.path.exists() else 0
            raise StoreError(
                f"{what} of store {self.path} could not be written: {error.strerror} "
                f"({free:.0f} MB free); what was whole before still is: "
                "put that right and run the same command again"
            ) from error

    def _check_holder(self) -> None:
        assert self._token, "this store was opened for reading"
        files.confirm_token(records.lock_path(self.path), self._token, f"store {self.path}")

    def _distrust(self, unit: int) -> None:
        self._trusted = {(name, other) for name, other in self._trusted if other != unit}

    def _array(self, name: str) -> shards.ArrayReader:
        if name not in self._arrays:
            try:
                self._arrays[name] = shards.ArrayReader(self.path / name)
            except StoreError as error:
                raise StoreError(f"array {name!r}: {error}; {_CURE}") from error
        return self._arrays[name]

    def _documents(self) -> dict[str, shards.Document]:
        """The arrays on disk whose documents are whole: name -> zarr.json."""
        documents = {}
        for folder in sorted(self.path.iterdir()):
            if folder.is_dir() and folder.name != shards.OURS:
                with suppress(StoreError):
                    document = shards.read_document(folder)
                    if "part" in shards.about(document):
                        documents[folder.name] = document
        return documents

    def _write_arrays(
        self, unit: int, part: str, arrays: Mapping[str, np.ndarray]
    ) -> dict[str, StoredArray]:
        documents = {k: d for k, d in self._documents().items() if shards.about(d)["part"] == part}
        assert set(arrays) <= set(documents), (part, sorted(arrays), sorted(documents))
        stored = {}
        for name, rows in arrays.items():
            shape = (self.index.unit_size, *documents[name]["shape"][1:])
            dtype = documents[name]["data_type"]
            assert (rows.shape, rows.dtype.name) == (shape, dtype), (name, rows.shape, rows.dtype)
            data = shards.encode_shard(documents[name], rows)
            files.atomic_write(shards.shard_path(self.path / name, unit, len(shape) - 1), data)
            # Of the bytes meant, not of those on disk: a bad write must not be blessed.
            stored[name] = StoredArray(len(data), files.sha256_bytes(data), shape[1:], dtype)
        return stored

    def _checked(self, name: str, units: Iterable[int]) -> shards.ArrayReader:
        reader = self._array(name)
        for unit in units:
            if (name, unit) not in self._trusted:
                self._check(unit, name, reader)
                self._trusted.add((name, unit))
        return reader

    def _check(self, unit: int, name: str, reader: shards.ArrayReader) -> None:
        try:
            record = records.read_record(self.path, unit, self.index.unit_size)
            stored = record.arrays().get(name)
            if stored is None:
                raise StoreError(f"array {name!r} of unit {unit} is not made yet")
            num_slots, *shape = reader.shape
            whole = num_slots >= (unit + 1) * self.index.unit_size
            if not whole or (stored.shape, stored.dtype) != (tuple(shape), reader.dtype):
                raise StoreError(
                    f"array {name!r} of unit {unit} is {stored.dtype} {stored.shape}, "
                    f"but its zarr.json is of {num_slots} slots of {reader.dtype} {tuple(shape)}"
                )
            records.check_bytes(self.path, unit, name, stored)
        except StoreError as error:
            raise StoreError(f"store {self.path}: {error}; {_CURE}") from error
