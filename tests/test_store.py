"""The store as its users meet it: slots stay, parts chain, shards are plain Zarr, refusals."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from torture import trials

from evenlight.cache import files
from evenlight.cache.errors import StoreError
from evenlight.cache.schema import (
    EMPTY_SLOT,
    FAILED,
    PARTS,
    SCHEMA,
    ArraySpec,
    Index,
    PhotoRecord,
    fingerprint,
)
from evenlight.cache.store import Store

UNIT = 4
SPECS = (
    ArraySpec("photo", "photo", (6, 6, 3), "uint8"),
    ArraySpec("extent", "photo", (2,), "uint16"),
    ArraySpec("regions", "regions", (6, 6), "uint8"),
    ArraySpec("clip_photo", "embeddings", (5,), "float32", fill=float("nan")),
    ArraySpec("strength", "pseudo_gt", (), "float32", fill=float("nan")),
)
NAMES = [f"{number}.jpg" for number in range(10)]  # three units, two slots behind the end


def rows(spec, seed):
    values = np.random.default_rng(seed).random((UNIT, *spec.shape)) * 200
    return values.astype(spec.dtype)


def photos_of(store, unit):
    return [
        PhotoRecord(name, f"digest of {name}") if name else EMPTY_SLOT
        for name in store.index.unit_names(unit)
    ]


def data(parts=PARTS, seed=0, version="1", specs=SPECS):
    return {
        part: (f"{part} {version}", {s.name: rows(s, seed) for s in specs if s.part == part})
        for part in parts
    }


def fill(path, specs=SPECS):
    with Store.create_or_open(path, unit_size=UNIT) as store:
        store.write_index(store.index.updated(NAMES))
        store.ensure_arrays(specs)
        for unit in range(store.index.num_units):
            store.write_parts(unit, photos_of(store, unit), data(seed=unit, specs=specs))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    path = tmp_path_factory.mktemp("filled") / "s.zarr"
    fill(path)
    return path


@pytest.fixture
def path(filled, tmp_path):
    """A filled store of one's own."""
    return shutil.copytree(filled, tmp_path / "s.zarr")


# The index

names = st.sets(st.sampled_from("abcdefghijkl"))


@given(st.lists(names, min_size=1, max_size=6), st.integers(1, 5))
def test_photos_keep_their_slots_and_new_ones_fill_holes_first(histories, unit_size):
    index = Index(names=(), unit_size=unit_size)
    for wanted in histories:
        before, index = index, index.updated(wanted)
        assert {name for name in index.names if name is not None} == wanted
        for slot, name in enumerate(before.names):
            if name in wanted:
                assert index.names[slot] == name
        new = [name for name in index.names if name not in (*before.names, None)]
        assert new == sorted(new)
        grown = len(index.names) - len(before.names)
        assert grown == 0 or None not in index.names  # nothing appended while a hole is left
        assert index.updated(wanted) == index
        units = [index.unit_names(unit) for unit in range(index.num_units)]
        assert all(len(unit) == unit_size for unit in units)
        assert sum(units, ())[: len(index.names)] == index.names
        assert index.num_slots == len(units) * unit_size < len(index.names) + unit_size


def test_units_that_must_stay_take_no_new_photo():
    index = Index(names=("a", None, "b", None, "c"), unit_size=2)
    assert index.updated("abcxy", closed=[0]).names == ("a", None, "b", "x", "c", "y")
    assert index.updated("abcx", closed=[0, 1, 2]).names == ("a", None, "b", None, "c", None, "x")
    assert index.updated("abc", closed=[2]) == index


def test_a_fingerprint_depends_on_every_value_and_not_on_their_order():
    assert fingerprint(a=1, b=(2.5, "x")) == fingerprint(b=[2.5, "x"], a=1)
    assert len({fingerprint(a=1), fingerprint(a=2), fingerprint(b=1), fingerprint(a="1")}) == 4


