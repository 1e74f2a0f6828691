"""All that a store holds of one photo in one picture: cache show."""

import difflib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evenlight.cache.errors import UsageError
from evenlight.cache.files import atomic_write
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.parts import PARTS, cut
from evenlight.pipeline.report_pictures import overlays
from evenlight.stages.photos.find import without_controls
from evenlight.stages.priors import tone
from evenlight.stages.priors.tones import STRENGTHS
from evenlight.stages.settings import LadderSettings

Arrays = Mapping[str, np.ndarray]
Panel = tuple[str, Image.Image]  # what stands above a picture, and the picture
UNSHOWN = ("proto", "p3", "clip_photo", "clip_ladder", "clip_regions", "tones")
SIDE = 400  # pixels, least width of a picture of the upper rows
GAP, TEXT = 12, 40  # pixels between panels, and of the two lines above each
RUNGS = 7  # of the ladder in a row
FONT = ImageFont.load_default(14)


def cache_show(store: str | Path, photo: str, out: str | Path) -> Path:
    """Write a PNG of a photo's priors; returns its path.  No model is loaded.

    photo: its name in the store.  Raises UsageError where the store has no pseudo-GT of it.
    """
    with Store.open(store) as source:
        made = {str(source.index.names[slot]): slot for slot in source.slots(PARTS[-1].name)}
        if photo not in made:
            near = "".join(difflib.get_close_matches(photo, made, n=1))
            hint = f"; did you mean {near}?" if near else ""
            raise UsageError(f"store {store} holds no pseudo-GT of a photo {photo!r}{hint}")
        names = [array.name for part in PARTS for array in part.arrays if array.name not in UNSHOWN]
        have = cut({name: source.rows(name, [made[photo]]) for name in names}, 0, names)
        ladder = config.resolve(None, config.known(source.index.settings)).ladder
    first, second = _panels(without_controls(photo), have, ladder.family)
    rungs = _rungs(have, ladder)
    rows = [first, second, *(rungs[at : at + RUNGS] for at in range(0, len(rungs), RUNGS))]
    stream = io.BytesIO()
    _sheet(rows).save(stream, "png")
    atomic_write(Path(out), stream.getvalue())
    return Path(out)


def _panels(name: str, have: Arrays, family: str) -> tuple[list[Panel], list[Panel]]:
    """The pictures of a photo, and what is known of its places."""
    photo, strength = have["photo"], float(have["strength"])
    rule = float(have["rule_strength"])
    shown = {key: _over(photo, png) for key, png in overlays(have).items()}
    _write_strengths(shown["regions"], have)
    surest = float(have["confidence"].max())
    good = f", good as it is: {float(have['p_good']):.0%}" if have["judged"].any() else ""
    about = f"mean luma {float(have['mean_luma']):.2f}, {float(have['clipped']):.1%} clipped"
    count = len(np.unique(have["regions"]))
    return [
        (f"{name}\n{about}{good}", Image.fromarray(photo)),
        (f"\nmean-luma rule: strength {rule:+.2f}", _re_exposed(photo, family, rule)),
        (f"\npseudo-GT: strength {strength:+.2f}", Image.fromarray(have["pseudo_gt"])),
    ], [
        (f"{count} regions\nwith the strengths of those that are embedded", shown["regions"]),
        ("strength\nblue: darker, orange: brighter, clear: as it is", shown["strength"]),
        (f"confidence, {surest:.2f} at most\ndark: unsure, yellow: sure", shown["confidence"]),
    ]


def _rungs(have: Arrays, ladder: LadderSettings) -> list[Panel]:
    """The ladder: each rung with the judge's answers that lie nearest, and what the words say."""
    strengths = float(have["rule_strength"]) + np.array(ladder.offsets)
    nearest = np.abs(STRENGTHS[:, None] - strengths).argmin(1)
    judged = np.bincount(nearest, have["judged"], len(strengths))
    shares = np.exp(have["scores"] - have["scores"].max(1, keepdims=True))
    normal = shares[:, 1] / shares.sum(1)
    return [
        (
            f"{strength:+.2f}\n{f'judge {p:.0%}, ' if judged.any() else ''}words {q:.0%}",
            _re_exposed(have["photo"], ladder.family, float(strength)),
        )
        for strength, p, q in zip(strengths, judged, normal, strict=True)
    ]


def _re_exposed(photo: np.ndarray, family: str, strength: float) -> Image.Image:
    return Image.fromarray(tone.on_bytes(family, photo, strength))


def _over(photo: np.ndarray, png: bytes) -> Image.Image:
    """An overlay of a report laid over a photo that shows through as grey."""
    below = Image.fromarray(photo).convert("L").convert("RGBA")
    above = Image.open(io.BytesIO(png)).convert("RGBA").resize(below.size, Image.Resampling.NEAREST)
    return Image.blend(below, Image.alpha_composite(below, above), 0.7).convert("RGB")


def _write_strengths(picture: Image.Image, have: Arrays) -> None:
    """Write the strength of each embedded region near its middle."""
    draw = ImageDraw.Draw(picture)
    for label, strength in zip(have["region_labels"], have["region_strengths"], strict=True):
        places = np.argwhere(have["regions"] == label)
        if label and len(places):
            middle = np.abs(places - places.mean(0)).sum(1).argmin()
            y, x = places[middle].tolist()
            draw.text((x, y), f"{strength:+.1f}", "white", FONT, "mm", stroke_width=2,
                      stroke_fill="black")  # fmt: skip


def _sheet(rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Panels in rows on white, all rows as wide."""
    photo = rows[0][0][1]
    width = len(rows[0]) * (max(photo.width, SIDE) + GAP) + GAP
    columns = [len(rows[0]), len(rows[1]), *(RUNGS for _ in rows[2:])]
    sides = [(width - GAP) // count - GAP for count in columns]
    heights = [round(photo.height * side / photo.width) + TEXT + GAP for side in sides]
    sheet = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw, top = ImageDraw.Draw(sheet), GAP
    for row, side, height in zip(rows, sides, heights, strict=True):
        for place, (text, picture) in enumerate(row):
            left = GAP + place * (side + GAP)
            lines = "\n".join(_fitting(line, side) for line in text.split("\n"))
            draw.text((left, top), lines, "black", FONT)
            size = side, height - TEXT - GAP
            shown = picture if size == picture.size else picture.resize(size)
            sheet.paste(shown, (left, top + TEXT))
        top += height
    return sheet


def _fitting(text: str, width: int) -> str:
    """A text cut to so many pixels."""
    while FONT.getlength(text) > width:
        text = f"{text[:-2].rstrip('.')}."
    return text
