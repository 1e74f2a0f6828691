"""Photos come out as they went in: format, depth, alpha, profile, EXIF; upright, whole or not."""

import io
import os
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from photo_makers import heic, saved, smooth
from PIL import Image, ImageCms, JpegImagePlugin

from evenlight.stages.photos import libvips
from evenlight.stages.photos.containers import (
    image_resource,
    jpeg_segment,
    jpeg_segments,
    png_chunk,
    png_chunks,
)
from evenlight.stages.photos.decode import Photo, decode
from evenlight.stages.photos.encode import encode, encoded, jpeg_bytes
from evenlight.stages.photos.metadata import IPTC, Metadata

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6" dc:title="Hus"/></x:xmpmeta>'
NOTE = b"maker's note with an offset inside: \0\0\1\x23"


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def exif(orientation: int = 6, thumbnail: bytes = b"") -> bytes:
    """A camera's block: IFD0, Exif and GPS directories, the pixels stored 80 wide and 60 high."""
    tags = Image.Exif()
    tags[271], tags[272], tags[274] = "Maker", "Model", orientation
    tags[306], tags[33432] = "2020:01:02 03:04:05", "(c) somebody"
    tags[34665] = {33434: (1, 125), 34855: 400, 37500: NOTE, 40962: 80, 40963: 60}
    tags[34853] = {1: "N", 2: (59.0, 20.0, 3.5)}
    block = tags.tobytes().removeprefix(b"Exif\0\0")
    if not thumbnail:
        return block
    order = "<" if block[:2] == b"II" else ">"
    (count,) = struct.unpack_from(order + "H", block, 8)
    end, linked = 10 + 12 * count, bytearray(block + bytes(len(block) % 2))
    struct.pack_into(order + "I", linked, end, len(linked))
    at = len(linked) + 30
    directory = struct.pack(order + "H", 2) + struct.pack(order + "HHII", 513, 4, 1, at)
    directory += struct.pack(order + "HHII", 514, 4, 1, len(thumbnail)) + bytes(4)
    return bytes(linked) + directory + thumbnail


def camera_file(format: str, **options: Any) -> bytes:
    """60 x 80 pixels of a camera held upright (orientation 6), with all the metadata it can."""
    stream = io.BytesIO()
    if format != "TIFF":
        options |= {"exif": b"Exif\0\0" + exif(), "dpi": (300, 300), "icc_profile": SRGB}
        options |= {"xmp": XMP} if format in ("JPEG", "WEBP") else {}
        Image.fromarray(smooth(60, 80)).save(stream, format, **options)
        data = stream.getvalue()
        if format == "PNG":
            chunks = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP), (b"tEXt", b"Author\0A. Body")
            data = data[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[33:]
        return data
    tags = Image.Exif()
    tags.load(exif())
    tags[700] = XMP
    Image.fromarray(smooth(60, 80)).save(
        stream, "TIFF", exif=tags, dpi=(300, 300), icc_profile=SRGB
    )
    return stream.getvalue()


def avif_10_bit(pixels: np.ndarray) -> bytes:
    image = libvips.pyvips.Image.new_from_array(pixels, interpretation="rgb16")
    data: bytes = image.heifsave_buffer(compression="av1", bitdepth=10, Q=95)
    return data


def exif_of(data: bytes) -> tuple[dict[int, Any], dict[int, Any], dict[int, Any]]:
    """IFD0, Exif and GPS directories, as another reader finds them."""
    with Image.open(io.BytesIO(data)) as image:
        found = image.getexif()
        return dict(found), dict(found.get_ifd(34665)), dict(found.get_ifd(34853))


KINDS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 92},
    "PNG": {},
    "WEBP": {"lossless": True},
    "WEBP lossy": {"quality": 95},
    "TIFF": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_camera_file_comes_out_upright_with_its_metadata(kind: str, tmp_path: Path) -> None:
    data = camera_file(kind.split()[0], **KINDS[kind])
    photo = decode(data, "a")
    assert photo.pixels.shape == (80, 60, 3)
    encode(photo, tmp_path / "out")
    written = (tmp_path / "out").read_bytes()

    again = decode(written, "a")
    assert again.format == photo.format and again.encoding == photo.encoding
    assert np.abs(again.pixels.astype(int) - photo.pixels).mean() < 3
    first, camera, gps = exif_of(written)
    assert first[274] == 1
    assert (first[271], first[272], first[33432]) == ("Maker", "Model", "(c) somebody")
    assert first[306] == "2020:01:02 03:04:05"
    assert camera[33434] == (1, 125) or float(camera[33434]) == 1 / 125
    assert (camera[34855], camera[37500]) == (400, NOTE)
    assert (camera[40962], camera[40963]) == (60, 80)  # width and height as they now are
    assert gps[1] == "N" and tuple(map(float, gps[2])) == (59, 20, 3.5)
    assert again.metadata.icc == SRGB
    assert again.metadata.xmp == XMP.replace(b'"6"', b'"1"')
    if not kind.startswith("WEBP"):  # it has no place for it
        assert again.metadata.dpi == pytest.approx((300, 300), abs=0.01)
    if kind == "PNG":
        assert (b"tEXt", b"Author\0A. Body") in list(png_chunks(written))


