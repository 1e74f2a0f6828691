"""Photos of any aspect pass, and what goes wrong with one photo is a row that names it."""

import numpy as np
import pytest
import torch
from PIL import Image
from toy_corrector import save_toy_corrector, toy_models
from toys import ToyClip, ToySegmenter, write_photos

from evenlight.cache.errors import EnvironmentLacks
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.correct import correct_files
from evenlight.pipeline.models import Models
from evenlight.pipeline.parts import ARRAY
from evenlight.pipeline.precompute import precompute, regenerate

SHORT = 16  # pixels, the least that is read
SIDES = [(SHORT, SHORT * ratio) for ratio in range(1, 31, 2)]
SHAPES = sorted({*SIDES, *((w, h) for h, w in SIDES), (45, 1000), (1000, 45)})
EXTREME = [(480, 16), (16, 480), (45, 1000), (368, 16)]


def write_shapes(folder, shapes):
    """A photo of each shape: dark, a ramp along both sides, tinted so that channels differ."""
    folder.mkdir()
    for height, width in shapes:
        ramp = np.linspace(10, 90, height)[:, None] + np.linspace(0, 60, width)[None]
        pixels = np.stack([ramp, ramp * 0.8, ramp * 0.6], 2).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{height}x{width}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("aspects") / "photos", SHAPES)


@pytest.mark.parametrize("size", [128, 256, 512])
def test_every_aspect_comes_through_precompute_with_its_maps_where_it_lies(photos, size, tmp_path):
    settings = config.build(overrides=[f"photo.size={size}", "ladder.regions=2"])
    models = Models(ToySegmenter(), ToyClip())
    report = precompute(photos, tmp_path / "S", settings=settings, models=models)
    assert (report.photos, report.failed) == (len(SHAPES), [])
    with Store.open(tmp_path / "S") as store:
        assert store.verify() == []
        for slot in store.slots("pseudo_gt"):
            row = {name: store.rows(name, [slot])[0] for name in ("extent", "photo", "regions")}
            height, width = (int(side) for side in row["extent"])
            assert max(height, width) == size
            labels = row["regions"]
            assert labels[:height, :width].all() and not labels[height:].any()
            assert not labels[:, width:].any()
            expected = ToySegmenter().features(as_float(row["photo"][:height, :width]))
            for name, stride, whole in zip(("proto", "p3"), (4, 8), expected, strict=False):
                found = store.rows(name, [slot])[0]
                inside = found[:, : height // stride, : width // stride]
                assert inside.shape == whole[0].shape
                assert np.count_nonzero(found) == np.count_nonzero(inside) > 0


def as_float(photo):
    return torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("size", [128, 256, 512])
def test_every_aspect_comes_through_correct(photos, size, tmp_path, monkeypatch):
    monkeypatch.setattr("evenlight.pipeline.load.load_models", toy_models)
    model = save_toy_corrector(tmp_path / "model", size=size)
    report = correct_files([photos], tmp_path / "out", model=model)
    assert (len(report.corrected), report.failed) == (len(SHAPES), [])
    for height, width in SHAPES:
        after = Image.open(tmp_path / "out" / f"{height}x{width}.png")
        before = Image.open(photos / f"{height}x{width}.png")
        assert after.size == before.size
        assert np.asarray(after).mean() > np.asarray(before).mean()


def test_extreme_aspects_come_through_the_shipped_priors_and_corrector(tmp_path):
    photos = write_shapes(tmp_path / "photos", EXTREME)
    settings = config.build(overrides=["photo.size=128", "run.unit_size=4"])
    report = precompute(photos, tmp_path / "S", settings=settings)
    assert (report.photos, report.failed) == (len(EXTREME), [])
    corrected = correct_files([photos], tmp_path / "out")
    assert (len(corrected.corrected), corrected.failed) == (len(EXTREME), [])


# One photo's error


SETTINGS = config.build(overrides=["photo.size=64", "run.unit_size=2", "ladder.regions=3"])
NAMES = [f"photo_{number:03}.png" for number in range(4)]


class Stumbles(ToySegmenter):
    """Raises at the n-th photo it sees."""

    def __init__(self, error: Exception, at: int = 2) -> None:
        super().__init__()
        self.error, self.at = error, at

    def segment(self, photo_HW3):
        result = super().segment(photo_HW3)
        if self.photos == self.at:
            raise self.error
        return result


@pytest.fixture
def four(tmp_path):
    write_photos(tmp_path / "four", 4)
    return tmp_path / "four"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("could not broadcast"), "ValueError: could not broadcast"),
        (RuntimeError("size of\n  tensor " + "x" * 900), "RuntimeError: size of tensor x"),
        (MemoryError(), "more memory than there is"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    ],
)
def test_an_error_in_one_photo_is_a_row_and_the_rest_is_made(error, said, four, tmp_path):
    models = Models(Stumbles(error), ToyClip())
    report = precompute(four, tmp_path / "S", settings=SETTINGS, models=models)
    ((name, reason),) = report.failed
    assert name == NAMES[1] and said in reason and len(reason) < 400
    assert report.units_made == 2
    with Store.open(tmp_path / "S") as store:
        assert store.slots("photo") == store.slots("pseudo_gt") == [0, 2, 3]
        assert store.record(0).photos[1].part == "regions"
        assert not store.rows("clip_photo", [1]).any()
        assert store.verify() == []


