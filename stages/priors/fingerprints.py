"""What the frozen models are known by, read from their files: no torch is imported here.

A fingerprint is the hex sha256 of all that decides what a model answers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evenlight.cache.errors import EnvironmentLacks
from evenlight.cache.files import canonical_json, sha256_bytes, sha256_file
from evenlight.stages.settings import ClipSettings, RegionSettings
from evenlight.stages.weights import shipped

SHIPPED_CLIP = "clip-lite0"
REGION_EMBEDDER = "region-embedder"
FETCH = "'evenlight weights fetch'"
WHERE = f"use the shipped 'fastsam-n', or fetch official weights with {FETCH}"


@dataclass(frozen=True)
class Reading:
    """How a CLIP reads a photo: squashed to a square of `size` pixels, (x - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int


def segmenter_file(settings: RegionSettings) -> Path:
    """The FastSAM weights that settings name.  Raises EnvironmentLacks where they are missing."""
    path = Path(settings.segmenter).expanduser()
    if path.name == settings.segmenter and shipped(path.name).is_file():
        path = shipped(path.name)
    if not path.is_file():
        raise EnvironmentLacks(f"FastSAM weights not found: {path} is not a file; {WHERE}")
    return path


def of_segmenter(settings: RegionSettings) -> str:
    return sha256_file(segmenter_file(settings))


def clip_file(settings: ClipSettings) -> Path:
    """The CLIP weights that settings name.  Raises EnvironmentLacks where they are missing."""
    if settings.model == SHIPPED_CLIP and not settings.weights:
        return _present(shipped(SHIPPED_CLIP))
    cure = f"run {FETCH} where there is a network"
    if not settings.weights:
        raise EnvironmentLacks(
            f"clip.model is {settings.model} but clip.weights names no file: give the path of its "
            f"weights, or {cure}"
        )
    path = Path(settings.weights).expanduser().resolve()
    if not path.is_file():
        raise EnvironmentLacks(
            f"weights of {settings.model} are not at {path}: correct clip.weights, or {cure}"
        )
    return path


def _present(path: Path) -> Path:
    if not path.is_file():
        raise EnvironmentLacks(f"{path} is missing: this install is damaged, reinstall")
    return path


def shipped_config() -> dict:
    """What stands beside the weights of clip-lite0: `model_cfg` and `preprocess_cfg`."""
    return json.loads(_present(shipped(SHIPPED_CLIP).with_suffix(".json")).read_text())


def shipped_reading(settings: ClipSettings) -> Reading:
    """How clip-lite0 reads a photo, where the settings leave it to the model."""
    own = shipped_config()["preprocess_cfg"]
    return Reading(
        settings.mean or tuple(own["mean"]),
        settings.std or tuple(own["std"]),
        settings.image_size or own["size"],
    )


def of_shipped_clip(settings: ClipSettings) -> str:
    return of_clip(SHIPPED_CLIP, clip_file(settings), shipped_reading(settings))


def of_clip(model: str, weights: Path, reading: Reading, regions: Path | None = None) -> str:
    """regions: weights that embed regions, whatever the CLIP; None: those that ship."""
    facts = {
        "model": model,
        "weights": sha256_file(weights),
        "mean": [float(v) for v in reading.mean],
        "std": [float(v) for v in reading.std],
        "size": reading.size,
        "regions": sha256_file(regions or _present(shipped(REGION_EMBEDDER))),
    }
    return sha256_bytes(canonical_json(facts))


def of_judge(tensors: Mapping[str, np.ndarray]) -> str:
    """tensors: float32, by name (judge.Judge)."""
    content = [(name, sha256_bytes(x.tobytes())) for name, x in sorted(tensors.items())]
    return sha256_bytes(canonical_json(content))
