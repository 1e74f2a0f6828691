"""Tone operators keep their promises for every value and strength, gradients included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evenlight.stages.pixels import luma
from evenlight.stages.priors import tone
from evenlight.stages.settings import FAMILIES

strengths = st.floats(-2.5, 2.5)
values = st.floats(0.0, 1.0)
families = st.sampled_from(FAMILIES)
RAMP = torch.linspace(0, 1, 1021, dtype=torch.float64)


def test_every_family_of_the_settings_has_a_curve():
    assert set(tone.CURVES) == set(FAMILIES)


@given(families, values)
@settings(deadline=None)
def test_strength_zero_is_the_identity(family, x):
    assert float(tone.apply(family, torch.tensor(x), 0.0)) == pytest.approx(x, abs=2e-6)


@given(families, strengths)
@settings(deadline=None)
def test_curves_rise_with_the_pixel_value_and_stay_in_range(family, t):
    y = tone.apply(family, RAMP, t)
    assert (y.diff() >= -1e-9).all()
    assert float(y[0]) == pytest.approx(0, abs=1e-9)
    assert float(y.max()) <= 1 + 1e-6


@given(families, strengths, strengths)
@settings(deadline=None)
def test_curves_rise_with_the_strength(family, t1, t2):
    low, high = sorted((t1, t2))
    gain = tone.apply(family, RAMP, high) - tone.apply(family, RAMP, low)
    dip = 4e-4 if family == "ev" else 1e-9  # the shoulder of `ev` sets in at white
    assert float(gain.min()) >= -dip


@given(st.sampled_from(["film", "gamma"]), st.floats(0, 2.5))
@settings(deadline=None)
def test_white_stays_white_unless_a_photo_is_darkened(family, t):
    assert float(tone.apply(family, torch.tensor(1.0), t)) == pytest.approx(1, abs=1e-6)


def test_clipped_white_falls_in_step_with_the_levels_below_it():
    levels = tone.apply("film", torch.tensor([253.0, 254.0, 255.0]) / 255, -1.0) * 255
    below, step = levels.diff().tolist()
    assert 0 < step < 2 * below


def test_curves_equal_their_formulas_on_every_8_bit_value():
    x = torch.arange(256, dtype=torch.float64) / 255
    for t in (-2.0, -0.5, 0.3, 1.7):
        g = torch.tensor(t, dtype=torch.float64).exp()
        w = x * (1 + math.expm1(10 * min(t, 0)) / 510)  # the white point when darkening
        expected = {
            "film": (1 - (1 - w ** (1 / 1.6)) ** g) ** 1.6,
            "gamma": x ** (1 / g),
        }
        for family, y in expected.items():
            assert torch.allclose(tone.apply(family, x, t), y, atol=1e-12), (family, t)
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    darkened = tone.linear_to_srgb(linear * 2**-1.6)
    assert torch.allclose(tone.apply("ev", x, -1.0), darkened, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_at_black_white_and_extreme_strengths(family):
    x = torch.tensor([0.0, 1e-8, 1e-4, 0.5, 1 - 1e-4, 1.0]).repeat(7, 1).requires_grad_()
    t = torch.tensor([-3.0, -2.5, -1e-9, 0.0, 1e-9, 2.5, 3.0])[:, None].requires_grad_()
    tone.apply(family, x, t).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert t.grad is not None and torch.isfinite(t.grad).all()


def test_strengths_broadcast_and_half_precision_is_computed_in_float32():
    x = torch.rand(2, 3, 4, 5)
    t = torch.linspace(-1, 1, 2)[:, None, None, None]
    y = tone.apply("film", x, t)
    assert torch.equal(y[1], tone.apply("film", x[1], 1.0))
    assert tone.apply("film", x.bfloat16(), t).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_luma_rule_reaches_its_target(family):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, 32, 32, generator=generator) * torch.tensor([0.2, 0.6, 1.0]).view(
        3, 1, 1, 1
    )
    t = tone.rule_strength(x, family)
    reached = luma(tone.apply(family, x, t[:, None, None, None])).mean((1, 2, 3))
    assert torch.allclose(reached, torch.full((3,), tone.RULE_TARGET), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_answers_sensibly_for_black_white_and_out_of_reach(family):
    x = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8), torch.full((3, 8, 8), 1e-3)])
    t = tone.rule_strength(x, family)
    assert torch.isfinite(t).all() and (t.abs() <= 3).all()
    assert float(t[0]) == 0
    assert float(t[2]) > 2
    assert float(t[1]) == 0 if family == "gamma" else float(t[1]) < 0


@pytest.mark.parametrize("family", tone.CURVES)
def test_a_table_is_the_curve_within_a_tenth_of_a_level(family):
    levels = torch.arange(256).repeat(500, 1) / 255
    strengths = torch.linspace(-1.7, 1.3, 500)[:, None].expand_as(levels).contiguous()
    found = tone.Table(family, -1.7, 1.3).apply(levels, strengths)
    assert (found - tone.apply(family, levels, strengths)).abs().max() * 255 < 0.1
    unchanged = tone.Table(family, -0.5, 0.5).apply(levels, torch.zeros_like(levels))
    assert torch.equal((unchanged * 255).round(), levels * 255)
