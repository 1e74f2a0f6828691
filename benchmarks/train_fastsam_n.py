"""Train `fastsam-n` on human segmentations: every segment that an annotator drew is an object.

    python benchmarks/train_fastsam_n.py --photos BSDS500 --start WEIGHTS.pt --out FOLDER

BSDS500 holds train/*.jpg and groundTruth/train/*.mat.  WEIGHTS.pt is a one-class YOLOv8n-seg
(the network of stages/priors/fastsam.py).  Writes FOLDER/fastsam-n.safetensors (moving average
of the weights) every --save-every steps, and FOLDER/log.jsonl.  One thread.

Photos are seen whole, at long sides from 320 to 512 pixels and squeezed towards a square as
often as not, since the store's photos come in every shape.  Half are re-exposed by a camera
model; half of those are then brought back to mean luma 119 by the `film` curve, which is what
the pipeline gives the segmenter.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.io import loadmat

from evenlight.stages.priors.fastsam import load_network  # first: sets ultralytics' switches

from ultralytics.utils.loss import v8SegmentationLoss  # isort: skip

LONG_SIDES = (320, 352, 384, 416, 448, 480, 512)
FROZEN = 5  # layers
Photo = tuple[NDArray[np.uint8], list[NDArray[np.uint16]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=30)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    network = load_network(arguments.start)
    network.args = SimpleNamespace(
        box=7.5, cls=0.5, dfl=1.5, overlap_mask=True, cls_pw=0.0, epochs=1
    )
    network.class_weights = None
    for index, layer in enumerate(network.model):
        layer.requires_grad_(index >= FROZEN)
    network.model[-1].dfl.requires_grad_(False)
    criterion = v8SegmentationLoss(network)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    trained = [tensor for tensor in network.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [tensor for tensor in trained if tensor.ndim > 1], "weight_decay": 5e-4},
            {"params": [tensor for tensor in trained if tensor.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
    )
    batches = endless_batches(
        read_photos(arguments.photos, "train"), arguments.batch, arguments.seed
    )
    began = time.monotonic()
    for step in range(1, arguments.steps + 1):
        rate = learning_rate(step, arguments)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = next(batches)
        network.train()
        network.model[:FROZEN].eval()
        losses, _ = criterion(network(batch["img"]), batch)
        loss = losses.sum() / arguments.batch
        if not torch.isfinite(loss):
            raise SystemExit(f"loss is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 10.0)
        optimizer.step()
        update_average(average, network, min(arguments.ema, (1 + step) / (10 + step)))
        log(arguments.out, step, rate, losses / arguments.batch, time.monotonic() - began)
        if step % arguments.save_every == 0 or step == arguments.steps:
            save(average, arguments.out / "fastsam-n.safetensors")


def learning_rate(step: int, arguments: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step <= arguments.warmup:
        return arguments.learning_rate * step / arguments.warmup
    done = (step - arguments.warmup) / max(arguments.steps - arguments.warmup, 1)
    return arguments.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def update_average(average: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    state = network.state_dict()
    for name, tensor in average.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(state[name], 1 - decay)


def save(network: torch.nn.Module, path: Path) -> None:
    tensors = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    save_file(tensors, path, metadata={"yaml": "yolov8n-seg.yaml", "nc": "1"})


def log(folder: Path, step: int, rate: float, losses: torch.Tensor, seconds: float) -> None:
    box, mask, objectness, distance, _ = (round(value, 4) for value in losses.tolist())
    row = {"step": step, "lr": rate, "box": box, "mask": mask, "class": objectness}
    row |= {"dfl": distance, "seconds": round(seconds, 1)}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_photos(folder: Path, split: str) -> list[Photo]:
    """Every photo (HxWx3 uint8 RGB) with every annotator's segment map (HxW, from 1)."""
    photos: list[Photo] = []
    for path in sorted((folder / split).glob("*.jpg")):
        truth = loadmat(folder / "groundTruth" / split / f"{path.stem}.mat")["groundTruth"][0]
        maps = [one["Segmentation"][0, 0].astype(np.uint16) for one in truth]
        photos.append((cv2.imread(str(path))[..., ::-1], maps))
    return photos


