"""Photos that memory does not hold are read ahead of the steps that need them."""

import threading
import time
import weakref
from contextlib import closing

import pytest
import torch
from test_training import toy_data

from evenlight.cache.errors import StoreError
from evenlight.stages.corrector.batches import Photo
from evenlight.stages.corrector.cached import READERS, Streamed
from evenlight.stages.corrector.ranks import ALONE, Ranks
from evenlight.stages.corrector.streams import Draw, Sample
from evenlight.stages.corrector.told import Told

NUM_PHOTOS = 40


class Shelf:
    """Photos that are counted while they are in memory; slow to read."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds, self.lock = seconds, threading.Lock()
        self.held = self.most = 0
        self.reads: list[int] = []

    def read(self, i: int) -> Photo:
        time.sleep(self.seconds)
        photo = Photo(*(torch.full((1,), i) for _ in Photo._fields))
        with self.lock:
            self.reads.append(i)
            self.held += 1
            self.most = max(self.most, self.held)
        weakref.finalize(photo.photo, self.gone)
        return photo

    def gone(self) -> None:
        with self.lock:
            self.held -= 1


def step(*photos: int) -> Draw:
    """A step that needs these photos, and answers that stand beside them."""
    samples = [
        Sample("scenes", i, (i + 1) % NUM_PHOTOS, (0, 0), False, None, Told(0, 0)) for i in photos
    ]
    return Draw(samples, noise=0, view=(0, 0, 8, 8), seen=None)


def epochs(count: int, rows: int = 2) -> list[Draw]:
    generator, order = torch.Generator().manual_seed(0), []
    for _ in range(count):
        order += torch.randperm(NUM_PHOTOS, generator=generator).tolist()
    return [step(*order[k : k + rows]) for k in range(0, len(order), rows)]


def streamed(shelf: Shelf, room: int) -> Streamed:
    return Streamed(about=toy_data().about, read=shelf.read, room=room)


@pytest.mark.parametrize("room", [12, 13, 20, 39])
def test_no_more_photos_are_in_memory_than_there_is_room_for(room):
    shelf, draws, seen = Shelf(), epochs(4), []
    assert Streamed.least(rows=2) == 12
    with closing(streamed(shelf, room).ready(draws, ALONE)) as coming:
        for chosen, photos, _ in coming:
            time.sleep(0.001)  # in which readers read on
            seen.append(chosen)
            for sample in chosen.samples:
                assert int(photos[sample.photo].photo) == sample.photo
                assert int(photos[sample.target].photo) == sample.target
    assert seen == draws
    assert room - 8 <= shelf.most <= room


def test_what_there_is_room_for_is_read_once():
    shelf = Shelf()
    photos = streamed(shelf, room=32)
    for _ in photos.ready(epochs(6), ALONE):
        pass
    often = [i for i in range(NUM_PHOTOS) if shelf.reads.count(i) > 1]
    assert len(shelf.reads) < 6 * 2 * NUM_PHOTOS and len(often) <= NUM_PHOTOS - 7


def test_coming_steps_are_read_while_the_one_at_hand_is_taken():
    shelf = Shelf()
    with closing(streamed(shelf, room=12).ready([step(1, 3), step(5, 7)], ALONE)) as coming:
        next(coming)
        begun = time.monotonic()
        while len(shelf.reads) < 8 and time.monotonic() - begun < 30:
            time.sleep(0.001)
    assert sorted(shelf.reads) == [*range(1, 9)]


def test_waiting_for_photos_is_told():
    shelf = Shelf(seconds=0.1)
    waits = [waited for _, _, waited in streamed(shelf, room=12).ready(epochs(1)[:2], ALONE)]
    assert sum(waits) > 0.09


def test_a_rank_reads_the_photos_of_its_own_rows():
    shelf = Shelf()
    for _ in streamed(shelf, room=30).ready([step(3, 9, 20, 30)], Ranks(1, 2)):
        pass
    assert sorted(shelf.reads) == [9, 10, 30, 31]


def test_a_photo_that_cannot_be_read_ends_the_steps_with_its_error():
    def read(i: int) -> Photo:
        raise StoreError(f"photo {i} is damaged")

    photos = Streamed(about=toy_data().about, read=read, room=30)
    with pytest.raises(StoreError, match=r"photo [34] is damaged"):
        next(photos.ready([step(3)], ALONE))


def test_what_has_not_begun_to_be_read_is_left_when_training_stops():
    shelf, gate = Shelf(), threading.Event()

    def read(i: int) -> Photo:
        if i not in (3, 4):
            gate.wait(30)
        return shelf.read(i)

    photos = Streamed(about=toy_data().about, read=read, room=39)
    with closing(photos.ready([step(3), *epochs(1)], ALONE)) as coming:
        next(coming)
        threading.Timer(1, gate.set).start()
    assert len(shelf.reads) <= 2 + READERS
