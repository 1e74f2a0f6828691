"""The models of a predictor as ONNX graphs, each held against the model it was made from.

What stands around the networks needs no export: it works on NumPy arrays as well (arrays.py).
"""

# B photos, C channels, H W pixels, h w feature cells, D embedding, T tones, R regions

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from evenlight.cache.errors import EvenlightError, one_line
from evenlight.stages.corrector.network import PROTO_CHANNELS, Corrector
from evenlight.stages.priors.clip import Clip
from evenlight.stages.priors.fastsam import FastSAM
from evenlight.stages.priors.judge import Judge, Seen
from evenlight.stages.priors.ladder import REGION_CELL, REGION_SIDE
from evenlight.stages.priors.opinion import asked
from evenlight.stages.priors.tones import NUM_TONES
from evenlight.stages.runtime import CHUNK, Graph
from evenlight.stages.settings import Settings

OPSET = 20
TOLERANCE = 1e-4  # of an output's largest value, or of 1: how far a graph may be from its model
CHECKS = 4  # sizes drawn at random, beside the largest and the smallest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export:
    """A model and how its graph is called.

    owner: whose weights go in.  call: tensors to tensors.  outputs: their names.  shapes: of each
    input, which axes vary.  draw: inputs of so many rows and columns, each from 1 to `most`.
    """

    owner: nn.Module
    call: Callable[..., Any]
    outputs: tuple[str, ...]
    shapes: tuple[dict[int, Any], ...]
    draw: Callable[[int, int], tuple[Tensor, ...]]
    most: int


def exports_of(
    network: Corrector, segmenter: FastSAM, clip: Clip, judge: Judge, settings: Settings
) -> dict[str, Export]:
    """What is exported, by name."""
    return {
        "corrector": _corrector(network, settings.train.size),
        "segmenter": _segmenter(segmenter, max(settings.photo.size, settings.regions.side)),
        "clip": _clip(clip),
        "clip-regions": _clip_regions(clip, settings.ladder.regions),
        "judge": _photo_judge(judge, clip.dim, len(asked(settings.ladder.offsets))),
        "judge-regions": _region_judge(judge, clip.region_dim, settings.ladder.regions),
    }


def graph_of(name: str, export: Export) -> tuple[bytes, float]:
    """The ONNX file, and how far its answers are from the model's.

    Raises EvenlightError where it cannot be made, or is further away than TOLERANCE.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = _made(name, export)
        return data, _difference(name, export, Graph(data))


def _made(name: str, export: Export) -> bytes:
    example = export.draw(export.most, max(2, 3 * export.most // 4))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch will do otherwise in its next versions
        try:
            program = torch.onnx.export(
                _Called(export.owner, export.call).eval(),
                example,
                dynamo=True,
                dynamic_shapes=(export.shapes,),
                output_names=export.outputs,
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise EvenlightError(
                f"the {name} cannot be exported with torch {torch.__version__} "
                f"({one_line(error)}): nothing was written"
            ) from error
    assert program is not None
    return program.model_proto.SerializeToString()


class _Called(nn.Module):
    """A call that uses the weights of a module, as the module that torch.onnx asks for."""

    def __init__(self, owner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.owner, self.call = owner, call

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.call(*inputs))


def _difference(name: str, export: Export, graph: Graph) -> float:
    """The largest, as a share of an output's largest value, at sizes of all kinds."""
    sizes = np.random.default_rng(0).integers(1, export.most + 1, (CHECKS, 2)).tolist()
    worst = 0.0
    for rows, columns in [[export.most, export.most], [1, 1], *sizes]:
        inputs = export.draw(rows, columns)
        with torch.inference_mode():
            wanted = [x.numpy() for x in export.call(*inputs)]
        for one, other in zip(graph(*(x.numpy() for x in inputs)), wanted, strict=True):
            apart = np.abs(one - other).max(initial=0) / max(1.0, np.abs(other).max(initial=0))
            if not apart <= TOLERANCE:
                raise EvenlightError(
                    f"the exported {name} answers otherwise than the model, by {apart:.2g} where "
                    f"{TOLERANCE:g} is allowed (inputs {[list(x.shape) for x in inputs]}): nothing "
                    "was written; please report it"
                )
            worst = max(worst, float(apart))
    log.info("%s: within %.1e of the model", name, worst)
    return worst


