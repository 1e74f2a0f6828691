"""Embeddings of all regions of a photo from one pass of clip-lite0's tower.

What the tower sees of the photo at four scales, after the mean-luma rule, is brought together from
coarse to fine (Lin et al., "Feature Pyramid Networks for Object Detection", 2017), beside the
photo's own pixels before and after the rule, and pooled over each region.  So a region is known by
what lies around it too.  Trained with the head that reads it (recipes/judge/regions.py).
"""

# B photos, C channels, R regions, S side of the square, h w cells of 4 pixels, E embedding

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.cache.errors import EnvironmentLacks, one_line
from evenlight.stages.priors.fingerprints import (
    REGION_EMBEDDER,
    SHIPPED_CLIP,
    Reading,
    shipped_reading,
)
from evenlight.stages.priors.ladder import REGION_CELL
from evenlight.stages.priors.lite0 import Tower
from evenlight.stages.settings import ClipSettings
from evenlight.stages.weights import shipped

WIDTH, PIXEL_WIDTH = 64, 32
MAPS = (24, 40, 112, 320)  # channels of the tower's maps
COLOURS = 6  # mean colours of a region, after the rule and before
DIM = 2 * WIDTH + COLOURS  # E
TINY = 1e-6


class Decoder(nn.Module):
    """The part that is trained: the tower's maps and the pixels, brought together."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Sequential(
            _layer(COLOURS, PIXEL_WIDTH // 2, stride=2),
            _layer(PIXEL_WIDTH // 2, PIXEL_WIDTH, stride=2),
        )
        self.lateral = nn.ModuleList(nn.Conv2d(channels, WIDTH, 1) for channels in MAPS)
        self.whole = nn.Linear(WIDTH, WIDTH)
        self.finer = nn.ModuleList(_layer(WIDTH, WIDTH) for _ in MAPS[1:])
        self.last = nn.Sequential(_layer(WIDTH + PIXEL_WIDTH, WIDTH), _layer(WIDTH, WIDTH))

    def forward(self, maps: list[Tensor], colours_B6SS: Tensor) -> Tensor:
        """B,WIDTH,h,w."""
        lateral = [layer(x) for layer, x in zip(self.lateral, maps, strict=True)]
        y = lateral.pop()
        y = y + self.whole(y.mean((2, 3)))[..., None, None]
        for layer, finer in zip(self.finer, reversed(lateral), strict=True):
            y = F.interpolate(y, size=finer.shape[-2:], mode="bilinear", align_corners=False)
            y = layer(y + finer)
        return self.last(torch.cat([y, self.pixels(2 * colours_B6SS - 1)], 1))


class RegionEmbedder(nn.Module):
    """tower: of clip-lite0, frozen.  reading: how it reads photos."""

    mean: Tensor
    std: Tensor

    def __init__(self, tower: Tower, decoder: Decoder, reading: Reading) -> None:
        super().__init__()
        self.tower, self.decoder = tower.requires_grad_(False), decoder
        self.register_buffer("mean", torch.tensor(reading.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(reading.std).view(3, 1, 1))

    def forward(self, ruled_B3SS: Tensor, photo_B3SS: Tensor, cells_BRhw: Tensor) -> Tensor:
        """Photos after the mean-luma rule and as they are, in [0, 1], and which cells are of which
        region (1, else 0).  B,R,E: mean and spread of what is seen, mean colours; 0 for a region
        that has no cell."""
        with torch.no_grad():
            maps = self.tower.maps((ruled_B3SS - self.mean) / self.std)
        colours = torch.cat([ruled_B3SS, photo_B3SS], 1)
        seen = self.decoder(maps, colours).float()
        mean = _pooled(seen, cells_BRhw)
        spread = (_pooled(seen.square(), cells_BRhw) - mean.square()).clamp(min=TINY).sqrt()
        return torch.cat(
            [mean, spread, _pooled(F.avg_pool2d(colours, REGION_CELL), cells_BRhw)], -1
        )


def load_region_embedder(device: str = "cpu") -> RegionEmbedder:
    """The one that ships.  Raises EnvironmentLacks where its weights are missing or damaged."""
    decoder = Decoder()
    try:
        tower = Tower(load_file(shipped(SHIPPED_CLIP)))
        decoder.load_state_dict(load_file(shipped(REGION_EMBEDDER)))
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise EnvironmentLacks(
            f"weights of {REGION_EMBEDDER} cannot be used ({one_line(error)}): "
            "install evenlight again"
        ) from error
    made = RegionEmbedder(tower, decoder.float(), shipped_reading(ClipSettings())).eval()
    return made.requires_grad_(False).to(device).to(memory_format=torch.channels_last)


def _pooled(x_BChw: Tensor, cells_BRhw: Tensor) -> Tensor:
    """Means over the cells of each region.  B,R,C."""
    count = cells_BRhw.sum((2, 3)).clamp(min=TINY)[..., None]
    return torch.einsum("brhw,bchw->brc", cells_BRhw, x_BChw) / count


def _layer(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs, momentum=0.02), nn.ReLU()
    )
