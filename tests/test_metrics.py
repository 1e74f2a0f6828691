"""Figures of one output: each says what it claims, on outputs whose errors are known."""

import numpy as np
import pytest
from photo_makers import picture
from skimage.metrics import structural_similarity

from evenlight.stages.evaluation import metrics


def measured(output: np.ndarray, reference: np.ndarray) -> metrics.Figures:
    return metrics.measure(output, output, reference)


@pytest.mark.parametrize("error", [1, 5, 40])
def test_psnr_of_a_known_error(error):
    reference = np.full((40, 50, 3), 100, np.uint8)
    expected = 20 * np.log10(255 / error)
    assert measured(reference + np.uint8(error), reference).psnr == pytest.approx(
        expected, abs=1e-4
    )


def test_an_exact_output_is_100_db_ssim_1_and_no_colour_difference():
    photo = picture(40, 50, 3)
    figures = measured(photo, photo)
    assert (figures.psnr, figures.gain_psnr, figures.colour, figures.change) == (100, 100, 0, 0)
    assert figures.ssim == pytest.approx(1)


def test_ssim_is_that_of_the_paper_as_scikit_image_computes_it():
    photo = picture(64, 80, 3)
    other = (photo * 0.6 + 20).astype(np.uint8)
    border = [(5, 5), (5, 5), (0, 0)]
    _, full = structural_similarity(
        *(np.pad(x, border, mode="reflect") for x in (photo, other)),
        channel_axis=2, gaussian_weights=True, sigma=1.5, data_range=255,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    assert measured(other, photo).ssim == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_colour_difference_of_known_colours_in_strips_of_any_size(rows, monkeypatch):
    monkeypatch.setattr(metrics, "COLOUR_PIXELS", rows * 32)
    black, white = np.zeros((20, 32, 3), np.uint8), np.full((20, 32, 3), 255, np.uint8)
    assert measured(white, black).colour == pytest.approx(100, abs=0.01)  # L* from 0 to 100
    half = black.copy()
    half[:5] = 255
    assert measured(half, black).colour == pytest.approx(25, abs=0.01)


def test_psnr_after_gain_forgives_a_gain_and_nothing_else():
    reference = picture(40, 50, 3)
    halved = (reference.astype(int) // 4 * 2).astype(np.uint8)
    figures = measured(halved, reference)
    assert figures.gain_psnr > 40 > 20 > figures.psnr
    noisy = picture(40, 50, 3, seed=1)
    assert measured(noisy, reference).gain_psnr < 20


def test_change_is_from_the_photo_and_tint_only_where_it_is_blown():
    photo = np.full((20, 32, 3), 100, np.uint8)
    assert np.isnan(metrics.measure(photo, photo, photo).tint)
    photo[:10] = 255
    output = photo.copy()
    output[:10, :, 2] = 225
    output[10:, :, 0] = 20
    figures = metrics.measure(photo, output, photo)
    assert figures.tint == pytest.approx(30)
    assert figures.change == pytest.approx((30 + 80) / 2 / 3)


def test_luma_is_of_the_output_alone():
    output = np.full((20, 20, 3), 100, np.uint8)
    output[0] = (253, 255, 255)
    output[1] = (2, 0, 0)
    figures = metrics.measure(np.full_like(output, 7), output, None)
    rows = (0.299 * 253 + 0.701 * 255) + 0.299 * 2 + 18 * 100
    assert figures.luma == pytest.approx(rows / 20, abs=1e-3)
    assert metrics.measure(np.full_like(output, 7), output, output).luma == figures.luma


def test_with_a_mask_every_figure_is_of_its_pixels_alone():
    photo, reference = picture(40, 50, 3), picture(40, 50, 3, seed=1)
    output = (photo * 0.5 + 40).astype(np.uint8)
    photo[:4] = 255  # blown
    mask = np.zeros((40, 50), bool)
    mask[:, :20] = True
    found = metrics.measure(photo, output, reference, mask)
    cut = metrics.measure(*(x[:, :20] for x in (photo, output, reference)))
    for name in ("psnr", "colour", "gain_psnr", "change", "tint", "luma"):
        assert getattr(found, name) == pytest.approx(getattr(cut, name), rel=1e-5), name
    spoilt = output.copy()
    spoilt[:, 20:] = 0
    for name in ("psnr", "colour", "gain_psnr", "change", "tint", "luma"):
        after = metrics.measure(photo, spoilt, reference, mask)
        assert getattr(after, name) == getattr(found, name), name
        whole = (metrics.measure(photo, x, reference) for x in (output, spoilt))
        assert name == "tint" or len({getattr(figures, name) for figures in whole}) == 2, name
    one, other = (
        metrics.agreement([output, reference], mask),
        metrics.agreement([output, reference]),
    )
    assert one == pytest.approx(metrics.agreement([output[:, :20], reference[:, :20]])) != other


def test_ssim_with_a_mask_is_the_mean_of_its_map_over_the_mask():
    photo = picture(64, 80, 3)
    other = (photo * 0.6 + 20).astype(np.uint8)
    border = [(5, 5), (5, 5), (0, 0)]
    _, full = structural_similarity(
        *(np.pad(x, border, mode="reflect") for x in (photo, other)),
        channel_axis=2, gaussian_weights=True, sigma=1.5, data_range=255,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    mask = np.arange(64)[:, None] * 2 < np.arange(80)
    found = metrics.measure(photo, other, photo, mask).ssim
    assert found == pytest.approx(full[5:-5, 5:-5][mask].mean(), abs=1e-4)
    assert found != pytest.approx(measured(other, photo).ssim, abs=1e-4)


def test_a_mask_of_all_pixels_changes_no_figure():
    photo, output, reference = (picture(40, 50, 3, seed=seed) for seed in range(3))
    all_pixels = np.ones((40, 50), bool)
    with_mask = metrics.measure(photo, output, reference, all_pixels)
    without = metrics.measure(photo, output, reference)
    for name, value in vars(without).items():
        assert getattr(with_mask, name) == pytest.approx(value, rel=1e-5, nan_ok=True), name


def clipped_photo() -> np.ndarray:
    """Middling, with red clipped on the right and all channels in a corner of it."""
    photo = np.full((40, 60, 3), 120, np.uint8)
    photo[:, 30:, 0] = 255
    photo[:20, 40:] = 255
    return photo


def test_colour_in_lost_pixels_counts_there_and_nowhere_else():
    photo, reference = clipped_photo(), np.full((40, 60, 3), 120, np.uint8)
    output = reference.copy()
    output[:, :30] = (200, 40, 40)  # wrong, where nothing was lost
    right = metrics.measure(photo, output, reference)
    assert right.lost_colour == right.lost_chroma == 0 and right.colour > 10
    output[:, 30:] = (140, 140, 140)  # brightness alone
    brighter = metrics.measure(photo, output, reference)
    assert brighter.lost_colour > 5 and brighter.lost_chroma == pytest.approx(0, abs=0.02)
    output[:, 30:] = (140, 120, 100)
    assert metrics.measure(photo, output, reference).lost_chroma > 10
    unclipped = metrics.measure(reference, output, reference)
    assert all(np.isnan(getattr(unclipped, k)) for k in ("lost_colour", "lost_chroma", "bands"))


@pytest.mark.parametrize("rows", [7, 1000])
def test_bands_are_colour_edges_along_clipped_borders_over_the_reference_s(rows, monkeypatch):
    monkeypatch.setattr(metrics, "COLOUR_PIXELS", rows * 60)
    photo = clipped_photo()
    reference = picture(40, 60, 3)
    assert metrics.measure(photo, reference, reference).bands == pytest.approx(1)
    gray = np.repeat(reference.mean(2, keepdims=True), 3, 2).astype(np.uint8)
    assert metrics.measure(photo, gray, reference).bands < 0.1
    band = reference.copy()
    band[:, 29:31] = (255, 0, 255)
    assert metrics.measure(photo, band, reference).bands > 1.3
    far = reference.copy()
    far[:, 5:9] = (255, 0, 255)
    assert metrics.measure(photo, far, reference).bands == pytest.approx(1)


def test_grey_is_the_share_of_blown_pixels_that_are_white_in_the_reference_alone():
    photo = np.full((40, 60, 3), 255, np.uint8)
    reference, output = photo.copy(), photo.copy()
    reference[:, :30] = 180  # rightly grey
    output[:20] = 200
    assert metrics.measure(photo, output, reference).grey == pytest.approx(0.5)
    assert metrics.measure(photo, photo, reference).grey == 0
    assert np.isnan(metrics.measure(photo // 2, output, reference).grey)


def test_noise_is_grain_where_the_photo_is_dark():
    photo = np.full((40, 60, 3), 200, np.uint8)
    photo[:, :30] = 10
    flat = np.full((40, 60, 3), 90, np.uint8)
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 6, (40, 60, 1)).repeat(3, 2)
    noisy = (flat + grain).astype(np.uint8)
    bright_only, dark_only = flat.copy(), flat.copy()
    bright_only[:, 32:], dark_only[:, :28] = noisy[:, 32:], noisy[:, :28]
    assert metrics.measure(photo, bright_only, None).noise == 0
    assert 3 < metrics.measure(photo, dark_only, None).noise < 6
    assert np.isnan(metrics.measure(flat, noisy, None).noise)
