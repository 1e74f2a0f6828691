"""How well region maps agree with people, at several exposures, beside other ways to make them.

    python -m benchmarks.measure_fastsam_n --photos BSDS500 --start WEIGHTS.pt [--size 512]

Prints one table.  For EV -2, 0 and +2 and for each method: segmentation covering and border F
(fastsam_scores.py; mean over people, then photos), the share of pixels that some mask covers
before the remainders are made regions, regions per photo, and processor seconds per photo on one
thread at --size and at 1024.  Methods: the segmenter on the photo as it is, on the photo after
the mean-luma rule that the pipeline applies first, and without its refined borders; scikit-image
`felzenszwalb` and `slic` at the setting that covers best on every fifth training photo; the
untrained warm start; each person against the others.  BSDS500 holds train and val, *.jpg, and
groundTruth/{train,val}/*.mat; WEIGHTS.pt is the COCO network that training started from.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from skimage.segmentation import felzenszwalb, slic
from torch import nn

from benchmarks.fastsam_scores import border_f, mean_covering
from evenlight.stages.priors.fastsam import FastSAM, build_network, load_segmenter
from evenlight.stages.priors.fastsam_weights import read_weights
from evenlight.stages.settings import RegionSettings
from recipes.fastsam_n.photos import Photo, film_rule, re_exposed, read_photos

EXPOSURES = (-2, 0, 2)
LARGE, NUM_LARGE = 1024, 10  # long side, and photos timed at it
SCALES, MIN_SIZES = (200, 350, 500, 800), (300, 500, 1000)
SEGMENTS, COMPACTNESS = (6, 10, 15, 25), (10, 30)
Rgb = NDArray[np.uint8]


@dataclass(frozen=True)
class Method:
    """A way to make region maps (at any size), and the share of a photo that it covers itself."""

    labels: Callable[[Rgb], NDArray]
    covered: Callable[[Rgb], float] = lambda _: 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--segmenter", default="fastsam-n")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--limit", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    segmenter = load_segmenter(RegionSettings(segmenter=arguments.segmenter))
    warm_start = FastSAM(coco_network(arguments.start), RegionSettings(), "")
    photos = read_photos(arguments.photos, "val")[: arguments.limit]
    tuning = read_photos(arguments.photos, "train")[::5]
    methods = {
        arguments.segmenter: of(segmenter),
        "- after the mean-luma rule": of(segmenter, ruled),
        "- borders not refined": unrefined(segmenter),
        "felzenszwalb": best_felzenszwalb(tuning, arguments.size),
        "slic": best_slic(tuning, arguments.size),
        "untrained warm start": of(warm_start),
    }
    print(f"{arguments.segmenter} {segmenter.fingerprint[:12]}, {len(photos)} photos")
    print(f"people against each other: covering {agreement(photos):.3f}")
    columns = "EV | method | covering | border F | covered | regions"
    print(f"| {columns} | s at {arguments.size} | s at {LARGE} |\n{'| --- ' * 8}|", flush=True)
    for ev in EXPOSURES:
        usual = [(at_exposure(rgb, ev, arguments.size), truths) for rgb, truths in photos]
        large = [(at_exposure(rgb, ev, LARGE), truths) for rgb, truths in photos[:NUM_LARGE]]
        for name, method in methods.items():
            values = [*np.mean([measured(method, photo) for photo in usual], 0)]
            values.append(np.mean([measured(method, photo)[-1] for photo in large]))
            cells = "{:.3f} | {:.3f} | {:.3f} | {:.1f} | {:.3f} | {:.3f}".format(*values)
            print(f"| {ev:+d} | {name} | {cells} |", flush=True)


def measured(method: Method, photo: Photo) -> tuple[float, float, float, int, float]:
    """Covering, border F, share covered, number of regions, seconds for one photo."""
    rgb, truths = photo
    began = time.process_time()
    labels = method.labels(rgb)
    seconds = time.process_time() - began
    # Plain nearest would move every border by half a pixel.
    size = truths[0].shape[::-1]
    labels = cv2.resize(labels.astype(np.uint16), size, interpolation=cv2.INTER_NEAREST_EXACT)
    scores = mean_covering(labels, truths), border_f(labels, truths)
    return *scores, method.covered(rgb), len(np.unique(labels)), seconds


def at_exposure(rgb: Rgb, ev: float, size: int) -> Rgb:
    """The photo at a long side of `size`, sides multiples of 8, taken `ev` stops brighter."""
    scale = size / max(rgb.shape[:2])
    height, width = (round(side * scale / 8) * 8 for side in rgb.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    rgb = cv2.resize(rgb, (width, height), interpolation=method)
    if not ev:
        return rgb
    exposed = re_exposed(rgb.astype(np.float32) / 255, ev, np.random.default_rng(0))
    return np.round(exposed * 255).astype(np.uint8)


def ruled(rgb: Rgb) -> Rgb:
    return np.round(film_rule(rgb.astype(np.float32) / 255) * 255).astype(np.uint8)


def of(segmenter: FastSAM, prepared: Callable[[Rgb], Rgb] = lambda rgb: rgb) -> Method:
    """`segment` as a whole, features too, so that its time is what a photo of a store costs."""
    return Method(
        labels=lambda rgb: segmenter.segment(prepared(rgb)).labels,
        covered=lambda rgb: segmenter.painted(prepared(rgb))[1],
    )


def unrefined(segmenter: FastSAM) -> Method:
    """What `regions` starts from, at the photo's size; its time is that of the masks alone."""

    def labels(rgb: Rgb) -> NDArray:
        return cv2.resize(
            segmenter.painted(rgb)[0], rgb.shape[1::-1], interpolation=cv2.INTER_NEAREST
        )

    return Method(labels=labels, covered=lambda rgb: segmenter.painted(rgb)[1])


def best_felzenszwalb(photos: list[Photo], size: int) -> Method:
    settings = [dict(scale=s, min_size=m) for s, m in itertools.product(SCALES, MIN_SIZES)]
    return best(felzenszwalb, settings, photos, size)


def best_slic(photos: list[Photo], size: int) -> Method:
    grid = itertools.product(SEGMENTS, COMPACTNESS)
    return best(slic, [dict(n_segments=n, compactness=c) for n, c in grid], photos, size)


def best(
    function: Callable[..., NDArray],
    settings: list[dict[str, float]],
    photos: list[Photo],
    size: int,
) -> Method:
    """The function at the setting that covers best at EV 0."""
    photos = [(at_exposure(rgb, 0, size), truths) for rgb, truths in photos]
    coverings = []
    for setting in settings:
        method = Method(partial(function, **setting))
        coverings.append(np.mean([measured(method, photo)[0] for photo in photos]))
    chosen = settings[int(np.argmax(coverings))]
    print(f"{function.__name__}: {chosen}, covering {max(coverings):.3f} on train", flush=True)
    return Method(partial(function, **chosen))


def agreement(photos: list[Photo]) -> float:
    """Covering of each person's map by another's: mean over pairs, then photos."""
    return float(
        np.mean(
            [
                np.mean([mean_covering(one, [t for t in truths if t is not one]) for one in truths])
                for _, truths in photos
            ]
        )
    )


def coco_network(path: Path) -> nn.Module:
    """The 80-class network itself: an anchor's score is that of its best class."""
    network: nn.Module = build_network("n", 80)
    for branch in network.model[-1].cv3:
        branch[-1] = nn.Conv2d(80, 80, 1)
    network.load_state_dict({name: tensor.float() for name, tensor in read_weights(path).items()})
    return network


if __name__ == "__main__":
    main()
