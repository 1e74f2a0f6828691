"""The corrector: a U-Net of SIMR blocks that predicts how to re-expose a photo.

docs/method.md 6. Untrained it is the identity: both heads end in zero-initialised layers.
"""

# B batch, C channels, H W pixels of the photo, h w of a feature map

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenlight.stages.corrector.blocks import SIMR, ChannelNorm, Pointwise
from evenlight.stages.pixels import luma
from evenlight.stages.priors import meter, tone
from evenlight.stages.settings import SIZES, NetworkSettings

MAX_STRENGTH = 2.2  # |t| never exceeds it
MAX_RESIDUAL = 0.1  # the most of its own content that the tone head adds
PROTO_CHANNELS = 32  # FastSAM mask prototypes
SMALL_SIDE = 32  # side of the copy that global statistics are taken from, pixels
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NUM_STATISTICS = 6 + len(QUANTILES)
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class Correction(NamedTuple):
    """What the corrector answers, at the size of the photo."""

    # t map per colour channel, |t| <= 2.2; 0 for the residual head
    strength_B3HW: Tensor  # noqa: N815
    # added after the tone operator; within +-0.1 for the tone head
    residual_B3HW: Tensor  # noqa: N815


def correct(photo_B3HW: Tensor, correction: Correction, family: str) -> Tensor:
    """The corrected photo, not clamped, float32 B,3,H,W: the tone operator, then the residual."""
    toned = tone.apply(family, photo_B3HW, correction.strength_B3HW.float())
    return toned + correction.residual_B3HW.float()


