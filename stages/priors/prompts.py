"""Prompts that judge exposure: the scorer, its tuning from cached embeddings (docs/method.md 4).

Three prompts (underexposed, well-exposed, overexposed) turn an embedding into three logits. The
exposure coordinate d = logit_over - logit_under is negative for dark photos, positive for bright
ones, and zero where the photo is exposed as good ones are.
"""

# N photos, K ladder rungs, J = K + 1 rungs with the photo itself, D embedding, M context vectors

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.priors.protocols import ClipModel
from evenlight.stages.settings import PromptSettings

PHRASE = "a photo with"
CLASS_WORDS = ("underexposed lighting", "well-exposed lighting", "overexposed lighting")
STRENGTH_PER_EV = 0.44  # film strength that undoes one EV of a camera, median over photos
NORMAL_EV, OFF_EV = 0.3, 0.7  # normal up to the first, under or over from the second
JUDGED_EV = 1.0  # accuracy counts rungs this far from the good exposure
IGNORED = -100  # label of rungs between NORMAL_EV and OFF_EV
BEST_SHARE = 0.2  # of the candidates for good photos
FEWEST_GOOD = 20
LEAST_GAIN = 0.001  # of accuracy or Spearman, for tuned prompts to replace untuned ones
GOOD_RULES = (  # mean luma from, to, clipped share below; the first that leaves enough photos
    (0.35, 0.60, 0.01),
    (0.30, 0.65, 0.05),
    (0.20, 0.75, 0.20),
    (0.00, 1.00, 1.01),
)


class Scorer:
    """Three prompt embeddings and a temperature.

    text_3D: unit norm, in the order under, normal, over.  temperature: cosines are divided by it.
    fingerprint: hex sha256 of both.
    """

    def __init__(self, text_3D: Tensor, temperature: float) -> None:
        assert text_3D.shape[0] == 3 and temperature > 0, (text_3D.shape, temperature)
        self.text_3D = text_3D.detach().float().cpu().contiguous()
        self.temperature = float(np.float32(temperature))
        content = self.text_3D.numpy().tobytes() + np.float32(temperature).tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def logits(self, embedding_BD: Tensor) -> Tensor:
        """Embeddings B,D of unit norm -> float32 B,3 (under, normal, over), differentiable."""
        text = self.text_3D.to(embedding_BD.device)
        return embedding_BD.float() @ text.T / self.temperature

    def exposure(self, embedding_BD: Tensor) -> Tensor:
        """The exposure coordinate d = logit_over - logit_under.  Returns B."""
        logits = self.logits(embedding_BD)
        return logits[:, 2] - logits[:, 0]

    def to_tensors(self) -> dict[str, Tensor]:
        return {"text": self.text_3D, "temperature": torch.tensor([self.temperature])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Scorer":
        return cls(tensors["text"], float(tensors["temperature"][0]))


def zero_shot(clip: ClipModel) -> Scorer:
    """The scorer of the class words alone, at the temperature the CLIP was trained with."""
    text = clip.embed_text([f"{PHRASE} {words}" for words in CLASS_WORDS])
    return Scorer(text, 1 / clip.logit_scale)


@dataclass(frozen=True, kw_only=True)
class Ladders:
    """Cached embeddings of the photos of a store, and what tells the good ones."""

    photo_embeddings: np.ndarray  # N,D unit norm
    ladder_embeddings: np.ndarray  # N,K,D unit norm
    ladder_strengths: np.ndarray  # N,K film strength t of each rung, relative to the photo
    mean_luma: np.ndarray  # N in [0, 1]
    clipped: np.ndarray  # N share of clipped pixels


@dataclass(frozen=True)
class TuneResult:
    scorer: Scorer  # the tuned one, whether accepted or not
    accepted: bool
    report: dict[str, Any]  # figures and reasons, JSON-ready


@dataclass(frozen=True)
class _Rungs:
    """Embeddings of good photos at known exposure errors; rung 0 is the photo itself."""

    embeddings: Tensor  # N,J,D
    ev: Tensor  # N,J

    def take(self, index: Tensor) -> "_Rungs":
        return _Rungs(self.embeddings[index], self.ev[index])

    def logits(self, text_3D: Tensor, scale: float) -> Tensor:
        return scale * self.embeddings @ text_3D.T  # (N, J, 3)


def tune(clip: ClipModel, ladders: Ladders, settings: PromptSettings) -> TuneResult:
    """Learn the context of the three prompts on the good photos among those cached.

    The rungs of a good photo's ladder have a known exposure error e = t / .44 in EV. No image
    passes through CLIP, only three prompts per step. A share of the good photos is held out to
    fit the temperature and for the acceptance check; the same seed gives the same result.
    """
    start = zero_shot(clip)
    finite = [np.isfinite(a).all() for a in (ladders.photo_embeddings, ladders.ladder_embeddings)]
    if not all(finite):
        return TuneResult(start, False, {"reason": "cached embeddings hold values not finite"})
    index, report = _good_photos(ladders, start)
    if len(index) < 4:
        reason = f"{len(index)} photos are too few to tune on and check with (4 at least)"
        return TuneResult(start, False, report | {"reason": reason})
    rungs = _rungs(ladders, index)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(index), generator=generator)
    num_held = max(1, round(settings.held_out * len(index)))
    held, train = rungs.take(order[:num_held]), rungs.take(order[num_held:])

    text, losses = _learn_context(clip, train, settings, generator)
    scorer = Scorer(text, _fit_temperature(text, held, clip.logit_scale))
    accuracy, rho = _figures(scorer, held)
    accuracy_before, rho_before = _figures(start, held)
    # Figures as good as before are no gain, and prompts tuned on few photos judge others worse.
    gains = (accuracy - accuracy_before, rho - rho_before)
    better = min(gains) >= 0 and max(gains) > LEAST_GAIN
    accepted = better and accuracy >= settings.min_accuracy and rho >= settings.min_spearman
    report |= {
        "held_out_photos": num_held,
        "accuracy": round(accuracy, 4),
        "spearman": round(rho, 4),
        "accuracy_untuned": round(accuracy_before, 4),
        "spearman_untuned": round(rho_before, 4),
        "temperature": scorer.temperature,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }
    if not accepted:
        report["reason"] = _why_not(report, settings)
    return TuneResult(scorer, accepted, report)


