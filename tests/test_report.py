"""The page of `evenlight report`: what it holds, and, in a browser, what it does."""

import base64
import io
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from photo_makers import exif, picture
from PIL import Image, ImageCms
from toy_corrector import SETTINGS, run_cli, save_toy_corrector, toy_models
from toys import write_photos

from evenlight.cache.errors import UsageError
from evenlight.pipeline import config
from evenlight.pipeline.correct import correct_files
from evenlight.pipeline.evaluate import Evaluation, Row
from evenlight.pipeline.precompute import precompute
from evenlight.pipeline.report import INSIDE, report
from evenlight.pipeline.report_pictures import halves, overlays
from evenlight.stages.photos.decode import Photo
from evenlight.stages.priors.tones import STRENGTHS

ROW = dict.fromkeys((field.name for field in fields(Row)), math.nan)


pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    write_photos(folder / "photos", 5)
    small = config.build(overrides=["photo.size=64", "run.unit_size=2", "ladder.regions=3"])
    precompute(folder / "photos", folder / "S.zarr", settings=small, models=toy_models(small))
    return folder / "S.zarr"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run as training leaves it."""
    folder = save_toy_corrector(tmp_path / "run")
    (folder / "settings.toml").write_text(config.to_toml(SETTINGS))
    lines = [
        {"step": step, "loss": 1 / step, "parts": {"data": 0.5 / step}} for step in range(1, 2001)
    ]
    lines += [{"step": 9, "validation_psnr": 21.5}, {"step": "x", "loss": 1, "parts": {"data": 1}}]
    lines += [{"step": 10, "loss": math.inf, "parts": {}}, [], {"step": 11, "loss": 3}]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 12, "lo')
    return folder


def write_pairs(folder: Path, count: int, size: tuple[int, int] = (40, 60)) -> None:
    """in/N.png, and out/N.png: the first left alone, then in turn brighter and darker."""
    for name in ("in", "out"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        photo = picture(*size, 3, seed=number) // 2 + 40
        change = 0 if number == 0 else 10 * number * (-1) ** (number + 1)
        corrected = (photo.astype(int) + change).clip(0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / f"in/{number:03}.png")
        Image.fromarray(corrected).save(folder / f"out/{number:03}.png")


def data_of(page: Path) -> dict:
    text = page.read_text(encoding="ascii")
    return json.loads(re.search('application/json">(.*?)</script>', text, re.DOTALL)[1])


def addresses(data: dict) -> list[str]:
    photos = data["photos"]
    return [
        address
        for photo in photos
        for address in (photo["thumb"], *photo["photos"].values(), *photo["overlays"].values())
    ]


# What it holds


def test_a_corrected_folder_knows_what_it_was_made_from(tmp_path, monkeypatch):
    (tmp_path / "in/sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.png", "gone.png"):
        Image.fromarray(picture(40, 60, 3) // 4).save(tmp_path / "in" / name)
    model = save_toy_corrector(tmp_path / "model")
    correct_files(tmp_path / "in", tmp_path / "out", model=model, suffix="_even", format="png")
    (tmp_path / "in/gone.png").unlink()
    assert run_cli(monkeypatch, "report", tmp_path / "out") == 1
    data = data_of(tmp_path / "out.html")
    assert [photo["name"] for photo in data["photos"]] == ["a_even.png", "sub/b_even.png"]
    assert all(photo["what"] == "brightened" for photo in data["photos"])
    assert data["provenance"]["Folder"]["made from"] == str(tmp_path / "in")
    assert "No such file" in data["provenance"]["Photos that cannot be shown"]["gone_even.png"]


def test_photos_named_are_what_outputs_that_do_not_say_were_made_from(tmp_path):
    write_pairs(tmp_path, 3)
    without = report(tmp_path / "out", tmp_path / "a.html")
    assert without.photos == 0 and "name that with --photos" in without.failed[0][1]
    made = report(tmp_path / "out", photos=[tmp_path / "in"])
    assert (made.page, made.photos, made.failed) == (tmp_path / "out.html", 3, [])
    rows = data_of(made.page)["photos"]
    assert [row["what"] for row in rows] == ["left alone", "brightened", "darkened"]
    assert [row["change"] for row in rows] == [0, pytest.approx(10, 0.1), pytest.approx(20, 0.1)]
    Image.fromarray(picture(40, 50, 3)).save(tmp_path / "out/001.png")
    turned = report(tmp_path / "out", photos=[tmp_path / "in"]).failed
    assert turned == [("001.png", "it is 60x40 and what became of it 50x40")]


def test_text_ends_no_script_of_the_page(tmp_path):
    write_pairs(tmp_path, 1)
    notes = ["</script><script>alert()</script>"]
    made = report(tmp_path / "out", photos=[tmp_path / "in"], notes=notes)
    assert made.page.read_text().count("<script") == 2


def test_a_store_shows_every_photo_with_its_priors_inside_the_page(store, tmp_path):
    made = report(store, tmp_path / "page.html")
    data = data_of(made.page)
    assert made.photos == len(data["photos"]) == 5 and data["title"] == "S.zarr"
    for photo in data["photos"]:
        assert photo["photos"].keys() == {"before", "pseudo-GT"}
        assert photo["overlays"].keys() == {"regions", "strength", "confidence"}
        assert photo["size"] == photo["full"] == [48, 64]
        assert len(photo["judged"]) == len(data["strengths"]) == len(STRENGTHS)
        assert (photo["strength"] == 0) == (photo["what"] == "left alone")
    assert all(address.startswith("data:image/") for address in addresses(data))
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert data["provenance"]["Settings that are not the default"]["photo.size"] == "64"
    assert len(data["provenance"]["Store"]["digest"]) == 64


def test_many_photos_lie_in_a_folder_beside_the_page_and_old_ones_go(tmp_path):
    write_pairs(tmp_path, INSIDE + 1)
    page, beside = tmp_path / "100 %/a #1.html", tmp_path / "100 %/a #1_files"
    report(tmp_path / "out", page, photos=[tmp_path / "in"])
    data = data_of(page)
    assert {page.parent / unquote(address) for address in addresses(data)} == set(beside.iterdir())
    assert len(list(beside.iterdir())) == 3 * (INSIDE + 1) and "#" not in str(addresses(data))
    (beside / "mine.txt").touch()
    (beside / "000099-before.jpg").touch()
    report(tmp_path / "out", page, photos=[tmp_path / "in"])
    assert (beside / "mine.txt").exists() and not (beside / "000099-before.jpg").exists()


def test_pictures_keep_the_colours_of_a_photo_and_nothing_else_of_it(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (tmp_path / "out").mkdir()
    photo = Image.fromarray(picture(60, 90, 3))
    photo.save(tmp_path / "out/a.jpg", quality=95, exif=exif(1), icc_profile=profile)
    report(tmp_path / "out", photos=[tmp_path / "out"], side=64)
    row = data_of(tmp_path / "out.html")["photos"][0]
    assert row["full"] == [90, 60] and row["size"] == [64, 43]
    prefix, _, text = row["photos"]["corrected"].partition(",")
    assert prefix == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(text))) as shown:
        assert shown.size == (64, 43) and shown.info["icc_profile"] == profile
        assert not shown.getexif()


def test_a_thumbnail_is_half_before_and_half_after_at_any_depth():
    before = Photo(pixels=np.full((400, 600, 3), 50, np.uint8), bit_depth=8, format="png")
    deep = np.full((400, 600, 3), 200 * 257, np.uint16)
    thumb, difference = halves(before, Photo(pixels=deep, bit_depth=16, format="png"))
    seen = np.array(Image.open(io.BytesIO(thumb))).astype(int)
    assert seen.shape == (160, 240, 3) and difference == 150
    assert abs(seen[:, :112] - 50).max() <= 2 and abs(seen[:, 128:] - 200).max() <= 2


def test_overlays_show_each_region_and_how_far_a_strength_is_from_zero():
    t_map = np.array([[-2.2, -0.1, 0.0, 2.2]], np.float16)
    regions = np.array([[0, 1, 2, 1]], np.uint8)
    made = overlays({"regions": regions, "t_map": t_map, "confidence": t_map * 0 + 1})
    seen = {
        name: np.array(Image.open(io.BytesIO(data)).convert("RGBA"))[0].astype(int)
        for name, data in made.items()
    }
    assert seen["regions"][0, 3] == 0 and (seen["regions"][1] == seen["regions"][3]).all()
    assert (seen["regions"][1] != seen["regions"][2]).any()
    darker, _, zero, brighter = seen["strength"]
    assert darker[2] > darker[0] and brighter[0] > brighter[2]
    opacity = seen["strength"][:, 3]
    assert opacity[0] == opacity[3] == 255 > opacity[1] > 40 > 20 > zero[3]
    assert (seen["confidence"] == [255, 230, 90, 255]).all()


def test_a_run_shows_its_curves_and_photos_as_it_corrects_them(run, tmp_path):
    write_pairs(tmp_path, 2)
    made = report(run, photos=[tmp_path / "in"], notes=["a note"])
    data = data_of(made.page)
    losses, held_out = data["charts"]
    assert losses["lines"].keys() == {"loss", "data"} and losses["log"]
    assert 400 < len(losses["lines"]["loss"]) <= 500 and losses["lines"]["data"][0] == [1, 0.5]
    assert held_out["lines"] == {"PSNR": [[9, 21.5]]} and not held_out["log"]
    assert data["provenance"]["Settings that are not the default"]["network.size"] == "tiny"
    assert data["provenance"]["Fingerprints"].keys() == {"clip", "judge", "segmenter"}
    assert data["notes"] == ["a note"]
    for photo in data["photos"]:
        assert list(photo["photos"]) == ["before", "corrected", "pseudo-GT"] and photo["overlays"]


def test_an_evaluation_is_a_table_without_empty_columns_and_its_terms(store, tmp_path):
    row = Row(**ROW | {"data": "good:x", "method": "m", "side": "all", "photos": 2, "change": 1.5})
    evaluation = Evaluation(protocol="one; two", sets={"good:x": "a" * 64}, rows=[row])
    data = data_of(report(store, tmp_path / "page.html", evaluation=evaluation).page)
    rows = [["method", "side", "photos", "change"], ["m", "all", "2", "1.50"]]
    assert data["tables"] == [{"title": "good:x (digest aaaaaaaaaaaa)", "rows": rows}]
    assert data["terms"][1:] == ["one", "two"] and "answer in hand" in data["terms"][0]


def test_what_cannot_be_shown_is_refused(store, tmp_path):
    for target in (tmp_path / "nothing", tmp_path):
        with pytest.raises(UsageError, match="is no store"):
            report(target, tmp_path.parent / "page.html")
    with pytest.raises(UsageError, match="name a page outside of"):
        report(store, store / "page.html")


# What it does


def shown_in(browser, page: Path, width: int = 1200, height: int = 900):
    """Functions that run JavaScript in the page and find an element by id."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    return (
        lambda code: browser.execute_script(f"return {code}"),
        lambda name: browser.find_element("id", name),
    )


