"""Every setting, what it means, its unit, and which part of the store it decides.

Torch-free, so that the command line starts fast. `affects` names the first part of the store
that a change of the value makes stale (later parts follow), or "prompts", "training", "run".
"""

from dataclasses import dataclass, field
from typing import Any

from evenlight.cache.errors import UsageError

FAMILIES = ("film", "ps", "ev", "gamma")
AFFECTS = ("photo", "regions", "embeddings", "pseudo_gt", "prompts", "training", "run")


def setting(default: Any, affects: str) -> Any:
    """A dataclass field that says which part of the store (or which run) it decides."""
    assert affects in AFFECTS, affects
    return field(default=default, metadata={"affects": affects})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True, kw_only=True)
class PhotoSettings:
    size: int = setting(512, "photo")  # long side in the store, pixels, a multiple of 32
    max_megapixels: int = setting(128, "photo")  # larger photos are refused from their header

    def __post_init__(self) -> None:
        require(
            self.size >= 64 and self.size % 32 == 0,
            f"photo.size must be a multiple of 32 from 64 up, got {self.size}",
        )


@dataclass(frozen=True, kw_only=True)
class RegionSettings:
    segmenter: str = setting("fastsam-n", "regions")  # shipped name, or path of FastSAM weights
    confidence: float = setting(0.1, "regions")  # least box confidence
    iou: float = setting(0.6, "regions")  # of two masks above which the surer one stands for both
    side: int = setting(352, "regions")  # long side at which masks are found, pixels
    min_area: float = setting(0.002, "regions")  # share of the photo; a region is no smaller
    max_regions: int = setting(64, "regions")  # regions beyond the largest are merged

    def __post_init__(self) -> None:
        require(
            1 <= self.max_regions <= 255,
            f"regions.max_regions must be 1 to 255 (labels are uint8), got {self.max_regions}",
        )
        require(
            self.side >= 64 and self.side % 32 == 0,
            f"regions.side must be a multiple of 32 from 64 up, got {self.side}",
        )


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    model: str = setting("clip-lite0", "embeddings")  # shipped name, or an open_clip model name
    weights: str = setting("", "embeddings")  # path of weights; empty for the shipped model
    mean: tuple[float, ...] = setting((), "embeddings")  # empty: the model's own
    std: tuple[float, ...] = setting((), "embeddings")
    image_size: int = setting(0, "embeddings")  # pixels; 0: the model's own


