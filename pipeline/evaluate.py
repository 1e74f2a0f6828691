"""Evaluate models and baselines on sets of photos: one table, protocol printed."""

import csv
import dataclasses
import functools
import io
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from evenlight.cache.errors import PhotoError, UsageError
from evenlight.cache.files import sha256_bytes
from evenlight.cache.schema import fingerprint
from evenlight.pipeline.config import Given
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.load import load_predictor
from evenlight.stages.corrector.predictor import Predictor
from evenlight.stages.evaluation.baselines import BASELINES, ORACLES, Oracle
from evenlight.stages.evaluation.metrics import (
    NO_REFERENCE,
    PROTOCOL,
    Figures,
    agreement,
    figure,
    lpips_lacks,
    measure,
)
from evenlight.stages.evaluation.sets import Case, list_cases
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.find import without_controls
from evenlight.stages.priors.pseudo_gt import re_expose

log = logging.getLogger(__name__)
SIDES = ("under", "over", "all")


@dataclass(frozen=True, kw_only=True)
class Row(Figures):
    """Means of one method over one side of one set; nan where no photo has the figure."""

    data: str
    method: str
    side: str
    photos: int
    agreement: float = figure("agreement")  # nan where no scene has two photos

    def shown(self) -> list[str]:
        """The figures of COLUMNS for people to read, "-" where there is none."""
        values = ((getattr(self, name), column["decimals"]) for name, column in COLUMNS.items())
        return ["-" if math.isnan(value) else f"{value:.{places}f}" for value, places in values]

    def plain(self) -> dict[str, Any]:
        """Names and figures, None where there is none."""
        told = {name: getattr(self, name) for name in ("data", "method", "side", "photos")}
        values = {name: getattr(self, name) for name in COLUMNS}
        return told | {name: None if math.isnan(x) else x for name, x in values.items()}


# figure: its heading and decimals
COLUMNS = {one.name: one.metadata for one in fields(Row) if one.metadata}


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    protocol: str
    sets: dict[str, str]  # set -> digest of its photos and references, names and bytes
    rows: list[Row]

    def to_csv(self) -> str:
        """The rows as CSV with a header."""
        text = io.StringIO()
        writer = csv.DictWriter(text, ["data", "method", "side", "photos", *COLUMNS])
        writer.writeheader()
        writer.writerows(row.plain() for row in self.rows)
        return text.getvalue()

    def to_text(self) -> str:
        """One table per set, and the protocol."""
        width = max((len(row.method) for row in self.rows), default=0)
        headings = [column["heading"] for column in COLUMNS.values()]
        header = f"{'method':{width}}  side   photos{_cells(headings)}"
        lines = []
        for name, digest in self.sets.items():
            lines += [f"{name} (digest {digest[:12]})", header]
            lines += [
                f"{row.method:{width}}  {row.side:5}  {row.photos:6}{_cells(row.shown())}"
                for row in self.rows
                if row.data == name
            ]
            lines.append("")
        if lacks := lpips_lacks():
            lines.append(f"LPIPS is not available: it needs {lacks}")
        return "\n".join([*lines, NO_REFERENCE, self.protocol])


