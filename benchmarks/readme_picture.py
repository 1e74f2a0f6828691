"""The picture of the README: photos that scikit-image ships, re-exposed, and what becomes of them.

python -m benchmarks.readme_picture RUN docs/before-after.jpg
"""

import sys
from pathlib import Path

import cv2
import numpy as np

from evenlight.pipeline.demo import installed_photo
from evenlight.pipeline.load import load_predictor
from evenlight.stages.photos.encode import jpeg_bytes
from evenlight.stages.pixels import to_bytes, to_float
from evenlight.stages.priors import tone

PHOTOS = (  # file, exposure shift in EV
    ("astronaut.png", -2.0),
    ("coffee.png", -1.5),
    ("chelsea.png", -2.5),
    ("astronaut.png", 1.5),
    ("coffee.png", 1.5),
    ("chelsea.png", 1.0),
)
WIDTH, HEIGHT, GAP = 280, 210, 4


def cropped(picture: np.ndarray) -> np.ndarray:
    """The middle of a picture at the size of a tile."""
    scale = max(WIDTH / picture.shape[1], HEIGHT / picture.shape[0])
    resized = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    top, left = (resized.shape[0] - HEIGHT) // 2, (resized.shape[1] - WIDTH) // 2
    return resized[top : top + HEIGHT, left : left + WIDTH]


def tile(picture: np.ndarray) -> np.ndarray:
    return np.pad(cropped(picture), ((0, GAP), (0, GAP), (0, 0)), constant_values=255)


def main(run: str, out: str) -> None:
    loaded = load_predictor(None if run == "base" else Path(run))
    columns = []
    for file, shift in PHOTOS:
        photo = to_float(installed_photo("skimage/data", file))
        before = to_bytes(tone.apply("ev", photo, shift / 1.6)).numpy()
        columns.append(np.concatenate([tile(before), tile(loaded.correct(before))]))
    rows = [np.concatenate(columns[:3], 1), np.concatenate(columns[3:], 1)]
    Path(out).write_bytes(jpeg_bytes(np.concatenate(rows), quality=88))


if __name__ == "__main__":
    main(*sys.argv[1:])
