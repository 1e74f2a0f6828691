"""How near pseudo-ground-truth comes to real references, beside rules, baselines and ceilings.

    python -m benchmarks.measure_pseudo_gt --triplets FOLDER [--brackets FOLDER] [--good FOLDER]
        [--store STORE]

--triplets: SCENE/under.*, ref.*, over.*.  --brackets: a sub-folder of frames per scene; every
fifth scene is used, which the recipes of the priors do not see: one darker and one brighter frame
drawn at random, the best-exposed frame as reference.  --good: well-exposed photos, which must
stay as they are.  --store: whose tuned prompts are measured too.  References only score.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from evenlight.cache.store import Store
from evenlight.pipeline.models import Models, load_models
from evenlight.pipeline.prompts import store_scorer
from evenlight.stages.corrector.inputs import rule_corrected
from evenlight.stages.evaluation.baselines import best_gamma, film_meter
from evenlight.stages.evaluation.sets import list_cases
from evenlight.stages.photos.canvas import working
from evenlight.stages.photos.decode import decode
from evenlight.stages.pixels import resize, to_bytes, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.ladder import embed_photo
from evenlight.stages.priors.prompts import Scorer, zero_shot
from evenlight.stages.priors.pseudo_gt import choose, re_expose
from evenlight.stages.settings import FAMILIES, LadderSettings, PseudoGTSettings, Settings
from recipes.meter.train import HOLD_OUT, scene_folders, well_exposedness

Photo = NDArray[np.uint8]
STRENGTHS = torch.linspace(-2.6, 2.6, 105)
RESAMPLED = 10_000  # bootstrap


@dataclass(frozen=True)
class Case:
    """A badly exposed photo, its reference, and everything the pseudo-GT is chosen from."""

    scene: str
    side: str
    photo: Photo
    reference: Photo
    seen: Photo  # at the size of the priors
    labels: Photo
    cached: dict[str, dict[str, NDArray]]  # tone family -> embeddings part


Method = Callable[[Case], Photo]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triplets", type=Path, required=True)
    parser.add_argument("--brackets", type=Path)
    parser.add_argument("--good", type=Path)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = load_models(Settings())
    scorers = {"": zero_shot(models.clip)}
    if arguments.store:
        with Store.open(arguments.store) as store:
            scorers[", tuned prompts"] = store_scorer(store, None)
    methods = all_methods(scorers)
    cases = list(read_triplets(models, arguments.triplets))
    report(f"{arguments.triplets.name}", cases, methods)
    if arguments.brackets:
        drawn = draw_brackets(arguments.brackets, arguments.seed)
        report("brackets", [case(models, *one) for one in drawn], methods)
    if arguments.good:
        changes(models, scorers, arguments.good)


def all_methods(scorers: dict[str, Scorer]) -> dict[str, Method]:
    """Every row of the table, by name."""
    methods: dict[str, Method] = {
        "input": lambda one: one.photo,
        "best gamma, answer in hand": lambda one: best_gamma(one.photo, one.reference),
    }
    methods |= {f"rule, `{family}`": rule(family) for family in FAMILIES}
    methods["meter, `film`"] = lambda one: film_meter(one.photo)
    first = scorers[""]
    methods["`paper`: gamma by CLIP score"] = chosen(
        first, replace(PseudoGTSettings(), regional=False, search="grid"), "gamma"
    )
    for name, scorer in scorers.items():
        crossing = replace(PseudoGTSettings(), regional=False, meter_weight=0.0)
        methods[f"CLIP crossing alone{name}"] = chosen(scorer, crossing, "film")
        methods[f"ours, global{name}"] = chosen(
            scorer, replace(PseudoGTSettings(), regional=False), "film"
        )
        methods[f"ours, regions{name}"] = chosen(scorer, PseudoGTSettings(), "film")
    methods |= {f"best `{family}`, answer in hand": ceiling(family) for family in FAMILIES}
    return methods


def rule(family: str) -> Method:
    def method(one: Case) -> Photo:
        rgb = to_float(one.photo)
        t = tone.rule_strength(resize(rgb, 128, 128), family)
        return to_bytes(tone.apply(family, rgb, t.view(1, 1, 1, 1))).numpy()

    return method


def chosen(scorer: Scorer, settings: PseudoGTSettings, family: str) -> Method:
    ladder = LadderSettings(family=family)

    def method(one: Case) -> Photo:
        part = choose(one.seen, one.labels, one.cached[family], scorer, ladder, settings)
        return re_expose(one.photo, torch.from_numpy(part["t_map"]), family)

    return method


def ceiling(family: str) -> Method:
    """The strength of least squared error to the reference."""

    def method(one: Case) -> Photo:
        curves = tone.apply(family, torch.arange(256) / 255, STRENGTHS[:, None]).numpy()
        tables = np.round(curves.clip(0, 1) * 255).astype(np.float64)
        levels = one.photo.ravel()
        counts = np.bincount(levels, minlength=256)
        sums = np.bincount(levels, weights=one.reference.ravel(), minlength=256)
        errors = (tables**2) @ counts - 2 * tables @ sums
        return tables[int(errors.argmin())].astype(np.uint8)[one.photo]

    return method


def read_triplets(models: Models, root: Path) -> Iterator[Case]:
    for sample in list_cases("triplets", root):
        photo, reference = (
            decode(path.read_bytes(), path.name).pixels for path in (sample.photo, sample.reference)
        )
        yield case(models, sample.name, sample.side, photo, reference)


def draw_brackets(root: Path, seed: int) -> Iterator[tuple[str, str, Photo, Photo]]:
    """Scene, side, photo, reference: a darker and a brighter frame of each held-out scene."""
    random = np.random.default_rng(seed)
    for index, folder in enumerate(scene_folders(root)):
        if index % HOLD_OUT != HOLD_OUT - 1:
            continue
        frames = [cv2.imread(str(path))[..., ::-1] for path in sorted(folder.iterdir())]
        frames = sorted((np.ascontiguousarray(frame) for frame in frames), key=np.mean)
        best = int(np.argmax([well_exposedness(frame) for frame in frames]))
        for side, others in (("under", frames[:best]), ("over", frames[best + 1 :])):
            if others:
                yield folder.name, side, others[random.integers(len(others))], frames[best]


def case(models: Models, scene: str, side: str, photo: Photo, reference: Photo) -> Case:
    seen = working(photo, Settings().photo.size)
    labels = models.segmenter.segment(rule_corrected(seen)).labels
    cached = {
        family: embed_photo(seen, labels, models.clip, LadderSettings(family=family))
        for family in ("film", "gamma")
    }
    return Case(scene, side, photo, reference, seen, labels, cached)


def report(title: str, cases: list[Case], methods: dict[str, Method]) -> None:
    """Mean PSNR by side, agreement of the outputs of one scene, gain over the best rule."""
    outputs = {name: [method(one) for one in cases] for name, method in methods.items()}
    values = {
        name: np.array([psnr(x, one.reference) for x, one in zip(photos, cases, strict=True)])
        for name, photos in outputs.items()
    }
    best_rule = max((n for n in values if n.startswith("rule")), key=lambda n: values[n].mean())
    side = np.array([one.side for one in cases])
    print(f"\n{title}: {len(cases)} photos; gain is over {best_rule}, 95 % by paired bootstrap\n")
    print(
        "| method | under | over | all | gain | agreement |\n| --- | --- | --- | --- | --- | --- |"
    )
    for name, psnrs in values.items():
        means = [psnrs[side == one].mean() for one in ("under", "over")] + [psnrs.mean()]
        low, high = bootstrap(psnrs - values[best_rule], [one.scene for one in cases])
        gain = f"{(psnrs - values[best_rule]).mean():+.2f} ({low:+.2f} to {high:+.2f})"
        columns = " | ".join(f"{mean:.2f}" for mean in means)
        print(f"| {name} | {columns} | {gain} | {agreement(outputs[name], cases):.2f} |")


def psnr(output: Photo, reference: Photo) -> float:
    error = np.mean((output.astype(np.float32) - reference) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


def bootstrap(gains: NDArray[np.float64], scenes: list[str]) -> tuple[float, float]:
    """95 % interval of the mean gain, scenes drawn with replacement."""
    names, index = np.unique(scenes, return_inverse=True)
    sums, counts = np.bincount(index, gains), np.bincount(index)
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLED, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def agreement(outputs: list[Photo], cases: list[Case]) -> float:
    """Mean PSNR between the outputs of the two photos of one scene."""
    by_scene: dict[str, list[Photo]] = {}
    for one, output in zip(cases, outputs, strict=True):
        by_scene.setdefault(one.scene, []).append(output)
    return float(np.mean([psnr(*pair) for pair in by_scene.values() if len(pair) == 2]))


def changes(models: Models, scorers: dict[str, Scorer], folder: Path) -> None:
    """By how much well-exposed photos are changed, mean of absolute differences of 255."""
    photos = [decode(p.read_bytes(), p.name).pixels for p in sorted(folder.glob("*.jpg"))]
    cases = [case(models, str(i), "", photo, photo) for i, photo in enumerate(photos)]
    print(f"\n{folder.name}: {len(cases)} well-exposed photos\n")
    print("| prompts | mean change of 255 | share left as they are |\n| --- | --- | --- |")
    for name, scorer in scorers.items():
        outputs = [chosen(scorer, PseudoGTSettings(), "film")(one) for one in cases]
        moved = [
            np.abs(x.astype(np.float32) - one.photo).mean()
            for x, one in zip(outputs, cases, strict=True)
        ]
        print(f"| zero-shot{name} | {np.mean(moved):.2f} | {np.mean(np.array(moved) == 0):.2f} |")


if __name__ == "__main__":
    main()
