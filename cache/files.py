"""Files that are whole or absent: atomic writes, sealed JSON, digests, and the lock of a store.

Every byte of a local store goes to disk through `atomic_write`. What systems do differently:
system.py; what a bucket does: bucket.py.
"""

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from evenlight.cache import system
from evenlight.cache.errors import StoreError, UsageError
from evenlight.cache.system import POSIX, WRITE_NEW, lock_folder, sync_folder

Checked = TypeVar("Checked")
TEMPORARY_SUFFIX = ".evenlight-tmp"
# Ours, and those that a killed zarr leaves; nobody else's files match.
_LITTER = re.compile(rf"({re.escape(TEMPORARY_SUFFIX)}|\.[0-9a-f]{{32}}\.partial)$")
_SEAL = "sha256"


def atomic_write(path: Path, data: bytes) -> None:
    """Put data at path so that any reader, and any kill, finds the old file or the new one.

    On return file and name are on disk (fsync of both). Raises OSError that names path, leaving no
    temporary.
    """
    start = start_of_temporary(path.name)
    temporary = path.with_name(f".{start}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        descriptor = os.open(temporary, WRITE_NEW, 0o666)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                system.lock(descriptor)  # so that `remove_left` passes it over
            remaining = memoryview(data)
            while remaining:
                remaining = remaining[os.write(descriptor, remaining) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException as error:  # Ctrl-C too must leave no litter
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write that fails names no file
        raise
    sync_folder(path.parent)


def remove_left(temporary: Path) -> None:
    """Remove what a killed writer left, unless it is being written."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            system.lock(descriptor)  # its writer has it, as long as it lives
        except BlockingIOError:
            return
        except OSError:  # no locks there
            pass
        finally:
            os.close(descriptor)
        temporary.unlink()


def start_of_temporary(name: str) -> str:
    """How the temporaries of a file of that name begin, after a dot: a name has at most 255 bytes,
    or UTF-16 units on Windows."""
    if not POSIX:
        return name[:200]
    return os.fsdecode(os.fsencode(name)[:200])


def try_to_write(path: Path) -> None:
    """Raise UsageError where a small file could not be written there; nothing is left behind."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with tempfile.TemporaryFile(dir=path.absolute().parent, buffering=0) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Create folder and its missing parents, each one's name on disk before the next."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def clean_temporaries(folder: Path) -> list[Path]:
    """Remove what killed writers left anywhere under folder, and name it.

    Only for a folder that nobody else is writing to: a live writer would lose its temporary.
    """
    litter = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if _LITTER.search(name)
    ]
    for path in litter:
        path.unlink(missing_ok=True)
    return litter


def private_folder(prefix: str) -> Path:
    """A new temporary folder that goes when this process ends.

    Those of this prefix whose process was killed go now: its lock on the folder is gone with it.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # of another user, or in use
            if time.time() - left.stat().st_mtime > 60:  # younger: may not have its lock yet
                os.close(lock_folder(left))
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(_remove, folder, lock_folder(folder))
    return folder


def _remove(folder: Path, lock: int) -> None:
    with contextlib.suppress(OSError):  # in a child that was forked it is open no more
        os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of data."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file of any size. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(document: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII (names of any bytes pass)."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON object atomically, sealed."""
    atomic_write(path, sealed_json(document))


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote, without its seal.

    Raises StoreError, whose text says what is wrong with the file, where it is missing, is not
    readable, or differs in any bit that matters from what was written.
    """
    with reading(path):
        data = path.read_bytes()
    return unsealed_json(data, path)


def sealed_json(document: dict[str, Any]) -> bytes:
    """A JSON object as a file: its key "sha256" is the digest of all the rest."""
    assert _SEAL not in document, "the seal is added here"
    as_read = json.loads(canonical_json(document))  # keys that are numbers sort as text then
    sealed = as_read | {_SEAL: sha256_bytes(canonical_json(as_read))}
    return json.dumps(sealed, indent=1).encode("ascii") + b"\n"


def unsealed_json(data: bytes, where: str | Path) -> dict[str, Any]:
    """What `sealed_json` was given.  Raises StoreError where any bit that matters differs."""
    document = json_object(data, where)
    seal = document.pop(_SEAL, None)
    try:
        intact = seal == sha256_bytes(canonical_json(document))
    except ValueError:  # a number too large, which reads as infinity
        intact = False
    if not intact:
        raise StoreError(f"{where} is damaged: its content does not match its own digest")
    return document


def json_object(data: bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object that the bytes read there must be.  Raises StoreError."""
    try:
        document = json.loads(data, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is damaged: not JSON ({error})") from error
    if not isinstance(document, dict):
        raise StoreError(f"{where} is damaged: expected a JSON object")
    return document


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@contextlib.contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what is missing or cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise StoreError(f"{what} is missing") from error
    except OSError as error:
        raise StoreError(f"{what} cannot be read: {error.strerror}") from error


def checked(kind: type[Checked], document: Any, where: str | Path) -> Checked:
    """A JSON value as a dataclass: every field there, of its type, and its own asserts hold.

    where: what it was read from.  Raises StoreError that names it and the first field at fault.
    """
    try:
        found: Checked = _adapter(kind).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise StoreError(f"{where} is damaged: {field}: {first['msg'][:200]}") from error
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can hold
        raise StoreError(f"{where} is damaged: it holds text that is not Unicode") from error
    return found


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


class Lock:
    """One writer at a time: the lock of an open file, whose content names the holder.

    The system frees it when the process ends in whatever way, so a stale lock cannot exist and
    two contenders cannot both take over; the file stays, emptied on release. Forked children do
    not inherit it.
    """

    def __init__(self, path: Path, subject: str) -> None:
        """path: the lock file, its folder existing. subject: what it guards, for messages."""
        self.path = path
        self.subject = subject
        self.token = ""  # the content while held; a worker of this run can compare it
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """This process holds it; False in a forked child of the holder."""
        return self._descriptor is not None

    def __enter__(self) -> Self:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            system.lock(descriptor)
            self.token = new_token()
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, self.token.encode())
        except BlockingIOError:
            os.close(descriptor)
            raise StoreError(f"{self.subject} is in use by {self._holder()}") from None
        except OSError as error:
            os.close(descriptor)
            raise StoreError(
                f"{self.subject} cannot be locked ({error.strerror}): "
                "put it on a local disk with free space"
            ) from error
        self._descriptor = descriptor
        _held.add(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is None:
            return
        _held.discard(self)
        os.ftruncate(self._descriptor, 0)
        system.unlock(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def confirm(self) -> None:
        """Raise StoreError unless the file at path is still the one that was locked here."""
        confirm_token(read_token(self.path), self.token, self.subject)

    def _holder(self) -> str:
        # The winner writes its name just after it has locked: give it a moment.
        for _ in range(50):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return holder_of(read_token(self.path))
            time.sleep(0.02)
        return "another process that has not said its name: try again"


def new_token() -> str:
    """What this process writes into a lock that it takes: one line that no other run writes."""
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
    return json.dumps(holder)


def holder_of(token: str) -> str:
    """Who wrote a token, for people.  Raises ValueError, KeyError or TypeError where it is none."""
    holder = json.loads(token)
    return (
        f"process {holder['pid']} on host {holder['host']} "
        f"(since {holder['started']}): wait until it ends, or stop it"
    )


def read_token(path: Path) -> str:
    """What the holder of the lock at path wrote, or "" where nobody holds it."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def confirm_token(found: str, token: str, subject: str) -> None:
    """Raise StoreError unless the token found in a lock is that of the run that holds it."""
    if found != token:
        raise StoreError(f"{subject} was removed or taken over by another run: this one stops")


_held: set[Lock] = set()


def _forget_locks_in_child() -> None:
    # A surviving child must not keep the lock of a killed parent.
    for lock in list(_held):
        if lock._descriptor is not None:
            os.close(lock._descriptor)
            lock._descriptor = None
    _held.clear()


if hasattr(os, "register_at_fork"):  # Windows forks nothing
    os.register_at_fork(after_in_child=_forget_locks_in_child)
