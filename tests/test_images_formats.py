"""A photo written in another format looks the same; what that format cannot hold is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from photo_makers import exif, saved, smooth, tiff
from PIL import Image
from test_images_colour import parametric, profile

from evenlight.stages.photos.containers import png_chunk
from evenlight.stages.photos.decode import Photo, decode
from evenlight.stages.photos.encode import encoded, in_format, kept_of
from evenlight.stages.photos.metadata import Metadata

FORMATS = ("jpeg", "png", "tiff", "webp")


def through(photo: Photo, format: str) -> tuple[Photo, Photo]:
    """As it is written, and as it is read again."""
    written = in_format(photo, format)
    again = decode(encoded(written), "a")
    assert again.format == format
    return written, again


def difference(one: Photo, other: Photo) -> float:
    """Mean, of 255."""
    a, b = (p.pixels / (257 if p.bit_depth == 16 else 1) for p in (one, other))
    return float(np.abs(a - b).mean())


@pytest.mark.parametrize("format", FORMATS)
def test_deep_photos_stay_deep_where_the_format_is_and_tell_it_elsewhere(format: str) -> None:
    deep = smooth(40, 60).astype(np.uint16) * 257 + 9
    photo = decode(tiff(deep, photometric="rgb"), "a")
    written, again = through(photo, format)
    if format in ("png", "tiff"):
        assert (again.pixels == deep).all() and written.metadata.notes == ()
    else:
        assert again.bit_depth == 8 and difference(photo, again) < 3
        assert written.metadata.notes == ("of its 16 bits per sample 8 were kept",)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["profile", "gAMA", "float"])
def test_a_photo_in_another_curve_looks_the_same(kind: str, format: str) -> None:
    samples = smooth(40, 60)
    plain = saved(Image.fromarray(samples), "PNG")
    icc = profile(parametric(0, 1.0))
    if kind == "profile":
        data = saved(Image.fromarray(samples), "PNG", icc_profile=icc)
    elif kind == "gAMA":
        data = plain[:33] + png_chunk(b"gAMA", (100_000).to_bytes(4, "big")) + plain[33:]
    else:
        data = tiff((samples / np.float32(255)), photometric="rgb")
    photo = decode(data, "a")
    assert photo.encoding.transfer is not None
    written, again = through(photo, format)
    assert difference(photo, again) < 3
    assert (again.metadata.icc == icc) == (kind == "profile")
    said = any("bits per sample" in note for note in written.metadata.notes)
    assert said == (kind == "float" and format in ("jpeg", "webp"))


@pytest.mark.parametrize("deep", [False, True])
def test_what_is_transparent_is_white_in_a_jpeg_and_stays_elsewhere(deep: bool) -> None:
    samples = np.dstack([smooth(40, 60), np.full((40, 60), 255, np.uint8)])
    samples[:, :30, 3] = 0
    photo = decode(saved(Image.fromarray(samples), "PNG"), "a")
    if deep:
        wide = photo.pixels.astype(np.uint16) * 257
        alpha = photo.alpha.astype(np.uint16) * 257
        photo = replace(photo, pixels=wide, alpha=alpha, bit_depth=16)
    written, again = through(photo, "jpeg")
    assert again.alpha is None and again.pixels[:, :24].min() > 245
    assert np.abs(again.pixels[:, 36:].astype(int) - samples[:, 36:, :3]).mean() < 4
    assert "what was transparent is white: jpeg has no alpha" in written.metadata.notes
    for format in ("tiff", "webp"):
        kept = through(photo, format)[1].alpha
        assert kept is not None and (kept[:, :30] == 0).all() and (kept[:, 30:] > 254).all()


def test_what_has_no_place_is_named_and_what_has_one_is_kept() -> None:
    everything = Metadata(
        exif=exif(1).tobytes().removeprefix(b"Exif\0\0"),
        xmp=b'<a xmpNote:HasExtendedXMP="0F" b="c"/>',
        extended=(b"0F" * 16 + bytes(8) + b"long",),
        iptc=b"\x1c\2\x50\0\1A",
        resources=b"8BIM\7\xd0\0\0\0\0\0\0",
        comments=(b"scan 12",),
        dpi=(300, 300),
    )
    photo = Photo(pixels=smooth(40, 60), bit_depth=8, format="jpeg", metadata=everything)
    assert in_format(photo, "jpeg").metadata == everything
    tiff_, again = through(photo, "tiff")
    assert tiff_.metadata.notes == ("tiff has no place for its long XMP, comment",)
    assert again.metadata.iptc == everything.iptc and b"HasExtended" not in (
        again.metadata.xmp or b""
    )
    assert again.metadata.resources == everything.resources
    webp, again = through(photo, "webp")
    assert webp.metadata.notes == (
        "webp has no place for its long XMP, IPTC, Photoshop data, comment, resolution",
    )
    assert kept_of(again.metadata) == kept_of(webp.metadata) == ["EXIF", "XMP"]
    large = replace(photo, format="png", metadata=Metadata(xmp=b"<a>" + b"x" * 70_000 + b"</a>"))
    assert in_format(large, "jpeg").metadata.notes == ("jpeg has no place for its XMP",)
    assert encoded(in_format(large, "jpeg"))


def test_an_image_of_an_hdf5_file_becomes_any_format(tmp_path: Path) -> None:
    photo = Photo(pixels=smooth(40, 60), bit_depth=8, format="array")
    for format in FORMATS:
        assert difference(photo, through(photo, format)[1]) < 3
