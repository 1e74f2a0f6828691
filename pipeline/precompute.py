"""Stage 1 as a run: photos in, complete units of priors out.

`precompute` lists and digests the photos, compares every unit with what it should be, and
makes what is missing or stale. `regenerate` does the same for scores and pseudo-GT alone, from
cached embeddings: no image passes through CLIP or FastSAM.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evenlight.cache.errors import PhotoError, StoreError, UsageError
from evenlight.cache.files import sha256_bytes
from evenlight.cache.place import refuse_url
from evenlight.cache.schema import EMPTY_SLOT, FAILED, Index, PhotoRecord
from evenlight.cache.store import Store
from evenlight.pipeline import config, schedule
from evenlight.pipeline.config import Given
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.failures import one_photo
from evenlight.pipeline.judge import keep_judge, store_judge
from evenlight.pipeline.models import Models, load_models, priors_of
from evenlight.pipeline.parts import FILE, PART, PARTS, Tools, sizes
from evenlight.pipeline.plan import UnitPlan, made_by, part_fingerprint, plan_unit
from evenlight.pipeline.units import (
    UNREAD,
    UnitTask,
    make_unit_here,
    make_unit_in_worker,
)
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

    def summary(self) -> str:
        """In a sentence."""
        rate = self.photos_made / max(self.seconds, 1e-9)
        return (
            f"{self.photos} photos, {len(self.failed)} failed; units: {self.units_made} made, "
            f"{self.units_kept} already complete; {self.seconds:.1f} s, {rate:.2f} photos/s"
        )


def precompute(
    photos: str | Path,
    store: str | Path,
    *,
    settings: Given = None,
    models: Models | None = None,
    scheduler: str = "",
    prune: bool = False,
    on_progress: Progress = silent,
) -> RunReport:
    """Make or complete a store of priors for the photos; resumes whatever an earlier run left.

    photos: a photo, a folder (walked recursively) or an HDF5 file of images; a store takes on
    those of any number of folders.  settings: changes on top of those of the store.  models: loaded
    by the settings when None.  scheduler: address of a Dask cluster; empty runs here, in
    `run.workers` processes.  prune: photos of the store that are not among these are taken away.
    Photos that cannot be used are listed in the report; they are tried again when their file is
    readable again or differs, or by run.retry_failed.  Raises UsageError where a photo would have
    to be made anew whose file is not among these, or take the place of one of another folder.
    """
    started = time.monotonic()
    refuse_url(photos, "photos")
    photos = Path(photos).absolute()  # workers may have been started elsewhere
    settings = config.absolute_paths(config.of_store(store, settings, making=True))
    found = find_photos(photos, settings.photo.max_megapixels)
    sources = {source.name: source for source in found.photos}
    if not sources:
        raise UsageError(f"no photos found in {photos}{also_there(found.passed_over)}")
    # the lock comes first: a second run must be refused before it loads anything
    with Store.create_or_open(store, unit_size=settings.run.unit_size) as target:
        index, digests = _taken_on(target, photos, sources, prune, on_progress)
        workers = 1 if models else settings.run.workers
        models = models or load_models(settings)
        tools = Tools(settings, models, store_judge(target, models.clip))
        plans = _prepared(target, index, digests, tools, sources, photos)
        todo = [plan for plan in plans if plan.todo and not _without_files(plan, sources)]
        _tell_of_changes(target, settings, todo)
        finished = schedule.run(
            functools.partial(make_unit_here, target, tools=tools),
            functools.partial(make_unit_in_worker, settings=settings),
            [UnitTask(target.path, plan, _unit_sources(plan, sources)) for plan in todo],
            workers=workers,
            scheduler=scheduler,
        )
        report = RunReport(passed_over=found.passed_over)
        report.units_kept = sum(not plan.todo for plan in plans)
        _take_in(target, finished, _num_photos(todo), settings, report, on_progress)
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
        tools = Tools(settings, None, store_judge(target, None))
        plans = [_regenerate_plan(target, unit, tools) for unit in range(target.index.num_units)]
        _forget_round(target)
        todo = [plan for plan in plans if plan.todo]
        _tell_of_changes(target, settings, todo)
        report = RunReport(units_kept=len(plans) - len(todo))
        tasks = (UnitTask(target.path, plan, {}) for plan in todo)
        finished = (make_unit_here(target, task, tools) for task in tasks)
        _take_in(target, finished, _num_photos(todo), settings, report, on_progress)
    report.seconds = time.monotonic() - started
    return report


def _taken_on(
    store: Store,
    photos: Path,
    sources: Mapping[str, PhotoSource],
    prune: bool,
    on_progress: Progress,
) -> tuple[Index, dict[str, str]]:
    """The index with these photos taken on, and name -> sha256 of all that it names; nothing is
    written yet.  Raises UsageError where photos have the names of others."""
    digests = _digests(sources, on_progress)
    recorded = _recorded(store)
    absent = {k: digest for k, digest in recorded.items() if k not in digests}
    folder = _folder(photos, next(iter(sources.values())))
    if not prune:
        _refuse_namesakes(store, recorded, folder, sources, digests)
    _tell_of_absent(store, photos, absent, prune)
    index = _updated(store.index, digests, {} if prune else absent)
    return index.from_folder(str(folder)), absent | digests


def _prepared(
    store: Store,
    index: Index,
    digests: Mapping[str, str],
    tools: Tools,
    sources: Mapping[str, PhotoSource],
    photos: Path,
) -> list[UnitPlan]:
    """Make the store ready for its units; their plans.  Raises UsageError, nothing being written,
    where files that it takes are not given."""
    assert tools.models is not None
    plans = _plans(store, index, digests, tools)
    _refuse_without_files(store, plans, sources, photos)
    store.write_index(index)
    sides = sizes(tools.settings, tools.models)
    store.ensure_arrays([spec for part in PARTS for spec in part.specs(sides)])
    keep_judge(store, tools.judge, tools.models.clip)
    return _plans(store, index, digests, tools) if _forget_round(store) else plans


def _take_in(
    store: Store,
    finished: Iterable[UnitTask],
    num_photos: int,
    settings: Settings,
    report: RunReport,
    on_progress: Progress,
) -> None:
    """Count units as they are finished; the settings are the store's own from the first one on."""
    for task in finished:
        _record_settings(store, settings)
        _count(report, task.plan)
        log.debug("unit %d: %s (%s)", task.plan.unit, ", ".join(task.plan.todo), task.plan.reason)
        on_progress("photos", report.photos_made, num_photos)
    _record_settings(store, settings)
    _collect(store, report)


