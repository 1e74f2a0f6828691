"""The judge: how far a photo, or a region of it, is from what it is meant to be.

Of a photo it says how probably it is good as it is, and else a distribution over the film strength
that takes it to what it is meant to be (docs/method.md, "The judge").  It reads cached tensors
alone: CLIP embeddings of the photo and of the rungs of its ladder, and the tones of each.  At every
rung it is asked what is still missing there, told how far that rung has come, and the answers are
brought together: a second look at a half-corrected photo knows more than the first.
"""

# B photos, D embedding, T tones, S strengths, K rungs, R regions

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.cache.errors import EnvironmentLacks
from evenlight.stages.priors import opinion
from evenlight.stages.priors.fingerprints import of_judge
from evenlight.stages.priors.opinion import (
    LIMIT,
    STEP,
    Opinion,
    opinion_of,
    photo_read,
    regions_read,
)
from evenlight.stages.priors.prompts import Scorer, zero_shot
from evenlight.stages.priors.protocols import ClipModel
from evenlight.stages.priors.tones import NUM_TONES
from evenlight.stages.weights import shipped

STRENGTHS = torch.from_numpy(opinion.STRENGTHS)
HIDDEN, DROPOUT = 96, 0.4
REGION_HIDDEN, REGION_LAYERS, REGION_DROPOUT = 128, 2, 0.2
REGION_NUMBERS = 3  # beside its embedding: its area, and two strengths of its photo


class Asked(nn.Module):
    """One question: an embedding and tones at a rung, to logits of the strength missing there."""

    def __init__(
        self, dim: int, answers: int, *, hidden: int = HIDDEN, dropout: float = DROPOUT
    ) -> None:
        super().__init__()
        self.dim = dim
        self.seen = nn.Linear(dim + 2 * NUM_TONES + 3, hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.answer = nn.Linear(hidden, answers)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, embedding: Tensor, tones: Tensor, tones_here: Tensor, given: Tensor, rule: Tensor
    ) -> Tensor:
        """All with the same leading axes.  embedding, tones_here: at the rung, whose strength is
        `given`; tones: of the photo itself; rule: strength of the mean-luma rule."""
        numbers = torch.stack([given, rule, rule - given], -1)
        scaled = 4 * embedding[..., : self.dim]
        x = torch.cat([scaled, 2 * (tones - 0.4), 2 * (tones_here - 0.4), numbers], -1)
        x = F.gelu(self.seen(self.drop(x)))
        return self.answer(F.gelu(self.hidden(self.drop(x))))


@dataclass(frozen=True)
class Seen:
    """What the judge reads of B photos, float32 tensors.

    embeddings (B,1+K,D) and tones (B,1+K,T): of the photo, then of its rungs.  given (B,1+K):
    strength of each, 0 first.  rule (B).
    """

    embeddings: Tensor
    tones: Tensor
    given: Tensor
    rule: Tensor


class Head(nn.Module):
    """The answers at the photo and at its rungs, brought together."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.photo = Asked(dim, len(STRENGTHS) + 1)
        self.rungs = Asked(dim, len(STRENGTHS))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """Logits of the photo's strength (B,S) and of its being good as it is (B)."""
        count = seen.given.shape[1] - 1
        first = (seen.embeddings[:, 0], seen.tones[:, 0], seen.tones[:, 0], seen.given[:, 0])
        answer = self.photo(*first, seen.rule)
        logits, good = answer[:, :-1], answer[:, -1]
        photo_tones = seen.tones[:, :1].expand(-1, count, -1)
        rule = seen.rule[:, None].expand(-1, count)
        rungs = (seen.embeddings[:, 1:], photo_tones, seen.tones[:, 1:], seen.given[:, 1:], rule)
        missing_BKS = self.rungs(*rungs).log_softmax(-1)
        whole_BKS = shifted(missing_BKS, seen.given[:, 1:])
        return logits + self.scale * whole_BKS.mean(1), good

    @torch.no_grad()
    def opinion(self, cached: Mapping[str, Any], offsets: Sequence[float]) -> Opinion:
        """As `Judge.opinion`."""

        def answer() -> tuple[NDArray[np.float64], float]:
            logits, good = self(seen_of(cached, offsets))
            return logits[0].double().softmax(0).numpy(), float(good[0].sigmoid())

        return opinion_of(cached, answer)


def shifted(missing: Tensor, given: Tensor) -> Tensor:
    """Answers about the strength missing at a rung, as answers about the photo's whole strength.

    missing: ...,S over STRENGTHS.  given: ... .  Linear between strengths; beyond the ends the end
    falls by one unit per 0.1, so that a rung speaks of what it can reach.
    """
    wanted = (STRENGTHS.to(missing.device) - given[..., None] + LIMIT) / STEP
    last = len(STRENGTHS) - 1
    inside = wanted.clamp(0, last)
    low = inside.floor().clamp(max=last - 1)
    share = inside - low
    at = low.long()
    value = missing.gather(-1, at) * (1 - share) + missing.gather(-1, at + 1) * share
    return value - (wanted - inside).abs()


