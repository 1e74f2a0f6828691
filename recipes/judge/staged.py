"""Good pictures that ordinary photos hold few of: on white or black, framed, pages of text."""

import cv2
import numpy as np

from recipes.judge.photos import Photo

FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_PLAIN)


def staged(photo: Photo, rng: np.random.Generator) -> Photo:
    """The photo as an object on a ground, inside a frame, or a page in its place.  uint8."""
    kind = rng.random()
    if kind < 0.65:
        return on_ground(photo, rng)
    if kind < 0.8:
        return framed(photo, rng)
    return page(photo.shape[0], rng)


def on_ground(photo: Photo, rng: np.random.Generator) -> Photo:
    """A part of the photo, cut out round or square, on white (mostly) or black with its shadow."""
    side = photo.shape[0]
    white = rng.random() < 0.8
    level = rng.integers(246, 256) if white else rng.integers(0, 8)
    ground = np.full_like(photo, level)
    size = int(side * rng.uniform(0.3, 0.8))
    cut = cv2.resize(photo, (size, size), interpolation=cv2.INTER_AREA)
    top, left = (int(x) for x in rng.integers(0, side - size + 1, 2))
    shape = np.zeros((side, side), np.float32)
    if rng.random() < 0.6:
        centre = (left + size // 2, top + size // 2)
        axes = (int(size * rng.uniform(0.3, 0.5)), int(size * rng.uniform(0.3, 0.5)))
        cv2.ellipse(shape, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
    else:
        shape[top : top + size, left : left + size] = 1
    placed = ground.copy()
    placed[top : top + size, left : left + size] = cut
    if white and rng.random() < 0.5:
        shade = cv2.GaussianBlur(np.roll(shape, 4, 0), (0, 0), 6)[..., None]
        ground = (ground * (1 - rng.uniform(0.1, 0.5) * shade)).astype(np.uint8)
    soft = cv2.GaussianBlur(shape, (0, 0), 0.7)[..., None]
    return (placed * soft + ground * (1 - soft) + 0.5).astype(np.uint8)


def framed(photo: Photo, rng: np.random.Generator) -> Photo:
    """The photo inside a black or white border, on all sides or on two."""
    side = photo.shape[0]
    border = int(side * rng.uniform(0.03, 0.2))
    found = np.full_like(photo, 255 if rng.random() < 0.5 else 0)
    across = 0 if rng.random() < 0.4 else border
    inner = cv2.resize(photo, (side - 2 * across, side - 2 * border), interpolation=cv2.INTER_AREA)
    found[border : side - border, across : side - across] = inner
    return found


def page(side: int, rng: np.random.Generator) -> Photo:
    """Lines of dark text on paper."""
    paper = np.full((2 * side, 2 * side, 3), rng.integers(235, 256), np.uint8)
    ink = tuple(int(x) for x in rng.integers(0, 60, 3))
    font, scale = FONTS[int(rng.integers(len(FONTS)))], float(rng.uniform(0.35, 0.9))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz      "))
    step = int(32 * scale) + 4
    for y in range(step, 2 * side - step, step):
        if rng.random() < 0.85:
            line = "".join(rng.choice(letters, int(rng.integers(20, 60))))
            cv2.putText(
                paper, line, (int(rng.integers(5, 30)), y), font, scale, ink, 1, cv2.LINE_AA
            )
    return cv2.resize(paper, (side, side), interpolation=cv2.INTER_AREA)
