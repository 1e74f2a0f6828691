"""The parts of a store: ONE table of what each holds, what it reads, and what makes it.

Planning, reading, placing, `cache info` and the table in docs/architecture.md follow from it: a new
array, or another maker, is a change of rows here.  Makers import what they run, so that who only
reads the table, as `cache info`, waits for no torch.
"""

# S side of the canvas, K rungs, L the photo and its rungs, R regions, C P3, D embedding,
# E embedding of a region, T tones, B strengths of the judge

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evenlight.cache.errors import PhotoError, StoreError, one_line
from evenlight.cache.files import checked
from evenlight.cache.schema import ArraySpec
from evenlight.pipeline.models import Models
from evenlight.stages.priors import tones
from evenlight.stages.settings import Settings

if TYPE_CHECKING:
    from evenlight.stages.priors.judge import Judge

Arrays = dict[str, np.ndarray]
JUDGE = "judge"  # the note that holds it (pipeline/judge.py)
NEW_JUDGE = (
    "'evenlight cache verify --repair', then 'evenlight precompute', give it the one that ships"
)
FLAT = 8  # of 255: a photo that spreads no further may come out as one colour
FILE = "file"  # what the first part reads: no array, but the photo's name and bytes


@dataclass(frozen=True)
class Tools:
    """What makes parts.  models may be None where only pseudo_gt is made."""

    settings: Settings
    models: Models | None
    judge: "Judge"


