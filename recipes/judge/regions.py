"""What regions are embedded by and the head that judges them, trained together (train.py).

Two kinds of photos teach them.  Good ones, shot with some objects exposed otherwise than the rest,
drawn anew each time: an object's answer is the strength that gives it back.  Frames of real
brackets: an object is meant as a well-exposed frame or the exposure fusion has it, drawn by how
well exposed they are.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from evenlight.stages.corrector.inputs import rule_corrected
from evenlight.stages.corrector.told import region_strengths
from evenlight.stages.photos.canvas import working
from evenlight.stages.pixels import luma
from evenlight.stages.priors import tone
from evenlight.stages.priors.fingerprints import shipped_reading
from evenlight.stages.priors.judge import RegionHead
from evenlight.stages.priors.judge_tuning import soft
from evenlight.stages.priors.ladder import (
    REGION_CELL,
    REGION_SIDE,
    largest_regions,
    region_cells,
)
from evenlight.stages.priors.lite0 import Tower
from evenlight.stages.priors.opinion import FAMILY, LIMIT
from evenlight.stages.priors.protocols import Segmenter
from evenlight.stages.priors.region_embedder import DIM, Decoder, RegionEmbedder
from evenlight.stages.settings import ClipSettings, LadderSettings
from recipes.clip_lite0 import photos as clip_photos
from recipes.judge import photos

# B photos, S side of the square, R regions and the rest, h w cells, P samples of pixels

LADDER = LadderSettings()
SIDE, SCENE_SIDE = 208, 320  # photos and frames are kept at, squashed to a square
LEAST = 0.78, 0.62  # of a side, that is cropped from them
BY_PEOPLE, OBJECT_BY_PEOPLE = 0.3, 0.75  # draws of photos that people outlined, and of these maps
EVEN, LONE = 0.22, 0.62  # shares up to which no object differs, one to three regions do; else one
# object of several regions
STOPS = (0.4, 3.4)  # between an object and the rest, either way
# Shots that are wrong as a whole, and those of them of which an object differs too: rarely, so that
# where a photo is far off, as frames of brackets are, what differs is taken for the scene's.
WHOLE, WHOLE_TOO = 0.7, 0.25
WHOLE_STOPS = (0.2, 4.2)  # of them, more often few
SUBJECT = 1 / 3  # of the photo, that objects of people are often nearest to
MOVED = (-0.5, 0.5)  # strengths that a frame may be moved by
# How the photo's head errs, by least squares on 1,500 such shots and 1,170 frames: its strength
# from that meant and that of the rule, and the deviation left.
TOLD_SHOT, TOLD_FRAME = (0.54, 0.37, 0.25), (0.1, 0.77, 0.23)
RULE_ERROR = 0.05
STEPS, SHOTS, FRAMES = 5000, 11, 5  # the latter of a batch
RATE, DECAY, WARM_UP = 1.5e-3, 0.05, 100
LEAST_AREA, REST_WEIGHT = 0.004, 0.5
PHOTO_WEIGHT = 0.5  # of the second opinion, in the loss
Square = NDArray[np.uint8]  # S,S,3, or S,S labels


@dataclass(frozen=True)
class Good:
    """objects: maps that people outlined, none for most."""

    photo: Square
    labels: Square
    objects: list[Square]


@dataclass(frozen=True)
class Scene:
    """labels: of each frame.  shares: of the frames, by how well exposed they are."""

    frames: list[Square]
    labels: list[Square]
    fusion: Square
    shares: NDArray[np.float64]


# --- what is read --------------------------------------------------------------------------------


def good_photos(paths: Sequence[Path], objects: Path | None, segmenter: Segmenter) -> list[Good]:
    """objects: a folder in the layout `uneven`, that has some of the photos by name."""
    found = []
    for path in paths:
        photo, outlined = _read(path), []
        if objects and (at := objects / "objects" / f"{path.stem}.png").is_file():
            outlined = [_nearest(cv2.imread(str(at), cv2.IMREAD_GRAYSCALE), SIDE)]
        found.append(Good(_squashed(photo, SIDE), _labels(photo, segmenter, SIDE), outlined))
    return found


def scenes(folders: Sequence[Path], segmenter: Segmenter) -> Iterator[Scene]:
    """Without those of which no frame and no fusion is well exposed."""
    for folder in folders:
        frames = sorted(map(_read, clip_photos.image_files(folder)), key=clip_photos.mean_luma)
        if len({frame.shape for frame in frames}) > 1:
            continue
        if (well := photos.well_exposed(frames)) is not None:
            yield Scene(
                [_squashed(frame, SCENE_SIDE) for frame in frames],
                [_labels(frame, segmenter, SCENE_SIDE) for frame in frames],
                _squashed(well[0].astype(np.uint8), SCENE_SIDE),
                well[1],
            )


def _read(path: Path) -> photos.Photo:
    return np.ascontiguousarray(cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])


def _labels(photo: photos.Photo, segmenter: Segmenter, side: int) -> Square:
    return _nearest(segmenter.segment(rule_corrected(working(photo, 384))).labels, side)


def _squashed(photo: NDArray, side: int) -> Square:
    return cv2.resize(photo, (side, side), interpolation=cv2.INTER_AREA)


def _nearest(labels: NDArray, side: int) -> Square:
    return cv2.resize(labels, (side, side), interpolation=cv2.INTER_NEAREST)


# --- what is drawn -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Photos as a camera kept them and as they are meant, float in [0, 1], B,3,S,S; which cells are
    of which region B,R,h,w; the rule's strength B, and the strength that the judge gives B."""

    shot: Tensor
    meant: Tensor
    cells: Tensor
    rule: Tensor
    told: Tensor


