"""The scorer and prompt tuning, on a toy CLIP and on the shipped one."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional as F

from evenlight.pipeline.demo import installed_photo
from evenlight.stages.pixels import to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.clip import load_clip
from evenlight.stages.priors.prompts import (
    STRENGTH_PER_EV,
    Ladders,
    Scorer,
    spearman,
    tune,
    zero_shot,
)
from evenlight.stages.settings import ClipSettings, PromptSettings

D = 12
OFFSETS = np.array([-2.0, -1.4, -1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0])
SETTINGS = PromptSettings(learning_rate=0.05)


class ToyClip:
    """A text tower that adds up its vectors; its untuned prompts hardly know the classes."""

    logit_scale = 30.0

    def __init__(self) -> None:
        self.table = torch.randn(64, D, generator=torch.Generator().manual_seed(1))

    def token_vectors(self, text: str) -> Tensor:
        return torch.stack([self.table[len(word)] for word in text.split()])

    def encode_context(self, context_nME: Tensor, words: list[str]) -> Tensor:
        named = torch.stack([self.token_vectors(word).mean(0) for word in words])
        return F.normalize(context_nME.mean(1) + 0.3 * named, dim=-1)

    def embed_text(self, texts: list[str]) -> Tensor:
        rows = [self.token_vectors(text).mean(0) for text in texts]
        return F.normalize(torch.stack(rows), dim=-1)


class KnowingClip(ToyClip):
    """Its untuned prompts lie where exposures of -1.6, 0 and 1.6 EV do."""

    def embed_text(self, texts: list[str]) -> Tensor:
        return torch.from_numpy(embeddings_at(np.array([-1.6, 0.0, 1.6]), np.zeros(D - 2)))


def embeddings_at(ev: np.ndarray, content: np.ndarray) -> np.ndarray:
    """Unit embeddings that turn with exposure in one plane; the other axes are content."""
    turn = np.stack([np.sin(ev / 3), np.cos(ev / 3)], -1)
    x = np.concatenate([turn, np.broadcast_to(content, (*ev.shape, D - 2))], -1)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_ladders(num: int = 120, noise: float = 0.12) -> Ladders:
    """Half of the photos well exposed, half not: their own rungs lie elsewhere."""
    rng = np.random.default_rng(0)
    error_ev = np.where(np.arange(num) % 2 == 0, 0.0, rng.choice([-2.5, 2.5], num))
    content = rng.normal(0, noise, (num, 1, D - 2))
    strengths = np.tile(OFFSETS, (num, 1))
    ev = error_ev[:, None] + strengths / STRENGTH_PER_EV
    return Ladders(
        photo_embeddings=embeddings_at(error_ev[:, None], content)[:, 0],
        ladder_embeddings=embeddings_at(ev, content).astype(np.float16),
        ladder_strengths=strengths,
        mean_luma=np.clip(0.47 + 0.16 * error_ev, 0, 1),
        clipped=np.full(num, 0.001),
    )


def test_tuning_learns_what_the_words_did_not_know_and_is_accepted() -> None:
    result = tune(ToyClip(), make_ladders(), SETTINGS)
    report = result.report
    assert report["accuracy_untuned"] < 0.8 < 0.95 <= report["accuracy"]
    assert report["spearman"] >= 0.95
    assert report["last_loss"] < report["first_loss"]
    assert result.accepted and not report["good_rule_relaxed"]


def test_tuned_d_crosses_zero_at_the_good_exposure() -> None:
    ladders = make_ladders()
    scorer = tune(ToyClip(), ladders, SETTINGS).scorer
    good = torch.from_numpy(ladders.ladder_embeddings[::2].astype(np.float32))
    d = scorer.exposure(good.flatten(0, 1)).view(len(good), -1).mean(0)
    assert (d.diff() > 0).all()
    assert d[OFFSETS < -0.3].max() < 0 < d[OFFSETS > 0.3].min()


def test_tuning_is_deterministic_under_its_seed() -> None:
    ladders = make_ladders()
    first, second = (tune(ToyClip(), ladders, SETTINGS).scorer for _ in range(2))
    other = tune(ToyClip(), ladders, PromptSettings(learning_rate=0.05, seed=1)).scorer
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.text_3D, second.text_3D)
    assert other.fingerprint != first.fingerprint


def test_embeddings_without_exposure_in_them_are_not_accepted() -> None:
    ladders = make_ladders()
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 1, ladders.ladder_embeddings.shape)
    noise /= np.linalg.norm(noise, axis=-1, keepdims=True)
    garbage = Ladders(**(vars(ladders) | {"ladder_embeddings": noise.astype(np.float16)}))
    result = tune(ToyClip(), garbage, SETTINGS)
    assert not result.accepted
    assert "less than prompts.min_accuracy" in result.report["reason"]


def test_an_accuracy_that_cannot_rise_is_no_failure() -> None:
    told = tune(KnowingClip(), make_ladders(), SETTINGS).report["reason"]
    assert told == "they name 100.0% of held-out exposures rightly already: that cannot rise"


def test_embeddings_not_finite_or_too_few_are_not_accepted() -> None:
    ladders = make_ladders()
    broken = ladders.ladder_embeddings.copy()
    broken[3, 2, 1] = np.nan
    result = tune(ToyClip(), Ladders(**(vars(ladders) | {"ladder_embeddings": broken})), SETTINGS)
    assert not result.accepted and "not finite" in result.report["reason"]
    few = Ladders(**{name: value[:3] for name, value in vars(ladders).items()})
    result = tune(ToyClip(), few, SETTINGS)
    assert not result.accepted and "too few" in result.report["reason"]


def test_few_good_photos_are_said_to_be_chosen_by_a_wider_rule() -> None:
    ladders = make_ladders(60)
    dark = Ladders(**(vars(ladders) | {"mean_luma": np.full(60, 0.25)}))
    report = tune(ToyClip(), dark, SETTINGS).report
    assert report["good_rule_relaxed"] and "mean luma 0.2 to 0.75" in report["good_rule"]
    assert report["good_photos"] == 20


def test_scorer_survives_storage_with_its_fingerprint() -> None:
    scorer = zero_shot(ToyClip())
    again = Scorer.from_tensors(load(save(scorer.to_tensors())))
    embeddings = F.normalize(torch.randn(5, D), dim=-1)
    assert again.fingerprint == scorer.fingerprint
    assert torch.equal(again.logits(embeddings), scorer.logits(embeddings))
    assert Scorer(scorer.text_3D, scorer.temperature * 2).fingerprint != scorer.fingerprint


def test_scorer_is_differentiable_and_d_is_over_less_under() -> None:
    scorer = zero_shot(ToyClip())
    embeddings = F.normalize(torch.randn(5, D), dim=-1).requires_grad_(True)
    logits = scorer.logits(embeddings)
    assert torch.equal(scorer.exposure(embeddings), logits[:, 2] - logits[:, 0])
    logits.log_softmax(1)[:, 1].sum().backward()
    assert embeddings.grad is not None and (embeddings.grad != 0).any(1).all()
    half = scorer.logits(embeddings.detach().half())
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_gradient_of_the_prompt_loss_reaches_the_photo_through_the_shipped_clip() -> None:
    clip = load_clip(ClipSettings())
    scorer = zero_shot(clip)
    coffee = to_float(installed_photo("skimage/data", "coffee.png"))
    dark, bright = (tone.apply("ev", coffee, t) for t in (-1.5, 1.5))
    photo = dark.requires_grad_(True)
    before = scorer.exposure(clip.embed(photo))
    before.sum().backward()
    assert photo.grad is not None and photo.grad.abs().sum() > 0
    assert before.item() < scorer.exposure(clip.embed(bright)).item()


def test_shipped_clip_tunes_from_embeddings_of_its_own() -> None:
    """The real text tower runs, in seconds, on the words the store would use."""
    clip = load_clip(ClipSettings())
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (24, 14, clip.dim)).astype(np.float32)
    text = clip.embed_text(["underexposed", "well exposed", "overexposed"]).numpy()
    ev = np.tile(np.concatenate([[0.0], OFFSETS / STRENGTH_PER_EV]), (24, 1))
    side = np.where(ev < 0, 0, 2)
    share = np.clip(np.abs(ev), 0, 1)[..., None]
    x = share * text[side] + (1 - share) * text[1] + 0.2 * noise
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    ladders = Ladders(
        photo_embeddings=x[:, 0],
        ladder_embeddings=x[:, 1:].astype(np.float16),
        ladder_strengths=np.tile(OFFSETS, (24, 1)),
        mean_luma=np.full(24, 0.45),
        clipped=np.zeros(24),
    )
    result = tune(clip, ladders, PromptSettings(epochs=4))
    assert result.report["last_loss"] < result.report["first_loss"]
    assert result.scorer.text_3D.shape == (3, clip.dim)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 3], [10, 20, 21], 1.0), ([1, 2, 3], [3, 2, 1], -1.0), ([1, 1, 1], [1, 2, 3], 0.0)],
)
def test_spearman_is_the_correlation_of_ranks(
    a: list[float], b: list[float], expected: float
) -> None:
    assert spearman(np.array(a), np.array(b)) == pytest.approx(expected)


def test_spearman_shares_ranks_among_ties() -> None:
    got = spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4]))
    assert got == pytest.approx(0.9486833)  # scipy.stats.spearmanr
