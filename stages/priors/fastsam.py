"""FastSAM (YOLOv8-seg, one class): loading without trust, features, and region maps.

Shapes: B batch, C channels, H W pixels, h w = H/4 W/4, A anchors, K masks.
The caller gives photos after the mean-luma rule; nothing here corrects exposure.
"""

import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from evenlight.cache.files import private_folder
from evenlight.stages.priors.fastsam_weights import read_weights, unusable
from evenlight.stages.priors.fingerprints import of_segmenter, segmenter_file
from evenlight.stages.priors.protocols import Regions
from evenlight.stages.priors.region_map import distinct, on_edges, region_map
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
    return tasks


_tasks = _import_ultralytics()

P3_LAYER = 15  # the neck's /8 output in yolov8-seg.yaml
WIDTHS = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}  # channels of the first convolution
BOX_IOU = 0.8  # boxes nearer than this are one; masks decide the rest
MAX_MASKS = 300  # as ultralytics' max_det
EDGE_SNAP = 0.03  # boxes ending this near the frame's edge (share of the side) reach it


def load_segmenter(settings: RegionSettings, device: str | torch.device = "cpu") -> "FastSAM":
    """The segmenter that settings name: the shipped one, or a .safetensors or .pt file.

    Raises EnvironmentLacks where the file is missing, is no FastSAM, or holds more than weights.
    """
    path = segmenter_file(settings)
    return FastSAM(load_network(path).to(device), settings, of_segmenter(settings))


