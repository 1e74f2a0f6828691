"""Adapting the judge to a folder: from cached tensors, checked on photos held out."""

import dataclasses

import numpy as np
import pytest
import torch

from evenlight.pipeline.demo import PHOTOS, installed_photo
from evenlight.pipeline.models import load_models
from evenlight.stages.photos.canvas import working
from evenlight.stages.pixels import to_bytes, to_float
from evenlight.stages.priors import judge_tuning, opinion, tone
from evenlight.stages.priors.judge import Judge
from evenlight.stages.priors.judge_tuning import Cached, tune
from evenlight.stages.priors.ladder import embed_ladder
from evenlight.stages.settings import JudgeSettings, LadderSettings, Settings

OFFSETS = LadderSettings().offsets
SETTINGS = JudgeSettings(steps=60)


@pytest.fixture(scope="module")
def clip():
    return load_models(Settings()).clip


@pytest.fixture(scope="module")
def cached(clip) -> Cached:
    """Good photos and crops of them, and some of them spoilt."""
    good = [
        working(installed_photo(folder, name), 192) for folder, *names in PHOTOS for name in names
    ]
    photos = [crop for x in good for crop in (x, x[:96], x[-96:], x[:, :96])]
    for x in good:
        photos.append(to_bytes(tone.apply("ev", to_float(x), -0.9)).numpy())
    rows = [embed_ladder(x, clip, LadderSettings(), OFFSETS) for x in photos]
    return Cached(
        photo=np.stack([row["clip_photo"] for row in rows]),
        ladder=np.stack([row["clip_ladder"] for row in rows]),
        tones=np.stack([row["tones"] for row in rows]),
        rule=np.stack([row["rule_strength"] for row in rows]),
        offsets=OFFSETS,
    )


def test_tuning_learns_the_ladders_of_good_photos(clip, cached):
    result = tune(Judge.shipped(clip), cached, SETTINGS)
    assert result.report["teachers"] >= judge_tuning.FEWEST
    assert result.report["error"] < result.report["error_before"]
    assert result.accepted == ("reason" not in result.report)


def test_the_same_seed_gives_the_same_judge(clip, cached):
    one, other = (tune(Judge.shipped(clip), cached, SETTINGS).judge for _ in range(2))
    assert one.fingerprint == other.fingerprint != Judge.shipped(clip).fingerprint


def test_a_judge_that_is_no_better_is_not_accepted(clip, cached):
    before = Judge.shipped(clip)
    still = dataclasses.replace(SETTINGS, steps=1, learning_rate=1e-9)
    result = tune(before, cached, still)
    assert not result.accepted
    assert "that gains too little" in result.report["reason"]


def test_answers_about_regions_and_words_stay(clip, cached):
    before = Judge.shipped(clip)
    after = tune(before, cached, SETTINGS).judge
    for name, tensor in before.tensors.items():
        same = torch.equal(tensor, after.tensors[name])
        assert same or name.startswith("photo."), name


def test_another_clip_gets_heads_of_its_own(cached):
    """Untrained ones, for embeddings of another dimension: they must beat tones alone."""

    class Other:
        fingerprint, dim, size, logit_scale = "other", 7, 64, 10.0

        @staticmethod
        def embed_text(texts):
            return torch.nn.functional.normalize(torch.ones(len(texts), 7), dim=1)

    rng = np.random.default_rng(0)
    mix = rng.standard_normal((cached.photo.shape[1], 7)).astype(np.float32)
    theirs = dataclasses.replace(
        cached, photo=cached.photo @ mix, ladder=cached.ladder.astype(np.float32) @ mix
    )
    result = tune(Judge.shipped(Other()), theirs, SETTINGS)
    assert result.judge.dim == 7
    assert {"error", "error_before", "disagreement", "spared"} <= result.report.keys()


def test_too_few_good_photos_teach_nothing(clip, cached):
    few = {name: getattr(cached, name)[-3:] for name in ("photo", "ladder", "tones", "rule")}
    result = tune(Judge.shipped(clip), Cached(**few, offsets=OFFSETS), SETTINGS)
    assert not result.accepted and "surely good" in result.report["reason"]


def test_a_rung_taken_for_a_photo_is_asked_about_itself(cached):
    """Its rungs, its rule and what is given are told from where it stands."""
    photos = judge_tuning._Photos(cached)
    rung = 1 + OFFSETS.index(0.4)
    seen = photos.seen(torch.tensor([2]), torch.tensor([rung]))
    assert seen.given[0, 0] == 0 and seen.rule[0] == pytest.approx(-0.4, abs=1e-5)
    assert torch.equal(seen.embeddings[0, 0], photos.embeddings[2, rung])
    expected = [OFFSETS[k] - 0.4 for k in opinion.asked(OFFSETS)]
    assert seen.given[0, 1:].tolist() == pytest.approx(expected, abs=1e-5)
