"""What a training step sees: photos of the cache, cropped, flipped and re-exposed on the device.

Which photos, crops, flips and strengths is a pure function of (seed, step), so that a resumed run
goes on exactly as if it had not stopped.
"""

# N photos of the set, B of a batch, S canvas side (the working size), all in pixels

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evenlight.cache.errors import UsageError
from evenlight.stages.corrector.network import SMALL_SIDE
from evenlight.stages.priors import tone
from evenlight.stages.settings import TrainSettings

GRID = 8  # crops start on it, so that features at /4 and /8 slice exactly
REEXPOSURE = "ev"  # how exposure errors happen: a shift in linear light


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


class Draw(NamedTuple):
    """The random choices of one step."""

    photos: list[int]  # B indices; if paired the second half repeats the first
    corners: list[tuple[int, int]]  # B top, left on GRID
    flips: list[bool]  # B
    strengths: list[float]  # B re-exposures; 0 in the first half
    paired: bool  # the second half of the batch re-exposes the crops of the first half
    view: tuple[int, int, int, int]  # top, left, height, width of the prompt half's crop
    seen: tuple[int, int] | None  # rows from, to that FastSAM and CLIP see; None: not this step


class Batch(NamedTuple):
    """What the network sees in one step, and what its losses compare the output with."""

    photo: Tensor  # f32 B,3,c,c in [0, 1], re-exposed
    whole: Tensor  # f32 B,3,32,32, the whole photo likewise
    proto: Tensor  # f32 B,32,c/4,c/4
    p3: Tensor  # f32 B,C,c/8,c/8
    target: Tensor  # f32 B,3,c,c, the pseudo-GT
    confidence: Tensor  # f32 B,1,c,c, 0 outside the photo
    labels: Tensor  # u8 B,c,c
    well_exposed: Tensor  # bool B, False where re-exposed
    chosen: Draw


def split_photos(num_photos: int, settings: TrainSettings) -> tuple[list[int], list[int]]:
    """Indices for training and for choosing the best checkpoint.  Raises UsageError under 2."""
    if num_photos < 2:
        raise UsageError(f"training needs at least 2 photos with a pseudo-GT, got {num_photos}")
    order = torch.randperm(num_photos, generator=_generator(settings.seed, -1)).tolist()
    num_held_out = min(max(1, round(settings.held_out * num_photos)), num_photos // 2)
    return sorted(order[num_held_out:]), sorted(order[:num_held_out])


def draw(
    step: int,
    photos: Sequence[int],
    extents: Sequence[Sequence[int]],
    settings: TrainSettings,
    paired: bool,
) -> Draw:
    """Choices of one step, from the seed and the step alone."""
    generator = _generator(settings.seed, step)

    def integer(num_choices: int) -> int:
        return int(torch.randint(num_choices, (1,), generator=generator))

    def corner(length: int) -> int:
        return GRID * integer(max(0, length - crop) // GRID + 1)

    crop = min(settings.crop, settings.size)  # where it is larger, whole canvases are taken
    half = settings.batch // 2
    num_scenes = half if paired else settings.batch
    scenes = [_nth(photos, step * num_scenes + i, settings.seed) for i in range(num_scenes)]
    corners = [(corner(extents[i][0]), corner(extents[i][1])) for i in scenes]
    flips = [integer(2) == 1 for _ in scenes]
    uniform = torch.rand(half, generator=generator) * 2 - 1
    copies = 2 if paired else 1
    side = crop - integer(int(0.4 * crop) + 1)  # at least 60 % of the crop
    top, left = integer(crop - side + 1), integer(crop - side + 1)
    return Draw(
        photos=scenes * copies,
        corners=corners * copies,
        flips=flips * copies,
        strengths=[0.0] * half + (settings.reexpose * uniform).tolist(),
        paired=paired,
        view=(top, left, side, side),
        seen=_seen(step, settings),
    )


def small_copies(data: TrainingData) -> Tensor:
    """The whole photos without their canvas, f32 N,3,32,32 in [0, 1], for global statistics."""
    extents = data.extent.tolist()
    copies = [
        F.adaptive_avg_pool2d(data.photo[i, :, :height, :width].float() / 255, SMALL_SIDE)
        for i, (height, width) in enumerate(extents)
    ]
    return torch.stack(copies)


def take(
    data: TrainingData,
    small: Tensor,
    extents: Sequence[Sequence[int]],
    chosen: Draw,
    crop: int,
) -> Batch:
    """Cut, flip and re-expose on the device of `small`.

    Nothing but the strengths is copied from the host where data lies on the device too; data that
    does not fit there stays in host memory, and then the crops are copied.
    """
    device = small.device

    def cut(x: Tensor, stride: int) -> Tensor:
        side = crop // stride
        pieces = []
        for i, (top, left), flip in zip(chosen.photos, chosen.corners, chosen.flips, strict=True):
            top, left = top // stride, left // stride
            piece = x[i, ..., top : top + side, left : left + side]
            pieces.append(piece.flip(-1) if flip else piece)
        return torch.stack(pieces).to(device, non_blocking=True)

    strengths = torch.tensor(chosen.strengths, device=device)
    t_B111 = strengths[:, None, None, None]
    photo = tone.apply(REEXPOSURE, cut(data.photo, 1).float() / 255, t_B111)
    confidence = F.interpolate(cut(data.confidence, 4)[:, None].float(), scale_factor=4.0)
    for row, (i, (top, left), flip) in enumerate(
        zip(chosen.photos, chosen.corners, chosen.flips, strict=True)
    ):
        height, width = extents[i][0] - top, extents[i][1] - left
        confidence[row, :, height:] = 0
        outside = slice(0, max(0, crop - width)) if flip else slice(width, None)
        confidence[row, :, :, outside] = 0
    return Batch(
        photo=(photo * 255).round() / 255,  # what a camera would have stored
        whole=tone.apply(REEXPOSURE, small[chosen.photos], t_B111),
        proto=cut(data.proto, 4).float(),
        p3=cut(data.p3, 8).float(),
        target=cut(data.pseudo_gt, 1).float() / 255,
        confidence=confidence,
        labels=cut(data.regions, 1),
        well_exposed=data.well_exposed[chosen.photos].to(device) & (strengths == 0),
        chosen=chosen,
    )


def _seen(step: int, settings: TrainSettings) -> tuple[int, int] | None:
    """The photos that FastSAM and CLIP see in this step, from either half in turn; or None.

    The last of every spc_every steps has them, so that logged steps show these parts too.
    """
    turn, idle = divmod(step + 1, settings.spc_every)
    if idle:
        return None
    first = settings.batch // 2 * (turn % 2)
    return first, min(first + settings.spc_photos, settings.batch)


def _nth(photos: Sequence[int], n: int, seed: int) -> int:
    """The n-th photo of an endless stream of shuffled epochs."""
    epoch, position = divmod(n, len(photos))
    return photos[_permutation(seed, epoch, len(photos))[position]]


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, length: int) -> list[int]:
    return torch.randperm(length, generator=_generator(seed, -2 - epoch)).tolist()


def _generator(seed: int, number: int) -> torch.Generator:
    """Independent streams: steps count up from 0, -1 splits the set, epochs count down from -2."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
