"""What has to be made: fingerprints of parts, and the stale parts of units.

A part's fingerprint covers the part before it, the settings that decide it, and the model that
makes it; so a change remakes exactly the parts it touches. Weights count by content, not path.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from evenlight.cache.schema import FAILED, OK, SCHEMA, PhotoRecord, UnitRecord, fingerprint
from evenlight.pipeline.config import BY_CONTENT, values_affecting
from evenlight.pipeline.parts import PARTS
from evenlight.stages.settings import Settings


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """One unit: the photos it holds now, what its parts should be, which of them to make."""

    unit: int
    photos: tuple[PhotoRecord, ...]  # name and sha256 of each slot now
    fingerprints: dict[str, str]
    todo: tuple[str, ...]  # a tail of PARTS; empty when the unit is complete
    reason: str  # why, for people
    # photos that did not change where others of the unit did, and the parts recorded of them that
    # are as they should be: these rows are kept, not made anew
    kept: frozenset[str] = frozenset()
    kept_parts: tuple[str, ...] = ()

    @property
    def num_photos(self) -> int:
        """How many there are to make something of."""
        kept = self.kept if set(self.todo) <= set(self.kept_parts) else ()
        return sum(p.name is not None and p.name not in kept for p in self.photos)


def part_fingerprint(part: str, *, source: object, settings: Settings) -> str:
    """source: what the part is made from and with (digests, fingerprints)."""
    values = values_affecting(settings, part)
    values = {key: value for key, value in values.items() if key not in BY_CONTENT}
    return fingerprint(schema=SCHEMA, part=part, settings=values, source=source)


def fingerprints(
    photos: Sequence[PhotoRecord], settings: Settings, models: Mapping[str, str]
) -> dict[str, str]:
    """Fingerprint of each part of a unit.  models: part -> fingerprint of what makes it."""
    chain: dict[str, str] = {}
    before: object = [photo.sha256 for photo in photos]
    for part in PARTS:
        source = [before, models.get(part.name, "")]
        before = part_fingerprint(part.name, source=source, settings=settings)
        chain[part.name] = before
    return chain


def plan_unit(
    unit: int,
    photos: tuple[PhotoRecord, ...],
    record: UnitRecord | None,
    settings: Settings,
    models: Mapping[str, str],
) -> UnitPlan:
    """Compare a unit's record with what it should be."""
    wanted = fingerprints(photos, settings, models)
    todo, reason = _stale(photos, record, wanted)
    if record is not None and not todo and settings.run.retry_failed:
        todo = _failed(record)
        reason = "photos that failed are tried again" if todo else reason
    plan = UnitPlan(unit=unit, photos=photos, fingerprints=wanted, todo=todo, reason=reason)
    if record is not None and not record.same_photos(photos):
        return _keeping(plan, record, fingerprints(record.photos, settings, models))
    return plan


def _keeping(plan: UnitPlan, record: UnitRecord, recorded: Mapping[str, str]) -> UnitPlan:
    """The plan with what it need not make.  recorded: fingerprints that the photos as they were
    would have today."""
    parts = [part.name for part in PARTS if record.holds(part.name, recorded[part.name])]
    now = {(photo.name, photo.sha256) for photo in plan.photos}
    same = [p.name for p in record.photos if p.status == OK and (p.name, p.sha256) in now]
    kept = frozenset(name for name in same if name is not None) if parts else frozenset()
    return dataclasses.replace(plan, kept=kept, kept_parts=tuple(parts))


def made_by(priors: Mapping[str, str]) -> dict[str, str]:
    """part -> fingerprint of what makes it.  priors: as models.priors_of gives them."""
    return {part.name: priors[part.by] for part in PARTS if part.by}


def recorded_plans(
    found: Iterable[UnitRecord], num_units: int, settings: Settings, models: Mapping[str, str]
) -> Iterator[UnitPlan]:
    """Plans of all units by the photos they recorded, without a look at the photos themselves."""
    by_unit = {record.unit: record for record in found}
    for unit in range(num_units):
        record = by_unit.get(unit)
        photos = record.photos if record else ()
        yield plan_unit(unit, photos, record, settings, models)


def _failed(record: UnitRecord) -> tuple[str, ...]:
    """The first part that failed of a photo, and those after it; records of old name none."""
    failed = {photo.part for photo in record.photos if photo.status == FAILED}
    names = tuple(part.name for part in PARTS)
    first = min((names.index(part) if part else 0 for part in failed), default=len(names))
    return names[first:]


def _stale(
    photos: tuple[PhotoRecord, ...], record: UnitRecord | None, wanted: Mapping[str, str]
) -> tuple[tuple[str, ...], str]:
    names = tuple(part.name for part in PARTS)
    if record is None:
        return names, "new"
    if not record.same_photos(photos):
        return names, "photos changed"
    for position, part in enumerate(names):
        if not record.holds(part, wanted[part]):
            reason = "settings or weights changed" if part in record.parts else "not made yet"
            return names[position:], f"{part}: {reason}"
    return (), "complete"
