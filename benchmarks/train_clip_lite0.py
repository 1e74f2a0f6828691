"""Train clip-lite0: an open_clip model that judges exposure.

python benchmarks/train_clip_lite0.py --photos FOLDER [--photos FOLDER ...] \
    --tower efficientnet-lite0.pth --out FOLDER

A folder with a manifest.csv holds real brackets (one sub-folder per scene); any other holds good
photos. Stopped at any moment, the same command resumes from the last checkpoint.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import clip_lite0_data as data
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

# B samples, D embedding, W wordings, 3 classes: under, normal, over

CONFIG = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 128,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 128,
            "heads": 4,
            "layers": 4,
        },
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "size": 128},
}
SIZE = 128
GROUPS, VERSIONS = 12, 4
EV_LOGITS = 4.0  # d grows by this much per EV
BOUNDARY_EV = 0.5  # under | normal | over meet here
WORDINGS = 4  # prompts per class and step
CANONICAL = ("underexposed", "well-exposed", "overexposed")
EVERY = 150  # steps between checkpoints and held-out measurements


def new_model(tower: Path) -> nn.Module:
    """The architecture of CONFIG with the ImageNet tower; timm's state dict has the same order."""
    model = open_clip.CLIP(**copy.deepcopy(CONFIG["model_cfg"]))
    weights = torch.load(tower, weights_only=True)
    trunk = model.visual.trunk
    wanted = trunk.state_dict()
    named = dict(zip(wanted, list(weights.values()), strict=False))
    assert all(named[k].shape == wanted[k].shape for k in wanted)
    trunk.load_state_dict(named)
    for part in (trunk.conv_stem, trunk.bn1, *trunk.blocks[:2]):
        part.requires_grad_(False)  # half of the time of a step, and edges need no new exposure
    nn.init.constant_(model.logit_scale, math.log(30))
    return model.to(memory_format=torch.channels_last)


