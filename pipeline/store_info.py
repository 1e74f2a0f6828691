"""What a store holds and whether it is whole: cache info, cache verify."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError
from evenlight.cache.schema import Damage
from evenlight.cache.store import Store
from evenlight.pipeline.config import Given, known, resolve
from evenlight.pipeline.models import priors_named
from evenlight.pipeline.parts import JUDGE, PARTS, judge_note, sizes
from evenlight.pipeline.plan import made_by, recorded_plans
from evenlight.stages.priors.fingerprints import of_judge


def cache_info(store: str | Path, *, settings: Given = None) -> dict[str, Any]:
    """Counts, parts, sizes and fingerprints of a store, and which units are stale or missing.

    settings: to compare it with, on top of its own.
    """
    with Store.open(store) as source:
        info = source.info()
        if not source.index.num_units:
            return info
        settings = resolve(settings, known(source.index.settings))
        letters = sizes(settings)
        for part in PARTS:
            arrays = {array.name: array.describe(letters) for array in part.arrays}
            info["parts"][part.name] |= {"reads": list(part.reads), "arrays": arrays}
        info["judge"] = _judge(source)
        try:
            makers = made_by(priors_named(settings, info["judge"]["fingerprint"]))
        except EnvironmentLacks as error:
            info["stale"] = f"unknown: {error}"
        else:
            plans = recorded_plans(source, settings, makers)
            info["stale"] = {str(plan.unit): plan.reason for plan in plans if plan.todo}
    return info


def cache_verify(store: str | Path, *, repair: bool = False) -> list[Damage]:
    """Check every stored byte against its record.  repair: forget damaged parts, and
    damaged notes with the parts made by them, so that `evenlight precompute` remakes just those."""
    from evenlight.pipeline.judge import noted  # torch: only to see that it is a judge

    with _to_change(store) if repair else Store.open(store) as source:
        damages = source.verify()
        if not any(damage.note == JUDGE for damage in damages):
            try:
                noted(source)
            except StoreError as error:  # whole, and yet no judge
                damages.append(Damage(None, "", "", str(error), note=JUDGE))
        if repair:
            for damage in damages:
                if damage.note:
                    source.forget_note(damage.note)
                elif damage.unit is not None and damage.part:
                    source.drop(damage.unit, damage.part)
    return damages


def sentences(damages: Sequence[Damage], repaired: bool) -> list[str]:
    """What `cache_verify` found, in words."""
    if not damages:
        return ["whole"]
    places = [f"unit {x.unit} {x.part}" if x.unit is not None else "store" for x in damages]
    cure = (
        "what is damaged is forgotten: 'evenlight precompute' remakes it"
        if repaired
        else "'evenlight cache verify --repair', then 'evenlight precompute', remake it"
    )
    lines = (f"{place} {x.array}: {x.reason}" for place, x in zip(places, damages, strict=True))
    return [*lines, f"{len(damages)} damaged; {cure}"]


def cache_forget(store: str | Path, names: Sequence[str]) -> int:
    """Take photos out of a store; returns how many are left.  Raises UsageError where one is not
    there.  A later `precompute` of a folder that holds them takes them on again."""
    with _to_change(store) as target:
        held = {name for name in target.index.names if name is not None}
        for name in names:
            if name not in held:
                near = "".join(difflib.get_close_matches(name, held, n=1))
                hint = f"; did you mean {near}?" if near else ""
                raise UsageError(f"store {store} holds no photo {name!r}{hint}")
        left = held.difference(names)
        target.write_index(target.index.updated(left))
    return len(left)


def _to_change(store: str | Path) -> Store:
    """The store for writing; none is made where there is none."""
    return Store.create_or_open(store) if Path(store).is_dir() else Store.open(store)


def _judge(store: Store) -> dict[str, Any]:
    """Which judge a store holds: its fingerprint, whether tuned, for which CLIP."""
    note = store.note(JUDGE)
    if note is None:
        return {"fingerprint": "", "tuned": False, "clip": ""}
    about, tensors = judge_note(note, f"the judge of store {store.path}")
    return {"fingerprint": of_judge(tensors), "tuned": about.tuned, "clip": about.clip}
