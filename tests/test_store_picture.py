"""`cache show`: the priors of one photo in one picture, without a model."""

import json

import numpy as np
import pytest
from PIL import Image
from toy_corrector import run_cli
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.store import Store
from evenlight.pipeline.models import Models
from evenlight.pipeline.precompute import precompute
from evenlight.pipeline.store_picture import GAP, SIDE, TEXT
from evenlight.stages.priors import tone

SMALL = {"photo.size": 544, "run.unit_size": 2, "ladder.regions": 3}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_photos(folder / "photos", 1, size=544)
    models = Models(ToySegmenter(), ToyClip())
    precompute(folder / "photos", folder / "S", settings=SMALL, models=models)
    return folder / "S"


def test_the_picture_holds_photo_rule_and_pseudo_gt_as_they_are_stored(
    store, tmp_path, monkeypatch, capsys
):
    out, arguments = tmp_path / "x.png", ("cache", "show", "photo_000.png", "-s", store)
    assert run_cli(monkeypatch, *arguments, "-o", out, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"picture": str(out)} and said.err == f"look at {out}\n"
    with Store.open(store) as opened:
        rows = opened.read(0, ["photo", "pseudo_gt", "extent", "rule_strength"])
    height, width = rows["extent"][0].tolist()
    photo, pseudo_gt = (rows[name][0, :height, :width] for name in ("photo", "pseudo_gt"))
    shown = np.asarray(Image.open(out))
    assert shown.shape[1] == 3 * (max(width, SIDE) + GAP) + GAP
    rule = tone.on_bytes("film", photo, float(rows["rule_strength"][0]))
    for place, wanted in enumerate((photo, rule, pseudo_gt)):
        left, top = GAP + place * (max(width, SIDE) + GAP), GAP + TEXT
        found = Image.fromarray(shown[top:, left:]).crop((0, 0, max(width, SIDE), height))
        assert np.array_equal(np.asarray(found.crop((0, 0, width, height))), wanted)


def test_every_row_has_words_and_pictures(store, tmp_path, monkeypatch):
    out = tmp_path / "x.png"
    assert run_cli(monkeypatch, "cache", "show", "photo_000.png", "-s", store, "-o", out) == 0
    shown = np.asarray(Image.open(out).convert("L"))
    inked = (shown < 255).any(1)
    assert inked.mean() > 0.9 and (shown == 0).any()


@pytest.mark.parametrize(
    ("name", "said"),
    [("photo_00.png", "did you mean photo_000.png?"), ("zzz", "holds no pseudo-GT of a photo")],
)
def test_a_photo_that_is_not_there_is_refused_with_the_nearest(
    name, said, store, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "x.png"
    assert run_cli(monkeypatch, "cache", "show", name, "-s", store, "-o", out) == 2
    assert said in capsys.readouterr().err and not out.exists()
