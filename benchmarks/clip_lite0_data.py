"""Photos, re-exposure and captions for the recipe of clip-lite0 (see train_clip_lite0.py).

The exposure label e of a sample is the exposure it has too much, in EV, read on the film curve: a
good photo has e = 0, and the film curve of strength t moves it by t / ln 2. For a camera shift and
for a frame of a real bracket, e follows from the strength that would bring it back to the good one.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch

from evenlight.stages.priors import tone

# H W pixels, T strengths of the grid

SIDE = 224  # photos are kept in memory at this size, squashed to a square as CLIP sees them
LN2 = float(np.log(2))
GRID_T = np.linspace(-3, 3, 121)
LUMA = np.array([0.299, 0.587, 0.114])
SUFFIXES = {".jpg", ".jpeg", ".png"}


def film_tables(strengths: np.ndarray) -> np.ndarray:
    """The film curve at 256 levels, as the pipeline applies it.  Returns T,256 float32."""
    levels = torch.linspace(0, 1, 256)
    return tone.apply("film", levels, torch.as_tensor(strengths).float()[:, None]).numpy()


FILM = film_tables(GRID_T)


@dataclass(frozen=True)
class Photo:
    pixels: np.ndarray  # SIDE,SIDE,3 uint8 RGB
    content: str  # what is in it, "" where unknown


@dataclass(frozen=True)
class Bracket:
    scene: str
    frames: list[np.ndarray]  # each SIDE,SIDE,3 uint8 RGB, sorted by mean luma
    best: int  # index of the frame that is exposed best
    to_best: list[float]  # film strength that brings each frame closest to the best one


@dataclass(frozen=True)
class Pool:
    photos: list[Photo] = field(default_factory=list)
    brackets: list[Bracket] = field(default_factory=list)
    held_photos: list[Photo] = field(default_factory=list)
    held_brackets: list[Bracket] = field(default_factory=list)


def load_pool(folders: list[Path], hold_out: int = 5) -> Pool:
    """Read all photos. A folder with manifest.csv holds brackets, one sub-folder per scene.

    Every `hold_out`-th scene, and every 16th photo, is kept for measuring.
    """
    pool = Pool()
    for folder in folders:
        if (folder / "manifest.csv").is_file():
            scenes = sorted(p for p in folder.iterdir() if p.is_dir())
            for index, scene in enumerate(scenes):
                held = index % hold_out == hold_out - 1
                (pool.held_brackets if held else pool.brackets).append(read_bracket(scene))
            continue
        for index, path in enumerate(image_files(folder)):
            photo = Photo(read(path), content_of(path.stem))
            if 0.15 < mean_luma(photo.pixels) < 0.88:
                (pool.held_photos if index % 16 == 15 else pool.photos).append(photo)
    return pool


def image_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def read(path: Path, side: int = SIDE) -> np.ndarray:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert image is not None, path
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small[..., ::-1])


def read_bracket(folder: Path) -> Bracket:
    frames = sorted((read(p) for p in image_files(folder)), key=mean_luma)
    best = int(np.argmax([well_exposedness(f) for f in frames]))
    return Bracket(folder.name, frames, best, [closest_strength(f, frames[best]) for f in frames])


def content_of(stem: str) -> str:
    """ImageNet sample names are n01440764_tench: the words after the number are the content."""
    match = re.fullmatch(r"n\d{8}_(.+)", stem)
    return match.group(1).replace("_", " ").lower() if match else ""


def mean_luma(pixels: np.ndarray) -> float:
    return float((pixels.reshape(-1, 3).mean(0) / 255) @ LUMA)


def well_exposedness(pixels: np.ndarray) -> float:
    """Share of mid-toned pixels less the share of lost ones: how good a frame of a bracket is."""
    luma = (pixels[::2, ::2] / 255) @ LUMA
    mid = np.exp(-((luma - 0.5) ** 2) / (2 * 0.22**2)).mean()
    lost = ((luma > 0.98) | (luma < 0.02)).mean()
    return float(mid - 0.5 * lost)


def closest_strength(frame: np.ndarray, target: np.ndarray) -> float:
    """Film strength at which the re-exposed frame is nearest to the target (least squares)."""
    small = cv2.resize(frame, (48, 48), interpolation=cv2.INTER_AREA)
    goal = cv2.resize(target, (48, 48), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    errors = ((FILM[:, small] - goal) ** 2).mean((1, 2, 3))
    return float(GRID_T[int(errors.argmin())])


def matching_strength(pixels: np.ndarray, target_luma: float) -> float:
    """Film strength at which the mean luma of the re-exposed pixels is the target."""
    weight = np.zeros(256)
    for channel, share in enumerate(LUMA):
        counts = np.bincount(pixels[::2, ::2, channel].ravel(), minlength=256)
        weight += share * counts / counts.sum()
    return float(np.interp(target_luma, FILM @ weight, GRID_T))


# --- re-exposure ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    image: np.ndarray  # size,size,3 float32 RGB in [0, 1]
    ev: float  # exposure too much, in EV
    caption: str
    content: str


def crop_box(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Mostly the whole photo, else a region of it.  Returns top, left, height, width."""
    scale = rng.uniform(0.85, 1) if rng.random() < 0.6 else rng.uniform(0.4, 0.85)
    height, width = (int(SIDE * min(1, scale * rng.uniform(0.9, 1.1))) for _ in range(2))
    return (
        int(rng.integers(0, SIDE - height + 1)),
        int(rng.integers(0, SIDE - width + 1)),
        height,
        width,
    )


