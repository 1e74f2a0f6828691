"""The act: a photo is judged and corrected to a mean luma; what may be handed in as a photo."""

import io

import numpy as np
import pytest
import torch
from photo_makers import exif, picture
from PIL import Image
from toy_corrector import save_toy_corrector, toy_models

import evenlight
from evenlight.cache.errors import EvenlightError, PhotoError, UsageError
from evenlight.pipeline.load import load_predictor
from evenlight.stages.corrector.network import MAX_STRENGTH
from evenlight.stages.corrector.predictor import FULL_SHIFT, MAX_SHIFT, Verdict, meet_luma
from evenlight.stages.pixels import luma, to_bytes, to_float
from evenlight.stages.priors import tone
from evenlight.stages.priors.prompts import Scorer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_toy_corrector(tmp_path_factory.mktemp("model"))


@pytest.fixture
def predictor(model, monkeypatch):
    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)
    return load_predictor(model)


def dark(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return picture(*shape, dtype=dtype) // 4


@pytest.mark.parametrize("sure", [0.05, 0.95])
def test_a_photo_that_clip_surely_finds_good_stays_as_it_is(sure, predictor, monkeypatch):
    logits = torch.log(torch.tensor([[(1 - sure) / 2, sure, (1 - sure) / 2]]))
    monkeypatch.setattr(Scorer, "logits", lambda self, embeddings: logits)
    photo = to_bytes(tone.apply("film", to_float(picture(64, 96, 3)), 0.2)).numpy()
    assert np.array_equal(predictor.correct(photo), photo) == (sure > 0.7)
    night = to_bytes(tone.apply("film", to_float(picture(64, 96, 3)), -2.0)).numpy()
    assert not np.array_equal(predictor.correct(night), night)  # the meter contradicts


def test_a_photo_that_is_judged_good_meets_neither_segmenter_nor_network(predictor, monkeypatch):
    photo = dark(64, 96, 3, dtype=np.uint16)

    def forbidden(*_):
        raise AssertionError

    kind = type(predictor)
    monkeypatch.setattr(kind, "judge", lambda self, photo: Verdict(is_good=True, mean_luma=0.5))
    monkeypatch.setattr(type(predictor.segmenter), "features", forbidden)
    corrected = predictor.correct(photo)
    assert np.array_equal(corrected, photo) and corrected is not photo
    monkeypatch.setattr(kind, "judge", lambda self, photo: Verdict(is_good=False, mean_luma=0.5))
    with pytest.raises(AssertionError):
        predictor.correct(photo)


@pytest.mark.parametrize("wanted", [0.3, 0.5])
def test_the_verdict_decides_the_mean_luma_of_the_output(wanted, predictor, monkeypatch):
    verdict = Verdict(is_good=False, mean_luma=wanted)
    monkeypatch.setattr(type(predictor), "judge", lambda self, photo: verdict)
    corrected = predictor.correct(dark(96, 128, 3))
    assert float(luma(to_float(corrected)).mean()) == pytest.approx(wanted, abs=0.03)


def test_strength_0_is_a_copy_of_every_bit_and_half_lies_between(predictor):
    photo = dark(80, 72, 3, dtype=np.uint16)
    still, half, full = (predictor.correct(photo, strength) for strength in (0, 0.5, 1))
    assert np.array_equal(still, photo) and still is not photo
    assert photo.mean() * 1.05 < half.mean() < full.mean() * 0.95


def test_the_output_meets_the_luma_wanted_where_the_network_corrects():
    rgb = to_float(picture(64, 96, 3)) * 0.3
    strength, residual = torch.full_like(rgb, 0.6), torch.zeros_like(rgb)
    strength[..., :48] += 0.2
    met = meet_luma(rgb, strength, residual, "film", target=0.45)
    shift = met - strength
    assert float(shift.max() - shift.min()) < 1e-5  # as a whole: space stays the network's
    output = tone.apply("film", rgb, met)
    assert abs(float(luma(output).mean()) - 0.45) < 0.005


@pytest.mark.parametrize("mean", [0.0, 0.05, -0.2])
def test_where_the_network_hardly_corrects_brightness_hardly_shifts(mean):
    rgb = to_float(picture(64, 96, 3)) * 0.3
    strength, residual = torch.full_like(rgb, mean), torch.zeros_like(rgb)
    shift = float((meet_luma(rgb, strength, residual, "film", 0.45) - strength).mean())
    assert 0 <= shift <= MAX_SHIFT * abs(mean) / FULL_SHIFT + 1e-6
    assert (shift > 0) == (mean != 0)


def test_a_nearly_black_photo_is_not_pushed_past_the_largest_strength():
    rgb = to_float(picture(64, 96, 3)) * 0.01
    strength = torch.full_like(rgb, 1.9)
    met = meet_luma(rgb, strength, torch.zeros_like(rgb), "film", target=0.45)
    assert float(met.mean()) > 2 and float(met.max()) <= MAX_STRENGTH + 1e-6


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
        evenlight.correct(dark(48, 64, 3), strength=1.5, predictor=predictor)


def test_the_shipped_corrector_is_loaded_once(model, monkeypatch):
    loads = []
    real = load_predictor

    def load(*arguments, **options):
        loads.append(arguments)
        return real(model)

    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)
    monkeypatch.setattr("evenlight.pipeline.correct.load_predictor", load)
    evenlight.correct.__globals__["_shipped_predictor"].cache_clear()
    try:
        first, second = (evenlight.correct(dark(48, 64, 3)) for _ in range(2))
    finally:
        evenlight.correct.__globals__["_shipped_predictor"].cache_clear()
    assert len(loads) == 1 and np.array_equal(first, second)