def test_sixteen_bit_tiff_keeps_its_exif_profile_and_pixels() -> None:
    pixels = noise(60, 80, 3, dtype=np.uint16)
    photo = replace(decode(camera_file("TIFF"), "a"), pixels=pixels, bit_depth=16)
    data = encoded(photo)
    again = decode(data, "a")
    assert again.bit_depth == 16 and (again.pixels == pixels).all()
    assert again.metadata.icc == SRGB and again.metadata.dpi == (300, 300)
    with tifffile.TiffFile(io.BytesIO(data)) as file:  # Pillow cannot show 16-bit colour
        tags = file.pages.first.tags
        assert file.pages.first.dtype == np.uint16 and (file.asarray() == pixels).all()
        assert (tags[271].value, tags[274].value) == ("Maker", 1)
        assert tags[34665].value["ISOSpeedRatings"] == 400
        assert tags[34665].value["MakerNote"] == NOTE
        assert tags[34853].value["GPSLatitudeRef"] == "N"


def test_sixteen_bit_png_keeps_its_metadata_for_other_readers() -> None:
    pixels = noise(60, 80, 3, dtype=np.uint16)
    photo = replace(decode(camera_file("PNG"), "a"), pixels=pixels, bit_depth=16)
    data = encoded(photo)
    buffer = np.frombuffer(data, np.uint8)
    stored = cv2.imdecode(buffer, cv2.IMREAD_UNCHANGED)
    assert stored is not None and (stored[..., ::-1] == pixels).all()
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["icc_profile"] == SRGB
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert image.info["Author"] == "A. Body"
    assert exif_of(data)[0][272] == "Model" and exif_of(data)[1][37500] == NOTE


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("kind", "code"), [(3, "H2x"), (4, "I")])
def test_an_orientation_of_either_type_and_order_is_turned_and_written_as_1(
    order: str, kind: int, code: str
) -> None:
    block = b"II*\0" if order == "<" else b"MM\0*"
    block += struct.pack(order + "IHHHI" + code + "I", 8, 1, 274, kind, 1, 6, 0)
    data = saved(Image.fromarray(smooth(60, 80)), "JPEG", exif=b"Exif\0\0" + block)
    photo = decode(data, "a")
    assert photo.pixels.shape == (80, 60, 3)
    assert exif_of(encoded(photo))[0] == {274: 1}


def test_a_photo_whose_exif_is_damaged_elsewhere_is_turned_all_the_same() -> None:
    block = b"MM\0*" + struct.pack(">IHHHIHHHHII", 8, 2, 274, 3, 1, 6, 0, 271, 2, 4000, 9999)
    data = saved(Image.fromarray(smooth(60, 80)), "JPEG", exif=b"Exif\0\0" + block + bytes(4))
    photo = decode(data, "a")
    assert photo.pixels.shape == (80, 60, 3) and photo.metadata.exif is None
    assert photo.metadata.notes == ("its EXIF block is damaged and was not kept",)
    for cut in range(len(block)):  # ends anywhere: never an error
        data = saved(Image.fromarray(smooth(60, 80)), "JPEG", exif=b"Exif\0\0" + block[:cut])
        decode(data, "a")