def cut(pixels: np.ndarray, box: tuple[int, int, int, int], flip: bool, size: int) -> np.ndarray:
    top, left, height, width = box
    view = pixels[top : top + height, left : left + width]
    return cv2.resize(view[:, ::-1] if flip else view, (size, size), interpolation=cv2.INTER_AREA)


def camera(pixels: np.ndarray, ev: float, rng: np.random.Generator) -> np.ndarray:
    """Expose a photo again by `ev`: linear light, shoulder, S-curve, saturation, noise, 8 bits."""
    x = np.linspace(0, 1, 256)
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) * 2.0**ev
    knee = rng.uniform(0.7, 1.0) if ev > 0 and rng.random() < 0.6 else 1.0
    if knee < 1:
        bent = knee + (1 - knee) * (1 - np.exp(-np.maximum(0, linear - knee) / (1 - knee)))
        linear = np.where(linear <= knee, linear, bent)
    linear = linear.clip(0, 1)
    coded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    s_curve = rng.uniform(0, 0.5)
    curve = (1 - s_curve) * coded + s_curve * coded**2 * (3 - 2 * coded)
    image = curve.astype(np.float32)[pixels]
    gray = (image @ LUMA.astype(np.float32))[..., None]
    image = gray + rng.uniform(0.75, 1.25) * (image - gray)
    if rng.random() < 0.5:
        sigma = rng.uniform(0.002, 0.02) * (1.5 if ev < -1 else 1)
        image += rng.normal(0, sigma, image.shape).astype(np.float32)
    return jpeg(to_bytes(image), rng)


