"""Malformed, odd and hostile photo files, all made here: each ends in the class it should."""

import io
import os
import random
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from photo_makers import (
    base_files,
    exif,
    heic,
    jpeg_header,
    picture,
    png,
    saved,
    tiff,
    tiff_header,
)
from PIL import Image

from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.containers import jpeg_segment, png_chunk
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.find import find_photos
from evenlight.stages.photos.memory import free_memory

GOOD, REFUSED, EITHER = "good", "refused", "either"
FLIPS = 40  # per base file


@dataclass(frozen=True)
class Case:
    name: bytes  # file name
    data: bytes
    expected: str
    truncated: bool = False


def truncations() -> list[Case]:
    cases = []
    for name, data in base_files().items():
        cuts = {3, 9, 25, len(data) - 1, len(data) - 2}
        cuts |= {len(data) * k // 8 for k in range(1, 8)}
        assert len(cuts) == 12
        for cut in sorted(cuts):
            # A JPEG without its end marker has every pixel; the decoder knows where scans end.
            whole = name == "baseline.jpg" and cut >= len(data) - 2
            expected = GOOD if whole else REFUSED
            case = Case(f"cut-{cut}-{name}".encode(), data[:cut], expected, truncated=not whole)
            cases.append(case)
    return cases


def bit_flips() -> list[Case]:
    rng = random.Random(0)
    cases: list[Case] = []
    for name, data in base_files().items():
        for _ in range(FLIPS):
            flipped = bytearray(data)
            at = rng.randrange(len(data))
            flipped[at] ^= 1 << rng.randrange(8)
            expected = REFUSED if name.endswith("png") else EITHER  # PNG has checksums throughout
            case_name = f"flip-{len(cases)}-{name}".encode()
            cases.append(Case(case_name, bytes(flipped), expected))
    return cases


def without_last_strip(data: bytes) -> bytes:
    """A whole TIFF of several strips whose directory leaves out the last one."""
    shortened = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for tag in (273, 279):
            entry = file.pages.first.tags[tag]
            assert entry.count > 2
            struct.pack_into("<I", shortened, entry.offset + 4, entry.count - 1)
    return bytes(shortened)


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with a chunk more, behind its header."""
    return data[:33] + png_chunk(kind, content) + data[33:]


def two_frame_headers(data: bytes) -> bytes:
    """A whole JPEG behind another, smaller frame header."""
    framed: bytes = data[:2] + jpeg_header(64, 48)[2:-2] + data[2:]
    return framed


def two_headers(data: bytes) -> bytes:
    """A whole PNG behind another header that says it is smaller."""
    smaller = png_chunk(b"IHDR", struct.pack(">II", 64, 48) + data[24:29])
    return data[:8] + smaller + data[8:]


def other_content() -> list[Case]:
    small = Image.fromarray(picture(60, 80, 3))
    animated: dict[str, Any] = {
        "save_all": True,
        "append_images": [Image.fromarray(picture(60, 80, 3, seed=1))],
    }
    deep = picture(60, 80, 4, dtype=np.uint16)
    contents = {
        "empty.jpg": b"",
        "zeros.png": bytes(5000),
        "page.jpg": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>",
        "bom.jpeg": b"\xef\xbb\xbf  <HTML>",
        "text.tif": b"no photo at all\n" * 20,
        "photoshop.png": b"8BPS\0\1" + bytes(100),
        "drawing.jpg": b"<svg xmlns='http://www.w3.org/2000/svg' width='10'></svg>",
        "json.webp": b'{"error": "quota"}',
        "video.jpg": b"\0\0\0\x18ftypmp42" + bytes(100),
        "animated.webp": saved(small, "WEBP", **animated),
        "animated.png": saved(small, "PNG", **animated),
        "double.tif": tiff(picture(60, 80, 3).astype(np.float64), photometric="rgb"),
        "signed.tif": tiff(picture(60, 80).astype(np.int16)),
        "cmyk16.tif": tiff(deep, photometric="separated"),
        "short.png": png(zlib.compress(bytes(60 * 81)), 80, 60, 8, 2),
        "short16.png": png(zlib.compress(bytes(60 * 81)), 80, 60, 16, 2),
        "missing-strip16.tif": without_last_strip(base_files()["sixteen.tif"]),
        "missing-strip.tif": without_last_strip(
            tiff(picture(60, 80, 3), photometric="rgb", rowsperstrip=16)
        ),
        "missing-strip16-plain.tif": without_last_strip(
            tiff(deep[..., :3], photometric="rgb", rowsperstrip=16)
        ),
        "cut-text.tif": tiff_header(16, 16, text=b"A view of the harbour at dusk")[:-9],
        "two-headers.png": two_headers(saved(small, "PNG")),
        "two-frames.jpg": two_frame_headers(saved(small, "JPEG")),
        "1x1.png": saved(Image.new("RGB", (1, 1)), "PNG"),
        "1x1.jpg": saved(Image.new("RGB", (1, 1)), "JPEG"),
        "1x20000.png": saved(Image.new("RGB", (1, 20000)), "PNG"),
        "20000x1.jpg": saved(Image.new("RGB", (20000, 1)), "JPEG"),
        "20000x15.tif": saved(Image.new("RGB", (20000, 15)), "TIFF"),
    }
    return [Case(name.encode(), data, REFUSED) for name, data in contents.items()]


def good_oddities() -> list[Case]:
    colour = Image.fromarray(picture(60, 80, 3))
    rgba = Image.fromarray(picture(60, 80, 4))
    gray, gray_alpha = Image.fromarray(picture(60, 80)), Image.fromarray(picture(60, 80, 2))
    deep = picture(60, 80, 4, dtype=np.uint16)
    contents = {
        "is-a-png.jpg": saved(colour, "PNG"),
        "is-a-jpeg.tif": saved(colour, "JPEG"),
        "is-a-webp.PNG": saved(colour, "WEBP"),
        "is-a-tiff.webp": saved(colour, "TIFF"),
        "is-a-gif.png": saved(colour, "GIF"),
        "is-a-bmp.jpg": saved(colour, "BMP"),
        "is-an-avif.jpg": saved(colour, "AVIF"),
        "is-a-heic.jpg": heic(colour),
        "gray.jfif": saved(gray, "JPEG"),
        "gray.jpe": saved(gray, "JPEG"),
        "gray.gif": saved(gray, "GIF"),
        "gray.bmp": saved(gray, "BMP"),
        "palette.bmp": saved(colour.convert("P"), "BMP"),
        "gray.jpg": saved(gray, "JPEG"),
        "gray.png": saved(gray, "PNG"),
        "gray.tif": saved(gray, "TIFF"),
        "gray-alpha.png": saved(gray_alpha, "PNG"),
        "gray-alpha.tif": saved(gray_alpha, "TIFF"),
        "alpha.png": saved(rgba, "PNG"),
        "alpha.tif": saved(rgba, "TIFF"),
        "alpha.webp": saved(rgba, "WEBP"),
        "palette.png": saved(colour.convert("P"), "PNG"),
        "palette-clear.png": saved(colour.convert("P"), "PNG", transparency=3),
        "palette.tif": saved(colour.convert("P"), "TIFF"),
        "one-bit.png": saved(gray.convert("1"), "PNG"),
        "one-bit.tif": saved(gray.convert("1"), "TIFF", compression="group4"),
        "cmyk.jpg": saved(colour.convert("CMYK"), "JPEG"),
        "cmyk.tif": saved(colour.convert("CMYK"), "TIFF"),
        "gray16.png": cv2.imencode(".png", deep[..., 0])[1].tobytes(),
        "alpha16.png": cv2.imencode(".png", deep)[1].tobytes(),
        "gray16.tif": tiff(deep[..., 0], photometric="minisblack"),
        "inverse16.tif": tiff(deep[..., 0], photometric="miniswhite"),
        "planes16.tif": tiff(
            deep[..., :3].transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
        ),
        "tiles16.tif": tiff(deep[..., :3], photometric="rgb", tile=(16, 16)),
        "big16.tif": tiff(deep[..., :3], photometric="rgb", bigtiff=True),
        "float.tif": tiff(picture(60, 80, 3).astype(np.float32), photometric="rgb"),
        "described.tif": tiff_header(16, 16, text=b"A view of the harbour at dusk"),
        "big-text.png": with_chunk(
            saved(colour, "PNG"), b"zTXt", b"x\0\0" + zlib.compress(bytes(3 << 20))
        ),
        "trailing.jpg": saved(colour, "JPEG") + b"a motion photo's video",
        "long.png": saved(Image.fromarray(picture(16, 2000, 3)), "PNG"),
    }
    for orientation in range(1, 9):
        for format, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("TIFF", "tif"), ("WEBP", "webp")):
            name = f"orientation-{orientation}.{suffix}"
            contents[name] = saved(colour, format, exif=exif(orientation).tobytes())
        tag = [(274, 3, 1, orientation, True)]
        for compression in (None, "zlib"):
            contents[f"orientation-{orientation}-{compression}16.tif"] = tiff(
                deep[..., :3], photometric="rgb", compression=compression, extratags=tag
            )
    cases = [Case(name.encode(), data, GOOD) for name, data in contents.items()]
    jpeg = saved(colour, "JPEG")
    names = (
        "été.jpg",
        "e\u0301te\u0301.jpg",
        "写真 1.JPG",
        "a\nb.jpg",
        "\x1b[31m.jpg",
        "%s {}.jpg",
    )
    cases += [Case(name.encode(), jpeg, GOOD) for name in names]
    return [*cases, Case(b"latin-\xe9.jpg", jpeg, GOOD), Case(b"latin-\\xe9.jpg", jpeg, GOOD)]


def test_six_hundred_malformed_and_odd_files_each_end_in_their_class(tmp_path: Path) -> None:
    cases = truncations() + bit_flips() + other_content() + good_oddities()
    assert len(cases) >= 600 and len({case.name for case in cases}) == len(cases)
    for case in cases:
        (tmp_path / os.fsdecode(case.name)).write_bytes(case.data)
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    expected = {os.fsdecode(case.name): case for case in cases}
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    found = find_photos(tmp_path)
    wrong, classes, reasons = [], Counter[str](), {}
    for source in found.photos:
        start = time.monotonic()
        try:
            decode(source.read_bytes(), source.name)
            outcome = GOOD
        except PhotoError as error:
            outcome, reasons[source.output_name] = REFUSED, str(error)
        assert time.monotonic() - start < 5
        classes[outcome] += 1
        known = expected.get(source.output_name)
        if known is not None and known.expected not in (outcome, EITHER):
            wrong.append((source.name, outcome, reasons.get(source.output_name)))

    assert not wrong
    assert {photo.output_name for photo in found.photos} == set(expected) | {"itself.jpg"}
    assert "symbolic links" in reasons["itself.jpg"]
    assert found.skipped == {"not a regular file": 1, "link to a folder already searched": 1}
    assert classes[GOOD] > 100
    for case in cases:
        if case.truncated:
            reason = reasons[os.fsdecode(case.name)]
            assert "truncated" in reason and str(tmp_path) not in reason, (case.name, reason)
    growth_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before
    assert growth_kib < 1 << 20


def bigtiff_header(width: int, height: int) -> bytes:
    tags = [(256, 16, width), (257, 16, height), (258, 3, 8), (279, 16, 8)]
    entries = b"".join(struct.pack("<HHQQ", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, len(tags)) + entries + bytes(8)


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def vp8x(width: int, height: int) -> tuple[bytes, bytes]:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes(4) + sides


def vp8(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(20)


def vp8l(width: int, height: int) -> tuple[bytes, bytes]:
    return b"VP8L", b"\x2f" + struct.pack("<I", width - 1 | (height - 1) << 14) + bytes(20)


def real_bombs() -> list[bytes]:
    """Whole, valid files of 256 megapixels, each well under a megabyte."""
    side = 16000
    deflate = zlib.compressobj(6)
    row = bytes(side)
    packed = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    # As PNG: each row of bits is one filter byte and 15999 bytes, so 8 pixels a byte.
    wide_png = png(packed, (side - 1) * 8, side, 1, 0)
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, side), (279, 4, len(packed))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    body = packed + bytes(len(packed) % 2)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    whole_tiff = b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory
    # Deflated strip of 256 MB behind the header of a small 16-bit photo in separate planes.
    swelling = tiff(picture(3, 64, 64, dtype=np.uint16), photometric="rgb", planarconfig="separate",
                    compression="zlib", rowsperstrip=64)  # fmt: skip
    with tifffile.TiffFile(io.BytesIO(swelling)) as file:
        offsets, counts = file.pages.first.tags[273], file.pages.first.tags[279]
        assert offsets.count == counts.count == 3 and offsets.dtype == counts.dtype == 4
        patched = bytearray(swelling + packed)
        struct.pack_into("<I", patched, offsets.valueoffset, len(swelling))
        struct.pack_into("<I", patched, counts.valueoffset, len(packed))
    return [wide_png, whole_tiff, bytes(patched)]


def bombs() -> list[bytes]:
    huge = 2**31 - 1
    small_then_huge = jpeg_header(64, 64)[:-2] + jpeg_header(65500, 65500)[2:]
    return [
        png(b"", huge, huge, 8, 2),
        png(b"", huge, 1, 16, 6),
        png(b"", 20000, 20000, 16, 2),
        png(b"", 40000, 40000, 1, 0),
        tiff_header(huge, huge),
        tiff_header(2**32 - 1, 2**32 - 1, 16),
        tiff_header(20000, 20000),
        tiff_header(64, 64, 8, (30000, 30000)),
        tiff_header(64, 64, 16, (30000, 30000)),
        bigtiff_header(2**40, 2**40),
        webp(vp8x(2**24, 2**24)),
        webp(vp8x(64, 64), vp8(16383, 16383)),
        webp(vp8(16383, 16383)),
        webp(vp8l(16384, 16384)),
        jpeg_header(65535, 65535),
        jpeg_header(65500, 65500, 0xC2),
        small_then_huge,
        *real_bombs(),
    ]


MEASURE = """
import resource, sys, time
from pathlib import Path
import numpy as np
from evenlight.cache.errors import PhotoError
from evenlight.stages.photos.decode import decode

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir(), reverse=True):  # warm-ups load the plugins first
    data = path.read_bytes()
    before, start = peak(), time.process_time()
    try:
        decode(data, path.name)
        outcome = "decoded"
    except PhotoError as error:
        outcome = "refused " + str(error)
    print(time.process_time() - start, peak() - before, path.name, outcome)
