"""Toy models: fast, deterministic stand-ins that count the photos that pass through them."""

import hashlib

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.pixels import luma, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.judge import STRENGTHS
from evenlight.stages.priors.opinion import Opinion
from evenlight.stages.priors.protocols import Regions
from evenlight.stages.priors.region_embedder import DIM


class ToySegmenter:
    """Regions by four luma levels; features are the photo itself, pooled."""

    p3_channels = 4

    def __init__(self, seed: int = 0) -> None:
        self.fingerprint = hashlib.sha256(f"segmenter {seed}".encode()).hexdigest()
        self.photos = 0

    def features(self, rgb_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        proto = F.avg_pool2d(rgb_B3HW, 4).repeat(1, 11, 1, 1)[:, :32]
        return proto, F.avg_pool2d(rgb_B3HW, 8).repeat(1, 2, 1, 1)[:, :4]

    def segment(self, photo_HW3: np.ndarray) -> Regions:
        self.photos += 1
        rgb = to_float(photo_HW3)
        levels = (luma(F.avg_pool2d(rgb, 8)) * 3.99).long().add(1).float()
        labels = F.interpolate(levels, scale_factor=8)[0, 0].byte().numpy()
        proto, p3 = self.features(rgb)
        return Regions(labels=labels, proto=proto[0].half().numpy(), p3=p3[0].half().numpy())


class ToyClip:
    """Judges by mean luma: the text vectors point to dark, middle and bright."""

    dim = 3
    region_dim = DIM
    size = 64
    logit_scale = 10.0

    def __init__(self, seed: int = 0) -> None:
        self.fingerprint = hashlib.sha256(f"clip {seed}".encode()).hexdigest()
        self.photos = 0

    def embed(self, rgb_B3HW: Tensor) -> Tensor:
        self.photos += len(rgb_B3HW)
        angle = luma(rgb_B3HW).mean((1, 2, 3)) * torch.pi
        flat = torch.full_like(angle, 0.1)
        return F.normalize(torch.stack([angle.cos(), angle.sin(), flat], 1), dim=1)

    def embed_regions(self, ruled_B3SS: Tensor, photo_B3SS: Tensor, cells_BRhw: Tensor) -> Tensor:
        """Mean colours, where the embedder that ships has them."""
        colours = F.adaptive_avg_pool2d(
            torch.cat([ruled_B3SS, photo_B3SS], 1), cells_BRhw.shape[2:]
        )
        count = cells_BRhw.sum((2, 3)).clamp(min=1)[..., None]
        mean = torch.einsum("brhw,bchw->brc", cells_BRhw, colours) / count
        return F.pad(mean, (self.region_dim - mean.shape[-1], 0))

    def embed_text(self, texts: list[str]) -> Tensor:
        angles = [0.0 if "under" in t else torch.pi if "over" in t else torch.pi / 2 for t in texts]
        angle = torch.tensor(angles)
        return F.normalize(torch.stack([angle.cos(), angle.sin(), 0 * angle], 1), dim=1)


class ToyJudge:
    """Wants every photo, and every region, at the mean luma of the rule."""

    fingerprint = hashlib.sha256(b"judge").hexdigest()

    class prompts:  # noqa: N801 - stands for an object
        """d rises with brightness and is 0 at mid gray."""

        @staticmethod
        def logits(embedding_BD: Tensor) -> Tensor:
            centre = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [-1.0, 0, 0]])
            return 20 * F.normalize(embedding_BD, dim=1) @ centre.T

    def opinion(self, cached: dict[str, np.ndarray], offsets: tuple[float, ...]) -> Opinion:
        rule = float(cached["rule_strength"])
        return Opinion(0.9 if abs(rule) < 0.15 else 0.05, peak(rule))

    def region_opinions(self, cached: dict[str, np.ndarray], strength: float) -> np.ndarray:
        rows = [*range(int((cached["region_labels"] > 0).sum())), -1]
        colours = torch.from_numpy(cached["clip_regions"][rows, -3:]).float()
        return np.stack(
            [
                peak(float(t) - strength)
                for t in tone.rule_strength(
                    luma(colours[:, :, None, None]).expand(-1, 3, -1, -1), "film"
                )
            ]
        )

    def second_opinion(self, cached: dict[str, np.ndarray]) -> np.ndarray:
        return np.full(len(STRENGTHS), 1 / len(STRENGTHS))


def peak(at: float, spread: float = 0.1) -> np.ndarray:
    """Probabilities of the judge's strengths around one of them."""
    p = np.exp(-0.5 * ((STRENGTHS.double().numpy() - at) / spread) ** 2)
    return p / p.sum()


def write_photos(folder, count: int, *, size: int = 64, seed: int = 0, gammas=(0.4, 2.5)) -> None:
    """Small PNG photos of random smooth content at random exposures."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        coarse = torch.from_numpy(rng.random((1, 3, 6, 6), dtype=np.float32))
        smooth = F.interpolate(coarse, (size, size * 3 // 4), mode="bicubic").clamp(0, 1)
        exposed = smooth ** float(rng.uniform(*gammas))
        pixels = (exposed[0].permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"photo_{number:03}.png")
