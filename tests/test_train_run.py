"""From a store to training tensors: nothing stale, and the same inputs as when correcting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.errors import EnvironmentLacks, StoreError
from evenlight.cache.files import Lock
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.judge import store_judge
from evenlight.pipeline.models import Models
from evenlight.pipeline.precompute import precompute
from evenlight.pipeline.train import refuse_stale, train
from evenlight.pipeline.training_photos import load_data
from evenlight.stages.corrector.inputs import at_working_size, rule_corrected
from evenlight.stages.photos.canvas import working
from evenlight.stages.photos.decode import decode

SMALL = ["photo.size=96", "run.unit_size=2", "ladder.regions=3"]
SETTINGS = config.build(overrides=SMALL)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_photos(folder / "photos", 3, size=120)
    models = Models(ToySegmenter(), ToyClip())
    precompute(folder / "photos", folder / "S", settings=SETTINGS, models=models)
    with Store.open(folder / "S") as opened:
        yield opened


def judge(store) -> str:
    return store_judge(store, None).fingerprint


def test_a_fresh_store_is_accepted(store):
    refuse_stale(store, SETTINGS, Models(ToySegmenter(), ToyClip()), judge(store))


@pytest.mark.parametrize(
    ("overrides", "models", "said"),
    [
        (
            ["regions.iou=0.7"],
            Models(ToySegmenter(), ToyClip()),
            r"\(regions: settings or weights changed; regions\.iou 0\.6 -> 0\.7\).*precompute",
        ),
        ([], Models(ToySegmenter(1), ToyClip()), r"regions.*precompute"),
        ([], Models(ToySegmenter(), ToyClip(1)), r"embeddings.*precompute"),
        (
            ["pseudo_gt.max_strength=1.5"],
            Models(ToySegmenter(), ToyClip()),
            r"pseudo_gt.*; pseudo_gt\.max_strength 2\.2 -> 1\.5\).*regenerate",
        ),
    ],
)
def test_a_stale_store_is_refused_with_the_cure(store, overrides, models, said):
    changed = config.build(overrides=[*SMALL, *overrides])
    with pytest.raises(StoreError, match=said):
        refuse_stale(store, changed, models, judge(store))


def test_two_trainings_of_one_folder_are_refused_before_anything_is_read_or_written(
    store, tmp_path, monkeypatch
):
    monkeypatch.setattr("evenlight.pipeline.train.load_photos", None)
    models = Models(ToySegmenter(), ToyClip())
    with Lock(tmp_path / ".lock", "run"), pytest.raises(StoreError, match="is in use by"):
        train(store.path, tmp_path, settings=SETTINGS, models=models)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_who_trains_on_need_not_say_again_what_a_run_was_told(store, tmp_path):
    models = Models(ToySegmenter(), ToyClip())
    told = {"network.size": "tiny", "train.size": 32, "train.crop": 32, "train.steps": 1}
    train(store.path, tmp_path, settings=told, models=models)
    assert train(store.path, tmp_path, settings={"train.steps": 2}, models=models).steps == 2
    with pytest.raises(StoreError, match=r"train\.bad 1 -> 2"):
        train(store.path, tmp_path, settings={"train.bad": 2}, models=models)


def test_what_a_killed_training_left_goes_with_the_next(store, tmp_path, monkeypatch):
    (tmp_path / ".corrector.json.00.evenlight-tmp").touch()
    monkeypatch.setattr("evenlight.pipeline.train.run_training", lambda *_, **__: None)
    train(store.path, tmp_path, settings=SETTINGS, models=Models(ToySegmenter(), ToyClip()))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_training_sees_what_correcting_sees(store):
    """Cached features, brought to the working size, equal those made afresh from the file."""
    data = load_data(store, 64, "cpu")
    name = data.names[1]
    file = next(p for p in (Path(store.path).parent / "photos").iterdir() if p.name == name)
    photo = working(decode(file.read_bytes(), name).pixels, SETTINGS.photo.size)
    fresh = ToySegmenter().segment(rule_corrected(photo))
    features = (torch.from_numpy(x)[None].float() for x in (fresh.proto, fresh.p3))
    rgb, proto, p3 = at_working_size(photo, *features, 64)
    height, width = data.extent[1].tolist()
    assert rgb.shape[2:] == (height, width)
    assert torch.equal(data.photo[1, :, :height, :width], (rgb[0] * 255).round().byte())
    cached = data.proto[1, :, : height // 4, : width // 4].float()
    assert torch.allclose(cached, proto[0], atol=1e-3)
    cached = data.p3[1, :, : height // 8, : width // 8].float()
    assert torch.allclose(cached, p3[0], atol=1e-3)


def test_beyond_its_extent_a_photo_repeats_its_edge(store):
    data = load_data(store, 64, "cpu")
    height, width = data.extent[0].tolist()
    assert (height, width) == (64, 48)
    edge = data.photo[0, :, :, width - 1 : width]
    assert torch.equal(data.photo[0, :, :, width:], edge.expand(-1, -1, 64 - width))


def test_the_paper_preset_makes_one_gamma_per_photo(store, tmp_path):
    settings = config.build(overrides=[*SMALL, "preset=paper"])
    models = Models(ToySegmenter(), ToyClip())
    precompute(Path(store.path).parent / "photos", tmp_path / "P", settings=settings, models=models)
    with Store.open(tmp_path / "P") as paper:
        rows = paper.read(0, ["t_map", "photo", "pseudo_gt", "strength", "extent"])
        height, width = rows["extent"][0]
        assert np.ptp(rows["t_map"][0, : height // 4, : width // 4]) == 0
        value = rows["photo"][0, :height, :width] / 255
        wanted = value ** np.exp(-float(rows["t_map"][0, 0, 0])) * 255
        made = rows["pseudo_gt"][0, :height, :width]
        assert np.abs(made - wanted).max() < 1


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A store of twelve photos."""
    folder = tmp_path_factory.mktemp("larger")
    write_photos(folder / "photos", 12, size=64, gammas=(0.7, 1.4))
    models = Models(ToySegmenter(), ToyClip())
    precompute(folder / "photos", folder / "S", settings=SETTINGS, models=models)
    return folder / "S"


