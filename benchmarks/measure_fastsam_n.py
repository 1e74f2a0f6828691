"""How well region maps agree with people, at several exposures.

    python benchmarks/measure_fastsam_n.py --photos BSDS500 [--segmenter WEIGHTS] [--size 512]

Prints, for EV -2, 0, +2, with and without the mean-luma rule that the pipeline applies first:
segmentation covering (Arbelaez et al. 2011: every segment of a person's map by its best overlap
with a region, weighted by area; mean over people, then photos), the share of pixels that some
region covers, regions per photo, and processor seconds per photo on one thread.  BSDS500 holds
val/*.jpg and groundTruth/val/*.mat.
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from train_fastsam_n import Photo, film_rule, re_exposed, read_photos

from evenlight.stages.priors.fastsam import FastSAM, load_segmenter
from evenlight.stages.settings import RegionSettings

EXPOSURES = (-2, 0, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--segmenter", default="fastsam-n")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--confidence", type=float, default=RegionSettings.confidence)
    parser.add_argument("--iou", type=float, default=RegionSettings.iou)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    settings = RegionSettings(
        segmenter=arguments.segmenter, confidence=arguments.confidence, iou=arguments.iou
    )
    segmenter = load_segmenter(settings)
    photos = read_photos(arguments.photos, "val")[: arguments.limit]
    print(f"{arguments.segmenter} {segmenter.fingerprint[:12]}, {len(photos)} photos", flush=True)
    print("  EV  rule  covering  covered  regions  seconds")
    for ev in EXPOSURES:
        for rule in (False, True):
            rows = [measured(segmenter, photo, ev, rule, arguments.size) for photo in photos]
            values = np.mean(rows, 0)
            columns = "{:9.3f} {:8.3f} {:8.1f} {:8.3f}".format(*values)
            print(f"{ev:+4d}  {rule!s:5}{columns}", flush=True)


def measured(
    segmenter: FastSAM, photo: Photo, ev: float, rule: bool, size: int
) -> tuple[float, float, int, float]:
    """Covering, share covered, number of regions, seconds for one photo."""
    rgb, maps = photo
    height, width = rgb.shape[:2]
    scale = size / max(height, width)
    h, w = (round(side * scale / 8) * 8 for side in (height, width))
    rgb = cv2.resize(rgb, (w, h), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    if ev:
        rgb = re_exposed(rgb, ev, np.random.default_rng(0))
    if rule:
        rgb = film_rule(rgb)
    began = time.process_time()
    labels = segmenter.segment(np.round(rgb * 255).astype(np.uint8)).labels
    seconds = time.process_time() - began
    labels = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    scores = [covering(labels, one) for one in maps]
    return float(np.mean(scores)), float((labels > 0).mean()), len(np.unique(labels)), seconds


def covering(labels: NDArray[np.uint8], truth: NDArray[np.uint16]) -> float:
    """Mean over the pixels of the truth of their segment's best IoU with a region."""
    count = int(labels.max()) + 1
    both = np.bincount(
        truth.ravel().astype(np.int64) * count + labels.ravel(),
        minlength=(int(truth.max()) + 1) * count,
    ).reshape(-1, count)
    segments, regions = both.sum(1, keepdims=True), both.sum(0, keepdims=True)
    overlap = both / np.maximum(segments + regions - both, 1)
    return float((overlap.max(1) * segments[:, 0]).sum() / truth.size)


if __name__ == "__main__":
    main()
