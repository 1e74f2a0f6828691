"""Training losses (docs/method.md 7) and the one-time calibration of their shares.

Every part is a mean that is 0 when the output is what it should be, finite on any photo.  Of a
batch whose rows lie on several ranks, each rank has its share of that mean: the shares of all add
up to it.
"""

# B batch, H W pixels, h w of a feature map, C channels, R regions

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evenlight.stages.corrector.batches import Batch
from evenlight.stages.corrector.correction import lost
from evenlight.stages.corrector.ranks import ALONE, Ranks
from evenlight.stages.pixels import luma
from evenlight.stages.settings import LossSettings

Features = Callable[[Tensor], tuple[Tensor, Tensor]]  # rgb B,3,H,W in [0, 1] -> proto, p3
Logits = Callable[[Tensor], Tensor]  # rgb B,3,H,W in [0, 1] -> B,3 (under, normal, over)

# Until the shares are calibrated: parts of like size.
START_WEIGHTS = {
    "data": 1.0,
    "edges": 0.5,
    "colour": 0.2,
    "clipped": 0.5,
    "semantic": 0.02,
    "prompt": 0.005,
}
BORDER = 2  # how far a colour edge along what was lost may lie from it, pixels
GOOD_ENOUGH = 0.9  # probability of "normal" from which the prompt half asks for no more
DARK = 0.03  # pixels with a shorter RGB vector have no hue to keep


class Frozen(NamedTuple):
    """The priors that the losses ask: differentiable, their own weights never change."""

    features: Features
    logits: Logits
    device: torch.device = torch.device("cpu")  # where they lie


