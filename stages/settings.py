"""Every setting, what it means, its unit, and which part of the store it decides.

Torch-free, so that the command line starts fast. `affects` names the first part of the store
that a change of the value makes stale (later parts follow), or "prompts", "training", "run".
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from evenlight.cache.errors import UsageError

FAMILIES = ("film", "ps", "ev", "gamma")
AFFECTS = ("photo", "regions", "embeddings", "pseudo_gt", "prompts", "training", "run")
MANY = 100_000_000  # of anything that is counted


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True)
class Allowed:
    """The values that a setting takes; each value of a list, where it is one.

    A number lies from low to high and is a multiple; what is among the choices is allowed as well,
    and nothing else where there are no bounds.  `str` gives them in words.
    """

    low: float | None
    high: float | None
    multiple: int
    choices: tuple[Any, ...]
    why: str

    def holds(self, value: Any) -> bool:
        if value in self.choices:
            return True
        if self.low is None or self.high is None:
            return not self.choices
        return self.low <= value <= self.high and (self.multiple == 1 or not value % self.multiple)

    def __str__(self) -> str:
        words = ["one of " + ", ".join(self.choices)] if self.low is None else []
        if self.low is not None:
            words += [f"{choice}" for choice in self.choices]
            step = f"a multiple of {self.multiple} from " if self.multiple > 1 else ""
            words.append(f"{step}{self.low:,} to {self.high:,}")
        return " or ".join(words) + (f" ({self.why})" if self.why else "")


def setting(
    default: Any,
    affects: str,
    *,
    low: float | None = None,
    high: float | None = None,
    multiple: int = 1,
    choices: Iterable[Any] = (),
    why: str = "",
) -> Any:
    """A dataclass field that says what it decides and which values it takes.

    affects: one of AFFECTS.  low to why: see Allowed; why ends the sentence of a refusal.
    """
    assert affects in AFFECTS, affects
    allowed = Allowed(low, high, multiple, tuple(choices), why)
    return field(default=default, metadata={"affects": affects, "allowed": allowed})


@dataclass(frozen=True, kw_only=True)
class Section:
    """Some settings, refused with a UsageError where a value is not allowed."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, allowed = getattr(self, one.name), one.metadata["allowed"]
            values = value if isinstance(value, tuple) else (value,)
            require(
                all(map(allowed.holds, values)),
                f"{section_name(type(self))}.{one.name} must be {allowed}, got {value!r}",
            )


def section_name(section: type[Section]) -> str:
    """What a section is called: the field of Settings that holds it."""
    return next(one.name for one in fields(Settings) if one.default_factory is section)


@dataclass(frozen=True, kw_only=True)
class PhotoSettings(Section):
    # long side in the store, pixels
    size: int = setting(512, "photo", low=64, high=4096, multiple=32)
    # larger photos are refused from their header
    max_megapixels: int = setting(128, "photo", low=1, high=4000)


@dataclass(frozen=True, kw_only=True)
class RegionSettings(Section):
    segmenter: str = setting("fastsam-n", "regions")  # shipped name, or path of FastSAM weights
    confidence: float = setting(0.1, "regions", low=0, high=1)  # least box confidence
    # of two masks above which the surer one stands for both
    iou: float = setting(0.6, "regions", low=0, high=1)
    # long side at which masks are found, pixels
    side: int = setting(352, "regions", low=64, high=4096, multiple=32)
    # share of the photo; a region is no smaller
    min_area: float = setting(0.002, "regions", low=0, high=1)
    # regions beyond the largest are merged
    max_regions: int = setting(64, "regions", low=1, high=255, why="labels are uint8")


