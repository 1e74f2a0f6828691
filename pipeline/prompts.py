"""The prompts of a store: tuned ones where there are any, else the class words untuned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evenlight.cache.errors import StoreError
from evenlight.cache.files import read_json, write_json
from evenlight.cache.shards import OURS
from evenlight.cache.store import Store
from evenlight.pipeline.parts import TUNING
from evenlight.stages.priors.clip import load_clip
from evenlight.stages.priors.prompts import Ladders, Scorer, tune, zero_shot
from evenlight.stages.priors.protocols import ClipModel
from evenlight.stages.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    accepted: bool
    figures: dict[str, Any]
    prompts: str  # fingerprint of the prompts now in force


def store_scorer(path: Path, clip: ClipModel | None) -> Scorer:
    """The scorer of a store.  With clip given, prompts of another CLIP give way to untuned ones.

    path: the store.  Raises StoreError where there are no prompts and no clip to make them with.
    """
    file = _path(path)
    if file.exists():
        found = read_json(file)
        if clip is None or found["clip"] == clip.fingerprint:
            return _scorer(found)
    if clip is None:
        raise StoreError(f"store {path} has no prompts: run 'evenlight precompute' to make them")
    scorer = zero_shot(clip)
    _write(path, scorer, clip, tuned=False)
    return scorer


def tune_clip(store: Path, *, settings: Settings, clip: ClipModel | None = None) -> TuneReport:
    """Tune the prompts of a store from its cached embeddings; no photo is read.

    The new prompts are kept only if they pass their own held-out check, else those in force
    stay.  `regenerate` then remakes scores and pseudo-GT with them.
    """
    clip = clip or load_clip(settings.clip, "cpu")
    with Store.create_or_open(store) as target:
        result = tune(clip, _ladders(target, settings), settings.prompts)
        if result.accepted:
            _write(target.path, result.scorer, clip, tuned=True)
        now = store_scorer(target.path, clip)
    return TuneReport(accepted=result.accepted, figures=result.report, prompts=now.fingerprint)


def prompts_info(path: Path) -> dict[str, Any]:
    """Which prompts a store holds: their fingerprint, whether tuned, for which CLIP."""
    if not _path(path).exists():
        return {"fingerprint": "", "tuned": False, "clip": ""}
    found = read_json(_path(path))
    return {
        "fingerprint": _scorer(found).fingerprint,
        "tuned": found["tuned"],
        "clip": found["clip"],
    }


def _path(store: Path) -> Path:
    return store / OURS / "prompts.json"


def _scorer(document: dict[str, Any]) -> Scorer:
    text = torch.tensor(document["text"], dtype=torch.float32)
    return Scorer(text, document["temperature"])


def _write(path: Path, scorer: Scorer, clip: ClipModel, *, tuned: bool) -> None:
    """One small file, replaced whole: float32 survives JSON exactly."""
    document = {
        "text": scorer.text_3D.tolist(),
        "temperature": scorer.temperature,
        "clip": clip.fingerprint,
        "tuned": tuned,
    }
    write_json(_path(path), document)


def _ladders(store: Store, settings: Settings) -> Ladders:
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