@pytest.fixture(scope="module")
def corrected(tmp_path_factory) -> Path:
    """The page of five photos of 90x60 pixels."""
    folder = tmp_path_factory.mktemp("corrected")
    write_pairs(folder, 5, (60, 90))
    return report(folder / "out", photos=[folder / "in"]).page


BEFORE_SHARE = "parseFloat(document.getElementById('after').style.clipPath.match(/ ([\\d.]+)%/)[1])"
NAMES = "[...document.querySelectorAll('#grid button')].map((one) => one.title)"


def pick(select, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(select).select_by_value(value)


def drag_by_finger(browser, stage) -> float:
    """From x = 100 to 300 across the middle of the stage; the share of it that is left of there."""
    box = stage.rect
    y = box["y"] + box["height"] / 2
    for kind, x in (("touchStart", 100), ("touchMove", 200), ("touchMove", 300), ("touchEnd", 0)):
        points = [] if kind == "touchEnd" else [{"x": x, "y": y}]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    return 100 * (300 - box["x"]) / box["width"]


def drag(browser, element, by: int) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).click_and_hold(element).move_by_offset(by, 0).release().perform()


def test_dragging_moves_the_border_between_before_and_after(browser, corrected):
    run, find = shown_in(browser, corrected)
    assert run(BEFORE_SHARE) == pytest.approx(50)
    width = run("document.getElementById('frame').clientWidth")
    assert width > 900  # as large as the window allows
    drag(browser, find("divider"), width // 4)
    assert run(BEFORE_SHARE) == pytest.approx(75, abs=0.5)
    drag(browser, find("stage"), -width // 4)  # from its middle
    assert run(BEFORE_SHARE) == pytest.approx(25, abs=0.5)
    find("slider").send_keys("\ue010")  # the key End
    assert run(BEFORE_SHARE) == 100
    find("slider").send_keys("\ue012", "\ue012", "\ue014")  # left, left, right: of the slider
    assert 97 < run(BEFORE_SHARE) < 100 and run("photo.name") == "004.png"
    assert browser.get_log("browser") == []


def test_fingers_drag_the_border_on_a_phone_and_nothing_is_cut_off(browser, corrected):
    run, find = shown_in(browser, corrected, 400, 800)
    assert run("document.documentElement.scrollWidth") == 400
    assert run("document.getElementById('frame').clientWidth") > 370
    share = drag_by_finger(browser, find("stage"))
    assert run(BEFORE_SHARE) == pytest.approx(share, abs=1)
    assert browser.get_log("browser") == []


def test_photos_are_filtered_sorted_and_walked_by_keys(browser, corrected):
    run, find = shown_in(browser, corrected)
    assert run(NAMES) == ["004.png", "003.png", "002.png", "001.png", "000.png"]  # largest change
    pick(find("filter"), "brightened")
    assert run(NAMES) == ["003.png", "001.png"]
    assert find("count").text == "2 of 5"
    pick(find("order"), "name")
    assert run(NAMES) == ["001.png", "003.png"]
    browser.find_elements("css selector", "#grid button")[0].click()
    assert find("name").text == "001.png"
    body, at = browser.find_element("tag name", "body"), run("scrollY")
    for key, name in (("\ue014", "003.png"), ("\ue014", "003.png"), ("\ue012", "001.png")):
        body.send_keys(key)  # right, right beyond the end, left
        assert find("name").text == name and run("scrollY") == at
    pick(find("filter"), "all")
    find("search").send_keys("004")
    assert run(NAMES) == ["004.png"]
    assert browser.get_log("browser") == []


def test_zoom_shows_one_pixel_as_one_pixel_and_the_border_where_the_slider_is(browser, tmp_path):
    write_pairs(tmp_path, 1, (1200, 2000))
    page = report(tmp_path / "out", photos=[tmp_path / "in"]).page
    run, find = shown_in(browser, page, 1000, 800)
    find("zoom").click()
    assert run("document.getElementById('frame').clientWidth") == 2000
    stage, at = run("stage.clientWidth"), run("stage.scrollLeft")
    assert at == pytest.approx((2000 - stage) / 2, abs=2)
    assert run(BEFORE_SHARE) == pytest.approx(50, abs=0.5)
    run("stage.scrollTo(0, 0)")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 50))")
    assert run(BEFORE_SHARE) == pytest.approx(100 * stage / 2 / 2000, abs=0.5)
    assert browser.get_log("browser") == []


