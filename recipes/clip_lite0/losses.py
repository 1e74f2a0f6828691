"""Losses of the recipe of clip-lite0 (see train.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.clip_lite0 import data

# B samples, D embedding, W wordings, G groups, V versions, 3 classes: under, normal, over

EV_LOGITS = 6.0  # d grows by this much per EV, before the temperature is fitted
BOUNDARY_EV = 0.5  # under | normal | over meet here
SOFT_EV = 0.07  # labels change over within about three times this: normal to 0.3, off from 0.7


def soft_labels(ev_B: Tensor) -> Tensor:
    """Class probabilities that change over smoothly at the boundaries.  Returns B,3."""
    under = torch.sigmoid((-ev_B - BOUNDARY_EV) / SOFT_EV)
    over = torch.sigmoid((ev_B - BOUNDARY_EV) / SOFT_EV)
    return torch.stack([under, 1 - under - over, over], 1).clamp_min(0)


def contrastive(
    image_BD: Tensor, text_BD: Tensor, samples: list[data.Sample], scale: Tensor
) -> Tensor:
    """CLIP loss; positives are all pairs of like exposure unless a caption names other content."""
    ev = torch.tensor([float(s.ev) for s in samples], dtype=torch.float32)
    match = torch.exp(-((ev[:, None] - ev[None]) ** 2) / (2 * 0.35**2))
    for column, sample in enumerate(samples):
        if sample.content and sample.content in sample.caption:
            same = torch.tensor([float(s.content == sample.content) for s in samples])
            match[:, column] *= same
    logits = scale * image_BD @ text_BD.T
    rows = match / match.sum(1, keepdim=True).clamp_min(1e-6)
    columns = match / match.sum(0, keepdim=True).clamp_min(1e-6)
    of_text = (rows * logits.log_softmax(1)).sum(1).mean()
    of_image = (columns * logits.log_softmax(0)).sum(0).mean()
    return -(of_text + of_image) / 2


def exposure_losses(
    image_BD: Tensor, prompts_3WD: Tensor, ev_B: Tensor, scale: Tensor, versions: int
) -> dict[str, Tensor]:
    """Cross-entropy, regression, ranking of d, the peak of normal at 0 (docs/method.md 4)."""
    logits_BW3 = scale * torch.einsum("bd,cwd->bwc", image_BD, prompts_3WD)
    pooled = F.normalize(prompts_3WD.mean(1), dim=-1)
    logits_BW3 = torch.cat([logits_BW3, scale * (image_BD @ pooled.T)[:, None]], 1)
    target = soft_labels(ev_B)[:, None]
    ce = -(target * logits_BW3.log_softmax(-1)).sum(-1).mean()
    d_BW = (logits_BW3[..., 2] - logits_BW3[..., 0]) / EV_LOGITS
    weight = 1 / (0.5 + ev_B.abs())
    error = F.huber_loss(d_BW, ev_B[:, None].expand_as(d_BW), reduction="none", delta=0.5)
    d_GV = d_BW[:, -1].view(-1, versions)
    ev_GV = ev_B.view(-1, versions)
    rise = d_GV[:, :, None] - d_GV[:, None]
    ev_rise = ev_GV[:, :, None] - ev_GV[:, None]
    later = ev_rise > 0.05
    rank = F.softplus(-4 * (rise - 0.5 * ev_rise))[later].mean()
    normal = logits_BW3[:, -1, 1].view(-1, versions)
    # versions of one photo: the one nearer to 0 must look more normal
    nearer = (ev_GV.abs()[:, :, None] - ev_GV.abs()[:, None]).clamp_min(0)
    peak = F.softplus(normal[:, :, None] - normal[:, None] + 0.5 * nearer)[nearer > 0.2].mean()
    return {"ce": ce, "reg": 2 * (weight[:, None] * error).mean(), "rank": 0.5 * rank,
            "peak": 0.25 * peak}  # fmt: skip
