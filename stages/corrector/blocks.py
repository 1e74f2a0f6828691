"""The building blocks of the corrector: semantic fusion and residual spatial-Mamba groups.

docs/method.md 6. Images are kept in channels-last memory, so that a normalisation over
channels, a 1x1 convolution and the scan all read the same layout without a copy.
"""

# B batch, C channels, D = 2C inner channels, H W pixels, L = H*W tokens (raster order)

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evenlight.stages.corrector.scan import scan

DILATIONS = (1, 3, 5)  # of the state fusion


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel.  B,C,H,W in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        return F.layer_norm(x_BHWC, self.weight.shape, self.weight, self.bias, 1e-6).permute(
            0, 3, 1, 2
        )


class Pointwise(nn.Linear):
    """A 1x1 convolution as one matrix product over channels-last memory.  B,C,H,W in and out."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


class SemanticFusion(nn.Module):
    """ASF: image features re-weighted by the semantic features, then a spatial-frequency step.

    attention: "element" re-weights heads at each pixel (weights of mean 1); "channel" mixes
    channels by a C x C matrix per head.
    """

    def __init__(self, channels: int, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.num_heads = max(2, channels // 16)
        self.norm_image, self.norm_semantic = ChannelNorm(channels), ChannelNorm(channels)
        self.query = nn.Sequential(Pointwise(channels, channels), depthwise(channels))
        self.key_value = nn.Sequential(Pointwise(channels, 2 * channels), depthwise(2 * channels))
        if attention == "channel":
            self.temperature = nn.Parameter(torch.ones(self.num_heads, 1, 1))
        self.project = Pointwise(channels, channels)
        self.norm = ChannelNorm(channels)
        self.spatial = nn.Sequential(Pointwise(channels, 2 * channels), depthwise(2 * channels))
        self.frequency = Frequency(channels)
        self.join = Pointwise(2 * channels, channels)

    def forward(self, image_BCHW: Tensor, semantic_BCHW: Tensor) -> Tensor:
        q = self.query(self.norm_semantic(semantic_BCHW))
        k, v = self.key_value(self.norm_image(image_BCHW)).chunk(2, dim=1)
        attend = self._per_element if self.attention == "element" else self._per_channel
        skip = image_BCHW + self.project(attend(q, k, v))
        mixed = self.norm(skip)
        content, gate = self.spatial(mixed).chunk(2, dim=1)
        both = torch.cat([F.gelu(content) * gate, self.frequency(mixed)], dim=1)
        return skip + self.join(both)

    def _per_element(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """v times the map A_m: a softmax over heads at each pixel, scaled to mean 1."""
        heads = (self.num_heads, q.shape[1] // self.num_heads)
        similarity = (q * k).unflatten(1, heads).sum(2) / math.sqrt(heads[1])
        map_BHeadsHW = self.num_heads * similarity.softmax(dim=1)
        return (map_BHeadsHW.unsqueeze(2) * v.unflatten(1, heads)).flatten(1, 2)

    def _per_channel(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Transposed attention: channels of a head attend to each other over the whole image."""
        heads = (self.num_heads, q.shape[1] // self.num_heads)
        q, k, values = (x.unflatten(1, heads).flatten(3) for x in (q, k, v))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixing = (q @ k.mT * self.temperature).softmax(dim=-1)
        return (mixing @ values).flatten(1, 2).unflatten(2, v.shape[2:])


class Frequency(nn.Module):
    """1x1 mixing of the spectrum of the whole map, in float32.  B,C,H,W in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = Pointwise(channels, channels)
        width = 2 * channels  # real and imaginary parts
        self.mix = nn.Sequential(Pointwise(width, width), nn.GELU(), Pointwise(width, width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.enter(x_BCHW)
        if torch.compiler.is_exporting():
            fourier = Fourier(*x_BCHW.shape[2:])
            return fourier.inverse(*self._mixed(*fourier.forward(x_BCHW)))
        with torch.autocast(x_BCHW.device.type, enabled=False):
            spectrum = torch.fft.rfft2(x_BCHW.float(), norm="ortho")
            real, imag = (x.contiguous() for x in self._mixed(spectrum.real, spectrum.imag))
            return torch.fft.irfft2(torch.complex(real, imag), s=x_BCHW.shape[2:], norm="ortho")

    def _mixed(self, real: Tensor, imag: Tensor) -> tuple[Tensor, Tensor]:
        parts = torch.cat([real, imag], dim=1)
        real, imag = (parts + self.mix(parts)).chunk(2, dim=1)
        return real, imag


class Fourier:
    """rfft2 and irfft2 (norm "ortho") as matrix products, as ONNX can say them for any size.

    height, width: of the map.  Half spectra are pairs (real, imag), B,C,H,W//2+1.
    """

    def __init__(self, height: int, width: int) -> None:
        self.cos_H, self.sin_H = _waves(height, height)
        self.cos_W, self.sin_W = _waves(width // 2 + 1, width)
        column = torch.arange(width // 2 + 1)
        alone = (column == 0) | (2 * column == width)  # the others stand for their mirror image too
        self.times_W = torch.where(alone, 1.0, 2.0)[:, None]

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        real, imag = x_BCHW @ self.cos_W.T, -(x_BCHW @ self.sin_W.T)
        return (
            self.cos_H @ real + self.sin_H @ imag,
            self.cos_H @ imag - self.sin_H @ real,
        )

    def inverse(self, real: Tensor, imag: Tensor) -> Tensor:
        real, imag = (
            self.cos_H @ real - self.sin_H @ imag,
            self.cos_H @ imag + self.sin_H @ real,
        )
        return real @ (self.cos_W * self.times_W) - imag @ (self.sin_W * self.times_W)


def _waves(count: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi k t / length, over sqrt(length): k from 0 to count, t to length."""
    k, t = torch.arange(count)[:, None], torch.arange(length)
    size = torch.ones_like(t).sum()  # a tensor: a number would become a constant of the export
    angle = (2 * math.pi) * ((k * t) % size).float() / size
    return angle.cos() / size.sqrt(), angle.sin() / size.sqrt()


class SpatialMamba(nn.Module):
    """Selective state space over the tokens of an image, state size 1.  B,C,H,W in and out.

    fusion: True mixes the image-shaped states of neighbours (dilated 3x3 kernels, identity at
    initialisation, replicate padding always); False scans in both directions instead.
    """

    def __init__(self, channels: int, fusion: bool) -> None:
        super().__init__()
        inner, self.rank = 2 * channels, math.ceil(channels / 16)
        self.enter = Pointwise(channels, 2 * inner, bias=False)
        self.local = depthwise(inner)
        self.select = nn.Linear(inner, self.rank + 2, bias=False)
        self.step = nn.Linear(self.rank, inner)
        with torch.no_grad():  # softplus(bias) log-uniform in [1e-3, 1e-1]: memory of 10 to 1000
            wanted = torch.exp(torch.empty(inner).uniform_(math.log(1e-3), math.log(1e-1)))
            self.step.bias.copy_(wanted + torch.log(-torch.expm1(-wanted)))
        self.decay_log = nn.Parameter(torch.zeros(inner))
        self.skip = nn.Parameter(torch.ones(inner, 1, 1))
        self.norm = ChannelNorm(inner)
        self.leave = Pointwise(inner, channels, bias=False)
        self.fusion: nn.ParameterList | None = None
        if fusion:
            self.fusion = nn.ParameterList(torch.zeros(inner, 1, 3, 3) for _ in DILATIONS)
            nn.init.dirac_(self.fusion[0], groups=inner)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        u, z = self.enter(x_BCHW).chunk(2, dim=1)
        u = F.silu(self.local(u))
        h, c = self._states(u)
        if self.fusion is not None:
            h = self._fuse(h)
        y = h * c + self.skip * u
        return self.leave(self.norm(y) * F.silu(z))

    def _states(self, u_BDHW: Tensor) -> tuple[Tensor, Tensor]:
        """States B,D,H,W and read-out weights B,1,H,W, both float32."""
        height, width = u_BDHW.shape[2:]
        with torch.autocast(u_BDHW.device.type, enabled=False):
            u_BLD = u_BDHW.float().permute(0, 2, 3, 1).flatten(1, 2)
            rank_BLR, b_BL1, c_BL1 = self.select(u_BLD).split([self.rank, 1, 1], dim=-1)
            step_BLD = F.softplus(self.step(rank_BLR))
            a_BDL = torch.exp(-step_BLD * self.decay_log.exp()).mT
            input_BDL = (step_BLD * (b_BL1 * u_BLD)).mT
            h_BDL = scan(a_BDL, input_BDL)
            if self.fusion is None:
                h_BDL = h_BDL + scan(a_BDL, input_BDL, reverse=True)
        as_image = (height, width)
        return (
            h_BDL.mT.unflatten(1, as_image).permute(0, 3, 1, 2),
            c_BL1.unflatten(1, as_image).permute(0, 3, 1, 2),
        )

    def _fuse(self, h_BDHW: Tensor) -> Tensor:
        kernels = cast(nn.ParameterList, self.fusion)
        fused = torch.zeros_like(h_BDHW)
        for kernel, q in zip(kernels, DILATIONS, strict=True):
            padded = F.pad(h_BDHW, (q, q, q, q), mode="replicate")
            fused = fused + F.conv2d(padded, kernel, dilation=q, groups=kernel.shape[0])
        return fused


class ChannelAttentionBlock(nn.Module):
    """CAB: two 3x3 convolutions through C/3 channels and squeeze-excite.  B,C,H,W in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow, squeezed = max(4, channels // 3), max(4, channels // 8)
        self.convs = nn.Sequential(
            nn.Conv2d(channels, narrow, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(narrow, channels, 3, padding=1),
        )
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            Pointwise(channels, squeezed),
            nn.ReLU(),
            Pointwise(squeezed, channels),
            nn.Sigmoid(),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.convs(x_BCHW)
        return x_BCHW * self.excite(x_BCHW)


class ResidualMambaBlock(nn.Module):
    """RSMB: y = alpha x + SSM(LN(x)), out = beta y + CAB(LN(y)).

    ssm: "fused" or "two_way" (SpatialMamba with and without fusion), or "none": out only.
    """

    def __init__(self, channels: int, ssm: str) -> None:
        super().__init__()
        self.mamba: SpatialMamba | None = None
        if ssm != "none":
            self.norm_in = ChannelNorm(channels)
            self.mamba = SpatialMamba(channels, fusion=ssm == "fused")
            self.alpha = nn.Parameter(torch.ones(channels, 1, 1))
        self.norm = ChannelNorm(channels)
        self.cab = ChannelAttentionBlock(channels)
        self.beta = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.mamba is not None:
            x_BCHW = self.alpha * x_BCHW + self.mamba(self.norm_in(x_BCHW))
        return self.beta * x_BCHW + self.cab(self.norm(x_BCHW))


class MambaGroup(nn.Module):
    """RSMG: x + Conv3x3(RSMB_n(...RSMB_1(x))); odd blocks fuse states, even ones scan both ways."""

    def __init__(self, channels: int, num_blocks: int, ssm: bool) -> None:
        super().__init__()
        kinds = [("fused", "two_way")[i % 2] if ssm else "none" for i in range(num_blocks)]
        self.blocks = nn.Sequential(*(ResidualMambaBlock(channels, kind) for kind in kinds))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv(self.blocks(x_BCHW))


class SIMR(nn.Module):
    """Semantics-informed Mamba reconstruction: fusion with the semantics, then the group."""

    def __init__(self, channels: int, *, num_blocks: int, ssm: bool, attention: str) -> None:
        super().__init__()
        self.fuse = SemanticFusion(channels, attention)
        self.group = MambaGroup(channels, num_blocks, ssm)

    def forward(self, image_BCHW: Tensor, semantic_BCHW: Tensor) -> Tensor:
        return self.group(self.fuse(image_BCHW, semantic_BCHW))
