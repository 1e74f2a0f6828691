"""Fit the meter (stages/priors/meter.py): print the table of its matrix reading, write its tone
reading.

    python -m recipes.meter.train --brackets FOLDER --good FOLDER [FOLDER ...] --out FILE

--brackets: one sub-folder of frames per scene; every fifth scene is left for measure_pseudo_gt.py.
--good: photos that are exposed as they should be, for the tone reading alone.  --out: the shipped
stages/weights/meter.safetensors.

What a bracket says of its scene's brightness is the mean of two answers:
the strength to its well-exposed frames (weighted by mid-tones less lost pixels), and the strength
to its exposure fusion (Mertens et al. 2007).  Either alone, or one best frame, is noisier: which
frame happens to exist near the right exposure is chance.
"""

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from evenlight.stages.pixels import luma, to_float
from evenlight.stages.priors import meter, tone
from recipes.meter import tone_reading

Frame = NDArray[np.uint8]
SIDE = 96
HOLD_OUT = 5
STRENGTHS = np.linspace(-3, 3, 121)
USABLE_LUMA = (90 / 255, 160 / 255)  # of the fusion: darker and brighter scenes lack a good frame
RIDGE = 30.0
SHARPNESS = 0.05  # of the softmax over well-exposedness
REACH = 2.5  # frames that the rule moves further are lost


@dataclass(frozen=True)
class Scene:
    """The frames that can be corrected.  F: features of the matrix reading."""

    frames: list[Frame]  # TONE_SIDE a side
    features: NDArray[np.float64]  # frames, F
    answers: NDArray[np.float64]  # frames: strength beyond the rule, as the bracket says
    rule: NDArray[np.float64]  # frames: the rule's strength


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--brackets", type=Path, required=True)
    parser.add_argument("--good", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folders = [
        folder
        for index, folder in enumerate(scene_folders(arguments.brackets))
        if index % HOLD_OUT != HOLD_OUT - 1
    ]
    scenes = [scene for folder in folders if (scene := read_scene(folder)) is not None]
    left = left_over(scenes)
    whole = np.sqrt(np.mean([np.mean(scene.answers**2) for scene in scenes]))
    print(f"{len(scenes)} of {len(folders)} scenes have a good frame.  Strength beyond the rule,")
    print(f"root mean square: {whole:.3f}; left by the meter on scenes not fitted on: {left:.3f}")
    bias, weights = fit(scenes)
    print(f"BIAS = {bias:.4f}")
    print("WEIGHTS = (")
    for name, weight in zip((*meter.PERCENTILES, *meter.ZONES), weights, strict=True):
        print(f"    {weight:.4f},  # {name}")
    print(")")
    sets = [tone_examples(scenes), tone_reading.good_examples(arguments.good, seed=0)]
    tone_reading.write(tone_reading.joined(sets), arguments.out)


def scene_folders(root: Path) -> list[Path]:
    return sorted(folder for folder in root.iterdir() if folder.is_dir())


def read_frames(folder: Path, side: int = SIDE) -> list[Frame]:
    """Frames of one scene, RGB squares, darkest first."""
    frames = [cv2.imread(str(path))[..., ::-1] for path in sorted(folder.iterdir())]
    small = [cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA) for frame in frames]
    return sorted(small, key=lambda frame: float(frame.mean()))


