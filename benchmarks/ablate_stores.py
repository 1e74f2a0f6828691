"""The stores that the ablations are trained from (see ablate.py)."""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evenlight.cache.errors import UsageError
from evenlight.pipeline import config
from evenlight.pipeline.precompute import precompute
from evenlight.stages.corrector.inputs import rule_corrected
from evenlight.stages.photos.decode import decode
from evenlight.stages.priors.fastsam import build_network
from evenlight.stages.settings import Settings
from evenlight.stages.weights import shipped
from recipes.judge.photos import HOLD_OUT, scene_folders

PHOTO_SIZE = 256
NUM_SCENES = 48  # about 400 photos: more than a short run looks at
CLASS_BRANCH = 80  # channels, as the shipped fastsam-n has
NUM_CALIBRATING = 16  # photos that give random networks the statistics of their batch norms


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a store is made: copied from another, prepared once, then brought up to date.

    overrides: settings that decide it, {work} for the work folder.  prepare: (work folder, store,
    settings) -> None, before the store is named complete for the first time.
    """

    overrides: tuple[str, ...] = ()
    copied_from: str = ""
    prepare: Callable[[Path, Path, Settings], None] | None = None


def link_scenes(photos: Path, folder: Path, limit: int | None) -> Path:
    """A folder of links to the scenes to train on, evenly spaced among those not held out."""
    scenes = [s for i, s in enumerate(scene_folders(photos)) if i % HOLD_OUT != HOLD_OUT - 1]
    places = np.linspace(0, len(scenes) - 1, min(limit or NUM_SCENES, len(scenes)))
    chosen = {scenes[round(place)].name: scenes[round(place)] for place in places}
    if not folder.exists():
        folder.mkdir(parents=True)
        for name, scene in chosen.items():
            (folder / name).symlink_to(scene.absolute())
    if {link.name for link in folder.iterdir()} != chosen.keys():
        raise UsageError(f"{folder} links to other scenes: name another --work folder")
    return folder


def overrides_of(name: str, work: Path) -> tuple[str, ...]:
    """The settings that decide a store."""
    own = (text.format(work=work.absolute()) for text in STORES[name].overrides)
    return (f"photo.size={PHOTO_SIZE}", *own)


@functools.cache
def make_store(name: str, work: Path) -> Path:
    """The store WORK/stores/NAME, complete; goes on where an earlier call stopped."""
    recipe, store = STORES[name], work / "stores" / name
    settings = config.build(overrides=overrides_of(name, work))
    if not store.exists():
        fresh = store.with_name(f"{name}.partial")
        if recipe.copied_from:
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(make_store(recipe.copied_from, work), fresh)
        if recipe.prepare:
            recipe.prepare(work, fresh, settings)
        if recipe.copied_from:
            fresh.replace(store)
    report = precompute(work / "photos", store, settings=settings)
    print(f"store {name}: {report.photos} photos, {report.seconds:.0f} s", flush=True)
    return store


def draw_priors(work: Path, store: Path, settings: Settings) -> None:
    """A FastSAM and a CLIP of the shipped architectures, never trained, where settings name them.

    Weights are drawn afresh; only batch norms get statistics from photos.  Without them the
    features of so deep a random network vanish, and the ablation would be one of no priors.
    """
    segmenter, clip = Path(settings.regions.segmenter), Path(settings.clip.weights)
    segmenter.parent.mkdir(parents=True, exist_ok=True)
    files = sorted((work / "photos").glob("*/*"))
    files = files[:: max(1, len(files) // NUM_CALIBRATING)]
    seen = [decode(file.read_bytes(), file.name).pixels for file in files]
    card = shipped("clip-lite0").with_suffix(".json")
    about = json.loads(card.read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, model = build_network("n", CLASS_BRANCH), open_clip.CLIP(**about["model_cfg"])
    fill_statistics(network, as_batch([rule_corrected(x) for x in seen], PHOTO_SIZE))
    save_file(network.state_dict(), segmenter)
    fill_statistics(model.visual, 2 * as_batch(seen, about["preprocess_cfg"]["size"]) - 1)
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, clip)


def as_batch(photos: list[np.ndarray], side: int) -> Tensor:
    """uint8 H,W,3 photos as squares: float B,3,side,side in [0, 1]."""
    small = [cv2.resize(x, (side, side)) for x in photos]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def fill_statistics(network: nn.Module, photos: Tensor) -> None:
    """Batch norms take mean and variance from these photos."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(photos)
    network.eval()


STORES = {
    "full": Recipe(),
    "global": Recipe(copied_from="full", overrides=("pseudo_gt.regional=false",)),
    "gamma": Recipe(
        copied_from="full",
        overrides=("ladder.family=gamma", "network.family=gamma", "pseudo_gt.search=grid"),
    ),
    "random": Recipe(
        prepare=draw_priors,
        overrides=(
            "regions.segmenter={work}/random/fastsam-n.safetensors",
            "clip.weights={work}/random/clip-lite0.safetensors",
        ),
    ),
}
