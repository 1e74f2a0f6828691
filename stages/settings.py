"""Every setting, what it means, its unit, and which part of the store it decides.

Torch-free, so that the command line starts fast. `affects` names the first part of the store
that a change of the value makes stale (later parts follow), or "prompts", "training", "run".
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from evenlight.cache.errors import UsageError

FAMILIES = ("film", "ev", "gamma")
AFFECTS = {  # what a change of a setting makes stale, in words
    "photo": "photo and all after",
    "regions": "regions and all after",
    "embeddings": "embeddings, pseudo_gt",
    "pseudo_gt": "pseudo_gt",
    "prompts": "nothing; tune-clip reads it",
    "training": "a training run",
    "run": "nothing",
}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True)
class Allowed:
    """The values that a setting takes; each value of a list, where it is one.

    A number lies from low to high and is a multiple; what is among the choices is allowed as well,
    and nothing else where there are no bounds.  `str` gives them in words.
    """

    low: float | None = None
    high: float | None = None
    multiple: int = 1
    choices: Collection[Any] = ()
    why: str = ""  # ends the sentence of a refusal

    def holds(self, value: Any) -> bool:
        if value in self.choices:
            return True
        if self.low is None or self.high is None:
            return not self.choices
        return self.low <= value <= self.high and (self.multiple == 1 or not value % self.multiple)

    def __str__(self) -> str:
        if self.low is None:
            return "one of " + ", ".join(self.choices) if self.choices else ""
        step = f"a multiple of {self.multiple} from " if self.multiple > 1 else ""
        words = [*map(str, self.choices), f"{step}{self.low:,} to {self.high:,}"]
        return " or ".join(words) + (f" ({self.why})" if self.why else "")


def setting(default: Any, affects: str, meaning: str, **allowed: Any) -> Any:
    """A dataclass field that says what it decides and which values it takes.

    affects: one of AFFECTS.  meaning: in words, with its unit.  allowed: as Allowed takes them.
    """
    assert affects in AFFECTS, affects
    metadata = {"affects": affects, "meaning": meaning, "allowed": Allowed(**allowed)}
    return field(default=default, metadata=metadata)


a_share = partial(setting, low=0, high=1)  # of a whole, or a probability
a_count = partial(setting, low=1, high=100_000_000)
a_side = partial(setting, low=64, high=4096, multiple=32)  # pixels
a_seed = partial(setting, low=0, high=2**32 - 1)
a_rate = partial(setting, low=1e-9, high=1)  # of learning
a_ladder = partial(setting, low=-6, high=6, why="each")  # strengths
a_check = partial(setting, 0.25, "prompts", low=0.001, high=0.999)
a_stream = partial(setting, affects="training", low=0, high=4096, why="0: off")


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
    size: int = a_side(512, "photo", "long side in the store, pixels")
    max_megapixels: int = setting(
        250, "photo", "larger photos are refused from their header", low=1, high=4000
    )


@dataclass(frozen=True, kw_only=True)
class RegionSettings(Section):
    segmenter: str = setting(
        "fastsam-n", "regions", "what finds regions: shipped name, or path of FastSAM weights"
    )
    confidence: float = a_share(0.1, "regions", "least box confidence")
    iou: float = a_share(
        0.6, "regions", "overlap of two masks above which the surer one stands for both"
    )
    side: int = a_side(352, "regions", "long side at which masks are found, pixels")
    min_area: float = a_share(0.002, "regions", "least region, as a share of the photo")
    max_regions: int = setting(
        64,
        "regions",
        "regions beyond the largest so many are merged",
        low=1,
        high=255,
        why="labels are uint8",
    )


@dataclass(frozen=True, kw_only=True)
class ClipSettings(Section):
    model: str = setting("clip-lite0", "embeddings", "shipped name, or an open_clip model name")
    weights: str = setting("", "embeddings", "path of weights; empty: of the shipped model")
    mean: tuple[float, ...] = a_share(
        (), "embeddings", "of R, G, B; empty: the model's own", why="each"
    )
    std: tuple[float, ...] = setting(
        (), "embeddings", "of R, G, B; empty: the model's own", low=0.001, high=1, why="each"
    )
    image_size: int = setting(
        0,
        "embeddings",
        "side CLIP sees, pixels; 0: the model's own",
        low=32,
        high=1024,
        choices=[0],
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

    family: str = setting("film", "embeddings", "tone operator of the rungs", choices=FAMILIES)
    offsets: tuple[float, ...] = a_ladder(
        (-2.0, -1.4, -1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0),
        "embeddings",
        "strengths of the rungs, from that of the mean-luma rule on",
    )
    regions: int = setting(16, "embeddings", "largest regions, that are embedded", low=1, high=255)
    min_region_area: float = a_share(
        0.01, "embeddings", "least region that is embedded, as a share of the photo"
    )

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

    context: int = setting(16, "prompts", "learned context vectors per class", low=1, high=70)
    epochs: int = a_count(20, "prompts", "rounds over the photos")
    batch: int = a_count(256, "prompts", "embeddings per step")
    learning_rate: float = a_rate(2e-3, "prompts", "of the context vectors")
    held_out: float = a_check("share of good photos kept for the acceptance check")
    min_accuracy: float = setting(
        0.95,
        "prompts",
        "least accuracy at |EV| >= 1 on held-out photos",
        low=0,
        high=2,
        why="above 1: never accepted",
    )
    min_spearman: float = setting(
        0.95,
        "prompts",
        "least rank correlation of the score with EV on held-out photos",
        low=-1,
        high=2,
        why="above 1: never accepted",
    )
    seed: int = a_seed(0, "prompts", "of all that is drawn")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings(Section):
    """How far the judge corrects, and its tuning on a store (docs/method.md 4)."""

    prior_good: float = setting(
        0.5,
        "pseudo_gt",
        "share of photos that are good, a priori; 0 corrects every photo",
        low=0,
        high=0.99,
    )
    steps: int = a_count(400, "prompts", "of tuning its strengths")
    learning_rate: float = a_rate(3e-4, "prompts", "of tuning its strengths")
    held_out: float = a_check("share of photos kept for the acceptance check")
    seed: int = a_seed(0, "prompts", "of all that is drawn")


@dataclass(frozen=True, kw_only=True)
class PseudoGTSettings(Section):
    regional: bool = setting(True, "pseudo_gt", "regions differ; false: one strength per photo")
    search: str = setting(
        "judge",
        "pseudo_gt",
        "what chooses the strength: the judge, or the prompts by the most likely rung (grid)",
        choices=["judge", "grid"],
    )
    max_strength: float = setting(2.2, "pseudo_gt", "no strength t exceeds it", low=0, high=6)


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
    size: str = setting("small", "training", "of the network", choices=SIZES)
    head: str = setting(
        "tone",
        "training",
        "what it gives: strengths and a small residual, or a residual alone",
        choices=["tone", "residual"],
    )
    attention: str = setting(
        "element", "training", "of the semantic fusion", choices=["element", "channel"]
    )
    family: str = setting(
        "film", "training", "tone operator of the tone head", choices=["film", "ev", "gamma"]
    )


a_part = partial(setting, affects="training", low=0, high=100, why="0: off")


@dataclass(frozen=True, kw_only=True)
class LossSettings(Section):
    """Shares of the gradient norm at the output after calibration (docs/method.md 7)."""

    data: float = setting(0.4, "training", "share of the data term", low=1e-6, high=100)
    edges: float = a_part(0.25, meaning="share of edges")
    colour: float = a_part(0.05, meaning="share of colour")
    clipped: float = a_part(0.3, meaning="share of colour edges along what was lost")
    light: float = a_share(0.55, "training", "quantile of likely values that fills what was lost")
    # off, since they take time that more steps use better
    semantic: float = a_part(0.0, meaning="share of the paper's semantic consistency")
    prompt: float = a_part(0.0, meaning="share of the paper's prompt consistency")
    faithful: bool = setting(False, "training", "plain MSE as the data term (the paper's)")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    steps: int = a_count(1000, "training", "of training; more of them train a run on")
    start: str = setting(
        "", "training", "shipped name or folder of the corrector that it begins with; empty: none"
    )
    # what a batch is made of (docs/method.md 7); 0 turns a stream off
    good: int = a_stream(5, meaning="good photos of a batch, mis-exposed")
    uneven: float = a_share(0.5, "training", "of those, with objects exposed otherwise")
    apart: float = a_share(0.8, "training", "of those, with the judge's word on their regions")
    scenes: int = a_stream(4, meaning="frames of a scene in a batch, to another frame")
    bad: int = a_stream(1, meaning="photos of a batch with their pseudo-GT")
    size: int = a_side(256, "training", "working size: long side, pixels", low=32)
    crop: int = a_side(160, "training", "side of what a step sees of a photo, pixels", low=32)
    learning_rate: float = a_rate(5e-4, "training", "at its peak")
    warmup: int = a_count(50, "training", "steps until the peak of the learning rate", low=0)
    weight_decay: float = a_share(1e-4, "training", "of AdamW, on matrices")
    ema: float = a_share(0.995, "training", "decay of the averaged weights, per step")
    clip_norm: float = setting(1.0, "training", "largest gradient norm", low=1e-6, high=1e6)
    calibrate: tuple[int, int] = a_count(
        (20, 40), "training", "first and last step measured for shares of the losses", low=0
    )
    held_out: float = setting(
        0.03, "training", "share of photos that choose the best checkpoint", low=0.001, high=0.999
    )
    validate_every: int = a_count(200, "training", "steps from one check to the next")
    save_every: int = a_count(100, "training", "steps from one checkpoint to the next")
    log_every: int = a_count(10, "training", "steps from one line of the log to the next")
    spc_every: int = a_count(2, "training", "steps per semantic and prompt loss")
    spc_photos: int = a_count(4, "training", "photos of the batch that those losses see")
    amp: bool = setting(True, "training", "bfloat16 where the device gains from it")
    seed: int = a_seed(0, "training", "of all that is drawn")

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
    device: str = setting("auto", "run", "auto, cpu, cuda or cuda:1")
    unit_size: int = a_count(32, "run", "photos per unit; fixed when a store is made", high=4096)
    workers: int = a_count(1, "run", "processes; 1: all in this one", high=1024)
    memory_gb: float = setting(
        0.0,
        "run",
        "memory for photos of a training, GB; what is more is read ahead; 0: .6 of what is free",
        low=0,
        high=1_000_000,
    )
    retry_failed: bool = setting(False, "run", "photos that failed are tried again as they are")


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