def _good_photos(ladders: Ladders, scorer: Scorer) -> tuple[np.ndarray, dict[str, Any]]:
    """Indices of the photos most probably well exposed, and in words how they were chosen."""
    embeddings = torch.from_numpy(ladders.photo_embeddings.astype(np.float32))
    p_normal = scorer.logits(embeddings).softmax(1)[:, 1].numpy()
    for low, high, most_clipped in GOOD_RULES:
        luma_fits = (ladders.mean_luma >= low) & (ladders.mean_luma <= high)
        (index,) = np.nonzero(luma_fits & (ladders.clipped < most_clipped))
        if len(index) >= FEWEST_GOOD:
            break
    count = max(min(FEWEST_GOOD, len(index)), math.ceil(BEST_SHARE * len(index)))
    best = index[np.argsort(-p_normal[index], kind="stable")[:count]]
    words = (
        f"{len(best)} of {len(index)} photos with mean luma {low} to {high} and clipped share "
        f"below {most_clipped}, by zero-shot p_normal"
    )
    relaxed = (low, high, most_clipped) != GOOD_RULES[0]
    return best, {"good_photos": len(best), "good_rule": words, "good_rule_relaxed": relaxed}


def _rungs(ladders: Ladders, index: np.ndarray) -> _Rungs:
    photo = ladders.photo_embeddings[index][:, None].astype(np.float32)
    embeddings = np.concatenate([photo, ladders.ladder_embeddings[index].astype(np.float32)], 1)
    ev = ladders.ladder_strengths[index] / STRENGTH_PER_EV
    ev = np.concatenate([np.zeros((len(index), 1)), ev], 1).astype(np.float32)
    return _Rungs(torch.from_numpy(embeddings), torch.from_numpy(ev))


def _labels(ev: Tensor) -> Tensor:
    """0 under, 1 normal, 2 over, IGNORED between."""
    labels = torch.full(ev.shape, IGNORED, dtype=torch.long)
    labels[ev <= -OFF_EV] = 0
    labels[ev.abs() <= NORMAL_EV] = 1
    labels[ev >= OFF_EV] = 2
    return labels


