"""How commands end: exit codes, and the signals that stop them."""

import signal
from types import FrameType

from evenlight.cache.errors import (
    EnvironmentLacks,
    EvenlightError,
    OutOfReach,
    StoreError,
    UsageError,
)
from evenlight.stages.corrector.launch import SaidByFirst, launched

SOME_FAILED, USAGE, STORE, ENVIRONMENT = 1, 2, 3, 4
EXIT_CODES: tuple[tuple[type[EvenlightError], int], ...] = (
    (UsageError, USAGE),
    (StoreError, STORE),
    (OutOfReach, STORE),
    (EnvironmentLacks, ENVIRONMENT),
    (EvenlightError, SOME_FAILED),
)


def lacks(error: MemoryError | ModuleNotFoundError) -> str:
    """What the environment lacks, in words."""
    if isinstance(error, ModuleNotFoundError):
        return f"this needs {error.name}, which is not installed"
    return f"this needs more memory than there is ({error})"


def left_to_first(error: BaseException) -> bool:
    """Whether every process of a training meets this alike, and this one is not the first."""
    return launched().rank > 0 and isinstance(error, UsageError | SaidByFirst | Stopped)


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM: what is being written is left whole or absent on the way out."""


def stop_on_signals() -> None:
    """Make the first SIGINT or SIGTERM raise Stopped, and the second end the process."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _stop)


def stop_at_once() -> None:
    """Make the next SIGINT or SIGTERM end the process, whatever it is at."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_DFL)


def _stop(number: int, _: FrameType | None) -> None:
    stop_at_once()  # the second one
    raise Stopped(128 + number)
