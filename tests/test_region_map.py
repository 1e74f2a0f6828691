"""Region maps: every promise of distinct, region_map and on_edges on masks made here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evenlight.stages.priors.region_map import distinct, on_edges, region_map

SHAPE = (24, 32)


def map_and_share(masks, scores=None, *, min_area=0.0, max_regions=64):
    masks = np.array(masks, np.bool_).reshape(-1, *SHAPE)
    scores = np.linspace(0.29, 0.1, len(masks)) if scores is None else np.array(scores)
    return region_map(masks, scores, min_area=min_area, max_regions=max_regions)


def map_of(masks, scores=None, **limits):
    return map_and_share(masks, scores, **limits)[0]


def box(top, left, bottom, right):
    mask = np.zeros(SHAPE, np.bool_)
    mask[top:bottom, left:right] = True
    return mask


@st.composite
def boxes(draw):
    """Up to 40 boxes and a few arbitrary masks, every score its own."""
    rows, columns = st.integers(0, SHAPE[0]), st.integers(0, SHAPE[1])
    ends = draw(st.lists(st.tuples(rows, columns, rows, columns), max_size=40))
    masks = [box(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in ends]
    masks += draw(st.lists(arrays(np.bool_, SHAPE), max_size=2))
    scores = draw(st.permutations(list(np.linspace(0, 1, len(masks)))))
    return np.array(masks, np.bool_).reshape(-1, *SHAPE), np.array(scores)


# Painting


@given(boxes(), st.sampled_from([0.0, 0.002, 0.02, 0.2]), st.sampled_from([1, 3, 64, 255]))
@settings(max_examples=60, deadline=None)
def test_regions_cover_the_photo_by_area_within_the_limits(masks_scores, min_area, max_regions):
    masks, scores = masks_scores
    labels, covered = region_map(masks, scores, min_area=min_area, max_regions=max_regions)
    assert labels.dtype == np.uint8 and labels.shape == SHAPE
    areas = np.bincount(labels.ravel())
    assert areas[0] == 0
    assert 1 <= len(areas) - 1 <= max_regions
    assert (np.diff(areas[1:].astype(int)) <= 0).all() and areas[1:].min() > 0
    assert areas[1:].min() >= min_area * labels.size
    assert 0 <= covered <= masks.any(0).mean()


@given(boxes(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_in_which_masks_come_does_not_matter(masks_scores, random):
    masks, scores = masks_scores
    order = random.sample(range(len(masks)), len(masks))
    limits = {"min_area": 0.01, "max_regions": 16}
    one, other = (region_map(masks[o], scores[o], **limits) for o in (slice(None), order))
    assert (one[0] == other[0]).all() and one[1] == other[1]


@pytest.mark.parametrize("masks", [[], [np.zeros(SHAPE)], [np.ones(SHAPE)]])
def test_no_mask_an_empty_one_and_a_full_one_make_one_region(masks):
    labels, covered = map_and_share(masks)
    assert (labels == 1).all() and covered == (np.sum(masks) > 0)


def test_masks_too_small_to_use_leave_one_region():
    labels, covered = map_and_share([box(0, 0, 2, 2), box(9, 9, 10, 10)], min_area=0.1)
    assert (labels == 1).all() and covered == 0


def test_the_share_is_of_what_masks_cover():
    assert map_and_share([box(0, 0, 24, 16), box(0, 12, 12, 20)])[1] == pytest.approx(0.5625)


def test_a_small_object_stays_visible_on_a_large_one_of_lower_score():
    labels = map_of([np.ones(SHAPE), box(4, 4, 9, 9)], scores=[0.2, 0.9])
    assert (labels[4:9, 4:9] == 2).all() and (labels == 1).sum() == 24 * 32 - 25


def test_an_unsure_mask_that_repeats_surer_ones_is_dropped():
    labels = map_of([np.ones(SHAPE), box(4, 4, 20, 20)], scores=[0.9, 0.2])
    assert (labels == 1).all()


def test_a_sure_object_within_a_surer_one_is_kept():
    labels = map_of([np.ones(SHAPE), box(4, 4, 20, 20)], scores=[0.9, 0.5])
    assert (labels[4:20, 4:20] == 2).all()


def test_more_masks_than_labels_keep_the_photo_covered():
    cells = [box(r, c, r + 1, c + 1) for r in range(24) for c in range(32)]
    labels = map_of(cells, max_regions=255)
    assert labels.max() == 255 and labels.min() == 1


# Remainders


def test_each_connected_remainder_is_a_region_of_its_own():
    labels = map_of([box(0, 12, 24, 18)])
    assert len({labels[0, 0], labels[0, 14], labels[0, 31]}) == 3 and labels.max() == 3
    assert (labels[:, :12] == labels[0, 0]).all() and (labels[:, 18:] == labels[0, 31]).all()


def test_a_small_remainder_joins_what_it_lies_in():
    hole = box(0, 0, 24, 20) & ~box(8, 8, 10, 10)
    labels = map_of([hole, box(0, 20, 24, 32)], min_area=0.02)
    assert labels.max() == 2 and (labels[:, :20] == labels[0, 0]).all()


def test_a_seam_between_masks_goes_to_the_nearer_one_pixel_by_pixel():
    wide = (96, 128)
    masks = np.zeros((2, *wide), np.bool_)
    masks[0, :, :60] = masks[1, :, 62:] = True
    labels, covered = region_map(masks, np.array([0.9, 0.8]), min_area=0.002, max_regions=64)
    assert labels.max() == 2 and covered == pytest.approx(126 / 128)
    assert (labels[:, 60] == labels[0, 0]).all() and (labels[:, 61] == labels[0, 127]).all()


def test_remainders_count_among_the_regions_and_the_smallest_are_merged():
    stripes = [box(0, column, 24, column + 2) for column in range(2, 32, 4)]
    labels = map_of(stripes, max_regions=5)
    assert labels.max() == 5 and labels.min() == 1


# Merging


def test_regions_beyond_the_limit_join_the_neighbour_with_most_border():
    left, top, bottom = box(0, 0, 24, 14), box(0, 16, 14, 32), box(14, 16, 24, 32)
    between = box(0, 14, 24, 16)
    labels = map_of([between, top, bottom, left], max_regions=3)
    assert (labels[:, :16] == labels[0, 0]).all() and labels.max() == 3


def test_what_painting_leaves_of_a_mask_joins_a_neighbour_when_too_small():
    under, one, other = box(0, 0, 12, 12), box(0, 0, 12, 6), box(0, 6, 12, 10)
    # The two hide all of `under` but a strip of 24 pixels, under 5 % of the photo.
    labels = map_of([one, other, under], min_area=0.05)
    assert labels.max() == 3
    assert labels[0, 10] in (labels[0, 6], labels[23, 31]) and labels[0, 0] != labels[0, 6]


# Distinct masks


def soft(mask, inside=0.9):
    return np.where(mask, inside, 0.1).astype(np.float32)


def test_of_two_masks_of_one_object_the_surer_stands_for_both():
    masks = np.array([soft(box(0, 0, 10, 10)), soft(box(0, 0, 10, 11)), soft(box(12, 12, 24, 32))])
    kept, scores = distinct(masks, np.array([0.5, 0.6, 0.4], np.float32), iou=0.6)
    assert kept.dtype == np.bool_ and (kept == (masks[1:] > 0.5)).all()
    assert scores == pytest.approx([0.54, 0.36], rel=1e-5)


def test_an_object_within_another_is_distinct_from_it():
    masks = np.array([soft(np.ones(SHAPE)), soft(box(2, 2, 10, 10))])
    assert len(distinct(masks, np.array([0.9, 0.8], np.float32), iou=0.6)[0]) == 2


def test_a_mask_unsure_of_its_pixels_yields_to_a_surer_one():
    masks = np.array([soft(box(0, 0, 10, 10), 0.55), soft(box(0, 0, 10, 11), 0.95)])
    kept, _ = distinct(masks, np.array([0.7, 0.6], np.float32), iou=0.6)
    assert len(kept) == 1 and kept[0, 0, 10]


def test_no_masks_are_distinct_without_complaint():
    kept, scores = distinct(np.zeros((0, *SHAPE), np.float32), np.zeros(0, np.float32), iou=0.6)
    assert kept.shape == (0, *SHAPE) and len(scores) == 0


# Borders


def two_halves(edge, height=64, width=480):
    photo = np.full((height, width, 3), 60, np.uint8)
    photo[:, edge:] = 190
    return photo


def halves(border, height=64, width=480):
    return np.where(np.arange(width) < border, 1, 2)[None].repeat(height, 0).astype(np.uint8)


@pytest.mark.parametrize("border", [297, 300, 303])
def test_a_border_near_an_edge_of_the_photo_moves_onto_it(border):
    assert (on_edges(halves(border), two_halves(300)) == halves(300)).all()


def test_a_border_without_an_edge_stays_where_it_is():
    flat = np.full((64, 480, 3), 90, np.uint8)
    assert (on_edges(halves(300), flat) == halves(300)).all()


@given(arrays(np.uint8, (3, 4), elements=st.integers(1, 5)), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_refining_covers_the_photo_and_makes_no_region(cells, seed):
    labels = cells.repeat(16, 0).repeat(16, 1)
    photo = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    refined = on_edges(labels, photo)
    areas = np.bincount(refined.ravel())
    assert areas[0] == 0 and (np.diff(areas[1:].astype(int)) <= 0).all()
    assert len(areas) - 1 <= len(np.unique(labels))
