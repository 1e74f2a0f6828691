"""The judge of a store: the tuned one where there is any, else the one that ships for its CLIP."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evenlight.cache.errors import StoreError
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.config import Given
from evenlight.pipeline.models import read_judge
from evenlight.pipeline.parts import JUDGE, NEW_JUDGE, TUNING, AboutJudge, judge_note
from evenlight.stages.priors import judge_tuning, prompts
from evenlight.stages.priors.clip import load_clip
from evenlight.stages.priors.fingerprints import of_judge
from evenlight.stages.priors.judge import Judge
from evenlight.stages.priors.protocols import ClipModel
from evenlight.stages.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TuneReport:
    """What tuning did.  accepted: either was.  judge_report and prompts_report: figures on held-out
    photos, and reasons."""

    accepted: bool
    judge_accepted: bool
    prompts_accepted: bool
    judge_report: dict[str, Any]
    prompts_report: dict[str, Any]
    judge: str  # fingerprint of the judge now in force

    def sentences(self) -> list[str]:
        """What was found, what decides now, and what to do next, in plain words."""
        found, said = self.judge_report, self.prompts_report
        strengths = words = "kept as they were: "
        if self.judge_accepted:
            strengths = (
                f"tuned: their error on held-out photos is {found['error']:.3f}, before "
                f"{found['error_before']:.3f}"
            )
        else:
            strengths += found["reason"]
        if self.prompts_accepted:
            words = (
                f"tuned: they name {said['accuracy']:.1%} of held-out exposures rightly, before "
                f"{said['accuracy_untuned']:.1%}, and rank them with {said['spearman']:.3f}, "
                f"before {said['spearman_untuned']:.3f}"
            )
        else:
            words += said["reason"]
        return [
            f"found: {found['teachers']} of {found['photos']} photos are surely good",
            f"strengths: {strengths}",
            f"words: {words}",
            f"now decides: the judge {'tuned here' if self.accepted else 'that decided before'}",
            "next: 'evenlight regenerate' chooses the pseudo-GT anew"
            if self.accepted
            else "next: nothing; the pseudo-GT stays as it is",
        ]


def store_judge(store: Store, clip: ClipModel | None) -> Judge:
    """The judge of a store.  With clip given, an untuned one, or one of another CLIP, is passed
    over for the judge that ships for this CLIP; `keep_judge` then puts that in force.

    Raises StoreError where the judge is damaged, or missing though pseudo-GT was made by it, or
    where there is none and no clip to choose one for.
    """
    if clip is not None:
        note = _note(store)
        if note is None or not note[0].tuned or note[0].clip != clip.fingerprint:
            return Judge.shipped(clip)
    found = noted(store)
    if found is None:
        raise StoreError(
            f"store {store.path} has no judge: run 'evenlight precompute' to give it one"
        )
    return found


def keep_judge(store: Store, judge: Judge, clip: ClipModel) -> None:
    """Put what `store_judge` chose in force, and tell of a tuned one that gives way."""
    note = _note(store)
    if note is None or of_judge(note[1]) != judge.fingerprint:
        if note is not None and note[0].tuned:
            log.warning(
                "the judge of store %s was tuned for another CLIP: the one that ships takes its "
                "place ('evenlight tune-clip' tunes it)",
                store.path,
            )
        write_judge(store, judge, clip, tuned=False)


def tune_clip(
    store: str | Path, *, settings: Given = None, clip: ClipModel | None = None
) -> TuneReport:
    """Tune the judge of a store, strengths and words, from cached tensors; no photo is read.

    Each is kept only if it passes its own held-out check, else the former stays.  `regenerate` then
    remakes scores and pseudo-GT.
    """
    settings = config.of_store(store, settings)
    clip = clip or load_clip(settings.clip, "cpu")
    with Store.create_or_open(store) as target:
        rows = _tuning_rows(target)
        judge = store_judge(target, clip)
        strengths = judge_tuning.tune(judge, cached(rows, settings), settings.judge)
        words = prompts.tune(clip, ladders(rows, settings), settings.prompts)
        if strengths.accepted:
            judge = strengths.judge
        if words.accepted:
            judge = judge.changed("prompts", words.scorer.to_tensors())
        log.debug("strengths: %s; words: %s", strengths.report, words.report)
        accepted = strengths.accepted or words.accepted
        if accepted:
            write_judge(target, judge, clip, tuned=True)
    return TuneReport(
        accepted=accepted,
        judge_accepted=strengths.accepted,
        prompts_accepted=words.accepted,
        judge_report=strengths.report,
        prompts_report=words.report,
        judge=judge.fingerprint,
    )


def write_judge(store: Store, judge: Judge, clip: ClipModel, *, tuned: bool) -> None:
    """Put a judge in force.  clip: the one whose embeddings it reads."""
    tensors = {f"tensor {name}": tensor.numpy() for name, tensor in judge.tensors.items()}
    store.write_note(JUDGE, {"clip": clip.fingerprint, "tuned": tuned, **tensors})


def noted(store: Store) -> Judge | None:
    """The judge that a store holds, if any.  Raises StoreError where it is damaged or none."""
    note = _note(store)
    if note is None:
        return None
    try:
        return read_judge(note[1], _where(store))
    except StoreError as error:
        raise StoreError(f"{error}: {NEW_JUDGE}") from error


def _note(store: Store) -> tuple[AboutJudge, dict[str, np.ndarray]] | None:
    """What a store says of its judge, if it holds one, and its tensors as they lie there."""
    note = store.note(JUDGE)
    return None if note is None else judge_note(note, _where(store))


def _where(store: Store) -> str:
    return f"the judge of store {store.path}"


def _tuning_rows(store: Store) -> dict[str, np.ndarray]:
    """Cached tensors of every usable photo."""
    slots = store.slots("embeddings")
    if not slots:
        raise StoreError(f"store {store.path} has no embeddings: run 'evenlight precompute'")
    return {name: store.rows(name, slots) for name in TUNING}


def cached(rows: Mapping[str, np.ndarray], settings: Settings) -> judge_tuning.Cached:
    """What the judge's strengths are tuned on."""
    return judge_tuning.Cached(
        photo=rows["clip_photo"],
        ladder=rows["clip_ladder"],
        tones=rows["tones"],
        rule=rows["rule_strength"],
        offsets=settings.ladder.offsets,
    )


def ladders(rows: Mapping[str, np.ndarray], settings: Settings) -> prompts.Ladders:
    """What the prompts are tuned on."""
    return prompts.Ladders(
        photo_embeddings=rows["clip_photo"],
        ladder_embeddings=rows["clip_ladder"],
        ladder_strengths=rows["rule_strength"][:, None] + np.array(settings.ladder.offsets),
        mean_luma=rows["mean_luma"],
        clipped=rows["clipped"],
    )
