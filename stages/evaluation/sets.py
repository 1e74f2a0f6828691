"""Sets of photos to measure on.  A layout is a row of LAYOUTS: words for people, and a finder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from evenlight.cache.errors import UsageError
from evenlight.cache.files import sha256_bytes
from evenlight.stages.corrector.camera import Camera, mis_exposed
from evenlight.stages.photos.find import SUFFIXES
from evenlight.stages.pixels import box_mean, to_bytes, to_float
from evenlight.stages.priors import tone

# Ends of names; 0 EV counts as over (preset msec_enc).
MSEC_SIDES = {"_N1.5": "under", "_N1": "under", "_0": "over", "_P1": "over", "_P1.5": "over"}
REEXPOSURES = {-2: "under", -1: "under", 0: "all", 1: "over", 2: "over"}  # EV -> side
# What a camera keeps of a photo in the layout `clipped`: channels clip on their own.
CLIPPING = Camera(shape=1.8, gain=1.2, white=0.93, noise=0.004, quantum=3.0)
APART = (0.6, 1.5)  # |film strength| of the object that is exposed otherwise, in `uneven`
SUBJECT = 1 / 3  # of the photo, that this object is nearest to
SOFT = 2  # radius of its border, pixels
TAG = "__"  # between the name of a scene and what tells its photos apart


@dataclass(frozen=True, kw_only=True)
class Case:
    """One badly exposed photo and its reference, None where there is none.

    name: of the scene; photos of one name are of one scene.  side: "under", "over", "all" for
    neither, or "" to be measured against the reference.  mask: picture whose black pixels are not
    scored.  The photo is its file re-exposed by `ev` EV, or as a camera that `clips` keeps it, or
    with one of its `objects` (a picture, a colour each) exposed otherwise.  fused: the reference is
    the exposure fusion of photo and reference.
    """

    name: str
    side: str
    photo: Path
    reference: Path | None
    mask: Path | None = None
    objects: Path | None = None
    ev: float = 0.0
    clips: bool = False
    fused: bool = False

    def prepare(
        self, photo: np.ndarray, reference: np.ndarray | None, objects: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """What is measured, from the decoded files: uint8 H,W,3 each."""
        if self.ev:
            t = self.ev / tone.EV_PER_STRENGTH
            photo = tone.on_bytes("ev", photo, t)
        if self.clips:
            photo = clipped(photo, _seed(self.name))
        if objects is not None:
            photo = unevenly_exposed(photo, objects, _seed(self.name))
        if self.fused:
            assert reference is not None
            reference = exposure_fusion([photo, reference])
        return photo, reference


def exposure_fusion(photos: list[np.ndarray]) -> np.ndarray:
    """Mertens, Kautz, Van Reeth, "Exposure Fusion" (2007), by OpenCV.  uint8 H,W,3 of one size."""
    fused = cv2.createMergeMertens().process(photos)  # symmetric in the channels
    return (fused.clip(0, 1) * 255).round().astype(np.uint8)


def clipped(photo_HW3: np.ndarray, seed: int) -> np.ndarray:
    """The photo (uint8) as an over-exposing camera keeps it.  seed: of its noise."""
    height, width = photo_HW3.shape[:2]
    padded = np.pad(photo_HW3, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge")
    nowhere = torch.zeros(1, *padded.shape[:2], dtype=torch.uint8)
    photo = to_float(padded)
    grain = torch.randn(photo.shape, generator=torch.Generator().manual_seed(seed))
    kept = to_bytes(mis_exposed(photo, nowhere, [CLIPPING], grain)).numpy()
    return kept[:height, :width]


def unevenly_exposed(photo_HW3: np.ndarray, objects_HW3: np.ndarray, seed: int) -> np.ndarray:
    """The photo (uint8), the object nearest to SUBJECT in size exposed otherwise than the rest.

    objects: uint8, a colour each.  seed: of by how much.
    """
    _, labels, counts = np.unique(
        objects_HW3.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True
    )
    subject = int(np.abs(counts / labels.size - SUBJECT).argmin())
    rng = np.random.default_rng(seed)
    strength = rng.uniform(*APART) * rng.choice([-1, 1])
    where = torch.from_numpy((labels == subject).reshape(photo_HW3.shape[:2]))
    t_11HW = float(strength) * box_mean(where[None, None].float(), SOFT)
    return to_bytes(tone.apply("film", to_float(photo_HW3), t_11HW)).numpy()


def _seed(name: str) -> int:
    return int(sha256_bytes(name.encode())[:8], 16)


def list_cases(layout: str, root: Path) -> list[Case]:
    """Photos and references of a set, sorted by name.  layout: a key of LAYOUTS.

    Raises UsageError where the folder is not in that layout or a photo lacks its reference.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise UsageError(f"{layout}:{root} is not a folder")
    expected = f"the layout {layout!r} is {LAYOUTS[layout].words}"
    try:
        found = list(LAYOUTS[layout].find(root))
    except UsageError as error:
        raise UsageError(f"{error}: {expected}") from error
    if not found:
        raise UsageError(f"{root} holds no photo: {expected}")
    return sorted(found, key=lambda case: (case.name, case.side, case.ev, case.photo.name))


