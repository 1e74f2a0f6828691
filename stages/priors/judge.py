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
from evenlight.stages.priors import tones
from evenlight.stages.priors.fingerprints import of_judge
from evenlight.stages.priors.prompts import Scorer, zero_shot
from evenlight.stages.priors.protocols import ClipModel
from evenlight.stages.priors.tones import NUM_TONES, PERCENTILES
from evenlight.stages.weights import shipped

FAMILY = "film"
LIMIT, STEP = 2.2, 0.1
STRENGTHS = torch.tensor(tones.STRENGTHS, dtype=torch.float32)
ASKED = (-1.0, -0.4, 0.0, 0.4, 1.0)  # rungs that are asked, beyond the mean-luma rule
HIDDEN, DROPOUT = 96, 0.4
NO_SPREAD = 0.02  # of tones, between the ends of PERCENTILES: nothing but noise
WHITE = 0.95  # of all channels, of the middle pixel of a picture on white
LIGHTER = 0.01  # luma of its upper and lower third beyond that of its centre
MOST_DARKENING = -0.4  # of such a picture: white comes out at 250 of 255.  Whites stay white
NEAR = 0.25  # strengths within it look alike
WIDTH = 0.4  # of the loss: beyond about twice of it an answer is wrong, not less right
# Probability of being good from which a photo stays as it is.  Between a half and this the answer
# is moderate: fewer bad photos are left alone, and good ones hardly move.
SURELY_GOOD = 0.7
DECISIONS = np.linspace(-LIMIT, LIMIT, 441)
LOSSES = 1 - np.exp(-((DECISIONS[:, None] - tones.STRENGTHS) ** 2) / (2 * WIDTH**2))


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
    """From a region and its photo, to logits of the strength between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.seen = nn.Linear(2 * dim + 2 * NUM_TONES + 4, HIDDEN)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.answer = nn.Linear(HIDDEN, len(STRENGTHS))
        self.drop = nn.Dropout(DROPOUT)

    def forward(
        self, region: Tensor, photo: Tensor, tones: Tensor, tones_photo: Tensor, numbers: Tensor
    ) -> Tensor:
        """region, photo: embeddings under the mean-luma rule of the photo.  tones: of both as they
        are.  numbers: the photo's strength, the rule's, their difference, the region's area share.
        All with the same leading axes."""
        scaled = [4 * x[..., : self.dim] for x in (region, photo)]
        x = torch.cat([*scaled, 2 * (tones - 0.4), 2 * (tones_photo - 0.4), numbers], -1)
        x = F.gelu(self.seen(self.drop(x)))
        return self.answer(F.gelu(self.hidden(self.drop(x))))


@dataclass(frozen=True)
class Opinion:
    """What the judge says of one photo: p_good, the probability that it is good as it is (a priori
    one half), and p_S, float64, of the strengths that would mend it if it is not."""

    p_good: float
    p_S: NDArray[np.float64]  # noqa: N815

    def good(self, prior_good: float) -> float:
        """The probability of being good where that share of photos is, a priori, in [0, 1)."""
        good, bad = self.p_good * prior_good, (1 - self.p_good) * (1 - prior_good)
        return good / max(good + bad, 1e-12)

    def certainty(self, strength: float, prior_good: float) -> float:
        """The probability that the right strength lies within NEAR of this one."""
        good = self.good(prior_good)
        near = float(self.p_S[np.abs(STRENGTHS.numpy() - strength) <= NEAR].sum())
        return (1 - good) * near + good * (abs(strength) <= NEAR)

    def words(self) -> dict[str, float]:
        """The readable face: probabilities that the photo is under-, well or over-exposed."""
        bad, t = 1 - self.p_good, STRENGTHS.numpy()
        under, over = (float(self.p_S[side].sum()) for side in (t > NEAR, t < -NEAR))
        return {"under": bad * under, "normal": 1 - bad * (under + over), "over": bad * over}


class Judge:
    """The heads for one CLIP and the prompts beside them, frozen.

    tensors: "photo.*", the state of a Head; "regions.*", of a RegionHead; "prompts.*", of a Scorer.
    dim: D of the embeddings that the photo's head reads; 0: it reads tones alone.  fingerprint:
    hex sha256 of them all.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        self.prompts = Scorer.from_tensors(_of("prompts.", self.tensors))
        photo, regions = _of("photo.", self.tensors), _of("regions.", self.tensors)
        self.dim = photo["photo.seen.weight"].shape[1] - 2 * NUM_TONES - 3
        dim_regions = (regions["seen.weight"].shape[1] - 2 * NUM_TONES - 4) // 2
        self.head, self.regions = Head(self.dim).eval(), RegionHead(dim_regions).eval()
        for module, own in ((self.head, photo), (self.regions, regions)):
            module.load_state_dict(own)
            module.requires_grad_(False)
        self.fingerprint = of_judge({k: tensor.numpy() for k, tensor in self.tensors.items()})

    @classmethod
    def shipped(cls, clip: ClipModel) -> "Judge":
        """The judge that ships for this CLIP; for any other, one that reads tones alone until
        `tune-clip` has taught it.  Its prompts are the class words, untuned."""
        tensors = _shipped()
        known = bytes(tensors["clip"].numpy()).hex() == clip.fingerprint
        heads = _of("clip." if known else "tones.", tensors)
        return cls(heads | {f"prompts.{k}": v for k, v in zero_shot(clip).to_tensors().items()})

    def changed(self, prefix: str, state: Mapping[str, Tensor]) -> "Judge":
        """The judge with another "photo" head or other "prompts"."""
        return Judge(self.tensors | {f"{prefix}.{name}": tensor for name, tensor in state.items()})

    def opinion(self, cached: Mapping[str, Any], offsets: Sequence[float]) -> Opinion:
        """Of one photo, from its embeddings part (`ladder.embed_photo`).

        offsets: of the ladder's rungs from the mean-luma rule, of the family FAMILY.
        """
        if holds_nothing(cached["tones"][0]):
            return Opinion(1.0, (STRENGTHS == 0).double().numpy())
        with torch.no_grad():
            logits, good = self.head(seen_of(cached, offsets))
        p_S = logits[0].double().softmax(0).numpy()
        if is_on_white(cached["tones"][0]):
            p_S = _no_darker_than(MOST_DARKENING, p_S)
        return Opinion(float(good[0].sigmoid()), p_S)

    def region_opinions(
        self, cached: Mapping[str, Any], offsets: Sequence[float], strength: float
    ) -> NDArray[np.float64]:
        """Of the embedded regions, probabilities of STRENGTHS between each and the photo, which is
        given `strength`.  R,S for the regions there are."""
        count = int((cached["region_labels"] > 0).sum())
        rule = float(cached["rule_strength"])
        areas = _tensor(cached["region_areas"][:count])
        both = torch.tensor([strength, rule, rule - strength]).expand(count, -1)
        photo = _tensor(cached["clip_ladder"][list(offsets).index(0.0)]).expand(count, -1)
        with torch.no_grad():
            logits = self.regions(
                _tensor(cached["clip_regions"][:count]),
                photo,
                _tensor(cached["region_tones"][:count]),
                _tensor(cached["tones"][0]).expand(count, -1),
                torch.cat([both, areas[:, None]], 1),
            )
        return logits.double().softmax(1).numpy()


