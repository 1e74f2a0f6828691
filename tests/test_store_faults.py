"""What a store survives: kills at random and at every I/O point, damage to any of its files.

A toy precompute, whose arrays are a function of photo names and part version, stands for the
real one. Rows 1, 2, 3, 12, 13 and 14 of the project's fault plan.
"""

import functools
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from evenlight.cache import files, shards
from evenlight.cache.errors import StoreError
from evenlight.cache.schema import EMPTY_SLOT, PARTS, ArraySpec, PhotoRecord
from evenlight.cache.store import Store

UNIT = 4
SPECS = (
    ArraySpec("photo", "photo", (6, 6, 3), "uint8"),
    ArraySpec("regions", "regions", (6, 6), "uint8"),
    ArraySpec("clip_photo", "embeddings", (5,), "float32", fill=float("nan")),
    ArraySpec("strength", "pseudo_gt", (), "float32", fill=float("nan")),
)
ARRAYS = [spec.name for spec in SPECS]
FIRST = dict.fromkeys(PARTS, "1")
NAMES = tuple(f"{number}.jpg" for number in range(7))  # two units, one slot behind the end
# A second run finds one photo gone, two new ones, and regions (so all after them) stale.
CHANGED = FIRST | {"regions": "2", "embeddings": "2", "pseudo_gt": "2"}
CHANGED_NAMES = (*NAMES[:2], *NAMES[3:], "x.jpg", "y.jpg", "z.jpg")
# A third finds an array of another dtype, which is dropped and made anew.
RETYPED = tuple(
    ArraySpec("regions", "regions", (6, 6), "uint16") if s.name == "regions" else s for s in SPECS
)


