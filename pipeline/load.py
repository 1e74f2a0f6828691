"""A trained corrector brought together with the priors it was trained with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenlight.cache.errors import EnvironmentLacks, StoreError, UsageError
from evenlight.cache.files import checked
from evenlight.pipeline import config
from evenlight.pipeline.config import Given
from evenlight.pipeline.models import Priors, choose_device, load_models, priors_of, read_judge
from evenlight.pipeline.outputs import CARDS
from evenlight.stages.corrector.predictor import Predictor
from evenlight.stages.weights import shipped

# What may differ from training: where it runs, which photos are too large, where weights lie
# (their content is checked), and how readily photos are left alone.  Everything else is part of
# what the corrector learned.
OPEN_SETTINGS = (
    "run.device", "photo.max_megapixels", "regions.segmenter", "clip.weights", "judge.prior_good",
)  # fmt: skip


@dataclass(frozen=True)
class _About:
    """What the info of a corrector says of how it is used."""

    settings: dict[str, dict[str, Any]]
    priors: Priors


def load_predictor(
    model: str | Path | None = None,
    *,
    settings: Given = None,
    runtime: str = "torch",
    threads: int = 0,
) -> Predictor:
    """The corrector of a training run's folder, or the shipped one for None, ready to correct.

    settings: changes to OPEN_SETTINGS, on top of those of the training.  runtime: torch; or onnx,
    where model is a folder that `export` made and torch is never imported (threads: of it, 0 is
    one for each core).  Raises StoreError where the priors here are not those it was trained with,
    EnvironmentLacks where weights are missing.
    """
    if runtime == "onnx":
        from evenlight.pipeline.exported import load_exported

        if model is None:
            raise UsageError("--runtime onnx needs -m FOLDER, one that 'evenlight export' made")
        return load_exported(Path(model), settings, threads)
    folder = shipped("base") if model is None else Path(model)
    if model is None and not folder.is_dir():
        raise EnvironmentLacks(
            "no corrector ships with this version: train one and name its folder with -m"
        )
    if (folder / CARDS["onnx"]).is_file():
        raise UsageError(f"{folder} holds an exported corrector: --runtime onnx runs it")
    from evenlight.stages.corrector.checkpoint import load_corrector

    network, info, extra = load_corrector(folder)
    about = checked(_About, info, folder / "corrector.json")
    complete = config.of_training(folder, about.settings, settings, OPEN_SETTINGS)
    models = load_models(complete)
    tensors = {key.removeprefix("judge."): value for key, value in extra.items()}
    try:
        judge = read_judge(tensors, f"the judge of corrector {folder}")
    except StoreError as error:
        raise StoreError(
            f"{error}: train again; --set train.start={folder} goes on from its weights"
        ) from error
    found = priors_of(models, judge.fingerprint)
    for prior, wanted in vars(about.priors).items():
        if found[prior] != wanted:
            raise StoreError(
                f"corrector {folder} was trained with {prior} {wanted[:12]}, here is "
                f"{found[prior][:12]}: put those weights back, or train again"
            )
    return Predictor(
        network=network.to(choose_device(complete.run.device)),
        settings=complete,
        segmenter=models.segmenter,
        clip=models.clip,
        judge=judge,
    )
