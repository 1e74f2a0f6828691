"""What a store holds of a photo, by the models that ship, stays as it was when code gets faster.

The values are those of the code before it was made fast. Where a change moves them further than is
allowed here, raise SCHEMA (cache/schema.py), so that stores are made anew, and take its values;
another judge makes them anew by its fingerprint.
"""

import numpy as np
import pytest
import torch
from skimage import data

from evenlight.pipeline import config
from evenlight.pipeline.demo import PHOTOS, installed_photo
from evenlight.pipeline.models import load_models
from evenlight.pipeline.parts import PARTS, Tools
from evenlight.stages.photos.canvas import working
from evenlight.stages.priors import tone
from evenlight.stages.priors.judge import Judge
from evenlight.stages.priors.tones import LUMA, PERCENTILES, tones

EXPECTED = {  # the first values of an array, and how far from them they may be
    "proto": ([1.024414, 1.074219, 0.921875], 0.02),
    "p3": ([0.519043, 0.154419, 0.381104], 0.02),
    "clip_photo": ([-0.051317, -0.004659, -0.064067], 1e-5),
    "clip_ladder": ([0.068665, 0.022568, -0.033875], 5e-4),
    "clip_regions": ([0.023026, 0.010284, 0.196045], 5e-4),
    "tones": ([0.008001, 0.009193, 0.010682], 1e-5),
    "region_areas": ([0.449565, 0.436132, 0.042055], 1e-3),
    "rule_strength": ([0.863638], 1e-3),
    "scores": ([3.480585, -1.52771, -4.572216], 0.01),
    "p_good": ([0.32638], 1e-3),
    "strength": ([0.34], 0.011),
    "region_strengths": ([0.27739, 0.38222, 0.29114], 0.011),
    "t_map": ([0.66553, 0.66553, 0.66553], 0.005),
    "confidence": ([0.34546, 0.34546, 0.34546], 0.002),
    "pseudo_gt": ([27, 16, 11], 1),
}


@pytest.fixture(scope="module")
def made():
    settings = config.build()
    models = load_models(settings)
    tools = Tools(settings, models, Judge.shipped(models.clip))
    have = {"photo": working(data.coffee() // 2, 512)}
    for part in PARTS[1:]:
        have |= part.make({name: have[name] for name in part.reads}, tools)
    return have


@pytest.mark.parametrize("name", EXPECTED)
def test_an_array_stays_as_it_was(name, made):
    values, allowed = EXPECTED[name]
    found = np.asarray(made[name], np.float64).ravel()[: len(values)]
    np.testing.assert_allclose(found, values, atol=allowed, rtol=0)


def test_a_photo_as_a_whole_stays_as_it_was(made):
    assert made["regions"].max() == 7 and (made["region_labels"] > 0).sum() == 6
    assert made["pseudo_gt"].mean() == pytest.approx(70.0292, abs=0.05)


@pytest.mark.parametrize("family", tone.CURVES)
@pytest.mark.parametrize("t", [-1.3, 0.0, 0.8])
def test_a_table_of_levels_gives_what_the_curve_gives(family, t):
    photo = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    curve = tone.apply(family, torch.from_numpy(photo).float() / 255, t).numpy()
    np.testing.assert_allclose(tone.at_levels(family, photo, t), curve, atol=1e-6)
    np.testing.assert_array_equal(tone.on_bytes(family, photo, t), (curve * 255).round())


@pytest.mark.parametrize("where", PHOTOS)
def test_photos_of_the_demo_have_eight_bits(where):
    photo = installed_photo(*where)
    assert photo.dtype == np.uint8 and 40 < photo.mean() < 200


def test_tones_are_what_they_are_said_to_be():
    random = np.random.default_rng(0)
    photo = random.choice([0, 1, 2, 130, 252, 253, 254, 255], (12, 9, 3)).astype(np.uint8)
    y, x = np.meshgrid(np.linspace(-1, 1, 12), np.linspace(-1, 1, 9), indexing="ij")
    pixels = photo.astype(float)
    luma, largest, smallest = pixels @ LUMA, pixels.max(2), pixels.min(2)
    soft = np.exp(-2 * (x**2 + y**2))
    expected = [
        luma.mean() / 255,
        (largest - smallest).mean() / 255,
        (largest >= 254).mean(),
        (smallest >= 254).mean(),
        (largest <= 1).mean(),
        (luma * soft).sum() / soft.sum() / 255,
        luma[:4].mean() / 255,
        luma[8:].mean() / 255,
    ]
    found = tones(photo)
    np.testing.assert_allclose(found[-8:], expected, atol=1e-6)
    middle = len(PERCENTILES) + int(np.flatnonzero(PERCENTILES == 50)[0])
    below = np.sort(largest, None)[[largest.size // 2 - 1, largest.size // 2]]
    assert below[0] / 255 - 0.01 <= found[middle] <= below[1] / 255 + 0.01
