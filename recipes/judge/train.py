"""Train the judge: fine-tune clip-lite0 for it, then its heads.

    python -m recipes.judge.train --natural FOLDER [FOLDER ...] --brackets FOLDER \\
        --start clip-lite0.safetensors --out FOLDER

--natural: ordinary photos, taken to be as their makers meant them.  --brackets: one sub-folder of
frames per scene.  --objects: maps of objects that people outlined in some of the photos, in the
layout `uneven` (benchmarks/bsds_objects.py).  --start: what recipes.clip_lite0 made.  --out: work
and results: clip-lite0.safetensors and .json, region-embedder.safetensors, judge.safetensors.
--photo-heads: a judge.safetensors whose heads for photos are kept, so that regions alone are
trained.  Which photos are seen is told by their names (photos.split_of).  Stopped at any moment,
the same command goes on; the training of regions, a quarter of an hour of two cores, begins anew.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.stages.priors import fingerprints
from evenlight.stages.priors.clip import Clip, load_clip
from evenlight.stages.priors.fastsam import load_segmenter
from evenlight.stages.priors.judge import Head, RegionHead
from evenlight.stages.priors.lite0 import Tower
from evenlight.stages.priors.region_embedder import Decoder
from evenlight.stages.settings import ClipSettings, RegionSettings
from recipes.clip_lite0 import captions
from recipes.clip_lite0 import losses as clip_losses
from recipes.clip_lite0 import photos as clip_photos
from recipes.clip_lite0.model import VOCABULARY, export, normalised
from recipes.judge import camera, heads, photos, regions, tower

PHOTO_CHUNKS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--natural", type=Path, nargs="+", required=True)
    parser.add_argument("--brackets", type=Path, required=True)
    parser.add_argument("--objects", type=Path)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photo-heads", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--region-steps", type=int, default=regions.STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    clip = fine_tuned(arguments)
    decoder, region_head = judged_by_region(arguments)
    embedder = arguments.out / "region-embedder.safetensors"
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    state = {k: x.contiguous() for k, x in decoder.state_dict().items()}
    save_file({k: x if k.endswith(statistics) else x.half() for k, x in state.items()}, embedder)
    reading = fingerprints.shipped_reading(ClipSettings())
    known = fingerprints.of_clip(
        fingerprints.SHIPPED_CLIP, weights_of(arguments), reading, embedder
    )
    tensors = {"clip": torch.tensor(list(bytes.fromhex(known)), dtype=torch.uint8)}
    for prefix, head in photo_heads(arguments, clip).items():
        tensors |= {f"{prefix}.photo.{key}": x.half() for key, x in head.state_dict().items()}
    tensors |= {f"regions.{key}": x.half() for key, x in region_head.state_dict().items()}
    save_file(tensors, arguments.out / "judge.safetensors")


def judged_by_region(arguments: argparse.Namespace) -> tuple[Decoder, RegionHead]:
    """What regions are embedded by, and the head that judges them."""
    segmenter = load_segmenter(RegionSettings(), "cpu")
    files = (path for folder in arguments.natural for path in clip_photos.image_files(folder))
    paths = [path for path in files if photos.split_of(path.name) in ("tower", "heads")]
    folders = photos.scenes(arguments.brackets, "heads")
    return regions.trained(
        regions.good_photos(paths, arguments.objects, segmenter),
        list(regions.scenes(folders, segmenter)),
        Tower(load_file(weights_of(arguments))),
        arguments.seed,
        arguments.region_steps,
    )


def photo_heads(arguments: argparse.Namespace, clip: Clip) -> dict[str, Head]:
    """One that reads this CLIP, one that reads tones alone, by the names that they ship under."""
    dims = {"clip": clip.dim, "tones": 0}
    if arguments.photo_heads:
        made = load_file(arguments.photo_heads)
        found = {name: Head(dim) for name, dim in dims.items()}
        for name, head in found.items():
            start = f"{name}.photo."
            head.load_state_dict(
                {k[len(start) :]: x for k, x in made.items() if k.startswith(start)}
            )
        return found
    data = dataclasses.replace(load(arguments, "heads"), staged=heads.STAGED)
    rows = drawn(arguments, "photos", PHOTO_CHUNKS, partial(heads.photo_rows, data, clip))
    return {name: heads.trained(rows, dim, arguments.seed) for name, dim in dims.items()}


def load(arguments: argparse.Namespace, split: str) -> tower.Data:
    """Photos of a split with their region maps; brackets, and the responses between frames."""
    natural = photos.natural_photos(arguments.natural, split)
    brackets = photos.brackets(arguments.brackets, split)
    labels = photos.label_maps(natural, arguments.out)
    return tower.Data(natural, labels, brackets, camera.responses(brackets))


def weights_of(arguments: argparse.Namespace) -> Path:
    return arguments.out / "clip-lite0.safetensors"


def fine_tuned(arguments: argparse.Namespace) -> Clip:
    """The CLIP that ships, made if it is not there yet."""
    weights = weights_of(arguments)
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
    chunks: int,
    rows: Callable[[int, int], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """All rows of a kind, each chunk kept in a file once it is made.  rows: of a seed and chunk."""
    found = []
    for chunk in range(chunks):
        path = arguments.out / f"{name}-{chunk}.safetensors"
        if not path.is_file():
            made = rows(arguments.seed, chunk)
            save_file({k: v.contiguous() for k, v in made.items()}, f"{path}.partial")
            Path(f"{path}.partial").replace(path)
        found.append(load_file(path))
    return {key: torch.cat([one[key] for one in found]) for key in found[0]}


if __name__ == "__main__":
    main()