def _digests(sources: Mapping[str, PhotoSource], on_progress: Progress) -> dict[str, str]:
    digests = {}
    for done, (name, source) in enumerate(sources.items(), 1):
        digests[name] = _digest(source)
        on_progress("photos read", done, len(sources))
    return digests


def _digest(source: PhotoSource) -> str:
    """sha256 of the input bytes; of nothing for a file that cannot be read now."""
    try:
        with one_photo():
            return sha256_bytes(source.read_bytes())
    except PhotoError:
        return UNREAD


def _recorded(store: Store) -> dict[str, str]:
    """The photos that the store names: name -> sha256, UNREAD of those not made yet."""
    made = {photo.name: photo.sha256 for record in store.records() for photo in record.photos}
    return {name: made.get(name, UNREAD) for name in store.index.names if name is not None}


def _tell_of_absent(store: Store, photos: Path, absent: Mapping[str, str], prune: bool) -> None:
    """Say, before it is done, what becomes of photos of the store that are not given."""
    if absent:
        become = "are taken away" if prune else "stay in it (--prune takes them away)"
        log.warning(
            "%d photos of store %s are not in %s: they %s", len(absent), store.path, photos, become
        )


def _refuse_namesakes(
    store: Store,
    recorded: Mapping[str, str],
    folder: Path,
    sources: Mapping[str, PhotoSource],
    digests: Mapping[str, str],
) -> None:
    """Raise UsageError where photos have the names of others, that came from another folder.

    recorded: name -> sha256 of what the store holds.  folder: of these photos.  Where the store
    knows it, they are edited photos, unless the one that the store holds still lies in another of
    its folders.
    """
    known = store.index.sources
    others = {
        name: sha
        for name, sha in recorded.items()
        if UNREAD not in (sha, digests.get(name, UNREAD)) and digests[name] != sha
    }
    if str(folder) in known:
        elsewhere = [Path(other) for other in known if other != str(folder)]
        others = {
            name: sha
            for name, sha in others.items()
            if any(_digest(_in(other, sources[name])) == sha for other in elsewhere)
        }
    if others and known:
        raise UsageError(
            f"{len(others)} photos of {folder} have the names of others ({next(iter(others))} "
            f"first), of {', '.join(known)}, that store {store.path} holds: rename them, or make "
            "these photos all that it holds with --prune"
        )


def _in(folder: Path, source: PhotoSource) -> PhotoSource:
    """The photo of that name in another folder, which may not be there."""
    return dataclasses.replace(source, path=folder / source.output_name)


def _folder(photos: Path, first: PhotoSource) -> Path:
    """Where photos come from: the folder of a single one, else what was named."""
    return photos.parent if first.path == photos and first.dataset is None else photos


def _updated(index: Index, digests: Mapping[str, str], absent: Mapping[str, str]) -> Index:
    """The index with the photos given.  Units of absent ones stay as they are: what would be added
    to one would make all of it anew, and their files are not here."""
    units = range(index.num_units)
    closed = [unit for unit in units if not absent.keys().isdisjoint(index.unit_names(unit))]
    return index.updated([*digests, *absent], closed=closed)