def to_bytes(image: np.ndarray) -> np.ndarray:
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def jpeg(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
    done, buffer = cv2.imencode(".jpg", pixels, quality)
    assert done
    return cv2.imdecode(buffer, cv2.IMREAD_COLOR)


def film(pixels: np.ndarray, t: float) -> np.ndarray:
    return pixels.astype(np.float32) / 255 if t == 0 else film_tables(np.array([t]))[0][pixels]


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
        gains = np.array(CASTS[name], dtype=np.float32)
        return to_bytes(pixels / 255 * gains), name
    if draw < 0.2:
        amount = rng.choice([-0.35, 0.35])
        x = np.linspace(0, 1, 256)
        curve = x + amount * (x * x * (3 - 2 * x) - x) * 1.6
        return to_bytes(curve)[pixels], "contrasty" if amount > 0 else "flat"
    return pixels, ""


# --- captions ------------------------------------------------------------------------------------

LEVELS = {  # upper end in EV: adjectives
    -2.3: ["severely underexposed", "almost black", "extremely dark", "three stops underexposed"],
    -1.4: ["strongly underexposed", "very dark", "two stops underexposed", "much too dark"],
    -0.7: ["underexposed", "too dark", "one stop underexposed", "dim", "dark", "poorly lit"],
    -0.3: ["slightly underexposed", "a little dark", "half a stop underexposed", "a bit too dark"],
    0.3: [
        "well-exposed",
        "well exposed",
        "correctly exposed",
        "properly exposed",
        "balanced",
        "normally exposed",
        "perfectly exposed",
        "evenly lit",
        "natural",
    ],
    0.7: ["slightly overexposed", "a little bright", "half a stop overexposed", "a bit too bright"],
    1.4: ["overexposed", "too bright", "one stop overexposed", "bright", "washed out"],
    2.3: ["strongly overexposed", "very bright", "two stops overexposed", "much too bright"],
    99.0: ["severely overexposed", "almost white", "extremely bright", "three stops overexposed"],
}
CLASS_WORDS = (
    ["underexposed", "too dark", "dark", "dim", "very dark", "strongly underexposed", "gloomy"],
    LEVELS[0.3] + ["normal", "good", "just right"],
    ["overexposed", "too bright", "bright", "very bright", "strongly overexposed", "glaring"],
)
TEMPLATES = [
    "a photo with {} lighting",
    "a {} photo",
    "a {} photograph",
    "a {} picture",
    "an image that is {}",
    "this photo is {}",
    "the picture looks {}",
    "the exposure is {}",
    "{} exposure",
    "{} lighting",
    "{}",
    "a photo taken with {} light",
    "the scene is {}",
]
CONTENT_TEMPLATES = [
    "a {} photo of a {c}",
    "a photo of a {c}, {}",
    "{c}, {}",
    "a {c} with {} lighting",
]


def adjective(ev: float, rng: np.random.Generator) -> str:
    return str(rng.choice(next(words for top, words in LEVELS.items() if ev <= top)))


def caption(image: np.ndarray, ev: float, content: str, look: str, rng: np.random.Generator) -> str:
    """Say in one of many wordings how the photo is exposed, sometimes what is in it."""
    words = adjective(ev, rng)
    if content and rng.random() < 0.5:
        text = str(rng.choice(CONTENT_TEMPLATES)).replace("{c}", content).format(words)
    else:
        text = str(rng.choice(TEMPLATES)).format(words)
    luma = image @ LUMA.astype(np.float32)
    if ev > 0.7 and (luma > 0.97).mean() > 0.08 and rng.random() < 0.5:
        text += rng.choice([", blown highlights", " with clipped highlights", ", burnt out"])
    elif ev < -0.7 and (luma < 0.03).mean() > 0.08 and rng.random() < 0.5:
        text += rng.choice([", crushed shadows", " with blocked shadows", ", no shadow detail"])
    if look:
        text += {"contrasty": ", high contrast", "flat": ", low contrast"}.get(
            look, f", {look} colour cast"
        )
    return text


# --- batches -------------------------------------------------------------------------------------


def spread(rng: np.random.Generator, count: int) -> list[float]:
    """Labels of one group of versions: one near 0, one under, one over, the rest anywhere."""
    near = 0.0 if rng.random() < 0.4 else rng.normal(0, 0.35)
    rest = [rng.uniform(-3, 3) for _ in range(count - 3)]
    return [near, rng.uniform(-3, -0.4), rng.uniform(0.4, 3), *rest]


def photo_group(photo: Photo, count: int, size: int, rng: np.random.Generator) -> list[Sample]:
    """Versions of one good photo: half by the film curve, half by the camera (then film)."""
    crop = cut(photo.pixels, crop_box(rng), rng.random() < 0.5, size)
    target = mean_luma(crop)
    crop, look = altered(crop, rng)
    samples = []
    for ev in spread(rng, count):
        if rng.random() < 0.5 or not 0.06 < target < 0.94:
            base = jpeg(crop, rng) if rng.random() < 0.4 else crop
            t, needed = ev * LN2, 0.0
        else:
            shot = ev if rng.random() < 0.5 else rng.uniform(-3, 3)
            base = camera(crop, shot, rng)
            needed = matching_strength(base, target)
            t = 0.0 if shot == ev else float(np.clip(needed + ev * LN2, -2.2, 2.2))
        samples.append(finish(base, t, needed, photo.content, look, rng))
    return samples


def bracket_group(
    bracket: Bracket, count: int, size: int, rng: np.random.Generator
) -> list[Sample]:
    """Frames of one real bracket, as shot or moved along the film curve."""
    box, flip = crop_box(rng), rng.random() < 0.5
    samples = []
    for ev in spread(rng, count):
        index = bracket.best if rng.random() < 0.2 else int(rng.integers(len(bracket.frames)))
        base = cut(bracket.frames[index], box, flip, size)
        needed = bracket.to_best[index]
        t = 0.0 if rng.random() < 0.3 else float(np.clip(needed + ev * LN2, -2.2, 2.2))
        samples.append(finish(base, t, needed, "", "", rng))
    return samples


def finish(
    base: np.ndarray, t: float, needed: float, content: str, look: str, rng: np.random.Generator
) -> Sample:
    image = film(base, t)
    if rng.random() < 0.25:
        image = jpeg(to_bytes(image), rng).astype(np.float32) / 255
    ev = float(np.clip((t - needed) / LN2, -3.5, 3.5))
    return Sample(image, ev, caption(image, ev, content, look, rng), content)


def batch(pool: Pool, groups: int, count: int, size: int, rng: np.random.Generator) -> list[Sample]:
    """`groups` photos or brackets, `count` versions of each, versions of one group together."""
    samples: list[Sample] = []
    for _ in range(groups):
        if pool.brackets and rng.random() < 0.45:
            bracket = pool.brackets[int(rng.integers(len(pool.brackets)))]
            samples += bracket_group(bracket, count, size, rng)
        else:
            photo = pool.photos[int(rng.integers(len(pool.photos)))]
            samples += photo_group(photo, count, size, rng)
    return samples
