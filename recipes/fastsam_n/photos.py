"""Photos with human segmentations, as `fastsam-n` sees them in training.

BSDS500 holds train/*.jpg, val/*.jpg and groundTruth/{train,val}/*.mat, with four to nine
annotators a photo.  Every view is re-made from a seed and a step, so that a run can go on from
any step as if it had never stopped.
"""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat

LONG_SIDES = (288, 320, 352, 384)
PASTED = 0.25  # share of views that get segments of another photo
RE_EXPOSED = 0.4  # share of views taken at another exposure
Photo = tuple[NDArray[np.uint8], list[NDArray[np.uint16]]]
View = tuple[NDArray, NDArray[np.uint16]]


def read_photos(folder: Path, split: str) -> list[Photo]:
    """Every photo (HxWx3 uint8 RGB) with every annotator's segment map (HxW, from 1)."""
    photos: list[Photo] = []
    for path in sorted((folder / split).glob("*.jpg")):
        truth = loadmat(folder / "groundTruth" / split / f"{path.stem}.mat")["groundTruth"][0]
        maps = [one["Segmentation"][0, 0].astype(np.uint16) for one in truth]
        photos.append((cv2.imread(str(path))[..., ::-1], maps))
    if not photos:
        raise SystemExit(f"no photos at {folder / split}: expected BSDS500, *.jpg")
    return photos


def batches_from(photos: list[Photo], size: int, seed: int, first: int) -> Iterator[dict]:
    """Batches of steps `first`, `first` + 1, ...: each of one shape, all photos once a round."""
    orders: dict[int, list[list[Photo]]] = {}
    step = first
    per_round = len(_batches_of_round(photos, size, seed, 0))
    while True:
        round_number, place = divmod(step - 1, per_round)
        if round_number not in orders:
            orders = {round_number: _batches_of_round(photos, size, seed, round_number)}
        random = np.random.default_rng([seed, 1, step])
        batch = orders[round_number][place]
        long = int(random.choice(LONG_SIDES))
        aspect = 2 / 3 if random.random() < 0.5 else random.uniform(2 / 3, 1)
        short = round(long * aspect / 32) * 32
        shape = (short, long) if _is_landscape(batch[0]) else (long, short)
        views = [view(photo, shape, random) for photo in batch]
        yield collate([finished(pasted(views, i, random), random) for i in range(len(views))])
        step += 1


def _batches_of_round(
    photos: list[Photo], size: int, seed: int, round_number: int
) -> list[list[Photo]]:
    """Landscape and portrait apart, in random order; a group's last batch may be smaller."""
    random = np.random.default_rng([seed, 0, round_number])
    batches = []
    for landscape in (True, False):
        group = [photo for photo in photos if _is_landscape(photo) == landscape]
        order = random.permutation(len(group))
        batches += [[group[i] for i in order[at : at + size]] for at in range(0, len(group), size)]
    return [batches[i] for i in random.permutation(len(batches))]


def _is_landscape(photo: Photo) -> bool:
    return photo[0].shape[1] > photo[0].shape[0]


def view(photo: Photo, shape: tuple[int, int], random: np.random.Generator) -> View:
    """A crop at this shape, maybe mirrored: HxWx3 uint8 and one annotator's segments, HxW."""
    rgb, maps = photo
    segments = maps[random.integers(len(maps))]
    height, width = segments.shape
    if random.random() < 0.6:
        h, w = (int(side * random.uniform(0.6, 1)) for side in (height, width))
        top, left = random.integers(height - h + 1), random.integers(width - w + 1)
        rgb = rgb[top : top + h, left : left + w]
        segments = segments[top : top + h, left : left + w]
    rgb = cv2.resize(rgb, shape[::-1], interpolation=cv2.INTER_AREA)
    segments = cv2.resize(segments, shape[::-1], interpolation=cv2.INTER_NEAREST)
    return (rgb[:, ::-1], segments[:, ::-1]) if random.random() < 0.5 else (rgb, segments)