class Batches(IterableDataset):
    def __init__(self, good: list[Good], brackets: list[Scene], seed: int) -> None:
        self.good, self.brackets, self.seed = good, brackets, seed
        self.outlined = [one for one in good if one.objects]

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng(self.seed)
        torch.manual_seed(self.seed)
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        while True:
            yield self._drawn(rng)

    def _drawn(self, rng: np.random.Generator) -> Batch:
        shots = [self._good(rng) for _ in range(SHOTS)]
        frames = [self._frame(rng) for _ in range(FRAMES)]
        good = _floats([photo for photo, _, _ in shots])
        stops = torch.from_numpy(np.stack([stops for _, _, stops in shots]))
        shot = torch.cat([_shot(good, stops), _floats([frame for frame, _, _ in frames])])
        meant = torch.cat([good, _floats([meant for _, _, meant in frames])])
        cells = [_cells(labels) for _, labels, _ in (*shots, *frames)]
        cells_BRhw = torch.from_numpy(np.stack(cells))
        rule = tone.rule_strength(F.avg_pool2d(shot, REGION_CELL), FAMILY)
        told = _told(rule, (strengths(shot, meant, cells_BRhw) * _areas(cells_BRhw)).sum(1))
        return Batch(shot, meant, cells_BRhw, rule + RULE_ERROR * torch.randn_like(rule), told)

    def _good(self, rng: np.random.Generator) -> tuple[Square, Square, NDArray[np.float32]]:
        """A good photo, its region map, and the stops that each pixel is off by."""
        some = self.outlined if self.outlined and rng.random() < BY_PEOPLE else self.good
        one = some[int(rng.integers(len(some)))]
        cut = _cut(SIDE, LEAST[0], rng)
        labels = cut(one.labels, cv2.INTER_NEAREST)
        by_people = bool(one.objects) and rng.random() < OBJECT_BY_PEOPLE
        objects = cut(one.objects[0], cv2.INTER_NEAREST) if by_people else labels
        stops = _stops(objects, rng, by_people=by_people)
        if rng.random() < (WHOLE_TOO if stops.any() else WHOLE):
            least, most = WHOLE_STOPS
            whole = least + (most - least) * rng.beta(1, 1.5)
            stops = stops + np.float32(whole * rng.choice([-1, 1]))
        return cut(one.photo, cv2.INTER_AREA), labels, stops

    def _frame(self, rng: np.random.Generator) -> tuple[Square, Square, Square]:
        """A frame, its region map, and what it is meant to be."""
        scene = self.brackets[int(rng.integers(len(self.brackets)))]
        index, cut = int(rng.integers(len(scene.frames))), _cut(SCENE_SIDE, LEAST[1], rng)
        meant, frame = scene.fusion, scene.frames[index]
        if rng.random() < 0.5:
            meant = scene.frames[int(rng.choice(len(scene.frames), p=scene.shares))]
        if rng.random() < 0.5:
            frame = tone.on_bytes(FAMILY, frame, float(rng.uniform(*MOVED)))
        labels = cut(scene.labels[index], cv2.INTER_NEAREST)
        return cut(frame, cv2.INTER_AREA), labels, cut(meant, cv2.INTER_AREA)


