"""Photos are found, decoded as they look, and placed on the canvas."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from photo_makers import heic, saved, smooth, tiff
from PIL import Image, ImageCms

from evenlight.cache.errors import PhotoError, UsageError
from evenlight.stages.photos.canvas import Extent, place, working
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.find import find_photos


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


# Finding


def test_a_folder_is_walked_in_order_and_what_is_no_photo_is_counted(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/z.tiff", "a/deep/er/x.WebP", "a.png", "A.TIF", "c.jpeg"):
        touch(tmp_path / name)
    for name in (".DS_Store", "desktop.ini", ".hidden/y.jpg", "notes.txt", "jpg"):
        touch(tmp_path / name)
    found = find_photos(tmp_path)
    names = ["A.TIF", "a.png", "a/deep/er/x.WebP", "a/z.tiff", "b.JPG", "c.jpeg"]
    assert [photo.name for photo in found.photos] == names == [p.output_name for p in found.photos]
    assert found.skipped == {"hidden": 3, "not named as a photo": 2}


def test_pictures_that_cannot_be_read_are_passed_over_by_name_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "a/IMG_1.CR2",
        "logo.svg",
        "poster.psd",
        "b.DNG",
        "old.jp2",
        "phone.HEIC",
        "x.jpg",
    ):
        touch(tmp_path / name)
    found = find_photos(tmp_path)
    reasons = {name: reason.split(":")[0] for name, reason in found.passed_over}
    assert list(reasons) == ["a/IMG_1.CR2", "b.DNG", "logo.svg", "old.jp2", "poster.psd"]
    assert reasons["a/IMG_1.CR2"] == reasons["b.DNG"] == "raw"
    assert reasons["logo.svg"] == "a drawing" and reasons["poster.psd"].startswith("a document")
    assert [photo.name for photo in found.photos] == ["phone.HEIC", "x.jpg"]
    assert not found.skipped
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed
    found = find_photos(tmp_path)
    assert [photo.name for photo in found.photos] == ["x.jpg"]
    assert "pip install 'evenlight[heic]'" in dict(found.passed_over)["phone.HEIC"]


def test_links_are_followed_once_and_the_true_place_names_the_photo(tmp_path: Path) -> None:
    touch(tmp_path / "z/real/x.jpg")
    touch(tmp_path / "elsewhere/y.jpg")
    root = tmp_path / "z"
    (root / "a-link").symlink_to("real")
    (root / "outside").symlink_to(tmp_path / "elsewhere")
    (root / "real/up").symlink_to("..")
    (root / "other.jpg").symlink_to("real/x.jpg")
    names = [photo.name for photo in find_photos(root).photos]
    assert names == ["other.jpg", "outside/y.jpg", "real/x.jpg"]


def test_a_file_named_itself_is_listed_whatever_its_suffix(tmp_path: Path) -> None:
    touch(tmp_path / "photo.bin")
    (photo,) = find_photos(tmp_path / "photo.bin").photos
    assert (photo.name, photo.path) == ("photo.bin", tmp_path / "photo.bin")


def test_a_source_that_is_missing_or_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("gone", "No such file"), ("pipe", "neither a file")):
        with pytest.raises(UsageError, match=reason):
            find_photos(tmp_path / name)


def test_reading_never_waits_on_a_pipe_that_took_a_photos_place(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg")
    (photo,) = find_photos(tmp_path).photos
    photo.path.unlink()
    os.mkfifo(photo.path)
    with pytest.raises(PhotoError, match="not a regular file"):
        photo.read_bytes()


def test_a_broken_link_and_a_vanished_file_are_reported_when_read(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").symlink_to("gone.jpg")
    (photo,) = find_photos(tmp_path).photos
    with pytest.raises(PhotoError, match="cannot be read: No such file"):
        photo.read_bytes()


BYTES = st.binary(min_size=1, max_size=12).filter(lambda raw: not set(raw) & {0, 47})


@settings(max_examples=60, deadline=None)
@given(st.sets(BYTES, min_size=1, max_size=5))
@example({b"\xe9", rb"\xe9", rb"\\xe9"})
def test_any_file_name_survives_json_and_none_collide(
    tmp_path_factory: pytest.TempPathFactory, stems: set[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    for stem in stems:
        Path(os.fsdecode(os.fsencode(folder) + b"/x" + stem + b".jpg")).touch()
    photos = find_photos(folder).photos
    names = [photo.name for photo in photos]
    assert len(set(names)) == len(stems)
    written = json.dumps(names, ensure_ascii=False).encode("utf-8")
    assert json.loads(written) == names
    assert not any(char < " " for name in names for char in name)
    assert {os.fsencode(p.output_name) for p in photos} == {b"x" + s + b".jpg" for s in stems}


def test_the_images_of_an_hdf5_file_are_photos(tmp_path: Path) -> None:
    gray, deep = noise(20, 30), noise(20, 30, 3, dtype=np.uint16)
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["set/gray"] = gray
        file["deep"] = deep.astype(">u2")
        file["../up"] = noise(20, 30, 3)
    photos = {photo.name: photo for photo in find_photos(tmp_path / "images.h5").photos}
    assert photos["set/gray"].output_name == "set/gray.png"
    assert not any(".." in photo.output_name for photo in photos.values())
    photo = decode(photos["set/gray"].read_bytes(), "set/gray")
    assert photo.gray and photo.format == "array" and (photo.pixels == gray[..., None]).all()
    photo = decode(photos["deep"].read_bytes(), "deep")
    assert photo.bit_depth == 16 and (photo.pixels == deep).all()


def test_names_of_datasets_bring_no_controls_into_a_folder(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["a\x1b]0;evil\x07/\u202egnp\nx"] = noise(20, 30, 3)
    (photo,) = find_photos(tmp_path / "images.h5").photos
    assert photo.output_name == "a\\x1b]0;evil\\x07/\\xe2\\x80\\xaegnp\\nx.png"
    assert photo.name + ".png" == photo.output_name
    assert decode(photo.read_bytes(), photo.name).pixels.shape == (20, 30, 3)


def test_the_bytes_of_an_hdf5_image_tell_shape_and_type(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "images.h5", "w") as file:
        file["wide"], file["tall"] = np.zeros((20, 30), np.uint8), np.zeros((30, 20), np.uint8)
    wide, tall = (photo.read_bytes() for photo in find_photos(tmp_path / "images.h5").photos)
    assert wide != tall


# Decoding


ORIENTATIONS = {  # EXIF 2.32, table 6: what the 0th row and 0th column show; written out by hand
    1: [[1, 2], [3, 4]],
    2: [[2, 1], [4, 3]],
    3: [[4, 3], [2, 1]],
    4: [[3, 4], [1, 2]],
    5: [[1, 3], [2, 4]],
    6: [[3, 1], [4, 2]],
    7: [[4, 2], [3, 1]],
    8: [[2, 4], [1, 3]],
}
DEEP = ("png16", "tiff16", "tiff16 deflate", "tiff16 lzw")


def oriented(kind: str, orientation: int) -> bytes:
    """A photo of four flat quarters of values 40, 80, 120, 160, 24 x 32 pixels, in 8 or 16 bits."""
    quarters = np.kron(np.array([[1, 2], [3, 4]]), np.ones((12, 16))) * 40
    pixels = np.repeat(quarters[..., None], 3, axis=2).astype(np.uint8)
    tags = Image.Exif()
    tags[274] = orientation
    if kind not in DEEP:
        options = {"lossless": True} if kind == "WEBP" else {}
        return bytes(saved(Image.fromarray(pixels), kind, exif=tags.tobytes(), **options))
    deep = pixels.astype(np.uint16) * 257
    if kind == "png16":
        metadata = [np.frombuffer(tags.tobytes(), np.uint8)]
        done, data = cv2.imencodeWithMetadata(".png", deep, [cv2.IMAGE_METADATA_EXIF], metadata)
        assert done
        return data.tobytes()
    tag = [(274, 3, 1, orientation, True)]
    if kind == "tiff16 lzw":  # gray: the one 16-bit LZW that Pillow writes
        return bytes(
            saved(Image.fromarray(deep[..., 0]), "TIFF", exif=tags, compression="tiff_lzw")
        )
    compression = "zlib" if "deflate" in kind else None
    return bytes(tiff(deep, photometric="rgb", compression=compression, extratags=tag))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", *DEEP])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_once(kind: str, orientation: int) -> None:
    photo = decode(oriented(kind, orientation), "a")
    rows, columns = photo.pixels.shape[:2]
    assert (rows, columns) == ((32, 24) if orientation >= 5 else (24, 32))
    middle = photo.pixels[rows // 4 :: rows // 2, columns // 4 :: columns // 2, 1] / 40
    middle = middle / 257 if photo.bit_depth == 16 else middle
    np.testing.assert_allclose(middle, ORIENTATIONS[orientation], atol=0.1)


LAYOUTS = ("plain", "deflate", "tiles", "big-endian", "separate planes")


@pytest.mark.parametrize(
    ("channels", "layout"),
    [(c, layout) for c in (1, 2, 3, 4) for layout in LAYOUTS[: 5 if c >= 3 else 4]],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_layout_of_a_tiff_gives_the_same_pixels(
    channels: int, dtype: type, layout: str
) -> None:
    samples = noise(48, 64, channels, dtype=dtype)
    layouts: dict[str, dict[str, Any]] = {
        "plain": {},
        "deflate": {"compression": "zlib", "predictor": True},
        "separate planes": {"planarconfig": "separate"},
        "tiles": {"tile": (16, 16)},
        "big-endian": {"byteorder": ">"},
    }
    options = layouts[layout]
    stored = samples.squeeze()
    if layout == "separate planes":
        stored = np.moveaxis(stored, 2, 0)
    elif channels > 1:
        options = {"planarconfig": "contig", **options}
    extra: dict[str, Any] = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
    photometric = "rgb" if channels >= 3 else "minisblack"
    photo = decode(tiff(stored, photometric=photometric, **options, **extra), "a.tif")
    assert photo.bit_depth == samples.itemsize * 8 and photo.gray == (channels <= 2)
    assert (photo.pixels == samples[..., : 3 if channels >= 3 else 1]).all()
    if channels in (2, 4):
        assert photo.alpha is not None and np.array_equal(photo.alpha, samples[..., -1])
    else:
        assert photo.alpha is None


def test_gray_is_black_at_zero_where_the_tiff_has_white_there() -> None:
    samples = noise(20, 30, dtype=np.uint16)
    photo = decode(tiff(samples, photometric="miniswhite"), "a.tif")
    assert (photo.pixels[..., 0] == 65535 - samples).all()
    photo = decode(tiff(noise(20, 30), photometric="miniswhite"), "a.tif")
    assert (photo.pixels[..., 0] == 255 - noise(20, 30)).all()


def test_colours_multiplied_by_alpha_are_divided_again() -> None:
    plain = np.full((20, 30, 3), 40000)
    alpha = np.full((20, 30, 1), 16384)
    stored = np.concatenate([plain * alpha // 65535, alpha], axis=2).astype(np.uint16)
    photo = decode(tiff(stored, photometric="rgb", extrasamples=["assocalpha"]), "a.tif")
    assert np.abs(photo.pixels.astype(int) - plain).max() <= 4
    assert photo.alpha is not None and (photo.alpha == 16384).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_png_is_exact(channels: int) -> None:
    samples = noise(24, 32, channels, dtype=np.uint16)
    stored = samples[..., [2, 1, 0, 3][:channels]] if channels > 1 else samples
    photo = decode(cv2.imencode(".png", stored)[1].tobytes(), "a.png")
    assert photo.bit_depth == 16 and photo.gray == (channels == 1)
    assert (photo.pixels == samples[..., :3]).all()
    if channels == 4:
        assert photo.alpha is not None and np.array_equal(photo.alpha, samples[..., 3])
    else:
        assert photo.alpha is None


def test_palettes_and_transparent_colours_become_rgb_and_alpha() -> None:
    picture = Image.fromarray(noise(24, 32, 3)).quantize(8)
    plain = decode(saved(picture, "PNG"), "a.png")
    assert plain.alpha is None and (plain.pixels == np.asarray(picture.convert("RGB"))).all()
    clear = decode(saved(picture, "PNG", transparency=3), "a.png")
    assert ((clear.alpha == 0) == (np.asarray(picture) == 3)).all()


def test_cmyk_goes_to_srgb_and_its_profile_does_not_stay() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # unfit: RGB
    picture = Image.new("CMYK", (32, 24), (0, 255, 255, 0))
    for options in (dict[str, Any](), {"icc_profile": profile}):
        photo = decode(saved(picture, "JPEG", **options), "a.jpg")
        assert photo.metadata.icc is None and not photo.gray
        assert (photo.pixels[..., 0] > 200).all() and (photo.pixels[..., 1:] < 60).all()
        assert "CMYK was converted" in photo.metadata.notes[0]


def test_rarer_formats_are_read_as_other_readers_see_them() -> None:
    pixels = smooth(48, 64)
    picture = Image.fromarray(pixels)
    assert (decode(saved(picture, "BMP"), "a.bmp").pixels == pixels).all()
    gif = decode(saved(picture, "GIF"), "a.gif")
    assert (gif.pixels == np.asarray(picture.quantize(256).convert("RGB"))).all()
    for data in (saved(picture, "AVIF", quality=95), heic(picture)):
        photo = decode(data, "a")
        assert photo.alpha is None and np.abs(photo.pixels.astype(int) - pixels).mean() < 3


def test_transparency_of_gif_bmp_and_avif_is_alpha() -> None:
    rgba = Image.fromarray(np.dstack([smooth(48, 64), np.full((48, 64), 255, np.uint8)]))
    rgba.paste((9, 9, 9, 0), (0, 0, 32, 48))
    for data in (saved(rgba, "GIF"), saved(rgba, "AVIF", quality=100), heic(rgba)):
        alpha = decode(data, "a").alpha
        assert alpha is not None and (alpha[:, :30] < 8).all() and (alpha[:, 34:] > 247).all()


def test_the_first_frame_of_a_gif_counts_and_a_note_says_so() -> None:
    first, second = Image.fromarray(smooth(48, 64)), Image.new("RGB", (64, 48))
    data = saved(first, "GIF", save_all=True, append_images=[second, first])
    photo = decode(data, "a.gif")
    assert (photo.pixels == decode(saved(first, "GIF"), "a.gif").pixels).all()
    assert "the first of its 3 frames was kept" in photo.metadata.notes[0]


@pytest.mark.parametrize("orientation", [3, 6])
def test_an_avif_that_its_container_turns_is_turned_once(orientation: int) -> None:
    tags = Image.Exif()
    tags[274] = orientation
    quarters = np.kron(np.array([[1, 2], [3, 4]]), np.ones((12, 16))) * 40
    picture = Image.fromarray(np.repeat(quarters[..., None], 3, axis=2).astype(np.uint8))
    photo = decode(saved(picture, "AVIF", quality=100, exif=tags.tobytes()), "a.avif")
    rows, columns = photo.pixels.shape[:2]
    middle = photo.pixels[rows // 4 :: rows // 2, columns // 4 :: columns // 2, 1] / 40
    np.testing.assert_allclose(middle, ORIENTATIONS[orientation], atol=0.1)


def test_heic_without_its_extra_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic(Image.fromarray(smooth(48, 64)))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(PhotoError, match=r"pip install 'evenlight\[heic\]'"):
        decode(data, "a.heic")


# Canvas


@settings(max_examples=200, deadline=None)
@given(st.integers(16, 3000), st.integers(16, 3000), st.sampled_from([64, 256, 512]))
def test_an_extent_fills_the_long_side_in_multiples_of_eight(
    height: int, width: int, size: int
) -> None:
    extent = Extent.of(height, width, size)
    assert max(extent.height, extent.width) == size
    assert extent.height % 8 == extent.width % 8 == 0 < min(extent.height, extent.width)
    scale = size / max(height, width)
    for side, exact in ((extent.height, height * scale), (extent.width, width * scale)):
        assert abs(side - exact) <= 4 or side == 8
    for stride in (1, 2, 4, 8):
        rows, columns = extent.slices(stride)
        assert (rows.stop * stride, columns.stop * stride) == (extent.height, extent.width)


@settings(max_examples=30, deadline=None)
@given(st.integers(16, 200), st.integers(16, 200), st.sampled_from([1, 4, 8]))
def test_what_is_placed_is_cut_out_again_at_every_stride(
    height: int, width: int, stride: int
) -> None:
    extent = Extent.of(height, width, 64)
    rows, columns = extent.slices(stride)
    photo_map = noise(rows.stop, columns.stop, 3)
    canvas = extent.pad(photo_map, stride)
    assert canvas.shape == (64 // stride, 64 // stride, 3)
    assert (canvas[extent.slices(stride)] == photo_map).all()
    assert (canvas[rows.stop :, 0] == photo_map[-1, 0]).all()
    assert (canvas[0, columns.stop :] == photo_map[0, -1]).all()


def test_a_canvas_holds_the_working_photo() -> None:
    canvas, extent = place(noise(300, 200, 3), 128)
    assert canvas.shape == (128, 128, 3) and canvas.dtype == np.uint8
    assert extent == Extent(128, 88, 128)  # 85.3 is nearest to 88
    assert (canvas[extent.slices()] == working(noise(300, 200, 3), 128)).all()


def test_shrinking_averages_areas_and_small_photos_are_enlarged() -> None:
    pixels = noise(128, 256, 3)
    areas = pixels.reshape(32, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(working(pixels, 64) - areas).max() <= 0.51
    assert working(pixels[:16, :24], 96).shape == (64, 96, 3)


def test_sixteen_bits_are_averaged_before_they_are_rounded_to_eight() -> None:
    level = np.linspace(0, 65535, 256)
    pixels = np.tile(level[:, None, None], (1, 256, 3)).astype(np.uint16)
    exact = level.reshape(64, 4).mean(axis=1) / 257
    assert np.abs(working(pixels, 64)[:, 0, 0] - exact).max() <= 0.51
    ends = np.repeat(np.array([0, 65535], np.uint16), 32 * 64 * 3).reshape(64, 64, 3)
    assert set(np.unique(working(ends, 64))) == {0, 255}


def test_decoding_runs_no_python_in_which_a_signal_would_be_lost(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """libvips would log through Python at every decode, and to stderr where it is not asked to."""
    described = tiff(noise(32, 40, 3), description="hello")
    warned = described.replace(b"hello\0", b"helloo")
    assert warned != described
    with caplog.at_level(logging.DEBUG, logger="pyvips"):
        decode(warned, "a.tif")
        decode(saved(Image.fromarray(noise(32, 40, 3)), "PNG"), "a.png")
    assert [r.getMessage() for r in caplog.records if "VIPS" in r.getMessage()] == []
    assert capfd.readouterr().err == ""
