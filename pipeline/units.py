"""Make the parts of one unit: photos onto canvases, regions, embeddings, pseudo-GT."""

import dataclasses
import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from evenlight.cache.errors import EnvironmentLacks, PhotoError, StoreError
from evenlight.cache.files import sha256_bytes
from evenlight.cache.schema import FAILED, OK, PhotoRecord, UnitRecord
from evenlight.cache.store import Store
from evenlight.pipeline.failures import one_photo
from evenlight.pipeline.judge import store_judge
from evenlight.pipeline.models import load_models
from evenlight.pipeline.parts import FILE, PART, Arrays, Part, Tools, cut, sizes
from evenlight.pipeline.plan import UnitPlan
from evenlight.stages.photos.find import PhotoSource
from evenlight.stages.settings import Settings

log = logging.getLogger(__name__)
_one_unit = threading.Lock()  # of a process: models are loaded once, and made for one thread
UNREAD = sha256_bytes(b"")  # digest of a file that could not be read


class _UnreadError(PhotoError):
    """The file was not as the plan saw it: recorded as unread, it counts as changed later."""


def make_unit(
    store: Store, plan: UnitPlan, sources: Mapping[str, PhotoSource], tools: Tools
) -> None:
    """Make the parts of a unit that its plan names, and commit them with one record.

    A photo of which a part cannot be made stays without it and the later ones; its record says why.
    """
    todo = [PART[name] for name in plan.todo]
    record = store.record(plan.unit)
    fresh = plan.photos if FILE in todo[0].reads or record is None else record.photos
    photos = [_tried_again(photo, plan.todo) for photo in fresh]
    have, kept = store.read(plan.unit, _upstream(todo)), _kept(store, plan, record, sources)
    made: dict[str, Arrays] = {}
    for part in todo:
        made[part.name], photos = _make_part(part, have, photos, sources, tools, kept)
        have |= made[part.name]
    store.write_parts(
        plan.unit,
        photos,
        {part: (plan.fingerprints[part], made[part]) for part in plan.todo},
        notes={part.name: part.notes for part in todo},
    )


@dataclass(frozen=True)
class UnitTask:
    """One unit to make, small enough to send to another process."""

    store: str  # its path or URL
    plan: UnitPlan
    sources: dict[str, PhotoSource]


def make_unit_here(store: Store, task: UnitTask, tools: Tools) -> UnitTask:
    make_unit(store, task.plan, task.sources, tools)
    return task


def make_unit_in_worker(task: UnitTask, settings: Settings) -> UnitTask:
    """For a worker process: models are loaded once and kept; the main run holds the lock.

    Raises EnvironmentLacks where the worker sees none of the files that the main run read.
    """
    torch.set_num_threads(1)  # workers are the parallelism; more threads only wait for each other
    _refuse_unseen(task)
    with _one_unit, Store.attach(task.store) as store:
        models = load_models(settings)
        make_unit(
            store,
            task.plan,
            task.sources,
            Tools(settings, models, store_judge(store, models.clip)),
        )
    return task


def _refuse_unseen(task: UnitTask) -> None:
    read = {p.name for p in task.plan.photos if p.sha256 != UNREAD}
    files = [source.path for name, source in task.sources.items() if name in read]
    there = Store.exists(task.store)
    if not there or (files and not any(os.access(path, os.R_OK) for path in files)):
        lacking = files[0] if there else task.store
        raise EnvironmentLacks(
            f"the worker on {socket.gethostname()} does not see {lacking}: store and photos must "
            "lie under the same paths for all workers; nothing was recorded of these photos"
        )


@dataclass(frozen=True)
class _Kept:
    """Rows of a unit, as recorded, of photos that did not change where others did."""

    arrays: Arrays  # name -> rows, of the parts that are as they should be
    rows: dict[str, int]  # photo -> where it was

    def of(self, part: Part, photo: PhotoRecord) -> Arrays | None:
        """A photo's entries of a part, None where they must be made."""
        if photo.name not in self.rows or part.arrays[0].name not in self.arrays:
            return None
        return {one.name: self.arrays[one.name][self.rows[photo.name]] for one in part.arrays}


