"""The frozen models a command needs, loaded once per process, and what they are known by.

torch and what is built on it are imported where a model is loaded: `cache info` loads none.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError, one_line
from evenlight.stages.corrector.launch import launched
from evenlight.stages.priors import fingerprints
from evenlight.stages.settings import ClipSettings, RegionSettings, Settings

if TYPE_CHECKING:
    from evenlight.stages.priors.judge import Judge
    from evenlight.stages.priors.protocols import ClipModel, Segmenter


@dataclass(frozen=True)
class Models:
    segmenter: "Segmenter"
    clip: "ClipModel"


@dataclass(frozen=True)
class Priors:
    """Fingerprints, as `priors_of` gives."""

    segmenter: str
    clip: str
    judge: str


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


def priors_named(settings: Settings, judge: str) -> dict[str, str]:
    """The same, of the models that settings name, which are not loaded (but models of open_clip).

    Raises EnvironmentLacks where weights are missing.
    """
    return {
        "segmenter": fingerprints.of_segmenter(settings.regions),
        "clip": fingerprints.of_shipped_clip(settings.clip)
        if settings.clip.model == fingerprints.SHIPPED_CLIP
        else _clip(settings.clip, "cpu").fingerprint,
        "judge": judge,
    }


def read_judge(tensors: Mapping[str, Any], where: str) -> "Judge":
    """The judge of arrays that were read back.  Raises StoreError where they make none."""
    import torch

    from evenlight.stages.priors.judge import Judge

    try:
        judge = Judge({name: torch.as_tensor(x).float() for name, x in tensors.items()})
        assert all(bool(x.isfinite().all()) for x in judge.tensors.values()), "NaN or infinity"
    except LookupError as error:
        raise StoreError(f"{where} is of another version of evenlight (no {error})") from error
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise StoreError(f"{where} cannot be used ({one_line(error)})") from error
    return judge


def choose_device(name: str) -> str:
    """ "auto" becomes cuda where there is one, else cpu; cuda, of several ranks, each one's own.

    Raises UsageError for what names no device, EnvironmentLacks for one that is not here.
    """
    import torch

    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if num_devices else "cpu"
    launch = launched()
    if launch.here > 1 and name.startswith("cuda"):
        if launch.here > num_devices or name != "cuda":
            raise EnvironmentLacks(
                f"{launch.here} processes were started here for {num_devices} CUDA devices, and "
                f"run.device is {name}: start one a device with run.device=auto, or set it to cpu"
            )
        return f"cuda:{launch.local_rank}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise UsageError(f"run.device must be cpu, cuda, cuda:N or auto, got {name!r}")
    if name != "cpu" and int(name[5:] or 0) >= num_devices:
        there = f"only {num_devices}" if num_devices else "no CUDA device here"
        raise EnvironmentLacks(f"run.device is {name}, but torch finds {there}")
    return name


@functools.lru_cache(maxsize=2)
def _segmenter(settings: RegionSettings, device: str) -> "Segmenter":
    from evenlight.stages.priors.fastsam import load_segmenter

    return load_segmenter(settings, device)


@functools.lru_cache(maxsize=2)
def _clip(settings: ClipSettings, device: str) -> "ClipModel":
    from evenlight.stages.priors.clip import load_clip

    return load_clip(settings, device)
