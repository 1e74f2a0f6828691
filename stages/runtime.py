"""Models that were exported, run by ONNX Runtime: NumPy in and out, no torch.

They stand where torch's do (priors/protocols.py, corrector/predictor.py): what surrounds the
networks is the same code.
"""

# B photos, C channels, H W pixels, h w feature cells, D embedding, R regions, S strengths

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from evenlight.stages.corrector.correction import Correction
from evenlight.stages.corrector.inputs import padded
from evenlight.stages.priors.opinion import Opinion, opinion_of, photo_read, regions_read
from evenlight.stages.priors.segmenting import Segmenting
from evenlight.stages.settings import RegionSettings

CHUNK = 8  # photos that CLIP is shown at once: bounds memory
Float32 = NDArray[np.float32]


class Graph:
    """One exported model on the CPU: called with arrays in the order of its inputs."""

    def __init__(self, data: bytes, threads: int = 0) -> None:
        """data: an ONNX file.  threads: 0 is one for each core."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            data, options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True

    def __call__(self, *inputs: np.ndarray, wanted: Sequence[str] | None = None) -> list[Any]:
        """Its outputs, or those wanted; nothing else is computed."""
        given = dict(zip(self._inputs, inputs, strict=True))
        return self._session.run(wanted, given, self._options)


class OnnxSegmenter(Segmenting):
    xp = np

    def __init__(
        self, graph: Graph, settings: RegionSettings, fingerprint: str, p3_channels: int
    ) -> None:
        self._graph, self.settings = graph, settings
        self.fingerprint, self.p3_channels = fingerprint, p3_channels

    def features(self, rgb_B3HW: Float32) -> tuple[Float32, Float32]:
        """Of one photo.  Not differentiable."""
        proto, p3 = self._graph(rgb_B3HW, wanted=["proto", "p3"])
        return proto, p3

    def boxes(self, rgb_13HW: Float32) -> tuple[Float32, Float32, Float32, Float32]:
        """Boxes above the confidence wanted."""
        proto, boxes, scores, coefficients = self._graph(
            rgb_13HW, wanted=["proto", "boxes", "scores", "coefficients"]
        )
        kept = scores > self.settings.confidence
        return proto[0], boxes[kept], scores[kept], coefficients[kept]


class OnnxClip:
    """Embeds photos of its own size, and regions.  Not differentiable."""

    def __init__(
        self, graph: Graph, regions: Graph, fingerprint: str, dim: int, region_dim: int, size: int
    ) -> None:
        self._graph, self._regions, self.fingerprint = graph, regions, fingerprint
        self.dim, self.region_dim, self.size = dim, region_dim, size

    def embed(self, rgb_B3HW: Float32) -> Float32:
        starts = range(0, len(rgb_B3HW), CHUNK)
        return np.concatenate([self._graph(rgb_B3HW[at : at + CHUNK])[0] for at in starts])

    def embed_regions(self, ruled_13SS: Float32, photo_13SS: Float32, cells: Float32) -> Float32:
        (embedded_1RE,) = self._regions(ruled_13SS, photo_13SS, cells)
        return embedded_1RE


class OnnxJudge:
    def __init__(self, photo: Graph, regions: Graph, fingerprint: str) -> None:
        self._photo, self._regions, self.fingerprint = photo, regions, fingerprint

    def opinion(self, cached: Mapping[str, Any], offsets: Sequence[float]) -> Opinion:
        def answer() -> tuple[NDArray[np.float64], float]:
            p_1S, p_good_1 = self._photo(*photo_read(cached, offsets))
            return p_1S[0], float(p_good_1[0])

        return opinion_of(cached, answer)

    def region_opinions(self, cached: Mapping[str, Any], strength: float) -> NDArray[np.float64]:
        return self._regions(*regions_read(cached, strength))[0]

    def second_opinion(self, cached: Mapping[str, Any]) -> NDArray[np.float64]:
        return self._regions(*regions_read(cached, 0.0))[1]


class OnnxNetwork:
    """A corrector that takes photos whose sides are multiples of `multiple`."""

    def __init__(self, graph: Graph, multiple: int) -> None:
        self._graph, self._multiple = graph, multiple

    def correction_of(
        self, photo_13HW: Float32, proto_132hw: Float32, p3_1Chw: Float32, given_11HW: Float32
    ) -> Correction:
        height, width = photo_13HW.shape[2:]
        inputs = padded(photo_13HW, proto_132hw, p3_1Chw, given_11HW, self._multiple)
        return Correction(*(x[..., :height, :width] for x in self._graph(*inputs)))
