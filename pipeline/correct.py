"""Correct photos: one as an array (`correct`), or files into a folder (`correct_files`).

Inputs are never touched.
"""

import dataclasses
import errno
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from evenlight.cache.errors import EvenlightError, PhotoError, UsageError
from evenlight.pipeline.config import Given
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.failures import one_photo
from evenlight.pipeline.load import load_predictor
from evenlight.stages.corrector.predictor import Predictor
from evenlight.stages.photos.decode import MIN_SIDE, Photo, decode
from evenlight.stages.photos.encode import encode
from evenlight.stages.photos.find import PhotoSource, also_there, find_photos

# Errors of writing that are about one name; any other (disk full, read-only) meets every photo.
ONE_NAME = (
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ,
)  # fmt: skip


@dataclass(kw_only=True)
class CorrectReport:
    """What became of every photo, by name."""

    corrected: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # already there from an earlier run
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    passed_over: list[tuple[str, str]] = field(default_factory=list)  # pictures: name, reason
    notes: list[tuple[str, str]] = field(default_factory=list)  # name, what could not be kept
    seconds: float = 0.0


def correct(
    photo: np.ndarray | Image.Image | str | Path,
    *,
    strength: float = 1.0,
    predictor: Predictor | None = None,
) -> np.ndarray:
    """One corrected photo as an array: RGB H,W,3, uint8, or uint16 where the photo is deeper.

    photo: the path of a file; a PIL image; or an array H,W,3 (RGB) or H,W (gray), uint8 or uint16,
    sRGB-encoded and upright.  Files and PIL images are turned upright.  strength: 0 (no change) to
    1.  predictor: from `load_predictor`; None is the corrector that ships, loaded once.
    Raises PhotoError where a file cannot be read, UsageError for anything that is no photo.
    """
    _refuse_strength(strength)
    opened = _opened(photo)
    return _corrected(opened, predictor or _shipped_predictor(), strength).pixels


def correct_files(
    photos: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    strength: float = 1.0,
    overwrite: bool = False,
    settings: Given = None,
    on_progress: Progress = silent,
) -> CorrectReport:
    """Correct every photo and write it under `out` with its name, format, depth and metadata.

    photos: files, folders (walked recursively, the tree is mirrored) or HDF5 files.  model: a
    training run's folder; None is the corrector that ships.  strength: 0 (no change) to 1.
    overwrite: replace outputs of earlier runs; without it they are skipped.  settings: changes
    to `load.OPEN_SETTINGS`.
    Photos that cannot be corrected are listed in the report and the run goes on.  Raises
    EvenlightError where `out` cannot be written to.
    """
    _refuse_strength(strength)
    started = time.monotonic()
    out = Path(out)
    named = [photos] if isinstance(photos, str | Path) else photos
    jobs, passed_over = _jobs([Path(path) for path in named], out)
    predictor = load_predictor(model, settings=settings)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvenlightError(f"cannot make folder {out}: {error.strerror}") from error
    report = CorrectReport(passed_over=passed_over)
    for done, (source, target) in enumerate(jobs, 1):
        if target.is_file() and not overwrite:
            report.skipped.append(source.name)
        else:
            _correct_one(source, target, out, predictor, strength, report)
        on_progress("photos", done, len(jobs))
    report.seconds = time.monotonic() - started
    return report


def _correct_one(
    source: PhotoSource,
    target: Path,
    out: Path,
    predictor: Predictor,
    strength: float,
    report: CorrectReport,
) -> None:
    limit = predictor.settings.photo.max_megapixels
    try:
        with one_photo():
            photo = decode(source.read_bytes(), source.name, max_megapixels=limit)
            corrected = _corrected(photo, predictor, strength)
    except PhotoError as error:
        report.failed.append((source.name, str(error)))
        return
    try:
        _make_subfolders(target.parent, out)
        encode(corrected, target)
    except OSError as error:
        reason = f"cannot write {target}: {error.strerror}"
        if error.errno not in ONE_NAME:
            raise EvenlightError(
                f"{reason}; {len(report.corrected)} photos were corrected before it: put that "
                "right and run the same command again to go on"
            ) from error
        report.failed.append((source.name, reason))
        return
    report.corrected.append(source.name)
    report.notes += [(source.name, note) for note in photo.metadata.notes]


