"""Adapting the judge to a folder of unlabelled photos, from cached tensors alone.

Photos that the judge finds good are teachers: a rung of their ladder, taken for a photo, has a
known answer, minus its strength.  Bad photos add agreement: asked at two rungs of one ladder, the
judge must point to one exposure.  What it says of the photos themselves must not drift.
"""

# N photos, K rungs, A asked rungs, S strengths, B batch

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.priors import opinion
from evenlight.stages.priors.judge import STRENGTHS, Head, Judge, Seen
from evenlight.stages.settings import JudgeSettings

TEACHER = 0.75  # probability of being good from which a photo teaches
FEWEST = 8  # teachers, fewer than which teach nothing that can be checked
SPREAD = 0.1  # of a label over the strengths, and of a photo that is good
AGREEMENT, MEMORY = 0.3, 1.0  # weights beside the teachers' loss
BATCH = 64
LEAST_GAIN = 0.05  # share of the error that a tuned judge must take off the former one's


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What a store holds of N photos.  K rungs, of the family of the judge."""

    photo: NDArray[np.float32]  # N,D
    ladder: NDArray[np.float16]  # N,K,D
    tones: NDArray[np.float32]  # N,1+K,T
    rule: NDArray[np.float32]  # N
    offsets: tuple[float, ...]  # K, of the rungs from the rule


@dataclass(frozen=True)
class TunedJudge:
    judge: Judge  # the tuned one, whether accepted or not
    accepted: bool
    report: dict[str, Any]  # figures and reasons, JSON-ready


class _Photos:
    """Cached photos as tensors; any rung can be taken for a photo."""

    def __init__(self, cached: Cached) -> None:
        both = np.concatenate([cached.photo[:, None], cached.ladder.astype(np.float32)], 1)
        self.embeddings = torch.from_numpy(both)  # N,1+K,D
        self.tones = torch.from_numpy(cached.tones)
        rule = torch.from_numpy(cached.rule)
        offsets = torch.tensor(cached.offsets)
        self.given = torch.cat([torch.zeros(len(rule), 1), rule[:, None] + offsets], 1)  # N,1+K
        self.rule = rule
        self.asked = torch.tensor([1 + rung for rung in opinion.asked(cached.offsets)])

    def seen(self, photo_B: Tensor, rung_B: Tensor) -> Seen:
        """Rungs of photos taken for photos.  rung: 0 is the photo itself."""
        rungs = torch.cat([rung_B[:, None], self.asked.expand(len(rung_B), -1)], 1)
        rows = photo_B[:, None]
        start = self.given[photo_B, rung_B]
        return Seen(
            self.embeddings[rows, rungs],
            self.tones[rows, rungs],
            self.given[rows, rungs] - start[:, None],
            self.rule[photo_B] - start,
        )

    def near(self, photo_B: Tensor, generator: torch.Generator) -> Tensor:
        """A rung for each photo, at random among those whose strength the judge can undo."""
        usable = (self.given[photo_B].abs() <= opinion.LIMIT).float()
        return torch.multinomial(usable, 1, generator=generator)[:, 0]


def tune(judge: Judge, cached: Cached, settings: JudgeSettings) -> TunedJudge:
    """Adapt the judge's answers about whole photos; its answers about regions stay.

    A judge that reads tones alone, since none ships for the CLIP in use, gets heads of that CLIP's
    dimension, which start untrained.  A share of the photos is held out for the acceptance check;
    the same seed gives the same result.
    """
    photos = _Photos(cached)
    count, dim = len(photos.rule), photos.embeddings.shape[-1]
    before = _words(judge.head, photos)
    teachers = torch.nonzero(before.good >= TEACHER)[:, 0]
    report: dict[str, Any] = {"photos": count, "teachers": len(teachers)}
    if len(teachers) < FEWEST:
        reason = f"{FEWEST} surely good photos are needed to learn from: there are {len(teachers)}"
        return TunedJudge(judge, False, report | {"reason": reason})
    generator = torch.Generator().manual_seed(settings.seed)
    held = torch.rand(count, generator=generator) < settings.held_out
    held[teachers[0]], held[teachers[1]] = True, False
    head = copy.deepcopy(judge.head) if judge.head.dim == dim else Head(dim)
    _learn(head, photos, teachers[~held[teachers]], ~held, before, settings, generator)

    tuned = judge.changed("photo", head.state_dict())
    check = (photos, teachers[held[teachers]], torch.nonzero(held)[:, 0])
    was, now = _figures(judge.head, *check), _figures(tuned.head, *check)
    report |= {f"{name}_before": round(was[name], 4) for name in was}
    report |= {name: round(now[name], 4) for name in now}
    better = now["error"] < (1 - LEAST_GAIN) * was["error"]
    kept = now["disagreement"] <= was["disagreement"] and now["spared"] >= was["spared"] - 0.02
    if not better:
        report["reason"] = (
            f"tuned, their error on held-out photos is {now['error']:.3f}, before "
            f"{was['error']:.3f}: that gains too little"
        )
    elif not kept:
        report["reason"] = (
            f"tuned, they contradict each other by {now['disagreement']:.3f} (before "
            f"{was['disagreement']:.3f}) and leave {now['spared']:.0%} of the good photos alone "
            f"(before {was['spared']:.0%})"
        )
    return TunedJudge(tuned, better and kept, report)


@dataclass(frozen=True)
class _Words:
    """What a head says of N photos themselves: log p of strengths N,S; p_good N."""

    log_p: Tensor
    good: Tensor


@torch.no_grad()
def _words(head: Head, photos: _Photos) -> _Words:
    logits, good = head.eval()(photos.seen(*_themselves(len(photos.rule))))
    return _Words(logits.log_softmax(1), good.sigmoid())


def _themselves(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count), torch.zeros(count, dtype=torch.long)


def _learn(
    head: Head,
    photos: _Photos,
    teachers: Tensor,
    learning: Tensor,
    before: _Words,
    settings: JudgeSettings,
    generator: torch.Generator,
) -> None:
    """Train the head in place.  learning: bool N, photos that may be seen."""
    torch.manual_seed(settings.seed)  # of dropout
    others = torch.nonzero(learning)[:, 0]
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=1e-3)
    head.train().requires_grad_(True)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            done = step / settings.steps
            group["lr"] = settings.learning_rate * (0.5 + 0.5 * math.cos(math.pi * done))
        taught = teachers[torch.randint(len(teachers), (BATCH,), generator=generator)]
        other = others[torch.randint(len(others), (BATCH,), generator=generator)]
        loss = _taught(head, photos, taught, generator)
        loss = loss + AGREEMENT * _agreement(head, photos, other, generator)
        loss = loss + MEMORY * _memory(head, photos, other, before)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    head.eval().requires_grad_(False)


def _taught(head: Head, photos: _Photos, taught: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy of minus the rung's strength, and of being good."""
    rung = photos.near(taught, generator)
    logits, good_logit = head(photos.seen(taught, rung))
    wanted = -photos.given[taught, rung]
    good = torch.exp(-0.5 * (wanted / SPREAD) ** 2)
    error = -(soft(wanted) * logits.log_softmax(1)).sum(1).mean()
    return error + F.binary_cross_entropy_with_logits(good_logit, good)


