"""One photo corrected: as an array (`correct`), or from a file to a file."""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from evenlight.cache.errors import EvenlightError, PhotoError, UsageError
from evenlight.cache.files import atomic_write, sha256_bytes
from evenlight.pipeline.failures import one_photo
from evenlight.pipeline.load import load_predictor
from evenlight.pipeline.outputs import (
    PIPE,
    Job,
    Options,
    mark_output,
    place_of,
    refuse_strength,
    stat_of,
)
from evenlight.stages.arrays import namespace
from evenlight.stages.corrector.apply import Maps, apply_maps
from evenlight.stages.corrector.correction import lost
from evenlight.stages.corrector.predictor import Predictor
from evenlight.stages.photos.colour import srgb_light
from evenlight.stages.photos.decode import MIN_SIDE, Photo, decode
from evenlight.stages.photos.encode import encoded, in_format, kept_of
from evenlight.stages.photos.find import FORMAT_OF, PhotoSource
from evenlight.stages.photos.gamut import with_wide_colours
from evenlight.stages.photos.visible import visible
from evenlight.stages.pixels import resize, to_float

# Errors of writing that are about one name; any other (disk full, read-only) meets every photo.
ONE_NAME = (
    errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ,
    errno.ELOOP,
)  # fmt: skip
_SEEN = 10**5  # pixels by which brightness is compared
_SAME_EV = 0.05  # nobody sees less


