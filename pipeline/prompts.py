"""The prompts of a store: tuned ones where there are any, else the class words untuned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evenlight.cache.errors import StoreError
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.config import Given
from evenlight.pipeline.parts import PROMPTS, TUNING
from evenlight.stages.priors.clip import load_clip
from evenlight.stages.priors.prompts import Ladders, Scorer, tune, zero_shot
from evenlight.stages.priors.protocols import ClipModel
from evenlight.stages.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    accepted: bool
    figures: dict[str, Any]
    prompts: str  # fingerprint of the prompts now in force


def store_scorer(store: Store, clip: ClipModel | None) -> Scorer:
    """The scorer of a store.  With clip given, prompts of another CLIP give way to untuned ones.

    Raises StoreError where the prompts are damaged, or missing though pseudo-GT was made by them,
    or where there are none and no clip to make them with.
    """
    found = store.note(PROMPTS)
    if found is not None and (clip is None or found["clip"] == clip.fingerprint):
        return _scorer(store, found)
    if clip is None:
        raise StoreError(
            f"store {store.path} has no prompts: run 'evenlight precompute' to make them"
        )
    scorer = zero_shot(clip)
    write_prompts(store, scorer, clip, tuned=False)
    return scorer


def tune_clip(
    store: str | Path, *, settings: Given = None, clip: ClipModel | None = None
) -> TuneReport:
    """Tune the prompts of a store from its cached embeddings; no photo is read.

    The new prompts are kept only if they pass their own held-out check, else those in force
    stay.  `regenerate` then remakes scores and pseudo-GT with them.  settings: changes on top of
    those of the store.
    """
    settings = config.of_store(store, settings)
    clip = clip or load_clip(settings.clip, "cpu")
    with Store.create_or_open(store) as target:
        result = tune(clip, ladders(target, settings), settings.prompts)
        if result.accepted:
            write_prompts(target, result.scorer, clip, tuned=True)
        now = store_scorer(target, clip)
    return TuneReport(accepted=result.accepted, figures=result.report, prompts=now.fingerprint)


def prompts_info(store: Store) -> dict[str, Any]:
    """Which prompts a store holds: their fingerprint, whether tuned, for which CLIP."""
    found = store.note(PROMPTS)
    if found is None:
        return {"fingerprint": "", "tuned": False, "clip": ""}
    scorer = _scorer(store, found)
    return {"fingerprint": scorer.fingerprint, "tuned": found["tuned"], "clip": found["clip"]}


def write_prompts(store: Store, scorer: Scorer, clip: ClipModel, *, tuned: bool) -> None:
    """Put prompts in force.  clip: the one that they were embedded by."""
    note = {
        "text": scorer.text_3D.numpy(),
        "temperature": scorer.temperature,
        "clip": clip.fingerprint,
        "tuned": tuned,
    }
    store.write_note(PROMPTS, note)


def _scorer(store: Store, note: dict[str, Any]) -> Scorer:
    try:
        text = torch.as_tensor(note["text"], dtype=torch.float32)
        if text.ndim != 2 or not text.isfinite().all():
            raise ValueError(f"no embeddings of three texts: shape {tuple(text.shape)}")
        return Scorer(text, float(note["temperature"]))
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise StoreError(
            f"the prompts of store {store.path} cannot be used ({error!r}): "
            "'evenlight tune-clip' makes others"
        ) from error


def ladders(store: Store, settings: Settings) -> Ladders:
    """Cached embeddings of every usable photo."""
    slots = store.slots("embeddings")
    if not slots:
        raise StoreError(f"store {store.path} has no embeddings: run 'evenlight precompute'")
    rows = {name: store.rows(name, slots) for name in TUNING}
    return Ladders(
        photo_embeddings=rows["clip_photo"],
        ladder_embeddings=rows["clip_ladder"],
        ladder_strengths=rows["rule_strength"][:, None] + np.array(settings.ladder.offsets),
        mean_luma=rows["mean_luma"],
        clipped=rows["clipped"],
    )
