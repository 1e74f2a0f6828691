"""Units are spread over processes; a failing worker stops the run in words."""

import os
from pathlib import Path

import psutil
import pytest
from test_store_kills import die_at_call
from torture import tell
from toy_store import FIRST, SPECS, UNIT, rows
from toy_store import precompute as toy_precompute

from evenlight.cache.errors import EnvironmentLacks, StoreError
from evenlight.cache.schema import PARTS, PhotoRecord
from evenlight.cache.store import Store
from evenlight.pipeline import schedule


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


def run(work, tasks, workers=2):
    return sorted(schedule.run(work, work, tasks, workers=workers, scheduler=""))


def test_one_worker_runs_in_this_process(tmp_path):
    assert run(mark, [(tmp_path, 0)], workers=1) == [(tmp_path, 0)]
    assert (tmp_path / "0").read_text() == str(os.getpid())


def test_several_workers_do_every_task_though_one_dies(tmp_path):
    tasks = [(tmp_path, number) for number in range(6)]
    assert run(mark_but_die_once, tasks) == tasks
    pids = {(tmp_path / str(number)).read_text() for number in range(6)}
    assert str(os.getpid()) not in pids


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


def test_workers_that_die_in_the_middle_of_a_unit_cost_nothing_but_time(folder):
    units = 4 * tell(1)
    names = [f"{number:04}.jpg" for number in range(units * UNIT)]
    toy_precompute(folder / "here", names=names)
    path = folder / "S"
    with Store.create_or_open(path, unit_size=UNIT) as store:
        store.write_index(store.index.updated(names))
        store.ensure_arrays(SPECS)
        tasks = [(path, unit) for unit in range(units)]
        assert run(write_unit, tasks) == tasks
        assert len(list(folder.glob("died*"))) == units // 4
        assert store.verify() == [] and store.digest() == Store.open(folder / "here").digest()


def test_a_task_that_keeps_failing_stops_the_run_in_words(tmp_path):
    with pytest.raises(StoreError, match="run the same command again"):
        run(fail, [(tmp_path, 0)])


def listening(task: tuple[Path, int]) -> tuple[Path, int]:
    """Write down on which addresses the run and its workers listen."""
    folder, number = task
    run = psutil.Process().parents()
    processes = [psutil.Process(), *(p for p in run if p.pid == int((folder / "pid").read_text()))]
    addresses = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    (folder / f"addresses{number}").write_text(" ".join([str(len(processes)), *addresses]))
    return task


def test_our_own_cluster_listens_on_loopback_alone(tmp_path):
    (tmp_path / "pid").write_text(str(os.getpid()))
    run(listening, [(tmp_path, 0), (tmp_path, 1)])
    assert (tmp_path / "addresses0").read_text() == "2 127.0.0.1"


def test_where_no_scheduler_answers_one_sentence_says_so(tmp_path):
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        for address in ("tcp://127.0.0.1:9", "nonsense://x"):
            with pytest.raises(EnvironmentLacks, match=f"no Dask scheduler answers at {address}"):
                list(schedule.run(mark, mark, [(tmp_path, 0)], workers=1, scheduler=address))
