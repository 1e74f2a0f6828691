"""The image tower of clip-lite0, an EfficientNet-Lite0, as it is run.

open_clip and timm build the same tower from the same weights, in twice the time a photo and with
two seconds of imports.  Here batch norms are folded into the convolutions.
"""

# B photos, H W pixels, D embedding

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the first block of each stage
NORM_EPS = 1e-3


class Tower(nn.Module):
    """tensors: of the whole CLIP, by open_clip's names; KeyError where one is missing."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        prefix = "visual.trunk."
        trunk = {k.removeprefix(prefix): v.float() for k, v in tensors.items() if prefix in k}
        self.stem = _convolution(trunk, "conv_stem", "bn1", stride=2)
        self.blocks = nn.ModuleList()
        for stage, stride in enumerate(STRIDES):
            numbers = {int(k.split(".")[2]) for k in trunk if k.startswith(f"blocks.{stage}.")}
            for number in sorted(numbers):
                block = _block(trunk, f"blocks.{stage}.{number}.", 1 if number else stride)
                self.blocks.append(block)
        self.head = _convolution(trunk, "conv_head", "bn2")
        self.project = nn.Parameter(tensors["visual.head.proj.weight"].float())

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Normalised photos, H and W multiples of 32 -> B,D."""
        x = self.maps(x_B3HW)[-1]
        return F.relu6(self.head(x), inplace=True).mean((2, 3)) @ self.project.T

    def maps(self, x_B3HW: Tensor) -> list[Tensor]:
        """What comes out of the last block at 1/4, 1/8, 1/16 and 1/32."""
        x = F.relu6(self.stem(x_B3HW), inplace=True)
        found = []
        for block in self.blocks:
            y = block(x)
            if y.shape[2:] != x.shape[2:]:
                found.append(x)
            x = x + y if x.shape == y.shape else y
        return [*found[1:], x]  # without that at 1/2


def _block(trunk: Mapping[str, Tensor], at: str, stride: int) -> nn.Sequential:
    """Widened, looked around, narrowed; the first block of all is not widened."""
    widened = f"{at}conv_pwl.weight" in trunk
    names = ("conv_pw", "conv_dw", "conv_pwl") if widened else ("conv_dw", "conv_pw")
    layers: list[nn.Module] = []
    for number, name in enumerate(names, 1):
        step = stride if name == "conv_dw" else 1
        layers += [_convolution(trunk, at + name, f"{at}bn{number}", stride=step), nn.ReLU6(True)]
    return nn.Sequential(*layers[:-1])


def _convolution(
    trunk: Mapping[str, Tensor], name: str, norm: str, *, stride: int = 1
) -> nn.Conv2d:
    """A convolution with its batch norm in it.

    With stride 2 TensorFlow pads less before than after, which PyTorch cannot say: zeros before
    the kernel, one row and one column, shift it alike and cost less than padding the picture. A
    1x1 kernel is as it was when dilated; left plain, PyTorch runs it on one thread by a path that
    takes twice as long (below 16 photos).
    """
    weight, gain, offset, mean, variance = (
        trunk[key]
        for key in (
            f"{name}.weight", f"{norm}.weight", f"{norm}.bias",
            f"{norm}.running_mean", f"{norm}.running_var",
        )
    )  # fmt: skip
    scale = gain / torch.sqrt(variance + NORM_EPS)
    weight = weight * scale[:, None, None, None]
    padding = weight.shape[-1] // 2
    if stride == 2:
        weight = F.pad(weight, (1, 0, 1, 0))
    outputs, depth, size, _ = weight.shape
    groups, dilation = outputs if depth == 1 else 1, 2 if size == 1 else 1
    folded = nn.Conv2d(depth * groups, outputs, size, stride, padding, dilation, groups)
    folded.load_state_dict({"weight": weight, "bias": offset - mean * scale})
    return folded
