"""The meter: the mean luma that a scene wants, and whether a photo is good as it is.

Two readings that err differently are averaged. The matrix reading is linear in the tones after the
mean-luma rule (so that it reads the scene, not the error of its exposure) and in the mean luma of
three zones, as a camera's matrix metering. The tone reading is a small perceptron that also sees
the ends of the photo's own histogram, where an exposure error leaves its traces; it alone says how
likely the photo is good. Both are learned by recipes/meter/train.py: the matrix reading from
real brackets, the tone reading from good photos too.
"""

# B batch, Q quantiles, F features, N networks of the ensemble, H hidden units

import functools
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from evenlight.cache.errors import EnvironmentLacks
from evenlight.cache.files import sha256_file
from evenlight.stages.pixels import luma
from evenlight.stages.priors import tone
from evenlight.stages.weights import shipped

FAMILY = "film"
MAX_OFFSET = 0.6  # beyond the rule's strength, of what the matrix reading was learned from

SIDE = 64  # pixels of the square copy that the matrix reading sees
PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)
ZONES = ("centre", "top", "bottom")
# Sets differ in which frame of a bracket they call best, and full trust fits one of them: at 1 the
# brackets of SICE gain .6 to .9 dB by the answers fitted to but lose .8 dB by their middle frames.
TRUST = 0.6
# recipes/meter/train.py on 139 scenes of SICE; on scenes not fitted on it leaves .121 of .163
# (root mean square of the strength beyond the rule that brackets ask for).
BIAS = 0.6744
WEIGHTS = (
    0.0896,  # 1
    0.0978,  # 5
    0.1126,  # 10
    0.1863,  # 20
    0.0531,  # 30
    0.1586,  # 40
    -0.2118,  # 50
    -0.9997,  # 60
    0.0875,  # 70
    0.0829,  # 80
    0.1435,  # 90
    0.0341,  # 95
    -0.2040,  # 99
    -0.6198,  # centre
    -0.0086,  # top
    0.1175,  # bottom
)

TONE_SIDE = 256  # pixels of the square copy that the tone reading sees
# Of the tone reading in the mean of the two. From .2 to .6 real brackets are as good within .1 dB;
# more of it gains on BSDS500, less makes the two exposures of a scene agree better.
TONE_SHARE = 0.6
TONE_PERCENTILES = (
    0.1, 0.5, 1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50,
    55, 60, 65, 70, 75, 80, 85, 90, 95, 98, 99, 99.5, 99.9,
)  # fmt: skip
# Bins of luma, of 255, that get wider away from black and white.
BIN_EDGES = (1.5, 3.5, 7.5, 15.5, 31.5, 63.5, 127.5, 191.5, 223.5, 239.5, 247.5, 251.5, 253.5)
BLACK = (1, 4)  # of 255: luma that holds no detail, and from which it holds all
DETAIL_SHARES = (0.5, 0.8)  # of pixels with detail: what few and enough are
OUTPUT_SCALE = 0.3  # strength per unit that a network answers


class Reading(NamedTuple):
    """What the meter says of B photos, float32 B each."""

    target: Tensor  # mean luma that each scene wants, in [0, 1]: 119/255 for an average one
    strength: Tensor  # at which each photo reaches it
    log_odds: Tensor  # that each photo is good as it is


def read(rgb_B3HW: Tensor, family: str) -> Reading:
    """What the meter says of photos, float RGB in [0, 1].  family: of the strength.

    What was learned is a film strength beyond the rule; as a mean luma it serves every tone family.
    """
    small = F.adaptive_avg_pool2d(rgb_B3HW.float(), SIDE)
    features = tone_features(rgb_B3HW)
    beyond_B, log_odds_B = _tone_reading(features)
    matrix_B = _matrix_reading(features[:, : len(WEIGHTS)])
    offset_B = TONE_SHARE * beyond_B + (1 - TONE_SHARE) * matrix_B
    t_B = _sparing_night(small, tone.rule_strength(small, FAMILY) + offset_B)
    target_B = _mean_luma(small, t_B)
    return Reading(target_B, tone.rule_strength(small, family, target_B), log_odds_B)


def matrix_strength(rgb_B3HW: Tensor, family: str) -> Tensor:
    """The strength by the matrix reading alone, for which a 32-pixel copy serves.  float32 B."""
    small = F.adaptive_avg_pool2d(rgb_B3HW.float(), SIDE)
    t_B = tone.rule_strength(small, FAMILY) + _matrix_reading(matrix_features(small))
    return tone.rule_strength(small, family, _mean_luma(small, t_B))


@functools.cache
def fingerprint() -> str:
    """Of the weights that ship."""
    return sha256_file(shipped("meter"))


