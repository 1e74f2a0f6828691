"""The second half of the recipe (train.py): the heads, on what the fine-tuned tower sees.

Photos are drawn as the tower's training draws them, but others than it saw, and frames of real
brackets besides.  Each is embedded once with some rungs of its ladder; the heads learn from the
embeddings: of photos, of tones alone (for a CLIP that is not ours), and of regions that were
mis-exposed by themselves.
"""

import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.stages.pixels import to_float
from evenlight.stages.priors import judge, opinion, tone
from evenlight.stages.priors.clip import Clip
from evenlight.stages.priors.judge_tuning import SPREAD, soft
from evenlight.stages.priors.ladder import region_crop
from evenlight.stages.priors.tones import tones as tones_of
from recipes.judge import camera, photos, tower

# N draws, K rungs, D embedding, T tones, R regions, S strengths

CHUNK = 250
REGIONS = 4  # of a draw
KINDS = (0.0, 0.27, 0.67)  # as tower.KINDS: brackets take part, regions have heads of their own
STAGED = 0.15  # share of the good photos: products on white are to stay as they are
STEPS, BATCH, RATE, DECAY = 1500, 128, 1e-3, 0.1
State = dict[str, Tensor]
Loss = Callable[[Any, dict[str, Tensor], Tensor], Tensor]


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


# --- regions -------------------------------------------------------------------------------------


def region_rows(
    clip: Clip, photo: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """Some regions of one uneven shot, those that differ among them."""
    if rng.random() < 0.5:
        photo, labels = photo[:, ::-1].copy(), labels[:, ::-1].copy()
    shot, chosen = camera.uneven(photo, labels, rng)
    areas = np.bincount(labels.ravel(), minlength=2) / labels.size
    others = [r for r in range(1, len(areas)) if areas[r] >= 0.01 and r not in chosen]
    rng.shuffle(others)
    regions = [*chosen, *others][:REGIONS]
    rest = ~np.isin(labels, chosen)
    if not regions or rest.mean() < 0.1:
        return []
    whole = photos.strength_to(shot[rest], photo[rest])
    rule = rule_of(shot)
    ruled = to_float(on_curve(shot, rule))
    small = cv2.resize(shot, (tower.SIZE, tower.SIZE), interpolation=cv2.INTER_AREA)
    images = [on_curve(small, rule)]
    for label in regions:
        crop = region_crop(ruled, labels == label, tower.SIZE)
        images.append((crop[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    embeddings = embedded(clip, images)
    photo_tones = tones_of(small)
    rows = []
    for index, label in enumerate(regions, 1):
        mask = labels == label
        strength = photos.strength_to(shot[mask], photo[mask])
        rows.append(
            {
                "region": embeddings[index], "photo": embeddings[0],
                "tones": tones_of(shot, mask), "tones_photo": photo_tones,
                "whole": np.float32(whole), "rule": np.float32(rule),
                "area": np.float32(areas[label]), "strength": np.float32(strength),
            }
        )  # fmt: skip
    return rows


# --- training ------------------------------------------------------------------------------------


def photo_rows(data: tower.Data, clip: Clip, seed: int, chunk: int) -> dict[str, Tensor]:
    """One chunk of photos, drawn from (seed, chunk)."""
    rng = np.random.default_rng([seed, chunk])
    return photo_chunk(clip, [tower.photo_and_strength(data, rng, KINDS) for _ in range(CHUNK)])


def all_region_rows(data: tower.Data, clip: Clip, seed: int, chunk: int) -> dict[str, Tensor]:
    """One chunk of regions, drawn from (seed, chunk)."""
    rng = np.random.default_rng([seed, 1, chunk])
    rows: list[dict[str, np.ndarray]] = []
    for index in rng.integers(0, len(data.natural), CHUNK):
        rows += region_rows(clip, data.natural[index].pixels, data.labels[index], rng)
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


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


def region_logits(
    head: judge.RegionHead, rows: dict[str, Tensor], index: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits n,S and the true strengths between region and photo (n), the photo's strength being
    known but for the noise (n)."""
    whole = rows["whole"][index] + noise
    rule = rows["rule"][index]
    numbers = torch.stack([whole, rule, rule - whole, rows["area"][index]], -1)
    logits = head(
        rows["region"][index].float(), rows["photo"][index].float(), rows["tones"][index],
        rows["tones_photo"][index], numbers,
    )  # fmt: skip
    return logits, (rows["strength"][index] - whole).clamp(-2.2, 2.2)


def region_loss(head: judge.RegionHead, rows: dict[str, Tensor], index: Tensor) -> Tensor:
    logits, between = region_logits(head, rows, index, 0.12 * torch.randn(len(index)))
    return -(soft(between) * logits.log_softmax(1)).sum(1).mean()


def trained(head: nn.Module, loss_of: Loss, rows: dict[str, Tensor], seed: int) -> nn.Module:
    """The head after AdamW with a cosine."""
    torch.manual_seed(seed)
    count = len(next(iter(rows.values())))
    optim = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    head.train()
    for step in range(STEPS):
        for group in optim.param_groups:
            done = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * done
        loss = loss_of(head, rows, torch.randint(count, (BATCH,)))
        optim.zero_grad()
        loss.backward()
        optim.step()
    return head.eval()


def heads(photo: dict[str, Tensor], region: dict[str, Tensor], dim: int, seed: int) -> State:
    """State of a judge that reads embeddings of `dim` numbers; 0: tones alone."""
    found = trained(judge.Head(dim), photo_loss, photo, seed)
    good = torch.exp(-0.5 * (photo["strength"] / SPREAD) ** 2).mean()
    with torch.no_grad():  # as if half of the photos were good
        found.photo.answer.bias[-1] -= torch.logit(good)
    regions = trained(judge.RegionHead(dim), region_loss, region, seed)
    return {f"photo.{k}": v for k, v in found.state_dict().items()} | {
        f"regions.{k}": v for k, v in regions.state_dict().items()
    }
