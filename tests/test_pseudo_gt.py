"""Pseudo-GT: strengths come from cached embeddings, stay in order, and spare good photos."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from toys import ToyClip, ToySegmenter

from evenlight.stages.pixels import luma, to_bytes, to_float
from evenlight.stages.priors import pseudo_gt, region_strengths, scores, tone
from evenlight.stages.priors.ladder import embed_photo, largest_regions, region_crop
from evenlight.stages.settings import LadderSettings, PseudoGTSettings

LADDER = LadderSettings()
SETTINGS = PseudoGTSettings()


class ToyScorer:
    """Logits from the toy embedding's angle: d rises with brightness and is 0 at mid gray."""

    fingerprint = "toy"

    def logits(self, embedding_BD):
        centre = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [-1.0, 0, 0]])
        return 20 * F.normalize(embedding_BD, dim=1) @ centre.T


def photo(exposure: float, seed: int = 0) -> np.ndarray:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=rng)
    smooth = F.interpolate(coarse, (96, 128), mode="bicubic").clamp(0.02, 0.98)
    balanced = tone.apply("film", smooth, tone.rule_strength(smooth, "film", 0.5).view(1, 1, 1, 1))
    return to_bytes(tone.apply("film", balanced, exposure)).numpy()


def chosen(pixels: np.ndarray, settings=SETTINGS) -> dict[str, np.ndarray]:
    labels = ToySegmenter().segment(pixels).labels
    cached = embed_photo(pixels, labels, ToyClip(), LADDER)
    return pseudo_gt.choose(pixels, labels, cached, ToyScorer(), LADDER, settings)


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
    result = chosen(photo(-1.2), dataclasses.replace(SETTINGS, regional=False))
    assert np.ptp(result["t_map"]) == 0
    assert (result["region_strengths"] == result["strength"]).all()


def test_regional_strengths_follow_regions_that_the_score_vouches_for():
    dark, bright = photo(-2.2, 1), photo(-0.3, 2)
    both = np.concatenate([dark, bright], 1)
    labels = np.repeat([[1, 2]], 96, 0).repeat(128, 1).astype(np.uint8)
    cached = embed_photo(both, labels, ToyClip(), LADDER)
    moved = dataclasses.replace(SETTINGS, blend=0.6)
    result = pseudo_gt.choose(both, labels, cached, ToyScorer(), LADDER, moved)
    by_label = dict(zip(cached["region_labels"], result["region_strengths"], strict=True))
    assert by_label[1] > by_label[2] + 0.2


def test_no_region_passes_the_largest_strength():
    both = np.concatenate([photo(-2.2, 1), photo(-0.3, 2)], 1)
    labels = np.repeat([[1, 2]], 96, 0).repeat(128, 1).astype(np.uint8)
    cached = embed_photo(both, labels, ToyClip(), LADDER)
    free = dataclasses.replace(SETTINGS, blend=0.9)
    moved = pseudo_gt.choose(both, labels, cached, ToyScorer(), LADDER, free)
    limit = abs(float(moved["strength"])) + 0.02
    assert np.abs(moved["region_strengths"]).max() > limit + 0.1
    bound = dataclasses.replace(free, max_strength=limit)
    result = pseudo_gt.choose(both, labels, cached, ToyScorer(), LADDER, bound)
    assert np.abs(result["region_strengths"]).max() <= limit + 1e-6


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_regions_keep_their_order_of_brightness(wanted, seed):
    before = np.random.default_rng(seed).uniform(0.05, 0.95, len(wanted))

    def after(region: int, t: float) -> float:
        return float(before[region] ** np.exp(-t))

    kept = region_strengths.keep_order(np.array(wanted), 0.3, before, after)
    for i in range(len(wanted)):
        for j in range(len(wanted)):
            if before[i] - before[j] > region_strengths.ORDER_MARGIN:
                assert after(i, kept[i]) >= after(j, kept[j])


@given(st.floats(-1.9, 1.9), st.floats(0.5, 30))
def test_crossing_finds_the_zero_of_a_rising_line(zero, slope):
    strengths = np.array(LADDER.offsets)
    found = scores.crossings(strengths, slope * (strengths - zero))
    assert found == pytest.approx([zero], abs=1e-9)


def test_without_a_crossing_the_nearer_end_is_taken():
    strengths = np.array([-1.0, 0.0, 1.0])
    assert scores.crossings(strengths, np.array([-3.0, -2.0, -1.0])) == [1.0]
    assert scores.crossings(strengths, np.array([1.0, 2.0, 3.0])) == [-1.0]


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
    assert [label for label, _ in largest_regions(labels, LADDER)] == [1]
    cached = embed_photo(pixels, labels, ToyClip(), LADDER)
    assert (cached["clip_regions"][1:] == 0).all()
    assert cached["region_labels"].tolist() == [1] + [0] * (LADDER.regions - 1)


def test_a_region_crop_keeps_the_region_and_blurs_the_rest():
    rgb = torch.zeros(1, 3, 64, 64)
    rgb[..., ::2, ::2] = 1.0
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[16:48, 16:48] = True
    crop = region_crop(rgb, mask, 160)
    assert crop[..., 70:90, 70:90].std() > 2 * crop[..., :12, :12].std()


def test_tones_clip_and_strength_each_speak_on_whether_a_photo_is_good():
    normal, under = np.array([-1.0, 1.0, -1.0]), np.array([3.0, 0.0, -3.0])
    assert pseudo_gt.well_exposed(normal, 0.5, 0.1)
    assert not pseudo_gt.well_exposed(normal, -2.0, 0.1)
    assert not pseudo_gt.well_exposed(under, 0.5, 0.1)
    assert not pseudo_gt.well_exposed(normal, 0.5, -0.8)
