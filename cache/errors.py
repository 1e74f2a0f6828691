"""Errors a user can meet. Each message says what, where, and what to do; cli.py maps exit codes."""

LONGEST = 300  # characters of a library's message; torch writes pages


def one_line(error: Exception) -> str:
    """What a library says, in one line that is not too long."""
    return " ".join(str(error).split())[:LONGEST]


class EvenlightError(Exception):
    """Base of every error that is the user's to act on."""


class UsageError(EvenlightError):
    """A bad argument or configuration value (exit 2)."""


class StoreError(EvenlightError):
    """A stale, damaged, missing or busy store or checkpoint (exit 3)."""


class OutOfReach(EvenlightError):  # noqa: N818 - reads as the sentence it is
    """A bucket does not answer, or refuses: nothing is known of the store in it (exit 3).

    No StoreError, so that nothing takes what could not be looked at for damaged or missing.
    """


class EnvironmentLacks(EvenlightError):  # noqa: N818 - reads as the sentence it is
    """Weights, a package or a device that the command needs are not there (exit 4)."""


class PhotoError(EvenlightError):
    """One photo cannot be used; the run goes on and lists it at the end."""
