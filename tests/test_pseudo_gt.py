"""Pseudo-GT: strengths come from cached embeddings, stay in order, and spare good photos."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from toys import ToyClip, ToyJudge, ToySegmenter, peak

from evenlight.pipeline import config
from evenlight.stages.pixels import luma, resize, to_bytes, to_float
from evenlight.stages.priors import pseudo_gt, tone
from evenlight.stages.priors.ladder import embed_photo, largest_regions, region_cells
from evenlight.stages.priors.opinion import Opinion, region_areas
from evenlight.stages.priors.scores import candidate_score
from evenlight.stages.settings import LadderSettings, PseudoGTSettings, Settings

SETTINGS = Settings()
LADDER = SETTINGS.ladder


def photo(exposure: float, seed: int = 0) -> np.ndarray:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=rng)
    smooth = F.interpolate(coarse, (96, 128), mode="bicubic").clamp(0.02, 0.98)
    balanced = tone.apply("film", smooth, tone.rule_strength(smooth, "film", 0.5).view(1, 1, 1, 1))
    return to_bytes(tone.apply("film", balanced, exposure)).numpy()


def chosen(pixels: np.ndarray, settings=SETTINGS) -> dict[str, np.ndarray]:
    labels = ToySegmenter().segment(pixels).labels
    cached = embed_photo(pixels, labels, ToyClip(), settings.ladder)
    return pseudo_gt.choose(pixels, labels, cached, ToyJudge(), settings)


@pytest.mark.parametrize("exposure", [-1.5, -0.8, 0.8])
def test_badly_exposed_photos_come_back_near_the_middle(exposure):
    before = photo(exposure)
    after = chosen(before)["pseudo_gt"]
    error_before, error_after = (
        abs(float(luma(to_float(x)).mean()) - 0.5) for x in (before, after)
    )
    assert error_after < 0.1
    assert error_after < 0.6 * error_before


def test_a_well_exposed_photo_is_its_own_pseudo_gt():
    before = photo(0.0)
    whole = np.ones(before.shape[:2], np.uint8)
    cached = embed_photo(before, whole, ToyClip(), LADDER)
    result = pseudo_gt.choose(before, whole, cached, ToyJudge(), SETTINGS)
    assert result["strength"] == 0
    assert np.array_equal(result["pseudo_gt"], before)


def test_pseudo_gt_is_rebuilt_exactly_from_the_stored_t_map():
    before = photo(-1.2)
    result = chosen(before)
    again = pseudo_gt.re_expose(before, torch.from_numpy(result["t_map"]), LADDER.family)
    assert np.array_equal(result["pseudo_gt"], again)


def test_the_global_baseline_has_one_strength_everywhere():
    result = chosen(photo(-1.2), Settings(pseudo_gt=PseudoGTSettings(regional=False)))
    assert np.ptp(result["t_map"]) == 0
    assert (result["region_strengths"] == result["strength"]).all()


def halves(*exposures: float) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """A dark and a brighter region, and what is cached of them."""
    both = np.concatenate([photo(ev, k) for k, ev in enumerate(exposures or (-1.4, 0.5), 1)], 1)
    labels = np.repeat([[1, 2]], 96, 0).repeat(128, 1).astype(np.uint8)
    return both, labels, embed_photo(both, labels, ToyClip(), LADDER)


def test_regions_get_strengths_of_their_own():
    both, labels, cached = halves()
    result = pseudo_gt.choose(both, labels, cached, ToyJudge(), SETTINGS)
    by_label = dict(zip(cached["region_labels"], result["region_strengths"], strict=True))
    assert by_label[1] > by_label[2] + 0.2
    assert result["t_map"][:, :20].mean() > result["t_map"][:, -20:].mean() + 0.2


def test_what_is_in_no_embedded_region_is_judged_as_one_more_and_all_keep_the_photos_strength():
    few = Settings(ladder=LadderSettings(regions=2))
    both, labels, _ = halves()
    labels[:, 160:200] = 3  # the smallest
    both[:, 160:200] = 230
    cached = embed_photo(both, labels, ToyClip(), few.ladder)
    assert cached["region_labels"].tolist() == [1, 2]
    apart = pseudo_gt.apart_by_region(cached, ToyJudge(), few, -0.2)
    assert apart[2] < min(apart[:2]) - 0.4
    assert np.average(apart, weights=region_areas(cached)) == pytest.approx(0, abs=1e-6)
    a, b = (x[0, 0].numpy() for x in pseudo_gt.painted(both, labels, cached, apart))
    assert not a[:, 170:190].any()
    for part, wanted in zip((slice(0, 100), slice(210, None), slice(170, 190)), apart, strict=True):
        np.testing.assert_allclose(b[:, part], wanted, atol=1e-5)


def test_the_strength_of_a_region_ends_where_the_photo_says():
    both, labels, cached = halves()
    both[:, :131], both[:, 131:] = 60, 180  # three pixels beyond the border of the region map
    apart = np.array([1.0, 0.0, 0.0], np.float32)
    a, b = pseudo_gt.painted(both, labels, cached, apart)
    strength = (a * luma(to_float(both)) + b)[0, 0, 48].numpy()
    np.testing.assert_allclose(strength[:122], 1, atol=1e-5)
    np.testing.assert_allclose(strength[135:], 0, atol=1e-5)
    assert np.diff(strength).argmin() == 130  # from there to the next


def test_a_second_opinion_of_the_photo_is_heard(monkeypatch):
    before = photo(-1.2)
    first = float(chosen(before)["strength"])
    monkeypatch.setattr(ToyJudge, "second_opinion", lambda *_: peak(first + 0.6))
    assert first + 0.1 < float(chosen(before)["strength"]) < first + 0.5


def test_regions_of_a_photo_that_is_all_but_surely_good_lie_closer_together(monkeypatch):
    both, labels, cached = halves(-0.4, 0.0)
    spreads = []
    for p_good in (0.5, 0.65):
        monkeypatch.setattr(ToyJudge, "opinion", lambda *_, p=p_good: Opinion(p, peak(0.6)))
        result = pseudo_gt.choose(both, labels, cached, ToyJudge(), SETTINGS)
        assert result["strength"] > 0
        spreads.append(np.ptp(result["region_strengths"][:2]))
    assert 0.1 < spreads[1] < 0.7 * spreads[0]


def test_a_small_patch_in_no_embedded_region_goes_with_what_is_around_it():
    both, labels, cached = halves()
    apart = np.array([0.4, -0.4, 0.9], np.float32)
    both[:] = 100
    labels[40:46, 60:66] = labels[70:76, 200:206] = 9  # two spots, of no region embedded
    labels[:, 120:136] = 8  # and a band that is no spot
    _, b = pseudo_gt.painted(both, labels, cached, apart)
    assert {round(float(b[0, 0, y, x]), 4) for y, x in ((43, 63), (20, 20))} == {0.4}
    assert {round(float(b[0, 0, y, x]), 4) for y, x in ((73, 203), (20, 230))} == {-0.4}
    assert float(b[0, 0, 43, 128]) == pytest.approx(0.9, abs=1e-3)


def test_regions_of_a_picture_on_white_stay_together(monkeypatch):
    both, labels, _ = halves()
    both[:], both[30:60, 100:150] = 252, 60
    labels[:] = 1
    labels[30:60, 100:150] = 2
    cached = embed_photo(both, labels, ToyClip(), LADDER)
    monkeypatch.setattr(ToyJudge, "opinion", lambda *_: Opinion(0.2, peak(-0.3)))
    assert np.ptp(pseudo_gt.choose(both, labels, cached, ToyJudge(), SETTINGS)["t_map"]) == 0
    both[60:] = 60  # no picture on white any more
    cached = embed_photo(both, labels, ToyClip(), LADDER)
    assert np.ptp(pseudo_gt.choose(both, labels, cached, ToyJudge(), SETTINGS)["t_map"]) > 0.1


def test_no_region_passes_the_largest_strength():
    both, labels, cached = halves()
    free = pseudo_gt.choose(both, labels, cached, ToyJudge(), SETTINGS)
    limit = abs(float(free["strength"])) + 0.02
    assert np.abs(free["region_strengths"]).max() > limit + 0.1
    bound = Settings(pseudo_gt=PseudoGTSettings(max_strength=limit))
    result = pseudo_gt.choose(both, labels, cached, ToyJudge(), bound)
    assert np.abs(result["region_strengths"]).max() <= limit + 1e-6


def test_preset_paper_takes_the_rung_that_the_prompts_like_best():
    before = photo(-1.2)
    result = chosen(before, config.build(overrides=["preset=paper"]))
    rule = float(tone.rule_strength(resize(to_float(before), 64, 64), "gamma")[0])
    strengths = rule + np.array(LADDER.offsets)
    score = candidate_score(result["scores"], strengths, np.zeros(len(strengths)))
    assert abs(float(result["strength"]) - strengths[score.argmax()]) < 0.2
    assert result["p_good"] == 0 and not result["judged"].any()
    assert np.ptp(result["t_map"]) == 0


def test_clipped_pixels_get_little_confidence():
    before = photo(-1.0)
    before[:40, :40] = 255
    confidence = chosen(before)["confidence"]
    assert confidence[:8, :8].mean() < 0.5 * confidence[16:, 16:].mean()


def test_absent_regions_leave_zero_rows_and_large_ones_come_first():
    pixels = photo(-1.0)
    labels = np.ones(pixels.shape[:2], np.uint8)
    labels[:10, :10] = 2
    labels[0, 0] = 3  # far under the least area
    assert largest_regions(labels, LADDER)[0] == [1]
    cached = embed_photo(pixels, labels, ToyClip(), LADDER)
    assert (cached["clip_regions"][1:-1] == 0).all()
    assert cached["region_areas"][0] == pytest.approx(1, abs=0.01)
    assert cached["region_labels"].tolist() == [1] + [0] * (LADDER.regions - 1)


def test_every_cell_is_of_one_region_or_of_the_rest():
    labels = np.ones((96, 128), np.uint8)
    labels[:, 64:] = 2
    labels[:24] = 3
    cells = region_cells(labels, [1, 2], 4)
    assert cells.shape == (5, 40, 40)
    assert (cells.sum(0) == 1).all() and not cells[2:4].any()
    assert cells[0, 20:, :20].all() and cells[1, 20:, 20:].all() and cells[-1, :10].all()
