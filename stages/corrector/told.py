"""What the judge is taken to say of a photo in training: its strength, and its regions apart.

In use the network is given a strength for every pixel: the photo's, and how far the judge sets the
region apart from it (priors/pseudo_gt.py).  That is right in part, and borders lie a little off.
Here is such a map for a photo whose answer is known, so that the network learns to go on from it.
"""

# B batch, H W pixels, R regions, P samples of pixels

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from evenlight.stages.pixels import coefficients, luma
from evenlight.stages.priors import tone
from evenlight.stages.priors.opinion import FAMILY
from evenlight.stages.priors.pseudo_gt import EDGES

STEP = 4  # between the pixels that are read
REACH = 2  # of the lines of a painted map: as pseudo_gt.BORDER, at the working size
OFF = 4  # how far its borders may lie from the regions', pixels
SHARE = (0.4, 1)  # of the right distance between regions that is told
ERROR = 0.08  # deviation of what is said of a region
FARTHEST = 1.5  # strength of a region apart from the photo's


class Told(NamedTuple):
    """share: of the right distance between regions that is told; 0: only the photo's strength."""

    share: float
    seed: int  # of what is wrong with it


def draw_told(generator: Generator, often: float) -> Told:
    """often: share of photos whose regions are told apart."""
    drawn, at = (float(torch.rand((), generator=generator)) for _ in range(2))
    seed = int(torch.randint(2**31, (), generator=generator))
    low, high = SHARE
    return Told(low + (high - low) * at if drawn < often else 0.0, seed)


def given(
    photo_B3HW: Tensor,
    target_B3HW: Tensor,
    labels_BHW: Tensor,
    whole_B: Tensor,
    told: Sequence[Told],
) -> Tensor:
    """The strength of every pixel, float32 B,1,H,W.

    photo, target: float RGB in [0, 1]; labels: uint8; whole: the strength of each photo.
    """
    maps = whole_B.view(-1, 1, 1, 1).repeat(1, 1, *photo_B3HW.shape[2:])
    for row, one in enumerate(told):
        if one.share:
            maps[row] += _apart(photo_B3HW[row], target_B3HW[row], labels_BHW[row], one)
    return maps


def _apart(photo_3HW: Tensor, target_3HW: Tensor, labels_HW: Tensor, told: Told) -> Tensor:
    """How far each pixel is said to be from the photo's strength.  1,H,W."""
    generator = torch.Generator().manual_seed(told.seed)
    wrong = ERROR * torch.randn(256, generator=generator).to(photo_3HW.device)
    down, right = torch.randint(-OFF, OFF + 1, (2,), generator=generator).tolist()
    labels, shot, meant = (
        x[..., ::STEP, ::STEP].reshape(1, -1)
        for x in (labels_HW.long(), luma(photo_3HW[None]), luma(target_3HW[None]))
    )
    wanted, areas = (x[0] for x in region_strengths(shot, meant, labels, 256))
    apart = told.share * (wanted - (wanted * areas).sum()) + wrong
    apart = (apart - (apart * areas).sum()).clamp(-FARTHEST, FARTHEST)
    painted = apart[labels_HW.roll((down, right), (0, 1)).long()]
    guide = luma(photo_3HW[None])
    a, b = coefficients(guide, painted[None, None], radius=REACH, eps=EDGES)
    return (a * guide + b)[0]


def region_strengths(
    shot_BP: Tensor, meant_BP: Tensor, labels_BP: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The strength at which each region of a photo has the mean luma that it is meant to have, and
    its share of the photo; 0 where there is none.  By bisection.

    shot, meant: luma of P pixels in [0, 1].  labels: int64 from 0, below `count`.  B,count each.
    """

    def sums(values_BP: Tensor) -> Tensor:
        return values_BP.new_zeros(len(values_BP), count).scatter_add(1, labels_BP, values_BP)

    counts, wanted = sums(torch.ones_like(shot_BP)), sums(meant_BP)
    low = torch.full_like(wanted, -tone.MAX_RULE_STRENGTH)
    high = -low
    for _ in range(10):
        middle = (low + high) / 2
        dark = sums(tone.apply(FAMILY, shot_BP, middle.gather(1, labels_BP))) < wanted
        low, high = torch.where(dark, middle, low), torch.where(dark, high, middle)
    return torch.where(counts > 0, (low + high) / 2, 0), counts / shot_BP.shape[1]
