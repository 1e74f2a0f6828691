"""What a training step sees, made from cached tensors on the device.

Three streams teach what a curve cannot do.  `good`: photos that the judge leaves alone, mis-exposed
by a random camera; the answer is the photo.  `bad`: photos with the pseudo-GT as their answer.
`scenes`: a frame of a bracket, the answer another frame.  How bright the answer is, is divided out:
the strengths that are given bring the photo to its mean luma, as the judge's will in use, and where
objects were exposed otherwise mostly its regions some of the way to theirs (told.py).

Which photos, crops, flips and cameras is a pure function of (seed, step), so that a resumed run
goes on exactly as if it had not stopped.
"""

# B photos of a batch, S canvas side (the working size), c side of a crop, all in pixels

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evenlight.stages.corrector.camera import mis_exposed
from evenlight.stages.corrector.correction import lost
from evenlight.stages.corrector.ranks import ALONE, Ranks
from evenlight.stages.corrector.streams import SMALL_SIDE, Draw, Sample
from evenlight.stages.corrector.told import given
from evenlight.stages.pixels import box_mean, luma
from evenlight.stages.priors import tone
from evenlight.stages.priors.opinion import FAMILY

DISAGREE = 0.12  # of two frames at like brightness: something moved
DISAGREE_RADIUS = 2  # pixels
CLIPPED = 254 / 255  # from here on a pseudo-GT, made by a curve, does not know


class Photo(NamedTuple):
    """What is cached of one photo, at the working size.

    It lies top-left on an S x S canvas; the rest of the canvas repeats its edges.
    """

    photo: Tensor  # u8 3,S,S, RGB sRGB
    proto: Tensor  # f16 32,S/4,S/4
    p3: Tensor  # f16 C,S/8,S/8
    regions: Tensor  # u8 S,S
    pseudo_gt: Tensor  # u8 3,S,S
    confidence: Tensor  # f16 S/4,S/4


class Batch(NamedTuple):
    """What the network sees in one step, and what its losses compare the output with."""

    photo: Tensor  # f32 B,3,c,c in [0, 1]
    given: Tensor  # f32 B,1,c,c, the strengths that the judge is taken to give
    proto: Tensor  # f32 B,32,c/4,c/4
    p3: Tensor  # f32 B,C,c/8,c/8
    target: Tensor  # f32 B,3,c,c
    confidence: Tensor  # f32 B,1,c,c, 0 outside the photo and where the target does not know
    labels: Tensor  # u8 B,c,c
    chosen: Draw  # of all rows of the step
    ranks: Ranks = ALONE  # which has these rows of it, and who has the others


def take(
    photos: Mapping[int, Photo],
    extents: Sequence[Sequence[int]],
    chosen: Draw,
    crop: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Batch:
    """Cut, flip and mis-expose on the device; of the rows of a step, those of this rank.

    Nothing but the choices is copied from the host where photos lie on the device too; where they
    lie in host memory, the crops are copied.
    """
    rows = ranks.rows(len(chosen.samples))
    samples = [chosen.samples[row] for row in rows]
    seen_photos = [photos[sample.photo] for sample in samples]

    def cut(x: Tensor, sample: Sample, stride: int) -> Tensor:
        (top, left), side = (corner // stride for corner in sample.corner), crop // stride
        piece = x[..., top : top + side, left : left + side]
        return piece.flip(-1) if sample.flip else piece

    def batched(entries: Iterable[Tensor], stride: int) -> Tensor:
        pieces = [cut(x, sample, stride) for x, sample in zip(entries, samples, strict=True)]
        return torch.stack(pieces).to(device, non_blocking=True)

    def answer(sample: Sample) -> Tensor:
        photo = photos[sample.target]
        return photo.pseudo_gt if sample.stream == "bad" else photo.photo

    target = batched(map(answer, samples), 1).float() / 255
    labels = batched((x.regions for x in seen_photos), 1)
    photo = batched((x.photo for x in seen_photos), 1).float() / 255
    photo = _shot(chosen, rows, photo, target, labels)
    whole = _divided_out(photo, target)
    cached = batched((x.confidence for x in seen_photos), 4)[:, None].float()
    cached = F.interpolate(cached, scale_factor=4.0)
    confidence = [
        _known(sample, photo[row], target[row], whole[row], cached[row])
        * _inside(sample, extents[sample.photo], crop, device)
        for row, sample in enumerate(samples)
    ]
    return Batch(
        photo=photo,
        given=given(photo, target, labels, whole, [sample.told for sample in samples]),
        proto=batched((x.proto for x in seen_photos), 4).float(),
        p3=batched((x.p3 for x in seen_photos), 8).float(),
        target=target,
        confidence=torch.stack(confidence),
        labels=labels,
        chosen=chosen,
        ranks=ranks,
    )


def _shot(
    chosen: Draw, rows: Sequence[int], photo: Tensor, target: Tensor, labels: Tensor
) -> Tensor:
    """The photos, those of `good` as their cameras kept them.  rows: theirs in the step."""
    shots = [row for row, sample in enumerate(chosen.samples) if sample.camera is not None]
    own = [place for place, row in enumerate(rows) if row in shots]
    if own:
        # drawn for all rows of the step, so that each has its own whoever has the others
        noise = torch.Generator().manual_seed(chosen.noise)
        grain = torch.randn((len(shots), *photo.shape[1:]), generator=noise)
        mine = [shots.index(rows[place]) for place in own]
        cameras = [camera for sample in chosen.samples if (camera := sample.camera) is not None]
        photo[own] = mis_exposed(
            target[own], labels[own], [cameras[i] for i in mine], grain[mine].to(photo.device)
        )
    return photo


def _divided_out(photo_B3HW: Tensor, target_B3HW: Tensor) -> Tensor:
    """The film strength at which the photos have the mean luma of their targets.  B."""
    small, wanted = (F.adaptive_avg_pool2d(x, SMALL_SIDE) for x in (photo_B3HW, target_B3HW))
    return tone.rule_strength(small, FAMILY, luma(wanted).mean((1, 2, 3)))


def _known(sample: Sample, photo: Tensor, target: Tensor, whole: Tensor, cached: Tensor) -> Tensor:
    """How far the target of one row is to be believed.  photo, target: 3,c,c.  1,c,c."""
    if sample.stream == "good":
        return torch.ones_like(cached)
    if sample.stream == "bad":
        return cached * (photo.amax(0) < CLIPPED)
    toned = tone.apply(FAMILY, photo, whole)
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
