"""What works on torch tensors works on NumPy arrays alike."""

import numpy as np
import pytest
import torch

from evenlight.stages import pixels
from evenlight.stages.arrays import sigmoid
from evenlight.stages.corrector import apply
from evenlight.stages.corrector.correction import Correction
from evenlight.stages.priors import tone
from evenlight.stages.priors.ladder import clipped


def photo(height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth colours with clipped ends, float32 1,3,H,W."""
    coarse = np.random.default_rng(0).uniform(-0.2, 1.2, (1, 3, 6, 8)).astype(np.float32)
    return pixels.enlarged(coarse, height, width).clip(0, 1)


def alike(work, *arrays: np.ndarray, within: float = 5e-6) -> None:
    """The work gives the same on both, in the same shape and type."""
    ours, torchs = work(*arrays), work(*map(torch.from_numpy, arrays))
    assert isinstance(ours, np.ndarray) and isinstance(torchs, torch.Tensor)
    torchs = torchs.numpy()
    assert ours.shape == torchs.shape and ours.dtype == torchs.dtype
    np.testing.assert_allclose(ours, torchs, atol=within, rtol=0)


@pytest.mark.parametrize("family", tone.CURVES)
@pytest.mark.parametrize("t", [-2.0, -0.3, 0.0, 1.4])
def test_curves_and_tables(family, t):
    alike(lambda x: tone.apply(family, x, t), photo())
    levels = np.arange(256)
    ours, torchs = (tone.on_bytes(family, levels, t, xp) for xp in (np, None))
    assert np.abs(ours.astype(int) - torchs).max() <= 1


def test_the_rule_s_strength():
    dark = np.concatenate([photo() * share for share in (0.2, 0.5, 1.0)])
    alike(lambda x: tone.rule_strength(x, "film"), dark)
    alike(lambda x: tone.rule_strength(x, "film"), np.zeros((1, 3, 8, 8), np.float32))


@pytest.mark.parametrize("size", [(20, 30), (96, 128), (20, 128), (48, 7), (1, 1)])
def test_resizing_smoothing_and_fitting(size):
    alike(lambda x: pixels.resize(x, *size), photo())
    alike(lambda x: pixels.enlarged(x, *size), photo())
    alike(lambda x: pixels.fit(x, *size), photo())


@pytest.mark.parametrize("radius", [0, 1, 4, 40])
def test_smoothing(radius):
    alike(lambda x: pixels.box_mean(x, radius), photo())
    alike(lambda x: line(x, radius), photo())


def line(rgb, radius: int):
    guide = pixels.luma(rgb)
    a, b = pixels.coefficients(guide, rgb, radius=radius, eps=1e-3)
    return a * guide + b


def test_means_shares_bytes_and_sigmoids():
    alike(lambda x: pixels.pooled(x, 5), photo())
    alike(clipped, photo())
    alike(pixels.to_bytes, photo())
    alike(sigmoid, 400 * photo() - 200)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("strength", [-1.2, 0.9])
def test_corrections_at_full_size(dtype, strength):
    top = np.iinfo(dtype).max
    large = (pixels.enlarged(photo(), 150, 200)[0].transpose(1, 2, 0) * top).astype(dtype)
    small, ramp = photo(), np.linspace(-0.3, 0.3, 64, dtype=np.float32)
    maps = np.broadcast_to(ramp, small.shape).copy()
    whole = np.full((1, 1, *small.shape[2:]), strength, np.float32)

    def corrected(*arrays):
        rgb, whole, part = arrays
        answer = Correction(whole, part + strength, part[:, :1], part, 0.1 * part)
        return apply.apply_maps(large, apply.fit_maps(rgb, answer, "film"))

    ours, torchs = (
        corrected(*map(kind, (small, whole, maps))) for kind in (np.asarray, torch.from_numpy)
    )
    assert ours.dtype == dtype and not np.array_equal(ours, large)
    assert np.abs(ours.astype(int) - torchs).max() <= 1 + top // 50_000
