"""Correct photos: files or folders in, the same names out; inputs are never touched."""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evenlight.cache.errors import EvenlightError, PhotoError, UsageError
from evenlight.pipeline.corrector import load
from evenlight.pipeline.precompute import Progress, silent
from evenlight.stages.images import PhotoSource, decode, list_photos
from evenlight.stages.photo_files import encode


@dataclass(kw_only=True)
class CorrectReport:
    corrected: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # already there from an earlier run
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    seconds: float = 0.0


def correct(
    photos: Sequence[Path],
    out: Path,
    *,
    model: Path | None = None,
    strength: float = 1.0,
    overwrite: bool = False,
    device: str = "auto",
    on_progress: Progress = silent,
) -> CorrectReport:
    """Correct every photo and write it under `out` with its name, format, depth and metadata.

    photos: files, folders (walked recursively, the tree is mirrored) or HDF5 files.  model: a
    training run's folder; None is the corrector that ships.  strength: 0 (no change) to 1.
    overwrite: replace outputs of earlier runs; without it they are skipped.
    Photos that cannot be corrected are listed in the report and the run goes on.
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"strength must be 0 to 1, got {strength}")
    started = time.monotonic()
    jobs = _jobs(photos, out)
    corrector = load(model, device)
    report = CorrectReport()
    for done, (source, target) in enumerate(jobs, 1):
        try:
            if target.exists() and not overwrite:
                report.skipped.append(source.name)
            else:
                photo = decode(source.read_bytes(), source.name)
                pixels = corrector.correct(photo.pixels, strength)
                target.parent.mkdir(parents=True, exist_ok=True)
                encode(dataclasses.replace(photo, pixels=pixels), target)
                report.corrected.append(source.name)
        except PhotoError as error:
            report.failed.append((source.name, str(error)))
        except OSError as error:
            raise EvenlightError(f"cannot write {target}: {error.strerror}") from error
        on_progress("photos", done, len(jobs))
    report.seconds = time.monotonic() - started
    return report


def _jobs(photos: Sequence[Path], out: Path) -> list[tuple[PhotoSource, Path]]:
    """(photo, output path) of everything to do; refused where an output would hit an input."""
    sources = [source for path in photos for source in list_photos(path)]
    if not sources:
        raise UsageError(f"no photos found in {', '.join(map(str, photos))}")
    inputs = {source.path.resolve() for source in sources}
    targets: dict[Path, PhotoSource] = {}
    for source in sources:
        target = out / source.output_name
        if target.resolve() in inputs:
            raise UsageError(f"{target} is an input and is never overwritten: name another folder")
        if target in targets:
            raise UsageError(f"{source.path} and {targets[target].path} would both become {target}")
        targets[target] = source
    return [(source, target) for target, source in targets.items()]
