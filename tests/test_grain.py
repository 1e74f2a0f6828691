"""Grain in shadows: measured where it lies, taken out without detail."""

import numpy as np
import pytest

from evenlight.stages.corrector import grain


def grainy(level: float, deviation: float, dtype: type = np.uint8) -> np.ndarray:
    """A flat grey photo of that level with grain, both of 255."""
    noise = np.random.default_rng(0).standard_normal((300, 400, 1)).repeat(3, axis=2)
    top = np.iinfo(dtype).max
    return ((level + deviation * noise) * top / 255).round().clip(0, top).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("deviation", [1.0, 2.0, 4.0])
def test_grain_is_measured_in_shadows(deviation: float, dtype: type) -> None:
    found = grain.grain_of(grainy(24, deviation, dtype)) * 255
    assert 0.8 * deviation < found < 1.05 * deviation  # a low quantile: what varies least


def test_lines_and_soft_texture_are_no_grain() -> None:
    rows, columns = np.mgrid[:300, :400]
    waves = 22 + 10 * np.sin(columns / 4) * np.sin(rows / 5)  # deviation 5
    waves[:, 200:] += 10  # and an edge
    photo = waves.round().astype(np.uint8)[..., None].repeat(3, axis=2)
    assert grain.grain_of(photo) * 255 < 0.5


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_photo_without_shadows_has_none(level: int) -> None:
    assert grain.grain_of(np.full((80, 90, 3), level, np.uint8)) == 0


def smoothed(photo_HW3: np.ndarray, deviation: float) -> np.ndarray:
    """Photo and deviation of the range 0 to 255."""
    planes = np.moveaxis(photo_HW3, 2, 0) / np.float32(255)
    return 255 * np.moveaxis(grain.smoothed(planes, deviation / 255, 1.0), 0, 2)


def test_grain_goes_edges_and_lights_stay() -> None:
    clean = np.full((300, 400, 3), 20, np.float32)
    clean[:, 200:] = 60
    clean[200:] = 200
    noise = 2 * np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    calm = smoothed(clean + noise, 2)
    left = np.abs(calm - clean)
    dark = np.s_[10:190, 10:190]
    assert left[dark].mean() < 0.45 * np.abs(noise[dark]).mean()
    assert np.abs(calm - clean - noise)[200:].max() < 1e-3  # above FADES_AT
    step = calm[:190, 202].mean() - calm[:190, 197].mean()
    assert step == pytest.approx(40, abs=2)


def test_colour_grain_goes_coloured_detail_stays() -> None:
    clean = np.full((200, 300, 3), 30, np.float32)
    clean[:, ::20] = (60, 20, 20)  # red lines, one pixel wide
    noise = np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    calm = smoothed(clean + noise, 0.6)
    red = calm[5:-5, 20:-20:20].mean((0, 1))
    assert red[0] - red[1] == pytest.approx(40, abs=8)
    between = (calm - clean)[:, 10::20]
    assert between.std() < 0.6 * noise.std()


def test_share_of_nothing_changes_nothing() -> None:
    planes = np.moveaxis(grainy(24, 2), 2, 0).astype(np.float32) / 255
    assert np.array_equal(grain.smoothed(planes, 2 / 255, 0.0), planes)
