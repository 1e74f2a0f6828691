"""The product's act: one photo in, the same photo well exposed out.

A photo is judged first, and unless it is good beyond doubt its regions: it stays as it is, or the
judge gives the strengths that take it to what it is meant to be.  The network, which sees the
photo, those strengths and the segmenter's features, says where and in which channel to depart from
them, what fills lost highlights, and the rest.  All of this happens at the working size; what it
says is applied at full size by apply.py.
"""

# H W pixels at the priors' size, h w at the network's working size

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from evenlight.stages.arrays import Array, from_numpy
from evenlight.stages.corrector.apply import Maps, apply_maps, fit_maps
from evenlight.stages.corrector.correction import Correction, plain
from evenlight.stages.corrector.inputs import (
    at_working_size,
    photo_at_working_size,
    rule_corrected,
)
from evenlight.stages.photos.canvas import working
from evenlight.stages.photos.visible import visible
from evenlight.stages.pixels import luma, resize, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.ladder import embed_ladder, embed_photo, embed_regions
from evenlight.stages.priors.opinion import (
    FAMILY,
    Opinion,
    asked,
    decide,
    is_beyond_doubt,
    is_on_white,
    regional_share,
)
from evenlight.stages.priors.protocols import Embedder, Opinions, Regions, Segmenter
from evenlight.stages.priors.pseudo_gt import (
    apart_by_region,
    choose,
    opinion_with_regions,
    painted,
)
from evenlight.stages.settings import Settings

if TYPE_CHECKING:
    from evenlight.stages.priors.judge import Judge


