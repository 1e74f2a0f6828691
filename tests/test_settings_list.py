"""`evenlight settings`: every setting in a line, from what it says of itself, and what differs."""

import json
import tomllib

import pytest
from toy_corrector import run_cli
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.pipeline import config
from evenlight.pipeline.models import Models
from evenlight.pipeline.precompute import precompute
from evenlight.pipeline.settings_list import settings
from evenlight.stages.settings import Settings


def listed(monkeypatch, capsys, *arguments):
    assert run_cli(monkeypatch, "settings", *arguments) == 0
    return capsys.readouterr()


def test_every_setting_has_one_line_with_all_that_it_says_of_itself(monkeypatch, capsys):
    _, *lines = listed(monkeypatch, capsys).out.splitlines()
    assert [line.split()[0] for line in lines] == list(config.setting_types())
    for line, row in zip(lines, settings(), strict=True):
        said = (row.setting, row.default, row.allowed, row.stale, row.meaning)
        assert all(said) and all(word in line for word in said)
    photo, search = (next(x for x in lines if x.startswith(k)) for k in ("photo.size", "pseudo"))
    assert "a multiple of 32 from 64 to 4,096" in photo and "photo and all after" in photo
    assert "true or false" in search


def test_defaults_are_written_as_set_takes_them():
    given = [f"{row.setting}={row.default}" for row in settings()]
    assert config.build(overrides=given) == Settings()


def test_json_holds_the_same(monkeypatch, capsys):
    rows = json.loads(listed(monkeypatch, capsys, "--json").out)
    assert [row["setting"] for row in rows] == list(config.setting_types())
    (steps,) = (row for row in rows if row["setting"] == "train.steps")
    assert (steps["default"], steps["allowed"]) == ("1000", "1 to 100,000,000")


@pytest.mark.parametrize("kind", ["store", "run"])
def test_a_difference_shows_what_a_store_or_a_run_was_made_with(
    kind, tmp_path, monkeypatch, capsys
):
    changed = {"photo.size": 96, "ladder.regions": 3, "pseudo_gt.max_strength": 1.5}
    if kind == "store":
        write_photos(tmp_path / "photos", 2)
        models = Models(ToySegmenter(), ToyClip())
        precompute(tmp_path / "photos", tmp_path / "there", settings=changed, models=models)
    else:
        (tmp_path / "there").mkdir()
        text = config.to_toml(config.resolve(changed))
        (tmp_path / "there/settings.toml").write_text(text, encoding="utf-8")
    _, *lines = listed(monkeypatch, capsys, "--diff", tmp_path / "there").out.splitlines()
    assert [line.split()[0] for line in lines] == list(changed)
    rows = json.loads(listed(monkeypatch, capsys, "--diff", tmp_path / "there", "--json").out)
    assert {row["setting"]: tomllib.loads("x=" + row["value"])["x"] for row in rows} == changed


def test_what_a_run_holds_moves_no_terminal(tmp_path, monkeypatch, capsys):
    text = '[clip]\nweights = "\\u001b[2J\\n.pt"\n'
    (tmp_path / "settings.toml").write_text(text, encoding="utf-8")
    said = listed(monkeypatch, capsys, "--diff", tmp_path).out
    assert "\x1b" not in said and len(said.splitlines()) == 2 and "[2J" in said


def test_what_differs_in_nothing_is_told_and_what_holds_no_settings_is_refused(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "settings.toml").write_text(config.to_toml(Settings()), encoding="utf-8")
    said = listed(monkeypatch, capsys, "--diff", tmp_path).out
    assert said == "every setting is the default\n"
    assert run_cli(monkeypatch, "settings", "--diff", tmp_path / "none") == 2
    assert "is no store and no training run" in capsys.readouterr().err
