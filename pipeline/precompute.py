"""Stage 1 as a run: photos in, complete units of priors out.

`precompute` lists and digests the photos, compares every unit with what it should be, and
makes what is missing or stale. `regenerate` does the same for scores and pseudo-GT alone, from
cached embeddings: no image passes through CLIP or FastSAM.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evenlight.cache.errors import PhotoError, StoreError, UsageError
from evenlight.cache.files import sha256_bytes
from evenlight.cache.schema import EMPTY_SLOT, FAILED, Index, PhotoRecord
from evenlight.cache.store import Store
from evenlight.pipeline import config, schedule
from evenlight.pipeline.config import Given
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.models import Models, load_models
from evenlight.pipeline.parts import PARTS, Tools, sizes
from evenlight.pipeline.plan import UnitPlan, judge, made_by, part_fingerprint, plan_unit
from evenlight.pipeline.prompts import store_scorer
from evenlight.pipeline.units import UnitTask, make_unit, make_unit_here, make_unit_in_worker
from evenlight.stages.photos.find import PhotoSource, also_there, find_photos
from evenlight.stages.settings import Settings

log = logging.getLogger(__name__)
ROUND = "round"  # the note of an older evenlight


@dataclass(kw_only=True)
class RunReport:
    """What a run did.  Counts are of photos unless they say units."""

    photos: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # pictures: name, reason
    units_kept: int = 0
    units_made: int = 0
    parts_made: dict[str, int] = field(default_factory=dict)  # part -> units
    photos_made: int = 0
    seconds: float = 0.0


def precompute(
    photos: str | Path,
    store: str | Path,
    *,
    settings: Given = None,
    models: Models | None = None,
    scheduler: str = "",
    on_progress: Progress = silent,
) -> RunReport:
    """Make or complete a store of priors for the photos; resumes whatever an earlier run left.

    photos: a photo, a folder (walked recursively) or an HDF5 file of images.  settings: changes
    on top of those of the store.  models: loaded by the settings when None.  scheduler: address
    of a Dask cluster; empty runs here, in `run.workers` processes.
    Photos that cannot be used are listed in the report.
    """
    started = time.monotonic()
    photos, settings = Path(photos), config.of_store(store, settings, making=True)
    found = find_photos(photos)
    sources = {source.name: source for source in found.photos}
    if not sources:
        raise UsageError(f"no photos found in {photos}{also_there(found.passed_over)}")
    # the lock comes first: a second run must be refused before it loads anything
    with Store.create_or_open(store, unit_size=settings.run.unit_size) as target:
        digests = {}
        for done, (name, source) in enumerate(sources.items(), 1):
            digests[name] = _digest(source)
            on_progress("photos read", done, len(sources))
        injected, models = models, models or load_models(settings)
        _write_index(target, target.index.updated(sources), settings, photos)
        tools = Tools(settings, models, store_scorer(target, models.clip))
        sides = sizes(settings, models)
        target.ensure_arrays([spec for part in PARTS for spec in part.specs(sides)])
        _forget_round(target)
        plans = _plans(target, digests, tools)
        todo = [plan for plan in plans if plan.todo]
        report = RunReport(units_kept=len(plans) - len(todo), passed_over=found.passed_over)
        tasks = [UnitTask(target.path, plan, _unit_sources(plan, sources)) for plan in todo]
        finished = schedule.run(
            functools.partial(make_unit_here, target, tools=tools),
            functools.partial(make_unit_in_worker, settings=settings),
            tasks,
            workers=1 if injected else settings.run.workers,
            scheduler=scheduler,
        )
        for task in finished:
            _count(report, task.plan)
            on_progress("photos", report.photos_made, _num_photos(todo))
        _collect(target, report)
    report.seconds = time.monotonic() - started
    return report


def regenerate(
    store: str | Path, *, settings: Given = None, on_progress: Progress = silent
) -> RunReport:
    """Remake scores and pseudo-GT where what chooses them changed, from the cache alone.

    settings: changes on top of those of the store, to pseudo_gt settings at most.
    Raises StoreError where an earlier part is missing or other settings differ.
    """
    started = time.monotonic()
    settings = config.of_store(store, settings)
    with Store.create_or_open(store) as target:
        _refuse_other_changes(target, settings)
        tools = Tools(settings, None, store_scorer(target, None))
        plans = [_regenerate_plan(target, unit, tools) for unit in range(target.index.num_units)]
        _forget_round(target)
        _write_index(target, target.index, settings, Path(target.index.source))
        todo = [plan for plan in plans if plan.todo]
        report = RunReport(units_kept=len(plans) - len(todo))
        for plan in todo:
            make_unit(target, plan, {}, tools)
            _count(report, plan)
            on_progress("photos", report.photos_made, _num_photos(todo))
        _collect(target, report)
    report.seconds = time.monotonic() - started
    return report


def _digest(source: PhotoSource) -> str:
    """sha256 of the input bytes; of nothing for a file that cannot be read now."""
    try:
        return sha256_bytes(source.read_bytes())
    except PhotoError:
        return sha256_bytes(b"")


def _write_index(store: Store, index: Index, settings: Settings, source: Path) -> None:
    recorded = config.store_settings(settings)
    store.write_index(dataclasses.replace(index, settings=recorded, source=str(source.absolute())))


def _plans(store: Store, digests: Mapping[str, str], tools: Tools) -> list[UnitPlan]:
    """The plan of every unit of the store."""
    assert tools.models is not None
    makers = made_by(tools.models, tools.scorer.fingerprint)
    plans = []
    for unit in range(store.index.num_units):
        photos = tuple(
            EMPTY_SLOT if name is None else PhotoRecord(name=name, sha256=digests[name])
            for name in store.index.unit_names(unit)
        )
        plans.append(plan_unit(unit, photos, store.record(unit), tools.settings, makers))
    return plans


def _forget_round(store: Store) -> None:
    """Drop the note of an older evenlight, whose trained correctors proposed pseudo-GT.

    What they chose is stale by its fingerprint, so the run that forgets them remakes it.
    """
    if ROUND in store.notes():
        log.warning(
            "a corrector proposed pseudo-GT of store %s, which evenlight no longer does (it gained "
            "too little): what it proposed is made anew",
            store.path,
        )
        store.forget_note(ROUND)


def _regenerate_plan(store: Store, unit: int, tools: Tools) -> UnitPlan:
    record, (before, judged) = store.record(unit), (part.name for part in PARTS[-2:])
    if record is None or before not in record.parts:
        raise StoreError(
            f"unit {unit} of {store.path} has no {before}: run 'evenlight precompute' to "
            "complete the store"
        )
    source = [record.parts[before].fingerprint, judge(tools.scorer.fingerprint)]
    wanted = part_fingerprint(judged, source=source, settings=tools.settings)
    todo = () if record.holds(judged, wanted) else (judged,)
    return UnitPlan(
        unit=unit,
        photos=record.photos,
        fingerprints={judged: wanted},
        todo=todo,
        reason="prompts or pseudo-GT settings changed" if todo else "complete",
    )


def _refuse_other_changes(store: Store, settings: Settings) -> None:
    """Only precompute can follow a change of parts that no judge makes."""
    if not store.index.num_units:
        raise StoreError(f"{store.path} holds no photos: run 'evenlight precompute' first")
    recorded = config.build(base=store.index.settings)
    for part in PARTS[:-1]:
        now = config.values_affecting(settings, part.name)
        for key, value in config.values_affecting(recorded, part.name).items():
            if now[key] != value:
                raise StoreError(
                    f"store {store.path} was made with {key} = {value!r}, settings ask for "
                    f"{now[key]!r}: 'evenlight precompute' remakes what that touches"
                )


def _unit_sources(plan: UnitPlan, sources: Mapping[str, PhotoSource]) -> dict[str, PhotoSource]:
    return {p.name: sources[p.name] for p in plan.photos if p.name is not None}


def _num_photos(plans: Sequence[UnitPlan]) -> int:
    return sum(photo.name is not None for plan in plans for photo in plan.photos)


def _count(report: RunReport, plan: UnitPlan) -> None:
    report.units_made += 1
    report.photos_made += _num_photos([plan])
    for part in plan.todo:
        report.parts_made[part] = report.parts_made.get(part, 0) + 1


def _collect(store: Store, report: RunReport) -> None:
    """Count photos and list failures, of earlier runs too."""
    for record in store.records():
        for photo in record.photos:
            report.photos += photo.name is not None
            if photo.status == FAILED:
                report.failed.append((str(photo.name), photo.reason))