# Round trips


def test_what_was_written_is_read_back(filled):
    store = Store.open(filled)
    for unit in range(3):
        read = store.read(unit, [spec.name for spec in SPECS])
        for spec in SPECS:
            expected = rows(spec, unit)
            assert read[spec.name].dtype == expected.dtype
            np.testing.assert_array_equal(read[spec.name], expected)


def test_single_photos_are_read_in_the_order_asked(filled):
    store = Store.open(filled)
    for slots in ([9, 0, 5, 0], [4, 3, 2, 8], [7], range(10), []):
        slots = np.array(slots, dtype=int)
        for spec in SPECS:
            everything = np.concatenate([rows(spec, unit) for unit in range(3)])
            np.testing.assert_array_equal(store.rows(spec.name, slots), everything[slots])


def test_threads_that_read_single_photos_at_once_get_their_own(filled):
    store = Store.open(filled)
    everything = np.concatenate([rows(SPECS[0], unit) for unit in range(3)])
    slots = np.random.default_rng(0).integers(0, len(NAMES), 1000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda slot: store.rows("photo", [slot])[0], slots))
    np.testing.assert_array_equal(np.stack(found), everything[slots])


def test_any_zarr_client_reads_the_store_and_lists_it_without_a_warning(filled):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(filled, mode="r")
        assert {name for name, _ in group.arrays()} == {spec.name for spec in SPECS}
        assert group["photo"].shape == (12, 6, 6, 3)
        assert group["photo"].chunks == (1, 6, 6, 3) and group["photo"].shards == (4, 6, 6, 3)
        np.testing.assert_array_equal(group["photo"][4:8], rows(SPECS[0], 1))


def test_every_array_has_a_checksum_in_each_chunk_and_on_the_table_of_chunks(filled):
    for spec in SPECS:
        (sharding,) = zarr.open_group(filled, mode="r")[spec.name].metadata.codecs
        assert sharding.codecs[-1].checksum is True
        assert "Crc32c" in type(sharding.index_codecs[-1]).__name__


def test_entries_equal_to_fill_are_stored_so_that_empty_never_looks_like_lost(path):
    with Store.create_or_open(path) as store:
        blank = {
            part: (name, {key: np.zeros_like(value) for key, value in arrays.items()})
            for part, (name, arrays) in data().items()
        }
        blank["pseudo_gt"][1]["strength"][:] = np.nan
        record = store.write_parts(0, photos_of(store, 0), blank)
        assert (path / "photo" / "c.0.0.0.0").stat().st_size == record.arrays()["photo"].bytes > 0
        assert not store.read(0, ["photo"])["photo"].any()
        assert np.isnan(store.read(0, ["strength"])["strength"]).all()


def test_the_same_arrays_give_the_same_bytes_in_another_process(filled, tmp_path):
    program = "import sys, test_store; test_store.fill(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, tmp_path / "other"],
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "7"},
    )
    assert Store.open(tmp_path / "other").digest() == Store.open(filled).digest()
    for spec in SPECS:
        for file in (filled / spec.name).iterdir():
            assert file.read_bytes() == (tmp_path / "other" / spec.name / file.name).read_bytes()


def test_the_digest_follows_content_and_not_the_order_of_writing(filled, tmp_path):
    digests = set()
    for order, seed in (((0, 1, 2), 0), ((2, 0, 1), 0), ((0, 1, 2), 5)):
        with Store.create_or_open(tmp_path / f"{order}{seed}", unit_size=UNIT) as store:
            store.write_index(store.index.updated(reversed(NAMES)))
            store.ensure_arrays(SPECS)
            for unit in order:
                for part in PARTS:  # one at a time
                    store.write_parts(unit, photos_of(store, unit), data([part], unit + seed))
            digests.add(store.digest())
    assert len(digests) == 2 and Store.open(filled).digest() in digests


# Parts