class Corrector(nn.Module):
    """Predicts a Correction from a photo and the FastSAM features of its re-exposed copy."""

    def __init__(self, settings: NetworkSettings, p3_channels: int) -> None:
        super().__init__()
        size = SIZES[settings.size]
        widths = [size.channels * 2**m for m in range(len(size.blocks))]
        self.settings, self.size, self.p3_channels = settings, size, p3_channels
        self.multiple = size.stem * 2 ** (len(widths) - 1)
        self.multiple = max(8, self.multiple)  # features at /4 and /8 must fit as well

        def simr(m: int) -> SIMR:
            return SIMR(
                widths[m],
                num_blocks=size.blocks[m],
                ssm=m >= size.ssm_from,
                attention=settings.attention,
            )

        self.semantics = Semantics(p3_channels, size.semantic, widths)
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(size.stem), nn.Conv2d(3 * size.stem**2, widths[0], 3, padding=1)
        )
        self.encoder = nn.ModuleList(simr(m) for m in range(len(widths)))
        upper = range(len(widths) - 1)
        self.down = nn.ModuleList(
            nn.Conv2d(widths[m], widths[m + 1], 4, stride=2, padding=1) for m in upper
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(widths[m + 1], widths[m], 2, stride=2) for m in upper
        )
        self.merge = nn.ModuleList(Pointwise(2 * widths[m], widths[m]) for m in upper)
        self.decoder = nn.ModuleList(simr(m) for m in upper)
        is_tone = settings.head == "tone"
        self.head = (ToneHead if is_tone else ResidualHead)(widths[0], size.stem)
        self.brightness = GlobalStrength(widths[-1], settings.family) if is_tone else None
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        photo_B3HW: Tensor,
        proto_B32hw: Tensor,
        p3_BChw: Tensor,
        whole_B3HW: Tensor | None = None,
    ) -> Correction:
        """Predict the correction of photos of any size from 16 pixels up.

        photo_B3HW: float RGB in [0, 1], sRGB; proto_B32hw at 1/4 and p3_BChw at 1/8 of its size.
        whole_B3HW: where `photo` is a crop, a copy (any size) of the whole photo it was cut from,
        which decides the global brightness; default: the photo itself.
        """
        height, width = photo_B3HW.shape[2:]
        padded_height, padded_width = (side + -side % self.multiple for side in (height, width))
        x = _fit(photo_B3HW, padded_height, padded_width)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        semantics = self.semantics(
            _fit(proto_B32hw, padded_height // 4, padded_width // 4),
            _fit(p3_BChw, padded_height // 8, padded_width // 8),
            [(x.shape[2] >> m, x.shape[3] >> m) for m in range(len(self.size.blocks))],
        )
        skips = []
        for m, down in enumerate(self.down):
            x = self.encoder[m](x, semantics[m])
            skips.append(x)
            x = down(x)
        bottom = x = self.encoder[-1](x, semantics[-1])
        for m in reversed(range(len(skips))):
            x = self.merge[m](torch.cat([self.up[m](x), skips[m]], dim=1))
            x = self.decoder[m](x, semantics[m])
        tau, rho = (_fit(part, height, width) for part in self.head(x))
        if self.brightness is None:
            return Correction(tau, rho)
        whole = photo_B3HW if whole_B3HW is None else whole_B3HW
        tau = tau.float() + self.brightness(bottom, whole)[:, None, None, None]
        return Correction(MAX_STRENGTH * tau.tanh(), MAX_RESIDUAL * rho.float().tanh())


class Semantics(nn.Module):
    """F_s: one convolution over FastSAM prototypes and P3, resized to every scale."""

    def __init__(self, p3_channels: int, channels: int, widths: list[int]) -> None:
        super().__init__()
        self.proto = Pointwise(PROTO_CHANNELS, channels)
        self.p3 = Pointwise(p3_channels, channels)
        self.mix = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.to_scale = nn.ModuleList(Pointwise(2 * channels, width) for width in widths)

    def forward(
        self, proto_B32hw: Tensor, p3_BChw: Tensor, sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        proto, p3 = self.proto(proto_B32hw), self.p3(p3_BChw)
        p3 = F.interpolate(p3, scale_factor=2.0, mode="nearest")
        mixed = self.mix(torch.cat([proto, p3], dim=1))
        return [
            F.interpolate(conv(mixed), size=size, mode="bilinear", align_corners=False)
            for conv, size in zip(self.to_scale, sizes, strict=True)
        ]


class ResidualHead(nn.Module):
    """The paper's head: a residual in RGB.  Returns (0, residual), B,3,H,W each."""

    def __init__(self, channels: int, stem: int) -> None:
        super().__init__()
        self.conv = _zeroed(nn.Conv2d(channels, 3 * stem**2, 3, padding=1))
        self.shuffle = nn.PixelShuffle(stem)

    def forward(self, x_BChw: Tensor) -> tuple[Tensor, Tensor]:
        residual = self.shuffle(self.conv(x_BChw))
        return torch.zeros_like(residual), residual


class ToneHead(nn.Module):
    """Before their tanh: a smooth strength map (bilinear from the stem's size) and a residual."""

    def __init__(self, channels: int, stem: int) -> None:
        super().__init__()
        self.stem = stem
        self.conv = _zeroed(nn.Conv2d(channels, 3 + 3 * stem**2, 3, padding=1))
        self.shuffle = nn.PixelShuffle(stem)

    def forward(self, x_BChw: Tensor) -> tuple[Tensor, Tensor]:
        tau, rho = self.conv(x_BChw).tensor_split([3], dim=1)
        if self.stem > 1:
            tau = F.interpolate(tau, scale_factor=float(self.stem), mode="bilinear")
        return tau, self.shuffle(rho)


class GlobalStrength(nn.Module):
    """One strength (before tanh) for the whole photo, so that the map answers for space and colour.

    Brightness decides most of PSNR. From pooled bottom features and statistics of the photo, among
    them the strength that the meter asks for: the meter is one weight away.
    """

    def __init__(self, channels: int, family: str) -> None:
        super().__init__()
        self.family = family
        self.norm = ChannelNorm(channels)
        self.hidden = nn.Sequential(nn.Linear(channels + NUM_STATISTICS, 64), nn.GELU())
        self.last = _zeroed(nn.Linear(64 + NUM_STATISTICS, 1))

    def forward(self, bottom_BChw: Tensor, whole_B3HW: Tensor) -> Tensor:
        pooled = self.norm(bottom_BChw.mean((2, 3), keepdim=True)).flatten(1)
        statistics = photo_statistics(whole_B3HW, self.family)
        with torch.autocast(pooled.device.type, enabled=False):
            hidden = self.hidden(torch.cat([pooled.float(), statistics], dim=1))
            return self.last(torch.cat([hidden, statistics], dim=1)).squeeze(1)


@torch.no_grad()
def photo_statistics(photo_B3HW: Tensor, family: str) -> Tensor:
    """What a light meter and a histogram say, each about within +-2, from a 32-pixel copy.

    The meter's strength (before tanh); mean, spread and quantiles of luma; colour cast.
    Returns float32 B,NUM_STATISTICS.
    """
    small = F.adaptive_avg_pool2d(photo_B3HW.float(), SMALL_SIDE)
    metered = meter.matrix_strength(small, family) / MAX_STRENGTH
    luma_BL = luma(small).flatten(1)
    mean_B = luma_BL.mean(1)
    levels_BQ = luma_BL.quantile(luma_BL.new_tensor(QUANTILES), dim=1).T
    cast_B3 = small.mean((2, 3)) - mean_B[:, None]
    columns = [
        metered.clamp(-0.98, 0.98).atanh()[:, None],
        4 * (mean_B[:, None] - 0.5),
        4 * (luma_BL.std(1, keepdim=True) - 0.2),
        4 * (levels_BQ - 0.5),
        10 * cast_B3,
    ]
    return torch.cat(columns, dim=1)


def _fit(x_BChw: Tensor, height: int, width: int) -> Tensor:
    """Crop or replicate-pad at the bottom and right to the size."""
    x_BChw = x_BChw[..., :height, :width]
    bottom, right = height - x_BChw.shape[2], width - x_BChw.shape[3]
    if bottom or right:
        x_BChw = F.pad(x_BChw, (0, right, 0, bottom), mode="replicate")
    return x_BChw


def _zeroed(layer: Layer) -> Layer:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
