"""The head that sets the regions of a photo apart (train.py): what it sees, and its training.

Two kinds of photos teach it.  Good ones, shot with some objects exposed otherwise than the rest: an
object's answer is the strength that gives it back.  Frames of real brackets: an object is meant to
be between what well-exposed frames and what exposure fusion make of it.  Region maps and embeddings
are those of a photo that is corrected, which has the strength that the judge gives it, right or
wrong.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evenlight.stages.corrector.inputs import rule_corrected
from evenlight.stages.photos.canvas import working
from evenlight.stages.priors import tone
from evenlight.stages.priors.clip import Clip
from evenlight.stages.priors.judge import Head, RegionHead
from evenlight.stages.priors.judge_tuning import soft
from evenlight.stages.priors.ladder import embed_ladder, embed_regions
from evenlight.stages.priors.opinion import (
    ASKED,
    FAMILY,
    LIMIT,
    decide,
    regions_read,
)
from evenlight.stages.priors.protocols import Segmenter
from evenlight.stages.settings import LadderSettings
from recipes.clip_lite0 import photos as clip_photos
from recipes.judge import camera, photos

# N draws, R regions (the rest of the rows are 0), S strengths

SIDE = 384  # long side of photos
LADDER = LadderSettings(offsets=ASKED)
CHUNK = 250
EVEN, LONE = 0.28, 0.68  # shares up to which no object differs, one to three regions do; else one
# object of several regions
STOPS = (0.4, 3.4)  # between an object and the rest, either way
BRACKETS = 0.35  # of a batch
TOLD = 0.5  # share of draws that start where the judge would; else near what is right
NEAR = 0.15  # sd
STEPS, BATCH, RATE, DECAY = 4500, 64, 1e-3, 0.1
KEPT = (
    "clip_photo", "clip_ladder", "clip_regions", "tones", "region_tones", "region_areas",
    "region_labels", "rule_strength", "whole", "wanted",
)  # fmt: skip
MOVED = (-0.5, 0.5)  # strengths that a frame may be moved by
COUNTS = 0.02  # least share of a well-exposed frame
Array = NDArray[np.float32]
Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Models:
    segmenter: Segmenter
    clip: Clip

    def labels(self, photo: photos.Photo) -> NDArray[np.uint8]:
        return self.segmenter.segment(rule_corrected(photo)).labels


# --- objects that were exposed otherwise ---------------------------------------------------------


def uneven(
    photo: photos.Photo, labels: NDArray[np.uint8], rng: np.random.Generator
) -> photos.Photo:
    """A good photo shot with some objects exposed otherwise than the rest, and maybe all wrong."""
    areas = np.bincount(labels.ravel(), minlength=2) / labels.size
    stops = np.zeros(labels.shape, np.float32)
    kind, side = rng.random(), rng.choice([-1, 1])
    if EVEN <= kind < LONE:
        large = np.flatnonzero((areas > 0.01) & (areas < 0.75) & (np.arange(len(areas)) > 0))
        alike = rng.uniform(*STOPS) if rng.random() < 0.5 else None
        for label in rng.permutation(large)[: int(rng.integers(1, 4))]:
            stops[labels == label] = side * (alike or rng.uniform(*STOPS))
    elif kind >= LONE:
        chosen = _neighbours(labels, areas, int(rng.integers(2, 6)), rng)
        if areas[chosen].sum() < 0.8:
            stops[np.isin(labels, chosen)] = side * rng.uniform(*STOPS)
    stops = cv2.GaussianBlur(stops, (0, 0), rng.uniform(0.5, 6))
    if rng.random() < 0.5:
        stops += np.float32((0.2 + 3 * rng.beta(1, 1.5)) * rng.choice([-1, 1]))
    return _shot(photo, stops, rng)


def _neighbours(
    labels: NDArray[np.uint8], areas: NDArray[np.float64], count: int, rng: np.random.Generator
) -> list[int]:
    """Labels of so many regions that touch."""
    found = [int(x) for x in rng.permutation(np.flatnonzero(areas > 0.004))[:1] if x]
    while found and len(found) < count:
        reach = cv2.dilate(np.isin(labels, found).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        near = np.setdiff1d(labels[reach], [0, *found])
        if not len(near):
            break
        found.append(int(rng.choice(near)))
    return found


def _shot(photo: photos.Photo, stops: Array, rng: np.random.Generator) -> photos.Photo:
    """What a camera with a film curve of its own keeps, exposed by so many stops at each pixel."""
    x = (photo.astype(np.float32) + rng.random(photo.shape, np.float32) - 0.5).clip(0, 255) / 255
    b = np.float32(rng.uniform(1.2, 2.2))
    exposure = -np.log1p(-(x.clip(0, 0.998) ** (1 / b))) * np.exp(0.45 * stops)[..., None]
    y = (1 - np.exp(-exposure)).clip(1e-6, 1) ** b
    if stops.mean() > 0.3:
        y = y / rng.uniform(0.88, 1)
    return camera.kept(y, 0.0, rng)


# --- rows ----------------------------------------------------------------------------------------


def natural_rows(paths: list[Path], models: Models, seed: int, chunk: int) -> dict[str, Tensor]:
    """One chunk of uneven shots, drawn from (seed, chunk)."""
    rng = np.random.default_rng([seed, 7, chunk])
    rows = []
    for index in rng.integers(0, len(paths), CHUNK):
        photo = working(_read(paths[index]), SIDE)[:, :: rng.choice([-1, 1])].copy()
        labels = models.labels(photo)
        shot = uneven(photo, labels, rng)
        found = _row(shot, labels, models.clip)
        rows.append(found | _answers(shot, labels, found, [(1.0, photo)], photo))
    return _stacked(rows)


def bracket_rows(scenes: list[Path], models: Models, seed: int, chunk: int) -> dict[str, Tensor]:
    """Every frame of every scene once, each cropped from (seed, chunk), half of them moved along
    the film curve."""
    rng = np.random.default_rng([seed, 11, chunk])
    return _stacked([row for scene in scenes for row in _scene_rows(scene, models, rng)])


def _scene_rows(scene: Path, models: Models, rng: np.random.Generator) -> Iterator[Row]:
    """Nothing where no frame and no fusion is well exposed."""
    frames = sorted(map(_read, clip_photos.image_files(scene)), key=clip_photos.mean_luma)
    if len({frame.shape for frame in frames}) > 1:
        return
    well = photos.well_exposed(frames)
    if well is None:
        return
    fusion, shares = well
    for frame in frames:
        box = _box(frame.shape, rng)
        shot, fused, *others = (_boxed(x, box) for x in (frame, fusion, *frames))
        if rng.random() < 0.5:
            shot = tone.on_bytes(FAMILY, shot, float(rng.uniform(*MOVED)))
        labels = models.labels(shot)
        found = _row(shot, labels, models.clip)
        counting = [(s, other) for s, other in zip(shares, others, strict=True) if s > COUNTS]
        yield found | _answers(shot, labels, found, counting, fused)


def _row(shot: photos.Photo, labels: NDArray[np.uint8], clip: Clip) -> Row:
    """What the judge reads of a photo and of its regions."""
    seen = embed_ladder(shot, clip, LADDER, ASKED)
    return seen | embed_regions(shot, labels, clip, LADDER, float(seen["rule_strength"]))


def _answers(
    shot: photos.Photo,
    labels: NDArray[np.uint8],
    found: Row,
    frames: list[tuple[float, NDArray]],
    fusion: NDArray,
) -> Row:
    """The strength that the whole is meant to have, and those of the regions embedded (R): the mean
    of what well-exposed frames, with their shares, and the fusion say."""
    shares, others = zip(*frames, strict=True)

    def meant(mask: NDArray[np.bool_]) -> float:
        in_frames = [photos.strength_to(shot[mask], other[mask]) for other in others]
        in_fusion = photos.strength_to(shot[mask], fusion[mask])
        return (float(np.average(in_frames, weights=shares)) + in_fusion) / 2

    whole = meant(np.ones(labels.shape, bool))
    wanted = np.full(len(found["region_labels"]), whole, np.float32)
    present = found["region_labels"][found["region_labels"] > 0]
    wanted[: len(present)] = [meant(labels == label) for label in present]
    return {"whole": np.array(whole, np.float32), "wanted": wanted}


def _stacked(rows: list[Row]) -> dict[str, Tensor]:
    kept = [row for row in rows if row["region_labels"].any()]
    return {name: torch.from_numpy(np.stack([row[name] for row in kept])) for name in KEPT}


def _read(path: Path) -> photos.Photo:
    return np.ascontiguousarray(cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1])


def _box(shape: tuple[int, ...], rng: np.random.Generator) -> tuple[slice, slice, int]:
    """Most of a photo, as rows and columns, and which way it is read."""
    height, width = (int(side * rng.uniform(0.62, 1)) for side in shape[:2])
    top, left = rng.integers(0, shape[0] - height + 1), rng.integers(0, shape[1] - width + 1)
    return slice(top, top + height), slice(left, left + width), int(rng.choice([-1, 1]))


def _boxed(photo: NDArray, box: tuple[slice, slice, int]) -> NDArray:
    rows, columns, way = box
    part = np.ascontiguousarray(photo[rows, columns][:, ::way])
    shrunk = min(1.0, SIDE / max(part.shape))
    width, height = (int(side * shrunk) // 8 * 8 for side in part.shape[1::-1])
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)


# --- training ------------------------------------------------------------------------------------


def trained(
    natural: dict[str, Tensor], brackets: dict[str, Tensor], photo_head: Head, seed: int
) -> RegionHead:
    """A head that reads embeddings of as many numbers as the photo's head, after AdamW with a
    cosine."""
    torch.manual_seed(seed)
    head = RegionHead(photo_head.dim).train()
    told = [_told(rows, photo_head) for rows in (natural, brackets)]
    optim = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    counts = BATCH - round(BATCH * BRACKETS), round(BATCH * BRACKETS)
    for step in range(STEPS):
        for group in optim.param_groups:
            done = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
            group["lr"] = RATE * min(1.0, (step + 1) / 100) * done
        parts = []
        for rows, by_judge, count in zip((natural, brackets), told, counts, strict=True):
            index = torch.randint(len(by_judge), (count,))
            near = rows["whole"][index] + NEAR * torch.randn(count)
            start = torch.where(torch.rand(count) < TOLD, by_judge[index], near)
            parts.append(_errors(head, rows, index, start.clamp(-LIMIT, LIMIT)))
        errors, weights = (torch.cat(part) for part in zip(*parts, strict=True))
        loss = (weights * errors).sum() / weights.sum()
        optim.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optim.step()
    return head.eval()


def _told(rows: dict[str, Tensor], photo_head: Head) -> Tensor:
    """Strengths that the judge gives the photos.  N."""
    cached = (_cached(rows, n) for n in range(len(rows["whole"])))
    return torch.tensor([decide(photo_head.opinion(one, ASKED), 0.0) for one in cached])


def _errors(
    head: RegionHead, rows: dict[str, Tensor], index: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropies of the strengths between regions and their photos, which are given `start`,
    and the weights of these.  n,R each."""
    pairs = zip(index.tolist(), start.tolist(), strict=True)
    read = [_padded(regions_read(_cached(rows, n), ASKED, t)) for n, t in pairs]
    logits = head(*(torch.from_numpy(np.stack(x)) for x in zip(*read, strict=True)))
    between = (rows["wanted"][index] - start[:, None]).clamp(-LIMIT, LIMIT)
    labels = soft(between.flatten()).reshape(logits.shape)
    weights = (rows["region_labels"][index] > 0) * rows["region_areas"][index].clamp(0.01).sqrt()
    return -(labels * logits.log_softmax(-1)).sum(-1), weights


def _cached(rows: dict[str, Tensor], n: int) -> dict[str, np.ndarray]:
    return {name: values[n].numpy() for name, values in rows.items()}


def _padded(read: tuple[Array, ...]) -> tuple[Array, ...]:
    """With rows of regions that are none."""
    missing = LADDER.regions - len(read[0])
    return (*(np.pad(x, [(0, missing), (0, 0)]) for x in read[:3]), *read[3:])
