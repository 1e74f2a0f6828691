"""A toy precompute for tests of the store: its arrays are a function of photo names and version."""

import hashlib

import numpy as np

from evenlight.cache.errors import StoreError
from evenlight.cache.schema import EMPTY_SLOT, PARTS, ArraySpec, PhotoRecord
from evenlight.cache.store import Store

UNIT = 4
SPECS = (
    ArraySpec("photo", "photo", (6, 6, 3), "uint8"),
    ArraySpec("regions", "regions", (6, 6), "uint8"),
    ArraySpec("clip_photo", "embeddings", (5,), "float32", fill=float("nan")),
    ArraySpec("strength", "pseudo_gt", (), "float32", fill=float("nan")),
)
ARRAYS = [spec.name for spec in SPECS]
FIRST = dict.fromkeys(PARTS, "1")
NAMES = tuple(f"{number}.jpg" for number in range(7))  # two units, one slot behind the end
# A second run finds one photo gone, two new ones, and regions (so all after them) stale.
CHANGED = FIRST | {"regions": "2", "embeddings": "2", "pseudo_gt": "2"}
CHANGED_NAMES = (*NAMES[:2], *NAMES[3:], "x.jpg", "y.jpg", "z.jpg")
# A third finds an array of another dtype as well.
RETYPED = tuple(
    ArraySpec("regions", "regions", (6, 6), "uint16") if s.name == "regions" else s for s in SPECS
)


def rows(spec, names, version):
    """The toy models: what an array of a unit holds, from the names of its photos."""
    values = np.full((UNIT, *spec.shape), spec.fill)
    for slot, name in enumerate(names):
        if name is not None:
            key = hashlib.sha256(f"{spec.name} {name} {version}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(key))
            values[slot] = generator.random(spec.shape) * 200
    return values.astype(spec.dtype)


def stale_parts(record, photos, versions):
    """The first part that is missing or out of date, and all after it."""
    if record is None or not record.same_photos(photos):
        return PARTS
    for position, part in enumerate(PARTS):
        if not record.holds(part, versions[part]):
            return PARTS[position:]
    return ()


def precompute(path, names=NAMES, versions=FIRST, specs=SPECS, made=None):
    """Bring the store up to date; made: file that gets a line per unit and part it makes."""
    with Store.create_or_open(path, unit_size=UNIT) as store:
        store.write_index(store.index.updated(names))
        store.ensure_arrays(specs)
        for unit in range(store.index.num_units):
            names = store.index.unit_names(unit)
            photos = [PhotoRecord(n, f"sha of {n}") if n else EMPTY_SLOT for n in names]
            parts = {
                part: (
                    versions[part],
                    {s.name: rows(s, names, versions[part]) for s in specs if s.part == part},
                )
                for part in stale_parts(store.record(unit), photos, versions)
            }
            if made is not None:
                with made.open("a") as log:
                    log.writelines(f"{unit} {part}\n" for part in parts)
            if parts:
                store.write_parts(unit, photos, parts)


def whole_parts(path, names, versions, **_):
    """Units and parts a run need not make again; none while there is no store to open."""
    try:
        store = Store.open(path)
    except StoreError:
        return set()
    if set(store.index.names) - {None} != set(names):
        return set()
    done = set()
    for record in store.records():
        photos = [
            PhotoRecord(n, f"sha of {n}") if n else EMPTY_SLOT
            for n in store.index.unit_names(record.unit)
        ]
        stale = stale_parts(record, photos, versions)
        for part in PARTS:
            if part in stale:
                break
            done.add(f"{record.unit} {part}")
    return done


def complete_units(path):
    return sum(record.complete for record in Store.open(path).records()) if path.exists() else 0


def resume_and_check(path, run, expected, made):
    """After a kill: nothing damaged, nothing whole made again, the same end, no litter."""
    if (path / "evenlight" / "index.json").exists() and (path / "zarr.json").exists():
        assert Store.open(path).verify() == []
    whole = whole_parts(path, **run)
    made.unlink(missing_ok=True)
    precompute(path, made=made, **run)
    again = set(made.read_text().split("\n")) if made.exists() else set()
    assert not again & whole
    store = Store.open(path)
    assert store.digest() == expected
    assert store.verify() == []
    assert litter(path) == []


def litter(path):
    known = {"zarr.json", "index.json", "lock"}
    return [
        file
        for file in path.rglob("*")
        if file.is_file()
        and file.name not in known
        and not file.name.startswith("c.")
        and file.parent.name != "units"
    ]
