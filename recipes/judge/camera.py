"""Good photos mis-exposed by a random camera, in float, quantised once.

Three kinds of camera: the film curve with a shape of its own, a gain in linear light with a
shoulder and an S-curve, and the response between two frames of a real bracket.  Noise grows in the
dark, channels clip on their own, some shots are JPEGs.  Where a photo is darkened, its blown areas
get texture first: a flat plateau below white would give the answer away.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from recipes.judge.photos import Bracket, Photo

Array = NDArray[np.float32]
LEVELS = 1024  # of a response curve
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
NOISE = np.random.default_rng(11).standard_normal((512, 512, 3), dtype=np.float32)


def responses(brackets: Sequence[Bracket]) -> list[tuple[float, Array]]:
    """(signed exposure, curve) from the best frame of each scene to each of its other frames.

    The curve maps LEVELS values in [0, 1] to [0, 1]: the one monotone map that takes the histogram
    of the best frame to the other's, all channels pooled.
    """
    found = []
    for bracket in brackets:
        best = _cumulative(bracket.frames[bracket.best])
        for frame in bracket.frames:
            shift = float(frame.mean() - bracket.frames[bracket.best].mean()) / 255
            if abs(shift) > 0.03:
                curve = np.interp(best, _cumulative(frame), np.arange(256) / 255)
                fine = np.interp(np.linspace(0, 255, LEVELS), np.arange(256), curve)
                found.append((shift, _smoothed(fine)))
    return found


def mis_exposed(
    photo: Photo, stops: float, real: Sequence[tuple[float, Array]], rng: np.random.Generator
) -> Photo:
    """What a camera that erred by about `stops` would have kept.  uint8 H,W,3 in and out."""
    x = photo.astype(np.float32) / 255
    x += (rng.random(x.shape, np.float32) - 0.5) / 255  # no combs in the histogram
    x = x.clip(0, 1)
    if rng.random() < 0.4:
        x = _another_look(x, rng)
    kind = rng.random()
    texture = _texture(x, rng) if stops < 0 else None
    if kind < 0.4:
        y = _film(x, stops, texture, rng)
    elif kind < 0.7 or not real:
        y = _linear(x, stops, texture, rng)
    else:
        y = _real(x, stops, texture, real, rng)
    return kept(y, stops, rng)


def as_good(photo: Photo, rng: np.random.Generator) -> Photo:
    """A good photo that stays one: as it is, or with a little of what cameras add.  uint8."""
    if rng.random() < 0.5:
        return photo
    x = photo.astype(np.float32) / 255 + (rng.random(photo.shape, np.float32) - 0.5) / 255
    return kept(x, 0.0, rng)


def uneven(
    photo: Photo, labels: NDArray[np.uint8], rng: np.random.Generator
) -> tuple[Photo, list[int]]:
    """A good photo with one to three regions exposed otherwise than the rest, and maybe all wrong.

    Returns the shot and the labels of the regions that differ.
    """
    areas = np.bincount(labels.ravel(), minlength=2)[1:] / labels.size
    large = np.flatnonzero((areas > 0.02) & (areas < 0.7)) + 1
    stops = np.zeros(labels.shape, np.float32)
    chosen: list[int] = []
    if len(large) and rng.random() < 0.7:
        chosen = [
            int(x) for x in rng.choice(large, min(len(large), int(rng.integers(1, 4))), False)
        ]
        side = rng.choice([-1, 1])
        for label in chosen:
            stops[labels == label] = side * rng.uniform(0.5, 3.2)
        blur = rng.uniform(0.5, 5)
        stops = cv2.GaussianBlur(stops, (0, 0), blur)
    if rng.random() < 0.5:
        stops += np.float32((0.2 + 3 * rng.beta(1, 1.5)) * rng.choice([-1, 1]))
    x = (photo.astype(np.float32) + rng.random(photo.shape, np.float32) - 0.5).clip(0, 255) / 255
    b = rng.uniform(1.2, 2.2)
    exposure = -np.log1p(-(x.clip(0, 0.998) ** (1 / b))) * np.exp(0.45 * stops)[..., None]
    y = (1 - np.exp(-exposure)).clip(1e-6, 1) ** b
    sigma = np.float32(rng.uniform(0, 0.012))
    noise = NOISE[: y.shape[0], : y.shape[1]]
    return ((y + sigma * noise).clip(0, 1) * 255 + 0.5).astype(np.uint8), chosen


def _film(x: Array, stops: float, texture: Array | None, rng: np.random.Generator) -> Array:
    b = rng.uniform(1.2, 2.2)
    exposure = -np.log1p(-(x.clip(0, 0.998) ** (1 / b)))
    if texture is not None:
        exposure += texture * rng.uniform(0, 4)
    y = (1 - np.exp(-exposure * np.float32(np.exp(0.45 * stops)))).clip(1e-6, 1) ** b
    return y / rng.uniform(0.88, 1) if stops > 0 else y


def _linear(x: Array, stops: float, texture: Array | None, rng: np.random.Generator) -> Array:
    gamma = rng.uniform(1.8, 2.6)
    light = x**gamma
    if texture is not None:
        light *= 1 + texture * rng.uniform(0, 3)
    light *= np.float32(2**stops)
    knee = rng.uniform(0.6, 1) if rng.random() < 0.6 else 1.0
    if knee < 1:
        bent = knee + (1 - knee) * (1 - np.exp(-np.maximum(0, light - knee) / (1 - knee)))
        light = np.where(light <= knee, light, bent)
    return light.clip(0, 1) ** np.float32(1 / gamma)


def _real(
    x: Array, stops: float, texture: Array | None, real: Sequence[tuple[float, Array]],
    rng: np.random.Generator,
) -> Array:  # fmt: skip
    """A real camera's response on the wanted side, sometimes only part of the way."""
    for _ in range(20):
        shift, curve = real[int(rng.integers(len(real)))]
        if shift * stops > 0:
            break
    part = np.float32(rng.uniform(0.3, 1))
    y = (1 - part) * x + part * curve[(x * (LEVELS - 1)).astype(np.int32)]
    if texture is not None:  # what was blown shows again, up to white
        y += (1 - y) * (1 - np.exp(-texture * rng.uniform(0, 2)))
    return y.astype(np.float32)


