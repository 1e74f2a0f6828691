"""Colours wider than sRGB's: what the corrector sees of them, and what becomes of them.

Judge and network know sRGB; the same scene in ProPhoto's or Display P3's primaries has paler
numbers.  So a photo is seen, and corrected, through sRGB's primaries, and what lies beyond those is
given back after it, as much brighter or darker as the rest of the pixel: no colour is lost, and one
that sRGB holds comes out as it would in sRGB.
ICC.1:2022 (profiles), PNG third edition (cHRM, cICP), ITU-T H.273 (its numbers).
"""

import struct
from collections.abc import Sequence

import numpy as np

from evenlight.stages.photos.colour import icc_tags, srgb_encoded, srgb_light
from evenlight.stages.photos.metadata import Metadata

Pairs = Sequence[Sequence[float]]
_D50, _D65 = (0.9642, 1.0, 0.8249), (0.3127, 0.3290)
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_OF_CICP = {9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), 12: _P3}
_SAME = 0.02  # of white: primaries that differ less are taken to be the same
_PLAUSIBLE = 10.0  # no real primaries need more of another's
_STRIP = 2**20  # pixels at a time
_MOST = 8.0  # times that a wide colour becomes brighter
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # of linear light, BT.709


def primaries_of(metadata: Metadata) -> np.ndarray | None:
    """float32 3,3: a row of linear light in the photo's primaries, times this, is in sRGB's; None
    where they are sRGB's, or no profile and no chunk of a PNG gives them as numbers."""
    try:
        with np.errstate(all="raise"):
            to_pcs = _to_pcs(metadata)
            matrix = np.linalg.solve(_of_chromaticities(_SRGB, _D65), to_pcs)
            np.linalg.inv(matrix)
    except (KeyError, struct.error, np.linalg.LinAlgError, FloatingPointError):
        return None
    same = np.abs(matrix - np.eye(3)).max() < _SAME
    return None if same or np.abs(matrix).max() > _PLAUSIBLE else matrix.T.astype(np.float32)


def _to_pcs(metadata: Metadata) -> np.ndarray:
    """float64 3,3: red, green and blue as XYZ relative to D50; its columns.  The chunks of a PNG
    count as the standard ranks them.  Raises KeyError where nothing says so."""
    found = dict(reversed(metadata.png))
    cicp, chrm = found.get(b"cICP", b""), found.get(b"cHRM", b"")
    if len(cicp) == 4:
        return _of_chromaticities(_OF_CICP[cicp[0]], _D65)
    if metadata.icc is not None:
        return _of_profile(metadata.icc)
    if len(chrm) != 32 or b"sRGB" in found:
        raise KeyError("cHRM")
    (white, *corners) = np.reshape(struct.unpack(">8I", chrm), (4, 2)) / 100_000
    return _of_chromaticities(corners, white)


def _of_profile(icc: bytes) -> np.ndarray:
    tags = icc_tags(icc) if icc[16:24] == b"RGB XYZ " else {}
    columns = [struct.unpack_from(">3i", tags[name], 8) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    return np.array(columns).T / 65536


def _of_chromaticities(corners: Pairs, white: Sequence[float]) -> np.ndarray:
    """Of (x, y) of red, green, blue and white; adapted to D50 by Bradford's transform."""
    pairs = np.array([*corners, white], np.float64)
    columns = np.column_stack([pairs, 1 - pairs.sum(1)]).T / pairs[:, 1]
    primaries, light = columns[:, :3], columns[:, 3]
    scaled = primaries * np.linalg.solve(primaries, light)
    adapted = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ light))
    return np.linalg.inv(_BRADFORD) @ adapted @ _BRADFORD @ scaled


def inside_srgb(pixels_HW3: np.ndarray, primaries: np.ndarray) -> np.ndarray:
    """uint16 H,W,3 in sRGB's primaries, what is beyond them cut off.  pixels: uint8 or uint16."""
    out = np.empty(pixels_HW3.shape, np.uint16)
    for strip in _strips(pixels_HW3):
        light = _light_of(pixels_HW3[strip]) @ primaries
        out[strip] = _coded(light, out.dtype)
    return out


def with_wide_colours(
    before_HW3: np.ndarray, inside_HW3: np.ndarray, primaries: np.ndarray
) -> np.ndarray:
    """The corrected photo in its own primaries and type.

    before: as it came, uint8 or uint16.  inside: corrected inside sRGB, uint16.
    """
    out, back = np.empty_like(before_HW3), np.linalg.inv(primaries)
    for strip in _strips(before_HW3):
        light = _light_of(before_HW3[strip]) @ primaries
        held, after = light.clip(0, 1), _light_of(inside_HW3[strip])
        gain = (after @ _LUMA) / np.maximum(held @ _LUMA, 1e-4)
        after += (light - held) * np.minimum(gain, _MOST)[..., None]
        out[strip] = _coded(after @ back, out.dtype)
    return out


def _strips(pixels_HW3: np.ndarray) -> list[slice]:
    rows = max(1, _STRIP // pixels_HW3.shape[1])
    return [slice(top, top + rows) for top in range(0, len(pixels_HW3), rows)]


def _light_of(pixels: np.ndarray) -> np.ndarray:
    """float32 linear light of sRGB-encoded uint8 or uint16."""
    codes = np.linspace(0, 1, np.iinfo(pixels.dtype).max + 1)
    return srgb_light(codes).astype(np.float32)[pixels]


def _coded(light: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.rint(srgb_encoded(light.clip(0, 1)) * np.iinfo(dtype).max).astype(dtype)