def test_rewriting_a_part_drops_those_made_from_it_and_keeps_those_before(path):
    with Store.create_or_open(path) as store:
        before = store.record(1)
        for array in ("regions", "strength"):
            store.rows(array, [4, 5])  # whose shard stays in memory until it is rewritten
        record = store.write_parts(1, photos_of(store, 1), data(["regions"], 7, "2"))
        assert list(record.parts) == ["photo", "regions"]
        assert record.parts["photo"] == before.parts["photo"]
        assert record.holds("regions", "regions 2") and not record.holds("regions", "regions 1")
        assert store.record(1) == record and not record.complete
        np.testing.assert_array_equal(store.read(1, ["regions"])["regions"], rows(SPECS[2], 7))
        np.testing.assert_array_equal(store.rows("regions", [5]), rows(SPECS[2], 7)[1:2])
        for read in (store.read, lambda unit, arrays: store.rows(arrays[0], [4 * unit])):
            with pytest.raises(StoreError, match="'strength' of unit 1 is not made yet"):
                read(1, ["strength"])
        assert store.record(0).complete and store.record(2).complete


def test_a_part_is_not_written_without_those_before_it_of_the_same_photos(path):
    with Store.create_or_open(path) as store:
        store.drop(0, "regions")
        with pytest.raises(StoreError, match="no parts before 'embeddings'"):
            store.write_parts(0, photos_of(store, 0), data(["embeddings"]))
        changed = photos_of(store, 1)
        changed[2] = dataclasses.replace(changed[2], sha256="other bytes")
        with pytest.raises(StoreError, match="of the same photos"):
            store.write_parts(1, changed, data(["embeddings"]))
        assert store.record(1).complete


def test_a_photo_may_fail_in_a_later_part_without_the_earlier_ones_made_anew(path):
    with Store.create_or_open(path) as store:
        photos = photos_of(store, 0)
        photos[1] = dataclasses.replace(photos[1], status=FAILED, reason="no region")
        assert list(store.write_parts(0, photos, data(["regions"])).parts) == ["photo", "regions"]
        assert 1 not in store.slots("regions")
        assert store.info()["failed"] == {"1.jpg": "no region"}


@pytest.mark.parametrize("change", [{"dtype": "uint16"}, {"shape": (3, 3)}])
def test_an_array_of_another_kind_is_remade_unit_by_unit_and_may_be_taken_back(path, change):
    specs = [dataclasses.replace(s, **change) if s.name == "regions" else s for s in SPECS]
    with Store.create_or_open(path) as store:
        digest = store.digest()
        store.ensure_arrays(specs)
        with pytest.raises(StoreError, match=r"'regions' of unit 0 is uint8 .*zarr\.json is of"):
            store.read(0, ["regions"])
        store.ensure_arrays(SPECS)
        assert store.digest() == digest and store.verify() == []
        np.testing.assert_array_equal(store.read(0, ["regions"])["regions"], rows(SPECS[2], 0))
        store.ensure_arrays(specs)
        store.write_parts(1, photos_of(store, 1), data(PARTS[1:], 1, "2", specs))
        store.ensure_arrays(SPECS)  # the change is taken back: what was not remade is as it was
        assert store.record(0).complete and store.verify() == []
        np.testing.assert_array_equal(store.read(2, ["regions"])["regions"], rows(SPECS[2], 2))
        store.ensure_arrays(specs)
        for unit in range(3):
            parts = data(PARTS[1:], unit, specs=specs)
            assert store.write_parts(unit, photos_of(store, unit), parts).complete
        assert store.verify() == []


def test_an_array_that_is_no_longer_wanted_goes_once_no_unit_has_it(path):
    fewer = [spec for spec in SPECS if spec.name != "extent"]
    with Store.create_or_open(path) as store:
        for unit in range(3):
            store.ensure_arrays(fewer)
            assert (path / "extent").exists() and store.record(unit).complete
            store.write_parts(unit, photos_of(store, unit), data(version="2", specs=fewer))
        store.ensure_arrays(fewer)
        assert not (path / "extent").exists() and store.verify() == []