def pasted(views: list[View], index: int, random: np.random.Generator) -> View:
    """The view, at times with a few middle-sized segments of another on it where they lay there."""
    rgb, segments = views[index]
    if random.random() >= PASTED or len(views) == 1:
        return rgb, segments
    other, from_other = views[(index + random.integers(1, len(views))) % len(views)]
    areas = np.bincount(from_other.ravel()) / from_other.size
    usable = np.flatnonzero((areas > 0.01) & (areas < 0.3))
    rgb, segments = rgb.copy(), segments.copy()
    for label in random.permutation(usable)[: random.integers(1, 4)]:
        mask = from_other == label
        rgb[mask], segments[mask] = other[mask], segments.max() + 1
    return rgb, segments


def finished(viewed: View, random: np.random.Generator) -> View:
    """The view in [0, 1], its colours shifted and at times re-exposed by -3 to +2 EV.

    Half of the re-exposed are brought back to mean luma 119 by the `film` curve, which is what
    the pipeline gives the segmenter.
    """
    rgb = viewed[0].astype(np.float32) / 255
    if random.random() < 0.5:
        grey = (rgb @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        gains = random.uniform(0.85, 1.15, 3).astype(np.float32)
        rgb = ((grey + random.uniform(0, 1.4) * (rgb - grey)) * gains).clip(0, 1)
    if random.random() < RE_EXPOSED:
        rgb = re_exposed(rgb, random.uniform(-3, 2), random)
        if random.random() < 0.5:
            rgb = film_rule(rgb)
    return rgb.astype(np.float32), np.ascontiguousarray(viewed[1])


def re_exposed(rgb: NDArray, ev: float, random: np.random.Generator) -> NDArray[np.float32]:
    """The photo taken `ev` stops brighter: gain and sensor noise in linear light, 8 bits."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) * 2.0**ev
    if ev < 0:
        shot, read = 10.0 ** random.uniform(-4.5, -3.2), 10.0 ** random.uniform(-3.5, -2.5)
        noise = random.standard_normal(rgb.shape, dtype=np.float32)
        linear = linear + noise * np.sqrt(shot * linear + read**2)
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (np.round(encoded * 255) / 255).astype(np.float32)


def film_rule(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """The photo on the `film` curve (docs/method.md 1) that brings its mean luma to 119/255."""
    small = rgb[::4, ::4]
    low, high = -2.2, 2.2
    for _ in range(10):
        strength = (low + high) / 2
        luma = film(small, strength) @ np.array([0.299, 0.587, 0.114], np.float32)
        low, high = (strength, high) if luma.mean() < 119 / 255 else (low, strength)
    return film(rgb, (low + high) / 2)


def film(rgb: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    curve = (1 - (1 - rgb ** (1 / 1.6)).clip(0, 1) ** np.exp(strength)) ** 1.6
    return curve.astype(np.float32)


def collate(samples: list[View]) -> dict:
    """A batch as v8SegmentationLoss reads it; masks at /4, numbered from 1 within each photo."""
    masks, boxes, owners = [], [], []
    for owner, (_, segments) in enumerate(samples):
        height, width = segments.shape
        quarter = segments[2::4, 2::4]
        numbered = np.zeros(quarter.shape, np.float32)
        count = 0
        for label in np.unique(quarter):
            mask = segments == label
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
            area = np.count_nonzero(mask)
            if area < 0.001 * segments.size or min(bottom - top, right - left) < 6:
                continue  # too small for a stride of 8
            count += 1
            numbered[quarter == label] = count
            centre = ((left + right) / 2 / width, (top + bottom) / 2 / height)
            boxes.append((*centre, (right - left) / width, (bottom - top) / height))
            owners.append(owner)
        masks.append(numbered)
    photos = torch.from_numpy(np.stack([rgb for rgb, _ in samples])).permute(0, 3, 1, 2)
    return {
        "img": photos.contiguous(memory_format=torch.channels_last),
        "masks": torch.from_numpy(np.stack(masks)),
        "bboxes": torch.tensor(boxes, dtype=torch.float32),
        "cls": torch.zeros(len(boxes), 1),
        "batch_idx": torch.tensor(owners, dtype=torch.float32),
    }