def read_scene(folder: Path) -> Scene | None:
    """None where the bracket lacks a good frame."""
    large = read_frames(folder, meter.TONE_SIDE)
    frames = [cv2.resize(frame, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for frame in large]
    # the fusion works in BGR and may leave the range
    fusion = cv2.createMergeMertens().process([frame[..., ::-1].copy() for frame in frames])
    fusion = fusion[..., ::-1].clip(0, 1)
    if not USABLE_LUMA[0] < as_photos(fusion[None]).mean() < USABLE_LUMA[1]:
        return None
    score = np.array([well_exposedness(frame) for frame in frames])
    share = np.exp((score - score.max()) / SHARPNESS)
    share /= share.sum()
    photos = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255
    rule = tone.rule_strength(photos, meter.FAMILY).numpy()
    answers = []
    for frame in frames:
        to_frames = np.array([closest_strength(frame, other / 255) for other in frames])
        answers.append((share @ to_frames + closest_strength(frame, fusion)) / 2)
    offsets = np.array(answers) - rule
    kept = (np.abs(rule) < REACH) & (np.abs(offsets) < 2 * meter.MAX_OFFSET)
    if not kept.any():
        return None
    return Scene(
        frames=[large[index] for index in np.flatnonzero(kept)],
        features=matrix_features(photos).double().numpy()[kept],
        answers=offsets.clip(-meter.MAX_OFFSET, meter.MAX_OFFSET)[kept],
        rule=rule[kept].astype(np.float64),
    )


def matrix_features(photos: torch.Tensor) -> torch.Tensor:
    return meter.matrix_features(F.adaptive_avg_pool2d(photos, meter.SIDE))


def tone_examples(scenes: list[Scene]) -> tone_reading.Examples:
    """The same answers for the tone reading; every scene counts the same."""
    sets = []
    for scene in scenes:
        strengths = scene.rule + scene.answers
        sets.append(
            tone_reading.one_set(
                [meter.tone_features(to_float(frame))[0] for frame in scene.frames],
                scene.answers.tolist(),
                (np.abs(strengths) < tone_reading.GOOD_STRENGTH).tolist(),
                share=1 / len(scenes),
                bracket=True,
            )
        )
    return tone_reading.joined(sets)


def as_photos(rgb_BHW3: NDArray[np.floating]) -> torch.Tensor:
    """Luma of float photos in [0, 1]."""
    return luma(torch.from_numpy(np.ascontiguousarray(rgb_BHW3)).permute(0, 3, 1, 2).float())


def well_exposedness(frame: Frame) -> float:
    """Share of mid-tones less half the share of lost pixels."""
    levels = as_photos(frame[None] / 255).numpy()
    mid = np.exp(-((levels - 0.5) ** 2) / (2 * 0.22**2)).mean()
    return float(mid - 0.5 * ((levels > 0.98) | (levels < 0.02)).mean())


def closest_strength(frame: Frame, target: NDArray[np.floating]) -> float:
    """Strength of the film curve at which the frame is nearest to the target (least squares)."""
    small = cv2.resize(frame, (48, 48), interpolation=cv2.INTER_AREA)
    goal = cv2.resize(target.astype(np.float32), (48, 48), interpolation=cv2.INTER_AREA)
    errors = ((film_curves()[:, small] - goal) ** 2).mean((1, 2, 3))
    return float(STRENGTHS[int(errors.argmin())])


@functools.cache
def film_curves() -> NDArray[np.float32]:
    """The film curve at 256 levels for each of STRENGTHS."""
    levels, strengths = torch.linspace(0, 1, 256), torch.from_numpy(STRENGTHS).float()
    return tone.apply(meter.FAMILY, levels, strengths[:, None]).numpy()


def fit(scenes: list[Scene]) -> tuple[float, NDArray[np.float64]]:
    """Ridge regression on standardised features; every scene counts the same."""
    features = np.concatenate([scene.features for scene in scenes])
    answers = np.concatenate([scene.answers for scene in scenes])
    share = np.concatenate([np.full(len(s.answers), 1 / len(s.answers)) for s in scenes])
    centre, scale = np.average(features, 0, share), features.std(0)
    mean = np.average(answers, weights=share)
    x = (features - centre) / scale
    gram = (x * share[:, None]).T @ x + RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, (x * share[:, None]).T @ (answers - mean)) / scale
    return float(mean - centre @ weights), weights


def left_over(scenes: list[Scene]) -> float:
    """Root mean square of what the meter leaves of the answers, by cross-validation."""
    order = np.random.default_rng(0).permutation(len(scenes))
    errors = []
    for fold in range(5):
        bias, weights = fit([scenes[i] for i in order if i % 5 != fold])
        errors += [
            np.mean((s.answers - bias - s.features @ weights) ** 2)
            for s in (scenes[i] for i in order if i % 5 == fold)
        ]
    return float(np.sqrt(np.mean(errors)))


if __name__ == "__main__":
    main()
