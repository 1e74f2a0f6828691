"""An HDF5 file of images: every image found and read as stored, damage told by name."""

import time
import tracemalloc

import h5py
import numpy as np
import pytest

from evenlight.cache.errors import PhotoError, StoreError
from evenlight.stages.photos.find import find_photos
from evenlight.stages.photos.hdf5 import list_images, read_image

RNG = np.random.default_rng(0)


@pytest.fixture
def images():
    return {
        "gray": RNG.integers(0, 256, (5, 7), dtype=np.uint8),
        "deep/er/colour": RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8),
        "deep/alpha": RNG.integers(0, 256, (5, 7, 4), dtype=np.uint8),
        "deep/one channel": RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8),
        "sixteen bits": RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16),
    }


@pytest.fixture
def file(tmp_path, images):
    path = tmp_path / "photos.h5"
    with h5py.File(path, "w") as h5:
        for name, image in images.items():
            h5.create_dataset(name, data=image, chunks=True, compression="gzip")
        h5["stack"] = RNG.integers(0, 256, (12, 5, 7, 3), dtype=np.uint8)
        h5["floats"] = np.zeros((5, 7, 3), np.float32)
        h5["vector"] = np.zeros(5, np.uint8)
        h5["two channels"] = np.zeros((5, 7, 2), np.uint8)
        h5["no pixels"] = np.zeros((0, 7, 3), np.uint8)
        h5["scalar"] = np.uint8(3)
        h5["nothing"] = h5py.Empty("uint8")
        h5["link"] = h5py.ExternalLink("elsewhere.h5", "/image")
    return path


def test_every_image_is_listed_and_nothing_else(file, images):
    rows = [f"stack/{row:06d}" for row in range(12)]
    names, passed_over = list_images(file)
    assert (
        names == sorted([*images, *rows]) and passed_over == []
    )  # nothing else has a photo's size


def test_an_image_is_read_as_stored(file, images):
    for name, image in images.items():
        read = read_image(file, name)
        assert read.dtype == image.dtype
        np.testing.assert_array_equal(read, image)


def test_a_row_of_a_stack_is_an_image(file):
    with h5py.File(file) as h5:
        np.testing.assert_array_equal(read_image(file, "stack/000011"), h5["stack"][11])


def test_big_endian_images_come_in_the_order_of_this_machine(tmp_path):
    image = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    with h5py.File(tmp_path / "big.h5", "w") as h5:
        h5.create_dataset("image", data=image, dtype=">u2")
    read = read_image(tmp_path / "big.h5", "image")
    assert read.dtype == np.uint16 and read.dtype.isnative
    np.testing.assert_array_equal(read, image)


def test_channels_may_come_first(tmp_path):
    image = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    with h5py.File(tmp_path / "torch.h5", "w") as h5:
        h5["one"] = image.transpose(2, 0, 1)
        h5["batch"] = np.stack([image, 255 - image]).transpose(0, 3, 1, 2)
    assert list_images(tmp_path / "torch.h5") == (["batch/000000", "batch/000001", "one"], [])
    np.testing.assert_array_equal(read_image(tmp_path / "torch.h5", "one"), image)
    np.testing.assert_array_equal(read_image(tmp_path / "torch.h5", "batch/000001"), 255 - image)


def test_arrays_that_could_be_meant_as_images_are_passed_over_by_name(tmp_path):
    with h5py.File(tmp_path / "odd.h5", "w") as h5:
        h5["floats"] = np.zeros((20, 30, 3), np.float32)
        h5["volume"] = np.zeros((20, 30, 40), np.uint8)
        h5["labels"] = np.zeros((500, 4), np.int64)
    names, passed_over = list_images(tmp_path / "odd.h5")
    assert names == [] and [name for name, _ in passed_over] == ["floats", "volume"]
    assert "an array of float32: only uint8" in passed_over[0][1]
    assert "shape (20, 30, 40): expected HxW, HxWxC" in passed_over[1][1]


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((10**12, 16, 16, 3), "1000000000000 images; at most 1000000"),
        ((3_000_000, 16, 16, 3), "3000000 images; at most 1000000"),
        ((900_000, 16, 16, 3), "promises 900000 images and holds few"),
    ],
)
def test_a_stack_that_promises_more_than_it_holds_is_passed_over_at_once(shape, reason, tmp_path):
    with h5py.File(tmp_path / "bomb.h5", "w") as h5:
        h5.create_dataset("stack", shape, np.uint8, chunks=(1, 16, 16, 3))
    tracemalloc.start()
    started = time.process_time()
    names, ((name, said),) = list_images(tmp_path / "bomb.h5")
    assert (names, name) == ([], "stack") and reason in said
    assert time.process_time() - started < 0.2
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_an_image_over_the_limit_is_refused_from_its_header(tmp_path):
    with h5py.File(tmp_path / "large.h5", "w") as h5:
        h5.create_dataset("image", (20_000, 20_000, 3), np.uint8, chunks=True)
        h5.create_dataset("planes", (3, 20_000, 20_000), np.uint8, chunks=True)
    tracemalloc.start()
    for source in find_photos(tmp_path / "large.h5", max_megapixels=399).photos:
        with pytest.raises(PhotoError, match=r"over the limit of 399 megapixels: raise photo.max"):
            source.read_bytes()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["missing", "stack", "stack/000012", "gray/000000", "floats", "link", "deep", "deep/er"]
)
def test_what_is_no_image_is_refused_by_name(file, name):
    with pytest.raises(PhotoError, match=name):
        read_image(file, name)


def test_an_image_that_claims_gigabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bomb.h5"
    with h5py.File(path, "w") as h5:
        h5.create_dataset("bomb", shape=(60_000, 60_000, 3), dtype=np.uint8, chunks=True)
    assert path.stat().st_size < 100_000
    with pytest.raises(PhotoError, match="bomb"):
        read_image(path, "bomb")


def test_data_kept_in_another_file_is_not_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"0123456789abcdef")
    with h5py.File(tmp_path / "thief.h5", "w") as h5:
        h5.create_dataset("image", (4, 4), np.uint8, external=[(str(secret), 0, 16)])
        h5["linked"] = h5py.ExternalLink("other.h5", "/image")
    with h5py.File(tmp_path / "other.h5", "w") as h5:
        h5["image"] = np.zeros((4, 4), np.uint8)
    for name in ("image", "linked"):
        with pytest.raises(PhotoError, match="other files"):
            read_image(tmp_path / "thief.h5", name)


def test_a_damaged_file_is_an_error_in_words_and_never_another_exception(file, tmp_path):
    """A cut at 25 places, and 8 bits flipped in the first 4 kB of metadata, 50 times."""
    whole = file.read_bytes()
    damaged = [whole[: len(whole) * cut // 25] for cut in range(25)]
    for _ in range(50):
        data = bytearray(whole)
        for bit in RNG.integers(0, 8 * 4096, 8):
            data[bit // 8] ^= 1 << (bit % 8)
        damaged.append(bytes(data))
    refused = 0
    for data in damaged:
        path = tmp_path / "damaged.h5"
        path.write_bytes(data)
        try:
            for name in list_images(path)[0]:
                read_image(path, name)
        except (StoreError, PhotoError) as error:
            refused += 1
            assert "damaged.h5" in str(error)
    assert refused >= 25  # every cut; flips in unused bytes change nothing