@functools.cache
def _shipped() -> dict[str, Tensor]:
    """clip: digest (uint8) of the CLIP that the heads "clip.*" read; "tones.*": for any other."""
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


def holds_nothing(tones_T: NDArray[np.float32]) -> bool:
    """Whether a photo is all black, all white or of one colour, but for noise: as it is meant."""
    planes = tones_T[: 3 * len(PERCENTILES)].reshape(3, -1)
    return bool((planes[:, -1] - planes[:, 0] < NO_SPREAD).all())


def is_on_white(tones_T: NDArray[np.float32]) -> bool:
    """Whether a picture shows something on a white ground: more than half of it is white in all
    channels, and it is lighter above and below than in its middle.  (An overexposed landscape is
    darker below.)"""
    smallest = tones_T[2 * len(PERCENTILES) : 3 * len(PERCENTILES)]
    centre, upper, lower = tones_T[-3:]
    mostly_white = np.interp(50, PERCENTILES, smallest) >= WHITE
    return bool(mostly_white and min(upper, lower) > centre + LIGHTER)


def _no_darker_than(least: float, p_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probabilities, those of lower strengths moved up to `least`."""
    strengths = STRENGTHS.double().numpy()
    at = int(np.abs(strengths - least).argmin())
    found = np.where(strengths < strengths[at], 0.0, p_S)
    found[at] += p_S[:at].sum()
    return found


def asked(offsets: Sequence[float]) -> list[int]:
    """Indices of the rungs that the judge asks: those nearest to ASKED."""
    found = {int(np.abs(np.array(offsets) - wanted).argmin()) for wanted in ASKED}
    return sorted(found)


def seen_of(cached: Mapping[str, Any], offsets: Sequence[float]) -> Seen:
    """What the judge reads of one photo of the store, as a batch of one."""
    rungs = asked(offsets)
    rule = float(cached["rule_strength"])
    embeddings = np.concatenate([cached["clip_photo"][None], cached["clip_ladder"][rungs]])
    given = [0.0, *(rule + offsets[rung] for rung in rungs)]
    tones_here = cached["tones"][[0, *(1 + rung for rung in rungs)]]
    return Seen(
        _tensor(embeddings)[None], _tensor(tones_here)[None], _tensor(given)[None],
        _tensor([rule]),
    )  # fmt: skip


def decide(opinion: Opinion, prior_good: float) -> float:
    """The film strength of least expected loss; 0 where the photo is surely good as it is.

    prior_good: how many photos are good, a priori, in [0, 1): 0 corrects every photo.  The loss of
    erring by e in strength is 1 - exp(-e^2 / 2 WIDTH^2), so that a far alternative does not drag
    the answer away from a likely one; that the photo may be good pulls it towards 0.
    """
    good = opinion.good(prior_good)
    if good > SURELY_GOOD:
        return 0.0
    expected = (1 - good) * (LOSSES @ opinion.p_S) + good * LOSSES[:, len(STRENGTHS) // 2]
    return float(DECISIONS[int(expected.argmin())])


def between(p_S: NDArray[np.float64]) -> float:
    """The strength of least expected loss between a region and its photo."""
    return float(DECISIONS[int((LOSSES @ p_S).argmin())])


def _tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