def endless_batches(photos: list[Photo], size: int, seed: int) -> Iterator[dict]:
    """Batches of one shape each, landscape and portrait apart, every photo once per round."""
    random = np.random.default_rng(seed)
    while True:
        groups = [
            [photo for photo in photos if (photo[0].shape[1] > photo[0].shape[0]) == landscape]
            for landscape in (True, False)
        ]
        batches = []
        for group in groups:
            order = random.permutation(len(group))
            batches += [
                [group[i] for i in order[at : at + size]] for at in range(0, len(group), size)
            ]
        for index in random.permutation(len(batches)):
            batch = batches[index]
            long = int(random.choice(LONG_SIDES))
            aspect = 2 / 3 if random.random() < 0.5 else random.uniform(2 / 3, 1)
            short = round(long * aspect / 32) * 32
            landscape = batch[0][0].shape[1] > batch[0][0].shape[0]
            shape = (short, long) if landscape else (long, short)
            yield collate([sample(photo, shape, random) for photo in batch])


def sample(
    photo: Photo, shape: tuple[int, int], random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """One view: photo HxWx3 in [0, 1] and one annotator's segments, HxW."""
    rgb, maps = photo
    segments = maps[random.integers(len(maps))]
    height, width = segments.shape
    if random.random() < 0.5:  # a crop of up to a quarter off each side, so that objects grow
        h, w = (int(side * random.uniform(0.75, 1)) for side in (height, width))
        top, left = random.integers(height - h + 1), random.integers(width - w + 1)
        rgb, segments = (
            rgb[top : top + h, left : left + w],
            segments[top : top + h, left : left + w],
        )
    size = shape[::-1]
    rgb = cv2.resize(rgb, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    segments = cv2.resize(segments, size, interpolation=cv2.INTER_NEAREST)
    if random.random() < 0.5:
        rgb, segments = rgb[:, ::-1], segments[:, ::-1]
    if random.random() < 0.5:
        rgb = re_exposed(rgb, random.uniform(-3, 2), random)
        if random.random() < 0.5:
            rgb = film_rule(rgb)
    return np.ascontiguousarray(rgb), np.ascontiguousarray(segments)


def re_exposed(rgb: NDArray, ev: float, random: np.random.Generator) -> NDArray[np.float32]:
    """The photo taken `ev` stops brighter: gain and sensor noise in linear light, 8 bits."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) * 2.0**ev
    if ev < 0:
        shot, read = 10.0 ** random.uniform(-4.5, -3.2), 10.0 ** random.uniform(-3.5, -2.5)
        noise = random.standard_normal(rgb.shape, dtype=np.float32)
        linear = linear + noise * np.sqrt(shot * linear + read**2)
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (np.round(encoded * 255) / 255).astype(np.float32)


def film_rule(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """The photo on the `film` curve (method.md 4.1) that brings its mean luma to 119/255."""
    small = rgb[::4, ::4]
    low, high = -2.2, 2.2
    for _ in range(10):
        strength = (low + high) / 2
        luma = film(small, strength) @ np.array([0.299, 0.587, 0.114], np.float32)
        low, high = (strength, high) if luma.mean() < 119 / 255 else (low, strength)
    return film(rgb, (low + high) / 2)


def film(rgb: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    curve = (1 - (1 - rgb ** (1 / 1.6)).clip(0, 1) ** np.exp(strength)) ** 1.6
    return curve.astype(np.float32)


def collate(samples: list[tuple[NDArray[np.float32], NDArray[np.uint16]]]) -> dict:
    """A batch as v8SegmentationLoss reads it; masks at /4, numbered from 1 within each photo."""
    masks, boxes, owners = [], [], []
    for owner, (_, segments) in enumerate(samples):
        height, width = segments.shape
        quarter = segments[2::4, 2::4]
        numbered = np.zeros(quarter.shape, np.float32)
        count = 0
        for label in np.unique(quarter):
            rows, columns = np.nonzero(segments == label)
            top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
            if len(rows) < 0.001 * segments.size or min(bottom - top, right - left) < 6:
                continue  # too small for a stride of 8
            count += 1
            numbered[quarter == label] = count
            centre = ((left + right) / 2 / width, (top + bottom) / 2 / height)
            boxes.append((*centre, (right - left) / width, (bottom - top) / height))
            owners.append(owner)
        masks.append(numbered)
    photos = torch.from_numpy(np.stack([rgb for rgb, _ in samples])).permute(0, 3, 1, 2)
    return {
        "img": photos.contiguous(),
        "masks": torch.from_numpy(np.stack(masks)),
        "bboxes": torch.tensor(boxes, dtype=torch.float32),
        "cls": torch.zeros(len(boxes), 1),
        "batch_idx": torch.tensor(owners, dtype=torch.float32),
    }


if __name__ == "__main__":
    main()
