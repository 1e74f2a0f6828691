"""Which photos of a store show one scene: frames of a bracket, each the answer to the others.

No setting is needed: frames lie in a folder of their own, and show the same edges.
"""

# N photos, s a small side

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.pixels import luma
from evenlight.stages.priors import tone

FEWEST = 3  # frames of a scene
SAME = 0.4  # least correlation of the edges of a frame with those of the scene's middling one
MIDDLING = (60 / 255, 150 / 255)  # mean luma of a frame that others are brought to
REACH = 2.2  # greatest strength between them: the judge's
APART = 25 / 255  # least difference in mean luma of two frames that are paired


def find_scenes(names: Sequence[str], small_N3ss: Tensor) -> list[list[int]]:
    """Indices of the frames of each scene, the scenes by name.

    names: paths with "/" between folders.  small: float RGB copies in [0, 1].
    """
    folders: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        folders[str(PurePosixPath(name).parent)].append(i)
    levels_N = luma(small_N3ss).mean((1, 2, 3))
    scenes = []
    for _, frames in sorted(folders.items()):
        if len(frames) < FEWEST:
            continue
        edges_FL = _edges(small_N3ss[frames])
        middling = int((levels_N[frames] - sum(MIDDLING) / 2).abs().argmin())
        same_F = edges_FL @ edges_FL[middling] >= SAME
        scene = [frame for frame, same in zip(frames, same_F.tolist(), strict=True) if same]
        if len(scene) >= FEWEST:
            scenes.append(scene)
    return scenes


def pairs(
    scene: Sequence[int], small_N3ss: Tensor, extents: Sequence[Sequence[int]]
) -> list[tuple[int, int]]:
    """(frame, target frame): any frame towards each middling one that is exposed otherwise, where
    a strength within REACH makes them alike.

    small: as in `find_scenes`.  extents: height and width of every photo.
    """
    low, high = MIDDLING
    frames_F3ss = small_N3ss[list(scene)]
    levels_F = luma(frames_F3ss).mean((1, 2, 3))
    found = []
    for target, level in zip(scene, levels_F.tolist(), strict=True):
        if low <= level <= high:
            t_F = tone.rule_strength(frames_F3ss, "film", level)
            fits_F = ((levels_F - level).abs() >= APART) & (t_F.abs() <= REACH)
            found += [
                (frame, target)
                for frame, fits in zip(scene, fits_F.tolist(), strict=True)
                if fits and extents[frame] == extents[target]
            ]
    return found


def _edges(small_N3ss: Tensor) -> Tensor:
    """Gradients of each copy at like brightness, of length 1.  N,L."""
    t_N = tone.rule_strength(small_N3ss, "film")
    level = luma(tone.apply("film", small_N3ss, t_N[:, None, None, None]))
    down, right = level.diff(dim=2).flatten(1), level.diff(dim=3).flatten(1)
    return F.normalize(torch.cat([down, right], dim=1), dim=1)
