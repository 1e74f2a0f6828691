"""A corrector folder made without training, and the command line called in this process."""

import signal
import sys
from pathlib import Path

import torch
from toys import ToyClip, ToySegmenter

from evenlight import cli
from evenlight.pipeline import config
from evenlight.pipeline.models import Models, priors_of
from evenlight.stages.corrector.checkpoint import save_corrector
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.priors.judge import Judge
from evenlight.stages.settings import Settings

SMALL = ["photo.size=64", "train.size=64", "network.size=tiny", "ladder.regions=3"]
SETTINGS = config.build(overrides=SMALL)


def toy_models(settings: Settings) -> Models:
    return Models(ToySegmenter(), ToyClip())


def save_toy_corrector(folder: Path, *, segmenter: int = 0, size: int = 64) -> Path:
    """The judge's curve with a red tint, as weights of a tiny network.

    segmenter: seed of the toy it claims to be trained with.  size: of photos for its priors.
    """
    network = Corrector(SETTINGS.network, ToySegmenter.p3_channels)
    with torch.no_grad():
        network.head.conv.bias[0] = 0.1
    judge = Judge.shipped(ToyClip())
    models = Models(ToySegmenter(segmenter), ToyClip())
    info = {
        "settings": config.to_dict(config.build(overrides=[*SMALL, f"photo.size={size}"])),
        "priors": priors_of(models, judge.fingerprint),
    }
    extra = {f"judge.{name}": tensor for name, tensor in judge.tensors.items()}
    return save_corrector(folder, network, info, extra)


def run_cli(monkeypatch, *arguments: str | Path) -> int:
    """Exit code of `evenlight ARGUMENTS` run here, as the installed command runs it."""
    monkeypatch.setattr(sys, "argv", ["evenlight", *map(str, arguments)])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