STEPS = {
    "network.size": "tiny", "train.size": 32, "train.crop": 32, "train.steps": 20,
    "train.good": 0, "train.scenes": 0, "train.bad": 1,
    "train.log_every": 1, "train.validate_every": 10,
}  # fmt: skip
EIGHT_PHOTOS = 8.5 * 11.25 * 32 * 32 / 1e9  # GB, at the working size of 32


def test_photos_that_memory_does_not_hold_give_the_same_training(larger, tmp_path, caplog):
    models = Models(ToySegmenter(), ToyClip())
    ends = []
    for name, memory_gb in (("whole", 0.0), ("ahead", EIGHT_PHOTOS)):
        with caplog.at_level("INFO", logger="evenlight"):
            told = {**STEPS, "run.memory_gb": memory_gb}
            result = train(larger, tmp_path / name, settings=told, models=models)
        assert (
            ("for 8 of 12: they are read ahead" in caplog.text)
            == (result.waited_per_step > 0)
            == (name == "ahead")
        )
        lines = [json.loads(x) for x in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        times = [(line.pop("seconds", 0), line.pop("waited", 0)) for line in lines]
        assert all(seconds >= waited for seconds, waited in times)
        assert (sum(waited for _, waited in times) > 0) == (name == "ahead")
        ends.append((lines, (tmp_path / name / "corrector.safetensors").read_bytes()))
    assert ends[0] == ends[1]


def test_memory_without_room_for_three_steps_is_refused_before_anything_is_read(larger, tmp_path):
    told = {**STEPS, "run.memory_gb": EIGHT_PHOTOS * 5 / 8}
    with pytest.raises(
        EnvironmentLacks, match=r"three steps take 0\.00 GB, .*raise run\.memory_gb"
    ):
        train(larger, tmp_path, settings=told, models=Models(ToySegmenter(), ToyClip()))
