"""Photos of the judge's recipe: natural ones, real brackets, and who is held out.

A photo is held out by its name alone, a bracket by its scene, so that no run ever trains on what
another one measures on.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from evenlight.stages.priors import tone
from evenlight.stages.priors.fastsam import load_segmenter
from evenlight.stages.settings import RegionSettings
from recipes.clip_lite0 import photos as clip_photos

# H W pixels, S strengths

Photo = NDArray[np.uint8]  # H,W,3 RGB
SIDE = 208  # photos are kept in memory at this size, squashed to a square as CLIP sees them
GRID = np.linspace(-3, 3, 121).astype(np.float32)
HOLD_OUT = 5  # every fifth scene of brackets is left to benchmarks
SHARPNESS = 0.05  # of the softmax over well-exposedness of a bracket's frames
USABLE_LUMA = (0.30, 0.66)  # of the fusion: darker and brighter scenes lack a good frame
# Scenes of SICE that eval_dev/expert scores (its README): never trained on.
SCORED_SCENES = {
    "c059", "c137", "c138", "c140", "c142", "c143", "c144", "c145", "c146", "c147", "c182", "c228",
}  # fmt: skip


def film_curves() -> NDArray[np.float32]:
    """The film curve at 256 levels for each of GRID.  S,256."""
    levels = torch.arange(256) / 255
    return tone.apply("film", levels, torch.from_numpy(GRID)[:, None]).numpy()


CURVES = film_curves()
CURVES_SQUARED = (CURVES.astype(np.float64) ** 2).astype(np.float32)


@dataclass(frozen=True)
class Natural:
    pixels: Photo  # SIDE,SIDE,3
    content: str  # what is in it, "" where unknown
    path: Path


@dataclass(frozen=True)
class Bracket:
    scene: str
    frames: list[Photo]  # SIDE,SIDE,3, darkest first
    strengths: NDArray[np.float32]  # of each frame, to what the scene is meant to be
    best: int  # index of the frame nearest to that


def split_of(name: str) -> str:
    """What a photo is for, by its name: half of them train the tower, and others the heads, which
    must not learn from embeddings of photos that the tower knows by heart.

    "tower", "heads", "choose" (a tenth, to choose settings on) or "measure" (a tenth, to report).
    """
    digit = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return ("measure", "choose", "heads", "heads", "heads")[digit] if digit < 5 else "tower"


def natural_photos(folders: list[Path], split: str) -> list[Natural]:
    """Photos taken to be as their makers meant them, of one split."""
    paths = (path for folder in folders for path in clip_photos.image_files(folder))
    return [
        Natural(clip_photos.read(path, SIDE), clip_photos.content_of(path.stem), path)
        for path in paths
        if split_of(path.name) == split
    ]


def label_maps(natural: list[Natural], folder: Path) -> NDArray[np.uint8]:
    """Region map of every photo, N,SIDE,SIDE; made once and kept in the folder."""
    names = hashlib.sha256(repr([str(photo.path) for photo in natural]).encode()).hexdigest()
    path = folder / f"regions-{names[:12]}.npy"
    if not path.is_file():
        segmenter = load_segmenter(RegionSettings(), "cpu")
        np.save(path, np.stack([segmenter.segment(photo.pixels).labels for photo in natural]))
    return np.load(path)


def brackets(root: Path, split: str) -> list[Bracket]:
    """Real brackets of a split (`scenes`).  The tower sees none: there are too few not to be known
    by heart."""
    found = (read_bracket(folder) for folder in scenes(root, split))
    return [bracket for bracket in found if bracket is not None]


def scenes(root: Path, split: str) -> list[Path]:
    """Scenes for "heads" or "choose": every fifth is held out for the latter, the scored ones are
    left out."""
    return [
        folder
        for index, folder in enumerate(scene_folders(root))
        if folder.name not in SCORED_SCENES
        and (index % HOLD_OUT == HOLD_OUT - 1) == (split == "choose")
    ]


def scene_folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir())


def read_bracket(folder: Path) -> Bracket | None:
    """A scene's frames and strengths; None where no frame and no fusion is well exposed.

    What a bracket says of its scene is the mean of two answers: the strength to its well-exposed
    frames (weighted), and the strength to its exposure fusion (Mertens et al. 2007).  Either alone,
    or one best frame, is noisier: which frame exists near the right exposure is chance.
    """
    frames = [clip_photos.read(path, SIDE) for path in clip_photos.image_files(folder)]
    frames.sort(key=clip_photos.mean_luma)
    well = well_exposed(frames)
    if well is None:
        return None
    fusion, share = well
    strengths = []
    for frame in frames:
        to_frames = np.array([strength_to(frame, other) for other in frames])
        strengths.append((share @ to_frames + strength_to(frame, fusion)) / 2)
    best = int(np.abs(strengths).argmin())
    return Bracket(folder.name, frames, np.array(strengths, np.float32), best)


def well_exposed(frames: list[Photo]) -> tuple[NDArray[np.float32], NDArray[np.float64]] | None:
    """The exposure fusion of a bracket, 0 to 255, and the shares of its frames by how well exposed
    they are.  None where the fusion is too dark or too bright for there to be a good frame."""
    # it works in BGR and may leave the range
    fusion = cv2.createMergeMertens().process([frame[..., ::-1].copy() for frame in frames])
    fusion = np.ascontiguousarray(fusion[..., ::-1].clip(0, 1) * 255)
    if not USABLE_LUMA[0] < clip_photos.mean_luma(fusion.astype(np.uint8)) < USABLE_LUMA[1]:
        return None
    score = np.array([clip_photos.well_exposedness(frame) for frame in frames])
    share = np.exp((score - score.max()) / SHARPNESS)
    return fusion, share / share.sum()


def strength_to(photo: Photo, target: NDArray) -> float:
    """Strength of the film curve at which the photo is nearest to the target (least squares).

    target: 0 to 255, the photo's shape.
    """
    flat = photo.ravel()
    counts = np.bincount(flat, minlength=256).astype(np.float32)
    sums = np.bincount(flat, weights=target.ravel(), minlength=256).astype(np.float32) / 255
    errors = CURVES_SQUARED @ counts - 2 * (CURVES @ sums)
    at = int(errors.argmin())
    if 0 < at < len(GRID) - 1:  # the vertex of a parabola: finer than the grid
        below, here, above = errors[at - 1 : at + 2]
        return float(GRID[at] + 0.05 * 0.5 * (below - above) / (below - 2 * here + above + 1e-12))
    return float(GRID[at])
