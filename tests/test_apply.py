"""Correction at full size: identity, strips against whole, bit depths, edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from evenlight.stages.corrector import apply
from evenlight.stages.photos.canvas import working
from evenlight.stages.pixels import to_float
from evenlight.stages.priors import tone


def noise_photo(height: int, width: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    rng = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(1, 3, 9, 9, generator=rng), (height, width), mode="bicubic")
    return (smooth[0].permute(1, 2, 0).clamp(0, 1).numpy() * np.iinfo(dtype).max).astype(dtype)


def half_brighter(photo: np.ndarray) -> apply.Maps:
    """Brighten the left half, darken the right, a little of its own content on top."""
    rgb = to_float(photo)
    strength = torch.full_like(rgb, 0.8)
    strength[..., rgb.shape[3] // 2 :] = -0.5
    return apply.fit_maps(rgb, strength, torch.full_like(rgb, 0.01), "film")


def nothing(photo: np.ndarray) -> apply.Maps:
    rgb = to_float(photo)
    return apply.fit_maps(rgb, torch.zeros_like(rgb), torch.zeros_like(rgb), "film")


@given(
    st.integers(16, 300), st.integers(16, 300), st.sampled_from([np.uint8, np.uint16]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_strength_zero_and_an_untrained_corrector_leave_every_bit(height, width, dtype):
    photo = noise_photo(height, width, dtype)
    small = working(photo, 64)
    assert np.array_equal(apply.apply_maps(photo, half_brighter(small), 0), photo)
    assert np.array_equal(apply.apply_maps(photo, nothing(small)), photo)


@pytest.mark.parametrize("shape", [(100, 150), (151, 77), (400, 300), (37, 1000)])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_strips_give_the_same_photo_as_the_whole(monkeypatch, shape, rows):
    photo = noise_photo(*shape)
    maps = half_brighter(working(photo, 96))
    whole = apply.apply_maps(photo, maps)
    monkeypatch.setattr(apply, "STRIP_PIXELS", rows * shape[1])
    strips = apply.apply_maps(photo, maps)
    assert np.abs(strips.astype(int) - whole).mean() < 1 / 255
    assert np.abs(strips.astype(int) - whole).max() <= 1


def test_sixteen_bits_stay_sixteen_and_agree_with_eight():
    deep = noise_photo(120, 160, np.uint16)
    shallow = (deep // 257).astype(np.uint8)
    maps = half_brighter(working(shallow, 96))
    corrected = apply.apply_maps(deep, maps)
    assert corrected.dtype == np.uint16
    assert len(np.unique(corrected)) > 1000
    eight = apply.apply_maps(shallow, maps).astype(float)
    assert np.abs(corrected / 257 - eight).mean() < 1


def test_half_strength_lies_between():
    photo = noise_photo(80, 80)
    bright = apply.fit_maps(
        to_float(photo), torch.full((1, 3, 80, 80), 1.0), torch.zeros(1, 3, 80, 80), "film"
    )
    half = apply.apply_maps(photo, bright, 0.5).astype(int)
    full = apply.apply_maps(photo, bright).astype(int)
    assert (photo <= half).all() and (half <= full).all()
    assert photo.mean() + 5 < half.mean() < full.mean() - 5


def test_a_change_of_strength_follows_the_photo_s_own_edge():
    photo = np.full((512, 512, 3), 40, np.uint8)
    photo[:, 256:] = 200
    small = working(photo, 64)
    strength = torch.zeros(1, 3, 64, 64)
    strength[..., :32] = 1.0
    corrected = apply.apply_maps(photo, apply.fit_maps(
        to_float(small), strength, torch.zeros_like(strength), "film"))  # fmt: skip
    columns = corrected[256, :, 0].astype(int)
    assert np.ptp(columns[:250]) <= 6  # no halo on either side of the edge
    assert np.ptp(columns[262:]) <= 6


def test_blown_pixels_stay_neutral_and_others_keep_their_colour_maps():
    rgb = torch.full((1, 3, 32, 48), 0.6)
    rgb[..., :16] = 1.0
    strength = torch.tensor([-0.9, -0.6, -0.3]).view(1, 3, 1, 1).expand(1, 3, 32, 48)
    maps = apply.fit_maps(rgb, strength, 0.1 * strength, "film")
    pixels = (rgb[0].permute(1, 2, 0) * 255).byte().numpy()
    corrected = apply.apply_maps(pixels, maps).astype(int)
    assert np.ptp(corrected[:, :16], axis=2).max() == 0
    assert np.ptp(corrected[:, 16:], axis=2).min() > 20
    white, uniform = corrected[0, 0, 0], float(tone.apply("film", torch.ones(1), -0.6)) - 0.06
    assert abs(white - 255 * uniform) <= 1
