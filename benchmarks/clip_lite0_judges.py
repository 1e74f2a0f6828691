"""The judges that the benchmark of clip-lite0 compares (see measure_clip_lite0.py).

A judge turns photos into three logits: under, normal, over. Beside the CLIP stand mean luma alone
and a linear probe on the untouched ImageNet tower, both fitted on re-exposed training photos.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.stages.priors.clip import Clip
from evenlight.stages.priors.prompts import Scorer
from recipes.clip_lite0 import data, photos

# N photos, C features

EVS = (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)
SIZE = 128
WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2)
Photos = list[np.ndarray]  # each H,W,3 float32 RGB in [0, 1], one size
Judge = Callable[[Photos], np.ndarray]  # -> N,3 logits


def stacked(images: Photos) -> list[Tensor]:
    """Float B,3,H,W parts of 64 photos."""
    parts = [np.stack(images[i : i + 64]).transpose(0, 3, 1, 2) for i in range(0, len(images), 64)]
    return [torch.from_numpy(np.ascontiguousarray(p)) for p in parts]


def embeddings(clip: Clip, images: Photos) -> Tensor:
    return torch.cat([clip.embed(part) for part in stacked(images)])


def clip_judge(clip: Clip, scorer: Scorer) -> Judge:
    return lambda images: scorer.logits(embeddings(clip, images)).numpy()


def luma_features(images: Photos) -> Tensor:
    return torch.tensor([[float(i.reshape(-1, 3).mean(0) @ photos.LUMA)] for i in images])


class Tower:
    """Mean features of the ImageNet tower, photos squashed and normalised as for clip-lite0."""

    def __init__(self, weights: Path) -> None:
        self.net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        values = torch.load(weights, weights_only=True).values()
        self.net.load_state_dict(dict(zip(self.net.state_dict(), values, strict=True)))
        self.net.reset_classifier(0)
        self.net.eval().to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Photos) -> Tensor:
        rows = []
        for part in stacked(images):
            x = F.interpolate(part, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 1)
            x = ((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)
            rows.append(self.net(x))
        return torch.cat(rows)


@dataclass(frozen=True)
class Probe:
    """Standardised features through one linear layer to three logits."""

    features: Callable[[Photos], Tensor]
    mean: Tensor
    deviation: Tensor
    layer: nn.Linear

    @torch.no_grad()
    def __call__(self, images: Photos) -> np.ndarray:
        x = (self.features(images) - self.mean) / self.deviation
        return self.layer(x).numpy()


def re_exposed(good: list[np.ndarray], seed: int, every: int = 1) -> tuple[Photos, np.ndarray]:
    """Photos SIDE,SIDE,3 uint8 at all EVS (or, in turn, every few of them), and their EVs."""
    rng = np.random.default_rng(seed)
    images, evs = [], []
    for index, photo in enumerate(good):
        for ev in EVS[index % every :: every]:
            shot = data.camera(photo, ev, rng) if ev else photo
            images.append(shot.astype(np.float32) / 255)
            evs.append(ev)
    return images, np.array(evs)


def fitted(features: Callable[[Photos], Tensor], train: tuple, held: tuple) -> Probe:
    """Softmax regression on training photos; the weight decay and the temperature are those of
    least cross-entropy on held-out ones.  train, held: (photos, EVs).
    """
    x, y = features(train[0]), _labels(train[1])
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    held_x, held_y = (features(held[0]) - mean) / deviation, _labels(held[1])
    best_loss, best_layer = np.inf, None
    for decay in WEIGHT_DECAYS:
        layer = _regression((x - mean) / deviation, y, decay)
        with torch.no_grad():
            logits = layer(held_x)
            for factor in torch.logspace(-0.7, 0.7, 41):
                loss = F.cross_entropy(factor * logits, held_y).item()
                if loss < best_loss:
                    best_loss, best_layer, best_factor = loss, layer, factor
    assert best_layer is not None
    with torch.no_grad():
        best_layer.weight *= best_factor
        best_layer.bias *= best_factor
    return Probe(features, mean, deviation, best_layer)


def _labels(evs: np.ndarray) -> Tensor:
    return torch.from_numpy(np.sign(evs) + 1).long()


def _regression(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    layer = nn.Linear(x.shape[1], 3)
    nn.init.zeros_(layer.weight)
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(layer(x), y) + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return layer