def test_exif_of_several_segments_comes_out_in_as_many() -> None:
    block = exif(1) + bytes(90_000)
    pieces = [jpeg_segment(0xE1, b"Exif\0\0" + block[at : at + 60_000]) for at in (0, 60_000)]
    plain = saved(Image.fromarray(smooth(60, 80)), "JPEG")
    photo = decode(plain[:20] + b"".join(pieces) + plain[20:], "a")
    assert photo.metadata.exif == block
    written = encoded(photo)
    assert decode(written, "a").metadata.exif == block
    assert exif_of(written)[1][37500] == NOTE


@pytest.mark.parametrize("resolution", [(1, 0), (0, 0), (0, 1)])
def test_a_resolution_over_zero_is_none(resolution: tuple[int, int]) -> None:
    data = bytearray(saved(Image.fromarray(smooth(60, 80)), "TIFF", dpi=(300, 300)))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for tag in (282, 283):
            struct.pack_into("<II", data, file.pages.first.tags[tag].valueoffset, *resolution)
    photo = decode(bytes(data), "a")
    assert photo.metadata.dpi is None and decode(encoded(photo), "a").metadata.dpi is None


def test_a_stale_thumbnail_is_dropped_and_its_bytes_with_it() -> None:
    small = io.BytesIO()
    Image.fromarray(smooth(24, 32)).save(small, "JPEG")
    for image_format in ("JPEG", "PNG", "WEBP"):
        stream = io.BytesIO()
        block = b"Exif\0\0" + exif(1, thumbnail=small.getvalue())
        Image.fromarray(smooth(60, 80)).save(stream, image_format, exif=block)
        assert small.getvalue() in stream.getvalue()
        written = encoded(decode(stream.getvalue(), "a"))
        assert small.getvalue()[:40] not in written
        with Image.open(io.BytesIO(written)) as image:
            assert not image.getexif().get_ifd(1)
        assert exif_of(written)[1][34855] == 400


GAIN_MAP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description xmlns:hdrgm="u" hdrgm:Version="1.0"'
    b' dc:title=\'Hus\' GCamera:MotionPhoto="1" xmpNote:HasExtendedXMP="0F">'
    b"<hdrgm:GainMapMax><rdf:Seq><rdf:li>3</rdf:li></rdf:Seq></hdrgm:GainMapMax>"
    b'<Container:Directory><rdf:Seq><rdf:li><Container:Item Item:Length="9"/></rdf:li></rdf:Seq>'
    b"</Container:Directory><dc:creator>A. Body</dc:creator></rdf:Description></x:xmpmeta>"
)


def test_a_gain_map_and_a_video_are_named_and_nothing_claims_that_they_are_there() -> None:
    second = saved(Image.fromarray(smooth(30, 40)), "JPEG")
    first = saved(Image.fromarray(smooth(60, 80)), "JPEG", xmp=GAIN_MAP)
    photo = decode(first + second + b"\0\0\0\x18ftypmp42" + bytes(99), "a.jpg")
    assert photo.metadata.notes == ("its HDR gain map and its video (motion photo) were not kept",)
    written = encoded(photo)
    assert written.endswith(b"\xff\xd9") and written.count(b"\xff\xd8\xff") == 1
    for claim in (b"hdrgm:Version", b"GainMapMax", b"MotionPhoto", b"Container:", b"HasExtended"):
        assert claim in GAIN_MAP and claim not in written
    assert b"dc:title='Hus'" in written and b"<dc:creator>A. Body</dc:creator>" in written


@pytest.mark.parametrize(
    ("behind", "note"),
    [
        (b"", None),
        (bytes(500), None),
        (b"SEFT" * 9, "36 bytes behind its end were not kept"),
        (saved(Image.new("RGB", (16, 16)), "JPEG"), "further images of the file were not kept"),
    ],
)
def test_what_stands_behind_a_jpeg_is_told(behind: bytes, note: str | None) -> None:
    data = saved(Image.fromarray(smooth(60, 80)), "JPEG", progressive=True) + behind
    assert decode(data, "a.jpg").metadata.notes == ((note,) if note else ())


