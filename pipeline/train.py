"""Stage 2 as a run: a complete store in, a trained corrector out."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.cache.errors import StoreError, UsageError
from evenlight.cache.files import Lock, clean_temporaries, make_folder
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.config import Given
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.judge import store_judge
from evenlight.pipeline.models import Models, choose_device, load_models, priors_of
from evenlight.pipeline.parts import TRAINING, cut
from evenlight.pipeline.plan import made_by, recorded_plans
from evenlight.stages.corrector.batches import TrainingData
from evenlight.stages.corrector.inputs import at_working_size
from evenlight.stages.corrector.losses import Frozen
from evenlight.stages.corrector.training import Kept, TrainResult
from evenlight.stages.corrector.training import train as run_training
from evenlight.stages.pixels import resize, to_float
from evenlight.stages.settings import Settings

log = logging.getLogger(__name__)


def train(
    store: str | Path,
    out: str | Path,
    *,
    settings: Given = None,
    models: Models | None = None,
    resume: bool = True,
    on_progress: Progress = silent,
) -> TrainResult:
    """Train a corrector from the cached tensors of a store; goes on where an earlier run stopped.

    out: folder of the run (checkpoints, log, corrector).  settings: changes on top of those of the
    store and, where out holds a run, of what it was told of training.  Raises StoreError where the
    store is incomplete or stale, or out holds a run with other settings or one that is running.
    """
    out = Path(out)
    settings = config.of_run(out, store, settings) if resume else config.of_store(store, settings)
    device = choose_device(settings.run.device)
    models = models or load_models(settings)
    with Store.open(store) as source:
        judge, clip = store_judge(source, None), models.clip
        refuse_stale(source, settings, models, judge.fingerprint)
        info = {
            "settings": {k: v for k, v in config.to_dict(settings).items() if k != "run"},
            "priors": priors_of(models, judge.fingerprint),
            "store": source.digest(),
        }
        make_folder(out)
        # a second run must be refused before it reads the store or writes anything
        with Lock(out / ".lock", f"run {out}") as lock:
            clean_temporaries(out)
            tensors = {f"judge.{name}": tensor for name, tensor in judge.tensors.items()}
            return run_training(
                load_data(source, settings.train.size, device, on_progress),
                Frozen(
                    models.segmenter.features,
                    lambda rgb_B3HW: judge.prompts.logits(clip.embed(rgb_B3HW)),
                    torch.device(device),
                ),
                settings,
                lock,
                Kept(info, tensors, config.to_toml(settings)),
                resume=resume,
                on_progress=lambda step, steps, record: on_progress("steps", step, steps),
            )


def refuse_stale(store: Store, settings: Settings, models: Models, judge: str) -> None:
    """Raise StoreError unless every unit is complete and made with these settings and models."""
    if not store.index.num_units:
        raise StoreError(f"store {store.path} holds no photos: run 'evenlight precompute' first")
    makers = made_by(priors_of(models, judge))
    for plan in recorded_plans(store.records(), store.index.num_units, settings, makers):
        if plan.todo:
            cure = "regenerate" if plan.todo == ("pseudo_gt",) else "precompute"
            why = [plan.reason, *config.differing(store.index.settings, settings).values()]
            raise StoreError(
                f"unit {plan.unit} of store {store.path} is stale ({'; '.join(why)}): run "
                f"'evenlight {cure} -s {store.path}' first, or restore the settings"
            )


def load_data(store: Store, size: int, device: str, on_progress: Progress = silent) -> TrainingData:
    """Every usable photo and its priors at the working size, moved to the device once if they fit.

    size: side of the square canvas, pixels; a photo takes about 14 bytes per pixel of it.  Where
    the device lacks the room they stay in host memory, and each batch is copied: a warning says so.
    """
    slots = np.array(store.slots("pseudo_gt"))
    if not len(slots):
        raise UsageError(f"store {store.path} holds no usable photo")
    tensors = _empty(len(slots), size, store.rows("p3", slots[:1]).shape[1])
    unit_size = store.index.unit_size
    done = 0
    for unit in np.unique(slots // unit_size):
        rows = store.read(int(unit), ("extent", *TRAINING))
        for row in slots[slots // unit_size == unit] % unit_size:
            _fill(tensors, done, cut(rows, row, TRAINING), size)
            done += 1
        on_progress("photos loaded", done, len(slots))
    names = [str(store.index.names[slot]) for slot in slots]
    place = device if _fits(tensors, device) else "cpu"
    return TrainingData(**{k: tensor.to(place) for k, tensor in tensors.items()}, names=names)


def _empty(count: int, size: int, p3_channels: int) -> dict[str, Tensor]:
    quarter, eighth = size // 4, size // 8
    return {
        "photo": torch.zeros(count, 3, size, size, dtype=torch.uint8),
        "extent": torch.zeros(count, 2, dtype=torch.int64),
        "proto": torch.zeros(count, 32, quarter, quarter, dtype=torch.float16),
        "p3": torch.zeros(count, p3_channels, eighth, eighth, dtype=torch.float16),
        "regions": torch.zeros(count, size, size, dtype=torch.uint8),
        "pseudo_gt": torch.zeros(count, 3, size, size, dtype=torch.uint8),
        "confidence": torch.zeros(count, quarter, quarter, dtype=torch.float16),
        "well_exposed": torch.zeros(count, dtype=torch.bool),
    }


def _fill(tensors: dict[str, Tensor], place: int, row: dict[str, np.ndarray], size: int) -> None:
    """Bring one photo's cached arrays, cut to its extent, to the working size in their place."""
    photo, proto, p3 = at_working_size(
        row["photo"],
        torch.from_numpy(row["proto"])[None].float(),
        torch.from_numpy(row["p3"])[None].float(),
        size,
    )
    h, w = photo.shape[2:]
    target = resize(to_float(row["pseudo_gt"]), h, w)
    labels = torch.from_numpy(row["regions"])[None, None].float()
    confidence = torch.from_numpy(row["confidence"])[None, None].float()
    tensors["photo"][place] = _on_canvas(photo * 255, size).round().byte()
    tensors["extent"][place] = torch.tensor([h, w])
    tensors["proto"][place] = _on_canvas(proto, size // 4).half()
    tensors["p3"][place] = _on_canvas(p3, size // 8).half()
    tensors["regions"][place] = _on_canvas(resize(labels, h, w, "nearest"), size)[0].byte()
    tensors["pseudo_gt"][place] = _on_canvas(target.clamp(0, 1) * 255, size).round().byte()
    tensors["confidence"][place] = _on_canvas(resize(confidence, h // 4, w // 4), size // 4)[0]
    tensors["well_exposed"][place] = bool(row["strength"] == 0)


def _on_canvas(map_1Chw: Tensor, side: int) -> Tensor:
    """A map top-left on a square canvas, its edges repeated.  1,C,h,w -> C,side,side."""
    below, right = side - map_1Chw.shape[2], side - map_1Chw.shape[3]
    return F.pad(map_1Chw, (0, right, 0, below), mode="replicate")[0]


def _fits(tensors: dict[str, Tensor], device: str) -> bool:
    """Whether the tensors leave 40 % of the device's free memory to training."""
    if device == "cpu":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    if needed > 0.6 * free:
        log.warning(
            "photos take %.1f GiB, %s has %.1f GiB free: they stay in host memory, which is slower",
            needed / 2**30,
            device,
            free / 2**30,
        )
    return needed <= 0.6 * free