# Finders: what they make looks into the folder of a set and yields its cases.
Finder = Callable[[Path], Iterator[Case]]


def matched(inputs: str, references: str, sides: Mapping[str, str] | None = None) -> Finder:
    """Photos in one folder, references of the same name in another.

    sides: ends that names of photos have beyond the reference's, and what each says about the
    exposure; by default no end, and the side is measured.
    """
    sides = {"": ""} if sides is None else sides

    def find(root: Path) -> Iterator[Case]:
        answers = _by_stem(root / references)
        for stem, path in _by_stem(root / inputs).items():
            ends = [e for e in sides if stem.endswith(e) and stem.removesuffix(e) in answers]
            if not ends:
                raise UsageError(f"{path} has no reference in {root / references}")
            reference = answers[stem.removesuffix(ends[0])]
            yield Case(name=stem, side=sides[ends[0]], photo=path, reference=reference)

    return find


def both(*finders: Finder) -> Finder:
    """What each of the finders finds."""

    def find(root: Path) -> Iterator[Case]:
        for finder in finders:
            yield from finder(root)

    return find


def tagged(inputs: str, targets: str, masks: str) -> Finder:
    """Photos named SCENE__TAG in one folder, one target and perhaps one mask a scene in others."""

    def find(root: Path) -> Iterator[Case]:
        answers, photos = _by_stem(root / targets), _by_stem(root / inputs)
        shown = _by_stem(root / masks) if (root / masks).is_dir() else {}
        scenes = {stem: stem.rpartition(TAG)[0] for stem in photos}
        for scene, mask in shown.items():
            if scene not in scenes.values():
                raise UsageError(f"mask {mask} is of no scene in {root / inputs}")
            if mask.suffix.lower() != ".png":
                raise UsageError(f"mask {mask} is no PNG: other formats blur where black ends")
        for stem, path in photos.items():
            scene = scenes[stem]
            if scene not in answers:
                raise UsageError(f"{path} has no reference in {root / targets}")
            yield Case(
                name=scene,
                side="",
                photo=path,
                reference=answers[scene],
                mask=shown.get(scene),
            )

    return find


def scene_folders(find_scene: Callable[[Path, dict[str, Path]], Iterator[Case]]) -> Finder:
    """A folder a scene.  find_scene: (folder, its photos by name) -> its cases."""

    def find(root: Path) -> Iterator[Case]:
        for scene in sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != "."):
            yield from find_scene(scene, _by_stem(scene))

    return find


