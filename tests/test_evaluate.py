"""Evaluation: figures against known values, every layout, honest tables."""

import csv
import io
import json
from pathlib import Path
from statistics import fmean

import cv2
import numpy as np
import pytest
import torch
import torchvision
from photo_makers import picture
from PIL import Image
from toy_corrector import run_cli, save_toy_corrector, toy_models

from evenlight.cache.errors import StoreError, UsageError
from evenlight.pipeline.evaluate import evaluate, open_case
from evenlight.stages.evaluation import metrics
from evenlight.stages.evaluation.baselines import (
    BASELINES,
    ORACLES,
    SEARCH,
    best_curve,
    clahe,
    film_rule,
)
from evenlight.stages.evaluation.sets import exposure_fusion, list_cases
from evenlight.stages.pixels import luma, to_bytes, to_float
from evenlight.stages.priors import tone

# name -> files of one good folder: (path, side)
LAYOUTS = {
    "pairs": {
        "input/a.png": "", "input/b.jpg": "", "reference/a.jpg": None, "reference/b.png": None,
    },
    "triplets": {
        "one/under.png": "under", "one/over.png": "over", "one/ref.png": None,
        "two/over.jpg": "over", "two/ref.png": None,
    },
    "msec": {
        f"testing/INPUT_IMAGES/a1-x_{end}.JPG": side
        for end, side in (
            ("N1.5", "under"), ("N1", "under"), ("0", "over"), ("P1", "over"), ("P1.5", "over"),
        )
    } | {"testing/expert_c_testing_set/a1-x.jpg": None},
    "sice": {"low/7.png": "under", "over/7.png": "over", "mid/7.png": None},
    "lcdp": {"input/a.png": "", "gt/a.png": None},
    "scenes": {
        "input/a__1.png": "", "input/a__two.jpg": "", "input/b_c__x__y.png": "",
        "target/a.jpg": None, "target/b_c__x.png": None,
    },
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("toys")


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def scene(strength: float, seed: int = 0, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """One picture re-exposed by the film curve."""
    rgb = to_float(picture(*size, 3, seed=seed))
    return to_bytes(tone.apply("film", rgb, strength)).numpy()


def measured(output: np.ndarray, reference: np.ndarray) -> metrics.Figures:
    return metrics.measure(output, output, reference)


def write_triplets(root: Path, count: int = 2) -> Path:
    for seed in range(count):
        for name, strength in (("under", -1.2), ("ref", 0.0), ("over", 0.9)):
            write(root / f"scene{seed}/{name}.png", scene(strength, seed))
    return root


def test_photos_without_a_reference_get_no_figure_that_needs_one(model, tmp_path):
    photos = {"dark.png": scene(-1.0), "b.jpg": scene(-1.5, seed=1)}
    for name, pixels in photos.items():
        write(tmp_path / name, pixels)
    found = evaluate([model], [f"unpaired:{tmp_path}"])
    methods = [row.method for row in found.rows]
    assert methods == [*BASELINES, *methods_of(model)]
    for row in found.rows:
        assert (row.side, row.photos) == ("all", 2)
        assert np.isnan([row.psnr, row.ssim, row.colour, row.gain_psnr, row.agreement]).all()
        assert row.luma is not None
    identity, rule = found.rows[:2]
    assert identity.change == 0 < rule.change
    assert identity.luma < rule.luma == pytest.approx(119, abs=3)
    assert [row["psnr"] for row in csv.DictReader(io.StringIO(found.to_csv()))] == [""] * 7
    (line,) = (line for line in found.to_text().splitlines() if line.startswith("film rule"))
    assert line.split()[4:8] == ["-"] * 4 and f"{rule.luma:.1f}" in line.split()
    assert "nan" not in found.to_text() + found.to_csv()


def test_the_digest_of_an_unpaired_set_follows_its_photos(tmp_path):
    digests = []
    for strength in (-1.0, -1.01):
        write(tmp_path / "a.png", scene(strength))
        digests += evaluate([], [f"unpaired:{tmp_path}"]).sets.values()
    assert len(set(digests)) == 2


@pytest.mark.parametrize("layout", ["good", "unpaired", "reexposed", "fusion"])
def test_a_set_without_photos_is_refused(layout, tmp_path):
    (tmp_path / "readme.txt").write_text("not a photo")
    with pytest.raises(UsageError, match=f"holds no photo: the layout '{layout}' is"):
        list_cases(layout, tmp_path)


def test_well_exposed_photos_are_their_own_reference(tmp_path):
    for seed in range(2):
        write(tmp_path / f"{seed}.png", scene(0.0, seed))
    rows = {row.method: row for row in evaluate([], [f"good:{tmp_path}"]).rows}
    assert rows["identity"].change == 0 and rows["identity"].psnr == 100
    assert rows["film rule"].change > 0
    assert np.isnan(rows["identity"].agreement)


def test_photos_are_re_exposed_by_five_evs_around_their_reference(tmp_path):
    write(tmp_path / "a.png", scene(0.0))
    rows = evaluate([], [f"reexposed:{tmp_path}"]).rows
    counts = {row.side: row.photos for row in rows if row.method == "identity"}
    assert counts == {"under": 2, "over": 2, "all": 5}
    (identity,) = (row for row in rows if row.method == "identity" and row.side == "all")
    (rule,) = (row for row in rows if row.method == "film rule" and row.side == "all")
    assert identity.agreement < rule.agreement


def test_the_fusion_of_a_pair_is_the_reference_of_both(tmp_path):
    pair = [scene(-1.0), scene(1.0)]
    for name, pixels in zip(("under", "over"), pair, strict=True):
        write(tmp_path / f"one/{name}.png", pixels)
    fused = exposure_fusion(pair)
    assert np.array_equal(fused, exposure_fusion(pair[::-1]))
    assert pair[0].mean() < fused.mean() < pair[1].mean()
    rows = evaluate([], [f"fusion:{tmp_path}"]).rows
    (row,) = (row for row in rows if row.method == "identity" and row.side == "under")
    assert row.psnr == pytest.approx(measured(pair[0], fused).psnr)


def write_scenes(root: Path) -> Path:
    """Two photos of a scene whose target is right in the left half alone, one of another."""
    target = scene(0.0)
    target[:, 32:] = 0
    write(root / "target/a.png", target)
    write(root / "target/b.png", scene(0.0, seed=1))
    for name, strength, seed in (("a__dark", -0.3, 0), ("a__right", 0.0, 0), ("b__1", 0.5, 1)):
        write(root / f"input/{name}.png", scene(strength, seed))
    return root


def test_scenes_are_scored_where_their_mask_is_not_black(tmp_path):
    def identity(method: str = "identity", side: str = "over"):
        rows = evaluate([], [f"scenes:{root}"]).rows
        return next(row for row in rows if (row.method, row.side) == (method, side))

    root = write_scenes(tmp_path)
    without = identity()
    mask = np.zeros((48, 64, 3), np.uint8)
    mask[:, :32, 2] = 1  # anything but black counts
    write(root / "mask/a.png", mask)
    masked = identity()
    assert without.photos == 3  # against a half black target both photos of a are too bright
    assert masked.photos == 2 and masked.psnr > without.psnr + 10
    everywhere = identity(side="all")
    assert everywhere.photos == 3
    left = [scene(strength)[:, :32] for strength in (-0.3, 0.0)]
    assert everywhere.agreement == pytest.approx(metrics.agreement(left))
    assert masked.change == 0
    oracle = identity("best gamma (answer in hand)", "under")
    alone = best_curve("gamma", left[0], left[1])
    assert oracle.psnr == pytest.approx(measured(alone, left[1]).psnr)


def test_the_digest_of_scenes_follows_their_masks(tmp_path):
    digests = []
    for value in (255, 254):
        write(write_scenes(tmp_path) / "mask/a.png", np.full((48, 64), value, np.uint8))
        digests += evaluate([], [f"scenes:{tmp_path}"]).sets.values()
    assert len(set(digests)) == 2


@pytest.mark.parametrize(
    ("name", "mask", "words"),
    [
        ("a.png", np.zeros((48, 64), np.uint8), "a.png is all black: nothing of .*would be scored"),
        ("a.png", np.ones((48, 63), np.uint8), "is 64x48 and its mask 63x48: sizes must agree"),
        ("c.png", np.ones((48, 64), np.uint8), "c.png is of no scene in .*the layout 'scenes' is"),
        ("a.jpg", np.ones((48, 64), np.uint8), "a.jpg is no PNG"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(name, mask, words, tmp_path):
    write(write_scenes(tmp_path) / "mask" / name, mask)
    with pytest.raises(UsageError, match=words):
        evaluate([], [f"scenes:{tmp_path}"])


@pytest.mark.parametrize("family", ["gamma", "film"])
def test_the_best_curve_is_the_best_of_all_it_searches(family):
    photo, reference = scene(-0.9), scene(0.0)
    best = measured(best_curve(family, photo, reference), reference).psnr
    for t in SEARCH:
        other = to_bytes(tone.apply(family, to_float(photo), float(t))).numpy()
        assert measured(other, reference).psnr <= best + 1e-4
    assert best > measured(photo, reference).psnr + 3
    assert np.array_equal(best_curve(family, reference, reference), reference)


def test_clahe_spreads_lightness_and_keeps_hue():
    dull = (100 + 0.2 * scene(0.0).astype(float)).astype(np.uint8)
    spread = clahe(dull)
    assert spread.dtype == np.uint8 and spread.std() > 1.3 * dull.std()
    grey = np.full((64, 64, 3), 90, np.uint8)
    grey[:, 32:] = 110
    assert np.ptp(clahe(grey).astype(int), axis=2).max() <= 2


def write_objects(root: Path) -> np.ndarray:
    """One photo of three objects, the middle one a third of it."""
    photo = scene(0.0, size=(60, 90))
    objects = np.zeros((60, 90, 3), np.uint8)
    objects[:, 20:50], objects[:10] = 7, (0, 0, 255)
    for folder, pixels in (("photo", photo), ("objects", objects)):
        (root / folder).mkdir(parents=True)
        write(root / folder / "a.png", pixels)
    return photo


def test_one_object_of_a_set_of_uneven_photos_is_exposed_otherwise(tmp_path):
    good = write_objects(tmp_path)
    (case,) = list_cases("uneven", tmp_path)
    opened = open_case(case)
    assert np.array_equal(opened.reference, good)
    differs = np.abs(opened.photo.astype(int) - good).max(2) > 2
    assert differs[14:, 26:44].mean() > 0.9 and not differs[:, 56:].any() and not differs[:5].any()
    assert np.array_equal(open_case(case).photo, opened.photo)
    (tmp_path / "objects/a.png").unlink()
    with pytest.raises(UsageError, match=r"a\.png has no objects in"):
        list_cases("uneven", tmp_path)


def test_clipped_photos_lose_their_lights_alike_at_every_reading(tmp_path):
    good = scene(0.4, size=(61, 83))
    write(tmp_path / "a.png", good)
    (case,) = list_cases("clipped", tmp_path)
    opened = open_case(case)
    assert opened.photo.shape == good.shape and case.side == "over"
    blown = (opened.photo >= 254).mean()
    assert blown > (good >= 254).mean() + 0.1 and opened.photo.mean() > good.mean() + 20
    assert np.array_equal(open_case(case).photo, opened.photo)


def test_lpips_is_told_where_alexnet_is_and_else_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    photo, other = scene(0.0, size=(80, 96)), scene(-1.0, size=(80, 96))
    assert np.isnan(measured(photo, other).lpips)
    write_triplets(tmp_path / "set")
    text = evaluate([], [f"triplets:{tmp_path / 'set'}"]).to_text()
    assert f"LPIPS is not available: it needs AlexNet's weights, {tmp_path}/checkpoints/" in text
    assert "\nNIQE and BRISQUE are not available: libraries that run on this NumPy fetch" in text
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    state = torchvision.models.alexnet().state_dict()
    torch.save(state, tmp_path / "checkpoints/alexnet-owt-7be5be79.pth")
    assert measured(photo, photo).lpips == pytest.approx(0, abs=1e-6)
    assert measured(photo, other).lpips > 0.001
    metrics._alexnet.cache_clear()


def test_the_film_rule_brings_mean_luma_to_119():
    for strength in (-1.5, 0.0, 1.0):
        ruled = film_rule(scene(strength))
        assert float(luma(to_float(ruled)).mean()) * 255 == pytest.approx(119, abs=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_found_with_its_sides(layout, tmp_path):
    for number, name in enumerate(LAYOUTS[layout]):
        write(tmp_path / name, picture(32, 40, 3, seed=number))
    (tmp_path / "readme.txt").write_text("not a photo")
    found = list_cases(layout, tmp_path)
    expected = {name: side for name, side in LAYOUTS[layout].items() if side is not None}
    assert {str(s.photo.relative_to(tmp_path)): s.side for s in found} == expected
    assert all(LAYOUTS[layout][str(s.reference.relative_to(tmp_path))] is None for s in found)
    table = evaluate([], [f"{layout}:{tmp_path}"])
    counts = {row.side: row.photos for row in table.rows if row.method == "identity"}
    assert counts["all"] == len(expected)
    assert counts["all"] == counts.get("under", 0) + counts.get("over", 0)


def test_sides_that_a_layout_does_not_say_are_measured(tmp_path):
    for name, strength in (("dark", -1.0), ("darker", -1.5), ("bright", 1.0)):
        write(tmp_path / f"input/{name}.png", scene(strength))
        write(tmp_path / f"reference/{name}.png", scene(0.0))
    rows = evaluate([], [f"pairs:{tmp_path}"]).rows
    counts = {row.side: row.photos for row in rows if row.method == "identity"}
    assert counts == {"under": 2, "over": 1, "all": 3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_in_another_layout_is_refused_in_words(layout, tmp_path):
    write(tmp_path / "somewhere/a.png", picture(32, 40, 3))
    with pytest.raises(UsageError, match=f"the layout '{layout}' is .*NAME|SCENE"):
        list_cases(layout, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_photo_without_its_reference_is_refused_and_not_left_out(layout, tmp_path):
    names = list(LAYOUTS[layout])
    for name in names:
        write(tmp_path / name, picture(32, 40, 3))
    (tmp_path / next(n for n in names if LAYOUTS[layout][n] is None)).unlink()
    with pytest.raises(UsageError, match=r"has no reference|needs ref"):
        list_cases(layout, tmp_path)


def test_bad_arguments_are_refused_in_words(tmp_path):
    write(tmp_path / "input/a.png", picture(32, 40, 3))
    write(tmp_path / "reference/a.png", picture(32, 41, 3))
    for data, words in (
        ("nonsense", "LAYOUT:PATH"),
        ("square:/tmp", "unknown layout 'square'; known: pairs"),
        (f"pairs:{tmp_path / 'missing'}", "is not a folder"),
        (f"pairs:{tmp_path}", "40x32 and its reference 41x32: sizes must agree"),
    ):
        with pytest.raises(UsageError, match=words):
            evaluate([], [data])
    write(tmp_path / "input/a.jpg", picture(32, 40, 3))
    with pytest.raises(UsageError, match=r"a\.jpg and a\.png have one name"):
        evaluate([], [f"pairs:{tmp_path}"])


def test_a_damaged_photo_ends_it_by_name(tmp_path):
    root = write_triplets(tmp_path)
    path = root / "scene0/over.png"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UsageError, match=r"scene0/over\.png: .*truncated"):
        evaluate([], [f"triplets:{root}"])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two models on two sets."""
    folder = tmp_path_factory.mktemp("table")
    first, second = save_toy_corrector(folder / "A"), save_toy_corrector(folder / "B")
    triplets = write_triplets(folder / "triplets")
    write(folder / "pairs/input/a.png", scene(-1.0, seed=9))
    write(folder / "pairs/reference/a.png", scene(0.0, seed=9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evenlight.pipeline.load.load_models", toy_models)
        return evaluate([first, second], [f"triplets:{triplets}", f"pairs:{folder / 'pairs'}"])


def test_every_model_and_baseline_is_in_the_table_of_every_set(table):
    assert len(table.sets) == 2
    for name in table.sets:
        methods = [row.method for row in table.rows if row.data == name and row.side == "all"]
        assert methods[:5] == [*BASELINES, *ORACLES] == [
            "identity", "film rule", "CLAHE",
            "best gamma (answer in hand)", "best film (answer in hand)",
        ]  # fmt: skip
        one, other = methods[5:9], methods[9:]
        assert one == methods_of(one[2]) and other == methods_of(other[2])
        assert one[2].endswith("/A") and other[2].endswith("/B")


def methods_of(model) -> list[str]:
    """What is measured of every model: the plain curve, pseudo-GT, with good photos left alone,
    and with every photo corrected."""
    return [f"film, judge of {model}", f"pseudo-GT of {model}", str(model), f"{model} --all"]


def test_without_a_model_the_baselines_are_there(tmp_path):
    rows = evaluate([], [f"triplets:{write_triplets(tmp_path)}"]).rows
    assert {row.method for row in rows} == {*BASELINES, *ORACLES}
    assert len(rows) == 3 * len({*BASELINES, *ORACLES})


def test_all_is_the_mean_over_photos_and_oracles_beat_identity(table):
    (name, *_) = table.sets
    rows = {(row.method, row.side): row for row in table.rows if row.data == name}
    for method in {method for method, _ in rows}:
        under, over, every = (rows[method, side] for side in ("under", "over", "all"))
        assert every.photos == under.photos + over.photos == 4
        assert every.psnr == pytest.approx(fmean([under.psnr, over.psnr]))
    gamma, identity = rows["best gamma (answer in hand)", "all"], rows["identity", "all"]
    assert gamma.psnr > identity.psnr + 1


def as_text(row: dict[str, object]) -> dict[str, str]:
    return {key: "" if value is None else str(value) for key, value in row.items()}


def test_csv_json_and_text_say_the_same_as_the_rows(table, tmp_path, monkeypatch, capsys):
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [as_text(row.plain()) for row in table.rows] == read
    text = table.to_text()
    assert all(f"{row.psnr:.2f}" in text and row.method in text for row in table.rows)
    assert all(f"{row.luma:.1f}" in text for row in table.rows)
    assert table.protocol in text and all(d[:12] in text for d in table.sets.values())

    root = write_triplets(tmp_path / "set")
    arguments = ("evaluate", "--data", f"triplets:{root}", "--csv", tmp_path / "rows.csv")
    assert run_cli(monkeypatch, *arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [as_text(row) for row in document["rows"]] == rows
    assert document["protocol"] == table.protocol


def test_a_csv_that_cannot_be_written_is_found_out_before_the_work(tmp_path, monkeypatch, capsys):
    root = write_triplets(tmp_path / "set")
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.setattr("evenlight.pipeline.evaluate.open_case", None)
    arguments = ("evaluate", "--data", f"triplets:{root}", "--csv")
    for name, said in [("folder.csv", "it is a folder"), ("none/rows.csv", "No such file")]:
        assert run_cli(monkeypatch, *arguments, tmp_path / name) == 2
        assert f"{name} cannot be written: {said}" in capsys.readouterr().err

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    assert run_cli(monkeypatch, *arguments, tmp_path / "rows.csv") == 2
    assert "No space left" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv", "set"]


def test_the_table_is_printed_though_the_csv_fails_and_written_though_printing_fails(
    tmp_path, monkeypatch, capsys
):
    root, rows = write_triplets(tmp_path / "set"), tmp_path / "rows.csv"
    arguments = ("evaluate", "--data", f"triplets:{root}", "--csv", rows)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("evenlight.cache.files.atomic_write", full)
        assert run_cli(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert "film rule" in said.out and "No space left" in said.err and not rows.exists()
    with monkeypatch.context() as patch:
        patch.setattr("typer.echo", full)
        assert run_cli(monkeypatch, *arguments) == 1
    assert "film rule" in rows.read_text()


@pytest.mark.parametrize("name", ["caf\udce9", "two\nlines", "\x1b[31mred"])
def test_names_of_any_bytes_come_out_as_one_harmless_line(name, tmp_path, monkeypatch, capsys):
    root = write_triplets(tmp_path / name)
    rows = tmp_path / "rows.csv"
    assert run_cli(monkeypatch, "evaluate", "--data", f"triplets:{root}", "--csv", rows) == 0
    printed = capsys.readouterr().out
    assert len(list(csv.DictReader(rows.open()))) == 3 * len({*BASELINES, *ORACLES})
    for text in (printed, rows.read_text()):
        assert f"{tmp_path}/" in text and "\x1b" not in text and "two\nlines" not in text
        text.encode()


def test_the_digest_of_a_set_follows_its_photos_and_not_its_place(tmp_path):
    def digest(root: Path) -> str:
        (value,) = evaluate([], [f"triplets:{root}"]).sets.values()
        return value

    root = write_triplets(tmp_path / "here")
    before = digest(root)
    assert digest(root.rename(tmp_path / "there")) == before
    root = tmp_path / "there"
    (root / "scene1/over.png").unlink()
    fewer = digest(root)
    write(root / "scene1/under.png", scene(-1.21, seed=1))
    assert len({before, fewer, digest(root)}) == 3


def test_photos_are_measured_at_their_own_size_and_depth(model, tmp_path, monkeypatch):
    sizes = []
    real = metrics.measure
    monkeypatch.setattr(
        "evenlight.pipeline.evaluate.measure",
        lambda photo, output, *rest: (
            sizes.append((output.shape, output.dtype)) or real(photo, output, *rest)
        ),
    )
    write(tmp_path / "reference/a.png", scene(0.0, size=(203, 157)))
    (tmp_path / "input").mkdir()
    deep = scene(0.0, size=(203, 157)).astype(np.uint16) * 257
    deep = np.where(deep > 0, deep - 40, 0).astype(np.uint16)  # the same once rounded to 8 bits
    (tmp_path / "input/a.png").write_bytes(cv2.imencode(".png", deep[..., ::-1])[1].tobytes())
    rows = evaluate([model], [f"pairs:{tmp_path}"]).rows
    assert rows[0].method == "identity" and rows[0].psnr == 100
    assert sizes == [((203, 157, 3), np.uint8)] * 9


def test_a_model_trained_with_other_priors_is_refused_with_exit_3(tmp_path, monkeypatch, capsys):
    other = save_toy_corrector(tmp_path / "other", segmenter=7)
    root = write_triplets(tmp_path / "set")
    with pytest.raises(StoreError, match="trained with segmenter"):
        evaluate([other], [f"triplets:{root}"])
    data = f"triplets:{root}"
    assert run_cli(monkeypatch, "evaluate", "-m", other, "--data", data) == 3
    said = capsys.readouterr()
    assert said.out == "" and "put those weights back" in said.err


def test_a_model_named_twice_is_refused(model, tmp_path):
    with pytest.raises(UsageError, match="named twice"):
        evaluate([model, model], [f"triplets:{write_triplets(tmp_path)}"])
