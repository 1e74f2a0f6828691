"""Pseudo-GT: strengths come from cached embeddings, stay in order, and spare good photos."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from toys import ToyClip, ToyJudge, ToySegmenter, peak

from evenlight.pipeline import config
from evenlight.stages.pixels import luma, resize, to_bytes, to_float
from evenlight.stages.priors import pseudo_gt, region_strengths, tone
from evenlight.stages.priors.ladder import embed_photo, largest_regions, region_crop
from evenlight.stages.priors.opinion import Opinion
from evenlight.stages.priors.scores import candidate_score
from evenlight.stages.priors.tones import tones as tones_of
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
    result = chosen(before)
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


def halves() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """A dark and a brighter region, and what is cached of them."""
    both = np.concatenate([photo(-2.2, 1), photo(-0.3, 2)], 1)
    labels = np.repeat([[1, 2]], 96, 0).repeat(128, 1).astype(np.uint8)
    return both, labels, embed_photo(both, labels, ToyClip(), LADDER)


def test_regions_get_strengths_of_their_own():
    both, labels, cached = halves()
    result = pseudo_gt.choose(both, labels, cached, ToyJudge(), SETTINGS)
    by_label = dict(zip(cached["region_labels"], result["region_strengths"], strict=True))
    assert by_label[1] > by_label[2] + 0.2
    assert result["t_map"][:, :20].mean() > result["t_map"][:, -20:].mean() + 0.2


def test_what_is_in_no_embedded_region_moves_as_the_others_do_on_average():
    few = Settings(ladder=LadderSettings(regions=2))
    both, labels, _ = halves()
    labels[:, 160:200] = 3  # the smallest
    cached = embed_photo(both, labels, ToyClip(), few.ladder)
    assert cached["region_labels"].tolist() == [1, 2]
    chosen, t_map = pseudo_gt.by_region(both, labels, cached, ToyJudge(), few, -0.2)
    apart = np.average(chosen, weights=cached["region_areas"])
    moved = apart + 0.2
    assert abs(moved) > 0.3 < np.ptp(chosen)
    assert t_map[0, 0, :, 43:47].numpy() == pytest.approx(apart, abs=0.3 * abs(float(moved)))


def test_regions_of_a_photo_that_is_all_but_surely_good_lie_closer_together(monkeypatch):
    both, labels, cached = halves()
    spreads = []
    for p_good in (0.5, 0.65):
        monkeypatch.setattr(ToyJudge, "opinion", lambda *_, p=p_good: Opinion(p, peak(0.6)))
        result = pseudo_gt.choose(both, labels, cached, ToyJudge(), SETTINGS)
        assert result["strength"] > 0
        spreads.append(np.ptp(result["region_strengths"][:2]))
    assert 0.1 < spreads[1] < 0.7 * spreads[0]


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


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_regions_keep_their_order_of_brightness(wanted, seed):
    rng = np.random.default_rng(seed)
    patches = [np.full((8, 8, 3), level, np.uint8) for level in rng.integers(12, 240, len(wanted))]
    tones = np.stack([tones_of(patch) for patch in patches])
    kept = region_strengths.keep_order(np.array(wanted), 0.3, tones, "film")
    before = region_strengths.mean_luma(tones, np.full(len(wanted), 0.3), "film")
    after = region_strengths.mean_luma(tones, kept, "film")
    for i in range(len(wanted)):
        for j in range(len(wanted)):
            if before[i] - before[j] > region_strengths.ORDER_MARGIN:
                assert after[i] >= after[j]


def test_regions_move_though_others_change_places_at_the_strength_of_the_photo():
    contrasty, flat = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 76, np.uint8)
    contrasty[:, :3] = 255
    patches = [contrasty, flat, np.full((8, 8, 3), 20, np.uint8)]
    tones = np.stack([tones_of(patch) for patch in patches])
    start, margin = 1.2, region_strengths.ORDER_MARGIN
    was, now = (region_strengths.mean_luma(tones, np.full(3, t), "film") for t in (0.0, start))
    assert was[0] > was[1] + margin and now[1] > now[0] + margin  # alone by the curve
    wanted = np.array([start, start, start + 0.3])
    assert region_strengths.keep_order(wanted, start, tones, "film").tolist() == wanted.tolist()


def test_mean_luma_from_tones_is_that_of_the_pixels():
    pixels = photo(-0.5)
    found = region_strengths.mean_luma(tones_of(pixels)[None], np.array([0.6]), "film")
    assert found[0] == pytest.approx(
        float(luma(tone.apply("film", to_float(pixels), 0.6)).mean()), abs=0.04
    )


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
    assert (cached["clip_regions"][1:] == 0).all()
    assert cached["region_areas"][0] == pytest.approx(1, abs=0.01)
    assert cached["region_labels"].tolist() == [1] + [0] * (LADDER.regions - 1)


def test_a_region_crop_keeps_the_region_and_blurs_the_rest():
    rgb = torch.zeros(1, 3, 64, 64)
    rgb[..., ::2, ::2] = 1.0
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    crop = region_crop(rgb, mask, 160)
    assert crop[..., 70:90, 70:90].std() > 2 * crop[..., :12, :12].std()