def test_a_hostile_packet_of_claims_takes_no_time() -> None:
    start = time.process_time()
    for part in (b"<hdrgm:a>", b"<hdrgm:a", b' hdrgm:a="', b" hdrgm:a='\"", b" "):
        xmp = part * (65000 // len(part))
        data = saved(Image.new("RGB", (16, 16)), "JPEG", xmp=xmp)
        decode(data, "a.jpg")
    assert time.process_time() - start < 1


RECORDS = b"\x1c\2\x50\0\6Agency" + b"\x1c\2\x78\0\3Sea"  # of IIM: author, caption
THUMBNAIL = image_resource(1036, b"the old picture")
PATH = image_resource(2000, b"a clipping path")


def test_iptc_comments_and_long_xmp_of_a_jpeg_come_back() -> None:
    plain = saved(Image.fromarray(smooth(60, 80)), "JPEG", xmp=GAIN_MAP)
    blocks = b"Photoshop 3.0\0" + THUMBNAIL + image_resource(IPTC, RECORDS) + PATH
    extended = b"http://ns.adobe.com/xmp/extension/\0" + b"0F" * 16 + bytes(60000)
    segments = [(0xED, blocks), (0xE1, extended), (0xFE, b"scan 12"), (0xFE, b"box 3")]
    data = plain[:2] + b"".join(jpeg_segment(*one) for one in segments) + plain[2:]
    written = encoded(decode(data, "a.jpg"))
    found = list(jpeg_segments(written))
    assert (0xED, b"Photoshop 3.0\0" + image_resource(IPTC, RECORDS) + PATH) in found
    assert [content for marker, content in found if marker == 0xFE] == [b"scan 12", b"box 3"]
    assert (0xE1, extended) in found and b'xmpNote:HasExtendedXMP="0F"' in written


def test_blocks_of_several_segments_come_out_in_as_many() -> None:
    plain = saved(Image.fromarray(smooth(60, 80)), "JPEG")
    block = image_resource(2001, bytes(range(256)) * 500)
    parts = (block[:60000], block[60000:120000], block[120000:])
    segments = b"".join(jpeg_segment(0xED, b"Photoshop 3.0\0" + part) for part in parts)
    photo = decode(plain[:2] + segments + plain[2:], "a.jpg")
    assert photo.metadata.resources == block
    assert decode(encoded(photo), "a.jpg").metadata.resources == block


def test_iptc_of_a_tiff_comes_back_and_its_further_pages_are_named() -> None:
    pages = io.BytesIO()
    with tifffile.TiffWriter(pages) as file:
        tags = [(33723, 1, len(RECORDS), RECORDS, True), (34377, 1, len(PATH), PATH, True)]
        file.write(smooth(60, 80), photometric="rgb", extratags=tags)
        file.write(smooth(30, 40), photometric="rgb", subfiletype=1)  # the same, smaller
        file.write(smooth(60, 80), photometric="rgb")
    photo = decode(pages.getvalue(), "a.tif")
    assert photo.metadata.notes == ("the first of its 2 pages was kept, the others were not",)
    with tifffile.TiffFile(io.BytesIO(encoded(photo))) as again:
        assert len(again.pages) == 1
        assert bytes(again.pages.first.tags[33723].value) == RECORDS
        assert bytes(again.pages.first.tags[34377].value) == PATH


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt"])
def test_exif_that_a_png_holds_as_text_is_turned_and_kept(kind: bytes) -> None:
    digits = (b"Exif\0\0" + exif(6)).hex()
    text = f"\nexif\n{len(digits) // 2:8}\n" + "\n".join(
        digits[at : at + 72] for at in range(0, len(digits), 72)
    )
    packed = b"\0" + zlib.compress(text.encode()) if kind == b"zTXt" else text.encode()
    plain = saved(Image.fromarray(smooth(60, 80)), "PNG")
    chunk = png_chunk(kind, b"Raw profile type exif\0" + packed)
    photo = decode(plain[:33] + chunk + plain[33:], "a.png")
    assert photo.pixels.shape == (80, 60, 3)
    first, camera, _ = exif_of(encoded(photo))
    assert (first[271], first[274], camera[37500]) == ("Maker", 1, NOTE)
    assert not any(content.startswith(b"Raw") for _, content in png_chunks(encoded(photo)))
    broken = png_chunk(kind, b"Raw profile type exif\0\nexif\n 9\nxyz")
    notes = decode(plain[:33] + broken + plain[33:], "a.png").metadata.notes
    assert notes == ("its EXIF block is damaged and was not kept",)


@pytest.mark.parametrize("quality", [60, 88])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_jpeg_keeps_its_tables_and_subsampling(quality: int, subsampling: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(smooth(60, 80)).save(stream, "JPEG", quality=quality, subsampling=subsampling)
    written = encoded(decode(stream.getvalue(), "a"))
    with Image.open(stream) as before, Image.open(io.BytesIO(written)) as after:
        assert isinstance(before, JpegImagePlugin.JpegImageFile)
        assert isinstance(after, JpegImagePlugin.JpegImageFile)
        assert after.quantization == before.quantization
        assert JpegImagePlugin.get_sampling(after) == JpegImagePlugin.get_sampling(before)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_avif_and_heic_come_out_as_they_came_with_their_metadata(kind: str) -> None:
    xmp = XMP.replace(b'"6"', b'"1"')
    options: dict[str, Any] = {"exif": b"Exif\0\0" + exif(1), "xmp": xmp}
    picture = Image.fromarray(smooth(60, 80))
    picture.info["icc_profile"] = SRGB
    if kind == "HEIC":
        data = heic(picture, **options)
    else:
        data = saved(picture, "AVIF", quality=95, icc_profile=SRGB, **options)
    photo = decode(data, "a")
    written = encoded(photo)
    again = decode(written, "a")
    assert again.format == photo.format == kind.lower() and not photo.metadata.notes
    assert np.abs(again.pixels.astype(int) - photo.pixels).mean() < 3
    assert again.metadata.icc == SRGB and again.metadata.xmp == xmp
    assert again.metadata.exif is not None and NOTE in again.metadata.exif
    if kind == "AVIF":
        first, camera, gps = exif_of(written)
        assert first[272] == "Model" and first.get(274, 1) == 1
        assert (camera[34855], camera[37500]) == (400, NOTE) and gps[1] == "N"


def test_a_deep_avif_is_read_deep_and_says_that_eight_bits_are_written() -> None:
    deep = (smooth(48, 64).astype(np.uint16) << 8) + 128
    photo = decode(avif_10_bit(deep), "a.avif")
    assert photo.bit_depth == 16 and np.abs(photo.pixels.astype(int) - deep).mean() < 600
    assert photo.metadata.notes == ("of its bits per sample 8 were kept",)
    again = decode(encoded(photo), "a.avif")
    assert again.bit_depth == 8
    assert np.abs(again.pixels.astype(int) - smooth(48, 64)).mean() < 3


def test_a_deep_heic_stays_deep() -> None:
    deep = Photo(pixels=(smooth(48, 64).astype(np.uint16) << 8) + 128, bit_depth=16, format="heic")
    again = decode(encoded(deep), "a.heic")
    assert again.bit_depth == 16 and np.abs(again.pixels.astype(int) - deep.pixels).mean() < 1000


def test_gif_and_bmp_come_out_as_they_came() -> None:
    bmp = decode(saved(Image.fromarray(smooth(60, 80)), "BMP"), "a.bmp")
    again = decode(encoded(bmp), "a.bmp")
    assert again.format == "bmp" and (again.pixels == bmp.pixels).all()
    clear = np.full((60, 80), 255, np.uint8)
    clear[:, :40] = 0
    gif = Photo(pixels=smooth(60, 80), bit_depth=8, format="gif", alpha=clear)
    again = decode(encoded(gif), "a.gif")
    assert again.format == "gif" and np.array_equal(again.alpha, clear)
    assert np.abs(again.pixels[:, 40:].astype(int) - gif.pixels[:, 40:]).mean() < 6
    assert "256 colours" in again.metadata.notes[0]


def test_a_bare_jpeg_has_full_chroma_and_high_quality() -> None:
    with Image.open(io.BytesIO(jpeg_bytes(smooth(60, 80)))) as image:
        assert JpegImagePlugin.get_sampling(image) == 0
        assert np.abs(np.asarray(image).astype(int) - smooth(60, 80)).mean() < 1


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "TIFF"])
def test_gray_stays_gray_until_the_correction_makes_colour(image_format: str) -> None:
    stream = io.BytesIO()
    Image.fromarray(smooth(60, 80)[..., 0]).save(stream, image_format)
    photo = decode(stream.getvalue(), "a")
    assert photo.gray
    with Image.open(io.BytesIO(encoded(photo))) as image:
        assert image.mode == "L"
    coloured = replace(photo, pixels=smooth(60, 80))
    with Image.open(io.BytesIO(encoded(coloured))) as image:
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - coloured.pixels).mean() < 2


