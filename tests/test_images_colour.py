"""The same photo in any curve is the same photo to the corrector, and is written as it came."""

import io
import struct
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_makers import picture, saved, tiff
from PIL import Image, ImageCms
from test_images_malformed import with_chunk

from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.encode import encoded

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PICTURE = picture(60, 80, 3)


def light(codes: np.ndarray) -> np.ndarray:
    return np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)


def parametric(kind: int, *numbers: float) -> bytes:
    values = [round(number * 65536) for number in numbers]
    return b"para\0\0\0\0" + struct.pack(f">HH{len(values)}i", kind, 0, *values)


def table(*values: float) -> bytes:
    levels = [round(value * 65535) for value in values]
    return b"curv\0\0\0\0" + struct.pack(f">I{len(levels)}H", len(levels), *levels)


def profile(curve: bytes, space: bytes = b"RGB ") -> bytes:
    """An ICC profile of nothing but curves."""
    names = [b"kTRC"] if space == b"GRAY" else [b"rTRC", b"gTRC", b"bTRC"]
    at = 132 + 12 * len(names)
    tags = b"".join(struct.pack(">4sII", name, at, len(curve)) for name in names)
    header = struct.pack(">I12s4s4s", at + len(curve), b"", space, b"XYZ ").ljust(128, b"\0")
    return header + struct.pack(">I", len(names)) + tags + curve


# Profile's curve, and the code that stands for some light.
CURVES = {
    "linear": (table(), lambda y: y),
    "gamma 1.8": (b"curv\0\0\0\0" + struct.pack(">IH", 1, 461), lambda y: y ** (256 / 461)),
    "table": (table(*np.linspace(0, 1, 4096) ** 3), lambda y: y ** (1 / 3)),
    "para 0": (parametric(0, 1.5), lambda y: y ** (1 / 1.5)),
    "para 1": (parametric(1, 2.0, 1.0, 0.0), np.sqrt),
    "para 2": (parametric(2, 2.0, 1.0, 0.0, 0.0), np.sqrt),
    "para 4": (parametric(4, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0), np.sqrt),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_photo_looks_the_same_in_any_curve_and_keeps_its_own(name: str) -> None:
    curve, code = CURVES[name]
    stored = np.rint(code(light(PICTURE / 255)) * 65535).astype(np.uint16)
    photo = decode(tiff(stored, photometric="rgb", iccprofile=profile(curve)), "a.tif")
    assert photo.bit_depth == 16 and photo.metadata.notes == ()
    seen = photo.pixels / 257
    bright = PICTURE > 8  # below, 16 bits of a steep curve tell too few levels apart
    assert np.abs(seen - PICTURE)[bright].max() < 1
    written = encoded(photo)
    again = tifffile.imread(io.BytesIO(written))
    assert again.dtype == np.uint16 and np.abs(again.astype(int) - stored)[bright].max() <= 2
    assert decode(written, "a.tif").metadata.icc == profile(curve)


def test_the_straight_part_of_a_curve_is_heeded() -> None:
    stored = np.arange(0, 65536, 64, dtype=np.uint16).reshape(16, 64)
    curve = parametric(3, 2.0, 1.0, 0.0, 0.5, 0.5)  # half the code up to 0.5, then its square
    data = tiff(stored, photometric="minisblack", iccprofile=profile(curve, b"GRAY"))
    seen = light(decode(data, "a.tif").pixels[..., 0] / 65535)
    codes = stored / 65535
    rising = np.maximum.accumulate(np.where(codes < 0.5, codes / 2, codes**2).ravel())
    assert np.abs(seen.ravel() - rising).max() < 1e-3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_eight_bits_in_another_curve_come_back_to_the_bit(format: str) -> None:
    icc = profile(CURVES["gamma 1.8"][0])
    options: dict[str, Any] = {"lossless": True} if format == "WEBP" else {}
    data = saved(Image.fromarray(PICTURE), format, icc_profile=icc, **options)
    photo = decode(data, "a")
    assert photo.bit_depth == 16 and photo.encoding.stored == np.uint8
    written = encoded(photo)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(written)) as after:
        assert after.info["icc_profile"] == icc
        error = np.abs(np.asarray(before).astype(int) - np.asarray(after))
        assert error.max() == 0 if format in ("PNG", "WEBP") else error.mean() < 8


def test_alpha_of_eight_bits_stays_as_it_was_beside_another_curve() -> None:
    rgba = picture(60, 80, 4)
    data = saved(Image.fromarray(rgba), "PNG", icc_profile=profile(table()))
    photo = decode(data, "a.png")
    assert photo.alpha is not None and photo.alpha.dtype == photo.pixels.dtype == np.uint16
    with Image.open(io.BytesIO(encoded(photo))) as image:
        assert (np.asarray(image) == rgba).all()


