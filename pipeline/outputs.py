"""What `correct` is asked to do: its options, which photo goes where, what is there already.

Torch-free: a run that has nothing to do ends before anything heavy is imported.
"""

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenlight.cache.errors import PhotoError, UsageError
from evenlight.cache.files import (
    TEMPORARY_SUFFIX,
    canonical_json,
    remove_left,
    sha256_bytes,
    sha256_file,
    start_of_temporary,
)
from evenlight.cache.system import attribute_of, set_attribute
from evenlight.stages.photos.find import FORMAT_OF, PhotoSource, also_there, find_photos
from evenlight.stages.weights import shipped

PIPE = Path("-")  # stdin as a photo, stdout as an output
MAX_STRENGTH = 1.5
SUFFIX_OF = {"jpeg": ".jpg", "png": ".png", "tiff": ".tif", "webp": ".webp"}
CARDS = {"torch": "corrector.json", "onnx": "evenlight.json"}  # of a model, by what runs it
MARK = "user.evenlight"  # the attribute of an output that says what it was made from


@dataclass(frozen=True, kw_only=True)
class Options:
    """strength: 0 (no change) to 1.5; above 1 the correction is extrapolated.  overwrite: of
    outputs that are there, "changed" replaces those whose photo, model, strength or settings are
    others now, True all, False none.  suffix: stands behind the name of every output.  format:
    jpeg, png, tiff, webp, or same.  quality: 1 to 100, of lossy formats; None: as the photo came.
    workers: processes.  dry_run: only tell what would be done.  runtime: torch, or onnx (models
    that `export` made).
    """

    strength: float = 1.0
    overwrite: bool | str = "changed"
    suffix: str = ""
    format: str = "same"
    quality: int | None = None
    workers: int = 1
    dry_run: bool = False
    runtime: str = "torch"

    def __post_init__(self) -> None:
        refuse_strength(self.strength)
        if self.overwrite not in (True, False, "changed"):
            raise UsageError(f"overwrite is True, False or 'changed', got {self.overwrite!r}")
        if set(self.suffix) & {"/", "\0"}:
            raise UsageError(f"suffix {self.suffix!r} holds a slash or a NUL")
        if self.format not in ("same", *SUFFIX_OF):
            raise UsageError(f"format is {', '.join(SUFFIX_OF)} or same, got {self.format!r}")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UsageError(f"quality must be 1 to 100, got {self.quality}")
        if self.workers < 1:
            raise UsageError(f"workers must be at least 1, got {self.workers}")
        if self.runtime not in CARDS:
            raise UsageError(f"runtime is {' or '.join(CARDS)}, got {self.runtime!r}")


def refuse_strength(strength: float) -> None:
    """Raise UsageError for a strength that is out of bounds."""
    if not 0 <= strength <= MAX_STRENGTH:
        raise UsageError(f"strength must be 0 to {MAX_STRENGTH}, got {strength}")


