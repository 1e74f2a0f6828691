"""What the corrector answers, and what it makes of a photo (docs/method.md 6)."""

# B batch, H W pixels of the photo

from typing import NamedTuple

from evenlight.stages.arrays import Array, float32, namespace
from evenlight.stages.pixels import box_mean, luma
from evenlight.stages.priors import tone

LOST_FROM, LOST_TO = 0.88, 0.995  # values that clipping may have taken: from none to all of it
KEPT = 0.6  # of the curve's detail under a fill
DETAIL_RADIUS = 3  # what is detail, pixels of the working size


class Correction(NamedTuple):
    """What the corrector answers, float32 at the size of the photo.

    Only what is darkened is filled: cover and shift are 0 where given >= 0.
    """

    # strength of each pixel, the judge's; 0 for the residual head
    given_B1HW: Array  # noqa: N815
    # strength of each pixel and channel, within MAX_OFFSET (network.py) of it
    strength_B3HW: Array  # noqa: N815
    # how far the fill hides what the curve leaves of a lost pixel, -1 to 1
    cover_B1HW: Array  # noqa: N815
    # of the fill's colour, from the grey that the curve makes of white
    shift_B3HW: Array  # noqa: N815
    # added at the end; within MAX_RESIDUAL (network.py) for the tone head
    residual_B3HW: Array  # noqa: N815


def plain(given_B1HW: Array) -> Correction:
    """The curve at the strengths that are given, and nothing else."""
    nothing = 0 * namespace(given_B1HW).concat([given_B1HW] * 3, 1)
    return Correction(given_B1HW, nothing + given_B1HW, nothing[:, :1], nothing, nothing)


def lost(photo: Array) -> Array:
    """How much of each value clipping may have taken: 0 up to .88, 1 from .995.  Same shape."""
    share = namespace(photo).clip((photo - LOST_FROM) / (LOST_TO - LOST_FROM), 0, 1)
    return share * share * (3 - 2 * share)


def ground(toned_B3HW: Array, given_B1HW: Array, family: str) -> Array:
    """What a whole cover shows of a toned photo of the working size, but for KEPT of its luma: the
    grey that the strength that is given makes of white, without what is not detail.  B,1,H,W."""
    white = tone.apply(family, namespace(given_B1HW).ones_like(given_B1HW), given_B1HW)
    smooth = box_mean(box_mean(luma(toned_B3HW), DETAIL_RADIUS), DETAIL_RADIUS)
    return white - KEPT * smooth


def correct(photo_B3HW: Array, correction: Correction, family: str) -> Array:
    """The corrected photo of the working size, not clamped, float32 B,3,H,W."""
    toned = tone.apply(family, photo_B3HW, float32(correction.strength_B3HW))
    return filled(photo_B3HW, toned, ground(toned, correction.given_B1HW, family), correction)


def filled(
    photo_B3HW: Array, toned_B3HW: Array, ground_B1HW: Array, correction: Correction
) -> Array:
    """`correct` of a photo that its curve was applied to: fills and residual.

    ground: of the toned photo.  A fill hides what the curve leaves but for KEPT of its detail:
    values that clipping may have taken are mostly values that it has not.
    """
    covering = ground_B1HW + KEPT * luma(toned_B3HW)
    fill = correction.cover_B1HW * (covering - toned_B3HW) + correction.shift_B3HW
    return toned_B3HW + lost(float32(photo_B3HW)) * fill + correction.residual_B3HW
