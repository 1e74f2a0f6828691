"""What a store notices: damage to any of its files (rows 12 to 14 of the fault plan)."""

import random
import shutil

import numpy as np
import pytest
from torture import trials
from toy_store import ARRAYS, SPECS, UNIT, precompute, rows

from evenlight.cache.errors import StoreError
from evenlight.cache.schema import PARTS
from evenlight.cache.store import Store


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
    generator = random.Random(2)
    for _ in range(trials(100, 1000)):
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
    generator = random.Random(3)
    for _ in range(trials(50, 200)):
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
    """Within an array and between two of one unit."""
    generator = random.Random(4)
    for _ in range(trials(50, 200)):
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
    """Cut, one bit flipped, or deleted; and precompute then mends each."""
    whole = {p: p.read_bytes() for p in store_path.rglob("*.json")}
    targets = sorted(whole)
    digest = Store.open(store_path).digest()
    generator = random.Random(5)
    seen = 0
    count = trials(200, 1000)
    for number in range(count):
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
    assert seen > 0.75 * count  # the rest are flips in indentation and the like