def test_the_curve_of_srgb_costs_nothing() -> None:
    for icc in (SRGB, profile(parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))):
        photo = decode(saved(Image.fromarray(PICTURE), "PNG", icc_profile=icc), "a.png")
        assert photo.bit_depth == 8 and (photo.pixels == PICTURE).all()


def test_gray_heeds_its_profile() -> None:
    icc = profile(table(), b"GRAY")
    stored = np.rint(light(PICTURE[..., 0] / 255) * 65535).astype(np.uint16)
    photo = decode(tiff(stored, photometric="minisblack", iccprofile=icc), "a.tif")
    assert photo.gray and np.abs(photo.pixels[..., 0] / 257 - PICTURE[..., 0]).max() < 1
    assert tifffile.imread(io.BytesIO(encoded(photo))).shape == (60, 80)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=80), st.sampled_from([b"curv", b"para"]), st.integers(0, 6))
def test_a_damaged_profile_is_a_note_and_never_an_error(body: bytes, kind: bytes, n: int) -> None:
    icc = profile(kind + bytes(5) + bytes([n]) + body)
    photo = decode(saved(Image.fromarray(PICTURE), "PNG", icc_profile=icc), "a.png")
    assert np.isfinite(photo.pixels).all()
    if photo.encoding.transfer is None and photo.metadata.notes:
        assert "colour profile" in photo.metadata.notes[0] and (photo.pixels == PICTURE).all()


def test_a_profile_without_curves_is_told() -> None:
    data = saved(Image.fromarray(PICTURE), "PNG", icc_profile=SRGB[:128] + bytes(200))
    photo = decode(data, "a.png")
    assert "its colour profile has no curves" in photo.metadata.notes[0]


LINEAR = np.rint(light(PICTURE / 255) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "content"),
    [(b"gAMA", struct.pack(">I", 100_000)), (b"cICP", bytes([1, 8, 0, 1]))],
)
def test_a_png_says_by_gama_or_cicp_that_it_is_linear(kind: bytes, content: bytes) -> None:
    data = with_chunk(saved(Image.fromarray(LINEAR), "PNG"), kind, content)
    photo = decode(data, "a.png")
    assert abs(photo.pixels.mean() / 257 - PICTURE.mean()) < 2
    written = encoded(photo)
    assert kind + content in written
    with Image.open(io.BytesIO(written)) as image:
        assert (np.asarray(image) == LINEAR).all()


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"gAMA", struct.pack(">I", 45455))],
        [(b"gAMA", struct.pack(">I", 100_000)), (b"sRGB", b"\0")],
        [(b"gAMA", struct.pack(">I", 100_000)), (b"cICP", bytes([1, 13, 0, 1]))],
        [(b"gAMA", bytes(4))],
    ],
)
def test_a_png_that_says_srgb_is_srgb(chunks: list[tuple[bytes, bytes]]) -> None:
    data = saved(Image.fromarray(PICTURE), "PNG")
    for kind, content in chunks:
        data = with_chunk(data, kind, content)
    assert (decode(data, "a.png").pixels == PICTURE).all()


@pytest.mark.parametrize(("characteristics", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused_with_a_sentence(characteristics: int, name: str) -> None:
    data = with_chunk(
        saved(Image.fromarray(PICTURE), "PNG", icc_profile=SRGB),
        b"cICP", bytes([9, characteristics, 0, 1]),
    )  # fmt: skip
    with pytest.raises(PhotoError, match=rf"HDR screens \({name}\): convert it to SDR"):
        decode(data, "a.png")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_tiff_of_floats_is_linear_light_and_stays_so(dtype: type) -> None:
    stored = light(PICTURE / 255).astype(dtype)
    photo = decode(tiff(stored, photometric="rgb"), "a.tif")
    assert np.abs(photo.pixels / 257 - PICTURE).max() < 0.2 and not photo.metadata.notes
    again = tifffile.imread(io.BytesIO(encoded(photo)))
    assert again.dtype == dtype and np.abs(again - stored).max() < 1e-3


def test_light_beyond_white_is_cut_off_with_a_note_and_nan_is_black() -> None:
    stored = light(PICTURE / 255).astype(np.float32)
    stored[0, 0], stored[0, 1] = 7, np.nan
    photo = decode(tiff(stored, photometric="rgb"), "a.tif")
    assert (photo.pixels[0, 0] == 65535).all() and (photo.pixels[0, 1] == 0).all()
    assert photo.metadata.notes == ("light above white was cut off",)
    assert np.isfinite(tifffile.imread(io.BytesIO(encoded(photo)))).all()
