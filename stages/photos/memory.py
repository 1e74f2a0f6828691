"""How much memory there is for a photo."""

import contextlib
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that can be had without swapping: of the machine, or of the container if that is
    less."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError, IndexError):  # no container, or without a limit
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = (_CGROUP / "memory.stat").read_text()
        reclaimable = int(stat.split("inactive_file ")[1].split()[0])
        free = min(free, limit - used + reclaimable)
    return free
