"""The photo's head of the recipe (train.py), on what the fine-tuned tower sees.

Photos are drawn as the tower's training draws them, but others than it saw, and frames of real
brackets besides.  Each is embedded once with some rungs of its ladder; the head learns from the
embeddings, or from tones alone (for a CLIP that is not ours).
"""

import math

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.priors import judge, opinion, tone
from evenlight.stages.priors.clip import Clip
from evenlight.stages.priors.judge_tuning import SPREAD, soft
from evenlight.stages.priors.tones import tones as tones_of
from recipes.judge import tower

# N draws, K rungs, D embedding, T tones, S strengths

CHUNK = 250
KINDS = (0.0, 0.27, 0.67)  # as tower.KINDS: brackets take part, regions have a head of their own
STAGED = 0.15  # share of the good photos: products on white are to stay as they are
STEPS, BATCH, RATE, DECAY = 1500, 128, 1e-3, 0.1


def embedded(clip: Clip, images: list[np.ndarray]) -> np.ndarray:
    """float16 n,D"""
    rgb = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return clip.embed(rgb).half().numpy()


def on_curve(photo: np.ndarray, strength: float) -> np.ndarray:
    curve = tone.apply(opinion.FAMILY, torch.arange(256) / 255, strength)
    return cv2.LUT(photo, (curve.numpy() * 255).round().astype(np.uint8))


def rule_of(photo: np.ndarray) -> float:
    return float(tower.clip_photos.matching_strength(photo, tone.RULE_TARGET))


def seen_row(photo: np.ndarray, strength: float) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The images that the tower must see, and the numbers of one draw."""
    rule = rule_of(photo)
    given = [0.0, *(rule + offset for offset in opinion.ASKED)]
    images = [photo, *(on_curve(photo, t) for t in given[1:])]
    return images, {
        "tones": np.stack([tones_of(image) for image in images]),
        "given": np.array(given, np.float32),
        "rule": np.float32(rule),
        "strength": np.float32(strength),
    }


def photo_chunk(clip: Clip, draws: list[tuple[np.ndarray, float, str]]) -> dict[str, Tensor]:
    rows = []
    for photo, strength, kind in draws:
        images, row = seen_row(photo, strength)
        row["embeddings"] = embedded(clip, images)
        row["bracket"] = np.bool_(kind == "bracket")
        rows.append(row)
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


# --- training ------------------------------------------------------------------------------------


def photo_rows(data: tower.Data, clip: Clip, seed: int, chunk: int) -> dict[str, Tensor]:
    """One chunk of photos, drawn from (seed, chunk)."""
    rng = np.random.default_rng([seed, chunk])
    return photo_chunk(clip, [tower.photo_and_strength(data, rng, KINDS) for _ in range(CHUNK)])


def seen_of(rows: dict[str, Tensor], index: Tensor) -> judge.Seen:
    return judge.Seen(
        rows["embeddings"][index].float(), rows["tones"][index], rows["given"][index],
        rows["rule"][index],
    )  # fmt: skip


def photo_loss(head: judge.Head, rows: dict[str, Tensor], index: Tensor) -> Tensor:
    logits, good_logit = head(seen_of(rows, index))
    strength = rows["strength"][index]
    good = torch.exp(-0.5 * (strength / SPREAD) ** 2)
    weight = 1 - 0.7 * good
    ce = -(soft(strength.clamp(-2.2, 2.2)) * logits.log_softmax(1)).sum(1)
    judged = F.binary_cross_entropy_with_logits(good_logit, good)
    return (weight * ce).sum() / weight.sum() + judged


def trained(rows: dict[str, Tensor], dim: int, seed: int) -> judge.Head:
    """A head that reads embeddings of `dim` numbers (0: tones alone), after AdamW with a cosine."""
    torch.manual_seed(seed)
    head = judge.Head(dim).train()
    count = len(rows["strength"])
    optim = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(STEPS):
        for group in optim.param_groups:
            done = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * done
        loss = photo_loss(head, rows, torch.randint(count, (BATCH,)))
        optim.zero_grad()
        loss.backward()
        optim.step()
    good = torch.exp(-0.5 * (rows["strength"] / SPREAD) ** 2).mean()
    with torch.no_grad():  # as if half of the photos were good
        head.photo.answer.bias[-1] -= torch.logit(good)
    return head.eval()
