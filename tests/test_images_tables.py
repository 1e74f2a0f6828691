"""A photo whose profile is made of tables looks the same to the corrector, and comes back in it."""

import io
import struct

import numpy as np
import pytest
from photo_makers import saved, smooth
from PIL import Image, ImageCms
from test_images_colour import light
from test_images_gamut import SRGB

from evenlight.pipeline.correct import correct_files
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.encode import encoded

GRID = 33
WHITE = np.array([0.9642, 1.0, 0.8249])  # D50
STEPS, MIDDLE = np.array([652.8, 256, 256]), np.array([0, 128, 128])  # of CIELAB in 16 bits
PICTURE = smooth(64, 96)


def lab_of(codes):
    """CIELAB of codes in [0, 1], ...,3: the primaries of sRGB, a curve of 1.8."""
    t = codes**1.8 @ np.transpose(SRGB) / WHITE
    x, y, z = np.moveaxis(np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def codes_of(lab):
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    xyz = np.where(f**3 > 216 / 24389, f**3, (116 * f - 16) * 27 / 24389) * WHITE
    return (xyz @ np.linalg.inv(SRGB).T).clip(0, 1) ** (1 / 1.8)


def table(values):
    """A lut16Type of the grid: ICC.1:2022, 10.10."""
    straight = np.tile(np.array([0, 65535], ">u2"), 3).tobytes()
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    head = b"mft2\0\0\0\0" + bytes([3, 3, GRID, 0]) + matrix + struct.pack(">2H", 2, 2)
    return head + straight + np.rint(values.clip(0, 65535)).astype(">u2").tobytes() + straight


def profile(*, leads_back):
    """An ICC profile of nothing but tables, CIELAB between them."""
    steps = np.linspace(0, 1, GRID)
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1)
    coded = grid * 65535 / STEPS - MIDDLE
    tags = {b"A2B0": table((lab_of(grid) + MIDDLE) * STEPS)}
    if leads_back:
        tags[b"B2A0"] = table(codes_of(coded) * 65535)
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + struct.pack(">3i", *np.rint(WHITE * 65536).astype(int))
    records, body, at = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        records += struct.pack(">4sII", name, at + len(body), len(tag))
        body += tag
    head = struct.pack(">I4sI", at + len(body), b"", 0x02400000) + b"mntrRGB Lab " + bytes(12)
    head = (head + b"acsp").ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + records + body


BOTH, ONE_WAY = profile(leads_back=True), profile(leads_back=False)


def in_profile(srgb, icc, format="PNG"):
    codes = np.rint(light(srgb / 255) ** (1 / 1.8) * 255).astype(np.uint8)
    return saved(Image.fromarray(codes), format, icc_profile=icc)


def test_a_photo_is_seen_through_its_tables_and_written_back_through_them() -> None:
    data = in_profile(PICTURE, BOTH)
    photo = decode(data, "a.png")
    assert photo.metadata.notes == () and photo.encoding.stored == np.uint8
    assert np.abs(photo.pixels / 257 - PICTURE).max() < 4
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(encoded(photo))) as after:
        assert after.info["icc_profile"] == BOTH
        assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).mean() < 1
        assert np.abs(np.asarray(before).astype(int) - PICTURE).mean() > 10


def test_a_profile_that_does_not_lead_back_gives_way_to_srgb() -> None:
    photo = decode(in_profile(PICTURE, ONE_WAY), "a.png")
    assert photo.metadata.icc is None and "converted to sRGB" in photo.metadata.notes[0]
    assert photo.bit_depth == 8 and np.abs(photo.pixels.astype(int) - PICTURE).max() < 4


def test_damaged_tables_are_a_note() -> None:
    photo = decode(in_profile(PICTURE, BOTH[:400] + bytes(len(BOTH) - 400)), "a.png")
    assert "colour profile" in photo.metadata.notes[0]


@pytest.mark.usefixtures("toys")
def test_a_photo_is_corrected_the_same_in_tables(model, tmp_path) -> None:
    dark = PICTURE // 4
    (tmp_path / "in").mkdir()
    (tmp_path / "in/tables.tif").write_bytes(in_profile(dark, BOTH, "TIFF"))
    Image.fromarray(dark).save(tmp_path / "in/plain.png")
    correct_files(tmp_path / "in", tmp_path / "out", model=model)
    plain = np.asarray(Image.open(tmp_path / "out/plain.png")).astype(int)
    with Image.open(tmp_path / "out/tables.tif") as image:
        icc = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        seen = ImageCms.profileToProfile(image, icc, ImageCms.createProfile("sRGB"))
    assert np.abs(plain - dark).mean() > 20 and np.abs(np.asarray(seen) - plain).mean() < 3
