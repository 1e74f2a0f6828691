"""Documents that are read back: whatever a sealed one says, it is refused in words or is usable."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from test_training import KEPT, TOY, run
from torture import most, tell
from toy_corrector import run_cli, save_toy_corrector, toy_models
from toy_store import SPECS, precompute
from toys import ToyClip

from evenlight.cache import files, shards
from evenlight.cache.errors import StoreError
from evenlight.cache.place import place_of
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.judge import keep_judge, noted, store_judge, write_judge
from evenlight.pipeline.load import load_predictor
from evenlight.pipeline.models import priors_of
from evenlight.pipeline.store_info import cache_info, cache_verify
from evenlight.stages.corrector.checkpoint import load_tensors, save_tensors
from evenlight.stages.corrector.run import begin
from evenlight.stages.priors.judge import Judge

HOSTILE = (
    None, True, -1, 0, 1.5, 1e308, 10**30, 10**400, "", "x", "../../x", "\ud800", [], {}, [[]],
    [None], [-1, -1], {"a": {"b": []}},
)  # fmt: skip
GONE = object()


def places(value, at=()):
    """Every place in a JSON value; of lists the first two entries."""
    if at:
        yield at
    inside = value.items() if isinstance(value, dict) else ()
    inside = list(enumerate(value))[:2] if isinstance(value, list) else inside
    for key, entry in inside:
        yield from places(entry, (*at, key))


def changed(document, place, value):
    document = copy.deepcopy(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return document


def all_changes(document, usual=300):
    """At most so many, spread evenly: every place is hit, by a share of the values."""
    changes = [
        changed(document, place, value) for place in places(document) for value in (*HOSTILE, GONE)
    ]
    return changes[:: 1 + len(changes) // most(usual, len(changes))]


def refusals(changes, write, use) -> int:
    """How many were refused; use raises nothing but StoreError."""
    tell(len(changes))
    refused = 0
    for document in changes:
        write(document)
        try:
            use()
        except StoreError as error:
            assert "\n" not in str(error)
            refused += 1
    return refused


@pytest.fixture
def store(folder):
    precompute(folder / "s.zarr")
    settings = {"photo": {"size": 64}, "ladder": {"offsets": [-1.0, 0.0, 1.0]}}
    with Store.create_or_open(folder / "s.zarr") as opened:
        opened.write_index(dataclasses.replace(opened.index, settings=settings))
    return folder / "s.zarr"


def read_all(path: Path) -> None:
    opened = Store.open(path)
    opened.info(), opened.digest(), opened.slots("pseudo_gt"), opened.verify()
    config.of_store(path)
    cache_info(path)
    for unit in range(min(opened.index.num_units, 3)):
        if opened.record(unit) is None:
            raise StoreError("an incomplete unit")
        opened.read(unit, [spec.name for spec in SPECS])


@pytest.mark.parametrize("name", ["index.json", "units/000000.json"])
def test_any_index_and_any_record_is_refused_or_read_and_precompute_mends_it(
    name, store, monkeypatch
):
    named = "evenlight.pipeline.store_info.priors_named"
    monkeypatch.setattr(named, lambda settings, judge: priors_of(toy_models(settings), judge))
    path = store / "evenlight" / name
    whole = files.read_json(path)
    changes = all_changes(whole)
    refused = refusals(changes, lambda x: files.write_json(path, x), lambda: read_all(store))
    assert len(changes) > 100 and refused > 0.3 * len(changes)
    for document in changes[:: len(changes) // 40]:
        files.write_json(path, document)
        try:
            precompute(store)
        except StoreError:
            continue
        assert Store.open(store).record(0).complete
    with Store.create_or_open(store):
        pass


@pytest.mark.parametrize("name", ["photo", "strength"])
def test_any_document_of_an_array_is_refused_or_read_and_precompute_mends_it(name, store):
    digest = Store.open(store).digest()
    document = shards.read_document(place_of(store), name)
    about = shards.about(document)
    about.pop("sha256")
    rest = {key: value for key, value in document.items() if key != "attributes"}
    sealed = [shards._sealed(x, about) for x in all_changes(rest)]
    sealed += [shards._sealed(rest, x) for x in all_changes(about)]

    def write(document):
        (store / name / "zarr.json").write_text(json.dumps(document))

    def use():
        Store.open(store).read(0, [name])

    assert refusals(sealed, write, use) > 0.5 * len(sealed)
    for document in sealed[::40]:
        write(document)
        precompute(store)
        assert Store.open(store).digest() == digest


def test_any_judge_note_is_refused_seen_by_verify_and_repaired(store, monkeypatch, capsys):
    judge = Judge.shipped(ToyClip())
    with Store.create_or_open(store) as opened:
        write_judge(opened, judge, ToyClip(), tuned=True)
    path = store / "evenlight" / "judge.json"
    whole = files.read_json(path)
    few = dict(list(whole.items())[:3]) | {"clip": "c", "tuned": True}
    changes = [whole | x for x in all_changes(few)]
    changes += [{k: v for k, v in whole.items() if k != gone} for gone in whole]
    packed = whole["tensor prompts.text"]
    changes += [whole | {"tensor prompts.text": x} for x in all_changes(packed)]
    changes.append({"clip": whole["clip"], "tuned": True})  # no scorer at all
    refused = 0
    for document in changes:
        files.write_json(path, document)
        with Store.open(store) as opened:
            try:
                store_judge(opened, None)
                noted(opened)
            except StoreError as error:
                assert "judge" in str(error) and "--repair" in str(error)
                refused += 1
                assert [damage.note for damage in cache_verify(store)] == ["judge"]
    assert refused > 0.7 * len(changes)
    assert run_cli(monkeypatch, "cache", "verify", "-s", store) == 3
    assert run_cli(monkeypatch, "cache", "verify", "-s", store, "--repair") == 0
    assert cache_verify(store) == [] and "judge.json" not in capsys.readouterr().out


def test_a_judge_of_nan_is_refused(store):
    tensors = Judge.shipped(ToyClip()).tensors
    name = "photo.photo.seen.weight"
    judge = Judge({**tensors, name: tensors[name] * float("nan")})
    with Store.create_or_open(store) as opened:
        write_judge(opened, judge, ToyClip(), tuned=True)
        with pytest.raises(StoreError, match=r"judge of store .*NaN or infinity"):
            store_judge(opened, None)


@pytest.mark.parametrize("tuned", [False, True])
def test_a_judge_of_another_version_gives_way_unless_it_was_tuned(tuned, store):
    clip = ToyClip()
    with Store.create_or_open(store) as opened:
        write_judge(opened, Judge.shipped(clip), clip, tuned=tuned)
        note = opened.note("judge")
        assert note is not None
        former = {k: x for k, x in note.items() if "regions.photo" not in k}
        assert len(former) < len(note)
        opened.write_note("judge", former)
        with pytest.raises(StoreError, match=r"another version .*--repair"):
            store_judge(opened, None)
        if tuned:
            with pytest.raises(StoreError, match=r"another version .*--repair"):
                store_judge(opened, clip)
            return
        keep_judge(opened, store_judge(opened, clip), clip)
        assert store_judge(opened, None).fingerprint == Judge.shipped(clip).fingerprint


def test_any_document_of_a_corrector_is_refused_or_used(tmp_path, monkeypatch):
    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)
    folder = save_toy_corrector(tmp_path / "model")
    path = folder / "corrector.json"
    whole = files.read_json(path)
    small = {k: whole[k] for k in ("file",)} | {
        "info": {k: whole["info"][k] for k in ("priors", "network")}
        | {"settings": {k: whole["info"]["settings"][k] for k in ("photo", "ladder", "judge")}}
    }
    changes = all_changes(small)
    refused = refusals(changes, lambda x: files.write_json(path, x), lambda: load_predictor(folder))
    assert refused > 0.5 * len(changes)


@pytest.mark.parametrize("unfit", [{}, {"judge.prompts.text": torch.zeros(2, 3)}])
def test_a_corrector_without_a_usable_judge_is_refused(unfit, tmp_path, monkeypatch):
    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)
    folder = save_toy_corrector(tmp_path / "model")
    tensors, info = load_tensors(folder / "corrector")
    kept = {k: x for k, x in tensors.items() if unfit or not k.startswith("extra.")}
    save_tensors(folder / "corrector", kept | {f"extra.{k}": x for k, x in unfit.items()}, info)
    with pytest.raises(StoreError, match=r"judge of corrector .*train\.start="):
        load_predictor(folder)


def test_any_info_of_a_checkpoint_is_refused_or_resumed_from(tmp_path):
    out = tmp_path / "run"
    run(out)
    *older, newest = sorted((out / "checkpoints").iterdir())
    for folder in older:
        shutil.rmtree(folder)
    stem = newest / "state"
    whole = files.read_json(stem.with_suffix(".json"))
    info = {k: v for k, v in whole["info"].items() if k in ("progress", "step")}
    changes = [whole | {"info": whole["info"] | x} for x in all_changes(info, 150)]
    changes += [whole | {"file": x} for x in all_changes(whole["file"])]

    def use():
        lock = files.Lock(out / ".lock", "run")
        resumed = begin(6, TOY, lock, KEPT.info, True, torch.device("cpu"))
        resumed.calibration.finish()

    refused = refusals(changes, lambda x: files.write_json(stem.with_suffix(".json"), x), use)
    assert refused > 0.5 * len(changes)


@pytest.mark.parametrize("tensors", [{}, {"optimiser.x.y": torch.zeros(1)}])
def test_a_checkpoint_of_other_tensors_is_refused(tensors, tmp_path):
    run(tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir()) / "state"
    found, info = load_tensors(newest)
    save_tensors(newest, {**found, **tensors} if tensors else {}, info)
    with pytest.raises(StoreError, match=r"checkpoint 12 of .* does not fit"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("unit_size",), 0, r"index\.json is damaged: it: .*unit_size 0"),
        (("unit_size",), None, r"index\.json is damaged: unit_size: .*valid integer"),
        (("names",), {"a": 1}, r"index\.json is damaged: names: .*valid tuple"),
        (("names", 1), 5, r"index\.json is damaged: names\.1: .*valid string"),
        (("settings",), [], r"index\.json is damaged: settings: .*valid dictionary"),
        (("sources",), [3], r"index\.json is damaged: sources\.0: .*valid string"),
        (("names",), GONE, r"index\.json is damaged: names: .*required"),
    ],
)
def test_a_refusal_names_file_and_field(place, value, said, store):
    path = store / "evenlight" / "index.json"
    files.write_json(path, changed(files.read_json(path), place, value))
    with pytest.raises(StoreError, match=said):
        Store.open(store)


def test_half_a_surrogate_pair_where_a_word_is_due_is_damage(store):
    path = store / "evenlight/units/000000.json"
    files.write_json(path, changed(files.read_json(path), ("photos", 0, "status"), "\ud800"))
    opened = Store.open(store)
    assert opened.record(0) is None
    assert "holds text that is not Unicode" in opened.verify()[0].reason


def test_a_hostile_document_ends_a_command_with_exit_3(store, monkeypatch, capsys):
    path = store / "evenlight" / "index.json"
    files.write_json(path, files.read_json(path) | {"names": {"a": 1}})
    assert run_cli(monkeypatch, "cache", "info", "-s", store) == 3
    said = capsys.readouterr().err
    assert said.startswith("evenlight: store") and "Traceback" not in said
