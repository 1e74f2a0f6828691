"""The corrector: a U-Net of SIMR blocks that gives back what exposure took from a photo.

docs/method.md 6. How bright a photo and its regions should be is the judge's word: film strengths
come in.  The network answers for structure: where the strength should differ, which colour fills
highlights that were lost, and a residual.  Untrained it is the film curve at the judge's strengths:
its head ends in zero-initialised layers.
"""

# B batch, C channels, H W pixels of the photo, h w of a feature map

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenlight.stages.corrector.blocks import SIMR, Pointwise
from evenlight.stages.corrector.correction import Correction, lost
from evenlight.stages.corrector.inputs import padded
from evenlight.stages.pixels import fit, luma
from evenlight.stages.priors import tone
from evenlight.stages.settings import SIZES, NetworkSettings

MAX_OFFSET = 1.6  # how far the strength of a pixel may lie from the judge's
MAX_SHIFT = 1.0  # of a fill's colour from the grey that the curve makes of white
MAX_RESIDUAL = (0.06, 0.2)  # in light and in the dark, where noise is lifted
WHOLE_FROM = 0.3  # |strength| (rms of a photo) from which on the answer counts in full
PROTO_CHANNELS = 32  # FastSAM mask prototypes
SEEN = 9  # planes that the tone head's network sees: photo, toned photo, what is lost
# Before the tanh: offset moves slowly, lest training starts with photos too dark or too bright; the
# cover fast, since it is to be near 0 or 1.
GAINS = (0.3, 0.3, 0.3, 5.0, 0.5, 0.5, 0.5)
Layer = TypeVar("Layer", bound=nn.Conv2d)