class FastSAM:
    """A frozen FastSAM with its own decoding.

    fingerprint: sha256 of the weight file, 64 hex digits.  p3_channels: C of the P3 features.
    """

    def __init__(self, network: Any, settings: RegionSettings, fingerprint: str) -> None:
        # Batch norms folded and channels last: 0.10 s for 0.12 s per 512 photo on one core.
        folded = network.eval().requires_grad_(False).fuse(verbose=False)
        self.layers: Any = folded.to(memory_format=torch.channels_last).model
        self.head: Any = self.layers[-1]
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

    @torch.no_grad()
    def segment(self, rgb_HW3: NDArray[np.uint8], extent: tuple[int, int] | None = None) -> Regions:
        """Region map and features of one photo.

        rgb_HW3: uint8 sRGB, H and W multiples of 8.  extent: (height, width) of the true photo
        in the top-left corner, multiples of 8; outside it labels and features are 0.
        """
        height, width, _ = rgb_HW3.shape
        h, w = extent or (height, width)
        assert not any(side % 8 for side in (height, width, h, w)), (rgb_HW3.shape, extent)
        labels = np.zeros((height, width), np.uint8)
        labels[:h, :w] = self.regions(rgb_HW3[:h, :w])
        padded = functional.pad(_to_float(rgb_HW3[:h, :w]), (0, -w % 32, 0, -h % 32), "replicate")
        proto_132hw, p3_1Chw = self.features(padded)
        return Regions(
            labels=labels,
            proto=_on_canvas(proto_132hw[0], (h // 4, w // 4), (height // 4, width // 4)),
            p3=_on_canvas(p3_1Chw[0], (h // 8, w // 8), (height // 8, width // 8)),
        )

    def regions(self, rgb_HW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Region map of a photo of any size, HxW uint8, borders on the photo's edges."""
        labels_hw, _ = self.painted(rgb_HW3)
        labels = _resized(labels_hw, rgb_HW3.shape[:2], cv2.INTER_NEAREST)
        return on_edges(labels, np.ascontiguousarray(rgb_HW3))

    @torch.no_grad()
    def painted(self, rgb_HW3: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], float]:
        """Region map before its borders are refined, and the share that some mask covers.

        Masks are found at long side `settings.side`, whatever the photo's own size: the network
        knows objects at the sizes it was trained on.  The map has half that side.
        """
        height, width, _ = rgb_HW3.shape
        scale = self.settings.side / max(height, width)
        h, w = (max(round(side * scale / 32) * 32, 32) for side in (height, width))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        small = _resized(rgb_HW3, (h, w), method)
        outputs = self._run(_to_float(small).to(self._device), len(self.layers) - 2)
        proto_132hw = self.head.proto(outputs[P3_LAYER])
        boxes_K4, scores_K, coefficients_K32 = self._detections(outputs, h, w)
        masks_Khw = _masks(proto_132hw[0], coefficients_K32, boxes_K4).cpu().numpy()
        return region_map(
            *distinct(masks_Khw, scores_K.cpu().numpy(), iou=self.settings.iou),
            min_area=self.settings.min_area,
            max_regions=self.settings.max_regions,
        )

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

    def _detections(self, outputs: list[Tensor], h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (x1 y1 x2 y2, pixels), scores and mask coefficients that survive NMS.

        Distances are decoded as in Generalized Focal Loss (arXiv 2006.04388): the mean of a
        distribution over reg_max bins, in units of the level's stride.
        """
        boxes, scores, coefficients = [], [], []
        bins = torch.arange(self.head.reg_max, device=self._device, dtype=torch.float32)
        for level, source in enumerate(self.head.f):
            x = outputs[source]
            stride = float(self.head.stride[level])
            score_A = self.head.cv3[level](x)[0].amax(0).flatten().sigmoid()
            kept = (score_A > self.settings.confidence).nonzero().squeeze(1)
            logits = self.head.cv2[level](x)[0].flatten(1)[:, kept].view(4, len(bins), -1)
            left, top, right, bottom = (logits.softmax(1) * bins[:, None]).sum(1)
            column, row = kept % x.shape[-1] + 0.5, kept // x.shape[-1] + 0.5
            corners = (column - left, row - top, column + right, row + bottom)
            boxes.append(torch.stack(corners, 1) * stride)
            scores.append(score_A[kept])
            coefficients.append(self.head.cv4[level](x)[0].flatten(1)[:, kept].T)
        boxes_N4 = _snapped(torch.cat(boxes), h, w)
        scores_N = torch.cat(scores)
        kept = _surest(boxes_N4, scores_N)
        return boxes_N4[kept], scores_N[kept], torch.cat(coefficients)[kept]


def _snapped(boxes_N4: Tensor, h: int, w: int) -> Tensor:
    """Boxes clipped to the frame, sides near its edge moved onto it."""
    limit = boxes_N4.new_tensor([w, h, w, h])
    boxes = boxes_N4.clamp(min=0).minimum(limit)
    boxes = torch.where(boxes < EDGE_SNAP * limit, 0, boxes)
    return torch.where(boxes > (1 - EDGE_SNAP) * limit, limit, boxes)


def _surest(boxes_N4: Tensor, scores_N: Tensor) -> list[int]:
    """Boxes that overlap no surer one by more than BOX_IOU, the surest first."""
    sized_N4 = torch.cat([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], 1)
    kept = cv2.dnn.NMSBoxes(sized_N4.tolist(), scores_N.tolist(), 0.0, BOX_IOU)
    return [int(box) for box in kept[:MAX_MASKS]]


def _masks(proto_32hw: Tensor, coefficients_K32: Tensor, boxes_K4: Tensor) -> Tensor:
    """Probability of each mask inside its box, 0 outside: Kx2hx2w, half the photo's sides."""
    proto = functional.interpolate(proto_32hw[None], scale_factor=2, mode="bilinear")[0]
    _, height, width = proto.shape
    masks = (coefficients_K32 @ proto.flatten(1)).view(-1, height, width).sigmoid()
    x1, y1, x2, y2 = (boxes_K4 / 2).T[..., None]
    columns = torch.arange(width, device=masks.device) + 0.5
    rows = torch.arange(height, device=masks.device) + 0.5
    inside = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None]
    return masks * inside


def _resized(
    pixels: NDArray[np.uint8], size: tuple[int, ...], interpolation: int
) -> NDArray[np.uint8]:
    resized = cv2.resize(np.ascontiguousarray(pixels), size[::-1], interpolation=interpolation)
    return np.asarray(resized, np.uint8)


def _to_float(rgb_HW3: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rgb_HW3)).permute(2, 0, 1)[None].float() / 255


def _on_canvas(
    x_Chw: Tensor, extent: tuple[int, int], canvas: tuple[int, int]
) -> NDArray[np.float16]:
    features = np.zeros((len(x_Chw), *canvas), np.float16)
    features[:, : extent[0], : extent[1]] = x_Chw[:, : extent[0], : extent[1]].half().cpu()
    return features


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
