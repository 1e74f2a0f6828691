"""evenlight: mends badly exposed photographs, learning from unlabelled photos.

The act on one photo is `correct`; each command is a function: `correct_files` (the command
`correct`), `precompute`, `tune_clip`, `regenerate`, `train`, `evaluate`, `export`, `report`.  All
are imported at their first use, so that importing evenlight costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evenlight.pipeline.correct import correct_files
    from evenlight.pipeline.correct_photo import correct
    from evenlight.pipeline.evaluate import evaluate
    from evenlight.pipeline.export import export
    from evenlight.pipeline.judge import tune_clip
    from evenlight.pipeline.load import load_predictor
    from evenlight.pipeline.precompute import precompute, regenerate
    from evenlight.pipeline.report import report
    from evenlight.pipeline.train import train
    from evenlight.stages.corrector.predictor import Predictor

__version__ = "0.1.0"
__all__ = [
    "Predictor", "correct", "correct_files", "evaluate", "export", "load_predictor", "precompute",
    "regenerate", "report", "train", "tune_clip",
]  # fmt: skip
_HOMES = {
    "Predictor": "evenlight.stages.corrector.predictor",
    "correct": "evenlight.pipeline.correct_photo",
    "correct_files": "evenlight.pipeline.correct",
    "evaluate": "evenlight.pipeline.evaluate",
    "export": "evenlight.pipeline.export",
    "load_predictor": "evenlight.pipeline.load",
    "precompute": "evenlight.pipeline.precompute",
    "regenerate": "evenlight.pipeline.precompute",
    "report": "evenlight.pipeline.report",
    "train": "evenlight.pipeline.train",
    "tune_clip": "evenlight.pipeline.judge",
}


def __getattr__(name: str) -> Any:
    """A public name, imported at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'evenlight' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
