"""Tasks for tests of workers: other processes find them under this name."""

import os
import time
from pathlib import Path

import psutil
from test_store_kills import die_at_call
from toy_store import FIRST, SPECS, rows

from evenlight.cache.errors import UsageError
from evenlight.cache.schema import PARTS, PhotoRecord
from evenlight.cache.store import Store


def mark(task: tuple[Path, int]) -> tuple[Path, int]:
    folder, number = task
    (folder / f"{number}").write_text(str(os.getpid()))
    return task


def mark_but_die_once(task: tuple[Path, int]) -> tuple[Path, int]:
    folder, number = task
    died = folder / "died"
    if number == 2 and not died.exists():
        died.touch()
        os._exit(1)  # as a killed worker
    return mark(task)


def fail(task: tuple[Path, int]) -> tuple[Path, int]:
    raise RuntimeError("no luck")


def write_unit(task: tuple[Path, int]) -> tuple[Path, int]:
    """Write a unit of a toy store; the first who tries some of them dies on the way."""
    path, unit = task
    died = path.parent / f"died{unit}"
    if unit % 4 == 0 and not died.exists():
        died.touch()
        die_at_call(5 + unit, torn=unit % 8 == 0)
    with Store.attach(path) as store:
        names = store.index.unit_names(unit)
        photos = [PhotoRecord(name, f"sha of {name}") for name in names]
        parts = {part: (FIRST[part], {}) for part in PARTS}
        for spec in SPECS:
            parts[spec.part][1][spec.name] = rows(spec, names, FIRST[spec.part])
        store.write_parts(unit, photos, parts)
    return task


def die(task: tuple[Path, int]) -> tuple[Path, int]:
    if task[1] == 0:
        os._exit(9)
    return mark(task)


def refuse(task: tuple[Path, int]) -> tuple[Path, int]:
    (task[0] / str(time.time_ns())).touch()
    raise UsageError("not this")


def work_until_told(folder: Path) -> None:
    """Write down who works here and where it listens; where it is stopped, nothing is left."""
    listens = [c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"]
    work = folder / f"{os.getpid()}.part"
    work.write_text(str(listens))
    work.rename(work := work.with_suffix(".work"))
    try:
        while not (folder / "go").exists():
            time.sleep(0.05)
    finally:
        work.unlink()
