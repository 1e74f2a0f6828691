"""The photos of a store as training reads them: all in memory, or read ahead of the steps.

What a step needs is known before it is taken, since draws are a function of (seed, step).  So where
not all photos fit, threads read those of the coming steps while the step at hand is taken, each
rank those of its own rows.  As many as there is room for stay from then on: steps visit photos in
an order that is new in every epoch, so which of them stay makes no difference, and those that were
used last are the worst to keep.
"""

# N photos of the set, S canvas side (the working size)

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from evenlight.stages.corrector.batches import Photo
from evenlight.stages.corrector.ranks import ALONE, Ranks
from evenlight.stages.corrector.streams import About, Draw, is_blank, small_copy

READERS = 4  # threads
MOST_AHEAD = 256  # photos that are read ahead


@contextmanager
def reading() -> Iterator[ThreadPoolExecutor]:
    """Threads that read; what they have not begun when it ends is left."""
    # one thread's work is not spread over more: where all do that, they wait for each other
    readers = ThreadPoolExecutor(READERS, "reader", torch.set_num_threads, (1,))
    try:
        yield readers
    finally:
        readers.shutdown(cancel_futures=True)


class Ready(NamedTuple):
    """A step whose photos are here."""

    chosen: Draw
    photos: Mapping[int, Photo]
    waited: float  # seconds, for photos to be read


class Photos(Protocol):
    """What training reads."""

    @property
    def about(self) -> About: ...

    @property
    def ranks(self) -> Ranks:
        """Which has its rows of the steps, and who has the others."""

    def ready(self, draws: Iterable[Draw], ranks: Ranks) -> Generator[Ready, None, None]:
        """The steps of the draws in order, each with the photos of this rank's rows.

        Close it when done.  Raises StoreError where a photo cannot be read.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData(Mapping[int, Photo]):
    """All photos in memory: on the training device, or on the host."""

    photo: Tensor  # u8 N,3,S,S, RGB sRGB; entries as in Photo
    extent: Tensor  # integers N,2: true height and width, multiples of 8
    proto: Tensor  # f16 N,32,S/4,S/4
    p3: Tensor  # f16 N,C,S/8,S/8
    regions: Tensor  # u8 N,S,S
    pseudo_gt: Tensor  # u8 N,3,S,S
    confidence: Tensor  # f16 N,S/4,S/4
    well_exposed: Tensor  # bool N
    names: Sequence[str]  # of the photos, for messages
    ranks: Ranks = ALONE

    def __getitem__(self, i: int) -> Photo:
        return Photo(*(getattr(self, name)[i] for name in Photo._fields))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    @cached_property
    def about(self) -> About:
        extents = self.extent.tolist()
        photos = [photo.cpu() for photo in self.photo]
        seen = list(zip(photos, extents, strict=True))
        return About(
            names=self.names,
            extents=extents,
            well_exposed=self.well_exposed.tolist(),
            blank=[is_blank(*one) for one in seen],
            small=torch.stack([small_copy(*one) for one in seen]),
            p3_channels=self.p3.shape[1],
        )

    def ready(self, draws: Iterable[Draw], ranks: Ranks) -> Generator[Ready, None, None]:
        for chosen in draws:
            yield Ready(chosen, self, 0.0)


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Photos that are read when they are needed, in host memory.

    read: one photo by its index, in any thread.  room: how many fit in memory, at least `least`.
    """

    about: About
    read: Callable[[int], Photo]
    room: int
    ranks: Ranks = ALONE
    _kept: dict[int, Future[Photo]] = field(default_factory=dict)

    @staticmethod
    def least(rows: int) -> int:
        """Photos that must fit: a step and two ahead of it, each row with photo and target."""
        return 3 * 2 * rows

    def ready(self, draws: Iterable[Draw], ranks: Ranks) -> Generator[Ready, None, None]:
        ahead: deque[tuple[Draw, dict[int, Future[Photo]]]] = deque()
        most = min(MOST_AHEAD, self.room * 2 // 3)
        with reading() as readers:
            for chosen in draws:
                samples = [chosen.samples[row] for row in ranks.rows(len(chosen.samples))]
                wanted = {i for sample in samples for i in (sample.photo, sample.target)}
                while ahead and sum(len(coming) for _, coming in ahead) + len(wanted) > most:
                    yield _arrived(*ahead.popleft())
                # beside those ahead there is the step that was given last, a row with two at most
                keep = self.room - most - 2 * len(samples)
                ahead.append((chosen, {i: self._asked(i, readers, keep) for i in wanted}))
            while ahead:
                yield _arrived(*ahead.popleft())

    def _asked(self, i: int, readers: ThreadPoolExecutor, keep: int) -> Future[Photo]:
        """A photo, on its way where it is not here.  keep: so many stay."""
        photo = self._kept.get(i) or readers.submit(self.read, i)
        if len(self._kept) < keep:
            self._kept[i] = photo
        return photo


def _arrived(chosen: Draw, coming: Mapping[int, Future[Photo]]) -> Ready:
    started = perf_counter()
    photos = {i: photo.result() for i, photo in coming.items()}
    return Ready(chosen, photos, perf_counter() - started)
