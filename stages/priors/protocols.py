"""The frozen models that priors come from, and the judge of exposure, as what uses them sees them.

FastSAM (fastsam.py), CLIP (clip.py) and prompts (prompts.py) are such; tests pass toys.
"""

# B photos, C channels, H W pixels, D embedding, R regions, S side of their square, h w its cells,
# n texts, M context vectors, E embedding of a region, or of a token

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from evenlight.stages.arrays import Array
from evenlight.stages.priors.opinion import Opinion

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Regions:
    """What the segmenter says of one photo.

    labels: HxW uint8, 1 is the largest region, 0 only outside the photo's extent.
    proto: 32xH/4xW/4 float16 mask prototypes.  p3: CxH/8xW/8 float16 features of the neck.
    """

    labels: np.ndarray
    proto: np.ndarray
    p3: np.ndarray


class Segmenter(Protocol):
    """Regions and features of photos after the mean-luma rule.

    fingerprint: hex sha256 of what decides its answers.  p3_channels: C of the P3 features.
    """

    fingerprint: str
    p3_channels: int

    def segment(self, photo_HW3: np.ndarray) -> Regions:
        """uint8 sRGB, H and W multiples of 8."""
        ...

    def features(self, rgb_B3HW: Array) -> tuple[Array, Array]:
        """float in [0, 1], H and W multiples of 32 -> proto at /4, P3 at /8; differentiable."""
        ...


class Embedder(Protocol):
    """Embeds photos.

    fingerprint: hex sha256 of what decides its answers.  dim: D.  region_dim: E.  size: side of the
    square it sees, pixels; tone operators work on copies of that size, since they commute well with
    shrinking.
    """

    fingerprint: str
    dim: int
    region_dim: int
    size: int

    def embed(self, rgb_B3HW: Array) -> Array:
        """float in [0, 1] -> float32 B,D of unit norm; differentiable."""
        ...

    def embed_regions(self, ruled_B3SS: Array, photo_B3SS: Array, cells_BRhw: Array) -> Array:
        """Photos in [0, 1] after the mean-luma rule and as they are, and which cells are of which
        region (`ladder.region_cells`) -> float32 B,R,E."""
        ...


class ClipModel(Embedder, Protocol):
    """Embeds prompts too.  logit_scale: what cosines were multiplied by in training."""

    logit_scale: float

    def embed_text(self, texts: list[str]) -> "Tensor":
        """-> float32 n,D of unit norm."""
        ...

    def token_vectors(self, text: str) -> "Tensor":
        """-> M,E: input vectors of the tokens of a text, without start and end."""
        ...

    def encode_context(self, context_nME: "Tensor", words: list[str]) -> "Tensor":
        """n prompts of context vectors before words -> n,D of unit norm; differentiable."""
        ...


class Opinions(Protocol):
    """What a photo, and a region of it, is meant to be: a judge, as what corrects photos sees it.

    cached, offsets: the embeddings part of a photo (`ladder.embed_photo`), and where its rungs lie
    from the mean-luma rule.
    """

    fingerprint: str

    def opinion(self, cached: Mapping[str, Any], offsets: Sequence[float]) -> Opinion: ...

    def region_opinions(self, cached: Mapping[str, Any], strength: float) -> np.ndarray:
        """Of the regions embedded and, last, the rest: probabilities R+1,S of the strengths between
        each and the photo, which is given `strength`."""
        ...

    def second_opinion(self, cached: Mapping[str, Any]) -> np.ndarray:
        """Of the photo, from its regions: probabilities of the strengths that would mend it.  S."""
        ...
