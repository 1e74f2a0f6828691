"""Re-exposed batches for the recipe of clip-lite0 (see train.py).

The exposure label e of a sample is the exposure it has too much, in EV of the camera model: a good
photo has e = 0, and a photo shifted by the camera has the shift itself. Whatever is moved along the
film curve, and every frame of a real bracket, is labelled by the strength t that would bring it
back to the good one: `Undo` turns t into EV, fitted on photos whose shift is known.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch

from recipes.clip_lite0 import captions
from recipes.clip_lite0.photos import (
    LUMA,
    SIDE,
    Bracket,
    Photo,
    Pool,
    film_tables,
    matching_strength,
    mean_luma,
)

# H W pixels

WIDEST_EV = 6.0  # about what the film curve can undo
# drawing normal numbers anew for each shot would cost more than all else: windows of one sheet
NOISE = np.random.default_rng(11).standard_normal((512, 512, 3), dtype=np.float32)


@dataclass(frozen=True)
class Sample:
    image: np.ndarray  # size,size,3 uint8 RGB
    ev: float  # exposure too much, in EV
    caption: str
    content: str


class Undo:
    """Film strength t that undoes a camera shift, and the shift that a strength undoes."""

    def __init__(self, photos: list[Photo]) -> None:
        """The median over photos at each of 13 shifts, each photo shot once per shift."""
        rng = np.random.default_rng(3)
        self.evs = np.linspace(-3, 3, 13)
        medians = [
            np.median([matching_strength(camera(p.pixels, ev, rng), mean_luma(p.pixels))
                       for p in photos])
            for ev in self.evs
        ]  # fmt: skip
        self.strengths = np.array(medians) - np.interp(0, self.evs, medians)  # good: none
        assert (np.diff(self.strengths) < 0).all(), self.strengths
        self.grid = np.linspace(-WIDEST_EV, WIDEST_EV, 121)
        self.needed = np.array([self.strength(ev) for ev in self.grid])

    def strength(self, ev: float) -> float:
        slope = (self.strengths[-1] - self.strengths[0]) / (self.evs[-1] - self.evs[0])
        inside = float(np.clip(ev, self.evs[0], self.evs[-1]))
        return float(np.interp(inside, self.evs, self.strengths) + slope * (ev - inside))

    def ev(self, strength: float) -> float:
        return float(np.interp(strength, self.needed[::-1], self.grid[::-1]))


def crop_box(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Mostly the whole photo, else a region of it.  Returns top, left, height, width."""
    scale = rng.uniform(0.8, 1) if rng.random() < 0.8 else rng.uniform(0.45, 0.8)
    height, width = (int(SIDE * min(1, scale * rng.uniform(0.9, 1.1))) for _ in range(2))
    return (
        int(rng.integers(0, SIDE - height + 1)),
        int(rng.integers(0, SIDE - width + 1)),
        height,
        width,
    )


def cut(pixels: np.ndarray, box: tuple[int, int, int, int], flip: bool) -> np.ndarray:
    top, left, height, width = box
    view = pixels[top : top + height, left : left + width]
    return np.ascontiguousarray(view[:, ::-1] if flip else view)