def test_new_photos_grow_the_arrays_and_leave_whole_units_alone(path):
    with Store.create_or_open(path) as store:
        before = [store.record(unit) for unit in range(3)]
        store.write_index(store.index.updated([*NAMES[1:], "x.jpg", "y.jpg", "z.jpg", "zz.jpg"]))
        store.ensure_arrays(SPECS)
        assert store.index.num_units == 4
        assert store.index.unit_names(0)[0] == "x.jpg"  # the hole of 0.jpg
        assert [store.record(unit) for unit in range(3)] == before
        assert store.slots("pseudo_gt") == list(range(1, 10))
        assert store.info()["photos"] == {"ok": 9, "failed": 0, "waiting": 4, "holes": 0}
        assert store.write_parts(3, photos_of(store, 3), data()).complete


# Counting


def test_info_counts_photos_units_parts_bytes_and_fingerprints(path):
    with Store.create_or_open(path) as store:
        store.write_parts(2, photos_of(store, 2), data(["pseudo_gt"], version="2"))
        store.drop(0, "embeddings")
        store.write_index(store.index.updated(NAMES[:-1]))
        info = store.info()
    assert json.loads(json.dumps(info)) == info
    assert info["units"] == {"all": 3, "complete": 2}
    assert info["photos"] == {"ok": 9, "failed": 0, "waiting": 0, "holes": 1}
    assert info["parts"]["photo"]["units"] == 3
    assert info["parts"]["embeddings"]["units"] == 2
    assert info["parts"]["pseudo_gt"]["fingerprints"] == {"pseudo_gt 1": 1, "pseudo_gt 2": 1}
    on_disk = sum(p.stat().st_size for p in (path / "photo").glob("c.*"))
    on_disk += sum(p.stat().st_size for p in (path / "extent").glob("c.*"))
    assert info["parts"]["photo"]["bytes"] == on_disk


# Refusals


