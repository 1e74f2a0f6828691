"""What has to be made: arrays of a store, fingerprints of parts, and the stale parts of units.

A part's fingerprint covers the part before it, the settings that decide it, and the model that
makes it; so a change remakes exactly the parts it touches. Weights count by content, not path.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from evenlight.cache.schema import PARTS, SCHEMA, ArraySpec, PhotoRecord, UnitRecord, fingerprint
from evenlight.cache.store import Store
from evenlight.pipeline.config import values_affecting
from evenlight.stages.priors import meter
from evenlight.stages.settings import Settings

BY_CONTENT = ("regions.segmenter", "clip.weights")  # covered by the model's own fingerprint
NAN = float("nan")


# What each part is made from.  Features (proto, p3) are only for training.
READS = {
    "regions": ("extent", "photo"),
    "embeddings": ("extent", "photo", "regions"),
    "pseudo_gt": (
        "extent", "photo", "regions", "clip_photo", "clip_ladder", "clip_regions",
        "region_labels", "rule_strength", "ladder_clipped", "clipped",
    ),
}  # fmt: skip


def part_specs(
    part: str, settings: Settings, *, p3_channels: int = 0, clip_dim: int = 0
) -> list[ArraySpec]:
    """Arrays of one part; shapes are one photo's (docs/architecture.md).

    p3_channels counts for "regions", clip_dim for "embeddings".
    """
    size = settings.photo.size
    quarter = (size // 4, size // 4)
    steps, regions = len(settings.ladder.offsets), settings.ladder.regions
    region_steps = len(settings.ladder.region_offsets)
    rows: dict[str, list[tuple[str, tuple[int, ...], str]]] = {
        "photo": [("photo", (size, size, 3), "uint8"), ("extent", (2,), "uint16")],
        "regions": [
            ("regions", (size, size), "uint8"),
            ("proto", (32, *quarter), "float16"),
            ("p3", (p3_channels, size // 8, size // 8), "float16"),
        ],
        "embeddings": [
            ("clip_photo", (clip_dim,), "float32"),
            ("clip_ladder", (steps, clip_dim), "float16"),
            ("clip_regions", (regions, region_steps, clip_dim), "float16"),
            ("region_labels", (regions,), "uint8"),
            ("rule_strength", (), "float32"),
            ("ladder_clipped", (steps,), "float32"),
            ("mean_luma", (), "float32"),
            ("clipped", (), "float32"),
        ],
        "pseudo_gt": [
            ("scores", (steps, 3), "float32"),
            ("strength", (), "float32"),
            ("region_strengths", (regions,), "float32"),
            ("t_map", quarter, "float16"),
            ("confidence", quarter, "float16"),
            ("pseudo_gt", (size, size, 3), "uint8"),
        ],
    }
    return [
        ArraySpec(name, part, shape, dtype, NAN if dtype.startswith("float") else 0)
        for name, shape, dtype in rows[part]
    ]


@dataclass(frozen=True, kw_only=True)
class UnitPlan:
    """One unit: the photos it holds now, what its parts should be, which of them to make."""

    unit: int
    photos: tuple[PhotoRecord, ...]  # name and sha256 of each slot now
    fingerprints: dict[str, str]
    todo: tuple[str, ...]  # a tail of PARTS; empty when the unit is complete
    reason: str  # why, for people


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
        chain[part] = part_fingerprint(
            part, source=[before, models.get(part, "")], settings=settings
        )
        before = chain[part]
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
    return UnitPlan(unit=unit, photos=photos, fingerprints=wanted, todo=todo, reason=reason)


class _Fingerprinted(Protocol):
    fingerprint: str


class Makers(Protocol):
    """The frozen models that make parts."""

    @property
    def segmenter(self) -> _Fingerprinted: ...

    @property
    def clip(self) -> _Fingerprinted: ...


def made_by(models: Makers, prompts: str) -> dict[str, str]:
    """part -> fingerprint of what makes it.  prompts: their fingerprint."""
    return {
        "regions": models.segmenter.fingerprint,
        "embeddings": models.clip.fingerprint,
        "pseudo_gt": judge(prompts),
    }


def judge(prompts: str) -> str:
    """Fingerprint of what chooses pseudo-GT: the meter and the prompts."""
    # proposer: empty in every store but those of the rounds that once were
    return fingerprint(meter=meter.fingerprint(), prompts=prompts, proposer="")


def recorded_plans(
    store: Store, settings: Settings, models: Mapping[str, str]
) -> Iterator[UnitPlan]:
    """Plans of all units by the photos they recorded, without a look at the photos themselves."""
    for unit in range(store.index.num_units):
        record = store.record(unit)
        photos = record.photos if record else ()
        yield plan_unit(unit, photos, record, settings, models)


def _stale(
    photos: tuple[PhotoRecord, ...], record: UnitRecord | None, wanted: Mapping[str, str]
) -> tuple[tuple[str, ...], str]:
    if record is None:
        return PARTS, "new"
    if not record.same_photos(photos):
        return PARTS, "photos changed"
    for position, part in enumerate(PARTS):
        if not record.holds(part, wanted[part]):
            reason = "settings or weights changed" if part in record.parts else "not made yet"
            return PARTS[position:], f"{part}: {reason}"
    return (), "complete"
