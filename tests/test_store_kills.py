"""What a store survives: kills at random and at every I/O point (rows 1 to 3 of the fault plan)."""

import functools
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from torture import tell, trials
from toy_store import (
    CHANGED,
    CHANGED_NAMES,
    FIRST,
    NAMES,
    RETYPED,
    SPECS,
    UNIT,
    complete_units,
    precompute,
    resume_and_check,
    whole_parts,
)

from evenlight.cache import files, shards
from evenlight.cache.store import Store

pytestmark = pytest.mark.slow
RUNS = {
    "new store": {"names": NAMES, "versions": FIRST, "specs": SPECS},
    "stale parts": {"names": CHANGED_NAMES, "versions": CHANGED, "specs": SPECS},
    "other dtype": {"names": NAMES, "versions": CHANGED, "specs": RETYPED},
}


@pytest.fixture(params=RUNS)
def trial(request, folder):
    """The store before the run (absent for a new one), the run, and the digest it must reach."""
    before = folder / "before"
    if request.param != "new store":
        precompute(before)
    run = RUNS[request.param]
    if before.exists():
        shutil.copytree(before, folder / "uninterrupted")
    precompute(folder / "uninterrupted", **run)
    return before, run, Store.open(folder / "uninterrupted").digest()


def start_over(before, path):
    shutil.rmtree(path, ignore_errors=True)
    if before.exists():
        shutil.copytree(before, path)


def in_child(action):
    """Run action in a forked child; its pid. Nothing it does reaches this process."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


IO_CALLS = (
    "open", "write", "pwrite", "fsync", "replace", "unlink", "mkdir", "rmdir", "ftruncate"
)  # fmt: skip


def die_at_call(number, torn):
    """End this process before its number-th I/O call, or in the middle of it if it is a write."""
    calls = 0

    def wrap(call, name):
        @functools.wraps(call)
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                if torn and name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os._exit(137)
            return call(*args, **kwargs)

        return counted

    for name in IO_CALLS:
        setattr(os, name, wrap(getattr(os, name), name))


def remembering(encode_shard):
    """encode_shard, its results kept: it is a pure function, and takes most of a trial."""
    known = {}

    def encode(document, rows):
        key = (files.canonical_json(document), rows.tobytes())
        if key not in known:
            known[key] = encode_shard(document, rows)
        return known[key]

    return encode


def test_a_kill_at_any_io_point_costs_at_most_the_unit_in_hand(trial, folder, monkeypatch):
    before, run, expected = trial
    monkeypatch.setattr(shards, "encode_shard", remembering(shards.encode_shard))
    path, made = folder / "s.zarr", folder / "made"
    for number in range(1, 1000):

        def killed(number=number):
            die_at_call(number, torn=number % 2 == 0)
            precompute(path, **run)

        start_over(before, path)
        status = os.waitstatus_to_exitcode(os.waitpid(in_child(killed), 0)[1])
        if status == 0:
            break
        assert status == 137
        if before.exists():
            assert complete_units(path) >= complete_units(before) - 1
        resume_and_check(path, run, expected, made)
    assert 60 < tell(number - 1) < 1000  # every I/O call of the run was a trial


def test_a_kill_at_a_random_time_and_again_in_the_resume_ends_in_the_same_store(trial, folder):
    """Three runs, each trial killed up to three times."""
    before, run, expected = trial
    path, made = folder / "s.zarr", folder / "made"
    start_over(before, path)
    begin = time.monotonic()
    os.waitpid(in_child(lambda: precompute(path, **run)), 0)
    duration = time.monotonic() - begin
    generator = random.Random(1)
    for _ in range(trials(10, 300)):
        start_over(before, path)
        whole = set()
        for _ in range(generator.randint(1, 3)):
            pid = in_child(lambda: precompute(path, **run))
            time.sleep(generator.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            now = whole_parts(path, **run)
            assert whole <= now  # progress never goes back
            whole = now
        resume_and_check(path, run, expected, made)


def test_every_file_is_written_under_a_temporary_name(folder):
    """No write, zarr's own included, goes round atomic_write (seen by the audit of open)."""

    def audit(event, args):
        if event == "open" and args[2] & os.O_ACCMODE and isinstance(args[0], str | os.PathLike):
            file = os.fsdecode(args[0])
            if file.startswith(str(folder)) and not file.endswith(
                (files.TEMPORARY_SUFFIX, "/lock")
            ):
                os._exit(3)

    def watched():
        sys.addaudithook(audit)
        precompute(folder / "s.zarr")
        precompute(folder / "s.zarr", CHANGED_NAMES, CHANGED)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(watched), 0)[1]) == 0


def test_shards_are_on_disk_before_the_record_and_the_old_record_gone_before_them(
    folder, monkeypatch
):
    precompute(folder)
    order = []
    sync_folder, replace = files.sync_folder, os.replace

    def traced_replace(source, target):
        order.append(Path(target).relative_to(folder).as_posix())
        replace(source, target)

    def traced_sync(path):
        order.append(f"sync {path.relative_to(folder).as_posix()}")
        sync_folder(path)

    monkeypatch.setattr(os, "replace", traced_replace)
    monkeypatch.setattr(files, "sync_folder", traced_sync)
    with Store.create_or_open(folder) as store:
        record = store.record(0)
        parts = {"pseudo_gt": ("2", {"strength": np.zeros(UNIT, np.float32)})}
        store.write_parts(0, record.photos, parts)
    commit = ["evenlight/units/000000.json", "sync evenlight/units"]
    assert order == [*commit, "strength/c.0", "sync strength", *commit]