def rows(spec, names, version):
    """The toy models: what an array of a unit holds, from the names of its photos."""
    values = np.full((UNIT, *spec.shape), spec.fill)
    for slot, name in enumerate(names):
        if name is not None:
            key = hashlib.sha256(f"{spec.name} {name} {version}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(key))
            values[slot] = generator.random(spec.shape) * 200
    return values.astype(spec.dtype)


def stale_parts(record, photos, versions):
    """The first part that is missing or out of date, and all after it."""
    if record is None or not record.same_photos(photos):
        return PARTS
    for position, part in enumerate(PARTS):
        if not record.holds(part, versions[part]):
            return PARTS[position:]
    return ()


def precompute(path, names=NAMES, versions=FIRST, specs=SPECS, made=None):
    """Bring the store up to date; made: file that gets a line per unit and part it makes."""
    with Store.create_or_open(path, unit_size=UNIT) as store:
        store.write_index(store.index.updated(names))
        store.ensure_arrays(specs)
        for unit in range(store.index.num_units):
            names = store.index.unit_names(unit)
            photos = [PhotoRecord(n, f"sha of {n}") if n else EMPTY_SLOT for n in names]
            parts = {
                part: (
                    versions[part],
                    {s.name: rows(s, names, versions[part]) for s in specs if s.part == part},
                )
                for part in stale_parts(store.record(unit), photos, versions)
            }
            if made is not None:
                with made.open("a") as log:
                    log.writelines(f"{unit} {part}\n" for part in parts)
            if parts:
                store.write_parts(unit, photos, parts)


def whole_parts(path, names, versions, specs):
    """Units and parts a run need not make again; none while there is no store to open."""
    try:
        store = Store.open(path)
    except StoreError:
        return set()
    if set(store.index.names) - {None} != set(names):
        return set()
    wanted = {spec.name: spec.dtype for spec in specs}
    done = set()
    for record in store.records():
        photos = [
            PhotoRecord(n, f"sha of {n}") if n else EMPTY_SLOT
            for n in store.index.unit_names(record.unit)
        ]
        stale = stale_parts(record, photos, versions)
        for part in PARTS:
            arrays = record.parts[part].arrays if part in record.parts else {}
            if part in stale or any(a.dtype != wanted[name] for name, a in arrays.items()):
                break
            done.add(f"{record.unit} {part}")
    return done


def resume_and_check(path, run, expected, made):
    """After a kill: nothing damaged, nothing whole made again, the same end, no litter."""
    if (path / "evenlight" / "index.json").exists() and (path / "zarr.json").exists():
        assert Store.open(path).verify() == []
    whole = whole_parts(path, run["names"], run["versions"], run["specs"])
    made.unlink(missing_ok=True)
    precompute(path, made=made, **run)
    again = set(made.read_text().split("\n")) if made.exists() else set()
    assert not again & whole
    store = Store.open(path)
    assert store.digest() == expected
    assert store.verify() == []
    assert litter(path) == []


def litter(path):
    known = {"zarr.json", "index.json", "lock"}
    return [
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.name not in known
        and not file.name.startswith("c.")
        and file.parent.name != "units"
    ]


@pytest.fixture
def folder():
    """In memory where there is one: a trial writes a hundred files with fsync."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


RUNS = {
    "new store": {"names": NAMES, "versions": FIRST, "specs": SPECS},
    "stale parts": {"names": CHANGED_NAMES, "versions": CHANGED, "specs": SPECS},
    "other dtype": {"names": NAMES, "versions": FIRST, "specs": RETYPED},
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
        resume_and_check(path, run, expected, made)
    assert 60 < number < 1000  # every I/O call of the run was a trial


def test_a_kill_at_a_random_time_and_again_in_the_resume_ends_in_the_same_store(trial, folder):
    """10 trials for each of three runs, each killed up to three times."""
    before, run, expected = trial
    path, made = folder / "s.zarr", folder / "made"
    start_over(before, path)
    begin = time.monotonic()
    os.waitpid(in_child(lambda: precompute(path, **run)), 0)
    duration = time.monotonic() - begin
    generator = random.Random(1)
    for _ in range(10):
        start_over(before, path)
        whole = set()
        for _ in range(generator.randint(1, 3)):
            pid = in_child(lambda: precompute(path, **run))
            time.sleep(generator.uniform(0, duration))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            now = whole_parts(path, run["names"], run["versions"], run["specs"])
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


# Damage


@pytest.fixture
def store_path(folder):
    """A whole store, and beside it an older whole one of the same photos."""
    precompute(folder / "old", versions=dict.fromkeys(PARTS, "0"))
    precompute(folder / "s.zarr")
    return folder / "s.zarr"


def shard(path, array, unit):
    (file,) = (path / array).glob(f"c.{unit}*")
    return file


def assert_seen(path, array, unit):
    """Reading says array, unit and cure; verify lists just it; the other arrays still read."""
    for read in (
        lambda store: store.read(unit, [array]),
        lambda store: store.rows(array, [unit * UNIT + 1]),
    ):
        with pytest.raises(StoreError, match=rf"'{array}' of unit {unit} .*evenlight precompute"):
            read(Store.open(path))
    store = Store.open(path)
    assert [(d.unit, d.array) for d in store.verify()] == [(unit, array)]
    store.read(unit, [name for name in ARRAYS if name != array])
    store.read(1 - unit, ARRAYS)


def test_any_flipped_bit_of_a_part_is_seen(store_path):
    """100 of 100."""
    generator = random.Random(2)
    for _ in range(100):
        array, unit = generator.choice(ARRAYS), generator.randrange(2)
        file = shard(store_path, array, unit)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        bit = generator.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(damaged)
        assert_seen(store_path, array, unit)
        file.write_bytes(whole)


@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut", "older"])
def test_a_lost_or_older_shard_is_seen(store_path, damage):
    """50 of 50 each."""
    generator = random.Random(3)
    for _ in range(50):
        array, unit = generator.choice(ARRAYS), generator.randrange(2)
        file = shard(store_path, array, unit)
        whole = file.read_bytes()
        if damage == "deleted":
            file.unlink()
        elif damage == "older":
            shutil.copyfile(shard(store_path.parent / "old", array, unit), file)
        else:
            file.write_bytes(whole[: 0 if damage == "emptied" else len(whole) // 2])
        assert_seen(store_path, array, unit)
        file.write_bytes(whole)


def test_two_valid_shards_that_changed_places_are_seen(store_path):
    """50 of 50, within an array and between two of one unit."""
    generator = random.Random(4)
    for _ in range(50):
        one = (generator.choice(ARRAYS), generator.randrange(2))
        other = generator.choice([(a, u) for a in ARRAYS for u in (0, 1) if (a, u) != one])
        files_ = [shard(store_path, *one), shard(store_path, *other)]
        bytes_ = [file.read_bytes() for file in files_]
        for file, data in zip(files_, reversed(bytes_), strict=True):
            file.write_bytes(data)
        for array, unit in (one, other):
            with pytest.raises(StoreError, match=rf"'{array}' of unit {unit} "):
                Store.open(store_path).read(unit, [array])
        seen = {(d.array, d.unit) for d in Store.open(store_path).verify()}
        assert seen == {one, other}
        for file, data in zip(files_, bytes_, strict=True):
            file.write_bytes(data)


def test_dropping_what_verify_lists_remakes_it_and_nothing_before_it(store_path, folder):
    digest = Store.open(store_path).digest()
    shard(store_path, "clip_photo", 1).unlink()
    with Store.create_or_open(store_path) as store:
        for damage in store.verify():
            store.drop(damage.unit, damage.part)
    precompute(store_path, made=folder / "made")
    assert (folder / "made").read_text().split("\n") == ["1 embeddings", "1 pseudo_gt", ""]
    store = Store.open(store_path)
    assert store.verify() == [] and store.digest() == digest


def test_records_that_changed_places_are_incomplete_units(store_path):
    one, other = sorted((store_path / "evenlight" / "units").iterdir())
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    store = Store.open(store_path)
    assert store.record(0) is None and store.record(1) is None
    assert [damage.unit for damage in store.verify()] == [0, 1]


def use(path):
    """Everything a reader does. Rows read must be right; StoreError is the only exception."""
    store = Store.open(path)
    store.info(), store.digest(), store.slots("pseudo_gt"), store.verify()
    for unit in range(store.index.num_units):
        for spec in SPECS:
            if store.record(unit) is not None:
                read = store.read(unit, [spec.name])[spec.name]
                expected = rows(spec, store.index.unit_names(unit), "1")
                np.testing.assert_array_equal(read, expected)


def test_damaged_records_and_documents_end_in_an_incomplete_unit_or_a_refusal(store_path):
    """200 of 200: cut, one bit flipped, or deleted; and precompute then mends each."""
    whole = {p: p.read_bytes() for p in store_path.rglob("*.json")}
    targets = sorted(whole)
    digest = Store.open(store_path).digest()
    generator = random.Random(5)
    seen = 0
    for number in range(200):
        file = targets[number % len(targets)]
        data = bytearray(whole[file])
        kind = generator.choice(["cut", "flip", "flip", "delete"])
        if kind == "flip":
            bit = generator.randrange(8 * len(data))
            data[bit // 8] ^= 1 << (bit % 8)
            file.write_bytes(data)
        elif kind == "cut":
            file.write_bytes(data[: generator.randrange(len(data))])
        else:
            file.unlink()
        try:
            use(store_path)
            seen += Store.open(store_path).record(0) is None
            seen += Store.open(store_path).record(1) is None
        except StoreError as error:
            assert str(store_path) in str(error)
            seen += 1
        precompute(store_path)
        mended = Store.open(store_path)
        assert mended.digest() == digest and mended.verify() == []
        for path, content in whole.items():
            path.write_bytes(content)
    assert seen > 150  # the rest are flips in indentation and the like