def _kept(
    store: Store, plan: UnitPlan, record: UnitRecord | None, sources: Mapping[str, PhotoSource]
) -> _Kept:
    """Raises StoreError where they are damaged and a photo's file is not at hand."""
    if record is None or not plan.kept:
        return _Kept({}, {})
    rows = {p.name: row for row, p in enumerate(record.photos) if p.name in plan.kept}
    names = [array.name for part in plan.kept_parts for array in PART[part].arrays]
    try:
        return _Kept(store.read(plan.unit, names), rows)
    except StoreError as error:
        if not plan.kept <= sources.keys():
            raise
        log.warning("%s: all photos of the unit are made anew", error)
        return _Kept({}, {})


def _upstream(todo: Sequence[Part]) -> list[str]:
    """Arrays of parts that are there already, from which those to do are made."""
    made = {array.name for part in todo for array in part.arrays}
    reads = {name for part in todo for name in part.reads}
    return sorted((reads | {"extent"}) - made - {FILE})


def _tried_again(photo: PhotoRecord, todo: Sequence[str]) -> PhotoRecord:
    """The photo as usable, where it failed in a part that is now made anew."""
    if photo.status == FAILED and photo.part in todo:
        return dataclasses.replace(photo, status=OK, reason="", part="")
    return photo


def _make_part(
    part: Part,
    have: Arrays,
    photos: Sequence[PhotoRecord],
    sources: Mapping[str, PhotoSource],
    tools: Tools,
    kept: _Kept,
) -> tuple[Arrays, list[PhotoRecord]]:
    """One part of every usable photo of a unit, and what became of the photos."""
    specs = part.specs(sizes(tools.settings, tools.models))
    rows = {spec.name: np.zeros((len(photos), *spec.shape), spec.dtype) for spec in specs}
    outcome = []
    for row, photo in enumerate(photos):
        entries = kept.of(part, photo)
        if entries is not None:
            for name, entry in entries.items():
                rows[name][row] = entry
        elif photo.status == OK:
            try:
                with one_photo():
                    inputs = _inputs(part, have, row, photo, sources)
                    _place(part, rows, row, part.make(inputs, tools), have)
            except PhotoError as error:
                photo = dataclasses.replace(
                    photo,
                    sha256=UNREAD if isinstance(error, _UnreadError) else photo.sha256,
                    status=FAILED,
                    reason=str(error),
                    part=part.name,
                )
        outcome.append(photo)
    return rows, outcome


def _inputs(
    part: Part, have: Arrays, row: int, photo: PhotoRecord, sources: Mapping[str, PhotoSource]
) -> Mapping[str, Any]:
    """What a part is made from, of one photo: its file, or arrays cut to its extent."""
    if FILE not in part.reads:
        return cut(have, row, part.reads)
    assert photo.name is not None
    try:
        data = sources[photo.name].read_bytes()
    except PhotoError as error:
        raise _UnreadError(str(error)) from error
    if sha256_bytes(data) != photo.sha256:
        raise _UnreadError("the file changed while this run was reading it")
    return {FILE: (photo.name, data)}


def _place(
    part: Part, rows: Arrays, row: int, values: Mapping[str, np.ndarray], have: Arrays
) -> None:
    """Put one photo's arrays in their rows.  Raises PhotoError where a number is not finite."""
    for array in part.arrays:
        if not np.isfinite(values[array.name]).all():
            raise PhotoError(f"{array.name} came out with NaN or infinity: a model's fault")
    extent = values["extent"] if "extent" in values else have["extent"][row]
    for array in part.arrays:
        array.put(rows[array.name][row, ...], np.asarray(values[array.name]), extent)
