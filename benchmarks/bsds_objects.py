"""The human segments of BSDS500 as a set in the layout `uneven`.

    python -m benchmarks.bsds_objects BSDS500 SPLIT OUT

BSDS500: holds SPLIT/NAME.jpg and groundTruth/SPLIT/NAME.mat, several annotators each: the first
one's segments are taken.  OUT gets photo/NAME.jpg (a link) and objects/NAME.png.
"""

import argparse
from pathlib import Path

import cv2
from scipy.io import loadmat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bsds", type=Path)
    parser.add_argument("split")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    for folder in ("photo", "objects"):
        (arguments.out / folder).mkdir(parents=True, exist_ok=True)
    for photo in sorted((arguments.bsds / arguments.split).glob("*.jpg")):
        truth = loadmat(arguments.bsds / "groundTruth" / arguments.split / f"{photo.stem}.mat")
        segments_HW = truth["groundTruth"][0, 0]["Segmentation"][0, 0].astype("uint8")
        cv2.imwrite(str(arguments.out / "objects" / f"{photo.stem}.png"), segments_HW)
        link = arguments.out / "photo" / photo.name
        link.unlink(missing_ok=True)
        link.symlink_to(photo.resolve())


if __name__ == "__main__":
    main()
