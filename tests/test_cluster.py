"""Units that workers make which were started elsewhere: what they see, and when they are gone."""

import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.errors import EnvironmentLacks, StoreError
from evenlight.cache.store import Store
from evenlight.pipeline import config, schedule, units
from evenlight.pipeline.models import Models
from evenlight.pipeline.precompute import precompute

CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=2, host="127.0.0.1", dashboard_address=None,
        processes=False, protocol="tcp://", silence_logs="CRITICAL",
    )
    print(cluster.scheduler_address, flush=True)
    sys.stdin.read()
"""
SETTINGS = config.build(overrides=["photo.size=64", "run.unit_size=2", "ladder.regions=3"])


@pytest.fixture
def cluster(tmp_path):
    """A process with scheduler and worker, started in another folder; it knows the toy models."""
    (tmp_path / "elsewhere").mkdir()
    start = "from toys import *; from evenlight.pipeline import units, models\n"
    start += "units.load_models = lambda settings: models.Models(ToySegmenter(), ToyClip())\n"
    child = subprocess.Popen(
        [sys.executable, "-c", start + CLUSTER],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths()))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    address = child.stdout.readline().strip()
    assert address.startswith("tcp://127.0.0.1"), address
    yield child, address
    child.kill()
    child.wait()


def paths() -> list[str | None]:
    return [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]


@pytest.mark.slow
def test_relative_paths_serve_workers_that_were_started_elsewhere(cluster, tmp_path, monkeypatch):
    write_photos(tmp_path / "photos", 5)
    monkeypatch.chdir(tmp_path)
    models = Models(ToySegmenter(), ToyClip())
    _, address = cluster
    report = precompute("photos", "S", settings=SETTINGS, models=models, scheduler=address)
    assert (report.units_made, report.failed, models.clip.photos) == (3, [], 0)
    precompute("photos", "here", settings=SETTINGS, models=models)
    with Store.open("S") as store, Store.open("here") as here:
        assert store.digest() == here.digest()


@pytest.mark.slow
def test_a_scheduler_that_is_killed_ends_the_run_in_one_sentence(cluster, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("evenlight"), "handlers", [])  # of a command before
    child, address = cluster
    finished = schedule.run(time.sleep, time.sleep, [0.2] * 100, workers=1, scheduler=address)
    next(finished)
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(StoreError, match=f"the scheduler {address} is gone: .*run the same"):
        list(finished)
    assert capfd.readouterr().err == ""


PRELOAD = """
import os, time
from toys import ToyClip, ToySegmenter
from evenlight.pipeline import models, units

class Slow(ToySegmenter):
    def segment(self, photo):
        time.sleep(0.2)
        return super().segment(photo)

LOADED = []

def load(settings):
    if not LOADED:
        with open(os.environ["LOADS"], "a") as file:
            file.write(f"{os.getpid()}\\n")
        LOADED.append(models.Models(Slow(), ToyClip()))
    return LOADED[0]
units.load_models = load
"""


@pytest.mark.slow
def test_real_workers_may_be_killed_and_added_in_mid_run(tmp_path, caplog):
    write_photos(tmp_path / "photos", 16)
    (tmp_path / "preload.py").write_text(PRELOAD)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths()))}
    environment |= {"LOADS": str(tmp_path / "loads")}
    at = ["--scheduler-file", str(tmp_path / "at.json"), "--host", "127.0.0.1"]
    started = []

    def start(what: str, *more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "distributed.cli.dask_" + what, *at, *more]
        log = (tmp_path / f"{what}.log").open("ab")
        started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return started[-1]

    def worker() -> subprocess.Popen:
        alone = ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
        return start("worker", *alone, "--preload", str(tmp_path / "preload.py"))

    def watch(what: str, done: int, total: int) -> None:
        if what == "photos" and done == 2:
            killed.kill()
            worker()

    try:
        start("scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0")
        killed, _ = worker(), worker()
        at_json = tmp_path / "at.json"
        while not at_json.exists() or not at_json.read_text():  # made, then written
            time.sleep(0.1)
        address = json.loads(at_json.read_text())["address"]
        caplog.set_level(logging.INFO)
        models = Models(ToySegmenter(), ToyClip())
        options = {"settings": SETTINGS, "models": models}
        report = precompute(
            tmp_path / "photos", tmp_path / "S", scheduler=address, on_progress=watch, **options
        )
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert (report.units_made, report.failed, models.segmenter.photos) == (8, [], 0)
    loads = (tmp_path / "loads").read_text().split()
    assert len(loads) == len(set(loads)) >= 2  # each worker loads once
    assert re.search(r"started without: http://127\.0\.0\.1:\d+/status", caplog.text)
    precompute(tmp_path / "photos", tmp_path / "here", **options)
    with Store.open(tmp_path / "S") as store, Store.open(tmp_path / "here") as here:
        assert store.digest() == here.digest()


def test_weights_are_named_from_the_root_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").touch()
    (tmp_path / "fastsam-n").touch()  # the shipped one is meant all the same
    settings = config.build(overrides=["clip.weights=mine.safetensors", "clip.model=ViT-B-32"])
    found = config.absolute_paths(settings)
    assert found.clip.weights == str(tmp_path / "mine.safetensors")
    assert found.regions.segmenter == "fastsam-n" and found.clip.model == "ViT-B-32"


def task_of(folder: Path) -> units.UnitTask:
    """The one unit of a fresh store, its lock being held."""
    write_photos(folder / "photos", 2)
    tasks: list[units.UnitTask] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "run", lambda here, there, given, **_: tasks.extend(given) or [])
        models = Models(ToySegmenter(), ToyClip())
        precompute(folder / "photos", folder / "S", settings=SETTINGS, models=models)
    return tasks[0]


@pytest.mark.parametrize("unseen", ["photos", "S"])
def test_a_worker_that_sees_no_file_says_so_and_nothing_is_recorded(unseen, tmp_path):
    task = task_of(tmp_path)
    (tmp_path / unseen).rename(tmp_path / "away")
    with pytest.raises(EnvironmentLacks, match=rf"does not see {tmp_path / unseen}.*same paths"):
        units.make_unit_in_worker(task, SETTINGS)
    store = tmp_path / ("away" if unseen == "S" else "S")
    assert Store.open(store).record(0) is None


def test_one_photo_that_a_worker_does_not_see_is_a_failed_photo(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "load_models", lambda _: Models(ToySegmenter(), ToyClip()))
    task = task_of(tmp_path)
    next((tmp_path / "photos").iterdir()).unlink()
    with Store.create_or_open(task.store):
        units.make_unit_in_worker(task, SETTINGS)
    assert sorted(p.status for p in Store.open(task.store).record(0).photos) == ["failed", "ok"]


def test_two_threads_of_a_worker_load_models_once_and_take_turns(tmp_path, monkeypatch):
    task = task_of(tmp_path)
    at_once, most, loaded = [], [], []

    @functools.cache
    def load(settings):
        loaded.append(settings)
        time.sleep(0.2)
        return Models(ToySegmenter(), ToyClip())

    def make_unit(*_):
        at_once.append(threading.get_ident())
        most.append(len(at_once))
        time.sleep(0.1)
        at_once.pop()

    monkeypatch.setattr(units, "load_models", load)
    monkeypatch.setattr(units, "make_unit", make_unit)
    with Store.create_or_open(task.store), ThreadPoolExecutor(2) as pool:
        list(pool.map(units.make_unit_in_worker, [task] * 2, [SETTINGS] * 2))
    assert len(loaded) == 1 and max(most) == 1
