"""Train the judge: fine-tune clip-lite0 for it, then its heads.

    python -m recipes.judge.train --natural FOLDER [FOLDER ...] --brackets FOLDER \\
        --start clip-lite0.safetensors --out FOLDER

--natural: ordinary photos, taken to be as their makers meant them.  --brackets: one sub-folder of
frames per scene.  --start: what recipes.clip_lite0 made.  --out: work and results: clip-lite0
.safetensors and .json, judge.safetensors.  Which photos are seen is told by their names
(photos.split_of).  Stopped at any moment, the same command goes on.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.stages.priors.clip import Clip, load_clip
from evenlight.stages.settings import ClipSettings
from recipes.clip_lite0 import captions
from recipes.clip_lite0 import losses as clip_losses
from recipes.clip_lite0.model import VOCABULARY, export, normalised
from recipes.judge import camera, heads, photos, tower

PHOTO_CHUNKS, REGION_CHUNKS = 24, 16  # of heads.CHUNK draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--natural", type=Path, nargs="+", required=True)
    parser.add_argument("--brackets", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    clip = fine_tuned(arguments)
    data = dataclasses.replace(load(arguments, "heads"), staged=heads.STAGED)
    photo = drawn(arguments, "photos", heads.photo_rows, PHOTO_CHUNKS, data, clip)
    region = drawn(arguments, "regions", heads.all_region_rows, REGION_CHUNKS, data, clip)
    save(arguments.out / "judge.safetensors", clip, photo, region, seed=arguments.seed)


def load(arguments: argparse.Namespace, split: str) -> tower.Data:
    """Photos of a split with their region maps; brackets, and the responses between frames."""
    natural = photos.natural_photos(arguments.natural, split)
    brackets = photos.brackets(arguments.brackets, split)
    labels = photos.label_maps(natural, arguments.out)
    return tower.Data(natural, labels, brackets, camera.responses(brackets))


def fine_tuned(arguments: argparse.Namespace) -> Clip:
    """The CLIP that ships, made if it is not there yet."""
    weights = arguments.out / "clip-lite0.safetensors"
    if not weights.is_file():
        natural = photos.natural_photos(arguments.natural, "tower")
        labels = photos.label_maps(natural, arguments.out)
        choose = load(arguments, "choose")
        model = tower.trained(arguments, natural, labels, choose)
        fit_temperature(model, tower.held_samples(choose, 2))
        seen = torch.ones(VOCABULARY, dtype=torch.bool)
        export(model, seen, arguments.out, size=tower.SIZE)
    return load_clip(ClipSettings(weights=str(weights), image_size=tower.SIZE))


@torch.no_grad()
def fit_temperature(model: nn.Module, samples: list[tower.Sample]) -> None:
    """Scale of least cross-entropy of the class words on held-out photos."""
    prompts = [captions.CANONICAL_TEMPLATE.format(word) for word in captions.CANONICAL]
    text = F.normalize(model.encode_text(tower.tokenizer()(prompts)), dim=-1)
    images = [sample.image for sample in samples]
    parts = [normalised(images[i : i + 64]) for i in range(0, len(images), 64)]
    cosines = torch.cat([F.normalize(model.encode_image(p), dim=-1) for p in parts]) @ text.T
    labels = clip_losses.soft_labels(torch.tensor([sample.ev for sample in samples]))
    scales = torch.logspace(0, 2, 101)
    losses = [-(labels * (cosines * s).log_softmax(1)).sum(1).mean() for s in scales]
    model.logit_scale.fill_(math.log(float(scales[int(np.argmin(losses))])))


def drawn(
    arguments: argparse.Namespace,
    name: str,
    rows: Callable[[tower.Data, Clip, int, int], dict[str, Tensor]],
    chunks: int,
    data: tower.Data,
    clip: Clip,
) -> dict[str, Tensor]:
    """All rows of a kind, each chunk kept in a file once it is made."""
    found = []
    for chunk in range(chunks):
        path = arguments.out / f"{name}-{chunk}.safetensors"
        if not path.is_file():
            made = rows(data, clip, arguments.seed, chunk)
            save_file({k: v.contiguous() for k, v in made.items()}, f"{path}.partial")
            Path(f"{path}.partial").replace(path)
        found.append(load_file(path))
    return {key: torch.cat([one[key] for one in found]) for key in found[0]}


def save(
    path: Path, clip: Clip, photo: dict[str, Tensor], region: dict[str, Tensor], *, seed: int
) -> None:
    """The file that ships: heads that read this CLIP, heads that read tones alone, in float16."""
    known = torch.tensor(list(bytes.fromhex(clip.fingerprint)), dtype=torch.uint8)
    tensors = {"clip": known}
    for prefix, dim in (("clip", clip.dim), ("tones", 0)):
        state = heads.heads(photo, region, dim, seed)
        tensors |= {f"{prefix}.{name}": tensor.half() for name, tensor in state.items()}
    save_file(tensors, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
