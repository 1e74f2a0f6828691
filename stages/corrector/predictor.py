"""The product's act: one photo in, the same photo well exposed out.

A photo is judged first: it stays as it is, or it is given the mean luma that its scene wants.  The
network, which sees the photo with the segmenter's features, says where and in which channel to
correct how much; its strengths are shifted as a whole until the mean luma is met.  All of this
happens at the working size; what it says is applied at full size by apply.py.
"""

# H W pixels at the priors' size, h w at the network's working size

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evenlight.stages.corrector.apply import Maps, apply_maps, fit_maps
from evenlight.stages.corrector.inputs import at_working_size, prior_features, rule_corrected
from evenlight.stages.corrector.network import MAX_STRENGTH, Corrector
from evenlight.stages.photos.canvas import working
from evenlight.stages.pixels import luma, resize, to_float
from evenlight.stages.priors import meter, tone
from evenlight.stages.priors.ladder import embed_photo
from evenlight.stages.priors.prompts import Scorer
from evenlight.stages.priors.protocols import ClipModel, Segmenter
from evenlight.stages.priors.pseudo_gt import choose, well_exposed
from evenlight.stages.settings import Settings

MAX_SHIFT = 1.5  # of the strength map, towards the mean luma wanted
FULL_SHIFT = 0.5  # mean strength from which the mean luma wanted is met in full


@dataclass(frozen=True)
class Verdict:
    """What a photo needs.  mean_luma: that its scene wants, in [0, 1]."""

    is_good: bool
    mean_luma: float


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A trained corrector, the frozen models it was trained with, and the prompts that judge."""

    network: Corrector
    settings: Settings  # of the training
    segmenter: Segmenter
    clip: ClipModel
    scorer: Scorer

    def correct(self, pixels_HW3: np.ndarray, strength: float = 1.0) -> np.ndarray:
        """The corrected photo, same shape and dtype; a good photo as it is.

        pixels: uint8 or uint16 RGB, sRGB-encoded, of any size from 16 pixels a side.  strength:
        0 leaves every value as it is, 1 applies the whole correction.
        """
        if strength == 0:
            return pixels_HW3.copy()
        maps = self.predict(working(pixels_HW3, self.settings.photo.size))
        return pixels_HW3.copy() if maps is None else apply_maps(pixels_HW3, maps, strength)

    def predict(self, photo_HW3: np.ndarray) -> Maps | None:
        """The correction at the working size, None for a photo that should stay as it is.

        photo: uint8 at the priors' size, sides multiples of 8.
        """
        family = self.settings.network.family
        if self.settings.network.head == "residual":  # the paper's: it answers for brightness too
            rgb, strength, residual = self._ask_network(photo_HW3)
            return fit_maps(rgb, strength, residual, family)
        verdict = self.judge(photo_HW3)
        if verdict.is_good:
            return None
        rgb, strength, residual = self._ask_network(photo_HW3)
        strength = meet_luma(rgb, strength, residual, family, verdict.mean_luma)
        return fit_maps(rgb, strength, residual, family)

    def judge(self, photo_HW3: np.ndarray) -> Verdict:
        """What CLIP and the meter find.  photo: as in `predict`."""
        rgb = to_float(photo_HW3)
        reading = meter.read(rgb, self.settings.network.family)
        with torch.inference_mode():
            seen = self.clip.embed(resize(rgb, self.clip.size, self.clip.size))
            logits = self.scorer.logits(seen)[0].cpu().double().numpy()
        return Verdict(
            is_good=well_exposed(logits, float(reading.log_odds[0]), float(reading.strength[0])),
            mean_luma=float(reading.target[0]),
        )

    def pseudo_gt(self, pixels_HW3: np.ndarray) -> dict[str, np.ndarray]:
        """The pseudo_gt part, and regions, of a photo that is in no store, at the priors' size."""
        photo = working(pixels_HW3, self.settings.photo.size)
        regions = self.segmenter.segment(rule_corrected(photo))
        cached = embed_photo(photo, regions.labels, self.clip, self.settings.ladder)
        ladder, settings = self.settings.ladder, self.settings.pseudo_gt
        chosen = choose(photo, regions.labels, cached, self.scorer, ladder, settings)
        return chosen | {"regions": regions.labels}

    def _ask_network(self, photo_HW3: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The photo at the working size, strength and residual for it; float32 1,3,h,w each."""
        features = prior_features(photo_HW3, self.segmenter)
        inputs = at_working_size(photo_HW3, *features, self.settings.train.size)
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            strength, residual = self.network(*(x.to(device) for x in inputs))
        return inputs[0], strength.cpu(), residual.cpu()


def meet_luma(
    photo_13hw: Tensor, strength: Tensor, residual: Tensor, family: str, target: float
) -> Tensor:
    """The strength map shifted as a whole, so that the output has the mean luma `target`.

    The network answers for space and colour, the judge for brightness: trained on both in one loss
    it fell behind the meter on real brackets, by .8 dB, and shifted it did not.  Where the network
    hardly corrects, its word counts: the shift grows with the mean strength, in full from
    FULL_SHIFT on.
    """

    def mean_luma(shift: float) -> float:
        output = tone.apply(family, photo_13hw, strength + shift) + residual
        return float(luma(output.clamp(0, 1)).mean())

    low, high = -MAX_SHIFT, MAX_SHIFT
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_luma(middle) < target else (low, middle)
    trust = min(1.0, abs(float(strength.mean())) / FULL_SHIFT)
    return (strength + trust * (low + high) / 2).clamp(-MAX_STRENGTH, MAX_STRENGTH)
