"""The photos of a store as training reads them: in memory where they fit, else read ahead."""

import logging
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.cache.errors import EnvironmentLacks, UsageError
from evenlight.cache.store import Store
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.parts import ARRAY, TRAINING, Arrays, cut
from evenlight.stages.corrector.batches import Photo
from evenlight.stages.corrector.cached import Photos, Streamed, TrainingData, reading
from evenlight.stages.corrector.inputs import at_working_size, photo_at_working_size
from evenlight.stages.corrector.launch import launched
from evenlight.stages.corrector.ranks import ALONE, Ranks
from evenlight.stages.corrector.streams import SMALL_SIDE, About, is_blank, small_copy
from evenlight.stages.photos.canvas import Extent
from evenlight.stages.photos.memory import free_memory
from evenlight.stages.pixels import resize, to_float
from evenlight.stages.settings import Settings

log = logging.getLogger(__name__)
SHARE = 0.6  # of the free memory that photos may take; the rest is training's


def load_photos(
    store: Store,
    settings: Settings,
    device: str,
    ranks: Ranks = ALONE,
    on_progress: Progress = silent,
) -> Photos:
    """Every usable photo and its priors at the working size, for the rows of this rank.

    All lie on the device where they fit, else in host memory, and each batch is copied: a warning
    says so.  Where they fit neither (`run.memory_gb`), those of coming steps are read ahead.
    Raises UsageError where there is no photo, EnvironmentLacks without memory for three steps.
    """
    size, rows = settings.train.size, len(ranks.rows(settings.train.batch))
    slots = _slots(store)
    forms = _forms(size, _p3_channels(store, slots))
    one = sum(prod(shape) * dtype.itemsize for shape, dtype in forms.values())
    needed, most = len(slots) * one, {place: _most(settings, place) for place in (device, "cpu")}
    place = next((place for place, bytes_ in most.items() if needed <= bytes_), "")
    if all(ranks.each(place != "")):
        if place != device:
            log.warning(
                "photos take %.1f GiB, %s may give %.1f: they stay in host memory, which is slower",
                needed / 2**30,
                device,
                most[device] / 2**30,
            )
        return replace(load_data(store, size, place, on_progress), ranks=ranks)
    room = int(most["cpu"] // one)
    least = Streamed.least(rows)
    if room < least:
        raise EnvironmentLacks(
            f"the photos of three steps take {least * one / 1e9:.2f} GB, "
            f"{most['cpu'] / 1e9:.2f} may be used: raise run.memory_gb, or lower train.size or "
            "the photos of a batch"
        )
    log.info(
        "photos take %.1f GiB, %.1f may be used (run.memory_gb), for %d of %d: "
        "they are read ahead of the steps",
        needed / 2**30,
        most["cpu"] / 2**30,
        room,
        len(slots),
    )
    return stream_data(store, size, room, ranks, on_progress)


def load_data(store: Store, size: int, place: str, on_progress: Progress = silent) -> TrainingData:
    """Every usable photo and its priors at the working size, in memory.

    size: side of the square canvas, pixels; a photo takes about 14 bytes per pixel of it.  place:
    cpu, or a CUDA device.
    """
    slots = _slots(store)
    tensors: dict[str, Any] = {
        name: torch.zeros(len(slots), *shape, dtype=dtype, device=place)
        for name, (shape, dtype) in _forms(size, _p3_channels(store, slots)).items()
    }
    extents: list[tuple[int, int]] = []
    well_exposed: list[bool] = []
    for unit in np.unique(slots // store.index.unit_size):
        rows = store.read(int(unit), ("extent", *TRAINING))
        for row in slots[slots // store.index.unit_size == unit] % store.index.unit_size:
            entries = cut(rows, row, TRAINING)
            for name, entry in _at_size(entries, size)._asdict().items():
                tensors[name][len(extents)] = entry
            extents.append(_extent(entries["photo"], size))
            well_exposed.append(bool(entries["strength"] == 0))
        on_progress("photos loaded", len(extents), len(slots))
    return TrainingData(
        **tensors,
        extent=torch.tensor(extents),
        well_exposed=torch.tensor(well_exposed),
        names=_names(store, slots),
    )


def stream_data(
    store: Store,
    size: int,
    room: int,
    ranks: Ranks = ALONE,
    on_progress: Progress = silent,
) -> Streamed:
    """Every usable photo at the working size, read when it is needed.  room: photos in memory.

    All photos are looked at once, without their priors; ranks share that work out.
    """
    slots = _slots(store)
    about, extents = _survey(store, slots, size, ranks, on_progress)

    def read(i: int) -> Photo:
        entries = {
            name: ARRAY[name].cut(store.rows(name, slots[i : i + 1])[0], extents[i])
            for name in Photo._fields
        }
        return _at_size(entries, size)

    return Streamed(about=about, read=read, room=room, ranks=ranks)


def _survey(
    store: Store, slots: np.ndarray, size: int, ranks: Ranks, on_progress: Progress
) -> tuple[About, np.ndarray]:
    """What is known of every photo before training; their extents in the store, N,2."""
    unit_size = store.index.unit_size
    units = np.unique(slots // unit_size)
    numbers, small = torch.zeros(len(slots), 6), torch.zeros(len(slots), 3, SMALL_SIDE, SMALL_SIDE)

    def look(unit: int) -> int:
        rows = store.read(unit, ("extent", "photo", "strength"))
        places = np.flatnonzero(slots // unit_size == unit)
        for place in places:
            entries = cut(rows, slots[place] % unit_size, ("photo", "strength"))
            photo = _in_bytes(photo_at_working_size(entries["photo"], size), size)
            extent = _extent(entries["photo"], size)
            flags = bool(entries["strength"] == 0), is_blank(photo, extent)
            numbers[place] = torch.tensor([*entries["photo"].shape[:2], *extent, *flags])
            small[place] = small_copy(photo, extent)
        return len(places)

    own, done = units[list(ranks.rows(len(units)))].tolist(), 0
    with reading() as readers:
        for count in readers.map(look, own):
            done += count
            on_progress("photos looked at", done, int(np.isin(slots // unit_size, own).sum()))
    whole = ranks.total(numbers).long()
    about = About(
        names=_names(store, slots),
        extents=whole[:, 2:4].tolist(),
        well_exposed=whole[:, 4].bool().tolist(),
        blank=whole[:, 5].bool().tolist(),
        small=ranks.total(small),
        p3_channels=_p3_channels(store, slots),
    )
    return about, whole[:, :2].numpy()


def _at_size(entries: Arrays, size: int) -> Photo:
    """One photo's cached arrays, cut to its extent, at the working size on their canvas."""
    photo, proto, p3 = at_working_size(
        entries["photo"],
        torch.from_numpy(entries["proto"])[None].float(),
        torch.from_numpy(entries["p3"])[None].float(),
        size,
    )
    h, w = photo.shape[2:]
    target = resize(to_float(entries["pseudo_gt"]), h, w)
    labels = torch.from_numpy(entries["regions"])[None, None].float()
    confidence = torch.from_numpy(entries["confidence"])[None, None].float()
    return Photo(
        photo=_in_bytes(photo, size),
        proto=_on_canvas(proto, size // 4).half(),
        p3=_on_canvas(p3, size // 8).half(),
        regions=_on_canvas(resize(labels, h, w, "nearest"), size)[0].byte(),
        pseudo_gt=_in_bytes(target.clamp(0, 1), size),
        confidence=_on_canvas(resize(confidence, h // 4, w // 4), size // 4)[0].half(),
    )


def _in_bytes(rgb_13hw: Tensor, side: int) -> Tensor:
    """A photo in [0, 1] on its canvas, uint8 3,side,side."""
    return _on_canvas(rgb_13hw * 255, side).round().byte()


def _on_canvas(map_1Chw: Tensor, side: int) -> Tensor:
    """A map top-left on a square canvas, its edges repeated.  1,C,h,w -> C,side,side."""
    below, right = side - map_1Chw.shape[2], side - map_1Chw.shape[3]
    return F.pad(map_1Chw, (0, right, 0, below), mode="replicate")[0]


def _extent(photo_HW3: np.ndarray, size: int) -> tuple[int, int]:
    """Height and width of a photo at the working size."""
    extent = Extent.of(photo_HW3.shape[0], photo_HW3.shape[1], size)
    return extent.height, extent.width


def _slots(store: Store) -> np.ndarray:
    """Where the usable photos lie.  Raises UsageError where there is none."""
    slots = np.array(store.slots("pseudo_gt"))
    if not len(slots):
        raise UsageError(f"store {store.path} holds no usable photo")
    return slots


def _names(store: Store, slots: np.ndarray) -> list[str]:
    return [str(store.index.names[slot]) for slot in slots]


def _p3_channels(store: Store, slots: np.ndarray) -> int:
    return store.rows("p3", slots[:1]).shape[1]


def _forms(size: int, p3_channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of what is kept of a photo, by the names of Photo."""
    quarter, eighth = size // 4, size // 8
    return {
        "photo": ((3, size, size), torch.uint8),
        "proto": ((32, quarter, quarter), torch.float16),
        "p3": ((p3_channels, eighth, eighth), torch.float16),
        "regions": ((size, size), torch.uint8),
        "pseudo_gt": ((3, size, size), torch.uint8),
        "confidence": ((quarter, quarter), torch.float16),
    }


def _most(settings: Settings, place: str) -> float:
    """Bytes that photos may take there: as told, or a share of what is free."""
    if settings.run.memory_gb:
        return settings.run.memory_gb * 1e9
    if place == "cpu":
        return SHARE * free_memory() / launched().here
    return SHARE * torch.cuda.mem_get_info(place)[0]
