"""The tone reading of the meter: its photos, its ensemble, its file (see train.py)."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.stages.pixels import to_bytes, to_float
from evenlight.stages.priors import meter, tone
from recipes.clip_lite0 import data as camera

# N examples, F features

Photo = NDArray[np.uint8]
SUFFIXES = {".jpg", ".jpeg", ".png"}
GOOD_SIDE = 384  # long side at which good photos are read, pixels
EV_RANGE = (0.3, 2.5)  # of the darker and the brighter copy of a good photo
MAX_OFFSET = 0.9  # beyond the rule's strength
GOOD_STRENGTH = 0.12  # a bracket's frame that needs no more than this is good

NETWORKS, HIDDEN, STEPS, BATCH = 6, 32, 1200, 256
LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 3e-3, 0.1, (0.1, 0.3)
GOOD_SHARE = 1.6  # good photos are drawn so much more often than frames of brackets
# Good photos are darker (BSDS500) or of any brightness (web): what they say of the strength counts
# less, or the frames of real brackets are corrected too little.
GOOD_STRENGTH_WEIGHT = 0.15


@dataclass(frozen=True)
class Examples:
    features: Tensor  # N,F float32
    offset: Tensor  # N, strength beyond the rule
    good: Tensor  # N, 0 or 1
    share: Tensor  # N, how often each is drawn, before normalising
    is_bracket: Tensor  # N, bool


def one_set(
    features: list[Tensor], offsets: list[float], good: list[bool], share: float, bracket: bool
) -> Examples:
    """Examples that share one total."""
    count = len(features)
    return Examples(
        torch.stack(features),
        torch.tensor(offsets).clamp(-MAX_OFFSET, MAX_OFFSET),
        torch.tensor(good).float(),
        torch.full((count,), share / count),
        torch.full((count,), bracket),
    )


def joined(sets: list[Examples]) -> Examples:
    return Examples(*(torch.cat(parts) for parts in zip(*map(_tensors, sets), strict=True)))


def good_examples(folders: list[Path], seed: int) -> Examples:
    """Every photo as it is, and one darker and one brighter copy, exposed by half by a camera."""
    rng = np.random.default_rng(seed)
    features, offsets, good = [], [], []
    for path in (p for folder in folders for p in sorted(folder.rglob("*"))):
        if path.suffix.lower() not in SUFFIXES:
            continue
        photo = shrunk(cv2.imread(str(path))[..., ::-1])
        for ev in (0.0, -rng.uniform(*EV_RANGE), rng.uniform(*EV_RANGE)):
            shot = re_exposed(photo, ev, rng)
            rgb = to_float(shot)
            features.append(meter.tone_features(rgb)[0])
            undone = strength_to(shot, photo) if ev else 0.0
            offsets.append(undone - float(tone.rule_strength(rgb, meter.FAMILY)[0]))
            good.append(ev == 0)
    return one_set(features, offsets, good, GOOD_SHARE, bracket=False)


def shrunk(photo: Photo) -> Photo:
    scale = min(1.0, GOOD_SIDE / max(photo.shape[:2]))
    small = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small)


def re_exposed(photo: Photo, ev: float, rng: np.random.Generator) -> Photo:
    """By a shift in linear light, or by a camera of its own curve, noise and JPEG."""
    if not ev:
        return photo
    if rng.random() < 0.5:
        return to_bytes(tone.apply("ev", to_float(photo), ev / tone.EV_PER_STRENGTH)).numpy()
    return camera.camera(photo, ev, rng)


def strength_to(photo: Photo, target: Photo) -> float:
    """Strength of the film curve at which the photo is nearest to the target (least squares)."""
    strengths = torch.linspace(-3, 3, 121)
    curves = tone.apply(meter.FAMILY, torch.arange(256) / 255, strengths[:, None]).numpy()
    counts = np.bincount(photo.ravel(), minlength=256)
    sums = np.bincount(photo.ravel(), weights=target.ravel() / 255, minlength=256)
    errors = (curves.astype(np.float64) ** 2) @ counts - 2 * curves @ sums
    return float(strengths[int(errors.argmin())])


class Network(nn.Module):
    """Standardised features to a strength beyond the rule (of OUTPUT_SCALE) and log-odds."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(num_features, HIDDEN), nn.Linear(HIDDEN, 2)

    def forward(self, x_NF: Tensor) -> Tensor:
        first, second = DROPOUT
        x_NF = F.gelu(self.hidden(F.dropout(x_NF, first, self.training)))
        return self.last(F.dropout(x_NF, second, self.training))


def standardised(examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
    """Features within +-5, and the mean and scale that make them so."""
    share = examples.share / examples.share.sum()
    mean, scale = share @ examples.features, examples.features.std(0) + 1e-4
    return ((examples.features - mean) / scale).clamp(-5, 5), mean, scale


def train(examples: Examples, x_NF: Tensor, seed: int) -> Network:
    """One network of the ensemble."""
    torch.manual_seed(seed)
    network = Network(x_NF.shape[1])
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    weight = torch.where(examples.is_bracket, 1.0, GOOD_STRENGTH_WEIGHT)
    for _ in range(STEPS):
        rows = torch.multinomial(examples.share, BATCH, replacement=True)
        answer = network(x_NF[rows])
        error = meter.OUTPUT_SCALE * answer[:, 0] - examples.offset[rows]
        judged = F.binary_cross_entropy_with_logits(answer[:, 1], examples.good[rows])
        loss = 10 * (weight[rows] * error.square()).mean() + 0.5 * judged
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


def write(examples: Examples, out: Path) -> None:
    """Train the ensemble and write the file that the package ships."""
    x_NF, mean, scale = standardised(examples)
    states = [train(examples, x_NF, seed).state_dict() for seed in range(NETWORKS)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    save_file({"mean": mean, "scale": scale, **stacked}, out)


def _tensors(examples: Examples) -> tuple[Tensor, ...]:
    return tuple(vars(examples).values())
