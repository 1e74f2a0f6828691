"""Ablations of the corrector: short trainings that differ in one thing, measured alike.

    python -m benchmarks.ablate --photos FOLDER --triplets FOLDER --work FOLDER
        [--seeds 0 1 2] [--steps N] [--only NAME ...] [--limit-scenes N]

--photos: a sub-folder of frames per scene; every fifth scene is measured (as in
brackets.py), others are trained on without their names.  --triplets: SCENE/under.*,
ref.*, over.*.  --work: stores, and WORK/VARIANT/SEED with a corrector and its figures; what is
there is not made again, so that a killed run goes on.  The table is printed after every seed.
--limit-scenes: for a trial, no more scenes in training nor in measured sets.

A seed decides initial values and draws, the same for all variants.  Runs are short and photos
small, so differences count and not the figures themselves.  The random priors are one draw: the
spread over seeds does not hold it.
"""

import argparse
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.ablate_stores import link_scenes, make_store, overrides_of
from benchmarks.brackets import Photo, bootstrap, draw_brackets
from evenlight.cache.errors import UsageError
from evenlight.cache.files import read_json, sha256_bytes, write_json
from evenlight.pipeline import config
from evenlight.pipeline.load import load_predictor
from evenlight.pipeline.models import Models
from evenlight.pipeline.train import train
from evenlight.stages.evaluation.baselines import film_rule
from evenlight.stages.evaluation.metrics import measure
from evenlight.stages.evaluation.sets import list_cases
from evenlight.stages.photos.decode import decode

BASELINE = "full"
RULE = "rule alone"  # the row of no network
Method = Callable[[Photo], Photo]
SETS = ("triplets", "brackets")
FIGURES = ("psnr", "ssim", "gain_psnr")
# 0.35 s a step on one idle core.  At six times the usual rate 100 steps come to 28.4 dB on held-out
# pseudo-GT, at the usual rate to 21.6.
BUDGET = (
    "train.size=128", "train.crop=64", "train.learning_rate=3e-3",
    "train.warmup=10", "train.calibrate=[5, 15]", "train.save_every=1000",
    "train.validate_every=1000",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    store: str = "full"
    overrides: tuple[str, ...] = ()  # settings of training


VARIANTS = {
    BASELINE: Variant(),
    "without-regions": Variant("global"),
    "with-semantic": Variant(overrides=("losses.semantic=0.15",)),
    "with-prompt": Variant(overrides=("losses.prompt=0.15",)),
    "without-good": Variant(overrides=("train.good=0", "train.scenes=6", "train.bad=2")),
    "without-scenes": Variant(overrides=("train.scenes=0", "train.good=6", "train.bad=2")),
    "without-bad": Variant(overrides=("train.bad=0", "train.good=5")),
    "without-uneven": Variant(overrides=("train.uneven=0",)),
    "without-clipped": Variant(overrides=("losses.clipped=0",)),
    "gamma": Variant("gamma"),
    "channel-attention": Variant(overrides=("network.attention=channel",)),
    "convolution": Variant(overrides=("network.size=small-conv",)),
    "random-priors": Variant("random"),
}


@dataclass(frozen=True)
class Case:
    """A badly exposed photo of a measured set, and its reference."""

    data: str
    scene: str
    side: str
    photo: Photo
    reference: Photo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--triplets", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--limit-scenes", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    names = [name for name in VARIANTS if name in {BASELINE, *arguments.only}]
    work: Path = arguments.work
    link_scenes(arguments.photos, work / "photos", arguments.limit_scenes)
    cases = list(read_cases(arguments))
    measure_once(work / RULE, lambda: film_rule, cases)
    for number, seed in enumerate(arguments.seeds, start=1):
        for name in names:
            train_once(name, seed, arguments.steps, work)
            folder = work / name / str(seed)
            measure_once(folder, functools.partial(corrector_of, folder), cases)
        report(work, names, arguments.seeds[:number])


def read_cases(arguments: argparse.Namespace) -> Iterable[Case]:
    """The photos to measure, of no more scenes a set than the limit."""
    scenes: dict[str, set[str]] = {name: set() for name in SETS}
    for case in (*read_triplets(arguments.triplets), *read_brackets(arguments.photos)):
        scenes[case.data].add(case.scene)
        if len(scenes[case.data]) <= (arguments.limit_scenes or len(scenes[case.data])):
            yield case


def read_triplets(root: Path) -> Iterable[Case]:
    for one in list_cases("triplets", root):
        photo, reference = (
            decode(path.read_bytes(), path.name).pixels for path in (one.photo, one.reference)
        )
        yield Case("triplets", one.name, one.side, photo, reference)


def read_brackets(root: Path) -> Iterable[Case]:
    for scene, side, photo, reference in draw_brackets(root, seed=0):
        yield Case("brackets", scene, side, photo, reference)


def train_once(name: str, seed: int, steps: int, work: Path) -> None:
    """Train WORK/NAME/SEED, unless it is there with the same settings."""
    variant, folder = VARIANTS[name], work / name / str(seed)
    budget = (*BUDGET, f"train.steps={steps}", f"train.seed={seed}")
    overrides = (*overrides_of(variant.store, work), *budget, *variant.overrides)
    settings = config.build(overrides=overrides)
    if (folder / "corrector.json").exists():
        if config.build(folder / "settings.toml") != settings:
            raise UsageError(f"{folder} was trained with other settings: name another --work")
        return
    store = make_store(variant.store, work)
    began = time.monotonic()
    result = train(store, folder, settings=settings)
    print(
        f"{name} {seed}: {time.monotonic() - began:.0f} s, {result.seconds_per_step:.2f} a step, "
        f"{result.best_psnr:.2f} dB to held-out pseudo-GT",
        flush=True,
    )


@functools.cache
def remembering(models: Models) -> Models:
    """The same models, which answer for a photo that they have seen from memory."""
    segmenter: Any = copy.copy(models.segmenter)
    clip: Any = copy.copy(models.clip)
    segmenter.features = remembered(segmenter.features)
    clip.embed = remembered(clip.embed)
    return Models(segmenter, clip)


def remembered(ask: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """The same function, asked once for each input."""
    answers: dict[str, Any] = {}

    def answer(rgb: Tensor) -> Any:
        key = sha256_bytes(rgb.numpy().tobytes())
        if key not in answers:
            answers[key] = ask(rgb)
        return answers[key]

    return answer


def corrector_of(folder: Path) -> Method:
    """The corrector of a run as it ships, but for priors that are not computed twice."""
    loaded = load_predictor(folder)
    frozen = remembering(Models(loaded.segmenter, loaded.clip))
    return dataclasses.replace(loaded, segmenter=frozen.segmenter, clip=frozen.clip).correct


def measure_once(folder: Path, load_method: Callable[[], Method], cases: list[Case]) -> None:
    """FOLDER/figures.json: the figures of every photo, unless they are there."""
    path = folder / "figures.json"
    if path.exists():
        return
    began = time.monotonic()
    method = load_method()
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = measure(case.photo, method(case.photo), case.reference)
        about = {"set": case.data, "scene": case.scene, "side": case.side}
        rows.append(about | {name: getattr(found, name) for name in FIGURES})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"photos": rows})
    print(f"{folder}: measured in {time.monotonic() - began:.0f} s", flush=True)


