"""CLIP through open_clip: loading offline, embedding photos and prompts.

The shipped `clip-lite0` and any open_clip model given as a file go through the same class. Nothing
here opens a connection. A weights file does not say how its pictures were normalised (open_clip
#1068: it then falls back to defaults in silence), so mean and std come from the settings, from
the shipped config, or from open_clip's table where all known weights of the model agree; else we
refuse.
"""

# B photos, H W pixels, D embedding, n texts, M context vectors, L tokens, E token embedding

import difflib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# before open_clip is imported: huggingface_hub reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import open_clip
import torch
from open_clip.factory import load_checkpoint
from open_clip.pretrained import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.cache.errors import EnvironmentLacks, UsageError
from evenlight.cache.files import canonical_json, sha256_bytes, sha256_file
from evenlight.stages.settings import ClipSettings
from evenlight.stages.weights import shipped

SHIPPED = "clip-lite0"
CHUNK = 64  # photos per forward where no gradient is asked: bounds memory, costs nothing


class Clip:
    """A frozen CLIP.

    fingerprint: hex sha256 of the weights' digest and all that decides how a photo is read.
    dim: D.  logit_scale: the factor on cosines that the model was trained with.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int,
        fingerprint: str,
        device: str = "cpu",
    ) -> None:
        self.fingerprint = fingerprint
        self.size = size
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        self._model = model.eval().requires_grad_(False).to(self._device)
        # twice as fast on a CPU for depthwise convolutions (measured 54 -> 131 a second)
        self._model.visual.to(memory_format=torch.channels_last)
        self._mean = torch.tensor(mean, device=self._device).view(3, 1, 1)
        self._std = torch.tensor(std, device=self._device).view(3, 1, 1)
        self.logit_scale = float(self._model.logit_scale.exp().clamp(max=100))
        self.dim = self.embed_text(["a photo"]).shape[1]

    def embed(self, rgb_B3HW: Tensor) -> Tensor:
        """Embed photos, each squashed whole to the model's square.

        rgb_B3HW: float RGB, sRGB-encoded, in [0, 1], any H and W.  Returns float32 B,D of unit
        norm on the model's device, differentiable with respect to the photos.
        """
        if torch.is_grad_enabled() and rgb_B3HW.requires_grad:
            return self._embed(rgb_B3HW)
        with torch.no_grad():
            return torch.cat([self._embed(chunk) for chunk in torch.split(rgb_B3HW, CHUNK)])

    def _embed(self, rgb_B3HW: Tensor) -> Tensor:
        x = rgb_B3HW.to(self._device, torch.float32)
        with torch.autocast(self._device.type, enabled=False):
            if x.shape[-2:] != (self.size, self.size):
                x = F.interpolate(
                    x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
                ).clamp(0, 1)
            x = ((x - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
            return F.normalize(self._model.encode_image(x), dim=-1)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.  Returns float32 n,D of unit norm on the model's device."""
        tokens = self._tokenizer(list(texts)).to(self._device)
        return F.normalize(self._model.encode_text(tokens), dim=-1)

    def token_vectors(self, text: str) -> Tensor:
        """Input vectors of the tokens of a text, without start and end.  Returns L,E."""
        vectors: Tensor = self._text_tower().token_embedding(self._tokens(text))
        return vectors.detach()

    def encode_context(self, context_nME: Tensor, words: Sequence[str]) -> Tensor:
        """Embed prompts made of learned vectors followed by words (CoOp).

        context_nME: M vectors for each of the n words, at the place of tokens.  words: class
        words, put after the context.  Returns float32 n,D of unit norm, differentiable with
        respect to the context.  Raises UsageError where a prompt is longer than the tower reads.
        """
        tower = self._text_tower()
        limit, num_context = tower.positional_embedding.shape[0], context_nME.shape[1]
        end = torch.tensor([self._tokenizer.eot_token_id], device=self._device)
        start = torch.tensor([self._tokenizer.sot_token_id], device=self._device)
        rows, ends = [], []
        for context, word in zip(context_nME, words, strict=True):
            tail = torch.cat([self._tokens(word), end])
            ends.append(num_context + len(tail))  # index of the end token
            if ends[-1] >= limit:
                raise UsageError(
                    f"prompts.context = {num_context} leaves no room: with {word!r} the prompt has "
                    f"{ends[-1] + 1} tokens and the text tower reads {limit}; lower prompts.context"
                )
            padding = torch.zeros(limit - ends[-1] - 1, dtype=torch.long, device=self._device)
            after = tower.token_embedding(torch.cat([tail, padding]))
            rows.append(torch.cat([tower.token_embedding(start), context, after]))
        x = torch.stack(rows) + tower.positional_embedding  # (n, L, E)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
        x = x[torch.arange(len(rows)), ends]
        project = tower.text_projection
        x = project(x) if isinstance(project, nn.Linear) else x @ project
        return F.normalize(x, dim=-1)

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer.encode(text), dtype=torch.long, device=self._device)

    def _text_tower(self) -> Any:
        """The module that holds the text transformer.  Raises UsageError for other text towers."""
        tower = getattr(self._model, "text", self._model)
        pooling = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
        plain = isinstance(self._tokenizer, open_clip.SimpleTokenizer)
        if not plain or pooling not in ("argmax", "eos") or tower.text_projection is None:
            raise UsageError(
                "prompt tuning needs a CLIP whose text tower reads its end token, as OpenAI's and "
                "clip-lite0 do; the model of clip.model is built otherwise"
            )
        return tower


