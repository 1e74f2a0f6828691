"""A folder of exported models, and the predictor that is made of them: no torch.

The card, `evenlight.json`, is written last and vouches for every graph by size and sha256.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError, one_line
from evenlight.cache.files import checked, read_json, sha256_bytes
from evenlight.pipeline import config
from evenlight.pipeline.config import Given
from evenlight.pipeline.models import Priors
from evenlight.pipeline.outputs import CARDS
from evenlight.stages.corrector.predictor import Predictor

CARD = CARDS["onnx"]
# 1, 2: regions were embedded by crops; 3: one strength a photo, no second opinion of it
FORMAT = 4
GRAPHS = {"corrector", "segmenter", "clip", "clip-regions", "judge", "judge-regions"}
OPEN_SETTINGS = ("run.device", "photo.max_megapixels", "judge.prior_good")  # as load.OPEN_SETTINGS


@dataclass(frozen=True)
class GraphFile:
    """What the card says of NAME.onnx.  difference: from the model it was made from, the largest
    that was found, as a share of an output's largest value."""

    bytes: int
    sha256: str
    difference: float


@dataclass(frozen=True)
class Card:
    """settings: of the training.  corrector: sha256 of its corrector.json.  multiple: of which
    the sides are that the corrector takes.  dim, region_dim, size: of CLIP.  evenlight, torch:
    versions."""

    format: int
    evenlight: str
    torch: str
    corrector: str
    priors: Priors
    settings: dict[str, dict[str, Any]]
    p3_channels: int
    multiple: int
    dim: int
    region_dim: int
    size: int
    graphs: dict[str, GraphFile]

    def __post_init__(self) -> None:
        assert set(self.graphs) == GRAPHS, f"graphs {sorted(self.graphs)}"
        assert self.multiple > 0 and self.multiple % 8 == 0, f"multiple {self.multiple}"
        sizes = self.p3_channels, self.dim, self.region_dim, self.size
        assert min(sizes) > 0, "p3_channels, dim, region_dim and size"


def load_exported(folder: Path, settings: Given = None, threads: int = 0) -> Predictor:
    """The predictor of a folder that `evenlight export` made.

    threads: 0 is one for each core.  Raises StoreError where the folder is damaged or none of
    those, EnvironmentLacks where ONNX Runtime is not installed.
    """
    card = read_card(folder)
    complete = config.of_training(folder, card.settings, settings, OPEN_SETTINGS)
    if complete.run.device not in ("auto", "cpu"):
        raise UsageError(f"--runtime onnx works on the CPU, got run.device {complete.run.device!r}")
    try:
        from evenlight.stages import runtime
    except ImportError as error:
        raise EnvironmentLacks(
            f"--runtime onnx needs ONNX Runtime ({error}): pip install 'evenlight[onnx]'"
        ) from error
    graphs = {}
    for name, file in card.graphs.items():
        data = _read(folder, name, file)
        try:
            graphs[name] = runtime.Graph(data, threads)
        except Exception as error:  # its errors share no class; the bytes are as they were written
            raise EnvironmentLacks(
                f"{folder / name}.onnx cannot be run by this ONNX Runtime ({one_line(error)}): "
                "take a newer one"
            ) from error
    priors = card.priors
    return Predictor(
        network=runtime.OnnxNetwork(graphs["corrector"], card.multiple),
        settings=complete,
        segmenter=runtime.OnnxSegmenter(
            graphs["segmenter"], complete.regions, priors.segmenter, card.p3_channels
        ),
        clip=runtime.OnnxClip(
            graphs["clip"],
            graphs["clip-regions"],
            priors.clip,
            card.dim,
            card.region_dim,
            card.size,
        ),
        judge=runtime.OnnxJudge(graphs["judge"], graphs["judge-regions"], priors.judge),
        xp=runtime.np,
    )


def read_card(folder: Path) -> Card:
    path = folder / CARD
    if not path.is_file():
        raise StoreError(
            f"{folder} holds no exported corrector ({CARD} is missing): make one with "
            "'evenlight export'"
        )
    card = checked(Card, read_json(path), path)
    if card.format != FORMAT:
        raise StoreError(
            f"{path} has format {card.format}, this version reads {FORMAT}: export it again"
        )
    return card


def _read(folder: Path, name: str, file: GraphFile) -> bytes:
    path = folder / f"{name}.onnx"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}: export it again") from error
    if len(data) != file.bytes or sha256_bytes(data) != file.sha256:
        raise StoreError(f"{path} is damaged: {CARD} vouches for other bytes: export it again")
    return data
