"""Notes of a store: kept bit for bit, written under its lock, damage seen, named and mended."""

import errno
import json
import os
import random
import shutil

import numpy as np
import pytest
from toy_corrector import run_cli
from toy_store import precompute as toy_precompute
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.errors import StoreError
from evenlight.cache.schema import EMPTY_SLOT, PARTS, PhotoRecord
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.models import Models
from evenlight.pipeline.precompute import precompute, regenerate
from evenlight.pipeline.train import train

NOTE = {
    "weights": np.array([[0.1, -0.0], [np.nan, np.inf]], np.float32),
    "counts": np.arange(3),
    "one": np.array(2.5, np.float16),
    "made by": "a judge",
    "layers": [1, 2, {"deep": True}],
}


@pytest.fixture
def path(folder):
    toy_precompute(folder / "s.zarr")
    return folder / "s.zarr"


def write(path, note=NOTE, name="judge"):
    with Store.create_or_open(path) as store:
        store.write_note(name, note)


def name_it(path, unit=1, name="judge"):
    """Write a unit's last part anew as made by the note."""
    with Store.create_or_open(path) as store:
        photos = [
            PhotoRecord(photo, f"sha of {photo}") if photo else EMPTY_SLOT
            for photo in store.index.unit_names(unit)
        ]
        part = {"pseudo_gt": ("1", store.read(unit, ["strength"]))}
        store.write_parts(unit, photos, part, notes={"pseudo_gt": [name]})


def test_a_note_comes_back_bit_for_bit_and_changes_no_digest(path):
    before = Store.open(path).digest()
    write(path)
    store = Store.open(path)
    found = store.note("judge")
    assert found.keys() == NOTE.keys()
    for key, value in NOTE.items():
        if isinstance(value, np.ndarray):
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
            assert found[key].tobytes() == value.tobytes()
        else:
            assert found[key] == value
    assert store.notes() == ["judge"] and store.note("other") is None
    assert store.digest() == before and store.verify() == []


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_any_damage_of_a_note_is_refused_seen_and_mended(path, damage):
    write(path)
    file = path / "evenlight" / "judge.json"
    whole = file.read_bytes()
    generator = random.Random(6)
    for _ in range(60):
        data = bytearray(whole)
        if damage == "flipped":
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(7)
            if unsealed(data) == unsealed(whole):
                continue  # indentation
        else:
            data = data[: 0 if damage == "emptied" else generator.randrange(len(data) - 2)]
        file.write_bytes(data)
        store = Store.open(path)
        with pytest.raises(StoreError, match=r"judge\.json .*verify --repair"):
            store.note("judge")
        assert [found.note for found in store.verify()] == ["judge"]
    with Store.create_or_open(path) as store:
        store.forget_note("judge")
        assert store.verify() == [] and store.note("judge") is None


def unsealed(data):
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


def test_a_note_that_a_record_names_and_that_is_gone_is_damage(path):
    write(path)
    name_it(path)
    digest = Store.open(path).digest()
    assert Store.open(path).verify() == []
    (path / "evenlight" / "judge.json").unlink()
    store = Store.open(path)
    assert [(d.note, d.unit) for d in store.verify()] == [("judge", None)]
    with pytest.raises(StoreError, match="missing, by which 1 units were made"):
        store.note("judge")
    with Store.create_or_open(path) as store:
        store.forget_note("judge")
        assert store.verify() == [] and store.note("judge") is None
        assert set(store.record(1).parts) == set(PARTS[:-1]) and store.record(0).complete
    toy_precompute(path)
    assert Store.open(path).digest() == digest


def test_notes_are_written_only_by_the_run_that_holds_the_store(path):
    write(path)
    with Store.create_or_open(path):
        worker = Store.attach(path)
        worker.write_note("judge", {"by": "a worker"})
    with Store.create_or_open(path):
        with pytest.raises(StoreError, match="taken over by another run"):
            worker.write_note("judge", NOTE)
        with pytest.raises(StoreError, match="taken over by another run"):
            worker.forget_note("judge")
    assert Store.open(path).note("judge") == {"by": "a worker"}
    with pytest.raises(AssertionError, match="for reading"):
        Store.open(path).write_note("judge", NOTE)


def test_a_full_disk_leaves_the_former_note(path, monkeypatch):
    write(path, {"version": 1})
    with Store.create_or_open(path) as store:

        def full(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(StoreError, match=r"note judge .* No space left on device"):
                store.write_note("judge", {"version": 2})
        assert store.note("judge") == {"version": 1}


# The judge of a store

SETTINGS = config.build(overrides=["photo.size=64", "run.unit_size=2", "ladder.regions=3"])


def toys(settings=None):
    return Models(ToySegmenter(), ToyClip())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_photos(folder / "photos", 3)
    precompute(folder / "photos", folder / "S", settings=SETTINGS, models=toys())
    return folder


@pytest.mark.parametrize("damage", ["deleted", "cut", "other content", "of another shape"])
def test_lost_or_damaged_judge_never_changes_in_silence(
    damage, finished, tmp_path, monkeypatch, capsys
):
    store = shutil.copytree(finished / "S", tmp_path / "S")
    digest = Store.open(store).digest()
    file = store / "evenlight" / "judge.json"
    if damage == "deleted":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "other content":
        file.write_bytes(file.read_bytes().replace(b'"tuned": false', b'"tuned": true '))
    else:
        write(store, {"tensor x": [1.0], "tuned": True, "clip": ToyClip().fingerprint}, "judge")
    runs = [
        lambda: precompute(finished / "photos", store, settings=SETTINGS, models=toys()),
        lambda: regenerate(store, settings=SETTINGS),
        lambda: train(store, tmp_path / "run", settings=SETTINGS, models=toys()),
    ]
    for run in runs:
        with pytest.raises(StoreError, match="judge"):
            run()
    if damage == "of another shape":  # sealed by us, so no damage: only another judge helps
        return
    assert run_cli(monkeypatch, "cache", "info", "-s", store) == 3
    assert "judge" in capsys.readouterr().err
    assert run_cli(monkeypatch, "cache", "verify", "-s", store) == 3
    assert "judge.json" in capsys.readouterr().err
    assert run_cli(monkeypatch, "cache", "verify", "-s", store, "--repair") == 0
    report = precompute(finished / "photos", store, settings=SETTINGS, models=toys())
    assert report.parts_made == ({"pseudo_gt": 2})
    assert Store.open(store).digest() == digest and Store.open(store).verify() == []