class RegionHead(nn.Module):
    """From the regions of a photo to logits of the strength between each and their mean, and to a
    second opinion of the photo's.

    They are looked at together, since an object is too dark or too bright beside others: each layer
    sees a region and the mean of all by area (Zaheer et al., "Deep Sets", 2017).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.region = nn.Linear(dim + REGION_NUMBERS, REGION_HIDDEN)
        self.norms = nn.ModuleList(nn.LayerNorm(REGION_HIDDEN) for _ in range(REGION_LAYERS))
        self.layers = nn.ModuleList(
            nn.Linear(2 * REGION_HIDDEN, REGION_HIDDEN) for _ in range(REGION_LAYERS)
        )
        self.answer = nn.Linear(REGION_HIDDEN, len(STRENGTHS))
        self.photo = nn.Linear(2 * dim + 1, REGION_HIDDEN)
        self.photo_layer = nn.Linear(REGION_HIDDEN, REGION_HIDDEN)
        self.photo_answer = nn.Linear(REGION_HIDDEN, len(STRENGTHS))
        self.drop = nn.Dropout(REGION_DROPOUT)

    def forward(self, embeddings: Tensor, areas: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """As `regions_read` gives them, with the same leading axes; a region of area 0 is none.
        Logits of each region ...,R+1,S and of the photo ...,S."""
        photo = self._photo(embeddings, areas[..., None], given[..., 0])
        areas = areas[..., None]
        given = given[..., None, :].expand(*areas.shape[:-1], -1)
        x = F.gelu(self.region(self.drop(torch.cat([embeddings, areas.sqrt(), given], -1))))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            here = norm(x)
            around = (areas * here).sum(-2, keepdim=True).expand_as(here)
            x = x + F.gelu(layer(self.drop(torch.cat([here, around], -1))))
        return self.answer(x), photo

    def _photo(self, embeddings: Tensor, areas: Tensor, rule: Tensor) -> Tensor:
        """From mean and spread of the regions, whatever the photo is given."""
        mean = (areas * embeddings).sum(-2)
        apart = (embeddings - mean[..., None, :]).square()
        spread = (areas * apart).sum(-2).clamp(min=1e-6).sqrt()
        x = F.gelu(self.photo(self.drop(torch.cat([mean, spread, rule[..., None]], -1))))
        x = x + F.gelu(self.photo_layer(self.drop(x)))
        return shifted(self.photo_answer(x).log_softmax(-1), rule)


class Judge:
    """The heads for one CLIP and the prompts beside them, frozen.

    tensors: "photo.*", the state of a Head; "regions.*", of a RegionHead; "prompts.*", of a Scorer.
    dim: D of the embeddings that the photo's head reads; 0: it reads tones alone.  fingerprint:
    hex sha256 of them all.  Raises KeyError where a tensor is missing, as of another version.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        self.prompts = Scorer.from_tensors(_of("prompts.", self.tensors))
        photo, regions = _of("photo.", self.tensors), _of("regions.", self.tensors)
        self.dim = photo["photo.seen.weight"].shape[1] - 2 * NUM_TONES - 3
        dim_regions = regions["region.weight"].shape[1] - REGION_NUMBERS
        self.head, self.regions = Head(self.dim).eval(), RegionHead(dim_regions).eval()
        for module, own in ((self.head, photo), (self.regions, regions)):
            module.load_state_dict(own | {name: own[name] for name in module.state_dict()})
            module.requires_grad_(False)
        self.fingerprint = of_judge({k: tensor.numpy() for k, tensor in self.tensors.items()})

    @classmethod
    def shipped(cls, clip: ClipModel) -> "Judge":
        """The judge that ships for this CLIP; for any other, one that reads tones alone until
        `tune-clip` has taught it.  Its prompts are the class words, untuned."""
        tensors = _shipped()
        known = bytes(tensors["clip"].numpy()).hex() == clip.fingerprint
        heads = _of("clip." if known else "tones.", tensors)
        regions = {k: v for k, v in tensors.items() if k.startswith("regions.")}
        prompts = {f"prompts.{k}": v for k, v in zero_shot(clip).to_tensors().items()}
        return cls(heads | regions | prompts)

    def changed(self, prefix: str, state: Mapping[str, Tensor]) -> "Judge":
        """The judge with another "photo" head or other "prompts"."""
        return Judge(self.tensors | {f"{prefix}.{name}": tensor for name, tensor in state.items()})

    def opinion(self, cached: Mapping[str, Any], offsets: Sequence[float]) -> Opinion:
        """Of one photo, from its embeddings part (`ladder.embed_photo`).

        offsets: of the ladder's rungs from the mean-luma rule, of the family FAMILY.
        """
        return self.head.opinion(cached, offsets)

    def region_opinions(self, cached: Mapping[str, Any], strength: float) -> NDArray[np.float64]:
        """Of the embedded regions and, last, the rest: probabilities of STRENGTHS between each and
        the photo, which is given `strength`.  R+1,S for the regions there are."""
        return self._of_regions(cached, strength)[0]

    def second_opinion(self, cached: Mapping[str, Any]) -> NDArray[np.float64]:
        """Of the photo, from its regions: probabilities of STRENGTHS.  S."""
        return self._of_regions(cached, 0.0)[1]

    def _of_regions(
        self, cached: Mapping[str, Any], strength: float
    ) -> tuple[NDArray[np.float64], ...]:
        with torch.no_grad():
            answers = self.regions(*map(torch.from_numpy, regions_read(cached, strength)))
        return tuple(logits.double().softmax(-1).numpy() for logits in answers)


@functools.cache
def _shipped() -> dict[str, Tensor]:
    """clip: digest (uint8) of the CLIP that the head "clip.photo.*" reads; "tones.photo.*": for any
    other; "regions.*": for both."""
    path = shipped("judge")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise EnvironmentLacks(
            f"weights of the judge {path} cannot be used ({error}): install evenlight again"
        ) from error


def _of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def seen_of(cached: Mapping[str, Any], offsets: Sequence[float]) -> Seen:
    """What the judge reads of one photo of the store, as a batch of one."""
    return Seen(*map(torch.from_numpy, photo_read(cached, offsets)))