def _cut(side: int, least: float, rng: np.random.Generator):
    """The same part of several squares, as the embedder sees it: (square, interpolation) to it."""
    height, width = (int(side * rng.uniform(least, 1)) for _ in range(2))
    top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
    way = int(rng.choice([-1, 1]))

    def cut(square: Square, interpolation: int) -> Square:
        part = np.ascontiguousarray(square[top : top + height, left : left + width][:, ::way])
        return cv2.resize(part, (REGION_SIDE, REGION_SIDE), interpolation=interpolation)

    return cut


def _stops(objects: Square, rng: np.random.Generator, *, by_people: bool) -> NDArray[np.float32]:
    areas = np.bincount(objects.ravel(), minlength=2) / objects.size
    stops, side = np.zeros(objects.shape, np.float32), rng.choice([-1, 1])
    listed = np.arange(len(areas)) >= (0 if by_people else 1)
    large = np.flatnonzero(listed & (areas > 0.01) & (areas < 0.75))
    kind = rng.random()
    if len(large) and kind >= EVEN and (kind < LONE or by_people):
        lone = by_people and rng.random() < 0.5
        if lone and rng.random() < 0.5:
            large = large[np.argsort(np.abs(areas[large] - SUBJECT))[:2]]
        alike = rng.uniform(*STOPS) if rng.random() < 0.5 else None
        for label in rng.permutation(large)[: 1 if lone else int(rng.integers(1, 4))]:
            stops[objects == label] = side * (alike or rng.uniform(*STOPS))
    elif len(large) and kind >= LONE:
        chosen = _neighbours(objects, int(rng.choice(large)), int(rng.integers(2, 7)), rng)
        if areas[chosen].sum() < 0.8:
            stops[np.isin(objects, chosen)] = side * rng.uniform(*STOPS)
    return cv2.GaussianBlur(stops, (0, 0), rng.uniform(0.4, 4))


