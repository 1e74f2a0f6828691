"""Where a store lies: a folder of a disk, or the objects under a prefix of a bucket.

All that differs between the two is behind `Place`: how a file becomes whole, which files there are,
and how one writer keeps the others out.  The files of a store have names such as "photo/c.0.0.0.0".
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

from evenlight.cache import files
from evenlight.cache.errors import EnvironmentLacks, UsageError
from evenlight.cache.schema import OURS
from evenlight.cache.system import sync_folder

LOCK = f"{OURS}/lock"  # the name of the lock, which stays, emptied, when it is free
BUCKET = "s3://"  # how the URL of a place in a bucket begins
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters at least: C:/ is a path


class WriterLock(AbstractContextManager[Any], Protocol):
    """The lock of a store, taken on entry.  Raises StoreError where another run has it."""

    token: str  # what it says while it is held; a worker of this run compares it

    @property
    def held(self) -> bool:
        """This process took it, and has not given it back."""


class Place(Protocol):
    """Where the files of one store lie.

    What fails on a disk raises OSError, with strerror; a bucket that does not answer, OutOfReach.
    """

    where: str
    """An absolute path, or a URL as it was given: for messages, and for other processes."""

    @property
    def folder(self) -> Path | None:
        """Where its files can be read in part; None where each is fetched whole."""

    def at(self, name: str) -> str:
        """Where a file lies, for messages."""

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder, files and folders, sorted; nothing where there is none.

        Raises OSError where the folder is a file.
        """

    def read(self, name: str) -> bytes:
        """A file.  Raises FileNotFoundError where it is missing."""

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        """Files in the order of their names; instead of one that cannot be read, why."""

    def write(self, name: str, data: bytes) -> None:
        """Put data there so that any reader, and any kill, finds the old file or the new one.

        On return it lasts.
        """

    def write_many(self, named: Iterable[tuple[str, bytes]]) -> None:
        """Write files, by name, as they come; all of them last on return."""

    def remove(self, name: str) -> None:
        """Remove a file; it may be missing."""

    def remove_folder(self, folder: str, *, last: str) -> None:
        """Remove a folder of files, the one named last after all others."""

    def lock(self) -> WriterLock:
        """The lock of the one run that writes, not taken yet."""

    def holder(self) -> str:
        """The token of the run that holds the lock, "" where none does."""

    def clean(self) -> None:
        """Remove what killed writers left; for the holder of the lock."""

    def room(self) -> str:
        """What to add where a write failed: how much room is left, if that can be known."""


def place_of(where: "str | Path | Place") -> Place:
    """The place of a path or of a URL (s3://BUCKET/FOLDER); a place is itself.

    Raises UsageError for other URLs, EnvironmentLacks where the packages for buckets are missing.
    """
    if not isinstance(where, str | Path):
        return where
    if not is_url(where):
        return Disk(Path(where))
    if isinstance(where, Path) or not where.startswith(BUCKET):  # a Path drops one of the slashes
        raise UsageError(
            f"{where} cannot hold a store: name a folder, or, as text, {BUCKET}BUCKET/FOLDER"
        )
    try:
        from evenlight.cache.bucket import Bucket
    except ModuleNotFoundError as error:
        raise EnvironmentLacks(
            f"a store at {where} needs {error.name}: pip install 'evenlight[s3]'"
        ) from error
    return Bucket(where)


def given(data: bytes | OSError, what: str) -> bytes:
    """A file as `read_many` gave it.  Raises StoreError where it gave none."""
    with files.reading(what):
        if isinstance(data, OSError):
            raise data
    return data


def is_url(where: str | Path) -> bool:
    """It is no path but a URL, or one that was taken for a path."""
    return _URL.match(str(where)) is not None


def refuse_url(path: str | Path, what: str) -> None:
    """Raise UsageError where a path is a URL.  what: is to be on a disk, in the plural."""
    if is_url(path):
        raise UsageError(f"{what} lie on a disk, not at {path}: name a folder")


class Disk:
    """A local folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.where = str(self.folder)

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(path.name for path in (self.folder / folder).iterdir())
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_many(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        for name in names:
            try:
                yield self.read(name)
            except OSError as error:
                yield error

    def write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        files.make_folder(path.parent)
        files.atomic_write(path, data)

    def write_many(self, named: Iterable[tuple[str, bytes]]) -> None:
        for name, data in named:
            self.write(name, data)

    def remove(self, name: str) -> None:
        path = self.folder / name
        with suppress(FileNotFoundError):
            path.unlink()
            sync_folder(path.parent)

    def remove_folder(self, folder: str, *, last: str) -> None:
        path = self.folder / folder
        for name in self.names(folder):
            if name != last:
                (path / name).unlink()
        (path / last).unlink()
        path.rmdir()
        sync_folder(path.parent)

    def lock(self) -> files.Lock:
        path = self.folder / LOCK
        files.make_folder(path.parent)
        return files.Lock(path, f"store {self.where}")

    def holder(self) -> str:
        return files.read_token(self.folder / LOCK)

    def clean(self) -> None:
        files.clean_temporaries(self.folder)

    def room(self) -> str:
        if not self.folder.exists():
            return ""
        return f" ({shutil.disk_usage(self.folder).free / 1e6:.0f} MB free)"