def _without_files(plan: UnitPlan, sources: Mapping[str, PhotoSource]) -> list[str]:
    """Photos of a unit that are to be made from their files and whose files are not given."""
    if not plan.todo or FILE not in PART[plan.todo[0]].reads:
        return []
    given = sources.keys() | plan.kept
    return [p.name for p in plan.photos if p.name is not None and p.name not in given]


def _refuse_without_files(
    store: Store, plans: Sequence[UnitPlan], sources: Mapping[str, PhotoSource], photos: Path
) -> None:
    """Raise UsageError where finished work would be remade from files that are not given.

    Units that were never made wait for them.
    """
    lacking = [
        name
        for plan in plans
        if (names := _without_files(plan, sources)) and store.record(plan.unit) is not None
        for name in names
    ]
    if lacking:
        raise UsageError(
            f"{len(lacking)} photos of the store would have to be made anew, and their files are "
            f"not in {photos} ({lacking[0]} first): name the folder that holds them, or take them "
            "out of the store with --prune"
        )


def _record_settings(store: Store, settings: Settings) -> None:
    """Make the settings the store's own: only once a unit is made with them, or none had to be."""
    recorded = config.store_settings(settings)
    if store.index.settings != recorded:
        store.write_index(dataclasses.replace(store.index, settings=recorded))


def _plans(store: Store, index: Index, digests: Mapping[str, str], tools: Tools) -> list[UnitPlan]:
    """The plan of every unit of the store under this index."""
    assert tools.models is not None
    makers = made_by(priors_of(tools.models, tools.judge.fingerprint))
    records = {record.unit: record for record in store.records()}
    plans = []
    for unit in range(index.num_units):
        photos = tuple(
            EMPTY_SLOT if name is None else PhotoRecord(name=name, sha256=digests[name])
            for name in index.unit_names(unit)
        )
        plans.append(plan_unit(unit, photos, records.get(unit), tools.settings, makers))
    return plans


def _forget_round(store: Store) -> bool:
    """Drop the note of an older evenlight, whose trained correctors proposed pseudo-GT; say whether
    there was one.

    What they chose is stale by its fingerprint, so the run that forgets them remakes it.
    """
    if ROUND in store.notes():
        log.warning(
            "a corrector proposed pseudo-GT of store %s, which evenlight no longer does (it gained "
            "too little): what it proposed is made anew",
            store.path,
        )
        store.forget_note(ROUND)
        return True
    return False


def _regenerate_plan(store: Store, unit: int, tools: Tools) -> UnitPlan:
    record, (before, judged) = store.record(unit), (part.name for part in PARTS[-2:])
    if record is None or before not in record.parts:
        raise StoreError(
            f"unit {unit} of {store.path} has no {before}: run 'evenlight precompute' to "
            "complete the store"
        )
    source = [record.parts[before].fingerprint, tools.judge.fingerprint]
    wanted = part_fingerprint(judged, source=source, settings=tools.settings)
    todo = () if record.holds(judged, wanted) else (judged,)
    return UnitPlan(
        unit=unit,
        photos=record.photos,
        fingerprints={judged: wanted},
        todo=todo,
        reason="judge or pseudo-GT settings changed" if todo else "complete",
    )


def _refuse_other_changes(store: Store, settings: Settings) -> None:
    """Only precompute can follow a change of parts that no judge makes."""
    if not store.index.num_units:
        raise StoreError(f"{store.path} holds no photos: run 'evenlight precompute' first")
    differing = config.differing(store.index.settings, settings)
    told = [x for key, x in differing.items() if config.affected_by(key) != PARTS[-1].name]
    if told:
        raise StoreError(
            f"store {store.path} was made with other settings ({', '.join(told)}): "
            "'evenlight precompute' remakes what that touches"
        )


def _tell_of_changes(store: Store, settings: Settings, todo: Sequence[UnitPlan]) -> None:
    """Say, before it is done, which finished parts go because of which settings."""
    told = ", ".join(config.differing(store.index.settings, settings).values())
    if told and todo:
        log.warning("%s: what that touches is made anew in %d units", told, len(todo))


def _unit_sources(plan: UnitPlan, sources: Mapping[str, PhotoSource]) -> dict[str, PhotoSource]:
    return {p.name: sources[p.name] for p in plan.photos if p.name and p.name in sources}


def _num_photos(plans: Sequence[UnitPlan]) -> int:
    return sum(plan.num_photos for plan in plans)


def _count(report: RunReport, plan: UnitPlan) -> None:
    report.units_made += 1
    report.photos_made += plan.num_photos
    for part in plan.todo:
        report.parts_made[part] = report.parts_made.get(part, 0) + 1


def _collect(store: Store, report: RunReport) -> None:
    """Count photos and list failures, of earlier runs too."""
    for record in store.records():
        for photo in record.photos:
            report.photos += photo.name is not None
            if photo.status == FAILED:
                report.failed.append((str(photo.name), photo.reason))