def _corrector(network: Corrector, size: int) -> Export:
    step = network.multiple
    most = -(-size // step)
    rows, columns = Dim("rows", min=1, max=most), Dim("columns", min=1, max=most)

    def draw(rows: int, columns: int) -> tuple[Tensor, ...]:
        height, width = step * rows, step * columns
        return (
            torch.rand(1, 3, height, width),
            torch.randn(1, PROTO_CHANNELS, height // 4, width // 4),
            torch.randn(1, network.p3_channels, height // 8, width // 8),
            4 * torch.rand(1, 1, height, width) - 2,
        )

    sides = [{2: step // cell * rows, 3: step // cell * columns} for cell in (1, 4, 8, 1)]
    return Export(
        owner=network,
        call=network.whole,
        outputs=("given", "strength", "cover", "shift", "residual"),
        shapes=tuple(sides),
        draw=draw,
        most=most,
    )


def _segmenter(segmenter: FastSAM, side: int) -> Export:
    most = -(-side // 32)
    rows, columns = Dim("rows", min=1, max=most), Dim("columns", min=1, max=most)
    return Export(
        owner=segmenter.layers,
        call=segmenter.everything,
        outputs=("proto", "p3", "boxes", "scores", "coefficients"),
        shapes=({2: 32 * rows, 3: 32 * columns},),
        draw=lambda rows, columns: (torch.rand(1, 3, 32 * rows, 32 * columns),),
        most=most,
    )


def _clip(clip: Clip) -> Export:
    return Export(
        owner=clip.tower,
        call=lambda rgb: (clip.embed_at_once(rgb),),
        outputs=("embedding",),
        shapes=({0: Dim("photos", min=1, max=CHUNK)},),
        draw=lambda photos, _: (torch.rand(photos, 3, clip.size, clip.size),),
        most=CHUNK,
    )


def _clip_regions(clip: Clip, regions: int) -> Export:
    def draw(present: int, _: int) -> tuple[Tensor, ...]:
        photos = torch.rand(2, 1, 3, REGION_SIDE, REGION_SIDE)
        of = torch.randint(present, (1, REGION_SIDE // REGION_CELL, REGION_SIDE // REGION_CELL))
        cells = nn.functional.one_hot(of, regions + 1).permute(0, 3, 1, 2).float()
        return (*photos, cells)

    return Export(
        owner=clip.regions,
        call=lambda *inputs: (clip.embed_regions(*inputs),),
        outputs=("embeddings",),
        shapes=({},) * 3,
        draw=draw,
        most=regions,
    )


def _photo_judge(judge: Judge, dim: int, rungs: int) -> Export:
    def answers(*read: Tensor) -> tuple[Tensor, Tensor]:
        logits, good = judge.head(Seen(*read))
        return logits.double().softmax(1), good.sigmoid()

    def draw(*_: int) -> tuple[Tensor, ...]:
        embeddings = nn.functional.normalize(torch.randn(1, 1 + rungs, dim), dim=-1)
        tones, given = torch.rand(1, 1 + rungs, NUM_TONES), torch.randn(1, 1 + rungs)
        return embeddings, tones, given, torch.randn(1)

    return Export(
        owner=judge.head, call=answers, outputs=("p", "p_good"), shapes=({},) * 4, draw=draw, most=2
    )


def _region_judge(judge: Judge, dim: int, regions: int) -> Export:
    def answers(*read: Tensor) -> tuple[Tensor, ...]:
        return tuple(logits.double().softmax(-1) for logits in judge.regions(*read))

    def draw(regions: int, _: int) -> tuple[Tensor, ...]:
        areas = torch.rand(1 + regions)
        return torch.randn(1 + regions, dim), areas / areas.sum(), torch.randn(2)

    most = max(2, regions)
    with_rest = Dim("regions", min=1, max=most) + 1
    return Export(
        owner=judge.regions,
        call=answers,
        outputs=("p", "p_photo"),
        shapes=({0: with_rest}, {0: with_rest}, {}),
        draw=draw,
        most=most,
    )
