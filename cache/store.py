"""The store of priors: a Zarr group whose shards are committed unit by unit.

A unit is one shard of every array, written by one process. Its record is written last and holds
the size and sha256 of each shard, so that a kill, a lost file or a flipped bit is always seen.
Every byte is read and written by its `Place`; zarr only encodes and decodes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from evenlight.cache import files, records, schema, shards
from evenlight.cache.errors import StoreError
from evenlight.cache.place import Place, WriterLock, given, place_of
from evenlight.cache.schema import (
    OURS,
    ArraySpec,
    Damage,
    Index,
    PartRecord,
    PhotoRecord,
    StoredArray,
    UnitRecord,
)

PartData = tuple[str, Mapping[str, np.ndarray]]  # fingerprint, array name -> rows of the unit

_CURE = "run `evenlight precompute` on the store to remake it"
_REPAIR = (
    "'evenlight cache verify --repair' forgets it and what was made by it, 'evenlight precompute' "
    "then remakes that"
)


class Store:
    """A store in a folder or a bucket. Make one with `create_or_open`, `open` or `attach`.

    All of them raise OutOfReach where a bucket does not answer, UsageError for a URL that is none
    of a bucket, EnvironmentLacks where the packages for buckets are missing.
    """

    def __init__(self, place: Place, index: Index, *, lock: WriterLock | None, token: str) -> None:
        self.index = index
        self._place = place
        self._lock = lock
        self._token = token  # "" for a reader
        self._arrays: dict[str, shards.ArrayReader] = {}
        self._kept: dict[str, tuple[int, bytes]] = {}  # array -> unit and shard last asked of it
        self._checked: set[tuple[str, int]] = set()  # array and unit, of shards read in place

    @property
    def path(self) -> str:
        """Where it is: an absolute path, or the URL as it was given."""
        return self._place.where

    @classmethod
    def create_or_open(cls, path: str | Path | Place, *, unit_size: int = 32) -> Self:
        """The store there, made if there is none; the one writing run until it is closed.

        path: a folder, or a URL (s3://BUCKET/FOLDER).
        unit_size counts only for a new store. Litter of killed runs is removed, and a damaged
        index is rebuilt from the records. Raises StoreError where another run writes to the
        store, the folder holds something else, or a newer evenlight made it.
        """
        place = place_of(path)
        try:
            if not records.may_become_store(place):
                raise StoreError(
                    f"{place.where} holds something else than a store: name a new folder"
                )
            lock = place.lock()
            lock.__enter__()
            try:
                place.clean()
                records.write_groups(place)
                index = records.read_or_recover_index(place, unit_size)
            except BaseException:
                lock.__exit__(None, None, None)
                raise
        except OSError as error:
            raise StoreError(f"store {place.where} cannot be written: {error.strerror}") from error
        return cls(place, index, lock=lock, token=lock.token)

    @classmethod
    def open(cls, path: str | Path | Place) -> Self:
        """The store there for reading. Raises StoreError where it is missing or damaged."""
        place = place_of(path)
        with files.reading(place.where):
            if not records.is_store(place):
                if not place.names():
                    raise StoreError(
                        f"there is no store at {place.where}: `evenlight precompute` makes one"
                    )
                raise StoreError(f"{place.where} is not a store of evenlight: name another folder")
        try:
            for reason in records.group_damages(place):
                raise StoreError(reason)
            index = records.read_index(place)
        except StoreError as error:
            raise StoreError(f"store {place.where}: {error}; {_CURE}") from error
        return cls(place, index, lock=None, token="")

    @staticmethod
    def exists(path: str | Path | Place) -> bool:
        """Something lies there, a store or not: `create_or_open` would not begin a new one."""
        place = place_of(path)
        with files.reading(place.where):
            return bool(place.names())

    @classmethod
    def attach(cls, path: str | Path | Place) -> Self:
        """The store there for a worker of the run that holds its lock.

        It stops writing, by StoreError, once that run no longer holds it.
        """
        store = cls.open(path)
        store._token = store._place.holder()
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
            self._place.clean()
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
            records.write_index(self._place, index)
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
                shards.remove_array(self._place, name)
            for name, document in wanted.items():
                if found.get(name) != document:
                    shards.write_document(self._place, name, document)
        self._arrays.clear()
        self._kept.clear()
        self._checked.clear()

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
        self._let_go(unit)
        with self._writing(f"unit {unit}"):
            if before is not None and kept != before.parts:
                records.write_record(self._place, UnitRecord(unit, before.photos, kept))
            documents = self._documents()
            written = {
                part: PartRecord(
                    fingerprint,
                    self._write_arrays(unit, part, arrays, documents),
                    records.software(),
                    tuple((notes or {}).get(part, ())),
                )
                for part, (fingerprint, arrays) in parts.items()
            }
            self._check_holder()  # else a run that took over could meet our shards
            record = UnitRecord(unit, tuple(photos), kept | written)
            records.write_record(self._place, record)
        return record

    def drop(self, unit: int, part: str) -> None:
        """Forget a part of a unit and those made from it, so that they are remade."""
        record = self.record(unit)
        if record is not None and part in record.parts:
            self._let_go(unit)
            with self._writing(f"unit {unit}"):
                records.write_record(self._place, record.without(part))

    def write_note(self, name: str, note: records.Note) -> None:
        """Keep a small named document of JSON values and arrays: what parts are made by."""
        with self._writing(f"note {name}"):
            records.write_note(self._place, name, note)

    def forget_note(self, name: str) -> None:
        """Remove a note, whole or damaged, and first the parts that were made by it."""
        for record in self.records():
            for part in schema.PARTS:
                if part in record.parts and name in record.parts[part].notes:
                    self.drop(record.unit, part)
                    break
        with self._writing(f"note {name}"):
            self._place.remove(records.note_name(name))

    # Reading

    def note(self, name: str) -> dict[str, Any] | None:
        """A note as it was written; None where there is none and no part was made by one.

        Raises StoreError where it is damaged, or missing and a record names it.
        """
        if name in records.note_names(self._place):
            try:
                return records.read_note(self._place, name)
            except StoreError as error:
                raise StoreError(f"store {self.path}: {error}; {_REPAIR}") from error
        for damage in records.note_damages(self._place, self.records()):
            if damage.note == name:
                raise StoreError(f"store {self.path}: {damage.reason}; {_REPAIR}")
        return None

    def notes(self) -> list[str]:
        """Names of the notes that are there, damaged ones too."""
        return records.note_names(self._place)

    def record(self, unit: int) -> UnitRecord | None:
        """The record of a unit; None where it is missing, damaged or another unit's."""
        try:
            return records.read_record(self._place, unit, self.index.unit_size)
        except StoreError:
            return None

    def records(self) -> Iterator[UnitRecord]:
        """The records there are, in order of units; those that `record` gives."""
        return records.read_records(self._place, self.index.num_units, self.index.unit_size)

    def read(self, unit: int, arrays: Iterable[str]) -> dict[str, np.ndarray]:
        """The rows of a unit: array name -> leading axis unit_size, as they were written.

        Size and digest of every shard are checked, and the bytes that were checked are decoded.
        Raises StoreError where the unit lacks an array or a byte of it has changed.
        """
        start = unit * self.index.unit_size
        stop = start + self.index.unit_size
        readers = self._readers(list(arrays))
        if not readers:  # nothing is asked of a unit that may not be there yet
            return {}
        return {
            name: readers[name].span(unit, shard, start, stop)
            for name, shard in self._shards(unit, readers)
        }

    def rows(self, array: str, slots: Sequence[int] | np.ndarray) -> np.ndarray:
        """Single photos' rows of one array, in the order asked; any thread may ask.

        A shard is checked, as `read` does, when it is first asked for.  On a disk no more than the
        rows is read from then on; of a bucket the last shard of each array stays in memory.
        """
        slots = np.asarray(slots, dtype=np.int64)
        reader = self._readers([array])[array]
        rows = np.empty((len(slots), *reader.shape[1:]), reader.dtype)
        for unit in np.unique(slots // self.index.unit_size).tolist():
            of_unit = slots // self.index.unit_size == unit
            if (array, unit) in self._checked:
                rows[of_unit] = reader.pick_in_place(slots[of_unit])
            else:
                shard = self._shard(unit, array, reader)
                rows[of_unit] = reader.pick(unit, shard, slots[of_unit])
        return rows

    def slots(self, part: str) -> list[int]:
        """Slots of usable photos: status ok, named by the index, in a unit that holds part."""
        return records.usable_slots(self.index, self.records(), part)

    def info(self, found: Iterable[UnitRecord] | None = None) -> dict[str, Any]:
        """Counts, sizes and fingerprints, as JSON values (keys: see `records.summarise`).

        found: the records, where they have been read.
        """
        found = self.records() if found is None else found
        return {"path": self.path, **records.summarise(self.index, found)}

    def digest(self) -> str:
        """One sha256 of all content: equal for any order, worker count and history of kills."""
        return records.content_digest(self.index, self.records())

    def verify(self) -> list[Damage]:
        """Check every byte of every part against its record, and the store's own files.

        To repair: `drop` what names a unit and a part, `forget_note` what names a note, then
        precompute remakes it and the rest.
        """
        damages = [Damage(None, "", "", reason) for reason in records.group_damages(self._place)]
        found = list(self.records())
        for name in sorted({name for record in found for name in record.arrays()}):
            try:
                shards.read_document(self._place, name)
            except StoreError as error:
                damages.append(Damage(None, "", name, str(error)))
        damages += records.note_damages(self._place, found)
        for unit in range(self.index.num_units):
            damages += self.verify_unit(unit)
        return damages

    def verify_unit(self, unit: int) -> list[Damage]:
        """What is damaged in one unit. A unit without a record is not made yet: no damage."""
        try:
            record = records.read_record(self._place, unit, self.index.unit_size)
        except StoreError as error:
            missing = isinstance(error.__cause__, FileNotFoundError)
            return [] if missing else [Damage(unit, "", "", str(error))]
        part_of = {name: part for part, entry in record.parts.items() for name in entry.arrays}
        return [
            Damage(unit, part_of[name], name, str(shard))
            for name, shard in records.read_shards(self._place, unit, record.arrays())
            if isinstance(shard, StoreError)
        ]

    # Inside

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        self._check_holder()
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{what} of store {self.path} could not be written: {error.strerror}"
                f"{self._place.room()}; what was whole before still is: "
                "put that right and run the same command again"
            ) from error

    def _check_holder(self) -> None:
        assert self._token, "this store was opened for reading"
        files.confirm_token(self._place.holder(), self._token, f"store {self.path}")

    def _let_go(self, unit: int) -> None:
        self._kept = {name: kept for name, kept in self._kept.items() if kept[0] != unit}
        self._checked = {(name, other) for name, other in self._checked if other != unit}

    def _shard(self, unit: int, array: str, reader: shards.ArrayReader) -> bytes:
        """A shard that is checked now, or was the last one asked of its array."""
        kept_unit, shard = self._kept.get(array, (None, b""))
        if kept_unit != unit:
            ((_, shard),) = self._shards(unit, {array: reader})
            if reader.is_in_place:
                self._checked.add((array, unit))
            else:
                self._kept[array] = unit, shard
        return shard

    def _readers(self, arrays: Sequence[str]) -> dict[str, shards.ArrayReader]:
        lacking = [array for array in arrays if array not in self._arrays]
        names = [shards.document_name(array) for array in lacking]
        for array, name, data in zip(lacking, names, self._place.read_many(names), strict=True):
            where = self._place.at(name)
            try:
                document = shards.as_document(given(data, where), where)
                self._arrays[array] = self._reader(array, document)
            except StoreError as error:
                raise StoreError(f"array {array!r}: {error}; {_CURE}") from error
        return {array: self._arrays[array] for array in arrays}

    def _reader(self, array: str, document: shards.Document) -> shards.ArrayReader:
        folder = self._place.folder
        return shards.ArrayReader(self._place.at(array), document, folder and folder / array)

    def _documents(self) -> dict[str, shards.Document]:
        """The arrays there whose documents are whole: name -> zarr.json."""
        folders = [name for name in self._place.names() if name.isidentifier() and name != OURS]
        names = [shards.document_name(folder) for folder in folders]
        documents = {}
        for folder, name, data in zip(folders, names, self._place.read_many(names), strict=True):
            if isinstance(data, bytes):
                with suppress(StoreError):
                    document = shards.as_document(data, self._place.at(name))
                    if "part" in shards.about(document):
                        documents[folder] = document
        return documents

    def _write_arrays(
        self,
        unit: int,
        part: str,
        arrays: Mapping[str, np.ndarray],
        documents: Mapping[str, shards.Document],
    ) -> dict[str, StoredArray]:
        documents = {k: d for k, d in documents.items() if shards.about(d)["part"] == part}
        assert set(arrays) <= set(documents), (part, sorted(arrays), sorted(documents))
        stored: dict[str, StoredArray] = {}

        def encoded() -> Iterator[tuple[str, bytes]]:  # one by one: a unit can be large
            for name, rows in arrays.items():
                shape = (self.index.unit_size, *documents[name]["shape"][1:])
                dtype = documents[name]["data_type"]
                found = (rows.shape, rows.dtype.name)
                assert found == (shape, dtype), (name, *found)
                data = shards.encode_shard(documents[name], rows)
                # Of the bytes meant, not of those written: a bad write must not be blessed.
                stored[name] = StoredArray(len(data), files.sha256_bytes(data), shape[1:], dtype)
                yield shards.shard_name(name, unit, len(shape) - 1), data

        self._place.write_many(encoded())
        return stored

    def _shards(
        self, unit: int, readers: Mapping[str, shards.ArrayReader]
    ) -> Iterator[tuple[str, bytes]]:
        """Array and shard, byte for byte what the record of the unit says."""
        try:
            record = records.read_record(self._place, unit, self.index.unit_size)
            stored = record.arrays()
            for name, reader in readers.items():
                if name not in stored:
                    raise StoreError(f"array {name!r} of unit {unit} is not made yet")
                self._check_form(unit, name, stored[name], reader)
            wanted = {name: stored[name] for name in readers}
            for name, shard in records.read_shards(self._place, unit, wanted):
                if isinstance(shard, StoreError):
                    raise shard
                yield name, shard
        except StoreError as error:
            raise StoreError(f"store {self.path}: {error}; {_CURE}") from error

    def _check_form(
        self, unit: int, name: str, stored: StoredArray, reader: shards.ArrayReader
    ) -> None:
        num_slots, *shape = reader.shape
        whole = num_slots >= (unit + 1) * self.index.unit_size
        if not whole or (stored.shape, stored.dtype) != (tuple(shape), reader.dtype):
            raise StoreError(
                f"array {name!r} of unit {unit} is {stored.dtype} {stored.shape}, "
                f"but its zarr.json is of {num_slots} slots of {reader.dtype} {tuple(shape)}"
            )
