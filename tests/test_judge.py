"""The judge: what it reads, how it decides, and what it says of pictures everybody agrees on."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyClip, peak

from evenlight.cache.errors import UsageError
from evenlight.pipeline.demo import installed_photo
from evenlight.pipeline.models import load_models
from evenlight.stages.photos.canvas import working
from evenlight.stages.pixels import to_bytes, to_float
from evenlight.stages.priors import judge, tone
from evenlight.stages.priors.judge import STRENGTHS, Judge
from evenlight.stages.priors.ladder import embed_ladder, embed_photo
from evenlight.stages.priors.opinion import (
    MOST_DARKENING,
    Opinion,
    decide,
    in_view_of_regions,
    is_beyond_doubt,
    regional_share,
    regions_read,
    seconded,
)
from evenlight.stages.priors.tones import PERCENTILES, tones
from evenlight.stages.settings import LadderSettings, PseudoGTSettings, Settings

OFFSETS = LadderSettings().offsets


# What it reads


def test_tones_are_the_quantiles_of_the_photo():
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 8, 0).repeat(3, 2)
    found = tones(ramp)[: len(PERCENTILES)]
    assert np.abs(found - PERCENTILES / 100).max() < 0.01


def test_an_answer_at_a_rung_speaks_of_the_whole_strength():
    missing = -0.5 * ((STRENGTHS - 0.5) / 0.1)[None] ** 2
    whole = judge.shifted(missing, torch.tensor([0.7]))
    assert float(STRENGTHS[whole.argmax()]) == pytest.approx(1.2, abs=0.01)
    assert torch.allclose(judge.shifted(missing, torch.tensor([0.0])), missing, rtol=1e-3)


def test_any_clip_has_a_judge_which_reads_tones_until_it_is_tuned():
    assert Judge.shipped(ToyClip()).dim == 0
    assert Judge.shipped(load_models(Settings()).clip).dim > 0


def test_the_judge_reads_film_ladders_alone():
    with pytest.raises(UsageError, match="film"):
        Settings(ladder=LadderSettings(family="gamma"))
    Settings(
        ladder=LadderSettings(family="gamma"), pseudo_gt=PseudoGTSettings(search="grid")
    )  # preset paper


def test_regions_are_read_with_the_rest_of_the_photo_as_one_more():
    photo = np.tile(np.linspace(10, 200, 128).astype(np.uint8)[None, :, None], (96, 1, 3))
    labels = np.repeat([[1, 2, 0, 0]], 96, 0).repeat(32, 1).astype(np.uint8)
    cached = embed_photo(photo, labels, ToyClip(), LadderSettings())
    embeddings, areas, given = regions_read(cached, 0.8)
    assert areas == pytest.approx([0.25, 0.25, 0.5])
    means = [
        photo[:, columns].mean() / 255 for columns in (slice(32), slice(32, 64), slice(64, 128))
    ]
    assert embeddings[:, -1] == pytest.approx(means, abs=0.02)
    rule = float(cached["rule_strength"])
    assert given == pytest.approx([rule, 0.8 - rule])


@pytest.fixture(scope="module")
def region_head():
    """An untrained one, and what it reads of five regions of a photo."""
    generator = torch.Generator().manual_seed(0)
    areas = torch.tensor([0.3, 0.1, 0.2, 0.25, 0.15])
    read = torch.rand(5, 8, generator=generator), areas, torch.tensor([0.4, 0.1])
    torch.manual_seed(0)
    return judge.RegionHead(8).eval(), read


@torch.no_grad()
def test_regions_are_judged_beside_each_other(region_head):
    head, (embeddings, areas, given) = region_head
    answers, photo = head(embeddings, areas, given)
    order = torch.tensor([3, 0, 4, 1, 2])
    ordered, again = head(embeddings[order], areas[order], given)
    assert torch.allclose(ordered, answers[order], atol=1e-5)
    assert torch.allclose(again, photo, atol=1e-5)
    fewer, of_fewer = head(embeddings[:4], areas[:4], given)
    assert (fewer - answers[:4]).abs().max() > 1e-3 and (of_fewer - photo).abs().max() > 1e-3


@torch.no_grad()
def test_the_second_opinion_of_a_photo_does_not_hear_the_first(region_head):
    head, (embeddings, areas, given) = region_head
    answers, photo = head(embeddings, areas, given)
    others, same = head(embeddings, areas, given + torch.tensor([0, 0.5]))
    assert torch.equal(photo, same) and not torch.equal(answers, others)


@torch.no_grad()
def test_a_region_without_area_is_none(region_head):
    head, (embeddings, areas, given) = region_head
    areas = areas * torch.tensor([1.0, 1, 1, 0, 1])
    present = torch.tensor([0, 1, 2, 4])
    alone, of_these = head(embeddings[present], areas[present], given)
    answers, photo = head(embeddings, areas, given)
    assert torch.allclose(answers[present], alone, atol=1e-5)
    assert torch.allclose(photo, of_these, atol=1e-5)


# How it decides


def test_a_surely_good_photo_stays_and_a_prior_of_nought_corrects_it():
    opinion = Opinion(0.75, peak(0.8))
    assert decide(opinion, 0.5) == 0
    assert decide(opinion, 0.0) == pytest.approx(0.8, abs=0.02)


def test_an_unsure_judge_is_moderate():
    sure, unsure = Opinion(0.01, peak(0.4)), Opinion(0.45, peak(0.4))
    assert decide(sure, 0.5) == pytest.approx(0.4, abs=0.02)
    assert 0 < decide(unsure, 0.5) < 0.3


def test_a_far_alternative_does_not_drag_the_answer():
    assert decide(Opinion(0.0, 0.7 * peak(0.5) + 0.3 * peak(-1.5)), 0.5) == pytest.approx(
        0.5, abs=0.03
    )


def test_a_second_opinion_moves_the_first_the_more_the_surer_it_is():
    first = Opinion(0.2, peak(0.4, 0.2))
    unsure, sure = (seconded(first, peak(0.8, spread)) for spread in (1.0, 0.2))
    found = [float(one.p_S @ STRENGTHS.double().numpy()) for one in (first, unsure, sure)]
    assert found[0] < found[1] < found[2] < 0.8
    assert unsure.p_good == 0.2 and sure.p_S.sum() == pytest.approx(1)
    black = Opinion(1.0, (STRENGTHS == 0).double().numpy())
    assert np.array_equal(seconded(black, peak(0.8)).p_S, black.p_S)


def test_a_photo_is_not_good_whose_regions_are_too_far_apart_unless_it_is_beyond_doubt():
    areas = np.array([0.5, 0.5], np.float32)
    for between, good in ((0.3, True), (0.7, False)):  # spread: half of it
        p_RS = np.stack([peak(0.2), peak(0.2 + between)])
        assert in_view_of_regions(Opinion(0.8, peak(0.1)), p_RS, areas).p_good == 0.8 * good
        for sure in (0.9, 1.0):
            assert in_view_of_regions(Opinion(sure, peak(0.1)), p_RS, areas).p_good == sure


def test_a_photo_is_good_beyond_doubt_only_where_it_would_stay_as_it_is():
    assert is_beyond_doubt(Opinion(0.9, peak(0.8)), 0.5)
    assert not is_beyond_doubt(Opinion(0.9, peak(0.8)), 0.1)  # few photos are good
    assert not is_beyond_doubt(Opinion(0.8, peak(0.8)), 0.5)


def test_regions_do_not_differ_in_a_photo_that_is_all_but_surely_good():
    shares = [regional_share(Opinion(p, peak(0.1)), 0.5, 0.1) for p in (0.3, 0.6, 0.65, 0.7, 0.9)]
    assert shares == pytest.approx([1, 1, 0.5, 0, 0])
    assert regional_share(Opinion(0.9, peak(0.1)), 0.0, 0.1) == 1  # no photo is taken for good


def test_regions_differ_less_in_a_photo_that_is_far_off_as_a_whole():
    strengths = (0.1, 0.4, -0.65, 0.9, -1.5)
    shares = [regional_share(Opinion(0.1, peak(t)), 0.5, t) for t in strengths]
    assert shares == pytest.approx([1, 1, 0.65, 0.3, 0.3])


@given(st.floats(0.01, 0.99), st.floats(-2, 2), st.floats(0.05, 0.8))
@settings(max_examples=100, deadline=None)
def test_the_more_photos_are_good_the_less_is_corrected(p_good, at, spread):
    opinion = Opinion(p_good, peak(at, spread))
    strengths = [abs(decide(opinion, prior)) for prior in (0.0, 0.2, 0.5, 0.8, 0.95)]
    assert all(more <= less + 1e-9 for less, more in itertools.pairwise(strengths))


@given(st.floats(0, 1), st.floats(-2, 2))
@settings(max_examples=50, deadline=None)
def test_the_three_words_are_probabilities(p_good, at):
    words = Opinion(p_good, peak(at)).words()
    assert sum(words.values()) == pytest.approx(1)
    assert min(words.values()) >= -1e-12
    if p_good < 0.1 and abs(at) > 0.6:
        assert max(words, key=words.__getitem__) == ("under" if at > 0 else "over")


# What it says of pictures


@pytest.fixture(scope="module")
def clip():
    return load_models(Settings()).clip


def opinion(clip, photo: np.ndarray) -> Opinion:
    seen = embed_ladder(working(photo, 256), clip, LadderSettings(), OFFSETS)
    return Judge.shipped(clip).opinion(seen, OFFSETS)


def strength(clip, photo: np.ndarray) -> float:
    return decide(opinion(clip, photo), 0.5)


def change(photo: np.ndarray, t: float) -> float:
    toned = to_bytes(tone.apply("film", to_float(photo), t)).numpy()
    return float(np.abs(toned.astype(int) - photo).mean())


GOOD = (
    ("skimage/data", "astronaut.png"),
    ("skimage/data", "chelsea.png"),
    ("skimage/data", "coffee.png"),
)


@pytest.mark.parametrize(("folder", "name"), GOOD)
def test_good_photos_are_hardly_changed(clip, folder, name):
    photo = installed_photo(folder, name)
    assert change(photo, strength(clip, photo)) < 12


@pytest.mark.parametrize(("folder", "name"), GOOD)
@pytest.mark.parametrize("ev", [-2.0, 1.5])
def test_spoilt_photos_come_nearer_to_what_they_were(clip, folder, name, ev):
    photo = installed_photo(folder, name)
    spoilt = to_bytes(tone.apply("ev", to_float(photo), ev / tone.EV_PER_STRENGTH)).numpy()
    mended = tone.apply("film", to_float(spoilt), strength(clip, spoilt))
    before, after = (
        float((x - to_float(photo)).square().mean()) for x in (to_float(spoilt), mended)
    )
    assert after < 0.8 * before


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 20, 20), (40, 40, 40)])
def test_a_photo_of_one_colour_is_left_alone(clip, colour):
    photo = np.full((96, 128, 3), colour, np.uint8)
    assert strength(clip, photo) == 0
    assert decide(opinion(clip, photo), 0.0) == 0


def test_noise_near_black_is_left_alone(clip):
    noise = np.random.default_rng(0).integers(0, 4, (300, 400, 3)).astype(np.uint8)
    assert strength(clip, noise) == 0


def product(clip) -> np.ndarray:
    ground = np.full((320, 320, 3), 255, np.uint8)
    coffee = working(installed_photo("skimage/data", "coffee.png"), 256)
    ground[110:210, 90:230] = coffee[:100, :140]
    return ground


def test_white_grounds_stay_white(clip):
    photo = product(clip)
    t = strength(clip, photo)
    white = tone.apply("film", torch.ones(1), t)
    assert float(white) * 255 >= 245


def test_an_object_on_white_is_hardly_darkened_whatever_the_heads_say(clip, monkeypatch):
    rng = np.random.default_rng(0)
    photo = rng.integers(246, 254, (160, 160, 3)).astype(np.uint8)  # as JPEG leaves white
    photo[60:110, 40:120] = working(installed_photo("skimage/data", "coffee.png"), 256)[:50, :80]
    sure = torch.full((1, len(STRENGTHS)), -50.0)
    sure[0, 10] = 50.0  # much too bright
    monkeypatch.setattr(judge.Head, "forward", lambda self, seen: (sure, torch.tensor([-50.0])))
    assert strength(clip, photo) == pytest.approx(MOST_DARKENING, abs=0.03)
    below = photo.copy()
    below[112:] = 120  # dark ground below a blown sky: no object on white
    half = photo.copy()
    half[:, 70:] //= 2  # now less than half is white
    assert max(strength(clip, below), strength(clip, half)) < -1


def test_a_border_does_not_decide(clip):
    photo = installed_photo("skimage/data", "astronaut.png")
    dark = to_bytes(tone.apply("ev", to_float(photo), -0.9)).numpy()
    for level in (0, 255):
        framed = np.full((dark.shape[0] + 160, dark.shape[1] + 160, 3), level, np.uint8)
        framed[80:-80, 80:-80] = dark
        assert strength(clip, framed) == pytest.approx(strength(clip, dark), abs=0.1)


@pytest.mark.parametrize("ev", [-2.0, -1.0, 1.0])
def test_a_second_pass_moves_nothing_visible(clip, ev):
    photo = installed_photo("skimage/data", "coffee.png")
    spoilt = to_bytes(tone.apply("ev", to_float(photo), ev / tone.EV_PER_STRENGTH)).numpy()
    once = to_bytes(tone.apply("film", to_float(spoilt), strength(clip, spoilt))).numpy()
    assert change(once, strength(clip, once)) < 10


def test_another_state_of_one_head_is_another_judge(clip):
    one = Judge.shipped(clip)
    state = {k: v + 1 for k, v in one.head.state_dict().items()}
    assert one.changed("photo", state).fingerprint != one.fingerprint
    assert Judge(one.tensors).fingerprint == one.fingerprint
