"""How well the judge knows what a picture is meant to be.

    python -m benchmarks.measure_judge --paired LAYOUT:PATH ... [--natural FOLDER]

--paired: sets with references (as `evenlight evaluate --data`): error of the strength and PSNR
through the plain film curve, every photo corrected.  --natural: ordinary photos, of which those
that the recipe of the judge held out are corrected as `correct` does: they must stay as they are.
Beside the judge: the input, the mean-luma rule, and the strength with the answer in hand.
Intervals are 95 % by paired bootstrap over scenes, of the judge against the rule.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.intervals import Photo, bootstrap
from evenlight.pipeline.evaluate import open_case
from evenlight.pipeline.load import load_predictor
from evenlight.stages.evaluation.sets import list_cases
from evenlight.stages.photos.canvas import working
from evenlight.stages.photos.visible import inside_border
from evenlight.stages.pixels import resize, to_float
from evenlight.stages.priors import opinion as judging
from evenlight.stages.priors import tone
from evenlight.stages.priors.opinion import Opinion
from recipes.clip_lite0.photos import image_files
from recipes.judge.photos import split_of

SIZE = 512  # long side at which photos are judged, pixels
GRID = np.linspace(-3, 3, 601)
CHANGED = 20  # of 255, mean: a change that nobody asked for
DARK, BRIGHT = 75, 150  # mean luma below and above which an ordinary photo is called so
WHITE = 235  # of 255: a ground that is still white
INTERVALS = (0.5, 0.9)


@dataclass(frozen=True)
class Case:
    scene: str
    photo: Photo
    reference: Photo
    mask: NDArray[np.bool_] | None
    opinion: Opinion
    rule: float
    best: float  # strength of least squared error to the reference


class Looker:
    """The shipped judge, and how long it took."""

    def __init__(self) -> None:
        self.predictor = load_predictor()
        self.seconds, self.photos = 0.0, 0

    def __call__(self, photo: Photo) -> tuple[Opinion, float]:
        """The opinion, regions heard, and the rule's strength."""
        seen = working(photo, SIZE)
        start = time.process_time()
        opinion = self.predictor.opinion(seen)
        self.seconds += time.process_time() - start
        self.photos += 1
        side = self.predictor.clip.size
        small = resize(to_float(inside_border(seen)), side, side)
        return opinion, float(tone.rule_strength(small, judging.FAMILY)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paired", nargs="*", default=[])
    parser.add_argument("--natural", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.paired:
        all_paired(arguments.paired)
    if arguments.natural:
        print("\n" + natural(arguments.natural))


def all_paired(sets: list[str]) -> None:
    """A row for each set, LAYOUT:PATH, and how far the probabilities can be believed."""
    look = Looker()
    print("| set | photos | input | rule | judge | over the rule | best | error: rule | judge |"
          " left alone |\n|" + " --- |" * 10)  # fmt: skip
    cases: list[Case] = []
    for text in sets:
        layout, _, path = text.partition(":")
        found = list(paired(look, layout, Path(path)))
        print(row(f"{layout}:{Path(path).name}", found), flush=True)
        cases += found
    print(f"\ncalibration, {len(cases)} photos: " + calibration(cases))
    print(f"\n{look.seconds / max(look.photos, 1):.3f} CPU seconds a photo")


def paired(look: Looker, layout: str, root: Path) -> Iterator[Case]:
    for case in list_cases(layout, root):
        opened = open_case(case)
        assert opened.reference is not None, f"{layout} has no references"
        opinion, rule = look(opened.photo)
        best = strength_to(opened.photo, opened.reference)
        yield Case(case.name, opened.photo, opened.reference, opened.mask, opinion, rule, best)


def row(name: str, cases: list[Case]) -> str:
    """Mean PSNR through the film curve, gain over the rule, mean error of the strength."""
    answers = [judging.decide(case.opinion, 0.0) for case in cases]
    rules, bests = [case.rule for case in cases], [case.best for case in cases]
    nothing = [0.0] * len(cases)
    values = [
        np.array([psnr(case, t) for case, t in zip(cases, strengths, strict=True)])
        for strengths in (nothing, rules, answers, bests)
    ]
    gain = values[2] - values[1]
    low, high = bootstrap(gain, [case.scene for case in cases])
    errors = [float(np.mean(np.abs(np.subtract(t, bests)))) for t in (rules, answers)]
    spared = np.mean([judging.decide(case.opinion, 0.5) == 0 for case in cases])
    means = [f"{value.mean():.2f}" for value in values]
    return (
        f"| {name} | {len(cases)} | {' | '.join(means[:3])} | {gain.mean():+.2f} ({low:+.2f} to "
        f"{high:+.2f}) | {means[3]} | {errors[0]:.3f} | {errors[1]:.3f} | {spared:.0%} |"
    )


def calibration(cases: list[Case]) -> str:
    """How often the best strength lies in the middle of the distribution that should hold it so
    often."""
    strengths = judging.STRENGTHS
    places = np.array(
        [np.interp(case.best, strengths + 0.05, case.opinion.p_S.cumsum()) for case in cases]
    )
    shares = [(np.abs(places - 0.5) <= share / 2).mean() for share in INTERVALS]
    pairs = zip(INTERVALS, shares, strict=True)
    return ", ".join(f"{found:.0%} in the middle {share:.0%}" for share, found in pairs)


def natural(folder: Path) -> str:
    """A table of ordinary photos by brightness, as `correct` leaves them by default: share left
    alone, changed much, mean change."""
    predictor, rows, grounds = load_predictor(), [], []
    for path in image_files(folder):
        if split_of(path.name) != "measure":
            continue
        photo = np.ascontiguousarray(cv2.imread(str(path))[..., ::-1])
        corrected = predictor.correct(photo)
        change = float(np.abs(corrected.astype(np.float32) - photo).mean())
        rows.append((float(photo.mean()), change))
        border = np.concatenate([photo[:4].reshape(-1, 3), photo[-4:].reshape(-1, 3)])
        if (border.min(1) >= WHITE).mean() > 0.75:
            grounds.append(float(np.median(corrected[:4].min(2))) >= WHITE)
    luma, change = np.array(rows).T
    groups = {
        "all": luma >= 0, f"dark (mean below {DARK})": luma < DARK,
        "middle": (luma >= DARK) & (luma <= BRIGHT), f"bright (above {BRIGHT})": luma > BRIGHT,
    }  # fmt: skip
    lines = ["| ordinary photos, held out | photos | left alone | changed by more than "
             f"{CHANGED} | mean change of 255 |\n| --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, mask in groups.items():
        lines.append(
            f"| {name} | {mask.sum()} | {(change[mask] == 0).mean():.0%} | "
            f"{(change[mask] > CHANGED).mean():.1%} | {change[mask].mean():.1f} |"
        )
    return "\n".join(lines) + f"\n\non white: {sum(grounds)} of {len(grounds)} keep a white ground"


def curve(strength: float) -> NDArray[np.uint8]:
    """The film curve on 8-bit levels."""
    levels = tone.apply("film", torch.arange(256) / 255, strength)
    return (levels * 255).round().byte().numpy()


def strength_to(photo: Photo, target: Photo) -> float:
    """Strength of the film curve at which the photo is nearest to the target (least squares)."""
    curves = np.stack([curve(float(t)) for t in GRID]).astype(np.float64)
    counts = np.bincount(photo.ravel(), minlength=256)
    sums = np.bincount(photo.ravel(), weights=target.ravel(), minlength=256)
    return float(GRID[int(((curves**2) @ counts - 2 * curves @ sums).argmin())])


def psnr(case: Case, strength: float) -> float:
    output = curve(strength)[case.photo] if strength else case.photo
    error = (output.astype(np.float32) - case.reference) ** 2
    if case.mask is not None:
        error = error[case.mask]
    return float(10 * np.log10(255**2 / max(float(error.mean()), 1e-2)))


if __name__ == "__main__":
    main()
