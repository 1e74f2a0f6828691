"""How the cost of a store grows with its photos: section `store` of benchmarks/speed.py.

64 photos are precomputed at a canvas of 64 pixels.  A larger store is their units again and again
(hard links), under names of their own, over a folder of links to the same files: to plan, to read
and to count it costs what any store of so many photos does.
"""

import dataclasses
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from evenlight.cache import records, shards
from evenlight.cache.place import place_of
from evenlight.cache.schema import PhotoRecord, UnitRecord
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.models import load_models
from evenlight.pipeline.parts import JUDGE, PARTS, sizes
from evenlight.pipeline.precompute import precompute

FIRST = 64  # photos that are precomputed
TIMES = (16, 160, 1600)  # that photos are repeated
SIDE = 64  # pixels
COMMAND = [sys.executable, "-m", "evenlight.cli"]
Add = Callable[[str, str, float], None]  # section, what, CPU seconds


def measure_store(add: Add) -> None:
    """CPU seconds of a store of 1,024, 10,240 and 102,400 photos."""
    with tempfile.TemporaryDirectory() as folder:
        pictures, base = Path(folder, "pictures"), Path(folder, "base")
        draw(pictures)
        precompute(pictures, base, settings={"photo": {"size": SIDE}})
        add("store", "writing, a photo", writing(base, Path(folder, "written")))
        add("store", "`--version`, for comparison", child([*COMMAND, "--version"]))
        for times in TIMES:
            photos, store = Path(folder, f"photos-{times}"), Path(folder, f"store-{times}")
            grow(pictures, base, photos, store, times)
            measure_one(photos, store, add)


def measure_one(photos: Path, store: Path, add: Add) -> None:
    count = len(list(photos.iterdir()))
    section = f"store {count:,}"
    files = sum(len(names) for _, _, names in os.walk(store))
    print(f"{section}: {files / count:.2f} files a photo")
    add(section, "`cache info`", child([*COMMAND, "cache", "info", "-s", str(store)]))
    for what, made in (("nothing to do", 0), ("one photo more", 1)):
        if made:
            os.link(next(photos.iterdir()), photos / "zzz.png")
        started = read = time.process_time()

        def watch(stage: str, *_: int) -> None:
            nonlocal read
            if stage == "photos read":
                read = time.process_time()

        report = precompute(photos, store, on_progress=watch)
        assert report.photos_made == made, report
        add(section, f"`precompute`, {what}: reading files", read - started)
        add(section, f"`precompute`, {what}: the rest", time.process_time() - read)


def child(call: list[str], **environment: str) -> float:
    """CPU seconds of a process, its own children with it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(call, check=True, capture_output=True, env=os.environ | environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def writing(base: Path, out: Path) -> float:
    """CPU seconds of a photo whose rows are written, all parts at once."""
    with Store.open(base) as source, Store.create_or_open(out) as target:
        prepare(source, target, source.index.names, source.index.sources)
        found = [
            (one, {name: source.read(one.unit, part.arrays) for name, part in one.parts.items()})
            for one in source.records()
        ]
        started = time.process_time()
        for one, rows in found:
            parts = {name: (one.parts[name].fingerprint, rows[name]) for name in rows}
            target.write_parts(one.unit, one.photos, parts)
        return (time.process_time() - started) / FIRST


def draw(folder: Path) -> None:
    """FIRST small pictures, each its own bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(FIRST):
        coarse = rng.integers(0, 256, (4, 6, 3), np.uint8)
        pixels = cv2.resize(coarse, (SIDE, SIDE * 2 // 3), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"photo_{number:06}.png"), pixels)


def grow(pictures: Path, base: Path, photos: Path, store: Path, times: int) -> None:
    """A folder with every picture so many times, and its complete store."""
    photos.mkdir()
    names = [f"photo_{number:06}.png" for number in range(FIRST * times)]
    for number, name in enumerate(names):
        os.link(pictures / names[number % FIRST], photos / name)
    with Store.open(base) as source, Store.create_or_open(store) as target:
        prepare(source, target, tuple(names), (str(photos),))
        of_base = list(source.records())
        for unit in range(target.index.num_units):
            repeat(of_base[unit % len(of_base)], source, target, unit)


def prepare(
    source: Store, target: Store, names: tuple[str | None, ...], sources: tuple[str, ...]
) -> None:
    """Index, arrays and judge."""
    target.write_index(dataclasses.replace(source.index, names=names, sources=sources))
    settings = config.resolve(None, config.known(source.index.settings))
    models = load_models(settings)
    target.ensure_arrays([s for part in PARTS for s in part.specs(sizes(settings, models))])
    judge = source.note(JUDGE)
    assert judge is not None
    target.write_note(JUDGE, judge)


def repeat(record: UnitRecord, source: Store, target: Store, unit: int) -> None:
    """The unit of the record once more, under the names that the target has there."""
    for name, stored in record.arrays().items():
        rank = len(stored.shape)
        shard = Path(source.path, shards.shard_name(name, record.unit, rank))
        os.link(shard, Path(target.path, shards.shard_name(name, unit, rank)))
    renamed = zip(record.photos, target.index.unit_names(unit), strict=True)
    photos = tuple(PhotoRecord(name=name, sha256=photo.sha256) for photo, name in renamed)
    records.write_record(place_of(target.path), UnitRecord(unit, photos, record.parts))
