"""`cache info` for people: a line per part, totals, what is stale or failed and why."""

import json

import pytest
from toy_corrector import run_cli
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.errors import EnvironmentLacks
from evenlight.cache.store import Store
from evenlight.pipeline.models import Models, priors_of
from evenlight.pipeline.precompute import precompute
from evenlight.pipeline.store_info import human_size

SMALL = {"photo.size": 64, "run.unit_size": 2, "ladder.regions": 3}
PARTS = ["photo", "regions", "embeddings", "pseudo_gt"]
NAMED = "evenlight.pipeline.store_info.priors_named"


@pytest.fixture
def store(tmp_path, monkeypatch):
    models = Models(ToySegmenter(), ToyClip())
    monkeypatch.setattr(NAMED, lambda settings, judge: priors_of(models, judge))
    write_photos(tmp_path / "photos", 5)
    (tmp_path / "photos/page.jpg").write_text("<html>")
    precompute(tmp_path / "photos", tmp_path / "S", settings=SMALL, models=models)
    return tmp_path / "S"


def info(store, monkeypatch, capsys, *changes):
    """The lines of the table, split into words, and the lines below it."""
    given = [part for text in changes for part in ("--set", text)]
    assert run_cli(monkeypatch, "cache", "info", "-s", store, *given) == 0
    lines = capsys.readouterr().out.splitlines()
    return [line.split() for line in lines[:6]], lines[6:]


def test_a_line_per_part_and_totals(store, monkeypatch, capsys):
    table, below = info(store, monkeypatch, capsys)
    assert [row[0] for row in table] == ["part", *PARTS, "total"]
    assert [row[2:] for row in table[1:]] == [["3/3", "0"]] * 5
    assert run_cli(monkeypatch, "cache", "info", "-s", store, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    sizes = [document["parts"][part]["bytes"] for part in PARTS]
    assert [row[1] for row in table[1:]] == [human_size(x) for x in (*sizes, sum(sizes))]
    photos, judge, failed = below
    assert photos == f"photos: 5 ok, 1 failed, 0 waiting; from {store.parent / 'photos'}"
    assert judge == "judge: the one that ships" and failed.startswith("failed: page.jpg: ")
    assert document["parts"]["photo"]["fingerprints"]


def test_what_is_stale_or_not_made_stands_in_the_line_of_its_part(store, monkeypatch, capsys):
    with Store.create_or_open(store) as opened:
        opened.drop(1, "pseudo_gt")
    table, below = info(store, monkeypatch, capsys, "regions.iou=0.9")
    assert [row[2:] for row in table[1:]] == [
        ["3/3", "0"], ["3/3", "3"], ["3/3", "3"], ["2/3", "2"], ["2/3", "3"],
    ]  # fmt: skip
    assert below[2] == "stale: 3 units, regions: settings or weights changed"


def test_where_weights_are_missing_what_is_stale_is_unknown_and_why(store, monkeypatch, capsys):
    def lacking(*_):
        raise EnvironmentLacks("no weights at x.pt")

    monkeypatch.setattr(NAMED, lacking)
    table, below = info(store, monkeypatch, capsys)
    assert {row[3] for row in table[1:]} == {"?"}
    assert below[2] == "stale: unknown: no weights at x.pt"


def test_an_empty_store_is_told_of_too(tmp_path, monkeypatch, capsys):
    with Store.create_or_open(tmp_path / "S", unit_size=2) as opened:
        opened.write_index(opened.index)
    table, below = info(tmp_path / "S", monkeypatch, capsys)
    assert [row[1:] for row in table[1:]] == [["0B", "0/0", "0"]] * 5
    assert below[0] == "photos: 0 ok, 0 failed, 0 waiting"


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0B"), (999, "999B"), (1000, "1.0K"), (774_900_000, "739M"), (10 * 2**30, "10G"),
     (1020 * 2**30, "1.0T"), (5000 * 2**40, "5000T")],
)  # fmt: skip
def test_sizes_read_as_df_writes_them(num_bytes, words):
    assert human_size(num_bytes) == words
