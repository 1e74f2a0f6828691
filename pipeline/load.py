"""A trained corrector brought together with the priors it was trained with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError
from evenlight.cache.files import checked
from evenlight.pipeline import config
from evenlight.pipeline.config import Given
from evenlight.pipeline.models import choose_device, load_models, priors_of, read_judge
from evenlight.stages.corrector.checkpoint import load_corrector
from evenlight.stages.corrector.predictor import Predictor
from evenlight.stages.settings import Settings
from evenlight.stages.weights import shipped

# What may differ from training: where it runs, which photos are too large, where weights lie
# (their content is checked), and how readily photos are left alone.  Everything else is part of
# what the corrector learned.
OPEN_SETTINGS = (
    "run.device", "photo.max_megapixels", "regions.segmenter", "clip.weights", "judge.prior_good",
)  # fmt: skip


@dataclass(frozen=True)
class _Priors:
    """Fingerprints, as `priors_of` gives."""

    segmenter: str
    clip: str
    judge: str


@dataclass(frozen=True)
class _About:
    """What the info of a corrector says of how it is used."""

    settings: dict[str, dict[str, Any]]
    priors: _Priors


def load_predictor(model: str | Path | None = None, *, settings: Given = None) -> Predictor:
    """The corrector of a training run's folder, or the shipped one for None, ready to correct.

    settings: changes to OPEN_SETTINGS, on top of those of the training.  Raises StoreError where
    the priors here are not those it was trained with, EnvironmentLacks where weights are missing.
    """
    folder = shipped("base") if model is None else Path(model)
    if model is None and not folder.is_dir():
        raise EnvironmentLacks(
            "no corrector ships with this version: train one and name its folder with -m"
        )
    network, info, extra = load_corrector(folder)
    about = checked(_About, info, folder / "corrector.json")
    complete = _settings(folder, about.settings, settings)
    models = load_models(complete)
    tensors = {key.removeprefix("judge."): value for key, value in extra.items()}
    judge = read_judge(tensors, f"the judge of corrector {folder}")
    found = priors_of(models, judge.fingerprint)
    for prior, wanted in vars(about.priors).items():
        if found[prior] != wanted:
            raise StoreError(
                f"corrector {folder} was trained with {prior} {wanted[:12]}, here is "
                f"{found[prior][:12]}: put those weights back, or train again"
            )
    return Predictor(
        network=network.to(choose_device(complete.run.device)),
        settings=complete,
        segmenter=models.segmenter,
        clip=models.clip,
        judge=judge,
    )


def _settings(folder: Path, recorded: dict[str, Any], given: Given) -> Settings:
    """The settings of training, with open ones changed as asked; where it ran, and which photos
    were too large there, does not count."""
    recorded = {section: dict(fields) for section, fields in recorded.items() if section != "run"}
    recorded.get("photo", {}).pop("max_megapixels", None)
    try:
        trained = config.resolve(None, recorded)
    except UsageError as error:
        raise StoreError(
            f"{folder} holds a corrector whose settings this version does not know ({error}): "
            "use the version of evenlight that wrote it, or train again"
        ) from error
    settings = config.resolve(given, recorded)
    before, now = (config.flatten(config.to_dict(s)) for s in (trained, settings))
    for key, value in now.items():
        if value != before[key] and key not in OPEN_SETTINGS:
            raise UsageError(
                f"{key} = {value!r} cannot be changed after training: corrector {folder} learned "
                f"with {before[key]!r}; open to change are {', '.join(OPEN_SETTINGS)}"
            )
    return settings
