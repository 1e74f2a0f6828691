"""What goes wrong with one photo ends that photo, not the run."""

from collections.abc import Iterator
from contextlib import contextmanager

import cv2

from evenlight.cache.errors import PhotoError, one_line


@contextmanager
def one_photo() -> Iterator[None]:
    """Around work on a single photo: what libraries raise there becomes a PhotoError.

    Errors of ours that are about settings, weights or a store (UsageError, EnvironmentLacks,
    StoreError) pass: every photo would meet them.
    """
    try:
        yield
    except MemoryError as error:
        raise PhotoError("needs more memory than there is") from error
    except (ValueError, RuntimeError, cv2.error) as error:
        raise PhotoError(f"{type(error).__name__}: {one_line(error)}") from error
