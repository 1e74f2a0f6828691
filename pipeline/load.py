"""A trained corrector with its priors, ready to correct photos."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError
from evenlight.pipeline import config
from evenlight.pipeline.models import Models, choose_device, load_models, priors_of
from evenlight.stages.corrector.apply import Maps, correct_pixels, fit_maps, meet_meter
from evenlight.stages.corrector.checkpoint import load_corrector
from evenlight.stages.corrector.inputs import at_working_size, prior_features, rule_corrected
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.photos.canvas import working
from evenlight.stages.pixels import resize, to_float
from evenlight.stages.priors import meter
from evenlight.stages.priors.ladder import embed_photo
from evenlight.stages.priors.prompts import Scorer
from evenlight.stages.priors.pseudo_gt import choose, well_exposed
from evenlight.stages.settings import Settings
from evenlight.stages.weights import shipped

# What may differ from training: where it runs, which photos are too large, and where weights lie
# (their content is checked).  Everything else is part of what the corrector learned.
OPEN_SETTINGS = (
    "run.device", "photo.max_megapixels", "regions.segmenter", "clip.weights",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedCorrector:
    """One trained corrector and the frozen models it was trained with."""

    network: Corrector
    settings: Settings
    models: Models
    scorer: Scorer

    def predict(self, photo_HW3: np.ndarray) -> Maps:
        """Maps at the working size.  photo: uint8 at the priors' size, sides multiples of 8."""
        family, is_tone = self.settings.network.family, self.settings.network.head == "tone"
        reading = meter.read(to_float(photo_HW3), family)
        if is_tone and self.well_exposed(photo_HW3, reading):
            untouched = torch.zeros_like(to_float(photo_HW3))
            return fit_maps(untouched, untouched, untouched, family)
        proto, p3 = prior_features(photo_HW3, self.models.segmenter)
        inputs = at_working_size(photo_HW3, proto, p3, self.settings.train.size)
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            strength, residual = (x.cpu() for x in self.network(*(x.to(device) for x in inputs)))
        if is_tone:  # the paper's head answers for brightness itself
            target = float(reading.target[0])
            strength = meet_meter(inputs[0], strength, residual, family, target)
        return fit_maps(inputs[0], strength, residual, family)

    def well_exposed(self, photo_HW3: np.ndarray, reading: meter.Reading) -> bool:
        """Whether CLIP and the meter find that the photo (uint8) should stay as it is."""
        rgb = to_float(photo_HW3)
        clip = self.models.clip
        with torch.inference_mode():
            logits = self.scorer.logits(clip.embed(resize(rgb, clip.size, clip.size)))[0]
        log_odds, metered = float(reading.log_odds[0]), float(reading.strength[0])
        return well_exposed(logits.cpu().double().numpy(), log_odds, metered)

    def pseudo_gt(self, pixels_HW3: np.ndarray) -> dict[str, np.ndarray]:
        """The pseudo_gt part, and regions, of a photo that is in no store, at the priors' size."""
        photo = working(pixels_HW3, self.settings.photo.size)
        regions = self.models.segmenter.segment(rule_corrected(photo))
        cached = embed_photo(photo, regions.labels, self.models.clip, self.settings.ladder)
        ladder, settings = self.settings.ladder, self.settings.pseudo_gt
        chosen = choose(photo, regions.labels, cached, self.scorer, ladder, settings)
        return chosen | {"regions": regions.labels}

    def correct(self, pixels_HW3: np.ndarray, strength: float = 1.0) -> np.ndarray:
        """The corrected photo, same shape and dtype (uint8 or uint16 RGB)."""
        return correct_pixels(
            pixels_HW3, self.predict, prior_size=self.settings.photo.size, strength=strength
        )


def load_predictor(
    path: Path | None, config_file: Path | None = None, overrides: Sequence[str] = ()
) -> LoadedCorrector:
    """The corrector of a training run's folder, or the shipped one for None.

    config_file, overrides: settings among OPEN_SETTINGS.  Raises StoreError where the priors here
    are not those it was trained with.
    """
    folder = path or shipped("base")
    if path is None and not folder.is_dir():
        raise EnvironmentLacks(
            "no corrector ships with this version: train one and name its folder with -m"
        )
    network, info, extra = load_corrector(folder)
    settings = _settings(folder, info["settings"], config_file, overrides)
    models = load_models(settings)
    scorer = Scorer.from_tensors(
        {key.removeprefix("scorer."): value for key, value in extra.items()}
    )
    found = priors_of(models, scorer.fingerprint)
    for prior, wanted in info["priors"].items():
        if found[prior] != wanted:
            raise StoreError(
                f"corrector {folder} was trained with {prior} {wanted[:12]}, here is "
                f"{found[prior][:12]}: put those weights back, or train again"
            )
    device = choose_device(settings.run.device)
    return LoadedCorrector(network.to(device), settings, models, scorer)


def _settings(
    folder: Path, recorded: dict[str, Any], config_file: Path | None, overrides: Sequence[str]
) -> Settings:
    """The settings of training, with open ones changed as asked; where it ran does not count."""
    recorded = {section: fields for section, fields in recorded.items() if section != "run"}
    try:
        trained = config.build(base=recorded)
    except UsageError as error:
        raise StoreError(
            f"{folder} holds a corrector whose settings this version does not know ({error}): "
            "use the version of evenlight that wrote it, or train again"
        ) from error
    settings = config.build(config_file, overrides, base=recorded)
    before, now = (config.flatten(config.to_dict(s)) for s in (trained, settings))
    for key, value in now.items():
        if value != before[key] and key not in OPEN_SETTINGS:
            raise UsageError(
                f"{key} = {value!r} cannot be changed after training: corrector {folder} learned "
                f"with {before[key]!r}; open to change are {', '.join(OPEN_SETTINGS)}"
            )
    return settings
