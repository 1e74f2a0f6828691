"""What torchrun tells each process of a training (no torch), and what only the first one says."""

import os
from dataclasses import dataclass

from evenlight.cache.errors import EvenlightError

_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """Which of the processes this one is, counted from 0."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine
    here: int = 1  # how many those are


def launched() -> Launch:
    """As the environment says; alone where nothing, or not all of it, was told."""
    if not all(name in os.environ for name in _TOLD):
        return Launch()
    rank, count, local_rank = (int(os.environ[name]) for name in _TOLD[:3])
    return Launch(rank, count, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", count)))


class SaidByFirst(EvenlightError):  # noqa: N818 - reads as the sentence it is
    """What every process of a training meets at the same place: rank 0 alone says it."""


class Lost(SaidByFirst):
    """Another process of the training is gone."""