@dataclass(frozen=True)
class Piped(PhotoSource):
    """A photo from stdin."""

    def read_bytes(self) -> bytes:
        return sys.stdin.buffer.read()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One photo and where it goes.  folder: OUT, below which folders are made; None where OUT is
    a file.  format: to write; same: as the photo came."""

    source: PhotoSource
    target: Path
    folder: Path | None
    format: str


def list_jobs(
    photos: Sequence[Path], out: Path, options: Options, max_megapixels: float
) -> tuple[list[Job], list[tuple[str, str]]]:
    """Everything to do, and the pictures passed over with the reason.

    Refused with a UsageError where an output would hit an input or another output, or where `out`
    is a file (named as a photo, or "-") and there is not just one photo.
    """
    sources, passed_over = _sources(photos, out, max_megapixels)
    if not sources:
        where = ", ".join(map(str, photos))
        raise UsageError(f"no photos found in {where}{also_there(passed_over)}")
    named = FORMAT_OF.get(out.suffix.lower(), "")
    if out == PIPE or (named and not out.is_dir()):
        if len(sources) > 1:
            raise UsageError(
                f"{out} is one file, and there are {len(sources)} photos: name a folder"
            )
        form = named if options.format == "same" and named in SUFFIX_OF else options.format
        jobs = [Job(source=sources[0], target=out, folder=None, format=form)]
        if out.is_file() and options.overwrite == "changed" and not options.dry_run:
            raise UsageError(f"{out} is there already: --overwrite replaces it, --skip leaves it")
    elif any(source.path == PIPE for source in sources):
        raise UsageError(f"a photo from stdin goes into a file: {out} is not named as one")
    else:
        jobs = [
            Job(source=one, target=out / _name(one, options), folder=out, format=options.format)
            for one in sources
        ]
    _refuse_collisions(jobs)
    return list({job.target: job for job in jobs}.values()), passed_over


def _name(source: PhotoSource, options: Options) -> str:
    """Relative path of an output."""
    stem, end = os.path.splitext(source.output_name)  # noqa: PTH122 - a Path would drop odd parts
    if options.format not in ("same", FORMAT_OF.get(end.lower())):
        end = SUFFIX_OF[options.format]
    return f"{stem}{options.suffix}{end}"


def _refuse_collisions(jobs: list[Job]) -> None:
    inputs = {_true_place(job.source.path) for job in jobs}
    targets: dict[Path, PhotoSource] = {}
    for job in jobs:
        source, target = job.source, job.target
        if _true_place(target) in inputs and target != PIPE:
            raise UsageError(f"{target} is an input and is never overwritten: name another folder")
        other = targets.setdefault(target, source)
        one, two = ((_true_place(it.path), it.dataset) for it in (other, source))
        if one != two:
            raise UsageError(
                f"{other.path} and {source.path} would both become {target}: correct them into "
                "two folders"
            )


def _true_place(path: Path) -> Path:
    """Absolute, links followed; a link that leads to itself stays (Path.resolve would raise)."""
    return Path(os.path.realpath(path))


def _sources(
    photos: Sequence[Path], out: Path, max_megapixels: float
) -> tuple[list[PhotoSource], list[tuple[str, str]]]:
    """Every photo named, and the pictures passed over; where `out` lies in a folder of photos, not
    what is in `out`."""
    results = _true_place(out)
    sources, passed_over = list[PhotoSource](), list[tuple[str, str]]()
    for path in photos:
        if path == PIPE:
            sources.append(Piped("stdin", PIPE, "stdin"))
            continue
        if path.is_dir() and _true_place(path) == results:
            raise UsageError(f"{out} is the folder of inputs: name another folder for results")
        within = path.is_dir() and results.is_relative_to(_true_place(path))
        found = find_photos(path, max_megapixels)
        passed_over += found.passed_over
        sources += [
            source
            for source in found.photos
            if not (within and _true_place(source.path).is_relative_to(results))
        ]
    return sources, passed_over


def how_of(model: str | Path | None, flat: dict[str, Any], options: Options) -> str:
    """Digest of all but the photo that decides what an output is; where it runs does not."""
    folder = shipped("base") if model is None else Path(model)
    corrector = folder / CARDS[options.runtime]
    digest = sha256_file(corrector) if corrector.is_file() else ""  # loading says what is wrong
    changes = {key: value for key, value in flat.items() if not key.startswith("run.")}
    ways = [options.strength, options.format, options.quality]
    return sha256_bytes(canonical_json([digest, changes, ways]))


def state_of(job: Job, how: str) -> str:
    """Of the output of a job: "none"; "same"; "changed": made of another photo or in another way;
    "foreign": not made here, edited since, or on a file system that keeps no attributes.

    how: digest of all but the photo that decides what an output is.
    """
    if not job.target.is_file():
        return "none"
    mark = _mark_of(job.target)
    try:
        is_same_photo = mark.get("stat") == stat_of(job.source) or (
            mark.get("photo") == sha256_bytes(job.source.read_bytes())
        )
    except (OSError, PhotoError):  # which is for the job to tell
        return "none"
    if is_same_photo and mark.get("how") == how:
        return "same"
    return "foreign" if is_foreign(job) else "changed"


def is_foreign(job: Job) -> bool:
    """Whether the output of a job is there and was not made here, or was edited since."""
    if not job.target.is_file():
        return False
    return _mark_of(job.target).get("made") != sha256_bytes(job.target.read_bytes())


def mark_output(job: Job, mark: dict[str, Any]) -> None:
    """Say what an output was made from.  mark: "how", "from" (`place_of`), "stat" and "photo"
    (sha256) of its photo, "made" (its own sha256)."""
    set_attribute(job.target, MARK, canonical_json(mark))


def _mark_of(output: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError, TypeError):  # there is none, or it is not ours
        return dict(json.loads(attribute_of(output, MARK)))
    return {}


def place_of(source: PhotoSource) -> list[str | None]:
    """Where a photo came from, for the mark of its output."""
    return [str(source.path.absolute()), source.dataset]


def origin_of(output: PhotoSource) -> PhotoSource | None:
    """The photo that an output was made from; None where it does not say."""
    match _mark_of(output.path).get("from"):
        case [str(path), str() | None as dataset]:
            return PhotoSource(output.name, Path(path), output.output_name, dataset)
    return None


def stat_of(source: PhotoSource) -> list[int]:
    """Size and time of change of a photo's file: alike, they are taken to be the same content.
    Raises OSError."""
    status = source.path.stat()
    return [status.st_size, status.st_mtime_ns]


def clean_temporaries(jobs: Sequence[Job]) -> None:
    """Remove what a killed run left of these outputs, but nothing that a run is writing."""
    for folder in {job.target.parent for job in jobs}:
        names = {start_of_temporary(job.target.name) for job in jobs}
        for entry in os.scandir(folder) if folder.is_dir() else ():
            stem = entry.name.removesuffix(TEMPORARY_SUFFIX)
            if stem != entry.name and stem[1:].rpartition(".")[0] in names:
                remove_left(Path(entry.path))