def _agreement(head: Head, photos: _Photos, other: Tensor, generator: torch.Generator) -> Tensor:
    """Squared difference of the exposures that two rungs of one photo point to."""
    pointed = []
    for _ in range(2):
        rung = photos.near(other, generator)
        logits, _ = head(photos.seen(other, rung))
        pointed.append(photos.given[other, rung] + logits.softmax(1) @ STRENGTHS)
    return (pointed[0] - pointed[1]).square().mean()


def _memory(head: Head, photos: _Photos, other: Tensor, before: _Words) -> Tensor:
    """Divergence from what was said of the photos themselves before."""
    logits, good_logit = head(photos.seen(other, torch.zeros_like(other)))
    strength = F.kl_div(
        logits.log_softmax(1), before.log_p[other], log_target=True, reduction="batchmean"
    )
    return strength + F.binary_cross_entropy_with_logits(good_logit, before.good[other])


def soft(strength_B: Tensor) -> Tensor:
    """Labels spread over the strengths.  B,S."""
    near = torch.exp(-0.5 * ((STRENGTHS - strength_B[:, None]) / SPREAD) ** 2)
    return near / near.sum(1, keepdim=True)


@torch.no_grad()
def _figures(head: Head, photos: _Photos, teachers: Tensor, others: Tensor) -> dict[str, float]:
    """error: mean, of the strength at every rung of held-out teachers.  disagreement: mean spread
    of the exposures that the rungs of a photo point to.  spared: share of the teachers still found
    good."""
    whole = _pointed(head, photos, others)
    _, good = head(photos.seen(teachers, torch.zeros_like(teachers)))
    return {
        "error": float(_pointed(head, photos, teachers).abs().nanmean()),
        "disagreement": float((whole - whole.nanmean(1, keepdim=True)).abs().nanmean()),
        "spared": float((good.sigmoid() > 0.5).float().mean()),
    }


def _pointed(head: Head, photos: _Photos, index: Tensor) -> Tensor:
    """The whole strength that each rung of each photo points to; nan where a rung is too far for
    the judge to undo.  N,1+K."""
    pointed = []
    for rung in range(photos.given.shape[1]):
        logits, _ = head(photos.seen(index, torch.full_like(index, rung)))
        given = photos.given[index, rung]
        answer = given + logits.softmax(1) @ STRENGTHS
        pointed.append(torch.where(given.abs() <= opinion.LIMIT, answer, torch.nan))
    return torch.stack(pointed, 1)
