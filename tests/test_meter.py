"""The meter reads the scene, not its exposure, and knows good photos by their tones."""

import pytest
import torch
from skimage import data
from torch.nn import functional as F

from evenlight.cache.errors import EnvironmentLacks
from evenlight.stages.pixels import luma, to_float
from evenlight.stages.priors import meter, tone


def scene(seed: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (128, 192), mode="bicubic").clamp(0.05, 0.95)


def target(photo: torch.Tensor) -> torch.Tensor:
    return meter.read(photo, "film").target


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exposure", [-1.0, 0.7])
def test_a_scene_wants_the_same_brightness_however_it_was_exposed(seed, exposure):
    photo = scene(seed)
    moved = tone.apply("film", photo, exposure)
    matrix = [meter.matrix_strength(x, "film") for x in (photo, moved)]
    assert abs(float(matrix[0] - matrix[1]) - exposure) < 0.02
    assert abs(float(target(photo) - target(moved))) < 0.1  # the tone reading sees the error too


@pytest.mark.parametrize("family", ["film", "ps", "ev", "gamma"])
def test_the_strength_brings_the_photo_to_its_target_in_every_tone_family(family):
    photo = tone.apply("film", scene(1), -0.8)
    reading = meter.read(photo, family)
    reached = tone.apply(family, photo, reading.strength.view(1, 1, 1, 1))
    assert abs(float(luma(reached).mean() - reading.target[0])) < 0.01


@pytest.mark.parametrize("value", [0.0, 0.02, 0.5, 0.99, 1.0])
def test_photos_of_one_tone_get_a_finite_target_in_the_middle(value):
    reading = meter.read(torch.full((2, 3, 40, 30), value), "film")
    assert reading.target.shape == reading.strength.shape == reading.log_odds.shape == (2,)
    assert bool(((reading.target >= 0) & (reading.target <= 1)).all())
    assert bool(reading.log_odds.isfinite().all())


def test_scenes_want_different_brightness():
    targets = torch.cat([target(scene(seed)) for seed in range(8)])
    assert float(targets.max() - targets.min()) > 0.01
    assert bool(((targets > 0.25) & (targets < 0.65)).all())


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
@pytest.mark.parametrize("ev", [-2.0, 2.0])
def test_a_good_photo_is_likelier_to_be_good_than_its_badly_exposed_copies(name, ev):
    photo = to_float(getattr(data, name)())
    copy = tone.apply("ev", photo, ev / tone.EV_PER_STRENGTH)
    good, bad = (float(meter.read(x, "film").log_odds[0]) for x in (photo, copy))
    assert good > bad + 1
    assert bad < -1


def test_photos_are_read_alike_alone_and_in_a_batch():
    photos = torch.cat([scene(1), scene(2)])
    both = meter.read(photos, "film")
    alone = [meter.read(photo[None], "film") for photo in photos]
    for name in ("target", "strength", "log_odds"):
        one_by_one = torch.cat([getattr(reading, name) for reading in alone])
        torch.testing.assert_close(getattr(both, name), one_by_one, atol=1e-4, rtol=1e-4)


def test_black_that_holds_no_detail_does_not_ask_for_light():
    lights = scene(3) * 0.5
    night = F.pad(lights, (0, 0, 384, 0), value=1 / 255)  # three quarters are black sky
    by_rule = float(tone.rule_strength(night, "film")[0])
    asked = float(meter.read(night, "film").strength[0])
    assert asked < by_rule - 0.5
    assert asked > float(meter.read(lights, "film").strength[0]) - 0.5


def test_a_dark_photo_with_detail_everywhere_is_brightened_in_full():
    photo = tone.apply("film", scene(1), -1.5)
    assert float(photo.min()) > 0
    reading = meter.read(photo, "film")
    assert float(reading.strength[0]) > 1


@pytest.mark.parametrize("content", [None, b"", b"not tensors"])
def test_missing_or_damaged_weights_are_named(content, tmp_path, monkeypatch):
    file = tmp_path / "meter.safetensors"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr("evenlight.stages.weights.FOLDER", tmp_path)
    meter._networks.cache_clear()
    try:
        with pytest.raises(EnvironmentLacks, match=str(file)):
            meter.read(scene(0), "film")
    finally:
        meter._networks.cache_clear()