def normalised(images: list[np.ndarray]) -> Tensor:
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return ((x - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def class_prompts(rng: np.random.Generator) -> list[str]:
    """WORDINGS prompts of each class: the canonical one first, each template over all classes."""
    templates = ["a photo with {} lighting"]
    templates += [str(rng.choice(data.TEMPLATES)) for _ in range(WORDINGS - 1)]
    prompts = []
    for label, words in enumerate(data.CLASS_WORDS):
        prompts.append(templates[0].format(CANONICAL[label]))
        prompts += [t.format(str(rng.choice(words))) for t in templates[1:]]
    return prompts


def soft_labels(ev_B: Tensor) -> Tensor:
    """Class probabilities that change over smoothly at the boundaries.  Returns B,3."""
    under = torch.sigmoid((-ev_B - BOUNDARY_EV) / 0.1)
    over = torch.sigmoid((ev_B - BOUNDARY_EV) / 0.1)
    return torch.stack([under, 1 - under - over, over], 1).clamp_min(0)


def contrastive(image_BD: Tensor, text_BD: Tensor, samples: list[data.Sample], scale: Tensor):
    """CLIP loss; positives are all pairs of like exposure unless a caption names other content."""
    ev = torch.tensor([s.ev for s in samples])
    match = torch.exp(-((ev[:, None] - ev[None]) ** 2) / (2 * 0.35**2))
    for column, sample in enumerate(samples):
        if sample.content and sample.content in sample.caption:
            same = torch.tensor([float(s.content == sample.content) for s in samples])
            match[:, column] *= same
    logits = scale * image_BD @ text_BD.T
    rows = match / match.sum(1, keepdim=True).clamp_min(1e-6)
    columns = match / match.sum(0, keepdim=True).clamp_min(1e-6)
    return (
        -(
            (rows * logits.log_softmax(1)).sum(1).mean()
            + (columns * logits.log_softmax(0)).sum(0).mean()
        )
        / 2
    )


def exposure_losses(image_BD: Tensor, prompts_3WD: Tensor, ev_B: Tensor, scale: Tensor) -> dict:
    """Cross-entropy, regression and ranking of d, and the peak of normal at 0 (method.md 5)."""
    logits_BW3 = scale * torch.einsum("bd,cwd->bwc", image_BD, prompts_3WD)
    pooled = F.normalize(prompts_3WD.mean(1), dim=-1)
    logits_BW3 = torch.cat([logits_BW3, scale * (image_BD @ pooled.T)[:, None]], 1)
    target = soft_labels(ev_B)[:, None]
    ce = -(target * logits_BW3.log_softmax(-1)).sum(-1).mean()
    d_BW = (logits_BW3[..., 2] - logits_BW3[..., 0]) / EV_LOGITS
    weight = 1 / (0.4 + ev_B.abs())
    error = F.huber_loss(d_BW, ev_B[:, None].expand_as(d_BW), reduction="none", delta=0.5)
    d_GV = d_BW[:, -1].view(-1, VERSIONS)
    ev_GV = ev_B.view(-1, VERSIONS)
    rise = d_GV[:, :, None] - d_GV[:, None]
    ev_rise = ev_GV[:, :, None] - ev_GV[:, None]
    later = ev_rise > 0.05
    rank = F.softplus(-4 * (rise - 0.5 * ev_rise))[later].mean()
    normal = logits_BW3[:, -1, 1].view(-1, VERSIONS)
    # versions of one photo: the one nearer to 0 must look more normal
    nearer = (ev_GV.abs()[:, :, None] - ev_GV.abs()[:, None]).clamp_min(0)
    peak = F.softplus(normal[:, :, None] - normal[:, None] + 0.5 * nearer)[nearer > 0.2].mean()
    return {"ce": ce, "reg": 2 * (weight[:, None] * error).mean(), "rank": 0.5 * rank,
            "peak": 0.25 * peak}  # fmt: skip


def train_step(model: nn.Module, pool: data.Pool, rng: np.random.Generator, tokenizer) -> dict:
    samples = data.batch(pool, GROUPS, VERSIONS, SIZE, rng)
    ev = torch.tensor([s.ev for s in samples])
    texts = [s.caption for s in samples] + class_prompts(rng)
    text = F.normalize(model.encode_text(tokenizer(texts)), dim=-1)
    image = F.normalize(model.encode_image(normalised([s.image for s in samples])), dim=-1)
    scale = model.logit_scale.exp().clamp(max=60)
    captions, prompts = text[: len(samples)], text[len(samples) :].view(3, WORDINGS, -1)
    losses = exposure_losses(image, prompts, ev, scale)
    losses["clip"] = 0.5 * contrastive(image, captions, samples, scale)
    return losses


# --- held-out measurement ------------------------------------------------------------------------


@torch.no_grad()
def coordinate(model: nn.Module, tokenizer, images: list[np.ndarray]) -> np.ndarray:
    """Logits of the canonical prompts.  images: float32 RGB in [0, 1].  Returns N,3."""
    prompts = [f"a photo with {word} lighting" for word in CANONICAL]
    text = F.normalize(model.encode_text(tokenizer(prompts)), dim=-1)
    parts = [
        F.normalize(model.encode_image(normalised(images[i : i + 64])), dim=-1)
        for i in range(0, len(images), 64)
    ]
    return (model.logit_scale.exp() * torch.cat(parts) @ text.T).numpy()


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(v)).astype(float) for v in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def held_out(model: nn.Module, tokenizer, pool: data.Pool) -> dict[str, float]:
    """3-way accuracy and Spearman on re-exposed photos; order and error of d in real brackets."""
    rng = np.random.default_rng(0)
    images, evs = [], []
    for photo in pool.held_photos:
        crop = data.cut(photo.pixels, (0, 0, data.SIDE, data.SIDE), False, SIZE)
        for ev in (-2.0, -1.0, 0.0, 1.0, 2.0):
            shot = data.camera(crop, ev, rng) if ev else crop
            images.append(shot.astype(np.float32) / 255)
            evs.append(ev)
    logits, ev = coordinate(model, tokenizer, images), np.array(evs)
    guess, truth = logits.argmax(1) - 1, np.sign(ev)
    d = logits[:, 2] - logits[:, 0]
    orders, errors = [], []
    for bracket in pool.held_brackets:
        box = (0, 0, data.SIDE, data.SIDE)
        frames = [data.cut(f, box, False, SIZE) for f in bracket.frames]
        asked = [
            data.film(f, t) for f, t in zip(frames, bracket.to_best, strict=True) if abs(t) < 2
        ]
        logits = coordinate(model, tokenizer, [f.astype(np.float32) / 255 for f in frames])
        orders.append(spearman(logits[:, 2] - logits[:, 0], np.arange(len(frames))))
        # moved to the best frame's exposure, d must be 0; its offset is the error in t
        logits = coordinate(model, tokenizer, asked)
        errors += list((logits[:, 2] - logits[:, 0]) / EV_LOGITS * data.LN2)
    return {
        "accuracy": float((guess == truth)[np.abs(ev) >= 1].mean()),
        "spearman": spearman(d, ev),
        "bracket_order": float(np.mean(orders)),
        "t_error": float(np.mean(np.abs(errors))),
        "t_bias": float(np.mean(errors)),
    }


# --- files ---------------------------------------------------------------------------------------


def export(model: nn.Module, seen: Tensor, out: Path) -> None:
    """float16 safetensors and the open_clip config.

    Rows of tokens that no caption used are still random: zero says nothing, noise would mislead.
    """
    state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
    state["token_embedding.weight"][~seen] = 0
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, out / "clip-lite0.safetensors.partial")
    (out / "clip-lite0.safetensors.partial").replace(out / "clip-lite0.safetensors")
    (out / "clip-lite0.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    trunk = [p for n, p in model.named_parameters() if n.startswith("visual.trunk")]
    trunk = [p for p in trunk if p.requires_grad]
    table = [model.token_embedding.weight, model.positional_embedding, model.logit_scale]
    named = {id(p) for p in trunk + table}
    heads = [p for p in model.parameters() if p.requires_grad and id(p) not in named]
    return torch.optim.AdamW(
        [
            {"params": trunk, "lr": 2.5e-4, "weight_decay": 0.02},
            {"params": heads, "lr": 1e-3, "weight_decay": 0.02},
            {"params": table, "lr": 1e-3, "weight_decay": 0.0},
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, action="append", required=True)
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    pool = data.load_pool(args.photos)
    held = f"{len(pool.held_photos)} and {len(pool.held_brackets)} held out"
    print(f"{len(pool.photos)} photos, {len(pool.brackets)} brackets; {held}", flush=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=32)
    model = new_model(args.tower)
    ema = copy.deepcopy(model).eval()
    fit(model, ema, pool, tokenizer, args)


def fit(model: nn.Module, ema: nn.Module, pool: data.Pool, tokenizer, args) -> None:
    optim = optimiser(model)
    base = [g["lr"] for g in optim.param_groups]
    seen = torch.zeros(49408, dtype=torch.bool)
    first, best = 0, -math.inf
    state_path = args.out / "state.pt"
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optim.load_state_dict(state["optim"])
        seen, first, best = state["seen"], state["step"], state["best"]

    def note_tokens(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen[inputs[0].unique()] = True

    model.token_embedding.register_forward_pre_hook(note_tokens)
    model.eval()  # batch norm keeps its ImageNet statistics: re-exposed batches would bend them
    start, running = time.time(), {}
    for step in range(first, args.steps):
        factor = min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group, rate in zip(optim.param_groups, base, strict=True):
            group["lr"] = rate * max(factor, 0.01)
        losses = train_step(model, pool, np.random.default_rng([args.seed, step]), tokenizer)
        total = sum(losses.values())
        assert torch.isfinite(total), (step, losses)
        optim.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optim.step()
        decay = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, new in zip(ema.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        for name, value in losses.items():
            running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        if step % 25 == 24:
            rate = (step + 1 - first) / (time.time() - start)
            line = {"step": step + 1, "steps_per_s": round(rate, 3)}
            line |= {name: round(value, 4) for name, value in running.items()}
            print(json.dumps(line), flush=True)
        if step % EVERY == EVERY - 1 or step == args.steps - 1:
            figures = held_out(ema, tokenizer, pool)
            goal = figures["accuracy"] + figures["bracket_order"] - 2 * figures["t_error"]
            if goal > best:
                best = goal
                export(ema, seen, args.out)
            print(json.dumps({"step": step + 1, "held_out": figures, "kept": goal == best}),
                  flush=True)  # fmt: skip
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "seen": seen,
                     "optim": optim.state_dict(), "step": step + 1, "best": best}  # fmt: skip
            torch.save(state, f"{state_path}.partial")
            Path(f"{state_path}.partial").replace(state_path)


if __name__ == "__main__":
    main()
