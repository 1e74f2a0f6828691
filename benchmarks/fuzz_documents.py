"""Documents for benchmarks.fuzz: those of a store, a run, a corrected folder; what reads them."""

import copy
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.fuzz_photos import mutated
from evenlight.cache.errors import EvenlightError
from evenlight.cache.files import read_json, write_json
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.correct import correct_files
from evenlight.pipeline.load import load_predictor
from evenlight.pipeline.outputs import MARK, Job, origin_of, state_of
from evenlight.pipeline.precompute import precompute
from evenlight.pipeline.report import report
from evenlight.pipeline.store_info import cache_info, cache_verify
from evenlight.pipeline.train import train
from evenlight.stages.photos.find import PhotoSource

HOSTILE = (
    None, True, -1, 0, 1.5, 1e308, 10**30, 10**400, "", "x", "../../x", "\ud800", "\0", [], {},
    [[]], [None], [-1, -1], {"a": {"b": []}}, "9" * 5000,
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "photo.size": 64, "train.size": 64, "train.crop": 32, "network.size": "tiny",
    "ladder.regions": 2, "train.steps": 2, "train.save_every": 1, "train.validate_every": 2,
    "train.good": 1, "train.bad": 1, "train.scenes": 0, "train.calibrate": [1, 2],
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """A file and what reads it.  sealed: JSON with a digest of itself, which is put right."""

    path: Path
    read: Callable[[], Any]
    sealed: bool = False


def documents(folder: Path) -> Callable[[random.Random, Path], str]:
    """A trial: one document, mutated as JSON or as bytes, is read, and put back."""
    found = _made(folder)
    whole = {document.path: document.path.read_bytes() for document in found}

    def trial(rng: random.Random, tried: Path) -> str:
        document = rng.choice(found)
        data = whole[document.path]
        if document.sealed and rng.random() < 0.8:
            write_json(document.path, _changed(read_json(document.path), rng))
        else:
            document.path.write_bytes(mutated(data, data, rng))
        tried.write_bytes(document.path.read_bytes())
        try:
            document.read()
        except EvenlightError as error:
            assert "\n" not in str(error), f"several lines: {error}"
            return f"{document.path.name}: refused"
        finally:
            document.path.write_bytes(data)
        return f"{document.path.name}: read"

    return trial


def _made(folder: Path) -> list[Document]:
    """A store of six photos, a run of two steps and a corrected folder, and what is read there."""
    photos, store, run, out = (folder / name for name in ("photos", "store", "run", "out"))
    if not out.exists():
        _write_photos(photos)
        precompute(photos, store, settings=SETTINGS)
        train(store, run, settings=SETTINGS)
        correct_files(photos, out)
    inside = store / "evenlight"
    sealed = [inside / "index.json", inside / "judge.json", *sorted((inside / "units").iterdir())]
    found = [Document(path, lambda: _read_store(store), sealed=True) for path in sealed]
    found += [
        Document(store / name / "zarr.json", lambda: _read_store(store))
        for name in ("photo", "strength", "region_labels")
    ]
    found += [
        Document(run / "corrector.json", lambda: load_predictor(run), sealed=True),
        Document(run / "log.jsonl", lambda: report(run, folder / "run.html")),
        Document(run / "settings.toml", lambda: config.build(run / "settings.toml")),
    ]
    newest = max((run / "checkpoints").iterdir()) / "state"
    resume = lambda: train(store, run, settings=SETTINGS)  # noqa: E731 - the door of two files
    found.append(Document(newest.with_suffix(".json"), resume, sealed=True))
    found.append(Document(newest.with_suffix(".safetensors"), resume))
    mark = folder / "mark"
    mark.write_bytes(os.getxattr(next(out.iterdir()), MARK))
    found.append(Document(mark, lambda: _read_mark(mark, photos, out)))
    return found


def _write_photos(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        smooth = cv2.resize(rng.random((5, 6, 3)), (64, 48), interpolation=cv2.INTER_CUBIC)
        exposed = np.clip(smooth, 0, 1) ** rng.uniform(0.4, 2.5)
        cv2.imwrite(str(folder / f"{number}.png"), (exposed * 255).astype(np.uint8))


def _read_store(path: Path) -> None:
    with Store.open(path) as store:
        store.digest(), store.slots("pseudo_gt")
        for unit in range(min(store.index.num_units, 3)):
            if store.record(unit) is not None:
                store.read(unit, ["photo", "strength", "region_labels"])
    config.of_store(path)
    cache_verify(path)
    cache_info(path)


def _read_mark(mark: Path, photos: Path, out: Path) -> None:
    """The attribute of an output, as the next run and a report read it."""
    output = next(out.iterdir())
    os.setxattr(output, MARK, mark.read_bytes())
    source = PhotoSource(output.name, photos / output.name, output.name)
    state_of(Job(source=source, target=output, folder=out, format="same"), "how")
    origin_of(PhotoSource(output.name, output, output.name))


def _changed(document: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """One to three places made something else, taken away, or put in another's place."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 3))):
        inside = [(document, key) for key in document]
        inside += [place for value in document.values() for place in _places(value)]
        holder, key = rng.choice(inside)
        if rng.random() < 0.15:
            del holder[key]
        else:
            other_holder, other = rng.choice(inside)
            values = [rng.choice(HOSTILE), copy.deepcopy(other_holder.get(other))]
            holder[key] = rng.choice(values)
        if not document:
            break
    return json.loads(json.dumps(document))


def _places(value: Any) -> list[tuple[dict[str, Any], str]]:
    """Every key of every object inside a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [(value, key) for key in value] if isinstance(value, dict) else []
    return own + [place for entry in inner for place in _places(entry)]