def _corrected(photo: Photo, predictor: Predictor, strength: float) -> Photo:
    """The photo with corrected pixels; gray stays gray, though the corrector may tint it."""
    pixels = predictor.correct(photo.pixels, strength, photo.alpha)
    if photo.gray:
        mean = np.rint(pixels.mean(2, keepdims=True)).astype(pixels.dtype)
        pixels = np.repeat(mean, 3, axis=2)
    return dataclasses.replace(photo, pixels=pixels)


def _refuse_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise UsageError(f"strength must be 0 to 1, got {strength}")


@functools.cache
def _shipped_predictor() -> Predictor:
    return load_predictor()


def _opened(photo: np.ndarray | Image.Image | str | Path) -> Photo:
    """A photo given in any way, as decoding a file gives it."""
    if isinstance(photo, str | Path):
        source = PhotoSource(str(photo), Path(photo), Path(photo).name)
        return decode(source.read_bytes(), source.name)
    if isinstance(photo, Image.Image):
        upright = ImageOps.exif_transpose(photo)
        gray = upright.mode in ("1", "L", "LA", "I;16", "I;16L", "I;16B")
        deep = upright.mode.startswith("I;16")
        pixels = np.array(upright if deep else upright.convert("L" if gray else "RGB"))
        return _opened(pixels.astype(np.uint16) if deep else pixels)
    if not isinstance(photo, np.ndarray):
        raise UsageError(f"a photo is a path, a PIL image or an array, got {type(photo).__name__}")
    if photo.dtype not in (np.uint8, np.uint16) or (photo.shape[2:] != (3,) and photo.ndim != 2):
        raise UsageError(
            f"a photo as an array is uint8 or uint16 of shape H,W,3 or H,W, got {photo.dtype} of "
            f"shape {photo.shape}"
        )
    if min(photo.shape[:2], default=0) < MIN_SIDE:
        raise UsageError(f"a photo is at least {MIN_SIDE} pixels a side, got shape {photo.shape}")
    gray = photo.ndim == 2
    return Photo(
        pixels=np.ascontiguousarray(np.repeat(photo[..., None], 3, axis=2) if gray else photo),
        bit_depth=photo.dtype.itemsize * 8,
        format="array",
        gray=gray,
    )


def _make_subfolders(folder: Path, out: Path) -> None:
    """Make a folder below `out`, but never `out`: one that vanished during the run is an error."""
    if folder != out and not folder.is_dir():
        _make_subfolders(folder.parent, out)
        folder.mkdir(exist_ok=True)


def _jobs(
    photos: Sequence[Path], out: Path
) -> tuple[list[tuple[PhotoSource, Path]], list[tuple[str, str]]]:
    """(photo, output path) of everything to do, and what was passed over; refused where an output
    would hit an input."""
    sources, passed_over = _sources(photos, out)
    if not sources:
        where = ", ".join(map(str, photos))
        raise UsageError(f"no photos found in {where}{also_there(passed_over)}")
    inputs = {source.path.resolve() for source in sources}
    targets: dict[Path, PhotoSource] = {}
    for source in sources:
        target = out / source.output_name
        if target.resolve() in inputs:
            raise UsageError(f"{target} is an input and is never overwritten: name another folder")
        other = targets.setdefault(target, source)
        if (other.path.resolve(), other.dataset) != (source.path.resolve(), source.dataset):
            raise UsageError(
                f"{other.path} and {source.path} would both become {target}: correct them into "
                "two folders"
            )
    return [(source, target) for target, source in targets.items()], passed_over


def _sources(photos: Sequence[Path], out: Path) -> tuple[list[PhotoSource], list[tuple[str, str]]]:
    """Every photo named, and the pictures passed over; where `out` lies in a folder of photos, not
    what is in `out`."""
    results = out.resolve()
    sources, passed_over = list[PhotoSource](), list[tuple[str, str]]()
    for path in photos:
        if path.resolve() == results:
            raise UsageError(f"{out} is the folder of inputs: name another folder for results")
        within = results.is_relative_to(path.resolve())
        found = find_photos(path)
        passed_over += found.passed_over
        sources += [
            source
            for source in found.photos
            if not (within and source.path.resolve().is_relative_to(results))
        ]
    return sources, passed_over
