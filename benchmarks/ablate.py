"""Ablations of the corrector: short trainings that differ in one thing, measured alike.

    python -m benchmarks.ablate --store STORE --work WORK --data LAYOUT:PATH [LAYOUT:PATH ...]
        [--seeds 0 1 2] [--steps N] [--limit N] [--only NAME ...]

--store: of `precompute`; nothing that is measured should be in it.  --data: as of `evenlight
evaluate`; of each set the first N photos are measured.  WORK/VARIANT/SEED gets a corrector and its
figures; what is there is not made again, so that a killed run goes on.  A table is printed after
every seed.

What is asked is what a network does beyond the curve, so every photo is given the strength that
brings it to its reference's mean luma, and regions are not moved by the judge.  A seed decides
initial values and draws, the same for all variants.  Runs are short and photos small: differences
count and not the figures themselves.
"""

import argparse
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.intervals import Photo, bootstrap
from evenlight.cache.files import Lock, read_json, write_json
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.evaluate import open_case
from evenlight.pipeline.training_photos import load_data
from evenlight.stages.corrector.apply import apply_maps, fit_maps
from evenlight.stages.corrector.cached import TrainingData
from evenlight.stages.corrector.checkpoint import load_corrector
from evenlight.stages.corrector.inputs import at_working_size, rule_corrected
from evenlight.stages.corrector.losses import Frozen
from evenlight.stages.corrector.training import Kept, train
from evenlight.stages.evaluation.metrics import measure
from evenlight.stages.evaluation.sets import list_cases
from evenlight.stages.photos.canvas import working
from evenlight.stages.pixels import luma, resize, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.fastsam import FastSAM, load_segmenter
from evenlight.stages.settings import RegionSettings, Settings

BASELINE = "full"
CURVE = "curve alone"  # the row of no network
FIGURES = {"psnr": 2, "lost_chroma": 2, "bands": 2, "grey": 3}  # decimals
SIZE, PRIORS_SIZE = 128, 384  # pixels: of training and of what FastSAM sees in measured photos
BUDGET = (
    f"train.size={SIZE}", "train.crop=64", "train.learning_rate=3e-3", "train.warmup=10",
    "train.calibrate=[5, 15]", "train.save_every=1000", "train.validate_every=1000",
)  # fmt: skip
Features = tuple[Tensor, Tensor]  # proto and P3


@dataclass(frozen=True)
class Variant:
    features: str = "real"  # "none": zeros; "random": of a FastSAM whose weights were shuffled
    overrides: tuple[str, ...] = ()  # settings of training


VARIANTS = {
    BASELINE: Variant(),
    "without-semantics": Variant("none"),
    "random-priors": Variant("random"),
    "convolution": Variant(overrides=("network.size=small-conv",)),
    "channel-attention": Variant(overrides=("network.attention=channel",)),
    "without-good": Variant(overrides=("train.good=0", "train.scenes=7", "train.bad=3")),
    "without-scenes": Variant(overrides=("train.scenes=0", "train.good=8", "train.bad=2")),
    "without-bad": Variant(overrides=("train.bad=0", "train.good=7")),
    "without-uneven": Variant(overrides=("train.uneven=0",)),
}


@dataclass(frozen=True)
class Case:
    """A badly exposed photo of a measured set, and what a network is given of it."""

    data: str
    scene: str
    photo: Photo
    reference: Photo
    strength: float
    seen: Tensor  # 1,3,h,w at the working size
    features: dict[str, Features]  # by Variant.features, at the working size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    work: Path = arguments.work
    names = [name for name in VARIANTS if name in {BASELINE, *arguments.only}]
    segmenters = {"real": load_segmenter(RegionSettings()), "random": shuffled_segmenter()}
    cases = list(itertools.chain(*(read(x, arguments.limit, segmenters) for x in arguments.data)))
    with Store.open(arguments.store) as store:
        data = load_data(store, SIZE, "cpu")
    sets = {kind: with_features(data, kind, segmenters) for kind in ("real", "none", "random")}
    measure_once(work / CURVE, lambda case: tone_alone(case), cases)
    for number, seed in enumerate(arguments.seeds, start=1):
        for name in names:
            folder, features = work / name / str(seed), VARIANTS[name].features
            settings = settings_of(VARIANTS[name], seed, arguments.steps)
            if not (folder / "corrector.json").exists():
                train_once(sets[features], settings, folder)
            measure_once(folder, method_of(folder, features), cases)
        report(work, names, arguments.seeds[:number])


def shuffled_segmenter() -> FastSAM:
    """The shipped FastSAM with the weights of every layer in random order, one draw for all."""
    segmenter = load_segmenter(RegionSettings())
    generator = torch.Generator().manual_seed(0)
    for layer in segmenter.layers:
        for weights in layer.parameters():
            order = torch.randperm(weights.numel(), generator=generator)
            weights.data.copy_(weights.data.flatten()[order].view_as(weights))
    return segmenter


