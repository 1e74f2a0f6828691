"""The functions of the package behave as the commands: settings, kinds of paths."""

import logging
from pathlib import Path

import pytest
from toys import ToyClip, ToySegmenter, write_photos

import evenlight
from evenlight.cache.errors import StoreError, UsageError
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.models import Models, priors_of
from evenlight.pipeline.store_info import cache_info
from evenlight.stages.settings import Settings

SMALL = {"photo.size": 64, "run.unit_size": 2, "ladder.regions": 3}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    models = Models(ToySegmenter(), ToyClip())
    monkeypatch.setattr("evenlight.pipeline.precompute.load_models", lambda settings: models)
    named = "evenlight.pipeline.store_info.priors_named"
    monkeypatch.setattr(named, lambda settings, judge: priors_of(models, judge))


@pytest.fixture
def store(tmp_path):
    write_photos(tmp_path / "photos", 3)
    evenlight.precompute(str(tmp_path / "photos"), str(tmp_path / "S"), settings=SMALL)
    return str(tmp_path / "S")


def recorded(store: str) -> Settings:
    with Store.open(store) as opened:
        return config.resolve(None, opened.index.settings)


def test_what_is_not_named_stays_as_the_store_was_made(store, tmp_path):
    assert recorded(store).photo.size == 64
    assert evenlight.precompute(tmp_path / "photos", store).units_made == 0
    changed = evenlight.regenerate(store, settings={"pseudo_gt": {"max_strength": 0.5}})
    assert changed.parts_made == {"pseudo_gt": 2}
    assert evenlight.regenerate(store).units_made == 0
    now = recorded(store)
    assert (now.pseudo_gt.max_strength, now.photo.size, now.ladder.regions) == (0.5, 64, 3)
    assert cache_info(store)["stale"] == {}
    assert set(cache_info(store, settings={"regions.iou": 0.9})["stale"]) == {"0", "1"}


def test_complete_settings_are_taken_as_they_are(store):
    with pytest.raises(
        StoreError, match=r"other settings \(ladder\.regions 3 -> 16, photo\.size 64 -> 512"
    ):
        evenlight.regenerate(store, settings=Settings())


def test_unknown_settings_and_presets_are_told_in_words(store):
    with pytest.raises(UsageError, match=r"did you mean pseudo_gt\.regional"):
        evenlight.regenerate(store, settings={"pseudo_gt.reginal": True})
    assert config.resolve({"preset": "paper"}).network.head == "residual"
    assert config.resolve({"preset": "paper", "network.head": "tone"}).network.head == "tone"


def test_a_store_that_lost_its_index_is_mended_with_the_defaults_and_a_warning(
    store, tmp_path, caplog
):
    path = Path(store, "evenlight", "index.json")
    path.write_text("{}")
    for function in (evenlight.train, evenlight.tune_clip, evenlight.regenerate):
        arguments = (store, tmp_path / "run") if function is evenlight.train else (store,)
        with pytest.raises(StoreError, match="evenlight precompute"):
            function(*arguments)
    assert not (tmp_path / "run").exists()
    with caplog.at_level(logging.WARNING):
        evenlight.precompute(tmp_path / "photos", store, settings=SMALL)
    assert "its settings are unknown: taking the defaults" in caplog.text
    assert recorded(store).photo.size == 64
