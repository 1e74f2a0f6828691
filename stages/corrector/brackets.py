"""Real brackets among the photos of a store: frames of one scene, found by what they show.

Agreement inside a bracket (docs/architecture.md): every frame is trained towards the pseudo-GT of
the frame that needed the least correction, which holds what the others lost to noise or clipping.
Its brightness is the pseudo-GT's own, so nothing is learned from the bracket about brightness.
"""

# N photos, L pixels of a small copy

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from torch import Tensor

from evenlight.stages.pixels import luma

# Of 1397 neighbours within the brackets of SICE 93 % lie above, of 188 across them 0.5 %.
SAME_SCENE = 0.9  # rank correlation of luma


def find_brackets(names: Sequence[str], extents: Tensor, small: Tensor) -> list[list[int]]:
    """Runs of photos, two or more, that follow each other by name and show one scene.

    names: N, "folder/file"; numbers in them count as numbers.  extents: N,2, equal within a
    bracket.  small: float N,3,s,s small copies.  Whatever exposure does to a photo it keeps the
    order of brightness, so frames are compared by the ranks of their luma.
    """
    ranks = luma(small).flatten(1).argsort(1).argsort(1).float()
    ranks = (ranks - ranks.mean(1, keepdim=True)) / ranks.std(1, correction=0, keepdim=True)

    def follows(photo: int, previous: int) -> bool:
        return (
            PurePosixPath(names[photo]).parent == PurePosixPath(names[previous]).parent
            and bool((extents[photo] == extents[previous]).all())
            and float((ranks[photo] * ranks[previous]).mean()) >= SAME_SCENE
        )

    runs: list[list[int]] = []
    for photo in sorted(range(len(names)), key=lambda i: _natural(names[i])):
        if runs and follows(photo, runs[-1][-1]):
            runs[-1].append(photo)
        else:
            runs.append([photo])
    return [run for run in runs if len(run) > 1]


def share_targets(
    brackets: list[list[int]], strength: Tensor, pseudo_gt: Tensor, confidence: Tensor
) -> None:
    """Give every frame the pseudo-GT and confidence of the bracket's least corrected frame.

    strength: N, of the pseudo-GT.  pseudo_gt and confidence (N, ...) are changed in place.
    """
    for bracket in brackets:
        best = min(bracket, key=lambda photo: abs(float(strength[photo])))
        pseudo_gt[bracket] = pseudo_gt[best].clone()
        confidence[bracket] = confidence[best].clone()


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting key under which 2.jpg comes before 10.jpg."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]
