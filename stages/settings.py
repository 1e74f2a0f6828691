"""Every setting, what it means, its unit, and which part of the store it decides.

Torch-free, so that the command line starts fast. `affects` names the first part of the store
that a change of the value makes stale (later parts follow), or "prompts", "training", "run".
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from evenlight.cache.errors import UsageError

FAMILIES = ("film", "ev", "gamma")
AFFECTS = ("photo", "regions", "embeddings", "pseudo_gt", "prompts", "training", "run")


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


a_share = partial(setting, low=0, high=1)  # of a whole, or a probability
a_count = partial(setting, low=1, high=100_000_000)
a_side = partial(setting, low=64, high=4096, multiple=32)  # pixels
a_seed = partial(setting, low=0, high=2**32 - 1)
a_rate = partial(setting, low=1e-9, high=1)  # of learning
a_ladder = partial(setting, low=-6, high=6, why="each")  # strengths


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
    size: int = a_side(512, "photo")  # long side in the store
    max_megapixels: int = setting(250, "photo", low=1, high=4000)  # larger: refused from the header


@dataclass(frozen=True, kw_only=True)
class RegionSettings(Section):
    segmenter: str = setting("fastsam-n", "regions")  # shipped name, or path of FastSAM weights
    confidence: float = a_share(0.1, "regions")  # least box confidence
    iou: float = a_share(0.6, "regions")  # of two masks above which the surer one stands for both
    side: int = a_side(352, "regions")  # long side at which masks are found
    min_area: float = a_share(0.002, "regions")  # of the photo; a region is no smaller
    # regions beyond the largest are merged
    max_regions: int = setting(64, "regions", low=1, high=255, why="labels are uint8")


@dataclass(frozen=True, kw_only=True)
class ClipSettings(Section):
    model: str = setting("clip-lite0", "embeddings")  # shipped name, or an open_clip model name
    weights: str = setting("", "embeddings")  # path of weights; empty for the shipped model
    mean: tuple[float, ...] = a_share((), "embeddings", why="each")  # empty: the model's own
    std: tuple[float, ...] = setting((), "embeddings", low=0.001, high=1, why="each")  # likewise
    # pixels; 0: the model's own
    image_size: int = setting(0, "embeddings", low=32, high=1024, choices=[0])

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
    offsets: tuple[float, ...] = a_ladder(
        (-2.0, -1.4, -1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0), "embeddings"
    )
    regions: int = setting(16, "embeddings", low=1, high=255)  # largest ones, that are embedded
    min_region_area: float = a_share(0.01, "embeddings")  # of the photo

    def __post_init__(self) -> None:
        super().__post_init__()
        values = self.offsets
        require(
            3 <= len(values) <= 64 and values == tuple(sorted(set(values))) and 0.0 in values,
            f"ladder.offsets must be 3 to 64 rising numbers with 0 among them, got {values}",
        )


@dataclass(frozen=True, kw_only=True)
class PromptSettings(Section):
    """Prompt tuning (docs/method.md 4) from cached embeddings."""

    context: int = setting(16, "prompts", low=1, high=70)  # learned context vectors per class
    epochs: int = a_count(20, "prompts")
    batch: int = a_count(256, "prompts")
    learning_rate: float = a_rate(2e-3, "prompts")
    # share of good photos kept for the acceptance check
    held_out: float = setting(0.25, "prompts", low=0.001, high=0.999)
    # at |EV| >= 1, on held-out photos
    min_accuracy: float = setting(0.95, "prompts", low=0, high=2, why="above 1: never accepted")
    min_spearman: float = setting(0.95, "prompts", low=-1, high=2)  # of d with EV, likewise
    seed: int = a_seed(0, "prompts")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Section):
    """How far the judge corrects, and its tuning on a store (docs/method.md 4)."""

    # share of photos that are good, a priori; 0 corrects every photo
    prior_good: float = setting(0.5, "pseudo_gt", low=0, high=0.99)
    steps: int = a_count(400, "prompts")
    learning_rate: float = a_rate(3e-4, "prompts")
    # share of photos kept for the acceptance check
    held_out: float = setting(0.25, "prompts", low=0.001, high=0.999)
    seed: int = a_seed(0, "prompts")


@dataclass(frozen=True, kw_only=True)
class PseudoGTSettings(Section):
    regional: bool = setting(True, "pseudo_gt")  # False: one strength per photo
    # who chooses the strength: the judge, or the prompts, by the most likely rung of the ladder
    search: str = setting("judge", "pseudo_gt", choices=["judge", "grid"])
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
    "base": Size(channels=20, blocks=(1, 1, 1, 2), stem=2, semantic=32, ssm_from=2),
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


a_part = partial(setting, affects="training", low=0, high=100, why="0: off")


@dataclass(frozen=True, kw_only=True)
class LossSettings(Section):
    """Shares of the gradient norm at the output after calibration (docs/method.md 7)."""

    data: float = setting(0.4, "training", low=1e-6, high=100)
    edges: float = a_part(0.25)
    colour: float = a_part(0.05)
    clipped: float = a_part(0.3)  # colour edges along what was lost
    light: float = a_share(0.55, "training")  # quantile of likely values that fills what was lost
    # the paper's semantic-prompt consistency: off, since it takes time that more steps use better
    semantic: float = a_part(0.0)
    prompt: float = a_part(0.0)
    faithful: bool = setting(False, "training")  # plain MSE data term (the paper's)


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    steps: int = a_count(1000, "training")
    # shipped name or folder of the corrector that training begins with; empty: none
    start: str = setting("", "training")
    # what a batch is made of (docs/method.md 7); 0 turns a stream off
    good: int = a_count(5, "training", low=0, high=4096)  # good photos, mis-exposed
    uneven: float = a_share(0.5, "training")  # of them, with objects exposed otherwise
    scenes: int = a_count(4, "training", low=0, high=4096)  # frames of a scene, to another frame
    bad: int = a_count(1, "training", low=0, high=4096)  # photos with their pseudo-GT
    size: int = a_side(256, "training", low=32)  # working size: long side
    crop: int = a_side(160, "training", low=32)
    learning_rate: float = a_rate(5e-4, "training")
    warmup: int = a_count(50, "training", low=0)  # steps
    weight_decay: float = a_share(1e-4, "training")
    ema: float = a_share(0.995, "training")
    clip_norm: float = setting(1.0, "training", low=1e-6, high=1e6)
    calibrate: tuple[int, int] = a_count((20, 40), "training", low=0)  # steps measured for shares
    # share of photos that choose the best checkpoint
    held_out: float = setting(0.03, "training", low=0.001, high=0.999)
    validate_every: int = a_count(200, "training")
    save_every: int = a_count(100, "training")
    log_every: int = a_count(10, "training")
    spc_every: int = a_count(2, "training")  # semantic and prompt losses on every n-th step
    spc_photos: int = a_count(4, "training")  # photos of the batch that they see
    amp: bool = setting(True, "training")  # bfloat16 where the device gains from it
    seed: int = a_seed(0, "training")

    @property
    def batch(self) -> int:
        """Photos of a step."""
        return self.good + self.scenes + self.bad

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.batch > 0, "one of train.good, train.scenes and train.bad must be above 0")
        require(
            len(self.calibrate) == 2 and self.calibrate[0] < self.calibrate[1],
            f"train.calibrate must be first and last step, rising, got {self.calibrate}",
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    device: str = setting("auto", "run")  # auto, cpu, cuda, cuda:1
    unit_size: int = a_count(32, "run", high=4096)  # photos per unit; fixed when a store is made
    workers: int = a_count(1, "run", high=1024)  # processes; 1 runs in this one
    retry_failed: bool = setting(False, "run")  # photos that failed are tried again as they are


@dataclass(frozen=True, kw_only=True)
class Settings:
    photo: PhotoSettings = field(default_factory=PhotoSettings)
    regions: RegionSettings = field(default_factory=RegionSettings)
    clip: ClipSettings = field(default_factory=ClipSettings)
    ladder: LadderSettings = field(default_factory=LadderSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    pseudo_gt: PseudoGTSettings = field(default_factory=PseudoGTSettings)
    network: NetworkSettings = field(default_factory=NetworkSettings)
    losses: LossSettings = field(default_factory=LossSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        require(
            self.ladder.family == "film" or self.pseudo_gt.search == "grid",
            f"the judge reads film ladders, got ladder.family = {self.ladder.family}: with another "
            "family pseudo_gt.search must be grid",
        )