def total(
    batch: Batch, output: Tensor, weights: dict[str, float], settings: LossSettings, models: Frozen
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, and its parts without weights: of each, this rank's share.

    output: the corrected photos of the batch, float B,3,H,W; it may leave [0, 1].  Parts with
    share 0 are left out, and the semantic and prompt halves where the models see no photo.
    """
    target, confidence, ranks = batch.target, batch.confidence, batch.ranks
    if settings.faithful:
        parts = {"data": mse(output, target, confidence, ranks)}
    else:
        guessed = taken(batch)
        parts = {"data": charbonnier(output, target, confidence, guessed, settings.light, ranks)}
    if settings.edges:
        parts["edges"] = edges(output, target, confidence, ranks)
    if settings.colour:
        parts["colour"] = colour(output, target, confidence, ranks)
    if settings.clipped:
        parts["clipped"] = clipped(output, target, confidence, batch.photo, ranks)
    parts |= _asked(batch, output, settings, models)
    weighted = [weights[name] * part for name, part in parts.items()]
    return torch.stack(weighted).sum(), parts


def _asked(
    batch: Batch, output: Tensor, settings: LossSettings, models: Frozen
) -> dict[str, Tensor]:
    """The halves that ask frozen models, of the rows that these see: means over those rows."""
    if batch.chosen.seen is None:
        return {}
    first, stop = batch.chosen.seen
    rows = batch.ranks.own(first, stop)
    share = (rows.stop - rows.start) / (stop - first)
    seen, target = output[rows].clamp(0, 1), batch.target[rows]
    parts = {}
    if settings.semantic:
        labels = batch.labels[rows]
        parts["semantic"] = lambda: semantic(seen, target, labels, models.features)
    if settings.prompt:
        parts["prompt"] = lambda: prompt(seen, models.logits, batch.chosen.view)
    # a rank without such rows adds nothing, and its 0 has a gradient as the others' shares have
    return {name: share * part() if share else 0 * output.sum() for name, part in parts.items()}


def mse(
    output_B3HW: Tensor, target_B3HW: Tensor, confidence_B1HW: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """Squared error weighted by confidence: the paper's data term."""
    return _weighted_mean((output_B3HW - target_B3HW).square(), confidence_B1HW, ranks)


def charbonnier(
    output_B3HW: Tensor,
    target_B3HW: Tensor,
    confidence_B1HW: Tensor,
    guessed_B3HW: Tensor,
    light: float,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Smooth absolute error, and twice the squared one, weighted by confidence.

    guessed: how much of a value is a guess, 0 to 1.  There the error is absolute alone and weighs
    more where the output is too dark: its best guess is the quantile `light` of likely values,
    which is white where most of them are; their mean would be grey.
    """
    error = output_B3HW - target_B3HW
    absolute = (error.square() + 1e-5).sqrt() - 1e-5**0.5
    leaning = 1 - (2 * light - 1) * error.sign() * guessed_B3HW
    squared = 2 * error.square() * (1 - guessed_B3HW)
    return _weighted_mean(leaning * absolute + squared, confidence_B1HW, ranks)


def taken(batch: Batch) -> Tensor:
    """How much of each value of darkened photos clipping may have taken, B,3,c,c."""
    return lost(batch.photo) * (batch.given < 0)


def edges(
    output_B3HW: Tensor, target_B3HW: Tensor, confidence_B1HW: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """Absolute error of the differences between neighbours, down and to the right."""
    return _edge_error(output_B3HW - target_B3HW, confidence_B1HW, ranks)


def clipped(
    output_B3HW: Tensor,
    target_B3HW: Tensor,
    confidence_B1HW: Tensor,
    photo_B3HW: Tensor,
    ranks: Ranks = ALONE,
) -> Tensor:
    """The same of colour apart from brightness, along the borders of what was lost, where clipped
    channels leave green, pink and yellow bands; 0 where nothing was lost."""
    error = output_B3HW - target_B3HW
    taken = lost(photo_B3HW).amax(1, keepdim=True)
    side = 2 * BORDER + 1
    border = F.max_pool2d(taken, side, 1, BORDER) + F.max_pool2d(-taken, side, 1, BORDER)
    return _edge_error(error - luma(error), confidence_B1HW * border, ranks)


def colour(
    output_B3HW: Tensor, target_B3HW: Tensor, confidence_B1HW: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """1 - cosine of the RGB vectors of each pixel, near-black targets skipped."""
    has_hue_B1HW = target_B3HW.norm(dim=1, keepdim=True) >= DARK
    cosine_BHW = F.cosine_similarity(output_B3HW, target_B3HW, dim=1, eps=1e-2)
    return _weighted_mean(1 - cosine_BHW[:, None], confidence_B1HW * has_hue_B1HW, ranks)


def semantic(
    output_B3HW: Tensor, target_B3HW: Tensor, labels_BHW: Tensor, features: Features
) -> Tensor:
    """FastSAM must see the same in output and target: per position, and per region by its area."""
    with torch.no_grad():
        wanted = features(target_B3HW)
    loss = output_B3HW.new_zeros(())
    for got_BChw, want_BChw in zip(features(output_B3HW), wanted, strict=True):
        got, want = got_BChw.float(), want_BChw.float()
        loss = loss + (1 - F.cosine_similarity(got, want, dim=1)).mean()
        mask_BRL = _region_shares(labels_BHW, got.shape[2:])
        cosine_BR = F.cosine_similarity(_pool(got, mask_BRL), _pool(want, mask_BRL), dim=2)
        area_BR = mask_BRL.mean(2)
        loss = loss + (area_BR * (1 - cosine_BR)).sum(1).mean()
    return loss / len(wanted)


def prompt(output_B3HW: Tensor, logits: Logits, view: tuple[int, int, int, int]) -> Tensor:
    """-log p(normal) of the whole and of one crop, 0 from p = 0.9 on so that it cannot be gamed."""
    top, left, height, width = view
    crop = output_B3HW[:, :, top : top + height, left : left + width]
    enough = torch.tensor(GOOD_ENOUGH).log().item()
    normal = [logits(x).float().log_softmax(dim=1)[:, 1] for x in (output_B3HW, crop)]
    return torch.stack([(enough - p).relu() for p in normal]).mean()


@dataclass
class Calibration:
    """Weights that give each part its share of the gradient norm at the output.

    Measured over the steps of a window, computed once at its end, then frozen; the weight of
    "data" stays. A part that was never active in the window keeps its start weight.
    """

    settings: LossSettings
    window: tuple[int, int]
    weights: dict[str, float] = field(default_factory=START_WEIGHTS.copy)
    norms: dict[str, list[float]] = field(default_factory=dict)  # per part: sum, count
    done: bool = False

    def measures(self, step: int) -> bool:
        """Whether `measure` is due at this step."""
        return not self.done and self.window[0] <= step < self.window[1]

    def measure(self, parts: dict[str, Tensor], output_B3HW: Tensor, ranks: Ranks = ALONE) -> None:
        squared = {}
        for name, part in parts.items():
            (gradient,) = torch.autograd.grad(
                part, output_B3HW, retain_graph=True, allow_unused=True
            )
            norm = part.new_zeros(()) if gradient is None else gradient.norm()
            squared[name] = norm.double().square()  # which holds every float32 exactly
        for name, square in ranks.totals(squared).items():
            norm = math.sqrt(square)
            if norm > 0:
                sum_and_count = self.norms.setdefault(name, [0.0, 0])
                sum_and_count[0] += norm
                sum_and_count[1] += 1

    def finish(self) -> dict[str, float]:
        """Freeze the weights; returns them."""
        means = {name: total / count for name, (total, count) in self.norms.items()}
        for name, mean in means.items():
            share = getattr(self.settings, name) / self.settings.data
            self.weights[name] = START_WEIGHTS["data"] * share * means["data"] / mean
        self.done = True
        return self.weights

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"weights": self.weights, "norms": self.norms, "done": self.done}

    def restore(self, state: dict[str, Any]) -> None:
        self.weights, self.norms = dict(state["weights"]), dict(state["norms"])
        self.done = bool(state["done"])


def _weighted_mean(error_BCHW: Tensor, weight_B1HW: Tensor, ranks: Ranks) -> Tensor:
    """This rank's share of the mean over the rows of all ranks."""
    weight = weight_B1HW.expand_as(error_BCHW)
    return (error_BCHW * weight).sum() / ranks.total(weight.sum()).clamp_min(1e-3)


def _edge_error(error_B3HW: Tensor, weight_B1HW: Tensor, ranks: Ranks) -> Tensor:
    """Mean of both directions; a difference counts where both its pixels do."""
    parts = []
    for dim in (2, 3):
        length = error_B3HW.shape[dim] - 1
        first, second = (weight_B1HW.narrow(dim, start, length) for start in (0, 1))
        weight = torch.minimum(first, second)
        parts.append(_weighted_mean(error_B3HW.diff(dim=dim).abs(), weight, ranks))
    return (parts[0] + parts[1]) / 2


def _region_shares(labels_BHW: Tensor, size: torch.Size) -> Tensor:
    """One-hot region masks at the size of a tap, B,R,h*w float32, by nearest resizing."""
    labels_Bhw = F.interpolate(labels_BHW[:, None].float(), size=size, mode="nearest")
    labels_BL = labels_Bhw.flatten(1).long()
    num_regions = int(labels_BL.max()) + 1
    return F.one_hot(labels_BL, num_regions).mT.float()


def _pool(x_BChw: Tensor, mask_BRL: Tensor) -> Tensor:
    """Mean over each region, B,R,C; 0 for an absent one."""
    sums = mask_BRL @ x_BChw.flatten(2).mT
    return sums / mask_BRL.sum(2, keepdim=True).clamp_min(1)
