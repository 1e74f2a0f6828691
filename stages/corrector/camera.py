"""Good photos as a camera that erred would have kept them: clipped, noisy, as a JPEG of eight bits.

The film curve with a shape and a white point of the camera's own, as a whole or with some objects
exposed otherwise than the rest, so that what a mis-exposed photo lacks is known exactly.
"""

# B batch, H W pixels

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from evenlight.stages.pixels import box_mean, luma

SHAPE = (1.3, 2.1)  # of the camera's curve
STOPS = (0.3, 2.0)  # |log gain| of an error; a film strength on a curve of the same shape
WHITE = (0.86, 1.0)  # exposed value that is kept as white, where a photo is over-exposed
NOISE = 0.012  # most of it, at middling values; it is lifted with the shadows
OVER = 0.7  # share of errors that are over-exposure
DIFFER = (0.4, 1.6)  # |log gain| between an object and the rest
CHOSEN = 0.3  # share of regions that differ, in such a shot
SOFT = (1, 6)  # radius of the borders between them, pixels
FULL = 0.998  # where exposure ends that a kept white stands for
JPEG = 0.5  # share of photos that are kept as a JPEG
QUANTUM = (1.5, 9)  # of 255, step of its luma at the lowest frequency: quality 95 to 65


class Camera(NamedTuple):
    """One shot: what is drawn of it at random."""

    shape: float
    gain: float  # log
    white: float
    noise: float
    regions: int = -1  # seed of what each region is exposed otherwise by; -1: none is
    soft: int = 1  # pixels
    quantum: float = 0.0  # of 255, step of a JPEG's luma at the lowest frequency; 0: no JPEG


def draw_camera(generator: Generator, uneven: float) -> Camera:
    """A camera and its error.  uneven: share of shots where objects differ; half of them are right
    as a whole."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    over, differ, right = (uniform(0, 1) for _ in range(3))
    gain = math.copysign(uniform(*STOPS), OVER - over)
    white, shape, noise = uniform(*WHITE), uniform(*SHAPE), uniform(0, NOISE)
    regions = int(torch.randint(2**31, (), generator=generator))
    soft = int(torch.randint(SOFT[0], SOFT[1] + 1, (), generator=generator))
    quantum = uniform(*QUANTUM) if uniform(0, 1) < JPEG else 0.0
    if differ >= uneven:
        regions = -1
    elif right < 0.5:
        gain = 0.0
    return Camera(shape, gain, white if gain > 0 else 1.0, noise, regions, soft, quantum)


def mis_exposed(
    good_B3HW: Tensor, labels_BHW: Tensor, cameras: Sequence[Camera], grain_B3HW: Tensor
) -> Tensor:
    """What each camera kept of its photo.  good: float RGB in [0, 1]; labels: uint8.

    grain: of variance 1, the noise of each.  Returns float32 B,3,H,W, whole multiples of 1/255.
    """

    def each(values: Sequence[float]) -> Tensor:
        return good_B3HW.new_tensor(values).view(-1, 1, 1, 1)

    b = each([camera.shape for camera in cameras])
    gains = [_log_gain(labels, one) for labels, one in zip(labels_BHW, cameras, strict=True)]
    exposure = -torch.log1p(-(good_B3HW.clamp(0, FULL) ** (1 / b))) * torch.stack(gains).exp()
    kept = (-torch.expm1(-exposure)).clamp_min(1e-6) ** b
    kept = kept / each([camera.white for camera in cameras])
    noise_B111 = each([camera.noise for camera in cameras])
    kept = kept + noise_B111 * grain_B3HW * (0.3 + kept).sqrt()  # before white clips it
    kept = blocky(kept.clamp(0, 1), each([camera.quantum for camera in cameras]) / 255)
    return (kept.clamp(0, 1) * 255).round() / 255


def blocky(rgb_B3HW: Tensor, quantum_B111: Tensor) -> Tensor:
    """Pictures as JPEG keeps them: cosines of 8 x 8 blocks in steps that grow with frequency, to 8
    times, and are twice as wide in colour.  H, W: multiples of 8.  quantum: 0 keeps a picture as it
    is."""
    wave = torch.arange(8, device=rgb_B3HW.device, dtype=torch.float32)
    cosines_88 = torch.cos((2 * wave + 1) * wave[:, None] * math.pi / 16) / 2
    cosines_88[0] /= math.sqrt(2)
    brightness = luma(rgb_B3HW)
    planes = torch.cat([brightness, rgb_B3HW - brightness], dim=1)  # luma, then colour less it
    height, width = rgb_B3HW.shape[2:]
    blocks = planes.unflatten(3, (width // 8, 8)).unflatten(2, (height // 8, 8)).transpose(3, 4)
    waves = cosines_88 @ blocks @ cosines_88.mT
    growth_88 = 1 + 0.5 * (wave + wave[:, None])
    wider_4 = waves.new_tensor([1, 2, 2, 2]).view(4, 1, 1, 1, 1)
    steps = (quantum_B111[..., None, None] * growth_88 * wider_4).clamp_min(1e-6)
    kept = cosines_88.mT @ ((waves / steps).round() * steps) @ cosines_88
    kept = kept.transpose(3, 4).flatten(2, 3).flatten(3, 4)
    return torch.where(quantum_B111 > 0, kept[:, :1] + kept[:, 1:], rgb_B3HW)


def _log_gain(labels_HW: Tensor, camera: Camera) -> Tensor:
    """Of every pixel, with soft borders between regions.  1,H,W."""
    gain_1HW = torch.full_like(labels_HW, camera.gain, dtype=torch.float32)[None]
    if camera.regions < 0:
        return gain_1HW
    generator = torch.Generator().manual_seed(camera.regions)
    low, high = DIFFER
    size = low + (high - low) * torch.rand(256, generator=generator)
    differs = torch.rand(256, generator=generator) < CHOSEN
    side = 1 if float(torch.rand((), generator=generator)) < 0.5 else -1
    table = (side * size * differs).to(labels_HW.device)
    offset_11HW = table[labels_HW.long()][None, None]
    for _ in range(2):
        offset_11HW = box_mean(offset_11HW, camera.soft)
    return gain_1HW + offset_11HW[0]