def _neighbours(labels: Square, first: int, count: int, rng: np.random.Generator) -> list[int]:
    """Labels of up to so many regions that touch."""
    found = [first]
    while len(found) < count:
        reach = cv2.dilate(np.isin(labels, found).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        near = np.setdiff1d(labels[reach], [0, *found])
        if not len(near):
            break
        found.append(int(rng.choice(near)))
    return found


def _shot(good_B3SS: Tensor, stops_BSS: Tensor) -> Tensor:
    """What cameras with film curves of their own keep, exposed by so many stops at each pixel."""
    count = len(good_B3SS)

    def each(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1).uniform_(low, high)

    x = (good_B3SS + (torch.rand_like(good_B3SS) - 0.5) / 255).clamp(1e-6, 0.998)
    b = torch.where(each(0, 1) < 0.4, torch.full((count, 1, 1, 1), tone.FILM_B), each(1.2, 2.2))
    exposure = -torch.log1p(-(x ** (1 / b))) * torch.exp(0.45 * stops_BSS)[:, None]
    y = (-torch.expm1(-exposure)).clamp(1e-6, 1) ** b
    brighter = (stops_BSS.mean((1, 2)) > 0.3).view(-1, 1, 1, 1)
    y = torch.where(brighter, y / each(0.88, 1), y)
    noise = each(0, 0.012) * (each(0, 1) < 0.6) * torch.randn_like(y)
    y = y + noise * (0.3 + y.clamp(0, 1)).sqrt()
    return (y.clamp(0, 1) * 255).round() / 255


def _told(rule_B: Tensor, whole_B: Tensor) -> Tensor:
    """What the judge might say of each, SHOTS first: right or wrong, as it errs."""
    by = torch.tensor([TOLD_SHOT] * SHOTS + [TOLD_FRAME] * FRAMES)
    told = by[:, 0] * whole_B + by[:, 1] * rule_B + by[:, 2] * torch.randn_like(rule_B)
    return told.clamp(-LIMIT, LIMIT)


def _cells(labels: Square) -> NDArray[np.float32]:
    return region_cells(labels, largest_regions(labels, LADDER)[0], LADDER.regions)


def _floats(squares: Sequence[Square]) -> Tensor:
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255


# --- training ------------------------------------------------------------------------------------


def strengths(shot_B3SS: Tensor, meant_B3SS: Tensor, cells_BRhw: Tensor) -> Tensor:
    """The strength of each region at which its mean luma is as it is meant.  B,R."""
    shot, meant = (
        luma(x[..., ::REGION_CELL, ::REGION_CELL]).flatten(1) for x in (shot_B3SS, meant_B3SS)
    )
    return region_strengths(shot, meant, cells_BRhw.argmax(1).flatten(1), cells_BRhw.shape[1])[0]


def trained(
    good: list[Good], brackets: list[Scene], tower: Tower, seed: int, steps: int = STEPS
) -> tuple[Decoder, RegionHead]:
    """After AdamW with a cosine."""
    torch.manual_seed(seed)
    embedder = RegionEmbedder(tower.eval(), Decoder().train(), shipped_reading(ClipSettings()))
    head = RegionHead(DIM).train()
    learned = nn.ModuleList([embedder.decoder, head]).to(memory_format=torch.channels_last)
    optim = torch.optim.AdamW(learned.parameters(), lr=RATE, weight_decay=DECAY)
    batches = DataLoader(Batches(good, brackets, seed), batch_size=None, num_workers=1)
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optim.param_groups:
            done = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * done
        loss = _loss(embedder, head, batch)
        optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optim.step()
    return embedder.decoder.eval(), head.eval()


def _loss(embedder: RegionEmbedder, head: RegionHead, batch: Batch) -> Tensor:
    """Cross-entropy of the strengths between regions and their mean, and of this mean."""
    ruled = tone.apply(FAMILY, batch.shot, batch.rule.view(-1, 1, 1, 1))
    areas = _areas(batch.cells)
    given = torch.stack([batch.rule, batch.told - batch.rule], 1)
    with torch.autocast("cpu", torch.bfloat16):
        layout = torch.channels_last
        inputs = ruled.contiguous(memory_format=layout), batch.shot.contiguous(memory_format=layout)
        answers = head(embedder(*inputs, batch.cells), areas, given)
    logits, photo = (answer.float() for answer in answers)
    wanted = strengths(batch.shot, batch.meant, batch.cells)
    mean = (wanted * areas).sum(1)
    between = wanted - mean[:, None]
    labels = soft(between.clamp(-LIMIT, LIMIT).flatten()).reshape(logits.shape)
    weights = areas.sqrt() * (areas > LEAST_AREA)
    weights[:, -1] *= REST_WEIGHT
    regions = (-(labels * logits.log_softmax(-1)).sum(-1) * weights).sum() / weights.sum()
    wholes = -(soft(mean.clamp(-LIMIT, LIMIT)) * photo.log_softmax(-1)).sum(-1).mean()
    return regions + PHOTO_WEIGHT * wholes


def _areas(cells_BRhw: Tensor) -> Tensor:
    return cells_BRhw.mean((2, 3))
