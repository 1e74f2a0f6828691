"""The photos of `evenlight serve`: each opened once, then shown at any strength, and saved.

Opening a photo decodes it and predicts its maps.  At screen size it is corrected at the strengths
DRAWN alone; between them stands the polynomial through those, pixel by pixel: a move of the slider
costs a twelfth of a correction, and differs from one by half a level of 255 on average, by three
in 99 of 100 pixels (of photos at -2.7 and +1.3 EV).  A window at full size, and what is saved, is
corrected at the strength itself.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evenlight.cache.errors import EvenlightError, PhotoError
from evenlight.cache.files import make_folder
from evenlight.pipeline.correct_photo import (
    Change,
    Outcome,
    applied,
    change_between,
    correct_job,
    filled,
    predictor_of,
)
from evenlight.pipeline.failures import one_photo
from evenlight.pipeline.outputs import Job, Options, how_of, is_foreign
from evenlight.pipeline.report_pictures import THUMB, jpeg, shrunk
from evenlight.stages.corrector.predictor import Predictor
from evenlight.stages.photos.decode import Photo, decode
from evenlight.stages.photos.find import PhotoSource, without_controls
from evenlight.stages.photos.visible import visible

SIDE = 1280  # pixels, the longer side of a photo on screen
DRAWN = (1.0, 1.5, 0.35, 0.7)  # in this order; the photo itself is strength 0
Window = tuple[slice, slice]  # rows, columns


class Opened:
    """A photo that is looked at.  What it shows are JPEGs in the photo's own colours."""

    def __init__(self, photo: Photo, predictor: Predictor) -> None:
        self.whole, self.small = photo, shrunk(photo, SIDE)
        self._inside = photo.in_srgb
        seen = visible(self._inside, photo.alpha, predictor.settings.photo.size)
        self._maps = predictor.predict(seen)
        self._highlights = 0.0 if self._maps is None else filled(seen, self._maps)
        self._drawn = {0.0: self.small.pixels}

    @property
    def is_good(self) -> bool:
        """The judge leaves it as it is."""
        return self._maps is None

    @property
    def missing(self) -> list[float]:
        """The strengths of DRAWN that are yet to be drawn."""
        return [] if self._maps is None else [one for one in DRAWN if one not in self._drawn]

    def draw(self, strength: float) -> None:
        """Correct the photo at screen size.  strength: one that is `missing`."""
        assert self._maps is not None
        self._drawn[strength] = applied(self.small, self.small.in_srgb, self._maps, strength)

    def is_rough(self, strength: float) -> bool:
        """`after` shows it only about right as long as something is missing."""
        return bool(self.missing) and strength not in self._drawn

    def before(self, window: Window | None = None) -> bytes:
        """The photo as it came: at screen size, or a window of the whole."""
        return jpeg(self.small if window is None else _cut(self.whole, window))

    def after(self, strength: float) -> tuple[bytes, Change]:
        """The photo at screen size, and what was done to it."""
        if self._maps is None or strength == 0:
            return self.before(), Change()
        pixels = self._drawn[strength] if strength in self._drawn else self._between(strength)
        highlights = self._highlights * min(strength, 1)
        change = change_between(self.small.pixels, pixels, highlights)
        return jpeg(replace(self.small, pixels=pixels)), change

    def window_after(self, strength: float, window: Window) -> bytes:
        """A window of the whole photo, corrected as it will be saved."""
        if self._maps is None or strength == 0:
            return self.before(window)
        pixels = applied(self.whole, self._inside, self._maps, strength, window)
        return jpeg(replace(_cut(self.whole, window), pixels=pixels))

    def _between(self, strength: float) -> np.ndarray:
        """Lagrange's polynomial through what is drawn."""
        dtype, drawn = self.small.pixels.dtype, dict(self._drawn)
        total = np.zeros(self.small.pixels.shape, np.float32)
        for one, pixels in drawn.items():
            others = [other for other in drawn if other != one]
            weight = math.prod((strength - other) / (one - other) for other in others)
            total += np.multiply(pixels, np.float32(weight), dtype=np.float32)
        return np.rint(total).clip(0, np.iinfo(dtype).max).astype(dtype)


def _cut(photo: Photo, window: Window) -> Photo:
    alpha = None if photo.alpha is None else photo.alpha[window]
    return replace(photo, pixels=photo.pixels[window], alpha=alpha)


class Album:
    """Photos by number: those of a folder, then those that are dropped onto the page.

    uploads: a folder of our own, for the files of the latter and for what becomes of them.
    """

    def __init__(
        self, jobs: Sequence[Job], uploads: Path, model: str | None, settings: dict[str, Any]
    ) -> None:
        """model, settings: as `correct_files` takes them, the settings flat."""
        self.jobs, self.uploads = list(jobs), uploads
        self._model, self._settings = model, settings

    def load(self) -> Predictor:
        """The model, loaded once.  Raises EnvironmentLacks, StoreError and UsageError."""
        how = Options()  # as `correct_job` is asked: it finds the same model
        settings = json.dumps(self._settings)
        return predictor_of(self._model, settings, how.runtime, how.workers)

    def open(self, number: int) -> Opened:
        """Raises PhotoError."""
        with one_photo():
            return Opened(self._decoded(number), self.load())

    def thumb(self, number: int) -> bytes:
        """A small JPEG of the photo as it came.  Raises PhotoError."""
        with one_photo():
            return jpeg(shrunk(self._decoded(number), THUMB))

    def _decoded(self, number: int) -> Photo:
        source = self.jobs[number].source
        limit = self.load().settings.photo.max_megapixels
        return decode(source.read_bytes(), source.name, max_megapixels=limit)

    def upload_path(self) -> Path:
        """Where the file of the next dropped photo goes."""
        return self.uploads / f"{len(self.jobs):06}"

    def take_upload(self, name: str) -> int:
        """The number of a photo whose file lies at `upload_path` now."""
        path = self.upload_path()
        source = PhotoSource(without_controls(name), path, path.name)
        made = path.with_name(f"{path.name}-corrected")
        self.jobs.append(Job(source=source, target=made, folder=self.uploads, format="same"))
        return len(self.jobs) - 1

    def is_dropped(self, number: int) -> bool:
        return self.jobs[number].folder == self.uploads

    def save(self, number: int, strength: float, overwrite: bool) -> Outcome | None:
        """Correct a photo into its file, as `correct` does.

        overwrite: a file that is there and was not made here, or was edited since; else nothing is
        written then: None.  Raises PhotoError, and EvenlightError where nothing can be written.
        """
        job, options = self.jobs[number], Options(strength=strength)
        how = how_of(self._model, self._settings, options)
        if not overwrite and not self.is_dropped(number) and is_foreign(job):
            return None
        assert job.folder is not None
        try:
            make_folder(job.folder)
        except OSError as error:
            raise EvenlightError(f"cannot make {job.folder}: {error.strerror}") from error
        outcome = correct_job(job, self._model, json.dumps(self._settings), options, how)
        if outcome.reason:
            raise PhotoError(outcome.reason)
        return outcome
