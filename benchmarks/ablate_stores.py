"""The stores that the ablations are trained from (see ablate.py)."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from train_meter import HOLD_OUT, scene_folders

from evenlight.cache.errors import UsageError
from evenlight.cache.store import Store
from evenlight.pipeline import prompts
from evenlight.pipeline.models import load_models
from evenlight.pipeline.precompute import precompute
from evenlight.stages.corrector.inputs import rule_corrected
from evenlight.stages.images import decode
from evenlight.stages.priors.fastsam import build_network
from evenlight.stages.priors.prompts import tune
from evenlight.stages.settings import Settings

NUM_SCENES = 48  # about 400 photos: more than a short run looks at
CLASS_BRANCH = 80  # channels, as the shipped fastsam-n has
NUM_CALIBRATING = 16  # photos that give random networks the statistics of their batch norms


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a store is made: copied from another, prepared once, then brought up to date.

    overrides: settings that decide it.  prepare: (store, settings) -> None, of a fresh copy.
    """

    overrides: tuple[str, ...] = ()
    copied_from: str = ""
    prepare: Callable[[Path, Settings], None] | None = None


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


def make_store(name: str, recipe: Recipe, photos: Path, folder: Path, settings: Settings) -> Path:
    """The store FOLDER/NAME, complete; goes on where an earlier call stopped."""
    store = folder / name
    if recipe.copied_from and not store.exists():
        copy = folder / f"{name}.partial"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / recipe.copied_from, copy)
        if recipe.prepare:
            recipe.prepare(copy, settings)
        copy.replace(store)
    report = precompute(photos, store, settings=settings)
    print(f"store {name}: {report.photos} photos, {report.seconds:.0f} s", flush=True)
    return store


def force_tuned_prompts(store: Path, settings: Settings) -> None:
    """Tuned prompts in force, though `tune-clip` refuses them.

    Its check compares with the untuned words and cannot be set aside by settings, nor should a
    user want to: hence the package's own parts.
    """
    clip = load_models(settings).clip
    with Store.open(store) as source:
        result = tune(clip, prompts._ladders(source, settings), settings.prompts)
    if "last_loss" not in result.report:
        raise UsageError(f"no prompts were tuned on {store}: {result.report['reason']}")
    prompts._write(store, result.scorer, clip, tuned=True)
    print(f"tuned prompts, accepted: {result.accepted}: {result.report}", flush=True)


def random_priors(photos: Path, folder: Path) -> tuple[str, ...]:
    """Settings that name a FastSAM and a CLIP of the shipped architectures, never trained.

    Weights are drawn afresh; only batch norms get statistics from photos.  Without them the
    features of so deep a random network vanish, and the ablation would be one of no priors.
    """
    segmenter, clip = folder / "fastsam-n.safetensors", folder / "clip-lite0.safetensors"
    if not clip.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(photos.glob("*/*"))
        files = files[:: max(1, len(files) // NUM_CALIBRATING)]
        seen = [decode(file.read_bytes(), file.name).pixels for file in files]
        config = json.loads(
            (resources.files("evenlight.stages.weights") / "clip-lite0.json").read_text()
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network, model = build_network("n", CLASS_BRANCH), open_clip.CLIP(**config["model_cfg"])
        fill_statistics(network, as_batch([rule_corrected(x) for x in seen], 256))
        save_file(network.state_dict(), segmenter)
        side = config["preprocess_cfg"]["size"]
        fill_statistics(model.visual, 2 * as_batch(seen, side) - 1)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, clip)
    return f"regions.segmenter={segmenter.absolute()}", f"clip.weights={clip.absolute()}"


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
