"""CLIP: embedding photos and prompts, from weights in files.

The shipped `clip-lite0` runs in a tower of its own (lite0.py), any other model in open_clip's
(open_clip_models.py), which also reads the words of both.
"""

# B photos, H W pixels, D embedding, R regions, S side of their square, h w its cells,
# n texts, M context vectors, L tokens, E embedding of a region, or of a token

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from evenlight.cache.errors import EnvironmentLacks
from evenlight.stages.priors import fingerprints
from evenlight.stages.priors.fingerprints import SHIPPED_CLIP, Reading
from evenlight.stages.priors.lite0 import Tower
from evenlight.stages.priors.region_embedder import DIM as REGION_DIM
from evenlight.stages.priors.region_embedder import load_region_embedder
from evenlight.stages.settings import ClipSettings

if TYPE_CHECKING:
    from evenlight.stages.priors.open_clip_models import Words

CHUNK = 8  # photos per forward on a CPU where no gradient is asked: more spill its cache
CHUNK_GPU = 64  # bounds memory


class Clip:
    """A frozen CLIP.

    image: photos B,3,size,size, normalised, to B,D, on the device.  words: loads the text tower,
    asked for when there is a text to read.  logit_scale: the factor on cosines that the model was
    trained with.  fingerprint: hex sha256 of the weights' digest and all that decides how a photo
    is read.  dim: D.  region_dim: E.
    """

    def __init__(
        self,
        image: Callable[[Tensor], Tensor],
        words: "Callable[[], Words]",
        reading: Reading,
        *,
        logit_scale: float,
        fingerprint: str,
        device: str = "cpu",
    ) -> None:
        self.fingerprint = fingerprint
        self.regions, self.region_dim = load_region_embedder(device), REGION_DIM
        self.size = reading.size
        self.logit_scale = logit_scale
        self.image = image
        self._words = functools.cache(words)
        self._device = torch.device(device)
        self._mean = torch.tensor(reading.mean, device=self._device).view(3, 1, 1)
        self._std = torch.tensor(reading.std, device=self._device).view(3, 1, 1)
        self.dim = self.embed(torch.zeros(1, 3, self.size, self.size)).shape[1]

    def embed(self, rgb_B3HW: Tensor) -> Tensor:
        """Embed photos, each squashed whole to the model's square.

        rgb_B3HW: float RGB, sRGB-encoded, in [0, 1], any H and W.  Returns float32 B,D of unit
        norm on the model's device, differentiable with respect to the photos.
        """
        if torch.is_grad_enabled() and rgb_B3HW.requires_grad:
            return self.embed_at_once(rgb_B3HW)
        chunk = CHUNK if self._device.type == "cpu" else CHUNK_GPU
        with torch.no_grad():
            return torch.cat(
                [self.embed_at_once(photos) for photos in torch.split(rgb_B3HW, chunk)]
            )

    def embed_at_once(self, rgb_B3HW: Tensor) -> Tensor:
        """`embed` without a bound on memory."""
        x = rgb_B3HW.to(self._device, torch.float32)
        with torch.autocast(self._device.type, enabled=False):
            if x.shape[-2:] != (self.size, self.size):
                x = F.interpolate(
                    x, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
                ).clamp(0, 1)
            x = ((x - self._mean) / self._std).contiguous(memory_format=torch.channels_last)
            return F.normalize(self.image(x), dim=-1)

    def embed_regions(self, ruled_B3SS: Tensor, photo_B3SS: Tensor, cells_BRhw: Tensor) -> Tensor:
        """Embed regions of photos (region_embedder.py).  float32 B,R,E on the model's device."""
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            inputs = (ruled_B3SS, photo_B3SS, cells_BRhw)
            return self.regions(*(x.to(self._device, torch.float32) for x in inputs))

    @property
    def tower(self) -> nn.Module:
        """The module whose weights embed photos."""
        image: Any = self.image  # a module, or a method of one
        return image if isinstance(image, nn.Module) else image.__self__

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.  Returns float32 n,D of unit norm on the model's device."""
        return self._words().embed(texts)

    def token_vectors(self, text: str) -> Tensor:
        """Input vectors of the tokens of a text, without start and end.  Returns L,E."""
        return self._words().token_vectors(text)

    def encode_context(self, context_nME: Tensor, words: Sequence[str]) -> Tensor:
        """Embed prompts made of learned vectors followed by words (open_clip_models.Words)."""
        return self._words().encode_context(context_nME, words)


def load_clip(settings: ClipSettings, device: str = "cpu") -> Clip:
    """Load the CLIP that the settings name, from files alone.

    Raises EnvironmentLacks where weights are missing or unreadable, and UsageError for an unknown
    model or one whose normalisation is not known for certain.
    """
    if settings.model == SHIPPED_CLIP:
        return _load_shipped(settings, device)
    from evenlight.stages.priors import open_clip_models

    words, reading = open_clip_models.load(settings, device)
    path = fingerprints.clip_file(settings)
    _refuse_not_finite(words.model.state_dict(), path, settings.model)
    return Clip(
        words.model.encode_image,
        lambda: words,
        reading,
        logit_scale=_logit_scale(words.model.logit_scale),
        fingerprint=fingerprints.of_clip(settings.model, path, reading),
        device=device,
    )


def unusable(path: Path, name: str, error: Exception) -> EnvironmentLacks:
    reason = " ".join(str(error).split())[:300]
    return EnvironmentLacks(
        f"{path} cannot be used as weights of {name}: {type(error).__name__}: {reason}"
    )


def _load_shipped(settings: ClipSettings, device: str) -> Clip:
    path, reading = fingerprints.clip_file(settings), fingerprints.shipped_reading(settings)

    def words() -> "Words":
        from evenlight.stages.priors.open_clip_models import shipped_words

        return shipped_words(path, device)

    try:
        tensors = load_file(path)
        _refuse_not_finite(tensors, path, SHIPPED_CLIP)
        tower = Tower(tensors).eval().requires_grad_(False)
        return Clip(
            tower.to(device).to(memory_format=torch.channels_last),
            words,
            reading,
            logit_scale=_logit_scale(tensors["logit_scale"]),
            fingerprint=fingerprints.of_shipped_clip(settings),
            device=device,
        )
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:  # of no, or other, tensors
        raise unusable(path, SHIPPED_CLIP, error) from error


def _logit_scale(logarithm: Tensor) -> float:
    return float(logarithm.float().exp().clamp(max=100))


def _refuse_not_finite(tensors: Mapping[str, Tensor], path: Path, name: str) -> None:
    bad = [k for k, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]
    if bad:
        raise EnvironmentLacks(
            f"{path} cannot be used as weights of {name}: {len(bad)} tensors hold NaN or infinity, "
            f"first {bad[0]}"
        )
