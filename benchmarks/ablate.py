"""Ablations of the corrector: short trainings that differ in one thing, measured alike.

    python benchmarks/ablate.py --photos FOLDER --triplets FOLDER --work FOLDER
        [--seeds 0 1 2] [--steps N] [--only NAME ...] [--limit-scenes N]

--photos: a sub-folder of frames per scene; every fifth scene is measured (as in
measure_pseudo_gt.py), others are trained on without their names.  --triplets: SCENE/under.*,
ref.*, over.*.  --work: stores, WORK/VARIANT/SEED with a corrector and its figures; what is there
is not made again.  --limit-scenes: for a trial, no more scenes in training nor in measured sets.

A seed decides initial values and draws, the same for all variants.  Runs are short and photos
small, so differences count and not the figures themselves.  The random priors are one draw.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from ablate_stores import Recipe, force_tuned_prompts, link_scenes, make_store, random_priors
from measure_pseudo_gt import Photo, bootstrap, draw_brackets

from evenlight.cache.errors import UsageError
from evenlight.cache.files import read_json, write_json
from evenlight.pipeline import config
from evenlight.pipeline.corrector import load
from evenlight.pipeline.train import train
from evenlight.stages.corrector.evaluate import measure, metered, samples
from evenlight.stages.images import decode
from evenlight.stages.settings import Settings

BASELINE = "full"
METER = "meter alone"  # the row of no network
Method = Callable[[Photo], Photo]
SETS = ("triplets", "brackets")
FIGURES = ("psnr", "ssim", "gain_psnr")
BUDGET = (
    "photo.size=256", "train.size=192", "train.crop=96", "train.batch=8", "train.warmup=15",
    "train.calibrate=[10, 20]", "train.save_every=1000", "train.validate_every=1000",
)  # fmt: skip
STORES = {
    "full": Recipe(),
    "global": Recipe(copied_from="full", overrides=("pseudo_gt.regional=false",)),
    "tuned": Recipe(copied_from="full", prepare=force_tuned_prompts),
    "gamma": Recipe(copied_from="full", overrides=("ladder.family=gamma", "network.family=gamma")),
    "random": Recipe(),  # its settings name files in the work folder
}


@dataclass(frozen=True)
class Variant:
    store: str = "full"
    overrides: tuple[str, ...] = ()  # settings of training


VARIANTS = {
    BASELINE: Variant(),
    "without-regions": Variant("global"),
    "tuned-prompts": Variant("tuned"),
    "without-semantic": Variant(overrides=("losses.semantic=0",)),
    "without-prompt": Variant(overrides=("losses.prompt=0",)),
    "without-consistency": Variant(overrides=("losses.consistency=0",)),
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
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--limit-scenes", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    names = [name for name in VARIANTS if name in {BASELINE, *arguments.only}]
    photos = link_scenes(arguments.photos, arguments.work / "photos", arguments.limit_scenes)
    stores = make_stores({VARIANTS[name].store for name in names}, photos, arguments.work)
    cases = list(read_cases(arguments))
    measure_once(arguments.work / METER, lambda: lambda photo: metered(photo, photo), cases)
    for number, seed in enumerate(arguments.seeds, start=1):
        for name in names:
            folder = arguments.work / name / str(seed)
            budget = (*BUDGET, f"train.steps={arguments.steps}", f"train.seed={seed}")
            overrides = (*stores[VARIANTS[name].store], *budget, *VARIANTS[name].overrides)
            settings = config.build(overrides=overrides)
            train_once(arguments.work / "stores" / VARIANTS[name].store, folder, settings)
            measure_once(folder, functools.partial(corrector_of, folder), cases)
        report(arguments.work, names, arguments.seeds[:number])


def make_stores(wanted: set[str], photos: Path, work: Path) -> dict[str, tuple[str, ...]]:
    """The settings of each store, all of them complete."""
    recipes = dict(STORES)
    if "random" in wanted:
        recipes["random"] = Recipe(overrides=random_priors(photos, work / "random"))
    wanted = wanted | {recipes[name].copied_from for name in wanted} - {""}
    chosen = {name: recipe for name, recipe in recipes.items() if name in wanted}
    for name, recipe in chosen.items():
        settings = config.build(overrides=(*recipe.overrides, *BUDGET))
        make_store(name, recipe, photos, work / "stores", settings)
    return {name: recipe.overrides for name, recipe in chosen.items()}


def read_cases(arguments: argparse.Namespace) -> Iterable[Case]:
    """The photos to measure, of no more scenes a set than the limit."""
    scenes: dict[str, set[str]] = {name: set() for name in SETS}
    for case in (*read_triplets(arguments.triplets), *read_brackets(arguments.photos)):
        scenes[case.data].add(case.scene)
        if len(scenes[case.data]) <= (arguments.limit_scenes or len(scenes[case.data])):
            yield case


def read_triplets(root: Path) -> Iterable[Case]:
    for one in samples("triplets", root):
        photo, reference = (
            decode(path.read_bytes(), path.name).pixels for path in (one.photo, one.reference)
        )
        yield Case("triplets", one.name, one.side, photo, reference)


def read_brackets(root: Path) -> Iterable[Case]:
    for scene, side, photo, reference in draw_brackets(root, seed=0):
        yield Case("brackets", scene, side, photo, reference)


def train_once(store: Path, folder: Path, settings: Settings) -> None:
    """Train a corrector, unless the folder has one of the same settings."""
    if (folder / "corrector.json").exists():
        if (folder / "settings.toml").read_text() != config.to_toml(settings):
            raise UsageError(f"{folder} was trained with other settings: name another --work")
        return
    began = time.monotonic()
    result = train(store, folder, settings=settings)
    seconds = time.monotonic() - began
    print(
        f"{folder.parent.name} {folder.name}: {seconds:.0f} s, {result.seconds_per_step:.2f} a "
        f"step, {result.best_psnr:.2f} dB to held-out pseudo-GT",
        flush=True,
    )


def corrector_of(folder: Path) -> Method:
    return load(folder).correct


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
    found[METER] = [read_json(work / METER / "figures.json")["photos"]]
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
