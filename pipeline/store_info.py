"""What a store holds and whether it is whole: cache info, cache verify."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError
from evenlight.cache.schema import Damage
from evenlight.cache.store import Store
from evenlight.pipeline.config import Given, known, resolve
from evenlight.pipeline.console import NAMED
from evenlight.pipeline.models import priors_named
from evenlight.pipeline.parts import JUDGE, PARTS, judge_note, sizes
from evenlight.pipeline.plan import made_by, recorded_plans
from evenlight.stages.photos.find import without_controls
from evenlight.stages.priors.fingerprints import of_judge


def cache_info(store: str | Path, *, settings: Given = None) -> dict[str, Any]:
    """Counts, parts, sizes and fingerprints of a store, and which units are stale or missing.

    settings: to compare it with, on top of its own.
    """
    with Store.open(store) as source:
        found = list(source.records())  # once: they are the time that this takes
        info = source.info(found) | {"judge": _judge(source), "stale": {}}
        if not source.index.num_units:
            return info
        settings = resolve(settings, known(source.index.settings))
        letters = sizes(settings)
        for part in PARTS:
            arrays = {array.name: array.describe(letters) for array in part.arrays}
            info["parts"][part.name] |= {"reads": list(part.reads), "arrays": arrays}
        try:
            makers = made_by(priors_named(settings, info["judge"]["fingerprint"]))
        except EnvironmentLacks as error:
            info["stale"] = f"unknown: {error}"
        else:
            plans = recorded_plans(found, source.index.num_units, settings, makers)
            todo = [plan for plan in plans if plan.todo]
            info["stale"] = {str(plan.unit): plan.reason for plan in todo}
            for name, about in info["parts"].items():
                missing = info["units"]["all"] - about["units"]
                about["stale"] = sum(name in plan.todo for plan in todo) - missing
    return info


def info_text(info: Mapping[str, Any]) -> str:
    """What `cache_info` found, for people: a line per part, then totals."""
    parts, num_units, photos = info["parts"], info["units"]["all"], info["photos"]
    known_stale = isinstance(info["stale"], dict)
    rows = [("part", "size", "units", "stale")]
    for name, about in parts.items():
        done = f"{about['units']}/{num_units}"
        rows.append(
            (
                name,
                human_size(about["bytes"]),
                done,
                str(about.get("stale", 0 if known_stale else "?")),
            )
        )
    size = human_size(sum(about["bytes"] for about in parts.values()))
    stale = len(info["stale"]) if known_stale else "?"
    rows.append(("total", size, f"{info['units']['complete']}/{num_units}", str(stale)))
    lines = [f"{name:12}{size:>6}{done:>14}{stale:>8}" for name, size, done, stale in rows]
    counts = [f"{photos[status]:,} {status}" for status in ("ok", "failed", "waiting")]
    places = f"; from {', '.join(info['sources'])}" if info["sources"] else ""
    lines.append(f"photos: {', '.join(counts)}{places}")
    lines.append(f"judge: {'tuned here' if info['judge']['tuned'] else 'the one that ships'}")
    reasons = Counter(info["stale"].values()) if known_stale else {}
    lines += [f"stale: {count} units, {reason}" for reason, count in reasons.items()]
    lines += [] if known_stale else [f"stale: {info['stale']}"]
    failed = list(info["failed"].items())
    lines += [f"failed: {name}: {reason}" for name, reason in failed[:NAMED]]
    if len(failed) > NAMED:
        lines.append(f"failed: {len(failed) - NAMED} more, named by --json")
    return "\n".join(map(without_controls, lines))


def human_size(num_bytes: float) -> str:
    """As `df -h` writes it: 739M, 1.3G."""
    for unit in "BKMGT":
        if num_bytes < 1000 or unit == "T":
            break
        num_bytes /= 1024
    return (
        f"{num_bytes:.1f}{unit}" if num_bytes < 9.95 and unit != "B" else f"{num_bytes:.0f}{unit}"
    )


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
    return Store.create_or_open(store) if Store.exists(store) else Store.open(store)


def _judge(store: Store) -> dict[str, Any]:
    """Which judge a store holds: its fingerprint, whether tuned, for which CLIP."""
    note = store.note(JUDGE)
    if note is None:
        return {"fingerprint": "", "tuned": False, "clip": ""}
    about, tensors = judge_note(note, f"the judge of store {store.path}")
    return {"fingerprint": of_judge(tensors), "tuned": about.tuned, "clip": about.clip}