def test_what_is_no_store_is_refused_in_words(tmp_path, filled):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    zarr.create_group(tmp_path / "foreign.zarr")
    (tmp_path / "file").touch()
    (tmp_path / "checkout" / "evenlight" / "cache").mkdir(parents=True)
    for name in ("photos", "foreign.zarr", "file", "checkout"):
        for make in (Store.open, Store.create_or_open):
            with pytest.raises(StoreError, match=f"{name} |at .*{name}"):
                make(tmp_path / name)
    with pytest.raises(StoreError, match=r"there is no store at .*missing: `evenlight precompute`"):
        Store.open(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(StoreError, match="not being written to"):
        Store.attach(filled)


def test_a_store_of_a_newer_schema_is_refused_by_all(path, monkeypatch):
    monkeypatch.setattr("evenlight.cache.shards.SCHEMA", SCHEMA + 1)
    (path / "zarr.json").unlink()
    Store.create_or_open(path).close()
    monkeypatch.undo()
    for make in (Store.open, Store.create_or_open):
        with pytest.raises(StoreError, match=rf"newer .*{SCHEMA + 1}, this one reads {SCHEMA}"):
            make(path)


@pytest.mark.parametrize("schema", [SCHEMA + 1, SCHEMA - 1, None, "2"])
def test_a_record_of_another_schema_is_an_incomplete_unit(path, schema):
    file = path / "evenlight" / "units" / "000001.json"
    files.write_json(file, files.read_json(file) | {"schema": schema})
    store = Store.open(path)
    assert store.record(1) is None
    assert [damage.unit for damage in store.verify()] == [1]


def test_the_unit_size_is_fixed_when_a_store_is_made(path):
    with Store.create_or_open(path, unit_size=32) as store:
        assert store.index.unit_size == UNIT
        with pytest.raises(StoreError, match="the unit size is fixed"):
            store.write_index(dataclasses.replace(store.index, unit_size=32))


def test_a_full_disk_is_told_in_words_and_costs_only_the_unit_in_hand(path, monkeypatch):
    with Store.create_or_open(path) as store:

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(StoreError, match=r"unit 1 .* No space left on device .* MB free"):
                store.write_parts(1, photos_of(store, 1), data(version="2"))
        assert store.verify() == []
        assert store.record(0).complete and store.record(2).complete
        assert store.write_parts(1, photos_of(store, 1), data(version="2")).complete


# Several processes


def test_a_second_run_is_refused_and_readers_are_not(path):
    with Store.create_or_open(path):
        with pytest.raises(StoreError, match=f"in use by process {os.getpid()} on host"):
            Store.create_or_open(path)
        assert Store.open(path).verify() == []
    Store.create_or_open(path).close()


def test_litter_of_a_killed_run_goes_at_the_start_and_that_of_a_killed_worker_at_the_end(path):
    before = path / "photo" / f".c.0.0.0.0.0011223344556677{files.TEMPORARY_SUFFIX}"
    during = path / "evenlight" / "units" / f".000000.json.8899{files.TEMPORARY_SUFFIX}"
    before.touch()
    with Store.create_or_open(path):
        assert not before.exists()
        during.touch()
    assert not during.exists()


def test_workers_write_different_units_into_one_store(filled, tmp_path):
    path = tmp_path / "s.zarr"
    with Store.create_or_open(path, unit_size=UNIT) as store:
        store.write_index(store.index.updated(NAMES))
        store.ensure_arrays(SPECS)
        pids = []
        for units in ((2,), (1, 0)):
            pid = os.fork()
            if pid == 0:
                worker = Store.attach(path)
                for unit in units:
                    worker.write_parts(unit, photos_of(worker, unit), data(seed=unit))
                os._exit(0)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
        assert store.verify() == []
        assert store.digest() == Store.open(filled).digest()


def test_four_workers_write_many_units_into_one_store_and_none_is_lost(folder):
    units = trials(12, 200)
    names = [f"{number:04}.jpg" for number in range(units * UNIT)]
    digests = []
    for workers in (1, 4):
        with Store.create_or_open(folder / f"{workers}.zarr", unit_size=UNIT) as store:
            store.write_index(store.index.updated(names))
            store.ensure_arrays(SPECS)
            pids = []
            for first in range(workers):
                pid = os.fork()
                if pid == 0:
                    worker = Store.attach(store.path)
                    for unit in range(first, units, workers):
                        worker.write_parts(unit, photos_of(worker, unit), data(seed=unit))
                    os._exit(0)
                pids.append(pid)
            assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * workers
            assert store.verify() == [] and all(record.complete for record in store.records())
            digests.append(store.digest())
    assert digests[0] == digests[1]


def test_a_run_that_is_taken_over_between_shards_and_record_writes_no_record(path, monkeypatch):
    write = files.atomic_write

    def taken_over_after(target, written):
        write(target, written)
        if target.parent.name == "strength":
            (path / "evenlight" / "lock").write_text("another run")

    with Store.create_or_open(path) as store:
        monkeypatch.setattr(files, "atomic_write", taken_over_after)
        with pytest.raises(StoreError, match="taken over by another run"):
            store.write_parts(0, photos_of(store, 0), data(version="2"))
    monkeypatch.undo()
    assert not Store.open(path).record(0).parts


def test_a_worker_stops_writing_when_its_run_is_gone(path):
    with Store.create_or_open(path):
        worker = Store.attach(path)
    with Store.create_or_open(path), pytest.raises(StoreError, match="taken over by another run"):
        worker.write_parts(0, photos_of(worker, 0), data(version="2"))
    assert Store.open(path).record(0).holds("photo", "photo 1")
