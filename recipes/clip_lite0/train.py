"""Train clip-lite0: an open_clip model that judges exposure.

python -m recipes.clip_lite0.train --photos FOLDER [--photos FOLDER ...] \
    --tower efficientnet-lite0.pth --out FOLDER

A folder with a manifest.csv holds real brackets (one sub-folder per scene); any other holds good
photos. Stopped at any moment, the same command resumes from the last checkpoint. The weights
written are the moving average at the last step, its temperature fitted on photos held out of the
training folders; nothing is chosen by eye.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.clip_lite0 import captions, data, photos
from recipes.clip_lite0 import losses as clip_losses
from recipes.clip_lite0.model import (
    SIZE,
    START_TOKEN,
    VOCABULARY,
    export,
    fuse,
    new_model,
    normalised,
)

# B samples, D embedding, 3 classes: under, normal, over

EARLY_SIZE, EARLY = 96, 0.55  # smaller squares for the first part of the steps: twice as many
GROUPS, VERSIONS = 16, 3
CAPTIONED = 24  # samples of a batch whose caption is read: a third of the text tower's time
WORDINGS = 5  # prompts per class and step
UNREAD = 0.05  # share of the tokens that are not read: words it never learned must not mislead
MOST_EV = 3.5  # labels of the main part are cut there, those of the last part at WIDEST_EV:
LAST_STEPS, LAST_RATE = 200, 0.3  # it puts the extremes of real brackets in order
EVERY = 250  # steps between checkpoints and held-out measurements
HELD_EVS = (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)


def train_step(
    model: nn.Module, batches: data.Batches, size: int, most_ev: float, contents: list[str],
    rng: np.random.Generator, tokenizer,
) -> dict:  # fmt: skip
    samples = batches.draw(GROUPS, size, most_ev, rng)
    ev = torch.tensor([float(s.ev) for s in samples], dtype=torch.float32)
    read = rng.permutation(len(samples))[:CAPTIONED]
    texts = [samples[i].caption for i in read]
    texts += captions.class_prompts(WORDINGS, contents, rng)
    text = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
    image = F.normalize(model.encode_image(normalised([s.image for s in samples])), dim=-1)
    scale = model.logit_scale.exp().clamp(max=60)
    said, prompts = text[:CAPTIONED], text[CAPTIONED:].view(3, WORDINGS, -1)
    losses = clip_losses.exposure_losses(image, prompts, ev, scale, VERSIONS)
    named = [samples[i] for i in read]
    losses["clip"] = 0.3 * clip_losses.contrastive(image[read], said, named, scale)
    return losses


# --- held-out photos: progress, and the temperature ----------------------------------------------


def held_set(pool: photos.Pool) -> tuple[Tensor, Tensor]:
    """Held-out photos at each of HELD_EVS.  Returns N,3,SIZE,SIZE and N."""
    rng = np.random.default_rng(0)
    images, evs = [], []
    for photo in pool.held_photos:
        for ev in HELD_EVS:
            shot = data.camera(photo.pixels, ev, rng) if ev else photo.pixels
            images.append(data.shrunk(shot, SIZE))
            evs.append(ev)
    return normalised(images), torch.tensor(evs)


@torch.no_grad()
def held_logits(model: nn.Module, tokenizer, images: Tensor) -> Tensor:
    """Logits of the canonical prompts.  Returns N,3."""
    prompts = [captions.CANONICAL_TEMPLATE.format(word) for word in captions.CANONICAL]
    text = F.normalize(model.encode_text(tokenizer(prompts)), dim=-1)
    parts = [F.normalize(model.encode_image(part), dim=-1) for part in images.split(64)]
    return model.logit_scale.exp() * torch.cat(parts) @ text.T


def best_factor(logits: Tensor, evs: Tensor) -> float:
    """What the logits are multiplied by for the least cross-entropy."""
    labels = (torch.sign(evs) + 1).long()
    factors = torch.logspace(math.log10(0.2), math.log10(5), 161)
    return float(min(factors, key=lambda f: F.cross_entropy(logits * f, labels)))


def figures(logits: Tensor, evs: Tensor) -> dict[str, float]:
    d, far = logits[:, 2] - logits[:, 0], evs.abs() >= 1
    right = logits.argmax(1) - 1 == torch.sign(evs)
    ranks = torch.stack([d.argsort().argsort().float(), evs])
    return {
        "accuracy": right[far].float().mean().item(),
        "accuracy_normal": right[~far].float().mean().item(),
        "rank_correlation": torch.corrcoef(ranks)[0, 1].item(),
        "d_at_0": d[~far].mean().item(),
        "factor": best_factor(logits, evs),
    }


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    trunk = [p for p in model.visual.trunk.parameters() if p.requires_grad]
    table = [model.token_embedding.weight, model.positional_embedding, model.logit_scale]
    named = {id(p) for p in trunk + table}
    heads = [p for p in model.parameters() if p.requires_grad and id(p) not in named]
    return torch.optim.AdamW(
        [
            {"params": trunk, "lr": 4e-4, "weight_decay": 0.05},
            {"params": heads, "lr": 1e-3, "weight_decay": 0.05},
            {"params": table, "lr": 1e-3, "weight_decay": 0.0},
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, action="append", required=True)
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    pool = photos.load_pool(args.photos)
    held = f"{len(pool.held_photos)} photos and {len(pool.held_brackets)} scenes held out"
    print(f"{len(pool.chosen)} chosen and {len(pool.web)} web photos, {len(pool.brackets)} "
          f"scenes; {held}", flush=True)  # fmt: skip
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    model = new_model(args.tower)
    ema = copy.deepcopy(model).eval()
    fuse(model.visual.trunk)
    fit(model, ema, pool, tokenizer, args)


def read_some(model: nn.Module) -> Tensor:
    """Make the tower miss some words in training.  Returns the mask of tokens seen, kept up."""
    seen = torch.zeros(VOCABULARY, dtype=torch.bool)

    def read_tokens(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        seen[inputs[0].unique()] = True
        word = (inputs[0] > 0) & (inputs[0] < START_TOKEN)  # neither padding nor start nor end
        return output.masked_fill((word & (torch.rand(word.shape) < UNREAD))[..., None], 0)

    model.token_embedding.register_forward_hook(read_tokens)
    return seen


def rate_factor(step: int, steps: int) -> float:
    """Warm-up and cosine of the main part, then a lower cosine for the last part."""
    if step < steps:
        return max(0.01, min(1, (step + 1) / 100) * cosine(step / steps))
    return max(0.01, LAST_RATE * cosine((step - steps) / LAST_STEPS))


def cosine(done: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * done)


def update(model: nn.Module, ema: nn.Module, optim: torch.optim.Optimizer, step: int) -> None:
    """One optimiser step from the gradients, and the moving average after it; step: of its part."""
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optim.step()
    decay = min(0.995, (step + 1) / (step + 10))
    with torch.no_grad():
        for kept, new in zip(ema.parameters(), model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay)


def fit(model: nn.Module, ema: nn.Module, pool: photos.Pool, tokenizer, args) -> None:
    batches = data.Batches(pool, VERSIONS)
    print("film strengths that undo", batches.undo.evs, batches.undo.strengths.round(3), flush=True)
    contents = sorted({p.content for p in pool.web}) or ["place"]
    held_images, held_evs = held_set(pool)
    optim = optimiser(model)
    base = [g["lr"] for g in optim.param_groups]
    seen, first, state_path = read_some(model), 0, args.out / "state.pt"
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        for name, part in (("model", model), ("ema", ema), ("optim", optim)):
            part.load_state_dict(state[name])
        seen |= state["seen"]
        first = state["step"]
    model.train()
    start, running = time.time(), {}
    for step in range(first, args.steps + LAST_STEPS):
        main_part = step < args.steps
        for group, rate in zip(optim.param_groups, base, strict=True):
            group["lr"] = rate * rate_factor(step, args.steps)
        rng = np.random.default_rng([args.seed, step])
        size = EARLY_SIZE if step < EARLY * args.steps else SIZE
        most_ev = MOST_EV if main_part else data.WIDEST_EV
        losses = train_step(model, batches, size, most_ev, contents, rng, tokenizer)
        total = sum(losses.values())
        assert torch.isfinite(total), (step, losses)
        optim.zero_grad(set_to_none=True)
        total.backward()
        update(model, ema, optim, step if main_part else step - args.steps)
        for name, value in losses.items():
            running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        if step % 25 == 24:
            rate = (step + 1 - first) / (time.time() - start)
            line = {"step": step + 1, "steps_per_s": round(rate, 3)}
            line |= {name: round(value, 4) for name, value in running.items()}
            print(json.dumps(line), flush=True)
        if step % EVERY == EVERY - 1:
            row = figures(held_logits(ema, tokenizer, held_images), held_evs)
            print(json.dumps({"step": step + 1, "held_out": row}), flush=True)
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "seen": seen,
                     "optim": optim.state_dict(), "step": step + 1}  # fmt: skip
            torch.save(state, f"{state_path}.partial")
            Path(f"{state_path}.partial").replace(state_path)
    logits = held_logits(ema, tokenizer, held_images)
    with torch.no_grad():
        ema.logit_scale += math.log(best_factor(logits, held_evs))
    print(json.dumps({"fitted": figures(held_logits(ema, tokenizer, held_images), held_evs)}))
    export(ema, seen, args.out)


if __name__ == "__main__":
    main()
