"""A contact sheet for people to look at: input, film rule, the model's output and reference.

    python -m benchmarks.sheet --data LAYOUT:PATH -m RUN --out sheet.png [--photos 24] [--all]

--data: as of `evenlight evaluate`.  -m: the folder of a training run.  Half of the photos
are those where the model loses most against the rule, a quarter those with the lowest PSNR, the
rest lie evenly among the others sorted by PSNR: the sheet is meant to show what is bad.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from evenlight.pipeline.evaluate import correcting_all, open_case
from evenlight.pipeline.load import load_predictor
from evenlight.stages.corrector.predictor import Predictor
from evenlight.stages.evaluation.baselines import film_rule
from evenlight.stages.evaluation.metrics import measure
from evenlight.stages.evaluation.sets import Case, list_cases

Picture = NDArray[np.uint8]
CELL = 224  # pixels, longer side of a picture
GAP, CAPTION, HEADING = 4, 20, 34  # pixels
PER_LINE = 2  # photos
PAPER = 80  # neither a blown sky, nor one turned grey, nor a dark corner melts into it
WHITE, RED, GREEN = (255, 255, 255), (255, 150, 140), (150, 240, 150)


@dataclass(frozen=True)
class Entry:
    """One photo of the sheet.  cells: input, rule, output, reference, shrunk."""

    title: str
    cells: list[Picture]
    rule_psnr: float
    psnr: float

    @property
    def gain(self) -> float:
        """Of the model over the rule, dB."""
        return self.psnr - self.rule_psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=int, default=24)
    parser.add_argument("--all", action="store_true", help="correct good photos too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_predictor(arguments.model)
    loaded = correcting_all(loaded) if arguments.all else loaded
    layout, _, root = arguments.data.partition(":")
    entries = [entry(loaded, case) for case in list_cases(layout, Path(root))]
    sheet = draw(select(entries, arguments.photos))
    cv2.imwrite(str(arguments.out), sheet[..., ::-1])
    lost = sum(one.gain < 0 for one in entries)
    print(f"{arguments.out}; the model is below the rule on {lost} of {len(entries)} photos")


def entry(loaded: Predictor, case: Case) -> Entry:
    """Both outputs of one photo, measured at native size."""
    opened = open_case(case)
    photo, reference = opened.photo, opened.reference
    assert reference is not None, f"{case.photo} has no reference"
    ruled, output = film_rule(photo), loaded.correct(photo)
    return Entry(
        title=f"{case.name} {case.side}",
        cells=[shrunk(picture) for picture in (photo, ruled, output, reference)],
        rule_psnr=measure(photo, ruled, reference).psnr,
        psnr=measure(photo, output, reference).psnr,
    )


def select(entries: list[Entry], count: int) -> dict[str, list[Entry]]:
    """What is shown, by the reason why: every photo at most once."""
    rest = sorted(entries, key=lambda one: one.gain)
    worst, rest = rest[: count // 2], rest[count // 2 :]
    rest.sort(key=lambda one: one.psnr)
    lowest, rest = rest[: count // 4], rest[count // 4 :]
    spread = min(len(rest), count - count // 2 - count // 4)
    among = [rest[i] for i in np.linspace(0, len(rest) - 1, spread).round().astype(int)]
    return {
        "The model loses most against the rule (or gains least)": worst,
        "Lowest PSNR of the model among the others": lowest,
        "Spread evenly over the rest, by PSNR": among,
    }


def draw(groups: dict[str, list[Entry]]) -> Picture:
    """The sheet: uint8 H,W,3."""
    width = PER_LINE * row_width() + (PER_LINE - 1) * 5 * GAP
    strips = []
    for reason, entries in groups.items():
        strips.append(written(paper(HEADING, width), reason, (0, 23), 0.6))
        for first in range(0, len(entries), PER_LINE):
            rows = [row(one) for one in entries[first : first + PER_LINE]]
            line = paper(max(len(one) for one in rows), width)
            for place, one in enumerate(rows):
                left = place * (row_width() + 5 * GAP)
                line[: len(one), left : left + row_width()] = one
            strips.append(line)
    return np.pad(
        np.concatenate(strips), ((GAP, GAP), (2 * GAP, 2 * GAP), (0, 0)), constant_values=PAPER
    )


def row(one: Entry) -> Picture:
    """Four pictures with a caption above each."""
    height = CAPTION + max(len(cell) for cell in one.cells) + 2 * GAP
    canvas = paper(height, row_width())
    captions = (
        (one.title, WHITE),
        (f"film rule {one.rule_psnr:.1f} dB", WHITE),
        (f"model {one.psnr:.1f} dB ({one.gain:+.2f})", RED if one.gain < 0 else GREEN),
        ("reference", WHITE),
    )
    for place, (cell, (text, colour)) in enumerate(zip(one.cells, captions, strict=True)):
        left = place * (CELL + GAP)
        canvas[CAPTION : CAPTION + len(cell), left : left + cell.shape[1]] = cell
        written(canvas, text, (left + 2, CAPTION - 6), 0.45, colour)
    return canvas


def paper(height: int, width: int) -> Picture:
    return np.full((height, width, 3), PAPER, np.uint8)


def row_width() -> int:
    return 4 * CELL + 3 * GAP


def shrunk(picture: Picture) -> Picture:
    scale = CELL / max(picture.shape)
    small = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return small.astype(np.uint8)


def written(
    canvas: Picture,
    text: str,
    place: tuple[int, int],
    scale: float,
    colour: tuple[int, int, int] = WHITE,
) -> Picture:
    """The canvas itself, with the text on it.  place: left, baseline."""
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, 1, cv2.LINE_AA)
    return canvas


if __name__ == "__main__":
    main()