def test_a_profile_for_gray_is_not_put_on_colours() -> None:
    gray_profile = bytearray(SRGB)
    gray_profile[16:20] = b"GRAY"
    gray = Photo(pixels=smooth(32, 32)[..., :1].repeat(3, axis=2), bit_depth=8, format="png",
                 gray=True, metadata=Metadata(icc=bytes(gray_profile)))  # fmt: skip
    assert decode(encoded(gray), "a").metadata.icc == bytes(gray_profile)
    coloured = replace(gray, pixels=smooth(32, 32))
    assert decode(encoded(coloured), "a").metadata.icc is None


EXACT = [
    ("png", 8),
    ("png", 16),
    ("tiff", 8),
    ("tiff", 16),
    ("array", 8),
    ("array", 16),
    ("webp", 8),
]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(EXACT),
    st.integers(16, 70),
    st.integers(16, 70),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_lossless_formats_give_back_every_pixel(
    kind: tuple[str, int], height: int, width: int, gray: bool, has_alpha: bool, seed: int
) -> None:
    format, depth = kind
    rng = np.random.default_rng(seed)
    top, dtype = 2**depth, np.uint16 if depth == 16 else np.uint8
    pixels = rng.integers(0, top, (height, width, 1 if gray else 3)).astype(dtype)
    alpha = rng.integers(0, top, (height, width)).astype(dtype) if has_alpha else None
    photo = Photo(pixels=np.repeat(pixels, 3, axis=2) if gray else pixels, bit_depth=depth,
                  format=format, alpha=alpha, gray=gray)  # fmt: skip
    again = decode(encoded(photo), "a")
    assert again.format == ("png" if format == "array" else format)
    assert again.bit_depth == depth and again.pixels.dtype == dtype
    assert (again.pixels == photo.pixels).all()
    if alpha is None:
        assert again.alpha is None
    else:
        assert again.alpha is not None and np.array_equal(again.alpha, alpha)
    if format != "webp" and not (depth == 16 and has_alpha and format != "tiff"):
        assert again.gray == gray  # WebP has no gray, OpenCV no gray with alpha of 16 bits


def test_writing_a_written_photo_again_changes_nothing() -> None:
    for kind in ("PNG", "WEBP", "TIFF"):
        once = encoded(decode(camera_file(kind, **KINDS[kind]), "a"))
        twice = encoded(decode(once, "a"))
        first, second = decode(once, "a"), decode(twice, "a")
        assert (first.pixels == second.pixels).all()
        assert exif_of(once)[1:] == exif_of(twice)[1:]
        assert first.metadata.xmp == second.metadata.xmp


def test_a_photo_that_cannot_be_written_raises_and_leaves_nothing(tmp_path: Path) -> None:
    photo = Photo(pixels=smooth(32, 32), bit_depth=8, format="png")
    with pytest.raises(OSError, match="No such file"):
        encode(photo, tmp_path / "gone" / "a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match="irectory"):
        encode(photo, tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["a.png"]  # noqa: PTH208 - hidden files too