"""


@pytest.fixture(scope="module")
def bomb_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    for number, data in enumerate(bombs()):
        assert len(data) < 1 << 20
        (folder / f"bomb-{number:02d}").write_bytes(data)
    for name, data in base_files().items():
        (folder / f"warm-up-{name}").write_bytes(data)
    return folder


def test_twenty_bombs_end_in_a_fifth_of_a_second_without_memory(bomb_folder: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(bomb_folder)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split(" ", 3) for line in lines]
    measured = [row for row in rows if row[2].startswith("bomb")]
    assert {row[3] for row in rows if row not in measured} == {"decoded"}
    assert len(measured) == 20
    for seconds, kib, name, outcome in measured:
        # The last one's pixels are 64 x 64, and decoding stops at them.
        assert outcome.startswith("refused ") or name == "bomb-19", (name, outcome)
        assert float(seconds) < 0.2, (name, seconds)
        assert int(kib) < 50 * 1024, (name, kib)


def test_a_jpeg_without_its_end_marker_has_every_pixel() -> None:
    for side in range(60, 80):  # the bits left over after the last pixel differ
        data = saved(Image.fromarray(picture(side, 80, 3)), "JPEG", quality=92)
        assert data.endswith(b"\xff\xd9")
        bare = data[:-2]
        for cut in (bare, data[:-1], bare + bytes(9) + b"Image_UTC_Data1700000000000SEFT"):
            assert (decode(cut, "a.jpg").pixels == decode(data, "a.jpg").pixels).all()
        with pytest.raises(PhotoError, match="truncated"):
            decode(data[:-40], "a.jpg")


def many_scans(side: int) -> bytes:
    """A whole progressive JPEG, each bit of each coefficient in a scan of its own, all zero."""
    data = saved(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    end = scan + 10  # past the header of a scan of one component; then its data
    while data[end] != 0xFF or data[end + 1] == 0:
        end += 1
    zeros = jpeg_segment(0xC4, bytes([0x10, 1]) + bytes(15) + b"\xe0")  # code 0: a run of 2^14 up
    num_runs = -(-((side // 8) ** 2) // 32767)
    bits = ("0" + "1" * 14) * num_runs + "1" * (-15 * num_runs % 8)
    run = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scans = b"".join(
        jpeg_segment(0xDA, bytes([1, 1, 0, band, band, (low + 1) % 14 << 4 | low])) + run
        for band in range(1, 64)
        for low in range(13, -1, -1)
    )
    return data[:end] + zeros + scans + b"\xff\xd9"


def test_a_thousand_scans_of_a_large_photo_are_refused_at_once() -> None:
    assert decode(many_scans(64), "a.jpg").pixels.shape == (64, 64, 3)
    bomb = many_scans(11000)
    assert len(bomb) < 1 << 20
    start = time.process_time()
    with pytest.raises(PhotoError, match=r"it has 883 scans of 11000 x 11000 pixels"):
        decode(bomb, "a.jpg")
    assert time.process_time() - start < 0.5


def test_megabytes_of_exif_segments_take_no_time() -> None:
    data = base_files()["progressive.jpg"]
    segment = jpeg_segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0" + bytes(65000))
    start = time.process_time()
    decode(data[:2] + segment * 1000 + data[2:], "a.jpg")
    assert time.process_time() - start < 2


def test_the_limit_is_the_setting_and_not_the_decoders(tmp_path: Path) -> None:
    data = saved(Image.new("RGB", (2000, 1000)), "PNG")
    assert decode(data, "a.png", max_megapixels=2).pixels.shape == (1000, 2000, 3)
    with pytest.raises(PhotoError, match=r"2000 x 1000 .* limit of 1.9 megapixels"):
        decode(data, "a.png", max_megapixels=1.9)


def test_a_photo_too_large_for_the_memory_that_is_free_is_refused_from_its_header(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = saved(Image.new("RGB", (2000, 1000)), "PNG")
    monkeypatch.setattr("evenlight.stages.photos.decode.free_memory", lambda: 24 * 10**6)
    assert decode(data, "a.png").pixels.shape == (1000, 2000, 3)
    monkeypatch.setattr("evenlight.stages.photos.decode.free_memory", lambda: 24 * 10**6 - 1)
    with pytest.raises(PhotoError, match=r"2000 x 1000 pixels need 0.0 GB of memory"):
        decode(data, "a.png")


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evenlight.stages.photos.memory._CGROUP", tmp_path)
    of_machine = free_memory()
    assert of_machine > 10**8
    for name, text in {
        "max": "900000",
        "current": "500000",
        "stat": "x 1\ninactive_file 70\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory() == 400_070
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 10**8


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_or_profile_costs_the_note_and_not_the_photo() -> None:
    colour = Image.fromarray(picture(60, 80, 3))
    broken = saved(colour, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    photo = decode(broken, "a.jpg")
    assert photo.metadata.exif is None
    assert "EXIF block is damaged" in photo.metadata.notes[0]
    whole = saved(colour, "PNG")
    bad_profile = with_chunk(whole, b"iCCP", b"x\0\0not deflate")
    photo = decode(bad_profile, "a.png")
    assert photo.metadata.icc is None
    assert "colour profile is damaged" in photo.metadata.notes[0]
