"""Settings: nothing unknown passes, what is resolved reads back, every key is tagged."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenlight.cache.errors import UsageError
from evenlight.pipeline import config
from evenlight.stages.settings import AFFECTS, Settings


def test_resolved_settings_read_back_as_the_same(tmp_path):
    settings = config.build(overrides=["photo.size=256", 'clip.weights=C:\\a "b".pt'])
    path = tmp_path / "resolved.toml"
    path.write_text(config.to_toml(settings), encoding="utf-8")
    assert config.build(path) == settings
    assert config.build(base=config.to_dict(settings)) == settings


def test_every_setting_says_what_it_decides():
    for key in config.setting_types():
        assert config.affected_by(key) in AFFECTS


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("photo.sise=256", "photo.size"),
        ("photo.size=250", "multiple of 32"),
        ("photo.size=large", "must be int"),
        ("pseudo_gt.regional=1", "must be bool"),
        ("preset=papre", "unknown preset"),
        ("photo.size", "key=value"),
    ],
)
def test_a_wrong_setting_is_refused_in_words(override, words):
    with pytest.raises(UsageError, match=words):
        config.build(overrides=[override])


def test_preset_yields_to_explicit_settings():
    settings = config.build(overrides=["preset=paper", "pseudo_gt.regional=true"])
    assert settings.ladder.family == "gamma"
    assert settings.pseudo_gt.regional


@given(st.sampled_from(sorted(config.setting_types())))
def test_each_setting_belongs_to_exactly_one_part(key):
    holders = [part for part in AFFECTS if key in config.values_affecting(Settings(), part)]
    assert holders == [config.affected_by(key)]


def test_a_store_records_what_decides_it_and_not_how_it_was_trained_on():
    recorded = config.flatten(config.store_settings(Settings()))
    assert "photo.size" in recorded and "pseudo_gt.max_strength" in recorded
    assert not any(key.startswith(("train.", "network.", "losses.", "run.")) for key in recorded)


def test_settings_that_a_store_of_another_version_holds_are_named_and_left_out(caplog):
    recorded = {
        "pseudo_gt": {"blend": 0.2, "search": "crossing", "max_strength": 1.5},
        "ladder": {"family": "gamma"},
    }
    assert config.known(recorded) == {"pseudo_gt.max_strength": 1.5, "ladder.family": "gamma"}
    assert "pseudo_gt.blend" in caplog.text and "crossing" in caplog.text