def _loss(logits_NJ3: Tensor, ev_NJ: Tensor) -> Tensor:
    """Cross-entropy, ranking of d within a photo, and the peak of normal at e = 0."""
    ce = F.cross_entropy(logits_NJ3.flatten(0, 1), _labels(ev_NJ).flatten(), ignore_index=IGNORED)
    d = logits_NJ3[..., 2] - logits_NJ3[..., 0]
    rise, ev_rise = (x[:, :, None] - x[:, None] for x in (d, ev_NJ))
    rank = F.softplus(-(rise - 0.5 * ev_rise))[ev_rise > 0].mean()
    normal = logits_NJ3[..., 1]
    off = ev_NJ.abs() > 0.05
    peak = F.softplus(normal - normal[:, :1] + 0.5 * ev_NJ.abs())[off].mean()
    return ce + 0.5 * rank + 0.5 * peak


def _learn_context(
    clip: ClipModel, rungs: _Rungs, settings: PromptSettings, generator: torch.Generator
) -> tuple[Tensor, list[float]]:
    """Returns the prompts' embeddings 3,D and the mean loss of each epoch."""
    phrase = clip.token_vectors(PHRASE)
    repeats = math.ceil(settings.context / len(phrase))
    context = phrase.repeat(repeats, 1)[-settings.context :]  # ends with the whole phrase
    context = context.expand(3, -1, -1).clone().requires_grad_(True)
    words = list(CLASS_WORDS)
    num_photos, num_rungs = rungs.ev.shape
    size = max(1, settings.batch // num_rungs)
    steps = settings.epochs * math.ceil(num_photos / size)
    optimiser = torch.optim.AdamW([context], lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    losses = []
    for _ in range(settings.epochs):
        epoch = []
        for index in torch.randperm(num_photos, generator=generator).split(size):
            part = rungs.take(index)
            text = clip.encode_context(context, words).to(part.ev.device)
            loss = _loss(part.logits(text, clip.logit_scale), part.ev)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            epoch.append(loss.item())
        losses.append(float(np.mean(epoch)))
    with torch.no_grad():
        return clip.encode_context(context, words).cpu(), losses


def _fit_temperature(text_3D: Tensor, held: _Rungs, scale: float) -> float:
    """The temperature of least cross-entropy on held-out photos, within 5 of the CLIP's own."""
    logits, labels = held.logits(text_3D, scale).flatten(0, 1), _labels(held.ev).flatten()
    factors = torch.logspace(math.log10(1 / 5), math.log10(5), 101)
    losses = [F.cross_entropy(logits * f, labels, ignore_index=IGNORED).item() for f in factors]
    return 1 / (scale * float(factors[int(np.argmin(losses))]))


def _why_not(report: dict[str, Any], settings: PromptSettings) -> str:
    """Why tuned prompts are not taken, in words.  report: their figures and the former ones'."""
    now, before = report["accuracy"], report["accuracy_untuned"]
    rank, rank_before = report["spearman"], report["spearman_untuned"]
    if before >= 1 - LEAST_GAIN:
        return f"they name {before:.1%} of held-out exposures rightly already: that cannot rise"
    too_low = now < settings.min_accuracy or rank < settings.min_spearman
    return (
        f"tuned, they name {now:.1%} of held-out exposures rightly, before {before:.1%}, and rank "
        f"them with {rank:.3f}, before {rank_before:.3f}"
        + (": less than prompts.min_accuracy or prompts.min_spearman asks for" if too_low else "")
    )


def _figures(scorer: Scorer, held: _Rungs) -> tuple[float, float]:
    """3-way accuracy on rungs at least JUDGED_EV off, and Spearman of d with e on all rungs."""
    ev = held.ev.flatten()
    logits = scorer.logits(held.embeddings.flatten(0, 1))
    judged = ev.abs() >= JUDGED_EV
    right = logits.argmax(1) == _labels(ev)
    accuracy = float(right[judged].float().mean()) if judged.any() else 0.0
    return accuracy, spearman((logits[:, 2] - logits[:, 0]).numpy(), ev.numpy())


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0 where either is constant."""
    ranks = []
    for values in (a, b):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if min(r.std() for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
