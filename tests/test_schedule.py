"""Units are spread over processes; a failing worker stops the run in words."""

import os
from pathlib import Path

import pytest

from evenlight.cache.errors import StoreError
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


def test_a_task_that_keeps_failing_stops_the_run_in_words(tmp_path):
    with pytest.raises(StoreError, match="run the same command again"):
        run(fail, [(tmp_path, 0)])
