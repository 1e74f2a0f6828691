"""How a photo's numbers stand for light: brought to sRGB's curve for the work, and back.

Tone operators, judge and network take numbers to be sRGB-encoded; a linear or gamma 1.8 photo
would come out far too bright or dark. Only the curve is exchanged, and exactly undone on writing;
the primaries stay the photo's own (gamut.py).
ICC.1:2022 (profiles), PNG third edition (gAMA, cICP), ITU-T H.273 (cICP's numbers).
"""

import struct
from dataclasses import dataclass

import numpy as np

from evenlight.cache.errors import PhotoError

_LEVELS = 65536
_SAME = 0.6 / 255  # a curve that never leaves sRGB's by more is sRGB's
_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of H.273
_POWERS = {4: 2.2, 5: 2.8, 8: 1.0}  # likewise; the others are looked at as sRGB is


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer:
    """The curves of a photo.  light: float64 C,N, linear light in [0, 1] at N codes in equal
    steps over [0, 1], rising; C is 1 (all channels alike) or 3."""

    light: np.ndarray

    def to_srgb(self, samples: np.ndarray) -> np.ndarray:
        """HxWx3 uint8, uint16 or float (light of which [0, 1] is kept) -> uint16, sRGB-encoded."""
        if samples.dtype.kind == "f":
            light = np.nan_to_num(samples.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
            return _deep(srgb_encoded(light.clip(0, 1)))
        codes = np.linspace(0, 1, np.iinfo(samples.dtype).max + 1)
        light = np.stack([np.interp(codes, self._codes, channel) for channel in self.light])
        return _looked_up(_deep(srgb_encoded(light)), samples)

    def from_srgb(self, pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """HxWx3 uint16, sRGB-encoded -> as stored: uint8, uint16, or a float of linear light."""
        light = srgb_light(np.linspace(0, 1, _LEVELS))
        if dtype.kind == "f":
            return _looked_up(light[None].astype(dtype), pixels)
        stored = np.stack([np.interp(light, channel, self._codes) for channel in self.light])
        return _looked_up(np.rint(stored * np.iinfo(dtype).max).astype(dtype), pixels)

    @property
    def _codes(self) -> np.ndarray:
        return np.linspace(0, 1, self.light.shape[1])


LINEAR = Transfer(light=np.linspace(0, 1, _LEVELS)[None])


def srgb_light(codes: np.ndarray) -> np.ndarray:
    return np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)


def srgb_encoded(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def transfer_of_profile(icc: bytes) -> Transfer | None:
    """The curves of an ICC profile for RGB or gray; None where they are sRGB's.

    Raises PhotoError, whose sentence is fit for a note, when it has none that can be read.
    """
    try:
        tags = icc_tags(icc)
        names = [b"kTRC"] if icc[16:20] == b"GRAY" else [b"rTRC", b"gTRC", b"bTRC"]
        with np.errstate(all="ignore"):  # what is not finite is refused below
            light = np.stack([_curve(tags[name]) for name in names])
    except (struct.error, KeyError, IndexError, ValueError, FloatingPointError) as error:
        raise PhotoError(
            "its colour profile has no curves: it was taken to be like sRGB"
        ) from error
    return _unless_srgb(Transfer(light=light))


def transfer_of_png(chunks: tuple[tuple[bytes, bytes], ...]) -> Transfer | None:
    """What the chunks cICP, sRGB and gAMA of a PNG without a profile say; None for sRGB."""
    found = dict(reversed(chunks))
    cicp, gamma = found.get(b"cICP", b""), found.get(b"gAMA", b"")
    if len(cicp) == 4:
        refuse_hdr(cicp[1])
        return _unless_srgb(_power(_POWERS[cicp[1]])) if cicp[1] in _POWERS else None
    if b"sRGB" in found or len(gamma) != 4 or not any(gamma):
        return None
    exponent = 100_000 / struct.unpack(">I", gamma)[0]
    # 1/2.2 is what files say that mean sRGB
    return None if abs(exponent - 2.2) < 0.05 or exponent > 4 else _power(max(exponent, 0.25))


def refuse_hdr(characteristics: int) -> None:
    """Raise PhotoError for numbers that stand for absolute or scene light beyond white."""
    if characteristics in _HDR:
        raise PhotoError(
            f"it is encoded for HDR screens ({_HDR[characteristics]}): convert it to SDR first"
        )


def icc_tags(icc: bytes) -> dict[bytes, bytes]:
    """The tags of an ICC profile by signature.  Raises struct.error where it is cut short."""
    (count,) = struct.unpack_from(">I", icc, 128)
    records = (struct.unpack_from(">4sII", icc, 132 + 12 * n) for n in range(min(count, 100)))
    return {name: icc[at : at + size] for name, at, size in records}


def _curve(tag: bytes) -> np.ndarray:
    """float64 N: a curveType or parametricCurveType at N codes."""
    codes = np.linspace(0, 1, _LEVELS)
    if tag[:4] == b"curv":
        (count,) = struct.unpack_from(">I", tag, 8)
        if count == 0:
            return codes
        if count == 1:
            return codes ** (struct.unpack_from(">H", tag, 12)[0] / 256)
        table = np.frombuffer(tag, ">u2", count, 12) / 65535
        return np.interp(codes, np.linspace(0, 1, count), np.maximum.accumulate(table))
    if tag[:4] != b"para":
        raise ValueError("neither curve type")
    (kind,) = struct.unpack_from(">H", tag, 8)
    count = (1, 3, 4, 5, 7)[kind]
    numbers = np.zeros(7)
    numbers[:count] = np.frombuffer(tag, ">i4", count, 12) / 65536
    g, a, b, c, d, e, f = numbers
    if kind == 0:
        light = codes**g
    elif kind in (1, 2):  # zero below -b/a, then c added to all
        light = np.maximum(a * codes + b, 0) ** g + (c if kind == 2 else 0)
    else:
        light = np.where(codes >= d, np.maximum(a * codes + b, 0) ** g + e, c * codes + f)
    return np.maximum.accumulate(np.clip(light, 0, 1))


def _power(exponent: float) -> Transfer:
    return Transfer(light=np.linspace(0, 1, _LEVELS)[None] ** exponent)


def _unless_srgb(transfer: Transfer) -> Transfer | None:
    if not np.isfinite(transfer.light).all() or (transfer.light[:, -1] <= 0.5).any():
        raise PhotoError("its colour profile is damaged: it was taken to be like sRGB")
    encoded = srgb_encoded(transfer.light)
    same = np.abs(encoded - np.linspace(0, 1, _LEVELS)).max() <= _SAME
    return None if same else transfer


def _deep(fractions: np.ndarray) -> np.ndarray:
    return np.rint(fractions * 65535).astype(np.uint16)


def _looked_up(table: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """table: 1,N or 3,N.  samples: HxWx3, indices of it."""
    if len(table) == 1:
        return table[0][samples]
    return np.stack([table[channel][samples[..., channel]] for channel in range(3)], axis=2)