@dataclass(frozen=True)
class Array:
    """One array.  shape: of one photo's entry, numbers and names of `sizes`.

    axes: of height and width in the shape of a map of the canvas.  stride: canvas pixels per cell
    of it.  So where a photo lies in an entry is known, never guessed from a shape.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    axes: tuple[int, ...] = ()
    stride: int = 1

    @property
    def fill(self) -> float:
        """What absent photos read as."""
        return float("nan") if self.dtype.startswith("float") else 0

    def spec(self, part: str, sizes: Mapping[str, int]) -> ArraySpec:
        sides = [sizes[side] if isinstance(side, str) else side for side in self.shape]
        for axis in self.axes:
            sides[axis] //= self.stride
        return ArraySpec(self.name, part, tuple(sides), self.dtype, self.fill)

    def cut(self, entry: np.ndarray, extent: np.ndarray) -> np.ndarray:
        """The photo's own rows and columns of an entry.  extent: its (height, width), pixels."""
        window: list[Any] = [slice(None)] * len(self.shape)
        for axis, side in zip(self.axes, extent, strict=False):
            window[axis] = slice(int(side) // self.stride)
        return entry[(*window, ...)]  # a view, of single numbers too

    def put(self, entry: np.ndarray, value: np.ndarray, extent: np.ndarray) -> None:
        """Place a value of the photo's extent, or of the whole canvas, in an entry."""
        target = entry if value.shape == entry.shape else self.cut(entry, extent)
        assert value.shape == target.shape, (self.name, value.shape, target.shape, extent)
        target[...] = value

    def describe(self, sizes: Mapping[str, int]) -> str:
        """Type and shape in words; letters stay that sizes do not know."""
        sides = [sizes.get(str(side), side) for side in self.shape]
        for axis in self.axes:
            side = sides[axis]
            if isinstance(side, int):
                sides[axis] = side // self.stride
            elif self.stride > 1:
                sides[axis] = f"{side}/{self.stride}"
        return f"{self.dtype} {','.join(map(str, sides))}".strip()


def value(name: str, dtype: str, *shape: int | str) -> Array:
    """Numbers of a photo that are no map."""
    return Array(name, dtype, shape)


def canvas(
    name: str, dtype: str, channels: int | str | None = None, *, stride: int = 1, last: bool = False
) -> Array:
    """A map of the canvas at 1/stride, its channels first, or last, or none."""
    if channels is None:
        return Array(name, dtype, ("S", "S"), (0, 1), stride)
    if last:
        return Array(name, dtype, ("S", "S", channels), (0, 1), stride)
    return Array(name, dtype, (channels, "S", "S"), (1, 2), stride)


@dataclass(frozen=True)
class Part:
    """reads: what `make` gets of one photo, cut to its extent (which every part but the first may
    rely on).  by: whose fingerprint counts: a model, or the judge.  notes: of the store, that the
    judge is kept in."""

    name: str
    reads: tuple[str, ...]
    by: str
    make: Callable[[Mapping[str, Any], Tools], Mapping[str, np.ndarray]]
    arrays: tuple[Array, ...]
    notes: tuple[str, ...] = ()

    def specs(self, sizes: Mapping[str, int]) -> list[ArraySpec]:
        return [array.spec(self.name, sizes) for array in self.arrays]


def sizes(settings: Settings, models: Models | None = None) -> dict[str, int]:
    """What the letters of shapes stand for; C and D only where models are given."""
    ladder = settings.ladder
    return {
        "S": settings.photo.size,
        "K": len(ladder.offsets),
        "L": 1 + len(ladder.offsets),
        "R": ladder.regions,
        "R+1": ladder.regions + 1,
        "T": tones.NUM_TONES,
        "B": len(tones.STRENGTHS),
    } | (
        {"C": models.segmenter.p3_channels, "D": models.clip.dim, "E": models.clip.region_dim}
        if models
        else {}
    )


def _photo(have: Mapping[str, Any], tools: Tools) -> Arrays:
    from evenlight.stages.photos.canvas import place
    from evenlight.stages.photos.decode import decode
    from evenlight.stages.photos.visible import visible

    settings = tools.settings.photo
    name, data = have[FILE]
    decoded = decode(data, name, max_megapixels=settings.max_megapixels)
    pixels, extent = place(visible(decoded.in_srgb, decoded.alpha, settings.size), settings.size)
    return {"photo": pixels, "extent": np.array([extent.height, extent.width])}


def _regions(have: Mapping[str, Any], tools: Tools) -> Arrays:
    from evenlight.stages.corrector.inputs import rule_corrected

    assert tools.models is not None
    regions = tools.models.segmenter.segment(rule_corrected(have["photo"]))
    return {"regions": regions.labels, "proto": regions.proto, "p3": regions.p3}


def _embeddings(have: Mapping[str, Any], tools: Tools) -> Arrays:
    from evenlight.stages.priors.ladder import embed_photo

    assert tools.models is not None
    return embed_photo(have["photo"], have["regions"], tools.models.clip, tools.settings.ladder)


def _pseudo_gt(have: Mapping[str, Any], tools: Tools) -> Arrays:
    from evenlight.stages.priors.pseudo_gt import choose

    made = choose(have["photo"], have["regions"], dict(have), tools.judge, tools.settings)
    of_one_colour = (made["pseudo_gt"] == made["pseudo_gt"][0, 0]).all()
    if of_one_colour and np.ptp(have["photo"], axis=(0, 1)).max() > FLAT:
        raise PhotoError("its pseudo-ground-truth came out as one colour: a model's fault")
    return made


PARTS = (
    Part("photo", reads=(FILE,), by="", make=_photo, arrays=(
        canvas("photo", "uint8", 3, last=True),
        value("extent", "uint16", 2),
    )),
    Part("regions", reads=("photo",), by="segmenter", make=_regions, arrays=(
        canvas("regions", "uint8"),
        canvas("proto", "float16", 32, stride=4),
        canvas("p3", "float16", "C", stride=8),
    )),
    Part("embeddings", reads=("photo", "regions"), by="clip", make=_embeddings, arrays=(
        value("clip_photo", "float32", "D"),
        value("clip_ladder", "float16", "K", "D"),
        value("clip_regions", "float16", "R+1", "E"),
        value("region_labels", "uint8", "R"),
        value("region_areas", "float32", "R"),
        value("tones", "float32", "L", "T"),
        value("rule_strength", "float32"),
        value("ladder_clipped", "float32", "K"),
        value("mean_luma", "float32"),
        value("clipped", "float32"),
    )),
    Part("pseudo_gt", reads=(
        "photo", "regions", "clip_photo", "clip_ladder", "clip_regions", "region_labels",
        "region_areas", "tones", "rule_strength", "ladder_clipped", "clipped",
    ), by="judge", notes=(JUDGE,), make=_pseudo_gt, arrays=(
        value("scores", "float32", "K", 3),
        value("p_good", "float32"),
        value("judged", "float32", "B"),
        value("strength", "float32"),
        value("region_strengths", "float32", "R"),
        canvas("t_map", "float16", stride=4),
        canvas("confidence", "float16", stride=4),
        canvas("pseudo_gt", "uint8", 3, last=True),
    )),
)  # fmt: skip
PART = {part.name: part for part in PARTS}
ARRAY = {array.name: array for part in PARTS for array in part.arrays}

# What the other readers of a store ask for, besides extents.
TRAINING = ("photo", "regions", "proto", "p3", "pseudo_gt", "confidence", "strength")
TUNING = ("clip_photo", "clip_ladder", "tones", "rule_strength", "mean_luma", "clipped")


def cut(rows: Mapping[str, np.ndarray], row: int, names: Sequence[str]) -> Arrays:
    """Arrays of one photo of a unit, maps cut to its extent.  rows: of the unit, "extent" too."""
    return {name: ARRAY[name].cut(rows[name][row, ...], rows["extent"][row]) for name in names}


@dataclass(frozen=True)
class AboutJudge:
    """What the note says of a judge beside its tensors."""

    clip: str  # fingerprint of the one whose embeddings it reads
    tuned: bool


def judge_note(note: Mapping[str, Any], where: str) -> tuple[AboutJudge, Arrays]:
    """The note that holds a judge: what it says, and the tensors by name, float32.

    where: what is read, for people.  Raises StoreError where it holds something else.
    """
    prefix = "tensor "
    try:
        about = checked(AboutJudge, note, where)
        named = {k.removeprefix(prefix): x for k, x in note.items() if k.startswith(prefix)}
        with np.errstate(over="raise"):
            return about, {name: np.asarray(x, np.float32) for name, x in named.items()}
    except (StoreError, TypeError, ValueError, ArithmeticError) as error:
        raise StoreError(f"{where} cannot be used ({one_line(error)}): {NEW_JUDGE}") from error