def single_photos(
    *, with_reference: bool = True, evs: Mapping[int, str] | None = None, clips: bool = False
) -> Finder:
    """Photos in one folder, each its own reference or without one.

    evs: re-exposures of each, and the side that each makes; by default none.  clips: see Case.
    """
    evs = {0: "over" if clips else "all"} if evs is None else evs

    def find(root: Path) -> Iterator[Case]:
        for stem, path in _by_stem(root).items():
            reference = path if with_reference else None
            for ev, side in evs.items():
                yield Case(
                    name=stem, side=side, photo=path, reference=reference, ev=ev, clips=clips
                )

    return find


def with_objects(photos: str, objects: str) -> Finder:
    """Photos in one folder, each its own reference, pictures of their objects in another."""

    def find(root: Path) -> Iterator[Case]:
        shown = _by_stem(root / objects)
        for stem, path in _by_stem(root / photos).items():
            if stem not in shown:
                raise UsageError(f"{path} has no objects in {root / objects}")
            yield Case(name=stem, side="all", photo=path, reference=path, objects=shown[stem])

    return find


def triplet(scene: Path, photos: dict[str, Path]) -> Iterator[Case]:
    sides = [side for side in ("under", "over") if side in photos]
    if not sides or "ref" not in photos:
        raise UsageError(f"scene {scene} needs ref.* and under.* or over.*")
    for side in sides:
        yield Case(name=scene.name, side=side, photo=photos[side], reference=photos["ref"])


def fused_pair(scene: Path, photos: dict[str, Path]) -> Iterator[Case]:
    if not {"under", "over"} <= photos.keys():
        raise UsageError(f"scene {scene} needs under.* and over.*")
    for side, other in (("under", "over"), ("over", "under")):
        yield Case(
            name=scene.name, side=side, photo=photos[side], reference=photos[other], fused=True
        )


@dataclass(frozen=True)
class Layout:
    words: str  # the files of a set, for people
    find: Finder


LAYOUTS = {
    "pairs": Layout("input/NAME.* and reference/NAME.*", matched("input", "reference")),
    "triplets": Layout(
        "SCENE/under.*, SCENE/ref.*, SCENE/over.* (one of under and over may be missing)",
        scene_folders(triplet),
    ),
    "scenes": Layout(
        "input/SCENE__TAG.*, target/SCENE.* and, where only a part is scored, mask/SCENE.png "
        "(scored where not black)",
        tagged("input", "target", "mask"),
    ),
    "msec": Layout(
        "testing/INPUT_IMAGES/NAME_EV.* and testing/expert_c_testing_set/NAME.* (preset msec_enc)",
        matched("testing/INPUT_IMAGES", "testing/expert_c_testing_set", MSEC_SIDES),
    ),
    "sice": Layout(
        "low/NAME.*, over/NAME.* and mid/NAME.* (preset sice_enc)",
        both(matched("low", "mid", {"": "under"}), matched("over", "mid", {"": "over"})),
    ),
    "lcdp": Layout("input/NAME.* and gt/NAME.* (LCDP test split)", matched("input", "gt")),
    "good": Layout(
        "NAME.*: well-exposed photos, which must stay as they are",
        single_photos(),
    ),
    "reexposed": Layout(
        "NAME.*: well-exposed photos, re-exposed by -2, -1, 0, +1 and +2 EV in linear light",
        single_photos(evs=REEXPOSURES),
    ),
    "clipped": Layout(
        "NAME.*: well-exposed photos, over-exposed by a camera whose channels clip",
        single_photos(clips=True),
    ),
    "uneven": Layout(
        "photo/NAME.*: well-exposed photos, and objects/NAME.png, a colour or grey per object, one "
        "of which is exposed otherwise than the rest",
        with_objects("photo", "objects"),
    ),
    "fusion": Layout(
        "SCENE/under.*, SCENE/over.*; the reference is their exposure fusion",
        scene_folders(fused_pair),
    ),
    "unpaired": Layout(
        "NAME.*: badly exposed photos without a reference", single_photos(with_reference=False)
    ),
}


def _by_stem(folder: Path) -> dict[str, Path]:
    """Photos of a folder by name without suffix."""
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise UsageError(f"{found[path.stem]} and {path.name} have one name: keep one")
            found[path.stem] = path
    return found
