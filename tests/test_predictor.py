"""The act: a photo is judged and corrected as it needs; what may be handed in as a photo."""

import io

import numpy as np
import pytest
from photo_makers import exif, picture
from PIL import Image
from toy_corrector import save_toy_corrector, toy_models

import evenlight
from evenlight.cache.errors import EvenlightError, PhotoError, UsageError
from evenlight.pipeline.load import load_predictor
from evenlight.stages.pixels import luma, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.judge import STRENGTHS
from evenlight.stages.priors.opinion import Opinion


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_toy_corrector(tmp_path_factory.mktemp("model"))


@pytest.fixture
def predictor(model, monkeypatch):
    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)
    return load_predictor(model)


def dark(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return picture(*shape, dtype=dtype) // 4


def judged(monkeypatch, predictor, p_good: float, strength: float, apart: float = 0.0) -> None:
    """Make judges say so of every photo, and how far its largest region is from the others."""
    opinion = Opinion(p_good, (strength == STRENGTHS).double().numpy())
    monkeypatch.setattr(type(predictor.judge), "opinion", lambda *_: opinion)

    def regions(self, cached, given):
        rows = 1 + int((cached["region_labels"] > 0).sum())
        wanted = [apart] + (rows - 1) * [-apart]
        return np.stack([(strength == STRENGTHS).double().numpy() for strength in wanted])

    monkeypatch.setattr(type(predictor.judge), "region_opinions", regions)


@pytest.mark.parametrize("p_good", [0.05, 0.95])
def test_a_photo_that_the_judge_finds_good_stays_as_it_is(p_good, predictor, monkeypatch):
    judged(monkeypatch, predictor, p_good, 1.0)
    photo = picture(64, 96, 3)
    assert np.array_equal(predictor.correct(photo), photo) == (p_good > 0.5)


def test_a_photo_that_is_judged_good_meets_neither_the_network_nor_are_its_regions_looked_at(
    predictor, monkeypatch
):
    photo = dark(64, 96, 3, dtype=np.uint16)

    def forbidden(*_):
        raise AssertionError

    monkeypatch.setattr(type(predictor.network), "correction_of", forbidden)
    monkeypatch.setattr(type(predictor.clip), "embed_regions", forbidden)
    judged(monkeypatch, predictor, 0.9, 1.0)
    corrected = predictor.correct(photo)
    assert np.array_equal(corrected, photo) and corrected is not photo
    judged(monkeypatch, predictor, 0.0, 1.0)
    with pytest.raises(AssertionError):
        predictor.correct(photo)


@pytest.mark.parametrize("strength", [0.0, 0.2])
@pytest.mark.parametrize(("apart", "corrected"), [(0.1, False), (0.8, True)])
def test_a_photo_of_which_an_object_is_far_off_is_not_good(
    apart, corrected, strength, predictor, monkeypatch
):
    judged(monkeypatch, predictor, 0.8, strength, apart)
    photo = dark(96, 128, 3)
    photo[:, 80:] += 90
    assert np.array_equal(predictor.correct(photo), photo) != corrected


@pytest.mark.parametrize("strength", [-1.0, 0.5])
def test_the_judge_decides_how_bright_the_output_is(strength, predictor, monkeypatch):
    judged(monkeypatch, predictor, 0.0, strength)
    photo = picture(96, 128, 3)
    wanted = tone.apply("film", to_float(photo), strength)
    given = to_float(predictor.correct(photo))
    assert float(luma(given).mean()) == pytest.approx(float(luma(wanted).mean()), abs=0.03)


@pytest.mark.parametrize(("p_good", "moves"), [(0.0, True), (0.695, False)])
def test_regions_are_set_apart_as_far_as_the_judge_says_unless_the_photo_is_all_but_surely_good(
    p_good, moves, predictor, monkeypatch
):
    photo = dark(96, 128, 3)
    photo[:, 80:] += 90  # another region
    outputs = []
    for apart in (0.0, 0.2):
        judged(monkeypatch, predictor, p_good, 0.5, apart)
        outputs.append(predictor.correct(photo).astype(int))
    moved = np.abs(outputs[1] - outputs[0]).mean()
    assert (moved > 2) == moves, moved


def test_strengths_of_regions_leave_no_halo_at_an_edge_of_the_photo(predictor, monkeypatch):
    photo = np.full((72, 512, 3), 40, np.uint8)
    photo[:, 320:] = 130  # another region, its border eight pixels wide at the priors' size
    judged(monkeypatch, predictor, 0.0, 0.2, 0.4)
    row = predictor.correct(photo)[36, :, 1].astype(int)
    assert row[250] - row[319] < 18 and row[320] - row[390] < 25
    assert row[250] > 60 and row[390] < 110  # as the judge says


def test_a_picture_on_white_follows_the_curve_alone(predictor, monkeypatch):
    photo = np.full((96, 128, 3), 252, np.uint8)
    photo[30:70, 40:90] = (90, 60, 40)
    judged(monkeypatch, predictor, 0.0, -0.3, 0.8)
    curve = tone.on_bytes("film", photo, -0.3).astype(int)
    assert np.abs(predictor.correct(photo) - curve).max() <= 1
    judged(monkeypatch, predictor, 0.6, 0.0, 0.8)
    assert predictor.predict(photo) is None  # its regions are not asked
    judged(monkeypatch, predictor, 0.0, -0.3, 0.8)
    photo[80:] = 40  # a dark ground: nothing on white
    curve = tone.on_bytes("film", photo, -0.3).astype(int)
    assert np.abs(predictor.correct(photo) - curve).max() > 20


def test_strength_0_is_a_copy_of_every_bit_and_half_lies_between(predictor, monkeypatch):
    judged(monkeypatch, predictor, 0.0, 1.0)
    photo = dark(80, 72, 3, dtype=np.uint16)
    still, half, full = (predictor.correct(photo, strength) for strength in (0, 0.5, 1))
    assert np.array_equal(still, photo) and still is not photo
    assert photo.mean() * 1.05 < half.mean() < full.mean() * 0.95


def test_one_photo_may_be_a_path_a_pil_image_or_an_array(predictor, tmp_path):
    pixels = dark(48, 64, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = predictor.correct(pixels)
    ways = (pixels, Image.fromarray(pixels), tmp_path / "a.png", str(tmp_path / "a.png"))
    for photo in ways:
        found = evenlight.correct(photo, predictor=predictor)
        assert found.dtype == np.uint8 and np.array_equal(found, expected), photo
    assert not np.array_equal(expected, pixels)
    assert np.array_equal(evenlight.correct(pixels, strength=0, predictor=predictor), pixels)


def test_files_and_pil_images_are_turned_upright(predictor, tmp_path):
    pixels = dark(48, 64, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif(6))
    with Image.open(tmp_path / "a.png") as image:
        from_image = evenlight.correct(image, predictor=predictor)
    assert from_image.shape == (64, 48, 3)
    assert np.array_equal(from_image, evenlight.correct(tmp_path / "a.png", predictor=predictor))


def test_sixteen_bits_stay_sixteen(predictor):
    deep = dark(48, 64, 3, dtype=np.uint16)
    assert evenlight.correct(deep, predictor=predictor).dtype == np.uint16


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_stays_gray_though_the_corrector_tints(dtype, predictor):
    gray = dark(48, 64, dtype=dtype)
    for photo in (gray, Image.fromarray(gray)):
        found = evenlight.correct(photo, predictor=predictor)
        assert found.shape == (48, 64, 3) and found.dtype == dtype
        assert np.ptp(found, axis=2).max() == 0 and found.mean() > gray.mean()


@pytest.mark.parametrize(
    ("photo", "words"),
    [
        (np.zeros((48, 64, 4), np.uint8), r"H,W,3 or H,W, got uint8 of shape \(48, 64, 4\)"),
        (np.zeros((48, 64, 3), np.float32), "uint8 or uint16 of shape"),
        (np.zeros((48, 15, 3), np.uint8), "at least 16 pixels a side"),
        (np.zeros(48, np.uint8), "of shape"),
        (io.BytesIO(), "a path, a PIL image or an array, got BytesIO"),
    ],
)
def test_what_is_no_photo_is_refused_in_words(photo, words, predictor):
    with pytest.raises(UsageError, match=words):
        evenlight.correct(photo, predictor=predictor)


def test_a_file_that_cannot_be_read_is_refused_and_strengths_beyond_one_are(predictor, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>" * 20)
    with pytest.raises(PhotoError):
        evenlight.correct(tmp_path / "page.jpg", predictor=predictor)
    with pytest.raises(EvenlightError, match="No such file"):
        evenlight.correct(tmp_path / "none.jpg", predictor=predictor)
    with pytest.raises(UsageError, match="0 to 1"):
        evenlight.correct(dark(48, 64, 3), strength=1.6, predictor=predictor)


def test_the_shipped_corrector_is_loaded_once(model, monkeypatch):
    loads = []
    real = load_predictor

    def load(*arguments, **options):
        loads.append(arguments)
        return real(model)

    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)
    monkeypatch.setattr("evenlight.pipeline.correct_photo.load_predictor", load)
    evenlight.correct.__globals__["predictor_of"].cache_clear()
    try:
        first, second = (evenlight.correct(dark(48, 64, 3)) for _ in range(2))
    finally:
        evenlight.correct.__globals__["predictor_of"].cache_clear()
    assert len(loads) == 1 and np.array_equal(first, second)
