"""Correct photos: files into a folder, or one file into another.

Inputs are never touched.  What is heavy is imported where there is something to do.
"""

import functools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenlight.cache.errors import EvenlightError
from evenlight.cache.files import make_folder
from evenlight.pipeline import config, schedule
from evenlight.pipeline.config import Given
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.outputs import (
    PIPE,
    Job,
    Options,
    clean_temporaries,
    how_of,
    list_jobs,
    state_of,
)
from evenlight.stages.settings import Settings

if TYPE_CHECKING:
    from evenlight.pipeline.correct_photo import Outcome

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class CorrectReport:
    """What became of every photo, by name."""

    corrected: list[str] = field(default_factory=list)
    photos: list[dict[str, Any]] = field(default_factory=list)  # what was done to each of those
    skipped: list[str] = field(default_factory=list)  # already there, made in the same way
    others: list[str] = field(default_factory=list)  # there, but not made here, or edited since
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # pictures: name, reason
    notes: list[tuple[str, str]] = field(default_factory=list)  # name, what could not be kept
    planned: list[str] = field(default_factory=list)  # of a dry run: what would be corrected
    planned_bytes: int = 0  # of their files
    seconds: float = 0.0

    def take(self, outcome: "Outcome") -> None:
        """One photo more."""
        name, change = outcome.job.source.name, outcome.change
        if outcome.reason:
            self.failed.append((name, outcome.reason))
            return
        self.corrected.append(name)
        self.notes += [(name, note) for note in outcome.notes]
        row = {"name": name, "output": str(outcome.job.target), **asdict(change)}
        self.photos.append(row | {"kept": outcome.kept, "notes": outcome.notes})
        log.info("%s: %s", name, change)
        for note in outcome.notes:
            log.info("  note: %s: %s", name, note)
        log.debug("  kept: %s: %s", name, ", ".join(outcome.kept) or "nothing beside the pixels")

    def summary(self) -> str:
        """In a sentence or two."""
        changes = [row["what"] for row in self.photos]
        counts = [f"{changes.count(what)} {what}" for what in dict.fromkeys(changes)]
        said = f"corrected {len(self.corrected)} photos"
        if self.planned:
            said = f"would correct {len(self.planned)} photos, {self.planned_bytes / 1e6:.1f} MB"
        said += f": {', '.join(counts)}" if counts else ""
        if self.skipped:
            said += f"; {len(self.skipped)} were there already"
        if self.others:
            said += (
                f"; {len(self.others)} were there already, not made here or edited since "
                "(--overwrite replaces them)"
            )
        return said


def correct_files(
    photos: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    settings: Given = None,
    on_progress: Progress = silent,
    **options: Any,
) -> CorrectReport:
    """Correct every photo and write it under `out` with its name, format, depth and metadata.

    photos: files, folders (walked recursively, the tree is mirrored), HDF5 files, or "-" for stdin.
    out: a folder; or, for one photo, a file named as a photo, or "-" for stdout.  model: a training
    run's folder; None is the corrector that ships.  settings: changes to `load.OPEN_SETTINGS`.
    options: those of `outputs.Options`.
    Photos that cannot be corrected are listed in the report and the run goes on.  Raises
    EvenlightError where `out` cannot be written to.
    """
    started, chosen, out = time.monotonic(), Options(**options), Path(out)
    named = [photos] if isinstance(photos, str | Path) else photos
    limit = config.resolve(settings).photo.max_megapixels
    jobs, passed_over = list_jobs([Path(path) for path in named], out, chosen, limit)
    given = config.to_dict(settings) if isinstance(settings, Settings) else settings
    flat = config.flatten(given or {})
    report = CorrectReport(passed_over=passed_over)
    how = how_of(model, flat, chosen)
    todo = [job for job in jobs if _is_to_do(job, how, chosen, report)]
    if chosen.dry_run:
        report.planned = [job.source.name for job in todo]
        files = {job.source.path for job in todo}
        report.planned_bytes = sum(file.stat().st_size for file in files if file.is_file())
    elif todo:
        asked = None if model is None else str(model), json.dumps(flat), chosen, how
        _correct_all(todo, out, asked, report, on_progress)
    report.seconds = time.monotonic() - started
    return report


def _is_to_do(job: Job, how: str, options: Options, report: CorrectReport) -> bool:
    if options.overwrite is True or job.target == PIPE:
        return True
    state = state_of(job, how)
    if state == "none" or (state == "changed" and options.overwrite):
        return True
    skipped = report.others if state == "foreign" and options.overwrite else report.skipped
    skipped.append(job.source.name)
    return False


def _correct_all(
    jobs: list[Job],
    out: Path,
    asked: tuple[str | None, str, Options, str],
    report: CorrectReport,
    on_progress: Progress,
) -> None:
    """asked: what `correct_photo.correct_job` is given beside the job."""
    log.info("loading the model")
    from evenlight.pipeline.correct_photo import CannotWrite, correct_job, predictor_of

    model, settings, options, how = asked
    if options.workers == 1:
        # what lacks is told before a folder is made
        predictor_of(model, settings, options.runtime, options.workers)
    try:
        make_folder(jobs[0].folder or out.absolute().parent)
    except OSError as error:
        raise EvenlightError(f"cannot make folder {out}: {error.strerror}") from error
    clean_temporaries(jobs)
    work = functools.partial(correct_job, model=model, settings=settings, options=options, how=how)
    try:
        outcomes = schedule.run(work, work, jobs, workers=options.workers, scheduler="")
        for done, outcome in enumerate(outcomes, 1):
            report.take(outcome)
            on_progress("photos", done, len(jobs))
    except CannotWrite as error:
        raise EvenlightError(
            f"{error}; {len(report.corrected)} photos were corrected before it: put that right "
            "and run the same command again to go on"
        ) from error
