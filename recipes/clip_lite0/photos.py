"""Good photos and real brackets for clip-lite0, and their strengths on the film curve.

What the recipe (train.py) and the benchmark (benchmarks/measure_clip_lite0.py) both read.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch

from evenlight.stages.priors import tone

# H W pixels, T strengths of the grid

SIDE = 224  # photos are kept in memory at this size, squashed to a square as CLIP sees them
GRID_T = np.linspace(-3, 3, 121)
LUMA = np.array([0.299, 0.587, 0.114])
SUFFIXES = {".jpg", ".jpeg", ".png"}


def film_tables(strengths: np.ndarray) -> np.ndarray:
    """The film curve at 256 levels, as the pipeline applies it.  Returns T,256 float32."""
    levels = torch.linspace(0, 1, 256)
    return tone.apply("film", levels, torch.as_tensor(strengths).float()[:, None]).numpy()


FILM = film_tables(GRID_T)


@dataclass(frozen=True)
class Photo:
    pixels: np.ndarray  # SIDE,SIDE,3 uint8 RGB
    content: str  # what is in it, "" where unknown


@dataclass(frozen=True)
class Bracket:
    scene: str
    frames: list[np.ndarray]  # each SIDE,SIDE,3 uint8 RGB, sorted by mean luma
    best: int  # index of the frame that is exposed best
    to_best: list[float]  # film strength that brings each frame closest to the best one


@dataclass(frozen=True)
class Pool:
    """chosen: photos picked as well exposed; web: ordinary ones with their makers' errors."""

    chosen: list[Photo] = field(default_factory=list)
    web: list[Photo] = field(default_factory=list)
    brackets: list[Bracket] = field(default_factory=list)
    held_photos: list[Photo] = field(default_factory=list)
    held_brackets: list[Bracket] = field(default_factory=list)


def load_pool(folders: list[Path], hold_out: int = 5) -> Pool:
    """Read all photos. A folder with manifest.csv holds brackets, one sub-folder per scene.

    Every `hold_out`-th scene is kept for the benchmark alone, and every 16th photo for fitting the
    temperature. Photos whose names carry an ImageNet class count as ordinary web photos.
    """
    pool = Pool()
    for folder in folders:
        if (folder / "manifest.csv").is_file():
            scenes = sorted(p for p in folder.iterdir() if p.is_dir())
            for index, scene in enumerate(scenes):
                held = index % hold_out == hold_out - 1
                (pool.held_brackets if held else pool.brackets).append(read_bracket(scene))
            continue
        for index, path in enumerate(image_files(folder)):
            photo = Photo(read(path), content_of(path.stem))
            if not 0.13 < mean_luma(photo.pixels) < 0.88:
                continue
            kept = pool.web if photo.content else pool.chosen
            (pool.held_photos if index % 16 == 15 else kept).append(photo)
    return pool


def image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def read(path: Path, side: int = SIDE) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert image is not None, path
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small[..., ::-1])


def read_bracket(folder: Path) -> Bracket:
    frames = sorted((read(p) for p in image_files(folder)), key=mean_luma)
    best = int(np.argmax([well_exposedness(f) for f in frames]))
    return Bracket(folder.name, frames, best, [closest_strength(f, frames[best]) for f in frames])


def content_of(stem: str) -> str:
    """ImageNet sample names are n01440764_tench: the words after the number are the content."""
    match = re.fullmatch(r"n\d{8}_(.+)", stem)
    return match.group(1).replace("_", " ").lower() if match else ""


def mean_luma(pixels: np.ndarray) -> float:
    return float(np.array(cv2.mean(pixels)[:3]) / 255 @ LUMA)


def well_exposedness(pixels: np.ndarray) -> float:
    """Share of mid-toned pixels less the share of lost ones: how good a frame of a bracket is."""
    luma = (pixels[::2, ::2] / 255) @ LUMA
    mid = np.exp(-((luma - 0.5) ** 2) / (2 * 0.22**2)).mean()
    lost = ((luma > 0.98) | (luma < 0.02)).mean()
    return float(mid - 0.5 * lost)


def closest_strength(frame: np.ndarray, target: np.ndarray) -> float:
    """Film strength at which the re-exposed frame is nearest to the target (least squares)."""
    small = cv2.resize(frame, (48, 48), interpolation=cv2.INTER_AREA)
    goal = cv2.resize(target, (48, 48), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    errors = ((FILM[:, small] - goal) ** 2).mean((1, 2, 3))
    return float(GRID_T[int(errors.argmin())])


def matching_strength(pixels: np.ndarray, target_luma: float, stride: int = 2) -> float:
    """Film strength at which the mean luma of the re-exposed pixels is the target."""
    weight = np.zeros(256)
    for channel, share in enumerate(LUMA):
        counts = np.bincount(pixels[::stride, ::stride, channel].ravel(), minlength=256)
        weight += share * counts / counts.sum()
    return float(np.interp(target_luma, FILM @ weight, GRID_T))


def film(pixels: np.ndarray, t: float) -> np.ndarray:
    """uint8 in, float32 in [0, 1] out."""
    return pixels.astype(np.float32) / 255 if t == 0 else film_tables(np.array([t]))[0][pixels]
