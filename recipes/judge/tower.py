"""The first half of the recipe (train.py): clip-lite0 fine-tuned end to end for the judge.

One image a sample: a photo as it is, mis-exposed by a random camera, or a region of one, half of
them already moved along the film curve by a strength that the head is told.  The tower learns
through the head (cross-entropy of the strength that is missing, and of being good), and through
captions and class prompts as before, so that it stays a CLIP.  A thousand steps: on photos held
out it was best then, and worse at 1,750.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.stages.pixels import mixed, pooled, resize, to_bytes, to_float
from evenlight.stages.priors import judge, opinion, tone
from evenlight.stages.priors.judge_tuning import SPREAD, soft
from evenlight.stages.priors.tones import tones as tones_of
from recipes.clip_lite0 import captions
from recipes.clip_lite0 import losses as clip_losses
from recipes.clip_lite0 import photos as clip_photos
from recipes.clip_lite0.model import CONFIG, fuse, normalised
from recipes.judge import camera, photos
from recipes.judge.staged import staged

# B samples, D embedding, S strengths

SIZE = 160
BATCH = 32
# Shares up to which a draw is a region, a photo as it is, a mis-exposed photo; else it is a frame
# of a bracket.
KINDS = (0.12, 0.45, 1.0)
STRENGTH_PER_EV = 0.42  # measured: what undoes one EV of a camera
LIMIT = 2.2
READ = 16  # samples of a batch whose caption is read
REGION_GROWTH = 1.5  # crop side over region box side
BLUR_CELLS = 16  # a side: what the surrounding of a region is blurred to
EVERY = 250
EMA = 0.998


@dataclass(frozen=True)
class Sample:
    image: np.ndarray  # SIZE,SIZE,3 uint8, as the tower sees it
    tones: np.ndarray  # of the photo before `given`
    tones_here: np.ndarray  # of the image
    given: float
    rule: float
    missing: float  # beyond given
    good: float  # 0 to 1
    content: str
    caption: str

    @property
    def ev(self) -> float:
        return -self.missing / STRENGTH_PER_EV


@dataclass
class Data:
    natural: list[photos.Natural]
    labels: np.ndarray  # region map of each of them
    brackets: list[photos.Bracket]
    real: list[tuple[float, np.ndarray]]
    staged: float = 0.06  # share of good photos that are staged


def cropped(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random box of a photo, most often nearly all of it, at SIZE, flipped or not."""
    side = pixels.shape[0]
    least = 0.78 if rng.random() < 0.6 else 0.45
    height, width = (int(side * s) for s in rng.uniform(least, 1, 2))
    top, left = (int(rng.integers(0, side - n + 1)) for n in (height, width))
    flip = -1 if rng.random() < 0.5 else 1
    box = np.ascontiguousarray(pixels[top : top + height, left : left + width][:, ::flip])
    return cv2.resize(box, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def scene(data: Data, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A good photo; sometimes half of it shows another (none is to be learned by heart), and some
    are staged."""
    natural = data.natural[int(rng.integers(len(data.natural)))]
    photo = cropped(natural.pixels, rng)
    kind = rng.random()
    if kind < data.staged:
        return staged(photo, rng), ""
    if kind > data.staged + 0.24:
        return photo, natural.content
    other = cropped(data.natural[int(rng.integers(len(data.natural)))].pixels, rng)
    at = int(rng.uniform(0.3, 0.7) * SIZE)
    if rng.random() < 0.5:
        photo[at:] = other[at:]
    else:
        photo[:, at:] = other[:, at:]
    return photo, ""


def photo_and_strength(
    data: Data, rng: np.random.Generator, kinds: tuple[float, float, float] = KINDS
) -> tuple[np.ndarray, float, str]:
    """A photo, the strength that takes it to what it is meant to be, and what is in it
    ("bracket" for a frame of one)."""
    kind = rng.random()
    if kind < kinds[0]:
        return region_and_strength(data, rng)
    if kind >= kinds[2]:
        return frame_and_strength(data.brackets, rng)
    photo, content = scene(data, rng)
    if kind < kinds[1]:
        # Noise, JPEG and another look say nothing about exposure: good photos have them as well.
        return camera.as_good(photo, rng), 0.0, content
    stops = (0.2 + 4.3 * rng.beta(1, 1.5)) * rng.choice([-1, 1])
    shot = camera.mis_exposed(photo, stops, data.real, rng)
    strength = photos.strength_to(shot, photo)
    return shot, float(np.clip(strength, -LIMIT, LIMIT)), content


def frame_and_strength(
    brackets: list[photos.Bracket], rng: np.random.Generator
) -> tuple[np.ndarray, float, str]:
    """A frame of a real bracket that can be corrected."""
    while True:
        bracket = brackets[int(rng.integers(len(brackets)))]
        index = int(rng.integers(len(bracket.frames)))
        if abs(bracket.strengths[index]) < LIMIT:
            strength = float(bracket.strengths[index])
            return cropped(bracket.frames[index], rng), strength, "bracket"


def region_and_strength(data: Data, rng: np.random.Generator) -> tuple[np.ndarray, float, str]:
    """A region of a shot whose regions are exposed differently, as the judge sees it."""
    while True:
        index = int(rng.integers(len(data.natural)))
        photo, labels = data.natural[index].pixels, data.labels[index]
        shot, chosen = camera.uneven(photo, labels, rng)
        areas = np.bincount(labels.ravel(), minlength=2)[1:] / labels.size
        large = chosen or [int(r) + 1 for r in np.flatnonzero(areas > 0.02)]
        if large:
            mask = labels == int(rng.choice(large))
            crop = region_crop(to_float(shot), mask, SIZE)
            strength = photos.strength_to(shot[mask], photo[mask])
            return to_bytes(crop).numpy(), float(np.clip(strength, -LIMIT, LIMIT)), ""


def region_crop(rgb_13HW: Tensor, mask_HW: np.ndarray, size: int) -> Tensor:
    """The region with a little surrounding, what is outside blurred.

    rgb: float 1,3,H,W in [0, 1].  mask: bool H,W, not empty.  Returns 1,3,size,size.
    """
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    spans = []
    for low, high, limit in (
        (int(rows[0]), int(rows[-1]) + 1, mask_HW.shape[0]),
        (int(columns[0]), int(columns[-1]) + 1, mask_HW.shape[1]),
    ):
        grow = int((high - low) * (REGION_GROWTH - 1) / 2)
        spans.append(slice(max(0, low - grow), min(limit, high + grow)))
    crop = resize(rgb_13HW[..., spans[0], spans[1]], size, size)
    inside = resize(torch.from_numpy(mask_HW[None, None, spans[0], spans[1]]).float(), size, size)
    blurred = resize(pooled(crop, size // BLUR_CELLS), size, size, "bicubic").clamp(0, 1)
    return mixed(blurred, crop, inside)


def sample(data: Data, rng: np.random.Generator) -> Sample:
    photo, strength, content = photo_and_strength(data, rng)
    rule = clip_photos.matching_strength(photo, tone.RULE_TARGET)
    given = 0.0
    if rng.random() < 0.5:
        kind = rng.random()
        given = (
            rule / 2 if kind < 0.25
            else rule if kind < 0.5
            else strength + rng.normal(0, 0.4) if kind < 0.75
            else rule + rng.uniform(-1, 1)
        )  # fmt: skip
        given = float(np.clip(given, -2.8, 2.8))
    image = photo
    if given:
        curve = tone.apply(opinion.FAMILY, torch.arange(256) / 255, given)
        image = cv2.LUT(photo, (curve.numpy() * 255).round().astype(np.uint8))
    missing = float(np.clip(strength - given, -LIMIT, LIMIT))
    tones = tones_of(photo)
    content = "" if content == "bracket" else content
    return Sample(
        image, tones, tones_of(image) if given else tones, given, rule, missing,
        good=math.exp(-0.5 * (strength / SPREAD) ** 2),
        content=content,
        caption=captions.caption(image, -missing / STRENGTH_PER_EV, content, "", rng),
    )  # fmt: skip


def judged(head: judge.Asked, embedding_BD: Tensor, samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Logits of the strength missing (B,S) and of the photo being good (B)."""
    names = ("tones", "tones_here", "given", "rule")
    columns = [torch.from_numpy(np.stack([getattr(s, k) for s in samples])).float() for k in names]
    answer = head(embedding_BD, *columns)
    return answer[:, :-1], answer[:, -1]


def losses_of(
    model: nn.Module, head: judge.Asked, tokenizer, samples: list[Sample], contents: list[str],
    rng: np.random.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    image = F.normalize(model.encode_image(normalised([s.image for s in samples])), dim=-1)
    logits, good_logit = judged(head, image, samples)
    missing = torch.tensor([s.missing for s in samples])
    good = torch.tensor([s.good for s in samples])
    # The answer is for photos that are not good; those that are count a little.
    weight = 1 - 0.7 * good
    ce = -(soft(missing) * logits.log_softmax(1)).sum(1)
    found = {
        "strength": (weight * ce).sum() / weight.sum(),
        "good": F.binary_cross_entropy_with_logits(good_logit, good),
    }
    texts = [s.caption for s in samples[:READ]]
    texts += captions.class_prompts(4, contents, rng)
    text = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
    scale = model.logit_scale.exp().clamp(max=60)
    ev = torch.tensor([s.ev for s in samples])
    prompts = F.normalize(text[READ:].view(3, 4, -1).mean(1), dim=-1)
    target = clip_losses.soft_labels(ev)
    found["words"] = -0.15 * (target * (scale * image @ prompts.T).log_softmax(1)).sum(1).mean()
    found["captions"] = 0.1 * clip_losses.contrastive(
        image[:READ], text[:READ], samples[:READ], scale
    )
    return found


def tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer(context_length=32)


def new_clip(weights: Path) -> nn.Module:
    config = copy.deepcopy(CONFIG["model_cfg"])
    config["vision_cfg"] |= {"timm_drop": 0.2, "timm_drop_path": 0.15}
    model = open_clip.CLIP(**config)
    state = load_file(weights)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    trunk = model.visual.trunk
    for part in (trunk.conv_stem, trunk.bn1, trunk.blocks[0]):
        part.requires_grad_(False)
    return model.to(memory_format=torch.channels_last)


def optimiser(model: nn.Module, head: nn.Module) -> torch.optim.Optimizer:
    trunk = [p for p in model.visual.trunk.parameters() if p.requires_grad]
    named = {id(p) for p in model.visual.trunk.parameters()}
    text = [p for p in model.parameters() if p.requires_grad and id(p) not in named]
    return torch.optim.AdamW(
        [
            {"params": trunk, "lr": 1.5e-4, "weight_decay": 0.05},
            {"params": text, "lr": 2e-4, "weight_decay": 0.03},
            {"params": list(head.parameters()), "lr": 1e-3, "weight_decay": 0.01},
        ]
    )


@torch.no_grad()
def figures(model: nn.Module, head: judge.Asked, samples: list[Sample]) -> dict[str, float]:
    """Errors of the expected strength on held-out samples, by kind."""
    embedding = torch.cat(
        [F.normalize(model.encode_image(normalised([s.image for s in samples[i : i + 64]])), dim=-1)
         for i in range(0, len(samples), 64)]
    )  # fmt: skip
    logits, good_logit = judged(head, embedding, samples)
    missing = torch.tensor([s.missing for s in samples])
    answer = logits.softmax(1) @ judge.STRENGTHS
    error = (answer - missing).abs()
    good = torch.tensor([s.good for s in samples])
    bracket = torch.tensor([s.content == "bracket" for s in samples])
    p_good = good_logit.sigmoid()
    groups = {
        "natural": (good > 0.9) & ~bracket, "shifted": (good <= 0.9) & ~bracket,
        "bracket": bracket,
    }  # fmt: skip
    found = {f"error_{name}": round(error[mask].mean().item(), 4) for name, mask in groups.items()}
    found["spared_natural"] = round((p_good[groups["natural"]] > 0.5).float().mean().item(), 3)
    far = groups["shifted"] & (missing.abs() > 0.3)
    found["spared_shifted"] = round((p_good[far] > 0.5).float().mean().item(), 3)
    nll = -(soft(missing) * logits.log_softmax(1)).sum(1)
    found |= {f"nll_{name}": round(nll[mask].mean().item(), 3) for name, mask in groups.items()}
    return found


def held_samples(data: Data, seed: int) -> list[Sample]:
    """The whole photo once as it is and twice shifted; every frame of held-out brackets."""
    rng = np.random.default_rng(seed)
    found = []

    def add(photo: np.ndarray, strength: float, content: str) -> None:
        rule = clip_photos.matching_strength(photo, tone.RULE_TARGET)
        good = math.exp(-0.5 * (strength / SPREAD) ** 2)
        tones = tones_of(photo)
        found.append(Sample(photo, tones, tones, 0.0, rule, strength, good, content, ""))

    for natural in data.natural:
        photo = cv2.resize(natural.pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        add(photo, 0.0, "")
        for side in (-1, 1):
            shot = camera.mis_exposed(photo, side * rng.uniform(0.5, 3.5), data.real, rng)
            add(shot, float(np.clip(photos.strength_to(shot, photo), -LIMIT, LIMIT)), "")
    for bracket in data.brackets:
        for frame, strength in zip(bracket.frames, bracket.strengths, strict=True):
            if abs(strength) < LIMIT:
                small = cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
                add(small, float(strength), "bracket")
    return found


def rate_factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 100) * (
        0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )


def trained(arguments: argparse.Namespace, natural: list[photos.Natural], labels: np.ndarray,
            choose: Data) -> nn.Module:  # fmt: skip
    """The CLIP after the tower's training, its moving average.

    arguments: start (clip-lite0.safetensors), brackets, out, steps and seed.  natural, labels: the
    photos that the tower may see, and their region maps.  choose: measured on as it goes.
    """
    torch.manual_seed(arguments.seed)
    curves = camera.responses(photos.brackets(arguments.brackets, "heads"))
    data = Data(natural, labels, [], curves)
    held = held_samples(choose, 1)
    model = new_clip(arguments.start)
    head = judge.Asked(
        model.visual.head.proj.out_features, len(judge.STRENGTHS) + 1, hidden=256, dropout=0.15
    )
    ema = copy.deepcopy(nn.ModuleList([model, head])).eval()
    fuse(model.visual.trunk)
    fit(nn.ModuleList([model, head]), ema, data, held, arguments)
    return ema[0]


def fit(both: nn.ModuleList, ema: nn.ModuleList, data: Data, held: list[Sample], arguments) -> None:
    model, head = both
    read = tokenizer()
    contents = sorted({p.content for p in data.natural} - {""}) or ["place"]
    optim = optimiser(model, head)
    base = [g["lr"] for g in optim.param_groups]
    path, first = arguments.out / "tower.pt", 0
    if path.is_file():
        state = torch.load(path, weights_only=True)
        for name, part in (("both", both), ("ema", ema), ("optim", optim)):
            part.load_state_dict(state[name])
        first = state["step"]
    both.train()
    start, running = time.time(), {}
    for step in range(first, arguments.steps):
        for group, rate in zip(optim.param_groups, base, strict=True):
            group["lr"] = rate * rate_factor(step, arguments.steps)
        rng = np.random.default_rng([arguments.seed, step])
        samples = [sample(data, rng) for _ in range(BATCH)]
        losses = losses_of(model, head, read, samples, contents, rng)
        total = sum(losses.values())
        assert torch.isfinite(total), (step, losses)
        optim.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 5.0)
        optim.step()
        decay = min(EMA, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, new in zip(ema.parameters(), both.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        for name, value in losses.items():
            running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
        if step % 50 == 49:
            rate = (step + 1 - first) / (time.time() - start)
            line = {"step": step + 1, "steps_per_s": round(rate, 3)}
            print(json.dumps(line | {k: round(v, 4) for k, v in running.items()}), flush=True)
        if step % EVERY == EVERY - 1 or step + 1 == arguments.steps:
            row = figures(ema[0], ema[1], held)
            print(json.dumps({"step": step + 1, "held_out": row}), flush=True)
            state = {"both": both.state_dict(), "ema": ema.state_dict(),
                     "optim": optim.state_dict(), "step": step + 1}  # fmt: skip
            torch.save(state, f"{path}.partial")
            Path(f"{path}.partial").replace(path)
