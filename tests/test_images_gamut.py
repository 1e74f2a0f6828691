"""The same photo in wider primaries is the same photo to the corrector, and keeps its colours."""

import io
import struct

import numpy as np
import pytest
import tifffile
from photo_makers import picture, saved, tiff
from PIL import Image
from test_images_colour import light
from test_images_malformed import with_chunk

from evenlight.pipeline.correct import correct_files
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.encode import encoded, in_format
from evenlight.stages.photos.gamut import inside_srgb, with_wide_colours

# Columns red, green, blue in XYZ, white D50, by Bradford's transform: B. Lindbloom's tables,
# www.brucelindbloom.com, and for Display P3 those of its own profile.
SRGB = [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
        [0.0139322, 0.0971045, 0.7141733]]  # fmt: skip
SPACES = {
    "adobe": [[0.6097559, 0.2052401, 0.149224], [0.3111242, 0.625656, 0.0632197],
              [0.0194811, 0.0608902, 0.7448387]],
    "p3": [[0.5151187, 0.2919778, 0.1571035], [0.2411892, 0.6922441, 0.0665668],
           [-0.0010505, 0.0418791, 0.7840713]],
    "prophoto": [[0.7976749, 0.1351917, 0.0313534], [0.2880402, 0.7118741, 0.0000857],
                 [0.0, 0.0, 0.82521]],
}  # fmt: skip
P3_CHRM = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
PICTURE = picture(60, 80, 3)
DARK = PICTURE // 4


def profile(columns, space=b"RGB ", pcs=b"XYZ "):
    """An ICC profile of primaries and linear curves."""
    blocks = {b"rTRC": b"curv" + bytes(8)}
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), np.transpose(columns), strict=True):
        blocks[name] = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in xyz))
    blocks |= dict.fromkeys((b"gTRC", b"bTRC"), blocks[b"rTRC"])
    table, body, at = b"", b"", 132 + 12 * len(blocks)
    for name, block in blocks.items():
        table += struct.pack(">4sII", name, at + len(body), len(block))
        body += block
    header = struct.pack(">I12s4s4s", at + len(body), b"", space, pcs).ljust(128, b"\0")
    return header + struct.pack(">I", len(blocks)) + table + body


def in_space(srgb, columns):
    """float64 linear light of sRGB-encoded uint8, in the space."""
    return light(srgb / 255) @ np.transpose(np.linalg.solve(columns, SRGB))


def wide_tiff(srgb, columns):
    stored = np.rint(in_space(srgb, columns).clip(0, 1) * 65535).astype(np.uint16)
    return tiff(stored, photometric="rgb", iccprofile=profile(columns))


def back_in_srgb(data, columns):
    """float64, of 255, of a linear 16-bit TIFF in the space."""
    linear = (
        tifffile.imread(io.BytesIO(data)) / 65535 @ np.transpose(np.linalg.solve(SRGB, columns))
    )
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("space", SPACES)
def test_a_photo_is_seen_the_same_in_any_primaries(space):
    photo = decode(wide_tiff(PICTURE, SPACES[space]), "a.tif")
    seen = photo.in_srgb / 257
    bright = PICTURE.min(2) > 8  # below, 16 linear bits tell too few levels apart
    assert np.abs(seen - PICTURE)[bright].max() < 1.5
    assert np.abs(photo.pixels / 257 - PICTURE)[bright].max() > 10


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("space", SPACES)
def test_a_photo_is_corrected_the_same_in_any_primaries(space, model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/wide.tif").write_bytes(wide_tiff(DARK, SPACES[space]))
    Image.fromarray(DARK).save(tmp_path / "in/plain.png")
    report = correct_files(tmp_path / "in", tmp_path / "out", model=model)
    assert [row["what"] for row in report.photos] == ["brightened"] * 2 and report.notes == []
    plain = np.asarray(Image.open(tmp_path / "out/plain.png")).astype(float)
    wide = back_in_srgb((tmp_path / "out/wide.tif").read_bytes(), SPACES[space])
    assert np.abs(plain - DARK).mean() > 20
    error = np.abs(plain - wide)
    assert error.mean() < 1.5 and np.percentile(error, 99) < 8  # deep shadows: few levels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_beyond_srgb_survive(dtype):
    photo = decode(wide_tiff(PICTURE, SPACES["prophoto"]), "a.tif")
    primaries = photo.encoding.primaries
    pixels = picture(60, 80, 3, dtype=dtype, seed=1)  # most of these sRGB cannot hold
    inside = inside_srgb(pixels, primaries)
    assert (inside == 0).any(2).mean() > 0.3
    same = with_wide_colours(pixels, inside, primaries)
    assert same.dtype == dtype
    assert np.abs(same.astype(float) - pixels).max() <= np.iinfo(dtype).max / 255
    darker = with_wide_colours(pixels, inside // 2, primaries)
    assert darker.mean() < 0.7 * pixels.mean() and (darker.std(2) > 5).mean() > 0.3


def test_a_png_says_its_primaries_by_chrm_or_cicp_and_a_jpeg_of_it_is_srgb():
    linear = np.rint(in_space(PICTURE, SPACES["p3"]).clip(0, 1) * 255).astype(np.uint8)
    plain = saved(Image.fromarray(linear), "PNG")
    told = [
        with_chunk(with_chunk(plain, b"gAMA", struct.pack(">I", 100_000)), b"cHRM", P3_CHRM),
        with_chunk(plain, b"cICP", bytes([12, 8, 0, 1])),
    ]
    for data in told:
        photo = decode(data, "a.png")
        assert np.abs(photo.in_srgb / 257 - PICTURE).mean() < 3  # 8 linear bits
        jpeg = in_format(photo, "jpeg")
        assert np.abs(decode(encoded(jpeg), "a.jpg").pixels.astype(int) - PICTURE).mean() < 5
        assert decode(encoded(photo), "a.png").encoding.primaries is not None


@pytest.mark.parametrize(
    "icc",
    [
        profile(SRGB),
        profile(np.zeros((3, 3))),
        profile(np.full((3, 3), 0.3)),
        profile(np.eye(3) * 1000),
        profile(SPACES["p3"], space=b"CMYK"),
        profile(SPACES["p3"], pcs=b"Lab "),
        profile(SPACES["p3"])[:180],
    ],
)
def test_primaries_of_srgb_and_those_that_make_no_sense_are_passed_over(icc):
    photo = decode(saved(Image.fromarray(PICTURE), "PNG", icc_profile=icc), "a.png")
    assert photo.encoding.primaries is None and photo.in_srgb is photo.pixels


@pytest.mark.parametrize("chrm", [bytes(32), b"\xff" * 32, struct.pack(">8I", *[30000] * 8)])
def test_a_chrm_that_makes_no_sense_is_passed_over(chrm):
    data = with_chunk(saved(Image.fromarray(PICTURE), "PNG"), b"cHRM", chrm)
    assert (decode(data, "a.png").in_srgb == PICTURE).all()
