"""Evaluate models and baselines on sets of photos with references: one table, protocol printed."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from evenlight.cache.errors import PhotoError, UsageError
from evenlight.cache.schema import fingerprint
from evenlight.pipeline.corrector import LoadedCorrector, load
from evenlight.pipeline.precompute import Progress, silent
from evenlight.stages.corrector.evaluate import (
    BASELINES,
    PROTOCOL,
    Figures,
    Method,
    Sample,
    measure,
    samples,
)
from evenlight.stages.images import decode
from evenlight.stages.priors.pseudo_gt import re_expose

SIDES = ("under", "over", "all")


@dataclass(frozen=True, kw_only=True)
class Row:
    """Means of one method over one side of one set."""

    data: str
    method: str
    side: str
    photos: int
    psnr: float
    ssim: float
    colour: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    protocol: str
    sets: dict[str, str]  # set -> digest of its list of photos
    rows: list[Row]

    def to_csv(self) -> str:
        """The rows as CSV with a header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()


def evaluate(
    models: Sequence[Path],
    data: Sequence[str],
    *,
    device: str = "auto",
    on_progress: Progress = silent,
) -> Evaluation:
    """Measure every model, its pseudo-GT, and the baselines on every set.

    models: folders of training runs.  data: "LAYOUT:PATH", layouts as in
    `stages.corrector.evaluate.LAYOUTS`.
    """
    sets = {name: samples(*_split(name)) for name in data}
    methods = dict(BASELINES)
    for path in models:
        corrector = load(path, device)
        methods[f"pseudo-GT of {path}"] = _pseudo_gt_method(corrector)
        methods[str(path)] = _corrector_method(corrector)
    rows: list[Row] = []
    for name, photos in sets.items():
        measured = _measure_all(photos, methods, on_progress)
        rows += [row for method in methods for row in _means(name, method, measured[method])]
    digests = {
        name: fingerprint(photos=[[s.name, s.side, s.photo.name] for s in photos])
        for name, photos in sets.items()
    }
    return Evaluation(protocol=PROTOCOL, sets=digests, rows=rows)


def _measure_all(
    photos: Sequence[Sample], methods: dict[str, Method], on_progress: Progress
) -> dict[str, list[tuple[str, Figures]]]:
    """method -> (side, figures) of each photo; every photo is decoded once."""
    measured: dict[str, list[tuple[str, Figures]]] = {method: [] for method in methods}
    for done, sample in enumerate(photos, 1):
        photo, reference = _decoded(sample.photo), _decoded(sample.reference)
        if photo.shape != reference.shape:
            raise UsageError(
                f"{sample.photo} is {photo.shape[1]}x{photo.shape[0]} and its reference "
                f"{reference.shape[1]}x{reference.shape[0]}: sizes must agree"
            )
        side = sample.side or ("under" if photo.mean() < reference.mean() else "over")
        for name, method in methods.items():
            measured[name].append((side, measure(method(photo, reference), reference)))
        on_progress("photos", done, len(photos))
    return measured


def _means(data: str, method: str, measured: Sequence[tuple[str, Figures]]) -> list[Row]:
    rows = []
    for side in SIDES:
        chosen = [figures for found, figures in measured if side in (found, "all")]
        if chosen:
            means = {
                name: fmean(getattr(figures, name) for figures in chosen)
                for name in ("psnr", "ssim", "colour")
            }
            rows.append(Row(data=data, method=method, side=side, photos=len(chosen), **means))
    return rows


def _corrector_method(corrector: LoadedCorrector) -> Method:
    def method(photo: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return corrector.correct(photo)

    return method


def _pseudo_gt_method(corrector: LoadedCorrector) -> Method:
    def method(photo: np.ndarray, reference: np.ndarray) -> np.ndarray:
        t_map = torch.from_numpy(corrector.pseudo_gt(photo)["t_map"])
        return re_expose(photo, t_map, corrector.settings.ladder.family)

    return method


def _split(text: str) -> tuple[str, Path]:
    layout, colon, path = text.partition(":")
    if not colon:
        raise UsageError(f"--data takes LAYOUT:PATH, got {text!r}")
    return layout, Path(path)


def _decoded(path: Path) -> np.ndarray:
    try:
        pixels = decode(path.read_bytes(), path.name).pixels
    except (OSError, PhotoError) as error:
        raise UsageError(f"{path}: {error}") from error
    return pixels if pixels.dtype == np.uint8 else (pixels // 257).astype(np.uint8)
