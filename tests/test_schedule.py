"""Units are spread over processes; a failing worker stops the run in words."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torture import trials
from toy_store import SPECS, UNIT
from toy_store import precompute as toy_precompute
from toy_tasks import die, fail, mark, mark_but_die_once, refuse, write_unit

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError
from evenlight.cache.store import Store
from evenlight.pipeline import schedule


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


def test_workers_that_die_in_the_middle_of_a_unit_cost_nothing_but_time(folder):
    units = 4 * trials(4, 50)  # after four deaths a cluster of Dask's had no workers left
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


def test_a_task_that_kills_every_worker_ends_the_run_in_words(tmp_path):
    with pytest.raises(StoreError, match=r"failed 3 times .*exit code 9.*run the same command"):
        run(die, [(tmp_path, number) for number in range(3)])


def test_what_a_task_refuses_is_raised_as_it_is_and_not_tried_again(tmp_path):
    with pytest.raises(UsageError, match=r"^not this$"):
        run(refuse, [(tmp_path, 0)])
    assert len(list(tmp_path.iterdir())) == 1


RUN = """
import signal, sys; from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from toy_tasks import work_until_told as work
from evenlight.pipeline import schedule
list(schedule.run(work, work, [Path(sys.argv[1])] * 2, workers=2, scheduler=""))
"""


def until(happens) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_workers_listen_nowhere_end_with_their_run_and_clean_up(number, tmp_path):
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    until(lambda: len(list(tmp_path.glob("*.work"))) == 2)
    works = list(tmp_path.glob("*.work"))
    assert [work.read_text() for work in works] == ["[]"] * 2
    if number == signal.SIGINT:
        os.killpg(child.pid, number)  # as a terminal does
        said = child.communicate(timeout=60)[1].decode()
        assert said.count("Traceback") == 1  # of the run
    else:
        child.kill()
        (tmp_path / "go").touch()  # the tasks in hand come to their end
    until(lambda: not any(psutil.pid_exists(int(work.stem)) for work in works))
    assert list(tmp_path.glob("*.work")) == []


def test_where_no_scheduler_answers_one_sentence_says_so(tmp_path):
    import dask
    import distributed  # noqa: F401 - its settings are there before, and stay

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        for address in ("tcp://127.0.0.1:9", "nonsense://x"):
            with pytest.raises(EnvironmentLacks, match=f"no Dask scheduler answers at {address}"):
                list(schedule.run(mark, mark, [(tmp_path, 0)], workers=1, scheduler=address))