def test_priors_of_a_store_are_drawn_over_the_photo(browser, store, tmp_path):
    run, find = shown_in(browser, report(store, tmp_path / "page.html").page)
    assert not find("overlay").is_displayed()
    for layer in ("regions", "strength", "confidence"):
        pick(find("layer"), layer)
        browser.execute_async_script(
            "document.getElementById('overlay').decode().then(arguments[0])"
        )
        assert find("overlay").is_displayed() and run("overlay.naturalWidth") > 0
    assert find("key").text.split() == ["unsure", "sure"]
    assert (
        run("document.querySelectorAll('#judge path').length") > 40 or "t = 0" in find("judge").text
    )
    assert "probability" in find("judge").text
    pick(find("order"), "least sure")
    sure = run("shown.map((one) => one.sure)")
    assert sure == sorted(sure)
    assert browser.get_log("browser") == []


def test_curves_and_tables_are_drawn_after_the_photos(browser, run, tmp_path):
    write_pairs(tmp_path, 1)
    row = Row(**dict.fromkeys(ROW, 1.5) | {"data": "d", "method": "m", "side": "all", "photos": 2})
    evaluation = Evaluation(protocol="one; two", sets={"d": "a" * 64}, rows=[row])
    made = report(run, photos=[tmp_path / "in"], evaluation=evaluation)
    script, find = shown_in(browser, made.page, 400, 800)
    headings = script("[...document.querySelectorAll('h2')].map((one) => one.textContent)")
    assert headings == ["Photos", "Training", "Evaluation", "Where this comes from"]
    assert script("document.querySelectorAll('.charts svg').length") == 2
    assert script("document.documentElement.scrollWidth") == 400
    pick(find("version"), "pseudo-GT")
    assert find("now").text == "pseudo-GT"
    assert browser.get_log("browser") == []


