"""What a training step sees, made from cached tensors on the device.

Three streams teach what a curve cannot do.  `good`: photos that the judge leaves alone, mis-exposed
by a random camera; the answer is the photo.  `bad`: photos with the pseudo-GT as their answer.
`scenes`: a frame of a bracket, the answer another frame.  How bright the answer is, is divided out:
the strength that is given brings the photo to its mean luma, as the judge's will in use.

Which photos, crops, flips and cameras is a pure function of (seed, step), so that a resumed run
goes on exactly as if it had not stopped.
"""

# N photos of the set, B of a batch, S canvas side (the working size), all in pixels

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evenlight.stages.corrector.camera import Camera, mis_exposed
from evenlight.stages.corrector.correction import lost
from evenlight.stages.pixels import box_mean, luma
from evenlight.stages.priors import tone

FAMILY = "film"  # by which brightness is divided out: the judge's
SMALL_SIDE = 32  # of copies that brightness is taken from, pixels
DISAGREE = 0.12  # of two frames at like brightness: something moved
DISAGREE_RADIUS = 2  # pixels
CLIPPED = 254 / 255  # from here on a pseudo-GT, made by a curve, does not know


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Cached tensors at the working size, on the training device where they fit.

    Photos lie top-left on an S x S canvas; the rest of the canvas repeats their edges.
    """

    photo: Tensor  # u8 N,3,S,S, RGB sRGB
    extent: Tensor  # integers N,2: true height and width, multiples of 8
    proto: Tensor  # f16 N,32,S/4,S/4
    p3: Tensor  # f16 N,C,S/8,S/8
    regions: Tensor  # u8 N,S,S
    pseudo_gt: Tensor  # u8 N,3,S,S
    confidence: Tensor  # f16 N,S/4,S/4
    well_exposed: Tensor  # bool N
    names: Sequence[str]  # of the photos, for messages


class Sample(NamedTuple):
    """The random choices of one row of a batch."""

    stream: str
    photo: int
    target: int  # the photo itself, but in `scenes`
    corner: tuple[int, int]  # top, left, multiples of 8
    flip: bool
    camera: Camera | None  # of `good`


class Draw(NamedTuple):
    """The random choices of one step."""

    samples: list[Sample]
    noise: int  # seed
    view: tuple[int, int, int, int]  # top, left, height, width of the prompt half's crop
    seen: tuple[int, int] | None  # rows from, to that FastSAM and CLIP see; None: not this step


class Batch(NamedTuple):
    """What the network sees in one step, and what its losses compare the output with."""

    photo: Tensor  # f32 B,3,c,c in [0, 1]
    strength: Tensor  # f32 B, brings the photo to the mean luma of the target
    proto: Tensor  # f32 B,32,c/4,c/4
    p3: Tensor  # f32 B,C,c/8,c/8
    target: Tensor  # f32 B,3,c,c
    confidence: Tensor  # f32 B,1,c,c, 0 outside the photo and where the target does not know
    labels: Tensor  # u8 B,c,c
    chosen: Draw


def take(
    data: TrainingData,
    extents: Sequence[Sequence[int]],
    chosen: Draw,
    crop: int,
    device: torch.device,
) -> Batch:
    """Cut, flip and mis-expose on the device.

    Nothing but the choices is copied from the host where data lies on the device too; data that
    does not fit there stays in host memory, and then the crops are copied.
    """
    samples = chosen.samples

    def cut(x: Tensor, i: int, sample: Sample, stride: int) -> Tensor:
        (top, left), side = (corner // stride for corner in sample.corner), crop // stride
        piece = x[i, ..., top : top + side, left : left + side]
        return piece.flip(-1) if sample.flip else piece

    def seen(x: Tensor, stride: int) -> Tensor:
        pieces = torch.stack([cut(x, sample.photo, sample, stride) for sample in samples])
        return pieces.to(device, non_blocking=True)

    answers = [
        cut(data.pseudo_gt if s.stream == "bad" else data.photo, s.target, s, 1) for s in samples
    ]
    target = torch.stack(answers).to(device, non_blocking=True).float() / 255
    labels = seen(data.regions, 1)
    photo = _shot(chosen, seen(data.photo, 1).float() / 255, target, labels)
    strength = _divided_out(photo, target)
    cached = F.interpolate(seen(data.confidence, 4)[:, None].float(), scale_factor=4.0)
    confidence = [
        _known(sample, photo[row], target[row], strength[row], cached[row])
        * _inside(sample, extents[sample.photo], crop, device)
        for row, sample in enumerate(samples)
    ]
    return Batch(
        photo=photo,
        strength=strength,
        proto=seen(data.proto, 4).float(),
        p3=seen(data.p3, 8).float(),
        target=target,
        confidence=torch.stack(confidence),
        labels=labels,
        chosen=chosen,
    )


def _shot(chosen: Draw, photo: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    """The photos, those of `good` as their cameras kept them."""
    shots = [(row, s.camera) for row, s in enumerate(chosen.samples) if s.camera is not None]
    if shots:
        own, cameras = [row for row, _ in shots], [camera for _, camera in shots]
        noise = torch.Generator().manual_seed(chosen.noise)
        photo[own] = mis_exposed(target[own], labels[own], cameras, noise)
    return photo


def _divided_out(photo_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """The film strength at which the photos have the mean luma of their targets.  B."""
    small, wanted = (F.adaptive_avg_pool2d(x, SMALL_SIDE) for x in (photo_B3HW, target_B3HW))
    return tone.rule_strength(small, FAMILY, luma(wanted).mean((1, 2, 3)))


def _known(
    sample: Sample, photo: Tensor, target: Tensor, strength: Tensor, cached: Tensor
) -> Tensor:
    """How far the target of one row is to be believed.  photo, target: 3,c,c.  1,c,c."""
    if sample.stream == "good":
        return torch.ones_like(cached)
    if sample.stream == "bad":
        return cached * (photo.amax(0) < CLIPPED)
    toned = tone.apply(FAMILY, photo, strength)
    differ = box_mean((luma(toned[None]) - luma(target[None])).abs(), DISAGREE_RADIUS)
    comparable = lost(photo).amax(0) < 0.5  # where it is lost, to disagree is the lesson
    moved = ((differ > DISAGREE) & comparable).float()
    return 1 - F.max_pool2d(moved, 2 * DISAGREE_RADIUS + 1, 1, DISAGREE_RADIUS)[0]


def _inside(sample: Sample, extent: Sequence[int], crop: int, device: torch.device) -> Tensor:
    """1 on the photo, 0 on the rest of its canvas.  c,c."""
    height, width = (side - corner for side, corner in zip(extent, sample.corner, strict=True))
    inside = torch.zeros(crop, crop, device=device)
    inside[:height, :width] = 1
    return inside.flip(-1) if sample.flip else inside