def matrix_features(small_B3SS: Tensor) -> Tensor:
    """Quantiles of luma and means of the zones, after the mean-luma rule.

    small: float in [0, 1], SIDE pixels a side.  Returns float32 B,F in [0, 1]: PERCENTILES, then
    ZONES (a round centre with soft edges, the upper third, the lower third).
    """
    rule = tone.rule_strength(small_B3SS, FAMILY)
    luma_BSS = luma(tone.apply(FAMILY, small_B3SS, rule[:, None, None, None]))[:, 0]
    axis = torch.linspace(-1, 1, SIDE, device=small_B3SS.device)
    centre = torch.exp(-2 * (axis[:, None] ** 2 + axis[None] ** 2))
    zones = [
        (luma_BSS * centre).sum((1, 2)) / centre.sum(),
        luma_BSS[:, : SIDE // 3].mean((1, 2)),
        luma_BSS[:, -(SIDE // 3) :].mean((1, 2)),
    ]
    return torch.cat([_quantiles(luma_BSS, PERCENTILES), torch.stack(zones, 1)], 1)


def tone_features(rgb_B3HW: Tensor) -> Tensor:
    """What the tone reading sees: the matrix features, and the photo's own tones as they are.

    Returns float32 B,F: matrix features; quantiles of luma, of the largest and of the smallest
    channel; square roots of the shares of luma in bins; mean saturation, mean and spread of luma,
    half the rule's strength.
    """
    small = F.adaptive_avg_pool2d(rgb_B3HW.float(), SIDE)
    photo = F.adaptive_avg_pool2d(rgb_B3HW.float(), TONE_SIDE)
    luma_BSS, largest, smallest = luma(photo)[:, 0], photo.amax(1), photo.amin(1)
    edges = torch.tensor(BIN_EDGES, device=photo.device) / 255
    bins = torch.bucketize(luma_BSS.flatten(1).contiguous(), edges)
    shares = F.one_hot(bins, len(BIN_EDGES) + 1).float().mean(1)
    scalars = [
        (largest - smallest).mean((1, 2)),
        luma_BSS.mean((1, 2)),
        luma_BSS.flatten(1).std(1),
        tone.rule_strength(small, FAMILY) / 2,
    ]
    quantiles = [_quantiles(plane, TONE_PERCENTILES) for plane in (luma_BSS, largest, smallest)]
    return torch.cat(
        [matrix_features(small), *quantiles, shares.sqrt(), torch.stack(scalars, 1)], 1
    )


def _matrix_reading(features_BF: Tensor) -> Tensor:
    """Film strength beyond the rule, B, from the matrix features."""
    learned = BIAS + features_BF @ torch.tensor(WEIGHTS, device=features_BF.device)
    return TRUST * learned.clamp(-MAX_OFFSET, MAX_OFFSET)


def _tone_reading(features_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Film strength beyond the rule and log-odds of being good, B each: means of the ensemble."""
    w = {name: tensor.to(features_BF.device) for name, tensor in _networks().items()}
    x_BF = ((features_BF - w["mean"]) / w["scale"]).clamp(-5, 5)
    hidden_NBH = F.gelu(x_BF @ w["hidden.weight"].mT + w["hidden.bias"][:, None])
    answers_NB2 = hidden_NBH @ w["last.weight"].mT + w["last.bias"][:, None]
    answer_B2 = answers_NB2.mean(0)
    return OUTPUT_SCALE * answer_B2[:, 0], answer_B2[:, 1]


@functools.cache
def _networks() -> dict[str, Tensor]:
    """mean, scale F; hidden.weight N,H,F; hidden.bias N,H; last.weight N,2,H; last.bias N,2."""
    path = shipped("meter")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise EnvironmentLacks(
            f"weights of the meter {path} cannot be used ({error}): install evenlight again"
        ) from error


def _sparing_night(small_B3SS: Tensor, t_B: Tensor) -> Tensor:
    """Film strengths, lowered where black that holds no detail fills most of a photo.

    There the mean luma is to be reached by the rest alone: a black sky brightened until the whole
    photo is mid-gray turns to noise, and the lights below it burn out.
    """
    black, visible = BLACK
    detail_B1SS = ((luma(small_B3SS) * 255 - black) / (visible - black)).clamp(0, 1)
    few, enough = DETAIL_SHARES
    night_B = ((enough - detail_B1SS.mean((1, 2, 3))) / (enough - few)).clamp(0, 1)
    target_B = _mean_luma(small_B3SS, t_B)
    of_rest_B = tone.rule_strength(small_B3SS, FAMILY, target_B, detail_B1SS)
    return t_B + night_B * (torch.minimum(t_B, of_rest_B) - t_B)


def _mean_luma(small_B3SS: Tensor, t_B: Tensor) -> Tensor:
    """Mean luma of photos re-exposed by film strengths."""
    return luma(tone.apply(FAMILY, small_B3SS, t_B[:, None, None, None])).mean((1, 2, 3))


def _quantiles(plane_BSS: Tensor, percentiles: tuple[float, ...]) -> Tensor:
    levels = torch.tensor(percentiles, device=plane_BSS.device) / 100
    return plane_BSS.flatten(1).quantile(levels, dim=1).T