@dataclass(frozen=True, kw_only=True)
class ClipSettings(Section):
    model: str = setting("clip-lite0", "embeddings")  # shipped name, or an open_clip model name
    weights: str = setting("", "embeddings")  # path of weights; empty for the shipped model
    # empty: the model's own
    mean: tuple[float, ...] = setting((), "embeddings", low=0, high=1, why="each channel")
    std: tuple[float, ...] = setting((), "embeddings", low=0.001, high=1, why="each channel")
    # pixels
    image_size: int = setting(
        0, "embeddings", low=32, high=1024, choices=[0], why="0: the model's own"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(
                len(values) in (0, 3),
                f"clip.{name} must be three numbers (R, G, B), got {list(values)}",
            )


@dataclass(frozen=True, kw_only=True)
class LadderSettings(Section):
    """Strengths at which CLIP sees re-exposed photos, as offsets from the mean-luma rule."""

    family: str = setting("film", "embeddings", choices=FAMILIES)
    offsets: tuple[float, ...] = setting(
        (-2.0, -1.4, -1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0),
        "embeddings",
        low=-6,
        high=6,
        why="each",
    )
    region_offsets: tuple[float, ...] = setting(
        (-0.8, -0.4, 0.0, 0.4, 0.8), "embeddings", low=-6, high=6, why="each"
    )
    # largest regions that are embedded
    regions: int = setting(16, "embeddings", low=1, high=255, why="labels are uint8")
    min_region_area: float = setting(0.01, "embeddings", low=0, high=1)  # share of the photo

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("offsets", "region_offsets"):
            values = getattr(self, name)
            require(
                3 <= len(values) <= 64 and values == tuple(sorted(set(values))) and 0.0 in values,
                f"ladder.{name} must be 3 to 64 rising numbers with 0 among them, got {values}",
            )


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Section):
    """Prompt tuning (docs/method.md 4) from cached embeddings."""

    context: int = setting(16, "prompts", low=1, high=70)  # learned context vectors per class
    epochs: int = setting(20, "prompts", low=1, high=MANY)
    batch: int = setting(256, "prompts", low=1, high=MANY)
    learning_rate: float = setting(2e-3, "prompts", low=1e-9, high=1)
    # share of good photos kept for the acceptance check
    held_out: float = setting(0.25, "prompts", low=0.001, high=0.999)
    # at |EV| >= 1, on held-out photos
    min_accuracy: float = setting(0.95, "prompts", low=0, high=2, why="above 1: never accepted")
    min_spearman: float = setting(0.95, "prompts", low=-1, high=2)  # of d with EV, likewise
    seed: int = setting(0, "prompts", low=0, high=2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class PseudoGTSettings(Section):
    regional: bool = setting(True, "pseudo_gt")  # False: one strength per photo
    # where d crosses 0 on the ladder, or its most likely rung
    search: str = setting("crossing", "pseudo_gt", choices=["crossing", "grid"])
    # share of the meter, CLIP the rest
    meter_weight: float = setting(1.0, "pseudo_gt", low=0, high=1)
    # how far a trusted region moves to its own strength
    blend: float = setting(0.2, "pseudo_gt", low=0, high=1)
    max_strength: float = setting(2.2, "pseudo_gt", low=0, high=6)  # |t| never exceeds it


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a size of the network means."""

    channels: int  # at scale 0; doubled at each scale below
    blocks: tuple[int, ...]  # RSMBs per SIMR, one entry per scale
    stem: int  # 1: full size; 2: the whole network at half size (PixelUnshuffle)
    semantic: int  # channels of each half of the semantic features
    ssm_from: int  # first scale with state-space scans; above it RSMBs are CAB only


SIZES = {
    "tiny": Size(channels=4, blocks=(1, 1), stem=2, semantic=4, ssm_from=1),  # for tests
    "small": Size(channels=16, blocks=(1, 1, 1, 2), stem=2, semantic=16, ssm_from=1),
    # small with one RSMB of convolutions more in place of each scan: as many weights
    "small-conv": Size(channels=16, blocks=(1, 2, 2, 4), stem=2, semantic=16, ssm_from=4),
    "base": Size(channels=24, blocks=(1, 1, 1, 2), stem=2, semantic=32, ssm_from=1),
    "paper": Size(channels=32, blocks=(1, 1, 1, 2), stem=1, semantic=32, ssm_from=0),
}


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(Section):
    size: str = setting("small", "training", choices=SIZES)
    # strengths and a small residual, or a residual alone
    head: str = setting("tone", "training", choices=["tone", "residual"])
    # of the semantic fusion
    attention: str = setting("element", "training", choices=["element", "channel"])
    # tone operator of the "tone" head
    family: str = setting("film", "training", choices=["film", "ev", "gamma"])


@dataclass(frozen=True, kw_only=True)
class LossSettings(Section):
    """Shares of the gradient norm at the output after calibration (docs/method.md 7)."""

    data: float = setting(0.6, "training", low=1e-6, high=100)
    colour: float = setting(0.1, "training", low=0, high=100, why="0: off")
    semantic: float = setting(0.15, "training", low=0, high=100, why="0: off")
    prompt: float = setting(0.15, "training", low=0, high=100, why="0: off")
    identity: float = setting(0.1, "training", low=0, high=100, why="0: off")
    consistency: float = setting(0.1, "training", low=0, high=100, why="0: off")
    faithful: bool = setting(False, "training")  # plain MSE data term (the paper's)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    steps: int = setting(1000, "training", low=1, high=MANY)
    # photos; half as many scenes, twice, if consistency is on
    batch: int = setting(
        8, "training", low=2, high=4096, multiple=2, why="half of it is re-exposed"
    )
    # half of a batch is re-exposed by up to this |t|
    reexpose: float = setting(0.8, "training", low=0, high=6)
    # working size: long side, pixels
    size: int = setting(256, "training", low=32, high=4096, multiple=32)
    crop: int = setting(160, "training", low=32, high=4096, multiple=32)  # its side, pixels
    learning_rate: float = setting(5e-4, "training", low=1e-9, high=1)
    warmup: int = setting(50, "training", low=0, high=MANY)  # steps
    weight_decay: float = setting(1e-4, "training", low=0, high=1)
    ema: float = setting(0.995, "training", low=0, high=1)
    clip_norm: float = setting(1.0, "training", low=1e-6, high=1e6)
    # first and last step measured for loss shares
    calibrate: tuple[int, int] = setting((20, 40), "training", low=0, high=MANY, why="each")
    # share of photos that choose the best checkpoint
    held_out: float = setting(0.03, "training", low=0.001, high=0.999)
    validate_every: int = setting(200, "training", low=1, high=MANY)
    save_every: int = setting(100, "training", low=1, high=MANY)
    log_every: int = setting(10, "training", low=1, high=MANY)
    # semantic and prompt losses on every n-th step, on so many photos of the batch
    spc_every: int = setting(2, "training", low=1, high=MANY)
    spc_photos: int = setting(4, "training", low=1, high=4096)
    amp: bool = setting(True, "training")  # bfloat16 where the device gains from it
    seed: int = setting(0, "training", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.calibrate) == 2 and self.calibrate[0] < self.calibrate[1],
            f"train.calibrate must be first and last step, rising, got {self.calibrate}",
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    device: str = setting("auto", "run")  # auto, cpu, cuda, cuda:1
    # photos per unit; fixed when a store is made
    unit_size: int = setting(32, "run", low=1, high=4096)
    workers: int = setting(1, "run", low=1, high=1024)  # processes; 1 runs in this one


@dataclass(frozen=True, kw_only=True)
class Settings:
    photo: PhotoSettings = field(default_factory=PhotoSettings)
    regions: RegionSettings = field(default_factory=RegionSettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    ladder: LadderSettings = field(default_factory=LadderSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    pseudo_gt: PseudoGTSettings = field(default_factory=PseudoGTSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    losses: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    run: RunSettings = field(default_factory=RunSettings)
