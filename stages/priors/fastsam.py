"""FastSAM (YOLOv8-seg, one class): loading without trust, features, and region maps.

Shapes: B batch, C channels, H W pixels, h w = H/4 W/4, A anchors, N boxes.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evenlight.cache.files import private_folder
from evenlight.stages.priors.fastsam_weights import read_weights, unusable
from evenlight.stages.priors.fingerprints import of_segmenter, segmenter_file
from evenlight.stages.priors.segmenting import Segmenting
from evenlight.stages.settings import RegionSettings


def _import_ultralytics() -> Any:
    """ultralytics.nn.tasks with every switch of its network, pip and telemetry habits off."""
    config = private_folder("evenlight-ultralytics-")
    os.environ.update(
        YOLO_OFFLINE="true",
        YOLO_AUTOINSTALL="false",
        ULTRALYTICS_SAFE_LOAD="1",
        YOLO_CONFIG_DIR=str(config),
        YOLO_VERBOSE="false",
    )
    # Told that it is one of several processes, it would wait for the others on its own account.
    processes = os.environ.pop("WORLD_SIZE", None)
    # The import sets OMP_NUM_THREADS for our children and turns OpenCV's threads off: undo both.
    omp_threads = os.environ.get("OMP_NUM_THREADS")
    torch_threads = torch.get_num_threads()
    cv2_threads = sys.modules["cv2"].getNumThreads() if "cv2" in sys.modules else -1
    from ultralytics import settings as switches
    from ultralytics.nn import tasks

    kept: Any = switches
    kept.update(sync=False, clearml=False, comet=False, dvc=False, mlflow=False, raytune=False)
    sys.modules["cv2"].setNumThreads(cv2_threads)  # a negative count means OpenCV's default
    torch.set_num_threads(torch_threads)
    if omp_threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    if processes is not None:
        os.environ["WORLD_SIZE"] = processes
    return tasks


_tasks = _import_ultralytics()

P3_LAYER = 15  # the neck's /8 output in yolov8-seg.yaml
WIDTHS = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}  # channels of the first convolution


def load_segmenter(settings: RegionSettings, device: str | torch.device = "cpu") -> "FastSAM":
    """The segmenter that settings name: the shipped one, or a .safetensors or .pt file.

    Raises EnvironmentLacks where the file is missing, is no FastSAM, or holds more than weights.
    """
    path = segmenter_file(settings)
    return FastSAM(load_network(path).to(device), settings, of_segmenter(settings))


class FastSAM(Segmenting):
    """A frozen FastSAM with its own decoding.  fingerprint: sha256 of the weight file."""

    def __init__(self, network: Any, settings: RegionSettings, fingerprint: str) -> None:
        # Batch norms folded and channels last: 0.10 s for 0.12 s per 512 photo on one core.
        folded = network.eval().requires_grad_(False).fuse(verbose=False)
        self.layers: Any = folded.to(memory_format=torch.channels_last).model
        self.head: Any = self.layers[-1]
        self.strides: list[float] = self.head.stride.tolist()
        self.settings = settings
        self.fingerprint = fingerprint
        self.p3_channels: int = self.head.cv2[0][0].conv.in_channels

    def features(self, rgb_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Prototypes and P3 features, differentiable in the photo.

        rgb_B3HW: sRGB in [0, 1], H and W multiples of 32.
        Returns proto_B32hw at /4 and p3_BChw at /8.
        """
        p3_BChw = self._run(rgb_B3HW.to(self._device), P3_LAYER)[P3_LAYER]
        return self.head.proto(p3_BChw), p3_BChw

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.layers.parameters()).device
        return device

    def _run(self, x: Tensor, last: int) -> list[Tensor]:
        """Outputs of layers 0 to `last`, as ultralytics' BaseModel runs them."""
        outputs: list[Tensor] = []
        for layer in self.layers[: last + 1]:
            sources = layer.f if isinstance(layer.f, list) else [layer.f]
            inputs = [x if source == -1 else outputs[source] for source in sources]
            x = layer(inputs if isinstance(layer.f, list) else inputs[0])
            outputs.append(x)
        return outputs

    @torch.no_grad()
    def boxes(self, rgb_13HW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes above the confidence wanted."""
        outputs = self._run(rgb_13HW.to(self._device), len(self.layers) - 2)
        boxes, scores, coefficients = [], [], []
        for level, source in enumerate(self.head.f):
            x = outputs[source]
            score_A = self._scores(level, x)
            kept = (score_A > self.settings.confidence).nonzero().squeeze(1)
            column, row = kept % x.shape[-1], kept // x.shape[-1]
            boxes.append(self._boxes(level, x, kept, column, row))
            scores.append(score_A[kept])
            coefficients.append(self._coefficients(level, x)[kept])
        proto_132hw = self.head.proto(outputs[P3_LAYER])
        return proto_132hw[0], torch.cat(boxes), torch.cat(scores), torch.cat(coefficients)

    def everything(self, rgb_13HW: Tensor) -> tuple[Tensor, ...]:
        """`features`, and `boxes` of every anchor, however unsure: what is exported.  Prototypes
        1,32,h,w, P3 1,C,h,w, boxes A,4, scores A and coefficients A,32."""
        outputs = self._run(rgb_13HW, len(self.layers) - 2)
        boxes, scores, coefficients = [], [], []
        for level, source in enumerate(self.head.f):
            x = outputs[source]
            rows, columns = (torch.arange(side) for side in x.shape[2:])
            row, column = (one.flatten() for one in torch.meshgrid(rows, columns, indexing="ij"))
            boxes.append(self._boxes(level, x, slice(None), column, row))
            scores.append(self._scores(level, x))
            coefficients.append(self._coefficients(level, x))
        found = (torch.cat(parts) for parts in (boxes, scores, coefficients))
        return self.head.proto(outputs[P3_LAYER]), outputs[P3_LAYER], *found

    def _scores(self, level: int, x_1Chw: Tensor) -> Tensor:
        return self.head.cv3[level](x_1Chw)[0].amax(0).flatten().sigmoid()

    def _coefficients(self, level: int, x_1Chw: Tensor) -> Tensor:
        """Of the masks of all anchors, A,32."""
        return self.head.cv4[level](x_1Chw)[0].flatten(1).T

    def _boxes(
        self, level: int, x_1Chw: Tensor, kept: Tensor | slice, column: Tensor, row: Tensor
    ) -> Tensor:
        """Boxes of the anchors kept, which lie at these columns and rows, N,4.

        Distances are decoded as in Generalized Focal Loss (arXiv 2006.04388): the mean of a
        distribution over reg_max bins, in units of the level's stride.
        """
        bins = torch.arange(self.head.reg_max, device=x_1Chw.device, dtype=torch.float32)
        logits = self.head.cv2[level](x_1Chw)[0].flatten(1)[:, kept].view(4, len(bins), -1)
        left, top, right, bottom = (logits.softmax(1) * bins[:, None]).sum(1)
        column, row = column + 0.5, row + 0.5
        corners = (column - left, row - top, column + right, row + bottom)
        return torch.stack(corners, 1) * self.strides[level]


def load_network(path: Path) -> Any:
    """A one-class YOLOv8-seg network holding the weights of a .safetensors or .pt file.

    The network is built here, by the width of the first convolution; the file only fills its
    tensors, so nothing that a file says is ever called.
    """
    weights = read_weights(path)
    first, branch = (
        (*weights.get(f"model.{name}.weight", torch.empty(0)).shape, 0)[0]
        for name in ("0.conv", "22.cv3.0.0.conv")
    )
    width = WIDTHS.get(first)
    if width is None:
        raise unusable(
            path,
            f"its first convolution has {first} channels, FastSAM's {', '.join(map(str, WIDTHS))}",
        )
    network = build_network(width, branch)
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise unusable(
            path,
            f"{len(wrong)} tensors differ from a one-class yolov8{width}-seg, first {name}: "
            f"expected {expected.get(name)}, got {found.get(name)}",
        )
    if bad := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise unusable(path, f"{len(bad)} tensors hold NaN or infinity, first {bad[0]}")
    network.load_state_dict(weights)
    return network


def build_network(width: str, class_branch: int) -> Any:
    """yolov8{width}-seg with one class, whatever the width of its class branch.

    A network tuned from 80 classes keeps its 80-wide branch; only its last layer has one output.
    """
    with torch.random.fork_rng(devices=[]):  # initial values are overwritten: leave the seed alone
        network = _tasks.SegmentationModel(
            f"yolov8{width}-seg.yaml", nc=min(class_branch, 80) or 1, verbose=False
        )
        head = network.model[-1]
        head.nc, head.no = 1, 1 + 4 * head.reg_max
        for branch in head.cv3:
            branch[-1] = nn.Conv2d(branch[-1].in_channels, 1, 1)
    return network