class Corrector(nn.Module):
    """Predicts a Correction from a photo, its strengths, and FastSAM features of its re-exposed
    copy."""

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
        self.is_tone = settings.head == "tone"
        self.unshuffle = nn.PixelUnshuffle(size.stem)
        planes = SEEN * size.stem**2 + 2 if self.is_tone else 3 * size.stem**2
        self.stem = nn.Conv2d(planes, widths[0], 3, padding=1)
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
        self.head = (ToneHead if self.is_tone else ResidualHead)(widths[0], size.stem)
        self.to(memory_format=torch.channels_last)

    def forward(
        self, photo_B3HW: Tensor, proto_B32hw: Tensor, p3_BChw: Tensor, given_B1HW: Tensor
    ) -> Correction:
        """Predict the correction of photos of any size from 16 pixels up.

        photo_B3HW: float RGB in [0, 1], sRGB; proto_B32hw at 1/4 and p3_BChw at 1/8 of its size.
        given_B1HW: float, the judge's strengths; the residual head, which answers for brightness
        too, does not look at them.
        """
        height, width = photo_B3HW.shape[2:]
        inputs = padded(photo_B3HW, proto_B32hw, p3_BChw, given_B1HW.float(), self.multiple)
        return Correction(*(fit(part, height, width) for part in self.whole(*inputs)))

    def whole(
        self, photo_B3HW: Tensor, proto_B32hw: Tensor, p3_BChw: Tensor, given_B1HW: Tensor
    ) -> Correction:
        """`forward` of a photo whose sides are multiples of `self.multiple`: what is exported."""
        answer = self._answer(photo_B3HW, proto_B32hw, p3_BChw, given_B1HW)
        return self._correction(photo_B3HW, given_B1HW, answer.float())

    @torch.inference_mode()
    def correction_of(
        self, photo_13HW: Tensor, proto_132hw: Tensor, p3_1Chw: Tensor, given_11HW: Tensor
    ) -> Correction:
        """`forward` of one photo, whose tensors lie on the CPU, as the answer does."""
        device = next(self.parameters()).device
        inputs = (x.to(device) for x in (photo_13HW, proto_132hw, p3_1Chw, given_11HW))
        return Correction(*(part.cpu() for part in self(*inputs)))

    def _answer(self, photo: Tensor, proto: Tensor, p3: Tensor, given_B1HW: Tensor) -> Tensor:
        """What the head says, B,10 (residual head: B,3) at the size of the photo, whose sides are
        multiples of `self.multiple`."""
        x = self.stem(self._seen(photo, given_B1HW))
        semantics = self.semantics(
            proto,
            p3,
            [(x.shape[2] // 2**m, x.shape[3] // 2**m) for m in range(len(self.size.blocks))],
        )
        skips = []
        for m, down in enumerate(self.down):
            x = self.encoder[m](x, semantics[m])
            skips.append(x)
            x = down(x)
        x = self.encoder[-1](x, semantics[-1])
        for m in reversed(range(len(skips))):
            x = self.merge[m](torch.cat([self.up[m](x), skips[m]], dim=1))
            x = self.decoder[m](x, semantics[m])
        return self.head(x)

    def _seen(self, photo_B3HW: Tensor, given_B1HW: Tensor) -> Tensor:
        """What the stem reads, at its size."""
        if not self.is_tone:
            seen = self.unshuffle(photo_B3HW)
            return seen.contiguous(memory_format=torch.channels_last)
        family = self.settings.family
        toned = tone.apply(family, photo_B3HW, given_B1HW)
        white = tone.apply(family, torch.ones_like(given_B1HW), given_B1HW)
        seen = torch.cat([photo_B3HW - 0.5, toned - 0.5, lost(photo_B3HW)], dim=1)
        planes = F.avg_pool2d(torch.cat([given_B1HW, white], dim=1), self.size.stem)
        seen = torch.cat([self.unshuffle(seen), planes], dim=1)
        return seen.contiguous(memory_format=torch.channels_last)

    def _correction(self, photo: Tensor, given_B1HW: Tensor, answer: Tensor) -> Correction:
        """What the head's answer says of this photo."""
        if not self.is_tone:
            nothing = torch.zeros_like(answer)
            return Correction(nothing[:, :1], nothing, nothing[:, :1], nothing, answer)
        offset, cover, shift, residual = answer.tanh().split([3, 1, 3, 3], dim=1)
        rms_B111 = given_B1HW.square().mean((1, 2, 3), keepdim=True).sqrt()
        share = (rms_B111 / WHOLE_FROM).clamp(max=1)
        filled = (-given_B1HW / WHOLE_FROM).clamp(0, 1)
        light, dark = MAX_RESIDUAL
        most = light + (dark - light) * (1 - luma(photo.float())) ** 4
        return Correction(
            given_B1HW=given_B1HW,
            strength_B3HW=given_B1HW + share * MAX_OFFSET * offset,
            cover_B1HW=filled * cover,
            shift_B3HW=filled * MAX_SHIFT * shift,
            residual_B3HW=share * most * residual,
        )


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
    """The paper's head: a residual in RGB, B,3,H,W."""

    def __init__(self, channels: int, stem: int) -> None:
        super().__init__()
        self.conv = _zeroed(nn.Conv2d(channels, 3 * stem**2, 3, padding=1))
        self.shuffle = nn.PixelShuffle(stem)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.shuffle(self.conv(x_BChw))


class ToneHead(nn.Module):
    """Before their tanh: smooth maps (bilinear from the stem's size) of the strength's offset (3
    channels), the fill's cover (1) and shift (3), and a residual (3).  B,10,H,W."""

    def __init__(self, channels: int, stem: int) -> None:
        super().__init__()
        self.stem = stem
        self.conv = _zeroed(nn.Conv2d(channels, 7 + 3 * stem**2, 3, padding=1))
        self.shuffle = nn.PixelShuffle(stem)

    def forward(self, x_BChw: Tensor) -> Tensor:
        smooth, residual = self.conv(x_BChw).tensor_split([7], dim=1)
        smooth = smooth * smooth.new_tensor(GAINS).view(1, 7, 1, 1)
        if self.stem > 1:
            smooth = F.interpolate(smooth, scale_factor=float(self.stem), mode="bilinear")
        return torch.cat([smooth, self.shuffle(residual)], dim=1)


def _zeroed(layer: Layer) -> Layer:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