def test_only_pictures_near_the_window_are_loaded(browser, tmp_path):
    write_pairs(tmp_path, 200, (16, 24))
    page = report(tmp_path / "out", photos=[tmp_path / "in"]).page
    run, _ = shown_in(browser, page, 400, 800)
    assert run("items.length") == 200
    assert 0 < run("items.filter((one) => one.querySelector('img').naturalWidth).length") < 100
    assert browser.get_log("browser") == []


def test_names_and_notes_stay_text(browser, tmp_path):
    bad = "<script>document.title='x'</script><img src=x onerror=\"document.title='x'\">&"
    write_pairs(tmp_path, 1)
    (tmp_path / "out/000.png").rename(tmp_path / "out" / f"{bad.replace('/', '')}.png")
    (tmp_path / "in/000.png").rename(tmp_path / "in" / f"{bad.replace('/', '')}.png")
    figures = ROW | {"data": bad, "method": bad, "side": "all", "photos": 1, "change": 1.0}
    made = report(
        tmp_path / "out",
        photos=[tmp_path / "in"],
        notes=[bad],
        evaluation=Evaluation(protocol=bad, sets={bad: "0" * 64}, rows=[Row(**figures)]),
    )
    assert made.page.read_text().count("<script") == 2
    run, find = shown_in(browser, made.page)
    assert run("document.title") == "out" and find("name").text.startswith("<script>")
    assert run("document.querySelectorAll('script').length") == 2
    assert find("rest").text.count(bad) == 4
    assert browser.get_log("browser") == []
