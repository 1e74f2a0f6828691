"""The network of clip-lite0 while it is trained, and its file (see train.py)."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers.conv2d_same import conv2d_same
from torch import Tensor, nn

CONFIG = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 128,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 128,
            "heads": 4,
            "layers": 4,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 128},
}
VOCABULARY, START_TOKEN = 49408, 49406  # open_clip's own; the end token comes last
SIZE = 128


def new_model(tower: Path) -> nn.Module:
    """The architecture of CONFIG with the ImageNet tower; timm's state dict has the same order."""
    config = copy.deepcopy(CONFIG["model_cfg"])
    config["vision_cfg"] |= {"timm_drop": 0.1, "timm_drop_path": 0.1}
    model = open_clip.CLIP(**config)
    weights = torch.load(tower, weights_only=True)
    trunk = model.visual.trunk
    wanted = trunk.state_dict()
    named = dict(zip(wanted, list(weights.values()), strict=False))
    assert all(named[k].shape == wanted[k].shape for k in wanted)
    trunk.load_state_dict(named)
    for part in (trunk.conv_stem, trunk.bn1, trunk.blocks[0]):
        part.requires_grad_(False)  # a sixth of a step's time, and edges need no new exposure
    nn.init.constant_(model.logit_scale, math.log(30))
    return model.to(memory_format=torch.channels_last)


def conv_norm_pairs(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each convolution and the batch norm after it; timm defines them in this order."""
    parts = list(module.modules())
    convs = [m for m in parts if isinstance(m, nn.Conv2d)]
    norms = [m for m in parts if isinstance(m, nn.BatchNorm2d)]
    assert [c.out_channels for c in convs] == [n.num_features for n in norms]
    return zip(convs, norms, strict=True)


def fuse(trunk: nn.Module) -> None:
    """Batch norm with its ImageNet statistics inside the convolutions: the same function and
    parameters, a third of the time less. Statistics of re-exposed batches would bend them.
    """
    for conv, norm in conv_norm_pairs(trunk):

        def convolve(x: Tensor, conv: nn.Module = conv, norm: nn.Module = norm) -> Tensor:
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            shift = norm.bias - norm.running_mean * scale
            weight = conv.weight * scale[:, None, None, None]
            same = type(conv) is not nn.Conv2d  # TensorFlow's padding
            how = conv2d_same if same else F.conv2d
            return how(x, weight, shift, conv.stride, conv.padding, conv.dilation, conv.groups)

        def activate(x: Tensor, norm: nn.Module = norm) -> Tensor:
            return norm.act(x)

        conv.forward, norm.forward = convolve, activate


def normalised(images: list[np.ndarray]) -> Tensor:
    """uint8 H,W,3 photos of one size -> B,3,H,W in [-1, 1]."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return ((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def export(model: nn.Module, seen: Tensor, out: Path, *, size: int = SIZE) -> None:
    """float16 safetensors and the open_clip config.  size: of the square it sees, pixels.

    Rows of tokens that no caption used are still random: zero says nothing, noise would mislead.
    """
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    state["token_embedding.weight"][~seen] = 0
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, out / "clip-lite0.safetensors.partial")
    (out / "clip-lite0.safetensors.partial").replace(out / "clip-lite0.safetensors")
    config = copy.deepcopy(CONFIG)
    config["model_cfg"]["vision_cfg"]["image_size"] = config["preprocess_cfg"]["size"] = size
    (out / "clip-lite0.json").write_text(json.dumps(config, indent=2) + "\n")
