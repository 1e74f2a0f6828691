"""What is trained on, and which of it when: the streams of docs/method.md 7.

Which photos, crops, flips and cameras a step sees is a pure function of (seed, step), so that a
resumed run goes on exactly as if it had not stopped.
"""

# N photos of the set

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from evenlight.cache.errors import UsageError
from evenlight.stages.corrector.camera import Camera, draw_camera
from evenlight.stages.corrector.scenes import find_scenes, pairs
from evenlight.stages.corrector.told import Told, draw_told
from evenlight.stages.settings import TrainSettings

log = logging.getLogger(__name__)
GRID = 8  # crops start on it, so that features at /4 and /8 slice exactly
BLANK = (0.12, 0.35)  # shares of blown and of black pixels from which a photo teaches nothing
BLOWN, BLACK = 250 / 255, 5 / 255
SMALL_SIDE = 32  # of copies that brightness is taken from, pixels
VALIDATED = 24  # samples of a stream, at most, that choose the best checkpoint

Pair = tuple[int, int]  # indices of a photo and of the one that is its answer


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of every photo before training starts: of each a little."""

    names: Sequence[str]  # for messages, and for scenes
    extents: Sequence[Sequence[int]]  # true height and width at the working size
    well_exposed: Sequence[bool]  # by the judge
    blank: Sequence[bool]  # white paper or a black frame
    small: Tensor  # f32 N,3,32,32 in [0, 1]: the whole photos without their canvas
    p3_channels: int


class Sample(NamedTuple):
    """The random choices of one row of a batch."""

    stream: str
    photo: int
    target: int  # the photo itself, but in `scenes`
    corner: tuple[int, int]  # top, left, multiples of 8
    flip: bool
    camera: Camera | None  # of `good`
    told: Told  # what the judge is taken to say of its regions


class Draw(NamedTuple):
    """The random choices of one step."""

    samples: list[Sample]
    noise: int  # seed
    view: tuple[int, int, int, int]  # top, left, height, width of the prompt half's crop
    seen: tuple[int, int] | None  # rows from, to that FastSAM and CLIP see; None: not this step


class Pools(NamedTuple):
    """What each stream draws from."""

    good: list[Pair]
    bad: list[Pair]
    scenes: list[Pair]


def plan_streams(about: About, settings: TrainSettings) -> tuple[Pools, Pools]:
    """What to train on, and what chooses the best checkpoint; no scene is in both.

    Raises UsageError where there are fewer than 2 photos to learn from.
    """
    small, extents, well = about.small, about.extents, about.well_exposed
    scenes = find_scenes(about.names, small) if settings.scenes else []
    usable = [not (good and blank) for good, blank in zip(well, about.blank, strict=True)]
    split = split_photos(usable, scenes, settings)

    def pools(photos: set[int]) -> Pools:
        alone = [i for i in sorted(photos) if usable[i]]
        whole = [scene for scene in scenes if photos.issuperset(scene)]
        return Pools(
            good=[(i, i) for i in alone if well[i] and settings.good],
            bad=[(i, i) for i in alone if not (well[i] and settings.good)],
            scenes=[pair for scene in whole for pair in pairs(scene, small, extents)],
        )

    train, held_out = (pools(set(photos)) for photos in split)
    for what, found in (("trained on", train), ("held out", held_out)):
        log.info("%s: %s", what, {stream: len(pool) for stream, pool in found._asdict().items()})
    return train, held_out


def split_photos(
    usable: Sequence[bool], scenes: Sequence[Sequence[int]], settings: TrainSettings
) -> tuple[list[int], list[int]]:
    """Indices for training and for choosing the best checkpoint; scenes stay whole.

    usable: of each photo, whether there is anything to learn from it.  Raises UsageError under 2.
    """
    if sum(usable) < 2:
        raise UsageError(f"training needs at least 2 photos with a pseudo-GT, got {sum(usable)}")
    framed = {i for scene in scenes for i in scene}
    alone = [[i] for i, is_usable in enumerate(usable) if is_usable and i not in framed]
    generator = _generator(settings.seed, -1)
    kept: set[int] = set()
    for groups in (alone, [list(scene) for scene in scenes]):
        order = torch.randperm(len(groups), generator=generator).tolist()
        count = min(max(1, round(settings.held_out * len(groups))), len(groups) // 2)
        kept.update(i for group in order[:count] for i in groups[group])
    if not kept:  # one scene, and at most one photo beside it
        return split_photos(usable, [], settings)
    everything = framed | {i for (i,) in alone}
    return sorted(everything - kept), sorted(kept)


def rows(pools: Pools, settings: TrainSettings) -> dict[str, int]:
    """Rows of a batch per stream; a stream without photos leaves its rows to another."""
    wanted = {"good": settings.good, "scenes": settings.scenes, "bad": settings.bad}
    found = {stream: n for stream, n in wanted.items() if n and getattr(pools, stream)}
    if not found:
        raise UsageError(
            f"the store has no photo for the streams {wanted} of a batch: turn another on "
            "(train.good, train.scenes, train.bad)"
        )
    found[next(iter(found))] += settings.batch - sum(found.values())
    return found


def draw(
    step: int, pools: Pools, extents: Sequence[Sequence[int]], settings: TrainSettings
) -> Draw:
    """Choices of one step, from the seed and the step alone."""
    generator = _generator(settings.seed, step)
    crop = min(settings.crop, settings.size)
    samples = []
    for stream, count in rows(pools, settings).items():
        for i in range(count):
            pair = _nth(getattr(pools, stream), step * count + i, settings.seed)
            samples.append(_sample(stream, pair, extents[pair[0]], settings, generator))
    side = crop - _integer(int(0.4 * crop) + 1, generator)  # at least 60 % of the crop
    top, left = (_integer(crop - side + 1, generator) for _ in range(2))
    return Draw(
        samples=samples,
        noise=_integer(2**31, generator),
        view=(top, left, side, side),
        seen=_seen(step, settings),
    )


def validation_draws(pools: Pools, settings: TrainSettings) -> list[Draw]:
    """Whole photos, one a draw, the same at every validation: those whose answer is known, or
    where there are none, pseudo-GT."""
    known = {"good": pools.good, "scenes": pools.scenes}
    chosen = {stream: pool for stream, pool in known.items() if pool} or {"bad": pools.bad}
    draws = []
    for stream, pool in chosen.items():
        every = max(1, len(pool) // VALIDATED)
        for n, pair in enumerate(pool[::every][:VALIDATED]):
            sample = _sample(stream, pair, (0, 0), settings, _generator(settings.seed, 2**40 + n))
            whole = (0, 0, settings.size, settings.size)
            draws.append(Draw([sample._replace(flip=False)], n, whole, None))
    return draws


def small_copy(photo_3SS: Tensor, extent: Sequence[int]) -> Tensor:
    """The whole photo without its canvas.  uint8 -> f32 3,32,32 in [0, 1]."""
    height, width = extent
    return F.adaptive_avg_pool2d(photo_3SS[:, :height, :width].float() / 255, SMALL_SIDE)


def is_blank(photo_3SS: Tensor, extent: Sequence[int]) -> bool:
    """Whether a photo (uint8) is little more than white paper or a black frame."""
    photo = photo_3SS[:, : extent[0], : extent[1]].float() / 255
    white = float((photo.amin(0) >= BLOWN).float().mean())
    black = float((photo.amax(0) <= BLACK).float().mean())
    return white >= BLANK[0] or black >= BLANK[1]


def _sample(
    stream: str,
    pair: Pair,
    extent: Sequence[int],
    settings: TrainSettings,
    generator: Generator,
) -> Sample:
    crop = min(settings.crop, settings.size)  # where it is larger, whole canvases are taken
    top, left = (GRID * _integer(max(0, side - crop) // GRID + 1, generator) for side in extent)
    flip = _integer(2, generator) == 1
    camera = draw_camera(generator, settings.uneven) if stream == "good" else None
    differ = camera is not None and camera.regions >= 0
    told = draw_told(generator, settings.apart if differ else 0.0)
    return Sample(stream, *pair, (top, left), flip, camera, told)


def _integer(num_choices: int, generator: Generator) -> int:
    return int(torch.randint(num_choices, (1,), generator=generator))


def _seen(step: int, settings: TrainSettings) -> tuple[int, int] | None:
    """The photos that FastSAM and CLIP see in this step, from either half in turn; or None.

    The last of every spc_every steps has them, so that logged steps show these parts too.
    """
    turn, idle = divmod(step + 1, settings.spc_every)
    if idle:
        return None
    first = settings.batch // 2 * (turn % 2)
    return first, min(first + settings.spc_photos, settings.batch)


def _nth(pool: Sequence[Pair], n: int, seed: int) -> Pair:
    """The n-th pair of an endless stream of shuffled epochs."""
    epoch, position = divmod(n, len(pool))
    return pool[_permutation(seed, epoch, len(pool))[position]]


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, length: int) -> list[int]:
    return torch.randperm(length, generator=_generator(seed, -2 - epoch)).tolist()


def _generator(seed: int, number: int) -> torch.Generator:
    """Independent streams: steps count up from 0, -1 splits the set, epochs count down from -2."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
