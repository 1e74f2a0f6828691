"""What a judge says of a photo, and what is decided by it: no torch.

A judge (judge.py, or an exported one) answers with logits; here is what they come to.
"""

# T tones, S strengths, K rungs, D embedding, R regions

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evenlight.stages.priors import tones
from evenlight.stages.priors.tones import PERCENTILES

FAMILY = "film"
LIMIT, STEP = 2.2, 0.1
STRENGTHS = tones.STRENGTHS.astype(np.float32)
ASKED = (-1.0, -0.4, 0.0, 0.4, 1.0)  # rungs that are asked, beyond the mean-luma rule
NO_SPREAD = 0.02  # of tones, between the ends of PERCENTILES: nothing but noise
WHITE = 0.95  # of all channels, of the middle pixel of a picture on white
LIGHTER = 0.01  # luma of its upper and lower third beyond that of its centre
MOST_DARKENING = -0.4  # of such a picture: white comes out at 250 of 255.  Whites stay white
NEAR = 0.25  # strengths within it look alike
WIDTH = 0.4  # of the loss: beyond about twice of it an answer is wrong, not less right
# Probability of being good from which a photo stays as it is.  Between a half and this the answer
# is moderate: fewer bad photos are left alone, and good ones hardly move.
SURELY_GOOD = 0.7
ALL_BUT_SURE = 0.1  # below it
# Weights of the photo's own opinion of its strength and of the one that its regions give.  They
# saw one photo: with more in all, what is said would be too sure (docs/judge.md).
FIRST, SECOND = 0.75, 0.4
# Spread of the strengths that regions want, from which on a photo is not good: of 181 ordinary
# photos that the judge finds good none has more, of 23 with an object exposed otherwise 6.
UNEVEN = 0.3
# p_good above which regions are not asked: none of these 6 has more, 42 % of the good ones do.
BEYOND_DOUBT = 0.85
FAR_OFF = (0.4, 0.9)  # |strength| of a photo between which regions come to differ less
# How far they still do from there on: brackets want 0 by their best frames, 1 by their fusion.
OF_SCENE = 0.3
DECISIONS = np.linspace(-LIMIT, LIMIT, 441)
LOSSES = 1 - np.exp(-((DECISIONS[:, None] - tones.STRENGTHS) ** 2) / (2 * WIDTH**2))


@dataclass(frozen=True)
class Opinion:
    """What the judge says of one photo: p_good, the probability that it is good as it is (a priori
    one half), and p_S, float64, of the strengths that would mend it if it is not."""

    p_good: float
    p_S: NDArray[np.float64]  # noqa: N815

    def good(self, prior_good: float) -> float:
        """The probability of being good where that share of photos is, a priori, in [0, 1)."""
        good, bad = self.p_good * prior_good, (1 - self.p_good) * (1 - prior_good)
        return good / max(good + bad, 1e-12)

    def certainty(self, strength: float, prior_good: float) -> float:
        """The probability that the right strength lies within NEAR of this one."""
        good = self.good(prior_good)
        near = float(self.p_S[np.abs(STRENGTHS - strength) <= NEAR].sum())
        return (1 - good) * near + good * (abs(strength) <= NEAR)

    def words(self) -> dict[str, float]:
        """The readable face: probabilities that the photo is under-, well or over-exposed."""
        bad, t = 1 - self.p_good, STRENGTHS
        under, over = (float(self.p_S[side].sum()) for side in (t > NEAR, t < -NEAR))
        return {"under": bad * under, "normal": 1 - bad * (under + over), "over": bad * over}


def opinion_of(
    cached: Mapping[str, Any], answer: Callable[[], tuple[NDArray[np.float64], float]]
) -> Opinion:
    """Of one photo, from its embeddings part (`ladder.embed_photo`).

    answer: p_S and p_good, as the heads say; not asked where the photo holds nothing.
    """
    own = cached["tones"][0]
    if holds_nothing(own):
        return Opinion(1.0, (STRENGTHS == 0).astype(np.float64))
    p_S, p_good = answer()
    return Opinion(p_good, _no_darker_than(MOST_DARKENING, p_S) if is_on_white(own) else p_S)


def photo_read(
    cached: Mapping[str, Any], offsets: Sequence[float]
) -> tuple[NDArray[np.float32], ...]:
    """What heads read of one photo, as a batch of one: embeddings 1,1+K,D and tones 1,1+K,T of the
    photo and of the rungs that are asked, the strength given at each 1,1+K, the rule's strength 1.
    """
    rungs, rule = asked(offsets), float(cached["rule_strength"])
    return _float32(
        [np.concatenate([cached["clip_photo"][None], cached["clip_ladder"][rungs]])],
        [cached["tones"][[0, *(1 + rung for rung in rungs)]]],
        [[0.0, *(rule + offsets[rung] for rung in rungs)]],
        [rule],
    )