def read(data: str, limit: int, segmenters: dict[str, FastSAM]) -> Iterator[Case]:
    """The first photos of a set, ready to be corrected."""
    layout, _, root = data.partition(":")
    for one in list_cases(layout, Path(root))[:limit]:
        opened = open_case(one)
        assert opened.reference is not None, f"{layout} has no references"
        photo = working(opened.photo, PRIORS_SIZE)
        small, wanted = (resize(to_float(x), 64, 64) for x in (opened.photo, opened.reference))
        features = {}
        for kind, segmenter in segmenters.items():
            found = segmenter.segment(rule_corrected(photo))
            arrays = (torch.from_numpy(x)[None].float() for x in (found.proto, found.p3))
            seen, *features[kind] = at_working_size(photo, *arrays, SIZE)
        features["none"] = [torch.zeros_like(x) for x in features["real"]]
        yield Case(
            data=layout,
            scene=one.name,
            photo=opened.photo,
            reference=opened.reference,
            strength=float(tone.rule_strength(small, "film", luma(wanted).mean())),
            seen=seen,
            features={kind: (proto, p3) for kind, (proto, p3) in features.items()},
        )


@torch.no_grad()
def with_features(data: TrainingData, kind: str, segmenters: dict[str, FastSAM]) -> TrainingData:
    """The training set, its FastSAM features those of a variant."""
    if kind == "real":
        return data
    if kind == "none":
        return dataclasses.replace(
            data, proto=torch.zeros_like(data.proto), p3=torch.zeros_like(data.p3)
        )
    proto, p3 = torch.empty_like(data.proto), torch.empty_like(data.p3)
    for i, photo in enumerate(data.photo):
        found = segmenters[kind].features(photo[None].float() / 255)
        proto[i], p3[i] = (x[0].half() for x in found)
    return dataclasses.replace(data, proto=proto, p3=p3)


def settings_of(variant: Variant, seed: int, steps: int) -> Settings:
    return config.build(
        overrides=(*BUDGET, f"train.steps={steps}", f"train.seed={seed}", *variant.overrides)
    )


def train_once(data: TrainingData, settings: Settings, folder: Path) -> None:
    """Train into a folder; the losses that ask frozen models are off."""
    began = time.monotonic()

    def unasked(*_: Any) -> Any:
        raise AssertionError("no loss of these trainings asks a model")

    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder / ".lock", str(folder)) as lock:
        result = train(data, Frozen(unasked, unasked), settings, lock, Kept({}, {}))
    print(f"{folder}: {time.monotonic() - began:.0f} s, {result.seconds_per_step:.2f} a step")


def method_of(folder: Path, features: str) -> Callable[[Case], Photo]:
    """What the corrector of a run makes of a case."""
    network = load_corrector(folder)[0].eval()

    @torch.inference_mode()
    def corrected(case: Case) -> Photo:
        given = torch.full_like(case.seen[:, :1], case.strength)
        correction = network(case.seen, *case.features[features], given)
        return apply_maps(case.photo, fit_maps(case.seen, correction, "film"))

    return corrected


def tone_alone(case: Case) -> Photo:
    return tone.on_bytes("film", case.photo, case.strength)


def measure_once(folder: Path, method: Callable[[Case], Photo], cases: list[Case]) -> None:
    """FOLDER/figures.json: the figures of every photo, unless they are there."""
    path = folder / "figures.json"
    if path.exists():
        return
    rows = []
    for case in cases:
        found = measure(case.photo, method(case), case.reference)
        figures = {name: getattr(found, name) for name in FIGURES}
        plain = {name: None if math.isnan(x) else x for name, x in figures.items()}
        rows.append({"set": case.data, "scene": case.scene} | plain)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"photos": rows})


def report(work: Path, names: list[str], seeds: list[int]) -> None:
    """A Markdown table for each set: means over seeds, differences to the baseline."""
    found = {
        name: [read_json(work / name / str(seed) / "figures.json")["photos"] for seed in seeds]
        for name in names
    }
    found[CURVE] = [read_json(work / CURVE / "figures.json")["photos"]]
    for data in dict.fromkeys(row["set"] for row in found[BASELINE][0]):
        scenes = [row["scene"] for row in found[BASELINE][0] if row["set"] == data]
        print(f"\n{data}: {len(scenes)} photos, {len(seeds)} seeds; in brackets the difference to")
        print(f"`{BASELINE}` with 95 % by paired bootstrap over scenes\n")
        print("| variant | " + " | ".join(FIGURES) + " | sd of PSNR over seeds |")
        print((len(FIGURES) + 2) * "| --- " + "|")
        baseline = values_of(found[BASELINE], data)
        for name, runs in found.items():
            values = values_of(runs, data)
            cells = [
                f"{np.nanmean(values[..., k]):.{places}f}"
                + ("" if name == BASELINE else differs(values, baseline, scenes, k, places))
                for k, places in enumerate(FIGURES.values())
            ]
            per_seed = values[..., 0].mean(1)
            spread = f"{per_seed.std(ddof=1):.2f}" if len(per_seed) > 1 else "-"
            print(f"| {name} | " + " | ".join(cells) + f" | {spread} |", flush=True)


def values_of(runs: list[list[dict[str, Any]]], data: str) -> np.ndarray:
    """Figures of one set, float64 seeds,photos,figures; nan where a photo has none."""
    rows = [[[row[f] for f in FIGURES] for row in run if row["set"] == data] for run in runs]
    return np.array(rows, np.float64)


def differs(
    values: np.ndarray, baseline: np.ndarray, scenes: list[str], figure: int, places: int
) -> str:
    """Difference of one figure to the baseline's and its interval, over photos that have it."""
    gains = values[..., figure].mean(0) - baseline[..., figure].mean(0)
    known = ~np.isnan(gains)
    if not known.any():
        return ""
    low, high = bootstrap(gains[known], list(itertools.compress(scenes, known)))
    return f" ({gains[known].mean():+.{places}f}, {low:+.{places}f} to {high:+.{places}f})"


if __name__ == "__main__":
    main()
