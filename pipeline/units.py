"""Make the parts of one unit: photos onto canvases, regions, embeddings, pseudo-GT."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evenlight.cache.errors import PhotoError
from evenlight.cache.files import sha256_bytes
from evenlight.cache.schema import FAILED, OK, ArraySpec, PhotoRecord
from evenlight.cache.store import Store
from evenlight.pipeline.models import Models, load_models
from evenlight.pipeline.plan import READS, UnitPlan, part_specs
from evenlight.pipeline.prompts import store_scorer
from evenlight.stages.corrector.inputs import rule_corrected
from evenlight.stages.photos.canvas import place
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.find import PhotoSource
from evenlight.stages.priors.ladder import embed_photo
from evenlight.stages.priors.pseudo_gt import Scorer, choose
from evenlight.stages.settings import Settings

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Tools:
    """What makes parts.  models may be None where neither regions nor embeddings are made."""

    settings: Settings
    models: Models | None
    scorer: Scorer

    def specs(self, part: str) -> list[ArraySpec]:
        models = self.models
        return part_specs(
            part,
            self.settings,
            p3_channels=models.segmenter.p3_channels if models else 0,
            clip_dim=models.clip.dim if models else 0,
        )


def make_unit(
    store: Store, plan: UnitPlan, sources: Mapping[str, PhotoSource], tools: Tools
) -> None:
    """Make the parts of a unit that its plan names, and commit them with one record."""
    photos = list(plan.photos)
    have: Arrays = {}
    made: dict[str, Arrays] = {}
    if plan.todo[0] == "photo":
        have, photos = _photo_part(plan, sources, tools)
        made["photo"] = dict(have)
    else:
        record = store.record(plan.unit)
        assert record is not None, plan
        photos = list(record.photos)
        upstream = {n for part in plan.todo for n in READS[part]} - {
            spec.name for part in plan.todo for spec in tools.specs(part)
        }
        have = store.read(plan.unit, sorted(upstream))
    for part in plan.todo:
        if part != "photo":
            made[part] = _later_part(part, have, photos, tools)
            have |= made[part]
    store.write_parts(
        plan.unit, photos, {part: (plan.fingerprints[part], made[part]) for part in plan.todo}
    )


@dataclass(frozen=True)
class UnitTask:
    """One unit to make, small enough to send to another process."""

    store: Path
    plan: UnitPlan
    sources: dict[str, PhotoSource]


def make_unit_here(store: Store, task: UnitTask, tools: Tools) -> UnitTask:
    make_unit(store, task.plan, task.sources, tools)
    return task


def make_unit_in_worker(task: UnitTask, settings: Settings) -> UnitTask:
    """For a worker process: models are loaded once and kept; the main run holds the lock."""
    torch.set_num_threads(1)  # workers are the parallelism; more threads only wait for each other
    models = load_models(settings)
    with Store.attach(task.store) as store:
        make_unit(
            store,
            task.plan,
            task.sources,
            Tools(settings, models, store_scorer(task.store, models.clip)),
        )
    return task


def _photo_part(
    plan: UnitPlan, sources: Mapping[str, PhotoSource], tools: Tools
) -> tuple[Arrays, list[PhotoRecord]]:
    """Decode a unit's photos onto canvases; what cannot be used becomes a failed record."""
    settings = tools.settings.photo
    rows = _blank(tools.specs("photo"), len(plan.photos))
    photos = []
    for row, photo in enumerate(plan.photos):
        if photo.name is not None:
            try:
                data = sources[photo.name].read_bytes()
                if sha256_bytes(data) != photo.sha256:
                    raise PhotoError("the file changed while this run was reading it")
                decoded = decode(data, photo.name, max_megapixels=settings.max_megapixels)
                rows["photo"][row], extent = place(decoded.pixels, settings.size)
                rows["extent"][row] = extent.height, extent.width
            except PhotoError as error:
                photo = dataclasses.replace(photo, status=FAILED, reason=str(error))
        photos.append(photo)
    return rows, photos


def _later_part(part: str, have: Arrays, photos: Sequence[PhotoRecord], tools: Tools) -> Arrays:
    """One part of every usable photo of a unit, from the parts before it."""
    rows = _blank(tools.specs(part), len(photos))
    for row, photo in enumerate(photos):
        if photo.status == OK:
            cached = {name: have[name][row] for name in READS[part]}
            for name, value in _make_row(part, cached, tools).items():
                _put(rows[name], row, np.asarray(value))
    return rows


def _make_row(part: str, cached: Arrays, tools: Tools) -> Arrays:
    """One photo's arrays of one part, at the photo's true extent."""
    height, width = cached["extent"]
    photo = cached["photo"][:height, :width]
    ladder = tools.settings.ladder
    if part == "pseudo_gt":
        labels = cached["regions"][:height, :width]
        return choose(photo, labels, cached, tools.scorer, ladder, tools.settings.pseudo_gt)
    assert tools.models is not None
    if part == "embeddings":
        labels = cached["regions"][:height, :width]
        return embed_photo(photo, labels, tools.models.clip, ladder)
    regions = tools.models.segmenter.segment(rule_corrected(photo))
    return {"regions": regions.labels, "proto": regions.proto, "p3": regions.p3}


def _put(rows: np.ndarray, row: int, value: np.ndarray) -> None:
    """Place a value in its row, top-left where it is smaller than the canvas."""
    if rows[row].shape == value.shape:
        rows[row] = value
    elif value.ndim == 3 and value.shape[2] == 3:  # H,W,3
        rows[row, : value.shape[0], : value.shape[1]] = value
    else:  # ...,H,W
        rows[row, ..., : value.shape[-2], : value.shape[-1]] = value


def _blank(specs: Sequence[ArraySpec], count: int) -> Arrays:
    return {spec.name: np.zeros((count, *spec.shape), spec.dtype) for spec in specs}
