"""The meter reads the scene and not the exposure of the photo."""

import pytest
import torch
from torch.nn import functional as F

from evenlight.stages.pixels import luma
from evenlight.stages.priors import meter, tone


def scene(seed: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (128, 192), mode="bicubic").clamp(0.05, 0.95)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exposure", [-1.0, 0.7])
def test_a_scene_wants_the_same_brightness_however_it_was_exposed(seed, exposure):
    photo = scene(seed)
    moved = tone.apply("film", photo, exposure)
    assert abs(float(meter.target_luma(photo) - meter.target_luma(moved))) < 0.005


@pytest.mark.parametrize("family", ["film", "ps", "ev", "gamma"])
def test_the_strength_brings_the_photo_to_its_target_in_every_tone_family(family):
    photo = tone.apply("film", scene(1), -0.8)
    reached = tone.apply(family, photo, meter.strength(photo, family).view(1, 1, 1, 1))
    assert abs(float(luma(reached).mean() - meter.target_luma(photo)[0])) < 0.01


@pytest.mark.parametrize("value", [0.0, 0.02, 0.5, 0.99, 1.0])
def test_photos_of_one_tone_get_a_finite_target_in_the_middle(value):
    target = meter.target_luma(torch.full((2, 3, 40, 30), value))
    assert target.shape == (2,)
    assert bool(((target >= 0) & (target <= 1)).all())


def test_scenes_want_different_brightness():
    targets = torch.cat([meter.target_luma(scene(seed)) for seed in range(8)])
    assert float(targets.max() - targets.min()) > 0.01
    assert bool(((targets > 0.3) & (targets < 0.65)).all())
