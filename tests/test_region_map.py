"""Region maps: every promise of region_map on masks made here."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evenlight.stages.priors.region_map import region_map

SHAPE = (24, 32)


def map_of(masks, scores=None, *, min_area=0.0, max_regions=64):
    masks = np.array(masks, np.bool_).reshape(-1, *SHAPE)
    scores = np.linspace(0.39, 0.1, len(masks)) if scores is None else np.array(scores)
    return region_map(masks, scores, min_area=min_area, max_regions=max_regions)


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


@given(boxes(), st.sampled_from([0.0, 0.002, 0.02, 0.2]), st.sampled_from([1, 3, 64, 255]))
@settings(max_examples=60, deadline=None)
def test_regions_are_numbered_by_area_within_the_limits(masks_scores, min_area, max_regions):
    masks, scores = masks_scores
    labels = region_map(masks, scores, min_area=min_area, max_regions=max_regions)
    assert labels.dtype == np.uint8 and labels.shape == SHAPE
    areas = np.bincount(labels.ravel())[1:]
    assert 1 <= len(areas) <= max_regions
    assert (np.diff(areas.astype(int)) <= 0).all() and areas.min() > 0
    assert areas.min() >= min_area * labels.size


@given(boxes())
@settings(max_examples=60, deadline=None)
def test_no_region_lies_where_no_mask_does(masks_scores):
    masks, scores = masks_scores
    labels = region_map(masks, scores, min_area=0.01, max_regions=8)
    assert (labels == 1).all() or not labels[~masks.any(0)].any()


@given(boxes(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_in_which_masks_come_does_not_matter(masks_scores, random):
    masks, scores = masks_scores
    order = random.sample(range(len(masks)), len(masks))
    limits = {"min_area": 0.01, "max_regions": 16}
    assert (
        region_map(masks, scores, **limits) == region_map(masks[order], scores[order], **limits)
    ).all()


def test_without_masks_the_whole_photo_is_one_region():
    assert (map_of([]) == 1).all()


def test_masks_too_small_to_use_leave_one_region():
    assert (map_of([box(0, 0, 2, 2), box(9, 9, 10, 10)], min_area=0.1) == 1).all()


def test_empty_masks_count_as_none():
    assert (map_of([np.zeros(SHAPE)]) == 1).all()


def test_a_mask_of_the_full_frame_is_one_region():
    assert (map_of([np.ones(SHAPE)]) == 1).all()


def test_what_no_mask_covers_is_0():
    labels = map_of([box(0, 0, 24, 16)])
    assert (labels[:, :16] == 1).all() and (labels[:, 16:] == 0).all()


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


def test_regions_beyond_the_limit_join_their_largest_neighbour():
    left, right, between = box(0, 0, 24, 20), box(0, 22, 24, 32), box(0, 20, 24, 22)
    labels = map_of([between, right, left], max_regions=2)
    assert (labels[:, :22] == 1).all() and (labels[:, 22:] == 2).all()


def test_what_painting_leaves_of_a_mask_joins_a_neighbour_when_too_small():
    under, one, other = box(0, 0, 12, 12), box(0, 0, 12, 6), box(0, 6, 12, 10)
    # The two hide all of `under` but a strip of 24 pixels, under 5 % of the photo.
    labels = map_of([one, other, under], min_area=0.05)
    assert labels.max() == 2
    assert (labels[:12, 6:12] == labels[0, 6]).all() and (labels[:12, :6] == labels[0, 0]).all()


def test_a_remnant_that_touches_no_region_is_uncovered():
    ring = box(0, 0, 24, 32) & ~box(1, 1, 23, 31)
    labels = map_of([box(4, 4, 20, 28), ring], max_regions=1)
    assert set(np.unique(labels)) == {0, 1} and labels[0, 0] == 0