def evaluate(
    models: Sequence[str | Path],
    data: Sequence[str],
    *,
    settings: Given = None,
    on_progress: Progress = silent,
) -> Evaluation:
    """Measure every model, its pseudo-GT, and the baselines on every set.

    models: folders of training runs.  data: "LAYOUT:PATH", layouts as in
    `stages.evaluation.sets.LAYOUTS`.  settings: changes to `load.OPEN_SETTINGS`.  Raises
    UsageError where a set or a photo of it cannot be used: a mean over fewer photos would be
    another figure.
    """
    listed = {without_controls(name): list_cases(*_split(name)) for name in data}
    methods = {name: _blind(baseline) for name, baseline in BASELINES.items()}
    methods |= {name: _told(oracle) for name, oracle in ORACLES.items()}
    for path in models:
        name = without_controls(str(path))
        if name in methods:
            raise UsageError(f"model {name} is named twice")
        predictor = load_predictor(path, settings=settings)
        everything = correcting_all(predictor)
        methods[f"film, judge of {name}"] = _blind(everything.on_curve)
        methods[f"pseudo-GT of {name}"] = _blind(functools.partial(_pseudo_gt, predictor))
        methods[name] = _blind(predictor.correct)
        methods[f"{name} --all"] = _blind(everything.correct)
    rows: list[Row] = []
    sets: dict[str, str] = {}
    for name, found in listed.items():
        answered = all(case.reference is not None for case in found)
        runnable = {key: m for key, m in methods.items() if answered or key not in ORACLES}
        measured, sets[name] = _measure_all(found, runnable, on_progress)
        rows += [row for method in runnable for row in _means(name, method, measured[method])]
    return Evaluation(protocol=PROTOCOL, sets=sets, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A case, its files read.  Pictures: uint8 H,W,3.  mask: bool H,W, None where all counts."""

    photo: np.ndarray
    reference: np.ndarray | None
    mask: np.ndarray | None
    digests: list[str]  # sha256 of its files

    @property
    def side(self) -> str:
        assert self.reference is not None  # a layout without references names the side itself
        where = slice(None) if self.mask is None else self.mask
        return "under" if self.photo[where].mean() < self.reference[where].mean() else "over"


_Method = Callable[[Opened], np.ndarray]


def _blind(method: Callable[[np.ndarray], np.ndarray]) -> _Method:
    """A method that sees the photo alone."""
    return lambda opened: method(opened.photo)


def _told(oracle: Oracle) -> _Method:
    """A method that sees the answer."""

    def method(opened: Opened) -> np.ndarray:
        assert opened.reference is not None
        return oracle(opened.photo, opened.reference, opened.mask)

    return method


def correcting_all(predictor: Predictor) -> Predictor:
    """The predictor as `correct --all` uses it: no photo is left alone for being probably good."""
    settings = predictor.settings
    judge = dataclasses.replace(settings.judge, prior_good=0.0)
    return dataclasses.replace(predictor, settings=dataclasses.replace(settings, judge=judge))


def _pseudo_gt(predictor: Predictor, photo: np.ndarray) -> np.ndarray:
    t_map = torch.from_numpy(predictor.pseudo_gt(photo)["t_map"])
    return re_expose(photo, t_map, predictor.settings.ladder.family)


@dataclass
class _Measured:
    """What one method reached on one set."""

    figures: list[tuple[str, Figures]] = field(default_factory=list)  # side, of each photo
    agreements: list[float] = field(default_factory=list)  # of each scene with several photos


def _measure_all(
    found: Sequence[Case], methods: dict[str, _Method], on_progress: Progress
) -> tuple[dict[str, _Measured], str]:
    """(method -> what it reached, digest of the set); every photo is read once."""
    measured = {method: _Measured() for method in methods}
    digests: list[list[Any]] = []
    for _, scene in itertools.groupby(found, key=lambda case: case.name):
        outputs: dict[str, list[np.ndarray]] = {method: [] for method in methods}
        for case in scene:
            opened = open_case(case)
            digests.append([case.name, case.side, case.ev, *opened.digests])
            side = case.side or opened.side
            for name, method in methods.items():
                output = method(opened)
                figures = measure(opened.photo, output, opened.reference, opened.mask)
                measured[name].figures.append((side, figures))
                log.debug("%s: %s: %s", case.photo, name, figures)
                outputs[name].append(output)
            on_progress("photos", len(digests), len(found))
        for name, of_scene in outputs.items():
            if len({x.shape for x in of_scene}) == 1 < len(of_scene):
                measured[name].agreements.append(agreement(of_scene, opened.mask))
    return measured, fingerprint(photos=digests)


def open_case(case: Case) -> Opened:
    """Read the files of a case.  Raises UsageError where they do not fit each other."""
    photo, digest = _read(case.photo)
    reference = mask = None
    digests = [digest]
    if case.reference is not None:
        reference, digest = _read(case.reference)
        _refuse_other_size(case.photo, photo, "reference", reference)
        digests.append(digest)
    if case.mask is not None:
        shown, digest = _read(case.mask)
        _refuse_other_size(case.photo, photo, "mask", shown)
        mask = shown.max(axis=2) > 0
        if not mask.any():
            raise UsageError(f"{case.mask} is all black: nothing of {case.photo} would be scored")
        digests.append(digest)
    objects = None
    if case.objects is not None:
        objects, digest = _read(case.objects)
        _refuse_other_size(case.photo, photo, "picture of objects", objects)
        digests.append(digest)
    photo, reference = case.prepare(photo, reference, objects)
    return Opened(photo=photo, reference=reference, mask=mask, digests=digests)


def _refuse_other_size(path: Path, photo: np.ndarray, what: str, other: np.ndarray) -> None:
    if photo.shape != other.shape:
        raise UsageError(
            f"{path} is {photo.shape[1]}x{photo.shape[0]} and its {what} "
            f"{other.shape[1]}x{other.shape[0]}: sizes must agree"
        )


def _means(data: str, method: str, measured: _Measured) -> list[Row]:
    rows = []
    for side in SIDES:
        chosen = [figures for found, figures in measured.figures if side in (found, "all")]
        if not chosen:
            continue
        means = {
            figure.name: _mean([getattr(figures, figure.name) for figures in chosen])
            for figure in fields(Figures)
        }
        agree = _mean(measured.agreements if side == "all" else [])
        rows.append(
            Row(data=data, method=method, side=side, photos=len(chosen), agreement=agree, **means)
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    """Over the photos that have the figure (the others say nan)."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _cells(texts: Sequence[str]) -> str:
    widths = (max(8, len(column["heading"]) + 2) for column in COLUMNS.values())
    return "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))


def _split(text: str) -> tuple[str, Path]:
    layout, colon, path = text.partition(":")
    if not colon:
        raise UsageError(f"--data takes LAYOUT:PATH, got {text!r}")
    return layout, Path(path)


def _read(path: Path) -> tuple[np.ndarray, str]:
    """(uint8 RGB pixels, sha256 of the file)"""
    try:
        data = path.read_bytes()
        pixels = decode(data, path.name).in_srgb
    except (OSError, PhotoError) as error:
        raise UsageError(f"{path}: {error}") from error
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 is 255
    return pixels, sha256_bytes(data)
