"""Where operating systems differ: locks, what makes names durable, attributes of files, flags.

POSIX has them in fcntl and os.  Windows locks bytes (msvcrt), cannot flush a folder (NTFS keeps a
journal of names) and has named streams of a file for attributes.
"""

import contextlib
import os
from pathlib import Path

try:
    import fcntl

    POSIX = True
except ImportError:
    import msvcrt

    POSIX = False

LOCKED_BYTE = 1 << 30  # of a file: far behind its content, which others may read (Windows)
# Bytes as they are; opening a pipe that took a file's place must not wait for a writer.
READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
WRITE_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
"""Flags of os.open, for a photo to read and for a file that must not be there yet."""


def lock(descriptor: int) -> None:
    """Take the lock of an open file, which goes with the process.

    Raises BlockingIOError where another open file of it holds the lock, OSError where its file
    system has none.
    """
    if POSIX:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    position = os.lseek(descriptor, 0, os.SEEK_CUR)  # where who has the file open goes on
    os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except PermissionError as error:
        raise BlockingIOError(error.errno, error.strerror) from error
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)


def unlock(descriptor: int) -> None:
    """Give the lock back."""
    if POSIX:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork may hold the same open file
        return
    os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]


def lock_folder(folder: Path) -> int:
    """Take the lock of a folder of our own; it is held as long as what is returned is open.

    Raises OSError where another process holds it, or where it is no folder.
    """
    if POSIX:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    else:  # which opens no folder
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        lock(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def sync_folder(folder: Path) -> None:
    """Make the names in folder durable: renames and unlinks before it survive power loss."""
    if not POSIX:
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_attribute(path: Path, name: str, value: bytes) -> None:
    """Set a named attribute of a file, where its file system keeps any."""
    with contextlib.suppress(OSError, AttributeError):  # macOS has them, Python there has not
        if POSIX:
            os.setxattr(path, name, value)
        else:
            Path(f"{path}:{name}").write_bytes(value)


def attribute_of(path: Path, name: str) -> bytes:
    """A named attribute of a file; empty where there is none."""
    with contextlib.suppress(OSError, AttributeError):
        if POSIX:
            return os.getxattr(path, name)
        return Path(f"{path}:{name}").read_bytes()
    return b""