def shrunk(pixels: np.ndarray, size: int) -> np.ndarray:
    """To the square CLIP sees, bicubic and antialiased as it does it.  uint8 in and out."""
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(x, (size, size), mode="bicubic", antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def camera_curve(ev: float, knee: float, s_curve: float) -> np.ndarray:
    """Linear light, gain, shoulder above the knee, clipping, sRGB, S-curve.  Returns 256 in 0..1"""
    x = np.linspace(0, 1, 256)
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) * 2.0**ev
    if knee < 1:
        bent = knee + (1 - knee) * (1 - np.exp(-np.maximum(0, linear - knee) / (1 - knee)))
        linear = np.where(linear <= knee, linear, bent)
    linear = linear.clip(0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (1 - s_curve) * coded + s_curve * coded**2 * (3 - 2 * coded)


def camera(pixels: np.ndarray, ev: float, rng: np.random.Generator) -> np.ndarray:
    """Expose a photo again by `ev`: curve, saturation, noise, JPEG.  uint8 RGB in and out."""
    knee = rng.uniform(0.7, 1.0) if ev > 0 and rng.random() < 0.6 else 1.0
    image = cv2.LUT(pixels, to_bytes(camera_curve(ev, knee, rng.uniform(0, 0.5))))
    saturation = rng.uniform(0.75, 1.25)
    mix = saturation * np.eye(3) + (1 - saturation) * LUMA[None]
    image = cv2.transform(image, mix)
    if rng.random() < 0.5:
        sigma = rng.uniform(0.002, 0.02) * (1.5 if ev < -1 else 1)
        top, left = rng.integers(0, len(NOISE) - np.array(image.shape[:2]) + 1)
        noise = NOISE[top : top + image.shape[0], left : left + image.shape[1]]
        image = cv2.addWeighted(image.astype(np.float32), 1, noise, 255 * sigma, 0)
        image = cv2.max(image, 0).round().clip(max=255).astype(np.uint8)
    return jpeg(image, rng)


def to_bytes(image: np.ndarray) -> np.ndarray:
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def jpeg(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
    done, buffer = cv2.imencode(".jpg", pixels, quality)
    assert done
    return cv2.imdecode(buffer, cv2.IMREAD_COLOR)


CASTS = {
    "warm": (1.10, 1.0, 0.85),
    "cold": (0.86, 1.0, 1.14),
    "green": (0.92, 1.06, 0.92),
    "magenta": (1.08, 0.93, 1.08),
}


def altered(pixels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Sometimes another contrast or a colour cast, and the word for it."""
    draw = rng.random()
    if draw < 0.1:
        name = str(rng.choice(list(CASTS)))
        return cv2.transform(pixels, np.diag(CASTS[name])), name
    if draw < 0.2:
        amount = rng.choice([-0.35, 0.35])
        x = np.linspace(0, 1, 256)
        curve = x + amount * (x * x * (3 - 2 * x) - x) * 1.6
        return cv2.LUT(pixels, to_bytes(curve)), "contrasty" if amount > 0 else "flat"
    return pixels, ""


def turned(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotated and sheared a little, edges mirrored: another picture of the same exposure."""
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-8, 8), 1)
    matrix[:, :2] += rng.uniform(-0.06, 0.06, (2, 2))
    return cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT)


# --- batches -------------------------------------------------------------------------------------


def spread(rng: np.random.Generator, count: int) -> list[float]:
    """Labels of one group: about a fifth near 0, the rest anywhere, at least two apart."""
    drawn = []
    for _ in range(count):
        near = 0.0 if rng.random() < 0.6 else rng.uniform(-0.3, 0.3)
        drawn.append(near if rng.random() < 0.2 else rng.uniform(-2.7, 2.7))
    if max(drawn) - min(drawn) < 0.5:
        drawn[0] = rng.uniform(0.6, 2.5) * rng.choice([-1, 1])
    return drawn