def load_clip(settings: ClipSettings, device: str = "cpu") -> Clip:
    """Load the CLIP that the settings name, from files alone.

    Raises EnvironmentLacks where weights are missing or unreadable, and UsageError for an unknown
    model or one whose normalisation is not known for certain.
    """
    logging.getLogger("timm").setLevel(logging.ERROR)
    if settings.model == SHIPPED:
        return _load_shipped(settings, device)
    if settings.model not in open_clip.list_models():
        near = difflib.get_close_matches(settings.model, open_clip.list_models(), 3)
        raise UsageError(
            f"clip.model {settings.model!r} is neither {SHIPPED} nor a model of open_clip"
            + (f": did you mean {' or '.join(near)}?" if near else "")
        )
    path = _weights_file(settings)
    mean, std = _normalisation(settings)
    size = settings.image_size or None
    try:
        model = open_clip.create_model(
            settings.model, pretrained=str(path), force_image_size=size, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(settings.model)
    except Exception as error:  # torch, safetensors, json and the hub each raise their own
        raise EnvironmentLacks(_unreadable(path, settings.model, error)) from error
    side = model.visual.image_size
    side = side if isinstance(side, int) else side[0]
    known = replace(settings, mean=tuple(mean), std=tuple(std), image_size=side)
    return _clip(model, tokenizer, known, path, device)


def _load_shipped(settings: ClipSettings, device: str) -> Clip:
    weights = shipped(SHIPPED)
    path = _weights_file(settings) if settings.weights else weights
    config_path = weights.with_suffix(".json")
    for file in (config_path, path):
        if not file.is_file():
            raise EnvironmentLacks(f"{file} is missing: this install is damaged, reinstall")
    config = json.loads(config_path.read_text())
    own = config["preprocess_cfg"]
    model = open_clip.CLIP(**config["model_cfg"])
    try:
        load_checkpoint(model, str(path), weights_only=True)
    except Exception as error:
        raise EnvironmentLacks(_unreadable(path, SHIPPED, error)) from error
    tokenizer = open_clip.SimpleTokenizer(
        context_length=config["model_cfg"]["text_cfg"]["context_length"]
    )
    known = replace(
        settings,
        mean=settings.mean or tuple(own["mean"]),
        std=settings.std or tuple(own["std"]),
        image_size=settings.image_size or own["size"],
    )
    return _clip(model, tokenizer, known, path, device)


def _clip(model: nn.Module, tokenizer: Any, known: ClipSettings, path: Path, device: str) -> Clip:
    """known: the settings, with the model's own values where they leave them to it."""
    tensors = model.state_dict().items()
    if bad := [name for name, x in tensors if x.is_floating_point() and not x.isfinite().all()]:
        raise EnvironmentLacks(
            f"{path} cannot be used as weights of {known.model}: {len(bad)} tensors hold NaN or "
            f"infinity, first {bad[0]}"
        )
    facts = {
        "model": known.model,
        "weights": sha256_file(path),
        "mean": [float(v) for v in known.mean],
        "std": [float(v) for v in known.std],
        "size": known.image_size,
    }
    return Clip(
        model,
        tokenizer,
        mean=known.mean,
        std=known.std,
        size=known.image_size,
        fingerprint=sha256_bytes(canonical_json(facts)),
        device=device,
    )


def _weights_file(settings: ClipSettings) -> Path:
    if not settings.weights:
        raise EnvironmentLacks(
            f"clip.model is {settings.model} but clip.weights names no file: give the path of its "
            "weights, or run 'evenlight weights fetch' where there is a network"
        )
    path = Path(settings.weights).expanduser().resolve()
    if not path.is_file():
        raise EnvironmentLacks(
            f"weights of {settings.model} are not at {path}: correct clip.weights, or run "
            "'evenlight weights fetch' where there is a network"
        )
    return path


def _normalisation(settings: ClipSettings) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of the settings, else those that all weights open_clip knows agree on."""
    mean, std = settings.mean, settings.std
    if mean and std:
        return mean, std
    known = set()
    for tag in open_clip.list_pretrained_tags_by_model(settings.model):
        entry = get_pretrained_cfg(settings.model, tag)
        known.add((tuple(entry["mean"]), tuple(entry["std"])))
    if len(known) != 1:
        raise UsageError(
            f"how photos are normalised for {settings.model} cannot be told from a weights file "
            f"({len(known)} conventions are known): set clip.mean and clip.std as its makers say"
        )
    family_mean, family_std = known.pop()
    return mean or family_mean, std or family_std


def _unreadable(path: Path, name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"{path} cannot be used as weights of {name}: {type(error).__name__}: {reason}"