def _another_look(x: Array, rng: np.random.Generator) -> Array:
    """Another contrast and saturation: cameras do not print as retouchers do."""
    amount = np.float32(rng.uniform(-0.5, 0.3))
    x = x + amount * (x * x * (3 - 2 * x) - x)
    gray = (x @ LUMA)[..., None]
    return (gray + np.float32(rng.uniform(0.7, 1.2)) * (x - gray)).clip(0, 1)


def _texture(x: Array, rng: np.random.Generator) -> Array:
    """Where nothing is known above white: smooth light that exceeds it.  H,W,1, from 0 up."""
    coarse = rng.random((int(rng.integers(3, 9)),) * 2).astype(np.float32)
    field = cv2.resize(coarse, x.shape[1::-1], interpolation=cv2.INTER_CUBIC).clip(0, 1) ** 2
    blown = ((x.max(2) - 0.94) / 0.06).clip(0, 1)
    return (blown * field)[..., None]


def kept(y: Array, stops: float, rng: np.random.Generator) -> Photo:
    """With noise, in eight bits, and for some as a JPEG.  stops: of the whole shot."""
    if rng.random() < 0.6:
        sigma = rng.uniform(0, 0.015) * (1.5 if stops < -1 else 1)
        top, left = rng.integers(0, len(NOISE) - np.array(y.shape[:2]) + 1)
        noise = NOISE[top : top + y.shape[0], left : left + y.shape[1]]
        y = y + np.float32(sigma) * noise * np.sqrt(0.3 + y.clip(0, 1))
    photo = (y.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    if rng.random() < 0.4:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(75, 98))]
        photo = cv2.imdecode(cv2.imencode(".jpg", photo, quality)[1], cv2.IMREAD_COLOR)
    return photo


def _cumulative(frame: Photo) -> NDArray[np.float64]:
    """Share of values up to each level, rising strictly.  256."""
    counts = np.bincount(frame.ravel(), minlength=256) + 1e-3
    return np.cumsum(counts) / counts.sum()


def _smoothed(curve: NDArray) -> Array:
    kernel = np.hanning(41) / np.hanning(41).sum()
    return np.convolve(np.pad(curve, 20, mode="edge"), kernel, mode="valid").astype(np.float32)
