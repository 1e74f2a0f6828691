"""The whole job on a few real photos: precompute, tune, regenerate, train, evaluate, correct.

Takes well-exposed photos that installed packages ship, makes badly exposed copies of them, and
learns from the copies without being told which is which.  Two photos are kept out of training
and measured.  A small run: minutes on two cores, not the quality of a full one.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenlight.cache.errors import EnvironmentLacks
from evenlight.pipeline import config
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.correct import correct_files
from evenlight.pipeline.evaluate import Evaluation, evaluate
from evenlight.pipeline.judge import tune_clip
from evenlight.pipeline.precompute import precompute, regenerate
from evenlight.pipeline.report import report
from evenlight.pipeline.train import train
from evenlight.stages.photos.canvas import working
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.encode import jpeg_bytes
from evenlight.stages.pixels import to_bytes, to_float
from evenlight.stages.priors import tone

# package folder, file: photographs these packages install (no network)
PHOTOS = (
    ("skimage/data", "astronaut.png"),
    ("skimage/data", "coffee.png"),
    ("skimage/data", "motorcycle_left.png"),
    ("skimage/data", "rocket.jpg"),
    ("ultralytics/assets", "zidane.jpg"),
    ("skimage/data", "chelsea.png"),
    ("ultralytics/assets", "bus.jpg"),
)
HELD_OUT = ("chelsea", "bus")
SHIFTS_EV = (-2.5, -1.5, 0.0, 1.0, 1.8)
SIDE = 640  # pixels; larger photos are shrunk first
SMALL_RUN = ("train.steps=240", "train.size=192", "train.crop=128", "train.validate_every=60")


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    report: Path
    evaluation: Evaluation
    corrected: int


def demo(
    out: Path,
    *,
    overrides: Sequence[str] = (),
    photos: Sequence[tuple[str, str]] = PHOTOS,
    on_progress: Progress = silent,
) -> DemoResult:
    """Run every step in `out` and write report.html there.  overrides: settings, key=value."""
    settings = config.build(overrides=[*SMALL_RUN, *overrides])
    originals = {Path(name).stem: installed_photo(*where) for where in photos for name in where[1:]}
    _write_inputs(out, originals)
    store, run = out / "priors.zarr", out / "run"
    precompute(out / "photos", store, settings=settings, on_progress=on_progress)
    tuned = tune_clip(store, settings=settings)
    regenerate(store, settings=settings, on_progress=on_progress)
    result = train(store, run, settings=settings, on_progress=on_progress)
    evaluation = evaluate([run], [f"triplets:{out / 'held-out'}"], on_progress=on_progress)
    corrected = correct_files(
        [out / "photos"], out / "corrected", model=run, overwrite=True, on_progress=on_progress
    )
    notes = [
        f"A small run: {result.steps} training steps on re-exposed copies of "
        f"{len(originals) - len(HELD_OUT)} photos; the table is measured on the held-out photos "
        f"{' and '.join(HELD_OUT)}.",
        "Tuning the judge: " + "; ".join(tuned.sentences()) + ".",
    ]
    made = report(
        run,
        out / "report.html",
        photos=[out / "held-out", out / "photos"],
        notes=notes,
        evaluation=evaluation,
        on_progress=on_progress,
    )
    return DemoResult(report=made.page, evaluation=evaluation, corrected=len(corrected.corrected))


def installed_photo(folder: str, name: str) -> np.ndarray:
    """A photo (uint8) out of an installed package, found without importing the package."""
    package, _, rest = folder.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentLacks(f"the demo takes photos from {package}, which is not installed")
    path = Path(spec.submodule_search_locations[0]) / rest / name
    pixels = decode(path.read_bytes(), name).pixels
    fits = max(pixels.shape) <= SIDE and pixels.dtype == np.uint8  # rocket.jpg has its own curve
    return pixels if fits else working(pixels, SIDE)


def _write_inputs(out: Path, originals: dict[str, np.ndarray]) -> None:
    """photos/NAME_EV.jpg for training, held-out/NAME/{under,ref,over}.jpg for measuring."""
    for name, pixels in originals.items():
        held_out = name in HELD_OUT
        folder = out / "held-out" / name if held_out else out / "photos"
        folder.mkdir(parents=True, exist_ok=True)
        for shift in SHIFTS_EV:
            side = "ref" if shift == 0 else "under" if shift == -1.5 else "over"
            if held_out and shift not in (-1.5, 0.0, 1.0):
                continue
            copy = tone.apply("ev", to_float(pixels), shift / 1.6)
            stem = side if held_out else f"{name}_{shift:+.1f}EV"
            (folder / f"{stem}.jpg").write_bytes(jpeg_bytes(to_bytes(copy).numpy()))


def main(arguments: Sequence[str]) -> None:
    result = demo(Path(arguments[0]), overrides=arguments[1:])
    print(result.evaluation.to_text())
    print(f"{result.corrected} photos corrected; look at {result.report}")


if __name__ == "__main__":
    main(sys.argv[1:])
