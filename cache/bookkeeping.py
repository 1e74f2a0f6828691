"""The store's own files beside its arrays: groups, index, records, and checks against them."""

import logging
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from evenlight.cache import files, schema, shards
from evenlight.cache.errors import StoreError
from evenlight.cache.schema import Index, StoredArray, UnitRecord
from evenlight.cache.summary import recovered_index

_SOFTWARE = ("evenlight", "numpy", "open_clip_torch", "torch", "ultralytics", "zarr")

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
    record = UnitRecord.from_json(files.read_json(record_path(store, unit)))
    if record.unit != unit or len(record.photos) != unit_size:
        raise StoreError(
            f"{record_path(store, unit)} is the record of unit {record.unit} with "
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


def read_or_recover_index(store: Path, unit_size: int) -> Index:
    try:
        document = files.read_json(index_path(store))
    except StoreError as error:
        records = []
        for file in sorted(units_folder(store).glob("*.json")):
            with suppress(StoreError):
                records.append(UnitRecord.from_json(files.read_json(file)))
        if records:
            _log.warning("%s; rebuilt from the records of %d units", error, len(records))
        return recovered_index(records, unit_size)
    return Index.from_json(document)


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