@dataclass(frozen=True, kw_only=True)
class LadderSettings:
    """Strengths at which CLIP sees re-exposed photos, as offsets from the mean-luma rule."""

    family: str = setting("film", "embeddings")
    offsets: tuple[float, ...] = setting(
        (-2.0, -1.4, -1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0), "embeddings"
    )
    region_offsets: tuple[float, ...] = setting((-0.8, -0.4, 0.0, 0.4, 0.8), "embeddings")
    regions: int = setting(16, "embeddings")  # largest regions that are embedded
    min_region_area: float = setting(0.01, "embeddings")  # share of the photo

    def __post_init__(self) -> None:
        require(
            self.family in FAMILIES,
            f"ladder.family must be one of {', '.join(FAMILIES)}, got {self.family!r}",
        )
        for name in ("offsets", "region_offsets"):
            values = getattr(self, name)
            require(
                len(values) >= 3 and list(values) == sorted(set(values)) and 0.0 in values,
                f"ladder.{name} must be at least 3 rising numbers with 0 among them, got {values}",
            )


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Prompt tuning (method.md 5) from cached embeddings."""

    context: int = setting(16, "prompts")  # learned context vectors per class
    epochs: int = setting(20, "prompts")
    batch: int = setting(256, "prompts")
    learning_rate: float = setting(2e-3, "prompts")
    held_out: float = setting(0.25, "prompts")  # share of good photos kept for the acceptance check
    min_accuracy: float = setting(0.95, "prompts")  # at |EV| >= 1, on held-out photos
    min_spearman: float = setting(0.95, "prompts")  # of d with EV, on held-out photos
    seed: int = setting(0, "prompts")


@dataclass(frozen=True, kw_only=True)
class PseudoGTSettings:
    regional: bool = setting(True, "pseudo_gt")  # False: one strength per photo
    search: str = setting("crossing", "pseudo_gt")  # "crossing" of d through 0, or "grid" argmax
    meter_weight: float = setting(1.0, "pseudo_gt")  # share of the meter, CLIP the rest
    blend: float = setting(0.2, "pseudo_gt")  # how far a trusted region moves to its own strength
    max_strength: float = setting(2.2, "pseudo_gt")  # |t| never exceeds it

    def __post_init__(self) -> None:
        require(
            self.search in ("crossing", "grid"),
            f"pseudo_gt.search must be crossing or grid, got {self.search!r}",
        )


@dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    size: str = setting("small", "training")  # a row of network.SIZES
    head: str = setting("tone", "training")  # "tone" (strengths + small residual) or "residual"
    attention: str = setting("element", "training")  # ASF: "element"-wise or "channel"
    frequency: str = setting("real_imag", "training")  # or "amp_phase"
    family: str = setting("film", "training")  # tone operator of the "tone" head

    def __post_init__(self) -> None:
        choices = {
            "size": ("tiny", "small", "small-conv", "base", "paper"),
            "head": ("tone", "residual"),
            "attention": ("element", "channel"),
            "frequency": ("real_imag", "amp_phase"),
            "family": FAMILIES,
        }
        for name, allowed in choices.items():
            got = getattr(self, name)
            require(
                got in allowed, f"network.{name} must be one of {', '.join(allowed)}, got {got!r}"
            )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Shares of the gradient norm at the output after calibration (method.md 6)."""

    data: float = setting(0.6, "training")
    colour: float = setting(0.1, "training")
    semantic: float = setting(0.15, "training")
    prompt: float = setting(0.15, "training")
    identity: float = setting(0.1, "training")
    consistency: float = setting(0.1, "training")
    faithful: bool = setting(False, "training")  # plain MSE data term (the paper's)

    def __post_init__(self) -> None:
        require(self.data > 0, f"losses.data must be above 0, got {self.data}")
        for name in ("colour", "semantic", "prompt", "identity", "consistency"):
            share = getattr(self, name)
            require(share >= 0, f"losses.{name} must be 0 (off) or more, got {share}")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    steps: int = setting(1000, "training")
    batch: int = setting(8, "training")  # photos; half as many scenes, twice, if consistency is on
    reexpose: float = setting(0.8, "training")  # half of a batch is re-exposed by up to this |t|
    size: int = setting(256, "training")  # working size: long side, pixels, a multiple of 32
    crop: int = setting(160, "training")  # crop side, pixels, a multiple of 32
    learning_rate: float = setting(5e-4, "training")
    warmup: int = setting(50, "training")  # steps
    weight_decay: float = setting(1e-4, "training")
    ema: float = setting(0.995, "training")
    clip_norm: float = setting(1.0, "training")
    calibrate: tuple[int, int] = setting((20, 40), "training")  # steps measured for loss shares
    held_out: float = setting(0.03, "training")  # share of photos that choose the best checkpoint
    validate_every: int = setting(200, "training")
    save_every: int = setting(100, "training")
    log_every: int = setting(10, "training")
    spc_every: int = setting(2, "training")  # semantic-prompt consistency on every n-th step
    spc_photos: int = setting(4, "training")  # photos of the batch that it sees
    amp: bool = setting(True, "training")  # bfloat16 where the device gains from it
    seed: int = setting(0, "training")

    def __post_init__(self) -> None:
        for name in ("size", "crop"):
            side = getattr(self, name)
            require(
                side >= 32 and side % 32 == 0,
                f"train.{name} must be a multiple of 32 from 32 up, got {side}",
            )
        counts = ("steps", "validate_every", "save_every", "log_every", "spc_every", "spc_photos")
        for name in counts:
            require(getattr(self, name) >= 1, f"train.{name} must be 1 or more")
        require(
            self.batch >= 2 and self.batch % 2 == 0,
            f"train.batch must be even, half of it is re-exposed, got {self.batch}",
        )
        require(
            0 < self.held_out < 1,
            f"train.held_out must be between 0 and 1, got {self.held_out}",
        )
        require(
            0 <= self.calibrate[0] < self.calibrate[1],
            f"train.calibrate must be first and last step, rising, got {self.calibrate}",
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    device: str = setting("auto", "run")  # auto, cpu, cuda, cuda:1
    unit_size: int = setting(32, "run")  # photos per unit; fixed when a store is made
    workers: int = setting(1, "run")  # processes; 1 runs in this one


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
