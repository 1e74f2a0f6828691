"""The meter: the mean luma that a scene wants, where the mean-luma rule wants 119/255 of all.

A linear model of the tones of the photo after the rule (so that it reads the scene, not the
error of its exposure), learned from real brackets by benchmarks/train_meter.py: 13 quantiles of
luma and the mean luma of three zones, as a camera's matrix metering reads them.
"""

# B batch, F features

import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.pixels import luma
from evenlight.stages.priors import tone

FAMILY = "film"
SIDE = 64  # pixels of the square copy that it reads
PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)
ZONES = ("centre", "top", "bottom")
MAX_OFFSET = 0.6  # of what it was learned from
# Sets differ in which frame of a bracket they call best, and full trust fits one of them: at 1 the
# brackets of SICE gain .6 to .9 dB by the answers fitted to but lose .8 dB by their middle frames.
TRUST = 0.6
# benchmarks/train_meter.py on 139 scenes of SICE; on scenes not fitted on it leaves .121 of .163
# (root mean square of the strength beyond the rule that brackets ask for).
BIAS = 0.6630
WEIGHTS = (
    0.0922,  # 1
    0.1045,  # 5
    0.1230,  # 10
    0.1890,  # 20
    0.0520,  # 30
    0.1552,  # 40
    -0.2075,  # 50
    -1.0025,  # 60
    0.0862,  # 70
    0.0867,  # 80
    0.1494,  # 90
    0.0357,  # 95
    -0.2098,  # 99
    -0.6109,  # centre
    -0.0070,  # top
    0.1194,  # bottom
)


def features(rgb_B3HW: Tensor) -> Tensor:
    """Quantiles of luma and means of the zones, after the mean-luma rule.

    rgb_B3HW: float in [0, 1].  Returns float32 B,F in [0, 1]: PERCENTILES, then ZONES (a round
    centre with soft edges, the upper third, the lower third).
    """
    small = F.adaptive_avg_pool2d(rgb_B3HW.float(), SIDE)
    rule = tone.rule_strength(small, FAMILY)
    luma_BHW = luma(tone.apply(FAMILY, small, rule[:, None, None, None]))[:, 0]
    levels = torch.tensor(PERCENTILES, device=small.device) / 100
    quantiles = luma_BHW.flatten(1).quantile(levels, dim=1).T
    axis = torch.linspace(-1, 1, SIDE, device=small.device)
    centre = torch.exp(-2 * (axis[:, None] ** 2 + axis[None] ** 2))
    zones = [
        (luma_BHW * centre).sum((1, 2)) / centre.sum(),
        luma_BHW[:, : SIDE // 3].mean((1, 2)),
        luma_BHW[:, -(SIDE // 3) :].mean((1, 2)),
    ]
    return torch.cat([quantiles, torch.stack(zones, 1)], 1)


def target_luma(rgb_B3HW: Tensor) -> Tensor:
    """Mean luma that the scene wants: 119/255 for an average one.  rgb float in [0, 1]; returns B.

    What was learned is a film strength beyond the rule; as a mean luma it serves every tone family.
    """
    small = F.adaptive_avg_pool2d(rgb_B3HW.float(), SIDE)
    weights = torch.tensor(WEIGHTS, device=small.device)
    learned = (BIAS + features(small) @ weights).clamp(-MAX_OFFSET, MAX_OFFSET)
    strength = tone.rule_strength(small, FAMILY) + TRUST * learned
    return luma(tone.apply(FAMILY, small, strength[:, None, None, None])).mean((1, 2, 3))


def strength(rgb_B3HW: Tensor, family: str) -> Tensor:
    """Strength at which the photo reaches its target mean luma.  Returns float32 B."""
    small = F.adaptive_avg_pool2d(rgb_B3HW.float(), SIDE)
    return tone.rule_strength(small, family, target_luma(small))