class Network(Protocol):
    """A corrector (network.py, or an exported one) as what corrects photos sees it."""

    def correction_of(
        self, photo_13HW: Array, proto_132hw: Array, p3_1Chw: Array, given_11HW: Array
    ) -> Correction:
        """Of one photo at the working size, its features at 1/4 and 1/8, and the judge's strengths;
        NumPy, or torch on the CPU, in and out."""
        ...


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A trained corrector, the frozen models it was trained with, and their judge.

    xp: whose arrays these models take: numpy's, or torch's (None).
    """

    network: Network
    settings: Settings  # of the training
    segmenter: Segmenter
    clip: Embedder
    judge: Opinions
    xp: Any = None

    def correct(
        self, pixels_HW3: np.ndarray, strength: float = 1.0, alpha_HW: np.ndarray | None = None
    ) -> np.ndarray:
        """The corrected photo, same shape and dtype; a good photo as it is.

        pixels: uint8 or uint16 RGB, sRGB-encoded, of any size from 16 pixels a side.  strength:
        0 leaves every value as it is, 1 applies the whole correction.  alpha: of the same type;
        what it hides does not count.
        """
        if strength == 0:
            return pixels_HW3.copy()
        maps = self.predict(visible(pixels_HW3, alpha_HW, self.settings.photo.size))
        return pixels_HW3.copy() if maps is None else apply_maps(pixels_HW3, maps, strength)

    def predict(self, photo_HW3: np.ndarray) -> Maps | None:
        """The correction at the working size, None for a photo that should stay as it is.

        photo: uint8 at the priors' size, sides multiples of 8.
        """
        if self.settings.network.head == "residual":  # the paper's: it judges by itself
            return self._ask_network(photo_HW3, self._regions(photo_HW3), 0.0, None)
        seen, prior_good = self._look(photo_HW3), self.settings.judge.prior_good
        if is_beyond_doubt(self.judge.opinion(seen, self._settings.ladder.offsets), prior_good):
            return None
        regions = self._regions(photo_HW3)
        seen |= self._look_at(photo_HW3, regions, float(seen["rule_strength"]))
        opinion = opinion_with_regions(seen, self.judge, self._settings)
        strength = decide(opinion, prior_good)
        if is_on_white(seen["tones"][0]):  # which is meant so: no light is lost there
            return self._on_curve(photo_HW3, strength) if strength else None
        regional = regional_share(opinion, prior_good, strength)
        apart = regional * apart_by_region(seen, self.judge, self._settings, strength)
        if not (strength or apart.any()):
            return None
        lines = None
        if apart.any():
            lines = painted(photo_HW3, regions.labels, seen, apart, self.xp)
        return self._ask_network(photo_HW3, regions, strength, lines)

    def opinion(self, photo_HW3: np.ndarray) -> Opinion:
        """What the judge says.  photo: as in `predict`."""
        seen = self._look(photo_HW3)
        rule = float(seen["rule_strength"])
        seen |= self._look_at(photo_HW3, self._regions(photo_HW3), rule)
        return opinion_with_regions(seen, self.judge, self._settings)

    def on_curve(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """The photo (uint8) on the plain film curve at the judge's strength: no network."""
        photo = working(pixels_HW3, self.settings.photo.size)
        strength = decide(self.opinion(photo), self.settings.judge.prior_good)
        return tone.on_bytes(FAMILY, pixels_HW3, strength, self.xp)

    def pseudo_gt(self, pixels_HW3: np.ndarray) -> dict[str, np.ndarray]:
        """The pseudo_gt part, and regions, of a photo that is in no store, at the priors' size.

        Needs a whole judge, prompts and all: exported models do not have one.
        """
        judge = cast("Judge", self.judge)
        photo = working(pixels_HW3, self.settings.photo.size)
        regions = self._regions(photo)
        cached = embed_photo(photo, regions.labels, self.clip, self.settings.ladder)
        chosen = choose(photo, regions.labels, cached, judge, self.settings)
        return chosen | {"regions": regions.labels}

    @functools.cached_property
    def _settings(self) -> Settings:
        """Those of the training, with no rungs but those that the judge asks."""
        ladder = self.settings.ladder
        offsets = tuple(ladder.offsets[rung] for rung in asked(ladder.offsets))
        ladder = dataclasses.replace(ladder, offsets=offsets)
        return dataclasses.replace(self.settings, ladder=ladder)

    def _look(self, photo_HW3: np.ndarray) -> dict[str, np.ndarray]:
        """What the judge reads of the photo as a whole."""
        ladder = self._settings.ladder
        return embed_ladder(photo_HW3, self.clip, ladder, ladder.offsets, self.xp)

    def _regions(self, photo_HW3: np.ndarray) -> Regions:
        return self.segmenter.segment(rule_corrected(photo_HW3, self.xp))

    def _look_at(
        self, photo_HW3: np.ndarray, regions: Regions, rule: float
    ) -> dict[str, np.ndarray]:
        """What the judge reads of the regions."""
        ladder = self._settings.ladder
        return embed_regions(photo_HW3, regions.labels, self.clip, ladder, rule, self.xp)

    def _on_curve(self, photo_HW3: np.ndarray, strength: float) -> Maps:
        photo = photo_at_working_size(photo_HW3, self.settings.train.size, self.xp)
        return fit_maps(photo, plain(strength + 0 * photo[:, :1]), FAMILY)

    def _ask_network(
        self,
        photo_HW3: np.ndarray,
        regions: Regions,
        strength: float,
        apart: tuple[Array, Array] | None,
    ) -> Maps:
        """What the network makes of the judge's strengths: the photo's, and lines of how far each
        pixel's is from it; None: nowhere."""
        features = (x[None].astype(np.float32) for x in (regions.proto, regions.p3))
        proto, p3 = (from_numpy(x, self.xp) for x in features)
        inputs = at_working_size(photo_HW3, proto, p3, self.settings.train.size)
        size = inputs[0].shape[2:]
        given, lines = from_numpy(np.full((1, 1, *size), strength, np.float32), self.xp), None
        if apart is not None:
            a, b = apart
            lines = a, b + strength
            given = given + resize(a * luma(to_float(photo_HW3, self.xp)) + b, *size)
        here = self.network.correction_of(*inputs, given)
        return fit_maps(inputs[0], here, self.settings.network.family, lines)
