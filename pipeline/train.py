"""Stage 2 as a run: a complete store in, a trained corrector out."""

from contextlib import ExitStack
from pathlib import Path

import torch

from evenlight.cache.errors import StoreError
from evenlight.cache.files import Lock, clean_temporaries, make_folder
from evenlight.cache.place import refuse_url
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.config import Given
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.judge import store_judge
from evenlight.pipeline.models import Models, choose_device, load_models, priors_of
from evenlight.pipeline.plan import made_by, recorded_plans
from evenlight.pipeline.training_photos import load_photos
from evenlight.stages.corrector.losses import Frozen
from evenlight.stages.corrector.ranks import joined
from evenlight.stages.corrector.training import Kept, TrainResult
from evenlight.stages.corrector.training import train as run_training
from evenlight.stages.settings import Settings


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
    refuse_url(out, "training runs")
    out = Path(out)
    with joined() as ranks, ExitStack() as held:
        with ranks.in_turn():
            settings = (
                config.of_run(out, store, settings) if resume else config.of_store(store, settings)
            )
            device = choose_device(settings.run.device)
            models = models or load_models(settings)
            source = held.enter_context(Store.open(store))
            judge, clip = store_judge(source, None), models.clip
            refuse_stale(source, settings, models, judge.fingerprint)
            make_folder(out)
            lock = Lock(out / ".lock", f"run {out}")
            if ranks.leads:
                # a second run must be refused before it reads the store or writes anything
                held.enter_context(lock)
                clean_temporaries(out)
        info = {
            "settings": {k: v for k, v in config.to_dict(settings).items() if k != "run"},
            "priors": priors_of(models, judge.fingerprint),
            "store": source.digest(),
        }
        tensors = {f"judge.{name}": tensor for name, tensor in judge.tensors.items()}
        return run_training(
            load_photos(source, settings, device, ranks, on_progress),
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
