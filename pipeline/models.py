"""The frozen models a command needs, loaded once per process."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from evenlight.cache.errors import EnvironmentLacks, StoreError, one_line
from evenlight.stages.priors.clip import load_clip
from evenlight.stages.priors.fastsam import load_segmenter
from evenlight.stages.priors.judge import Judge
from evenlight.stages.priors.protocols import ClipModel, Segmenter
from evenlight.stages.settings import ClipSettings, RegionSettings, Settings


@dataclass(frozen=True)
class Models:
    segmenter: Segmenter
    clip: ClipModel


def load_models(settings: Settings) -> Models:
    """Segmenter and CLIP as the settings name them, on the device they name."""
    device = choose_device(settings.run.device)
    return Models(_segmenter(settings.regions, device), _clip(settings.clip, device))


def priors_of(models: Models, judge: str) -> dict[str, str]:
    """Fingerprints of the priors a corrector depends on."""
    return {
        "segmenter": models.segmenter.fingerprint,
        "clip": models.clip.fingerprint,
        "judge": judge,
    }


def read_judge(tensors: Mapping[str, Any], where: str) -> Judge:
    """The judge of arrays that were read back.  Raises StoreError where they make none."""
    try:
        judge = Judge({name: torch.as_tensor(x).float() for name, x in tensors.items()})
        assert all(bool(x.isfinite().all()) for x in judge.tensors.values()), "NaN or infinity"
    except (LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise StoreError(f"{where} cannot be used ({one_line(error)})") from error
    return judge


def choose_device(name: str) -> str:
    """ "auto" becomes cuda where there is one, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentLacks(f"run.device is {name}, but torch finds no CUDA device here")
    return name


@functools.lru_cache(maxsize=2)
def _segmenter(settings: RegionSettings, device: str) -> Segmenter:
    return load_segmenter(settings, device)


@functools.lru_cache(maxsize=2)
def _clip(settings: ClipSettings, device: str) -> ClipModel:
    return load_clip(settings, device)