def regions_read(cached: Mapping[str, Any], strength: float) -> tuple[NDArray[np.float32], ...]:
    """What a head reads of the regions embedded and, last, of the rest, where the photo is given
    `strength`: embeddings R+1,E, areas R+1, and the rule's strength and how far from it 2."""
    areas, rule = region_areas(cached), float(cached["rule_strength"])
    embeddings = cached["clip_regions"][[*range(len(areas) - 1), -1]]
    return _float32(embeddings, areas, [rule, strength - rule])


def region_areas(cached: Mapping[str, Any]) -> NDArray[np.float32]:
    """Shares of the photo, of the regions embedded and, last, of the rest.  R+1."""
    areas = cached["region_areas"][: int((cached["region_labels"] > 0).sum())]
    return np.append(areas, max(0.0, 1 - areas.sum())).astype(np.float32)


def _float32(*values: Any) -> tuple[NDArray[np.float32], ...]:
    return tuple(np.asarray(value, np.float32) for value in values)


def holds_nothing(tones_T: NDArray[np.float32]) -> bool:
    """Whether a photo is all black, all white or of one colour, but for noise: as it is meant."""
    planes = tones_T[: 3 * len(PERCENTILES)].reshape(3, -1)
    return bool((planes[:, -1] - planes[:, 0] < NO_SPREAD).all())


def is_on_white(tones_T: NDArray[np.float32]) -> bool:
    """Whether a picture shows something on a white ground: more than half of it is white in all
    channels, and it is lighter above and below than in its middle.  (An overexposed landscape is
    darker below.)"""
    smallest = tones_T[2 * len(PERCENTILES) : 3 * len(PERCENTILES)]
    centre, upper, lower = tones_T[-3:]
    mostly_white = np.interp(50, PERCENTILES, smallest) >= WHITE
    return bool(mostly_white and min(upper, lower) > centre + LIGHTER)


def _no_darker_than(least: float, p_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probabilities, those of lower strengths moved up to `least`."""
    strengths = STRENGTHS.astype(np.float64)
    at = int(np.abs(strengths - least).argmin())
    found = np.where(strengths < strengths[at], 0.0, p_S)
    found[at] += p_S[:at].sum()
    return found


def asked(offsets: Sequence[float]) -> list[int]:
    """Indices of the rungs that the judge asks: those nearest to ASKED."""
    found = {int(np.abs(np.array(offsets) - wanted).argmin()) for wanted in ASKED}
    return sorted(found)


def decide(opinion: Opinion, prior_good: float) -> float:
    """The film strength of least expected loss; 0 where the photo is surely good as it is.

    prior_good: how many photos are good, a priori, in [0, 1): 0 corrects every photo.  The loss of
    erring by e in strength is 1 - exp(-e^2 / 2 WIDTH^2), so that a far alternative does not drag
    the answer away from a likely one; that the photo may be good pulls it towards 0.
    """
    good = opinion.good(prior_good)
    if good > SURELY_GOOD:
        return 0.0
    expected = (1 - good) * (LOSSES @ opinion.p_S) + good * LOSSES[:, len(STRENGTHS) // 2]
    return float(DECISIONS[int(expected.argmin())])


def seconded(opinion: Opinion, p_S: NDArray[np.float64]) -> Opinion:
    """What the judge says of a photo, once a second opinion of its strength is heard too: the
    product of both, each to the power of its weight."""
    both = opinion.p_S**FIRST * p_S**SECOND
    return replace(opinion, p_S=both / both.sum())


def in_view_of_regions(
    opinion: Opinion, p_RS: NDArray[np.float64], areas_R: NDArray[np.float32]
) -> Opinion:
    """What the judge says of a photo, once it has seen its regions: one that holds something, and
    is not good beyond doubt, is not good where they are too far apart.

    p: of the strength between each region, or the rest, and the photo.  areas: shares of it.
    """
    apart = strengths_apart(p_RS, areas_R)
    uneven = float(np.sqrt(np.average(apart**2, weights=areas_R))) > UNEVEN
    return replace(opinion, p_good=0.0) if uneven and opinion.p_good <= BEYOND_DOUBT else opinion


def is_beyond_doubt(opinion: Opinion, prior_good: float) -> bool:
    """Whether a photo stays as it is whatever its regions are like."""
    return opinion.p_good > BEYOND_DOUBT and opinion.good(prior_good) > SURELY_GOOD


def strengths_apart(p_RS: NDArray[np.float64], areas_R: NDArray[np.float32]) -> NDArray[np.float64]:
    """How far each region, or the rest, is from the mean of all.  R."""
    wanted = p_RS @ STRENGTHS.astype(np.float64)
    return wanted - np.average(wanted, weights=areas_R)


def regional_share(opinion: Opinion, prior_good: float, strength: float) -> float:
    """How far regions may differ from their photo, which is given `strength`.

    Not at all where it is all but surely good, lest a hundredth of doubt more changes a photo that
    would have stayed as it is.  Less where it is far off as a whole: how its regions differ is then
    the light of the scene, as in the frames of brackets.
    """
    doubt = (SURELY_GOOD - opinion.good(prior_good)) / ALL_BUT_SURE
    near = float(np.interp(abs(strength), FAR_OFF, (1.0, OF_SCENE)))
    return min(1.0, max(0.0, doubt)) * near
