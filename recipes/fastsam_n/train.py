"""Train `fastsam-n` on human segmentations: every segment that an annotator drew is an object.

    python -m recipes.fastsam_n.train --photos BSDS500 --start WEIGHTS.pt --out FOLDER

WEIGHTS.pt is a COCO YOLOv8n-seg (80 classes).  Its batch norms may be folded into a scale and an
offset: their statistics are refilled from training photos and the two changed to match, so that
the function stays the same.  The class branch keeps its width and ends in one logit, the mean of
the 80.  Writes FOLDER/fastsam-n.safetensors (moving average of the weights), FOLDER/log.jsonl
and FOLDER/checkpoint.pt every --save-every steps; the same command goes on from the checkpoint.
One thread; bfloat16 where --bfloat16 says so (twice as fast with AVX512-BF16), the loss in
float32 always.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evenlight.stages.priors.fastsam import build_network  # first: sets ultralytics' switches
from evenlight.stages.priors.fastsam_weights import read_weights
from recipes.fastsam_n.photos import Photo, batches_from, read_photos

from ultralytics.utils.loss import v8SegmentationLoss  # isort: skip

FROZEN = 5  # layers
FIRST_BIAS = -3.0  # of the one logit: few anchors hold an object's centre
TUNING_SHARE = 5  # with --hold-out, every fifth photo is not trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.02)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--hold-out", action="store_true", help="keep every fifth photo unseen")
    train(parser.parse_args())


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    photos = read_photos(arguments.photos, "train")
    if arguments.hold_out:
        photos = [photo for i, photo in enumerate(photos) if i % TUNING_SHARE]
    network = warm_start(arguments.start, photos, arguments.seed)
    criterion, trained, optimizer = prepared(network, arguments)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    parts = {"network": network, "average": average, "optimizer": optimizer}
    done = resumed(arguments.out / "checkpoint.pt", parts)
    batches = batches_from(photos, arguments.batch, arguments.seed, done + 1)
    began = time.monotonic()
    for step in range(done + 1, arguments.steps + 1):
        rate = learning_rate(step, arguments)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        network.train()
        network.model[:FROZEN].eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
            outputs = network(batch["img"])
        losses, _ = criterion(in_float32(outputs), batch)
        loss = losses.sum() / len(batch["img"])
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        update_average(average, network, min(arguments.ema, (1 + step) / (10 + step)))
        log(arguments.out, step, rate, losses / len(batch["img"]), time.monotonic() - began)
        if step % arguments.save_every == 0 or step == arguments.steps:
            save_weights(average, arguments.out / "fastsam-n.safetensors")
            save_checkpoint(arguments.out / "checkpoint.pt", step, parts)


def prepared(
    network: Any, arguments: argparse.Namespace
) -> tuple[v8SegmentationLoss, list[Tensor], torch.optim.Optimizer]:
    """ultralytics' loss with its usual weights, the tensors trained, and their optimizer."""
    network.args = SimpleNamespace(
        box=7.5, cls=0.5, dfl=1.5, overlap_mask=True, cls_pw=0.0, epochs=1
    )
    network.class_weights = None
    for index, layer in enumerate(network.model):
        layer.requires_grad_(index >= FROZEN)
    network.model[-1].dfl.requires_grad_(False)
    trained = [tensor for tensor in network.parameters() if tensor.requires_grad]
    kernels = [tensor for tensor in trained if tensor.ndim > 1]
    others = [tensor for tensor in trained if tensor.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": kernels, "weight_decay": arguments.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
    )
    return v8SegmentationLoss(network), trained, optimizer


def warm_start(path: Path, photos: list[Photo], seed: int) -> Any:
    """A one-class network that sees as the COCO network at `path` does."""
    weights = {name: tensor.float() for name, tensor in read_weights(path).items()}
    network = build_network("n", 80)
    for level in range(3):
        logit = f"model.22.cv3.{level}.2"
        weights[f"{logit}.weight"] = weights[f"{logit}.weight"].mean(0, keepdim=True)
        weights[f"{logit}.bias"] = torch.tensor([FIRST_BIAS])
    network.load_state_dict(weights)
    batch = next(batches_from(photos, 64, seed, 1))
    refill_statistics(network, batch["img"])
    return network.to(memory_format=torch.channels_last)


@torch.no_grad()
def refill_statistics(network: nn.Module, photos_B3HW: Tensor) -> None:
    """Give every batch norm the statistics of its input, and keep what it computes."""
    inputs: dict[nn.BatchNorm2d, tuple[Tensor, Tensor]] = {}

    def note(norm: nn.BatchNorm2d, arguments: tuple[Tensor]) -> None:
        variance, mean = torch.var_mean(arguments[0], (0, 2, 3))
        inputs[norm] = mean, variance

    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    network.eval()(photos_B3HW)
    for hook in hooks:
        hook.remove()
    for norm, (mean, variance) in inputs.items():
        assert norm.running_mean is not None and norm.running_var is not None
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias += gain * (mean - norm.running_mean)
        norm.weight.copy_(gain * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def in_float32(outputs: Any) -> Any:
    """The same lists and dicts of tensors, in float32."""
    if isinstance(outputs, Tensor):
        return outputs.float()
    if isinstance(outputs, dict):
        return {name: in_float32(value) for name, value in outputs.items()}
    return [in_float32(value) for value in outputs]


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step <= arguments.warmup:
        return arguments.learning_rate * step / arguments.warmup
    done = (step - arguments.warmup) / max(arguments.steps - arguments.warmup, 1)
    return arguments.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    state = network.state_dict()
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(state[name], 1 - decay)


def save_weights(network: nn.Module, path: Path) -> None:
    tensors = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    save_file(tensors, path, metadata={"yaml": "yolov8n-seg.yaml", "nc": "1"})


def save_checkpoint(path: Path, step: int, parts: dict[str, Any]) -> None:
    """Replace the checkpoint at once, so that a kill leaves the old or the new one."""
    content = {name: part.state_dict() for name, part in parts.items()}
    torch.save(content | {"step": step}, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def resumed(path: Path, parts: dict[str, Any]) -> int:
    """Bring the parts to where the checkpoint left them; the steps done, 0 without one."""
    if not path.exists():
        return 0
    content = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(content[name])
    return int(content["step"])


def log(folder: Path, step: int, rate: float, losses: Tensor, seconds: float) -> None:
    box, mask, objectness, distance, _ = (round(value, 4) for value in losses.tolist())
    row = {"step": step, "lr": rate, "box": box, "mask": mask, "class": objectness}
    row |= {"dfl": distance, "seconds": round(seconds, 1)}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
