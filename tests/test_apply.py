"""Correction at full size: identity, strips against whole, bit depths, edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.corrector import apply
from evenlight.stages.corrector.correction import Correction, correct
from evenlight.stages.photos.canvas import working
from evenlight.stages.pixels import luma, to_bytes, to_float
from evenlight.stages.priors import tone


def noise_photo(height: int, width: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    rng = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(1, 3, 9, 9, generator=rng), (height, width), mode="bicubic")
    return (smooth[0].permute(1, 2, 0).clamp(0, 1).numpy() * np.iinfo(dtype).max).astype(dtype)


def corrected_by(photo: np.ndarray, strength: Tensor | float, **others: Tensor) -> apply.Maps:
    """Maps of a correction that is given for the small photo itself."""
    rgb = to_float(photo)
    t = torch.as_tensor(strength).expand_as(rgb)
    nothing = torch.zeros_like(rgb)
    parts = {
        "given_B1HW": nothing[:, :1] + t.mean(), "strength_B3HW": t, "cover_B1HW": nothing[:, :1],
        "shift_B3HW": nothing, "residual_B3HW": nothing,
    }  # fmt: skip
    return apply.fit_maps(rgb, Correction(**(parts | others)), "film")


def half_brighter(photo: np.ndarray) -> apply.Maps:
    """Brighten the left half, darken the right, fill what is lost, add a little."""
    rgb = to_float(photo)
    strength = torch.full_like(rgb, 0.8)
    strength[..., rgb.shape[3] // 2 :] = -1.5
    ramp = torch.linspace(0, 0.5, rgb.shape[2]).view(1, 1, -1, 1).expand_as(rgb)
    return corrected_by(
        photo, strength, cover_B1HW=ramp[:, :1], shift_B3HW=-ramp, residual_B3HW=0.02 * ramp
    )


@given(
    st.integers(16, 300), st.integers(16, 300), st.sampled_from([np.uint8, np.uint16]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_strength_zero_and_a_correction_of_nothing_leave_every_bit(height, width, dtype):
    photo = noise_photo(height, width, dtype)
    small = working(photo, 64)
    assert np.array_equal(apply.apply_maps(photo, half_brighter(small), strength=0), photo)
    assert np.array_equal(apply.apply_maps(photo, corrected_by(small, 0.0)), photo)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_window_is_that_part_of_the_whole_grain_taken_out_alike(monkeypatch, dtype):
    monkeypatch.setattr(apply, "STRIP_PIXELS", 40 * 7)
    photo = noise_photo(90, 120, dtype) // 4
    noise = np.random.default_rng(0).normal(0, np.iinfo(dtype).max / 100, photo.shape)
    noise[:, 60:] *= 3  # in the window it is not as in the whole
    photo = np.clip(photo + noise, 0, np.iinfo(dtype).max).astype(dtype)
    maps = corrected_by(working(photo, 64), 1.0)
    whole = apply.apply_maps(photo, maps, 0.8)
    for window in ((slice(0, 90), slice(0, 120)), (slice(31, 60), slice(77, 118))):
        part = apply.apply_maps(photo, maps, 0.8, window)
        assert part.dtype == dtype and part.shape == whole[window].shape
        away = np.abs(part.astype(float) - whole[window]).max()
        assert away <= np.iinfo(dtype).max / 255  # rounding of vectorised logarithms


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
    bright = corrected_by(photo, 1.0)
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
    corrected = apply.apply_maps(photo, corrected_by(small, strength))
    columns = corrected[256, :, 0].astype(int)
    assert np.ptp(columns[:250]) <= 6  # no halo on either side of the edge
    assert np.ptp(columns[262:]) <= 6


def test_a_fill_ends_where_the_photo_s_own_values_say_at_full_size():
    photo = np.full((512, 512, 3), 120, np.uint8)
    photo[:, 259:] = 255  # not on the grid of the small copy
    small = working(photo, 64)
    blue = torch.tensor([-0.2, 0.0, 0.1]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    filled = apply.apply_maps(photo, corrected_by(small, -1.0, shift_B3HW=blue)).astype(int)
    plain = apply.apply_maps(photo, corrected_by(small, -1.0)).astype(int)
    assert np.array_equal(filled[:, :259], plain[:, :259])
    assert np.abs((filled - plain)[:, 259:] - [-51, 0, 25.5]).max() <= 1


def test_at_half_strength_a_fill_starts_from_the_white_of_half_strength():
    photo = np.full((64, 64, 3), 255, np.uint8)
    half = apply.apply_maps(
        photo, corrected_by(photo, -1.0, cover_B1HW=torch.ones(1, 1, 64, 64)), 0.5
    )
    white = tone.apply("film", torch.ones(1), -0.5)
    assert np.abs(half - float(255 * white)).max() <= 1


def test_a_corrector_answers_the_same_at_the_working_size_and_in_strips():
    """Strips and maps apply what `correct` does, where nothing is carried up."""
    photo = noise_photo(64, 48)
    maps = half_brighter(photo)
    rgb = to_float(photo)
    t, residual = (maps.a * luma(rgb) + maps.b).split(3, 1)
    wanted = correct(
        rgb, Correction(maps.given, t, maps.fill[:, :1], maps.fill[:, 1:], residual), "film"
    )
    found = apply.apply_maps(photo, maps)
    away = np.abs(found.astype(int) - to_bytes(wanted).numpy())
    assert away.max() <= 1 and away.mean() < 0.03  # strengths of its table are rounded


def grainy(dtype: type = np.uint8) -> np.ndarray:
    """A dark flat photo with grain of deviation 2 of 255."""
    noise = np.random.default_rng(0).standard_normal((160, 200, 3))
    top = np.iinfo(dtype).max
    return ((22 + 2 * noise) * top / 255).round().clip(0, top).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grain_goes_before_shadows_are_lifted_and_in_proportion(dtype):
    photo, top = grainy(dtype), np.iinfo(dtype).max / 255

    def left(strength: float) -> float:
        """Of the grain that the curve alone would show."""
        maps = corrected_by(working(photo, 64), strength)
        lifted = tone.apply("film", torch.from_numpy(photo / (top * 255)), strength).numpy() * 255
        return float((apply.apply_maps(photo, maps) / top).std() / lifted.std())

    assert left(1.2) < 0.4
    assert left(1.2) < left(0.25) < left(0.05) < 1
    assert left(-0.5) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_strips_of_a_grainy_photo_give_the_same_as_the_whole(monkeypatch, rows):
    photo = grainy()
    maps = corrected_by(working(photo, 64), 1.0)
    whole = apply.apply_maps(photo, maps)
    monkeypatch.setattr(apply, "STRIP_PIXELS", rows * photo.shape[1])
    strips = apply.apply_maps(photo, maps)
    assert np.abs(strips.astype(int) - whole).max() <= 1
