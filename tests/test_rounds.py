"""Rounds: a trained corrector's proposals are judged, recorded, never mixed, and can be undone."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from toy_corrector import run_cli, save_toy_corrector
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.errors import StoreError, UsageError
from evenlight.cache.store import Store
from evenlight.pipeline import config, precompute
from evenlight.pipeline.models import Models
from evenlight.pipeline.rounds import load_proposer, recorded_round
from evenlight.pipeline.train import train
from evenlight.stages.corrector.checkpoint import load_corrector, save_corrector
from evenlight.stages.corrector.network import Correction, Corrector
from evenlight.stages.pixels import luma
from evenlight.stages.priors import region_strengths, tone
from evenlight.stages.settings import PseudoGTSettings

# strengths by the toy scores alone, which leave something to propose, whatever meter ships
SMALL = ["photo.size=64", "run.unit_size=2", "ladder.regions=4", "pseudo_gt.meter_weight=0.0"]
SETTINGS = config.build(overrides=SMALL)
STEPS = np.array([-0.8, -0.4, 0.0, 0.4, 0.8])
STILL = PseudoGTSettings(blend=0.0)  # fresh regions stay at the photo's strength


# Choosing


def logits_that_want(wanted: list[float]) -> np.ndarray:
    """R,J,3 logits whose score is highest at the strength each region wants."""
    off = STEPS[None] - np.array(wanted)[:, None]
    return np.stack([-4 * off, 2 - 8 * np.abs(off), 4 * off], axis=2)


def chosen(wanted: list[float], proposed: list[float] | None, start: float = 0.0) -> np.ndarray:
    """Strengths of four bands of one photo, dark to bright."""
    bands = torch.linspace(0.15, 0.75, 4).repeat_interleave(8)
    rgb = bands.expand(1, 3, 16, 32)
    masks = [(torch.arange(32) // 8 == band).expand(16, 32) for band in range(4)]
    moves = None if proposed is None else np.array(proposed)
    return region_strengths.region_strengths(
        rgb, masks, logits_that_want(wanted), STEPS, start, "film", STILL, moves
    )


def test_a_proposal_that_scores_higher_is_taken():
    # centred afterwards: a quarter of the photo moves by 0.4, so all move back by 0.1
    moved = chosen([0.4, -0.1, -0.1, -0.1], [0.4, 0, 0, 0])
    assert moved == pytest.approx([0.3, -0.1, -0.1, -0.1])


@pytest.mark.parametrize("proposed", [-0.4, 0.004])
def test_one_that_scores_lower_or_hardly_higher_is_not(proposed):
    assert np.array_equal(chosen([0.4, -0.1, -0.1, -0.1], [proposed, 0, 0, 0]), np.zeros(4))


def test_one_beyond_what_was_embedded_cannot_be_judged_and_is_not():
    wanted = [-0.2, -0.2, -0.2, 0.8]
    assert chosen(wanted, [0, 0, 0, 0.8])[3] > 0.5
    assert np.array_equal(chosen(wanted, [0, 0, 0, 0.81]), np.zeros(4))


def test_at_most_half_of_the_regions_are_taken_those_with_the_largest_rise():
    proposed, logits = np.array([0.1, 0.4, 0.2, 0.3]), logits_that_want([0.4] * 4)
    taken = region_strengths.take_proposals(np.zeros(4), proposed, logits, STEPS)
    assert taken.tolist() == [0, 0.4, 0, 0.3]
    one = region_strengths.take_proposals(np.zeros(1), proposed[1:2], logits[:1], STEPS)
    assert one.tolist() == [0]


def test_a_set_of_proposals_that_would_score_lower_once_centred_is_not_taken():
    # the two bright bands gain a little each, the dark ones would lose more by the shift
    assert np.array_equal(chosen([0, 0, 0.4, 0.4], [0, 0, 0.05, 0.05]), np.zeros(4))


@given(
    st.lists(st.floats(-0.8, 0.8), min_size=4, max_size=4),
    st.lists(st.floats(-1.0, 1.0), min_size=4, max_size=4),
    st.floats(-0.5, 0.5),
)
@examples(max_examples=60, deadline=None)
def test_order_mean_strength_and_score_are_kept(wanted, proposed, start):
    fresh, moved = chosen(wanted, None, start), chosen(wanted, proposed, start)
    after = [
        float(luma(tone.apply("film", torch.full((1, 3, 1, 1), level), t)))
        for level, t in zip((0.15, 0.35, 0.55, 0.75), moved, strict=True)
    ]
    assert after == sorted(after)
    logits = logits_that_want(wanted)
    before, later = (region_strengths.scores_at(x, logits, STEPS) for x in (fresh, moved))
    rise = later - before
    assert rise.sum() >= 0
    assert abs(moved.mean() - start) < 0.35  # order pulls regions to the start after centring


@pytest.mark.parametrize("by_residual", [False, True])
def test_moves_are_what_the_output_of_the_corrector_amounts_to(by_residual, finished, corrector):
    with Store.open(finished) as store:
        proposer = load_proposer(corrector, store, SETTINGS)
    photo = np.full((48, 64, 3), 102, np.uint8)
    labels = np.ones((48, 64), np.uint8)
    labels[:, :16], labels[:8, 56:], labels[:4, :4] = 2, 3, 4
    photo[labels == 3] = 0  # no strength changes it
    strength = 0.2 * torch.ones(1, 3, 48, 64)
    strength[..., :16] = 0.5

    class Predicts(torch.nn.Linear):
        def forward(self, photo, proto, p3):
            assert (photo.shape[2:], proto.shape[2:], p3.shape[2:]) == ((48, 64), (12, 16), (6, 8))
            if by_residual:
                return Correction(0 * photo, tone.apply("film", photo, strength) - photo)
            return Correction(strength, 0 * photo)

    cached = {
        "region_labels": np.array([1, 2, 3, 0], np.uint8),  # 4 is too small to be embedded
        "proto": np.zeros((32, 16, 16), np.float16),
        "p3": np.zeros((4, 8, 8), np.float16),
    }
    moves = dataclasses.replace(proposer, network=Predicts(1, 1)).moves(photo, labels, cached)
    assert moves[1] - moves[0] == pytest.approx(0.3, abs=1e-4)
    assert moves[0] < 0 < moves[1] and moves[2] == 0


# The store


def toys(settings=None) -> Models:
    return Models(ToySegmenter(), ToyClip())


def save_proposer(folder, *, head: str = "tone", family: str = "film", seed: int = 0):
    """A tiny corrector whose map differs from region to region, with the priors of the toys."""
    _, info, extra = load_corrector(save_toy_corrector(folder))
    network = dataclasses.replace(SETTINGS.network, size="tiny", head=head, family=family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Corrector(network, ToySegmenter.p3_channels)
        torch.nn.init.normal_(made.head.conv.weight, std=0.3)
    return save_corrector(folder, made, info, extra)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, 5, gammas=(4, 6))  # all of them dark
    return folder


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "S"
    precompute.precompute(photos, store, settings=SETTINGS, models=toys())
    return store


@pytest.fixture(scope="module")
def corrector(tmp_path_factory):
    return save_proposer(tmp_path_factory.mktemp("run"))


@pytest.fixture
def store(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "S")


def digest(store) -> str:
    with Store.open(store) as opened:
        assert opened.verify() == []
        return opened.digest()


def regional(store) -> np.ndarray:
    with Store.open(store) as opened:
        return opened.rows("region_strengths", opened.slots("pseudo_gt"))


def test_a_round_is_made_once_and_undone_bit_for_bit(store, corrector, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("regenerate must not load or run FastSAM or CLIP")

    monkeypatch.setattr("evenlight.pipeline.models.load_segmenter", forbidden)
    monkeypatch.setattr("evenlight.pipeline.models.load_clip", forbidden)
    first, before = digest(store), regional(store)
    report = precompute.regenerate(store, settings=SETTINGS, model=corrector)
    assert report.parts_made == {"pseudo_gt": 3}
    second = digest(store)
    assert second != first and not np.array_equal(regional(store), before)
    assert recorded_round(store).run == str(corrector)
    assert precompute.regenerate(store, settings=SETTINGS, model=corrector).units_made == 0
    assert digest(store) == second
    assert precompute.regenerate(store, settings=SETTINGS).units_made == 3
    assert digest(store) == first
    assert recorded_round(store).proposer == ""


def test_another_corrector_makes_another_round(store, corrector, tmp_path):
    other = save_proposer(tmp_path / "other", seed=1)
    precompute.regenerate(store, settings=SETTINGS, model=corrector)
    assert precompute.regenerate(store, settings=SETTINGS, model=other).units_made == 3
    moved = shutil.copytree(other, tmp_path / "moved")
    assert precompute.regenerate(store, settings=SETTINGS, model=moved).units_made == 0


def test_precompute_keeps_a_complete_round(store, photos, corrector):
    precompute.regenerate(store, settings=SETTINGS, model=corrector)
    made = digest(store)
    report = precompute.precompute(photos, store, settings=SETTINGS, models=toys())
    assert report.units_made == 0 and digest(store) == made


def test_a_new_photo_takes_all_pseudo_gt_back_to_round_one_and_says_so(
    store, photos, corrector, tmp_path, caplog
):
    precompute.regenerate(store, settings=SETTINGS, model=corrector)
    more = shutil.copytree(photos, tmp_path / "more")
    shutil.copy(more / "photo_000.png", more / "photo_new.png")
    with caplog.at_level(logging.WARNING):
        report = precompute.precompute(more, store, settings=SETTINGS, models=toys())
    assert report.parts_made == {"photo": 1, "regions": 1, "embeddings": 1, "pseudo_gt": 3}
    assert f"'evenlight regenerate -s {store} -m {corrector}' makes the round" in caplog.text
    precompute.precompute(more, tmp_path / "afresh", settings=SETTINGS, models=toys())
    assert digest(store) == digest(tmp_path / "afresh")


def test_a_round_stopped_half_way_is_stale_until_the_same_command_ends_it(
    store, corrector, tmp_path, monkeypatch
):
    whole = shutil.copytree(store, tmp_path / "whole")
    precompute.regenerate(whole, settings=SETTINGS, model=corrector)

    def stop(_, done, __):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        precompute.regenerate(store, settings=SETTINGS, model=corrector, on_progress=stop)
    with pytest.raises(StoreError, match=f"stale.*regenerate -s {store} -m {corrector}'"):
        train(store, tmp_path / "run", settings=SETTINGS, models=toys())
    assert precompute.regenerate(store, settings=SETTINGS, model=corrector).units_made == 2
    assert digest(store) == digest(whole)


def test_a_damaged_record_of_the_round_is_mended_by_regenerate(store, corrector):
    precompute.regenerate(store, settings=SETTINGS, model=corrector)
    made = digest(store)
    record = store / "evenlight" / "round.json"
    record.write_text(record.read_text().replace("a", "b"))
    with pytest.raises(StoreError, match=r"round\.json is damaged.*'evenlight regenerate"):
        recorded_round(store)
    precompute.regenerate(store, settings=SETTINGS, model=corrector)
    assert digest(store) == made and recorded_round(store).proposer


def test_training_on_a_round_records_the_proposer(store, corrector, tmp_path):
    tiny = ["train.steps=2", "train.size=64", "train.crop=64", "train.batch=2", "network.size=tiny"]
    settings = config.build(overrides=[*SMALL, *tiny, "train.calibrate=[0,1]"])
    found = {}
    for name, model in (("round", corrector), ("one", None)):
        precompute.regenerate(store, settings=settings, model=model)
        train(store, tmp_path / name, settings=settings, models=toys())
        found[name] = load_corrector(tmp_path / name)[1].get("proposer")
    assert found == {"round": recorded_of(store, corrector), "one": None}


def recorded_of(store, corrector) -> str:
    with Store.open(store) as opened:
        return load_proposer(corrector, opened, SETTINGS).fingerprint


@pytest.mark.parametrize(
    ("made", "overrides", "said"),
    [
        ({"head": "residual"}, [], "residual head.*network.head=tone"),
        ({"family": "ps"}, [], "family ps.*film"),
        ({}, ["pseudo_gt.regional=false"], "regional is false"),
    ],
)
def test_a_corrector_that_has_nothing_to_propose_is_refused(made, overrides, said, store, tmp_path):
    before, model = digest(store), save_proposer(tmp_path / "run", **made)
    settings = config.build(overrides=[*SMALL, *overrides])
    with pytest.raises(UsageError, match=said):
        precompute.regenerate(store, settings=settings, model=model)
    assert digest(store) == before and recorded_round(store).proposer == ""


def test_a_corrector_of_another_segmenter_is_refused(store, tmp_path):
    with pytest.raises(StoreError, match="not made with segmenter"):
        precompute.regenerate(
            store, settings=SETTINGS, model=save_toy_corrector(tmp_path / "run", segmenter=1)
        )


def test_the_command_line_makes_shows_and_refuses_rounds(
    store, corrector, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("evenlight.pipeline.store_info.load_models", toys)
    residual = save_proposer(tmp_path / "residual", head="residual")
    assert run_cli(monkeypatch, "regenerate", "-s", store, "-m", residual) == 2
    assert run_cli(monkeypatch, "regenerate", "-s", store, "-m", tmp_path / "none") == 3
    assert run_cli(monkeypatch, "regenerate", "-s", store, "-m", corrector) == 0
    capsys.readouterr()
    assert run_cli(monkeypatch, "cache", "info", "-s", store, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["round"] == dataclasses.asdict(recorded_round(store)) and info["round"]["proposer"]
    assert info["stale"] == {}
    assert run_cli(monkeypatch, "regenerate", "--help") == 0
    assert "-m" in capsys.readouterr().out