def report(work: Path, names: list[str], seeds: list[int]) -> None:
    """A Markdown table for each set: means over seeds, differences to the baseline."""
    found = {
        name: [read_json(work / name / str(seed) / "figures.json")["photos"] for seed in seeds]
        for name in names
    }
    found[RULE] = [read_json(work / RULE / "figures.json")["photos"]]
    for data in SETS:
        scenes = [row["scene"] for row in found[BASELINE][0] if row["set"] == data]
        print(f"\n{data}: {len(scenes)} photos, {len(seeds)} seeds; differences to `{BASELINE}`")
        print("with 95 % by paired bootstrap over scenes, seeds averaged per photo first\n")
        print("| variant | PSNR | SSIM | PSNR/gain | PSNR differs | SSIM differs | ", end="")
        print("PSNR/gain differs | sd of PSNR over seeds |\n" + 8 * "| --- " + "|")
        baseline = values_of(found[BASELINE], data)
        for name, runs in found.items():
            values = values_of(runs, data)
            means = "{:.2f} | {:.4f} | {:.2f}".format(*values.mean((0, 1)))
            gains = (values.mean(0) - baseline.mean(0)).T
            differs = [interval(g, scenes, d) for g, d in zip(gains, (2, 4, 2), strict=True)]
            per_seed = values[..., 0].mean(1)
            spread = f"{per_seed.std(ddof=1):.2f}" if len(per_seed) > 1 else "-"
            same = ["-"] * len(FIGURES)
            columns = " | ".join(same if name == BASELINE else differs)
            print(f"| {name} | {means} | {columns} | {spread} |", flush=True)


def values_of(runs: list[list[dict[str, Any]]], data: str) -> np.ndarray:
    """Figures of one set, float64 seeds,photos,figures."""
    return np.array(
        [[[row[f] for f in FIGURES] for row in rows if row["set"] == data] for rows in runs]
    )


def interval(gains: np.ndarray, scenes: list[str], digits: int) -> str:
    low, high = bootstrap(gains, scenes)
    return f"{gains.mean():+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


if __name__ == "__main__":
    main()