class Batches:
    """Groups of versions of one photo or bracket, the versions of a group together."""

    def __init__(self, pool: Pool, versions: int) -> None:
        self.pool, self.versions, self.size = pool, versions, SIDE
        self.most_ev = WIDEST_EV
        best = [Photo(b.frames[b.best], "") for b in pool.brackets]
        self.undo = Undo(best[::3] + pool.chosen[::3])

    def draw(
        self, groups: int, size: int, most_ev: float, rng: np.random.Generator
    ) -> list[Sample]:
        """groups x versions samples, each size x size, labels within +-most_ev."""
        self.size, self.most_ev = size, most_ev
        samples: list[Sample] = []
        for _ in range(groups):
            kind = rng.random()
            if self.pool.brackets and kind < 0.35:
                bracket = self.pool.brackets[int(rng.integers(len(self.pool.brackets)))]
                samples += self.bracket_group(bracket, rng)
            else:
                samples += self.photo_group(self.scene(kind < 0.6, rng), rng)
        return samples

    def scene(self, chosen: bool, rng: np.random.Generator) -> Photo:
        """A good photo, cropped and turned; sometimes a part of it shows another good one."""
        photo = self.any_photo(chosen, rng)
        box = crop_box(rng)
        pixels = cut(photo.pixels, box, rng.random() < 0.5)
        if rng.random() < 0.3:
            pixels = turned(pixels, rng)
        if rng.random() > 0.3:
            return Photo(pixels, photo.content)
        other = cut(self.any_photo(chosen, rng).pixels, box, rng.random() < 0.5)
        at = int(rng.uniform(0.35, 0.65) * pixels.shape[0])
        if rng.random() < 0.5:
            pixels[at:] = other[at:]
        else:
            pixels[:, at:] = other[:, at:]
        return Photo(pixels, "")

    def any_photo(self, chosen: bool, rng: np.random.Generator) -> Photo:
        """Those chosen as good and the best frames of brackets, or ordinary ones."""
        if not chosen:
            return self.pool.web[int(rng.integers(len(self.pool.web)))]
        index = int(rng.integers(len(self.pool.chosen) + len(self.pool.brackets)))
        if index < len(self.pool.chosen):
            return self.pool.chosen[index]
        bracket = self.pool.brackets[index - len(self.pool.chosen)]
        return Photo(bracket.frames[bracket.best], "")

    def photo_group(self, photo: Photo, rng: np.random.Generator) -> list[Sample]:
        """Versions of one good photo: by the camera, by the film curve, or by both in turn."""
        target = mean_luma(photo.pixels)
        pixels, look = altered(photo.pixels, rng)
        if look in CASTS:
            target = mean_luma(pixels)
        samples = []
        for ev in spread(rng, self.versions):
            how = rng.random()
            if how < 0.6:
                plain = ev == 0 and rng.random() < 0.5
                base = pixels if plain else camera(pixels, ev, rng)
                samples.append(self.finish(base, 0.0, ev, photo.content, look, rng))
                continue
            base, needed = pixels, 0.0
            if how < 0.85:
                base = camera(pixels, rng.uniform(-2.5, 2.5), rng)
                needed = matching_strength(base, target)
            t = float(np.clip(needed - self.undo.strength(ev), -2.2, 2.2))
            ev = self.undo.ev(needed - t)
            samples.append(self.finish(base, t, ev, photo.content, look, rng))
        return samples

    def bracket_group(self, bracket: Bracket, rng: np.random.Generator) -> list[Sample]:
        """Frames of one real bracket, as shot or moved along the film curve."""
        box, flip, turn = crop_box(rng), rng.random() < 0.5, int(rng.integers(1 << 30))
        turns = rng.random() < 0.3
        samples = []
        for ev in spread(rng, self.versions):
            index = bracket.best if rng.random() < 0.2 else int(rng.integers(len(bracket.frames)))
            base = cut(bracket.frames[index], box, flip)
            if turns:
                base = turned(base, np.random.default_rng(turn))
            needed = bracket.to_best[index]
            moved = float(np.clip(needed - self.undo.strength(ev), -2.2, 2.2))
            t = 0.0 if rng.random() < 0.35 else moved
            samples.append(self.finish(base, t, self.undo.ev(needed - t), "", "", rng))
        return samples

    def finish(
        self, base: np.ndarray, t: float, ev: float, content: str, look: str,
        rng: np.random.Generator,
    ) -> Sample:  # fmt: skip
        image = cv2.LUT(base, to_bytes(film_tables(np.array([t]))[0])) if t else base
        if rng.random() < 0.1:
            image = jpeg(image, rng)
        image = shrunk(image, self.size)
        if rng.random() < 0.2:  # a patch of the photo's own mean colour
            top, left = rng.integers(0, self.size * 3 // 4, 2)
            height, width = rng.integers(self.size // 8, self.size // 3, 2)
            patch = np.array(cv2.mean(image)[:3]).astype(np.uint8)
            image[top : top + height, left : left + width] = patch
        ev = float(np.clip(ev, -self.most_ev, self.most_ev))
        said = captions.caption(image, ev, content, look, rng)
        return Sample(image, ev, said, content)
