"""A store, a training run or a folder of corrected photos as one HTML page to look at.

What the page holds is gathered here; how it shows that is report.html, beside this file.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evenlight import __version__
from evenlight.cache.errors import PhotoError, UsageError
from evenlight.cache.files import atomic_write, make_folder, read_json
from evenlight.cache.place import is_url
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.correct_photo import Change, change_between
from evenlight.pipeline.failures import one_photo
from evenlight.pipeline.outputs import origin_of
from evenlight.pipeline.page import page
from evenlight.pipeline.parts import cut
from evenlight.pipeline.report_pictures import Pictures, halves, jpeg, overlays, shrunk
from evenlight.stages.photos.decode import Photo, decode
from evenlight.stages.photos.find import PhotoSource, find_photos
from evenlight.stages.priors.tones import STRENGTHS
from evenlight.stages.settings import Settings

if TYPE_CHECKING:
    from evenlight.pipeline.evaluate import Evaluation
    from evenlight.stages.corrector.predictor import Predictor

log = logging.getLogger(__name__)
INSIDE = 8  # photos; the pictures of more lie in a folder beside the page
SIDE = 2048  # pixels, the longer side of a picture
POINTS = 500  # of a curve
METHODS = (
    "identity: the photo as it is; answer in hand: chosen by looking at the reference, so out of "
    "reach for any method"
)
PRIORS = ("regions", "t_map", "confidence", "judged", "p_good", "strength")


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """page: where it is.  photos: how many it shows.  failed: name and reason of the others."""

    page: Path
    photos: int
    failed: list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One photo of the page.  after: what it became, by name; the first is measured.  priors:
    PRIORS as a store holds them, cut to the photo; none where they are not known."""

    before: Photo
    after: Mapping[str, Photo]
    priors: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a page is about.  photos: the name of each, and what reads it.  charts: of a training.
    provenance: heading -> name -> value."""

    photos: Sequence[tuple[str, Callable[[], Shown]]]
    provenance: Mapping[str, Mapping[str, Any]]
    charts: Sequence[Mapping[str, Any]] = ()


def report(
    target: str | Path,
    out: str | Path | None = None,
    *,
    photos: Sequence[str | Path] = (),
    side: int = SIDE,
    notes: Sequence[str] = (),
    evaluation: "Evaluation | None" = None,
    on_progress: Progress = silent,
) -> ReportResult:
    """Write a page that shows a store, a training run or a folder of corrected photos.

    out: the page; None is TARGET.html beside the target, here for a store in a bucket.  The
    pictures of more than INSIDE photos lie in a folder beside it.  photos: files and folders; of a
    run, to be shown as it corrects them; of a corrected folder, what it was made from, where its
    files do not say.  side: of the pictures, pixels; larger photos are shrunk.  notes, evaluation:
    to be shown as well.
    Photos that cannot be shown are listed in the result.  Raises UsageError where the target is
    none of the three, StoreError where it is damaged.
    """
    in_bucket = is_url(target)
    folder = Path(Path(target).name if in_bucket else target).resolve()
    default = folder.with_name(f"{folder.name.removesuffix('.zarr')}.html")
    out = default if out is None else Path(out).resolve()
    if out.is_relative_to(folder) and not in_bucket:
        raise UsageError(f"{out} lies in what it is to show: name a page outside of {folder}")
    given = [source for path in photos for source in find_photos(Path(path)).photos]
    subject = _of_store(target) if in_bucket else _subject(folder, given)
    make_folder(out.parent)
    beside = out.with_name(f"{out.stem}_files") if len(subject.photos) > INSIDE else None
    rows, failed = _rows(subject, Pictures(beside), side, on_progress)
    data = {
        "title": folder.name,
        "notes": list(notes),
        "photos": rows,
        "strengths": STRENGTHS.tolist(),
        "charts": subject.charts,
        "tables": _tables(evaluation) if evaluation else [],
        "terms": [METHODS, *evaluation.protocol.split("; ")] if evaluation else [],
        "provenance": {
            **subject.provenance,
            "Photos that cannot be shown": dict(failed),
            "This page": {"made by": f"evenlight {__version__}"},
        },
    }
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # ends no script element
    atomic_write(out, page("report.html").replace("{DATA}", text, 1).encode())
    return ReportResult(page=out, photos=len(rows), failed=failed)


def _subject(target: Path, given: list[PhotoSource]) -> Subject:
    if (target / "zarr.json").exists():
        return _of_store(target)
    if (target / "settings.toml").exists():
        return _of_run(target, given)
    if target.is_dir():
        return _of_corrected(target, given)
    raise UsageError(f"{target} is no store, no training run and no folder of corrected photos")


def _rows(
    subject: Subject, pictures: Pictures, side: int, on_progress: Progress
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """What the page knows of each photo; name and reason of those that cannot be shown."""
    rows, failed = list[dict[str, Any]](), list[tuple[str, str]]()
    for done, (name, read) in enumerate(subject.photos, 1):
        try:
            with one_photo():
                rows.append({"name": name} | _row(read(), pictures, f"{done:06}", side))
            log.debug("%s: %s", name, rows[-1]["said"])
        except PhotoError as error:
            failed.append((name, str(error)))
        on_progress("photos", done, len(subject.photos))
    pictures.remove_others()
    return rows, failed


def _of_store(path: str | Path) -> Subject:
    store = Store.open(path)
    info = store.info()
    counts = [f"{count} {status}" for status, count in info["photos"].items() if count]
    about = {
        "path": store.path,
        "digest": store.digest(),
        "photos": counts,
        "from": store.index.sources,
    }
    return Subject(
        photos=[
            (str(store.index.names[slot]), functools.partial(_stored, store, slot))
            for slot in store.slots("pseudo_gt")
        ],
        provenance={
            "Store": _in_words(about),
            "Fingerprints": _in_words(
                {k: part["fingerprints"] for k, part in info["parts"].items()}
            ),
            "Settings that are not the default": _differing(config.known(store.index.settings)),
            "Photos that could not be used": info["failed"],
        },
    )


def _stored(store: Store, slot: int) -> Shown:
    names = ("photo", "pseudo_gt", *PRIORS)
    have = cut({name: store.rows(name, [slot]) for name in (*names, "extent")}, 0, names)
    before, made = (
        Photo(pixels=have[name], bit_depth=8, format="array") for name in ("photo", "pseudo_gt")
    )
    return Shown(before=before, after={"pseudo-GT": made}, priors=have)


def _of_run(folder: Path, given: list[PhotoSource]) -> Subject:
    changed = config.read(folder / "settings.toml")
    provenance = {"Run": _in_words({"path": folder})}
    if (folder / "corrector.json").exists():
        info = read_json(folder / "corrector.json")["info"]
        provenance["Run"] |= _in_words({"store": info.get("store")} | info.get("figures", {}))
        provenance["Fingerprints"] = _in_words(info["priors"])
    provenance["Settings that are not the default"] = _differing(changed)
    photos = list[tuple[str, Callable[[], Shown]]]()
    if given:
        from evenlight.pipeline.load import load_predictor  # torch

        seen = functools.partial(_predicted, load_predictor(folder))
        photos = [(source.name, functools.partial(seen, source)) for source in given]
    return Subject(photos=photos, provenance=provenance, charts=_charts(folder / "log.jsonl"))


def _predicted(predictor: "Predictor", source: PhotoSource) -> Shown:
    """A photo as a corrector makes it, and what its judge said."""
    import torch

    from evenlight.stages.priors.pseudo_gt import re_expose

    before = _read(source)
    priors = predictor.pseudo_gt(before.pixels)
    t_map, family = torch.from_numpy(priors["t_map"]), predictor.settings.ladder.family
    made = {
        "corrected": predictor.correct(before.pixels, alpha_HW=before.alpha),
        "pseudo-GT": re_expose(before.pixels, t_map, family),
    }
    after = {name: replace(before, pixels=pixels) for name, pixels in made.items()}
    return Shown(before=before, after=after, priors=priors)


def _of_corrected(folder: Path, given: list[PhotoSource]) -> Subject:
    outputs = find_photos(folder).photos
    if not outputs:
        raise UsageError(f"{folder} is no store and no training run, and holds no photos")
    named = {_place(source): source for source in given}
    sources = [named.get(_place(output)) or origin_of(output) for output in outputs]
    photos = [
        (output.name, functools.partial(_compared, output, source))
        for output, source in zip(outputs, sources, strict=True)
    ]
    paths = [source.path.absolute() for source in sources if source]
    about = {"path": folder, "made from": os.path.commonpath(paths) if paths else "unknown"}
    return Subject(photos=photos, provenance={"Folder": _in_words(about)})


def _place(source: PhotoSource) -> Path:
    return Path(source.output_name).with_suffix("")


def _compared(output: PhotoSource, source: PhotoSource | None) -> Shown:
    if source is None:
        raise PhotoError("it does not say what it was made from: name that with --photos")
    return Shown(before=_read(source), after={"corrected": _read(output)})


def _read(source: PhotoSource) -> Photo:
    return decode(source.read_bytes(), source.name)


def _row(shown: Shown, pictures: Pictures, number: str, side: int) -> dict[str, Any]:
    """What the page knows of one photo.  number: the start of the names of its pictures."""
    before, after, priors = shown.before, next(iter(shown.after.values())), shown.priors
    if after.pixels.shape != before.pixels.shape:
        sizes = ("{1}x{0}".format(*photo.pixels.shape) for photo in (before, after))
        raise PhotoError("it is {} and what became of it {}".format(*sizes))
    same = np.array_equal(before.pixels, after.pixels)
    change = Change() if same else change_between(before.pixels, after.pixels)
    thumb, difference = halves(before, after)
    photos = {"before": shrunk(before, side)}
    photos |= {name: shrunk(photo, side) for name, photo in shown.after.items()}
    row = {
        "what": change.what,
        "said": str(change),
        "change": round(difference, 1),
        "full": before.pixels.shape[1::-1],
        "size": photos["before"].pixels.shape[1::-1],
        "thumb": pictures.keep(f"{number}-thumb.jpg", thumb),
        "photos": {k: pictures.keep(f"{number}-{k}.jpg", jpeg(x)) for k, x in photos.items()},
        "overlays": {
            name: pictures.keep(f"{number}-{name}.png", png)
            for name, png in (overlays(priors) if priors else {}).items()
        },
    }
    if priors:
        row |= {
            "judged": np.round(priors["judged"].astype(float), 4).tolist(),
            "good": round(float(priors["p_good"]), 3),
            "strength": round(float(priors["strength"]), 2),
            "sure": round(float(priors["confidence"].max()), 2),
        }
    return row


def _charts(log: Path) -> list[dict[str, Any]]:
    """The curves of a training: title, whether logarithmic, points by name.  Damaged lines of the
    log do not count."""
    losses: dict[str, list[tuple[int, float]]] = {}
    held_out: dict[str, list[tuple[int, float]]] = {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            record = json.loads(line)
            parts = {"loss": record["loss"], **record["parts"]} if "loss" in record else {}
            checks = {"PSNR": record["validation_psnr"]} if "validation_psnr" in record else {}
            for curves, figures in ((losses, parts), (held_out, checks)):
                for name, value in figures.items():
                    if math.isfinite(value):
                        curves.setdefault(name, []).append((int(record["step"]), value))
    charts = (("Losses", True, losses), ("PSNR to held-out pseudo-GT, dB", False, held_out))
    return [
        {"title": title, "log": scale, "lines": {k: _thinned(x) for k, x in curves.items()}}
        for title, scale, curves in charts
        if curves
    ]


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most POINTS of a curve, evenly."""
    return points[:: -(-len(points) // POINTS)]


def _tables(evaluation: "Evaluation") -> list[dict[str, Any]]:
    """One table per set, without the columns that no row has a figure for."""
    from evenlight.pipeline.evaluate import COLUMNS  # torch, torchmetrics, skimage

    headings = ["method", "side", "photos", *(column["heading"] for column in COLUMNS.values())]
    tables = []
    for name, digest in evaluation.sets.items():
        rows = [
            [row.method, row.side, str(row.photos), *row.shown()]
            for row in evaluation.rows
            if row.data == name
        ]
        kept = [i for i in range(len(headings)) if any(row[i] != "-" for row in rows)]
        cells = [[row[i] for i in kept] for row in (headings, *rows)]
        tables.append({"title": f"{name} (digest {digest[:12]})", "rows": cells})
    return tables


def _differing(changed: Mapping[str, Any]) -> dict[str, str]:
    """Of settings by key, those whose value is not the default."""
    usual = config.flatten(config.to_dict(Settings()))
    return _in_words({key: value for key, value in changed.items() if value != usual.get(key)})


def _in_words(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        key: ", ".join(map(str, value)) if isinstance(value, list | tuple | dict) else str(value)
        for key, value in values.items()
    }