def test_a_photo_that_failed_in_a_part_is_tried_again_when_that_part_is_remade(four, tmp_path):
    models = Models(Stumbles(RuntimeError("once")), ToyClip())
    precompute(four, tmp_path / "S", settings=SETTINGS, models=models)
    other = Models(ToySegmenter(1), ToyClip())
    report = precompute(four, tmp_path / "S", settings=SETTINGS, models=other)
    assert report.failed == [] and "photo" not in report.parts_made
    precompute(four, tmp_path / "fresh", settings=SETTINGS, models=other)
    with Store.open(tmp_path / "S") as one, Store.open(tmp_path / "fresh") as fresh:
        assert one.digest() == fresh.digest()


def test_a_photo_without_regions_stays_without_pseudo_gt_when_that_is_regenerated(four, tmp_path):
    models = Models(Stumbles(RuntimeError("once")), ToyClip())
    precompute(four, tmp_path / "S", settings=SETTINGS, models=models)
    grid = config.build(overrides=["pseudo_gt.search=grid"], base=config.to_dict(SETTINGS))
    report = regenerate(tmp_path / "S", settings=grid)
    assert report.units_made == 2 and [name for name, _ in report.failed] == [NAMES[1]]


class Spoiled:
    """Of a toy's method: one number of one answer is not finite."""

    def __init__(self, method, value: float, call: int) -> None:
        self.method, self.value, self.call, self.calls = method, value, call, 0

    def __call__(self, *arguments):
        self.calls += 1
        answer = self.method(*arguments)
        if self.calls == self.call:
            numbers = answer.p3 if hasattr(answer, "p3") else answer
            numbers.reshape(-1)[1] = self.value
        return answer


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("model", ["segmenter", "clip"])
def test_numbers_that_are_not_finite_stay_out_of_the_store(model, value, four, tmp_path):
    models = Models(ToySegmenter(), ToyClip())
    if model == "segmenter":
        models.segmenter.segment = Spoiled(models.segmenter.segment, value, 2)
    else:
        models.clip.embed = Spoiled(models.clip.embed, value, 2)
    report = precompute(four, tmp_path / "S", settings=SETTINGS, models=models)
    assert [name for name, _ in report.failed] == [NAMES[1]]
    assert "NaN or infinity" in report.failed[0][1]
    with Store.open(tmp_path / "S") as store:
        for name in ARRAY:
            assert np.isfinite(store.rows(name, range(4))).all(), name


def test_an_error_that_every_photo_would_meet_ends_the_run(four, tmp_path):
    models = Models(Stumbles(EnvironmentLacks("weights are damaged")), ToyClip())
    with pytest.raises(EnvironmentLacks, match="weights are damaged"):
        precompute(four, tmp_path / "S", settings=SETTINGS, models=models)


def test_an_error_in_one_photo_is_a_row_of_correct(four, tmp_path, monkeypatch):
    stumbling = Models(ToySegmenter(), ToyClip())
    calls = []

    def features(rgb):
        calls.append(rgb)
        if len(calls) == 2:
            raise RuntimeError("size of tensor")
        return ToySegmenter().features(rgb)

    stumbling.segmenter.features = features
    monkeypatch.setattr("evenlight.pipeline.load.load_models", lambda settings: stumbling)
    dark = write_shapes(tmp_path / "dark", [(40, 60), (60, 40), (60, 60)])
    model = save_toy_corrector(tmp_path / "model")
    report = correct_files([dark], tmp_path / "out", model=model)
    assert report.failed == [("60x40.png", "RuntimeError: size of tensor")]
    assert report.corrected == ["40x60.png", "60x60.png"]