class CannotWrite(EvenlightError):  # noqa: N818 - reads as the sentence it is
    """What meets every output: the disk is full, say, or read-only."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What was done to a photo.  ev: how much brighter its mean light is.  highlights: share of
    the photo whose lost highlights were filled.  what: brightened, darkened, adjusted (as bright as
    before), or left alone."""

    what: str = "left alone"
    ev: float = 0.0
    highlights: float = 0.0

    def __str__(self) -> str:
        by = f" by {abs(self.ev):.1f} EV" if self.what in ("brightened", "darkened") else ""
        filled = (
            f", highlights restored in {self.highlights:.1%}" if self.highlights >= 5e-4 else ""
        )
        return f"{self.what}{by}{filled}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one photo.  reason: why it failed; empty where it did not.  kept: what of its
    metadata is in the output.  notes: what is not."""

    job: Job
    reason: str = ""
    change: Change = field(default_factory=Change)
    kept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def correct(
    photo: np.ndarray | Image.Image | str | Path,
    *,
    strength: float = 1.0,
    predictor: Predictor | None = None,
) -> np.ndarray:
    """One corrected photo as an array: RGB H,W,3, uint8, or uint16 where the photo is deeper.

    photo: the path of a file; a PIL image; or an array H,W,3 (RGB) or H,W (gray), uint8 or uint16,
    sRGB-encoded and upright.  Files and PIL images are turned upright.  strength: 0 (no change) to
    1.5 (half as much again).  predictor: from `load_predictor`; None is the corrector that ships,
    loaded once.  Raises PhotoError where a file cannot be read, UsageError for anything that is no
    photo.
    """
    refuse_strength(strength)
    opened = _opened(photo)
    return _corrected(opened, predictor or predictor_of(None, "{}"), strength)[0].pixels


@functools.lru_cache(maxsize=1)
def predictor_of(
    model: str | None, settings: str, runtime: str = "torch", workers: int = 1, /
) -> Predictor:
    """The corrector, loaded once in a process.  settings: changes, as JSON.  workers: processes,
    of which this is one."""
    threads = 1 if workers > 1 else 0  # workers are the parallelism; more threads only wait
    if threads and runtime == "torch":
        import torch

        torch.set_num_threads(threads)
    given = json.loads(settings)
    return load_predictor(model, settings=given, runtime=runtime, threads=threads)


def correct_job(job: Job, model: str | None, settings: str, options: Options, how: str) -> Outcome:
    """Correct one photo into its file.  how: for `outputs.state_of`.

    What is wrong with the photo, or with the name of its output, is the outcome's reason.  Raises
    CannotWrite for what would meet every output.
    """
    predictor = predictor_of(model, settings, options.runtime, options.workers)
    mark = {"how": how}
    try:
        with one_photo():
            data, outcome = _made(job, predictor, options, mark)
    except PhotoError as error:
        return Outcome(job=job, reason=str(error))
    try:
        _write(job, data)
    except OSError as error:
        reason = f"cannot write {job.target}: {error.strerror}"
        if error.errno not in ONE_NAME:
            raise CannotWrite(reason) from error
        return Outcome(job=job, reason=reason)
    mark_output(job, mark | {"made": sha256_bytes(data)})
    return outcome


def _made(
    job: Job, predictor: Predictor, options: Options, mark: dict[str, Any]
) -> tuple[bytes, Outcome]:
    """The bytes of the output; what they are made from is added to the mark.

    A photo that the judge leaves alone is its own file, to the bit.
    """
    with contextlib.suppress(OSError):  # before it is read, lest a change meanwhile goes unseen
        mark["stat"] = stat_of(job.source)
    data = job.source.read_bytes()
    mark |= {"photo": sha256_bytes(data), "from": place_of(job.source)}
    photo = decode(data, job.source.name, max_megapixels=predictor.settings.photo.max_megapixels)
    wanted = photo.format if job.format == "same" else job.format
    _refuse_name(job, wanted)
    photo, change = _corrected(photo, predictor, options.strength)
    as_it_came = wanted == photo.format != "array" and options.quality is None
    if change == Change() and as_it_came and options.strength:
        return data, Outcome(job=job, change=change, kept=["the whole file"])
    photo = in_format(photo, wanted, options.quality)
    kept, notes = kept_of(photo.metadata), list(photo.metadata.notes)
    return encoded(photo, options.quality or 95), Outcome(
        job=job, change=change, kept=kept, notes=notes
    )


def _refuse_name(job: Job, wanted: str) -> None:
    """Of an output that is named as a format which is written only for photos that come in it."""
    named = FORMAT_OF.get(job.target.suffix.lower())
    if job.folder is None and job.target != PIPE and named != wanted:
        raise PhotoError(f"{job.target} is named as {named}, but the photo is {wanted}")


def _write(job: Job, data: bytes) -> None:
    if job.target == PIPE:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    if job.folder is not None:
        _make_subfolders(job.target.parent, job.folder)
    atomic_write(job.target, data)


def _make_subfolders(folder: Path, out: Path) -> None:
    """Make a folder below `out`, but never `out`: one that vanished during the run is an error.
    Links are not followed out of it."""
    if folder == out:
        return
    _make_subfolders(folder.parent, out)
    if folder.is_symlink() and not folder.resolve().is_relative_to(out.resolve()):
        raise OSError(errno.ELOOP, f"{folder} is a link that leads out of {out}")
    folder.mkdir(exist_ok=True)


def _corrected(photo: Photo, predictor: Predictor, strength: float) -> tuple[Photo, Change]:
    inside = photo.in_srgb
    seen = visible(inside, photo.alpha, predictor.settings.photo.size)
    maps = predictor.predict(seen) if strength else None
    if maps is None:
        return photo, Change()
    pixels = applied(photo, inside, maps, strength)
    change = change_between(photo.pixels, pixels, filled(seen, maps) * min(strength, 1))
    return dataclasses.replace(photo, pixels=pixels), change


def applied(
    photo: Photo,
    inside_HW3: np.ndarray,
    maps: Maps,
    strength: float,
    window: tuple[slice, slice] | None = None,
) -> np.ndarray:
    """The photo's pixels, corrected; gray stays gray, though the corrector may tint it.

    inside: `photo.in_srgb`.  window: as in `apply_maps`.
    """
    pixels = apply_maps(inside_HW3, maps, strength, window)
    if photo.encoding.primaries is not None:
        before = photo.pixels if window is None else photo.pixels[window]
        pixels = with_wide_colours(before, pixels, photo.encoding.primaries)
    if photo.gray:
        mean = np.rint(pixels.mean(2, keepdims=True)).astype(pixels.dtype)
        pixels = np.repeat(mean, 3, axis=2)
    return pixels


def change_between(
    before_HW3: np.ndarray, after_HW3: np.ndarray, highlights: float = 0.0
) -> Change:
    """What was done to a photo, as its mean light tells.  Pixels: uint8 or uint16, one size."""
    step = max(1, math.isqrt(before_HW3[..., 0].size // _SEEN))
    before, after = (_mean_light(pixels[::step, ::step]) for pixels in (before_HW3, after_HW3))
    ev = math.log2((after + 1e-4) / (before + 1e-4))
    what = "adjusted" if abs(ev) < _SAME_EV else "brightened" if ev > 0 else "darkened"
    return Change(what=what, ev=round(ev, 2), highlights=round(highlights, 4))


def _mean_light(pixels_HW3: np.ndarray) -> float:
    codes = pixels_HW3 / np.iinfo(pixels_HW3.dtype).max
    return float(srgb_light(codes).mean())


def filled(seen_HW3: np.ndarray, maps: Maps) -> float:
    """Share of the photo whose lost highlights the network fills.  seen: uint8."""
    xp = namespace(maps.fill)
    photo = to_float(seen_HW3, xp)
    cover = resize(maps.fill[:, :1], *photo.shape[2:])
    return float((xp.amax(lost(photo), 1) * abs(cover[:, 0])).mean())


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
