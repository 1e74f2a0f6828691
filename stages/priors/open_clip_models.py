"""Models of open_clip, from files alone, and the words of every CLIP.

Nothing here opens a connection. A weights file does not say how its pictures were normalised
(open_clip #1068: it then falls back to defaults in silence), so mean and std come from the settings
or from open_clip's table where all known weights of the model agree; else we refuse.  Imported
at first use: it takes two seconds.
"""

# B photos, D embedding, n texts, M context vectors, L tokens, E token embedding

import difflib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
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

from evenlight.cache.errors import UsageError
from evenlight.stages.priors.clip import unusable
from evenlight.stages.priors.fingerprints import SHIPPED_CLIP, Reading, clip_file, shipped_config
from evenlight.stages.settings import ClipSettings

logging.getLogger("timm").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Words:
    """The text tower of a CLIP, on its device."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Returns float32 n,D of unit norm."""
        tokens = self.tokenizer(list(texts)).to(self._device)
        return F.normalize(self.model.encode_text(tokens), dim=-1)

    def token_vectors(self, text: str) -> Tensor:
        """Input vectors of the tokens of a text, without start and end.  Returns L,E."""
        vectors: Tensor = self._tower().token_embedding(self._tokens(text))
        return vectors.detach()

    def encode_context(self, context_nME: Tensor, words: Sequence[str]) -> Tensor:
        """Embed prompts made of learned vectors followed by words (CoOp).

        context_nME: M vectors for each of the n words, at the place of tokens.  words: class
        words, put after the context.  Returns float32 n,D of unit norm, differentiable with
        respect to the context.  Raises UsageError where a prompt is longer than the tower reads.
        """
        tower = self._tower()
        limit, num_context = tower.positional_embedding.shape[0], context_nME.shape[1]
        end = torch.tensor([self.tokenizer.eot_token_id], device=self._device)
        start = torch.tensor([self.tokenizer.sot_token_id], device=self._device)
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

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def _tokens(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.long, device=self._device)

    def _tower(self) -> Any:
        """The module that holds the text transformer.  Raises UsageError for other text towers."""
        tower = getattr(self.model, "text", self.model)
        pooling = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
        plain = isinstance(self.tokenizer, open_clip.SimpleTokenizer)
        if not plain or pooling not in ("argmax", "eos") or tower.text_projection is None:
            raise UsageError(
                "prompt tuning needs a CLIP whose text tower reads its end token, as OpenAI's and "
                "clip-lite0 do; the model of clip.model is built otherwise"
            )
        return tower


def load(settings: ClipSettings, device: str) -> tuple[Words, Reading]:
    """A model that open_clip knows by name, frozen, and how it reads a photo.

    Raises EnvironmentLacks where weights are missing or unreadable, and UsageError for an unknown
    model or one whose normalisation is not known for certain.
    """
    if settings.model not in open_clip.list_models():
        near = difflib.get_close_matches(settings.model, open_clip.list_models(), 3)
        raise UsageError(
            f"clip.model {settings.model!r} is neither {SHIPPED_CLIP} nor a model of open_clip"
            + (f": did you mean {' or '.join(near)}?" if near else "")
        )
    path = clip_file(settings)
    mean, std = _normalisation(settings)
    size = settings.image_size or None
    try:
        model = open_clip.create_model(
            settings.model, pretrained=str(path), force_image_size=size, weights_only=True
        )
        tokenizer = open_clip.get_tokenizer(settings.model)
    except Exception as error:  # torch, safetensors, json and the hub each raise their own
        raise unusable(path, settings.model, error) from error
    side = model.visual.image_size
    side = side if isinstance(side, int) else side[0]
    return Words(_frozen(model, device), tokenizer), Reading(tuple(mean), tuple(std), side)


def shipped_words(path: Path, device: str) -> Words:
    """The words of clip-lite0.  path: of its weights."""
    config = shipped_config()["model_cfg"]
    model = open_clip.CLIP(**config)
    load_checkpoint(model, str(path), weights_only=True)
    length = config["text_cfg"]["context_length"]
    return Words(_frozen(model, device), open_clip.SimpleTokenizer(context_length=length))


def _frozen(model: nn.Module, device: str) -> nn.Module:
    # twice as fast on a CPU for depthwise convolutions (measured 54 -> 131 a second)
    model.eval().requires_grad_(False)
    return model.to(device).to(memory_format=torch.channels_last)


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
