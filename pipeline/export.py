"""Export a corrector with its priors, to correct photos without torch."""

import importlib.util
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evenlight import __version__
from evenlight.cache.errors import EnvironmentLacks, UsageError
from evenlight.cache.files import atomic_write, make_folder, sha256_bytes, sha256_file, write_json
from evenlight.pipeline import config
from evenlight.pipeline.console import Progress, silent
from evenlight.pipeline.exported import CARD, FORMAT, Card, GraphFile
from evenlight.pipeline.load import load_predictor
from evenlight.pipeline.models import Priors
from evenlight.stages.weights import shipped

NEEDS = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class ExportReport:
    """differences: of each graph from its model, the largest found."""

    folder: Path
    bytes: int
    differences: dict[str, float]
    seconds: float

    def summary(self) -> str:
        worst = max(self.differences.values())
        return f"{self.folder}: {self.bytes / 1e6:.0f} MB, within {worst:.0e} of the models"


def export(
    model: str | Path | None,
    out: str | Path,
    *,
    to: str = "onnx",
    on_progress: Progress = silent,
) -> ExportReport:
    """Write the corrector of a training run's folder (None: the one that ships) and its priors
    as graphs into the folder `out`, for `correct --runtime onnx`.

    Every graph is held against its model at sizes of all kinds before anything is written.  Raises
    EvenlightError where one answers otherwise, EnvironmentLacks where a package is missing.
    """
    started, out = time.monotonic(), Path(out)
    if to != "onnx":
        raise UsageError(f"models are exported to onnx, got {to!r}")
    if missing := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise EnvironmentLacks(
            f"exporting needs {', '.join(missing)}: pip install 'evenlight[onnx]'"
        )
    import torch

    from evenlight.stages.exporting import exports_of, graph_of

    predictor: Any = load_predictor(model, settings={"run.device": "cpu"})
    network, clip, judge = predictor.network, predictor.clip, predictor.judge
    exports = exports_of(network, predictor.segmenter, clip, judge, predictor.settings)
    graphs, files = {}, {}
    for done, (name, one) in enumerate(exports.items(), 1):
        graphs[name], difference = graph_of(name, one)
        digest = sha256_bytes(graphs[name])
        files[name] = GraphFile(len(graphs[name]), digest, difference)
        on_progress("graphs", done, len(exports))
    folder = shipped("base") if model is None else Path(model)
    card = Card(
        format=FORMAT,
        evenlight=__version__,
        torch=torch.__version__,
        corrector=sha256_file(folder / "corrector.json"),
        priors=Priors(predictor.segmenter.fingerprint, clip.fingerprint, judge.fingerprint),
        settings=config.to_dict(predictor.settings),
        p3_channels=network.p3_channels,
        multiple=network.multiple,
        dim=clip.dim,
        region_dim=clip.region_dim,
        size=clip.size,
        graphs=files,
    )
    make_folder(out)
    (out / CARD).unlink(missing_ok=True)  # it vouches for graphs that are replaced now
    for name, data in graphs.items():
        atomic_write(out / f"{name}.onnx", data)
    write_json(out / CARD, asdict(card))
    return ExportReport(
        folder=out,
        bytes=sum(map(len, graphs.values())),
        differences={name: file.difference for name, file in files.items()},
        seconds=time.monotonic() - started,
    )
