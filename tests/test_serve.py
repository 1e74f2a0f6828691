"""`evenlight serve`: what it answers, to whom, and what its page does in a browser.

The server is a real process, whose frozen models are toys.
"""

import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import psutil
import pytest
from photo_makers import exif, picture, saved
from PIL import Image
from test_report import BEFORE_SHARE, drag_by_finger
from toy_corrector import run_cli, save_toy_corrector

from evenlight.pipeline.correct import correct_files
from evenlight.pipeline.correct_photo import applied
from evenlight.pipeline.load import load_predictor
from evenlight.pipeline.serve_photos import Opened
from evenlight.stages.photos.decode import decode
from evenlight.stages.photos.visible import visible

UPLOAD_BYTES = 1 << 22
TOYS = f"""
from toy_corrector import toy_models
from evenlight import cli
from evenlight.pipeline import load, serve
load.load_models = toy_models
serve.UPLOAD_BYTES = {UPLOAD_BYTES}
cli.main()
"""


class Server:
    """`evenlight serve ARGUMENTS` in a process of its own."""

    def __init__(self, *arguments: str | Path, temporary: Path) -> None:
        self.temporary = temporary
        paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-c", TOYS, "serve", "--port", "0", "--json", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        lines = list(itertools.takewhile(lambda line: line != "}\n", self.process.stdout))
        assert self.process.poll() is None, self.process.stderr.read()
        self.url = json.loads("".join([*lines, "}"]))["url"]
        self.port = urlsplit(self.url).port

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str):
        """Status, headers and body of the answer.  A header's _ stands for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def json(self, path: str, method: str = "GET", body: bytes | None = None):
        status, _, data = self.ask(path, method, body)
        return status, json.loads(data)

    def image(self, path: str) -> np.ndarray:
        status, headers, data = self.ask(path)
        assert (status, headers["content-type"]) == (200, "image/jpeg")
        return np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    def upload(self, name: str, data: bytes) -> int:
        status, said = self.json(f"/photos?name={quote(name)}", "POST", data)
        assert status == 201, said
        return said["number"]

    def end(self) -> tuple[int, str]:
        """Exit code and what was said."""
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=20)
        return self.process.returncode, said


def dark(*size: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(picture(*size, 3, seed=seed) // 5)


BAD_NAME = "<img src=x onerror=alert()>.png"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "photos"
    (folder / "sub").mkdir(parents=True)
    dark(300, 400).save(folder / "a.jpg", exif=exif(1), quality=95)
    dark(90, 60, seed=1).save(folder / "b.png")
    Image.new("RGB", (64, 64), (90, 120, 40)).save(folder / "one colour.png")
    dark(64, 64, seed=2).save(folder / "sub" / BAD_NAME)
    return folder


@pytest.fixture(scope="module")
def site(photos, tmp_path_factory):
    model = save_toy_corrector(tmp_path_factory.mktemp("model"))
    temporary = tmp_path_factory.mktemp("temporary")
    server = Server(photos, "-m", model, "--set", "photo.max_megapixels=1", temporary=temporary)
    server.model = model
    yield server
    assert server.end()[0] == 130
    assert list(temporary.iterdir()) == []  # nothing is left of what was dropped


def number_of(site: Server, name: str) -> int:
    return next(x["number"] for x in site.json("/photos")[1]["photos"] if x["name"] == name)


# Who is answered


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/photos", {"Host": "127.0.0.1:{port}"}, 200),
        ("/photos", {"Host": "localhost:{port}", "Sec_Fetch_Site": "same-origin"}, 200),
        ("/photos", {"Host": "evil.example:{port}"}, 403),
        ("/photos", {"Host": "127.0.0.1.evil.example"}, 403),
        ("/photos", {"Host": "192.168.0.7:{port}"}, 403),
        ("/photos", {"Host": ""}, 403),
        ("/photos", {"Sec_Fetch_Site": "cross-site"}, 403),
        ("/photos/0/before", {"Sec_Fetch_Site": "same-site"}, 403),
        ("/", {"Sec_Fetch_Site": "cross-site"}, 200),  # a link to the page
    ],
)
def test_only_our_own_page_is_answered(site, path, headers, status):
    headers = {name: value.format(port=site.port) for name, value in headers.items()}
    found, sent, body = site.ask(path, **headers)
    assert found == status and (status == 200 or b"photos" not in body.split(b"error")[0])
    assert "frame-ancestors 'none'" in sent["content-security-policy"]
    assert sent["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_another_page_can_neither_save_nor_drop_anything(site, origin, photos):
    before = site.json("/photos")
    for path in ("/photos?name=x.png", "/photos/0/save"):
        assert site.ask(path, "POST", b"x" * 100, Origin=origin)[0] == 403
    assert site.json("/photos") == before
    assert not (photos.parent / "photos-corrected" / before[1]["photos"][0]["name"]).exists()
    assert site.ask("/photos/999/save", "POST", Origin=site.url)[0] == 404  # ours is let in


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/photos/../../../etc/passwd", "/photos/%2e%2e%2fetc%2fpasswd",
        "/photos/-1/before", "/photos/999/before", "/photos/a.jpg/before", "/photos/0/saved",
        "/serve.html", "/photos//etc/passwd",
    ],
)  # fmt: skip
def test_no_request_names_a_file(site, path):
    status, _, body = site.ask(path)
    assert status == 404 and b"root:" not in body


@pytest.mark.parametrize(
    "query",
    ["strength=x", "strength=nan", "strength=1.6", "strength=-1", "window=1,2,3", "window=a,b,c,d",
     "window=900,0,10,10", "window=0,0,-5,10"],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_words(site, query):
    status, said = site.json(f"/photos/{number_of(site, 'a.jpg')}/after?{query}")
    assert status == 400 and said["error"]


def test_other_hosts_are_let_in_only_when_asked_for_and_told_of(tmp_path, model):
    server = Server("-m", model, "--host", "0.0.0.0", temporary=tmp_path)
    answers = [server.ask("/photos", Host=name)[0] for name in ("192.168.0.7", "evil.example")]
    code, said = server.end()
    assert answers == [200, 403] and code == 130
    assert "whoever reaches http://0.0.0.0" in said


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run_cli(monkeypatch, "serve", "--port", str(port)) == 2
    said = capsys.readouterr().err
    assert f"port {port}" in said and "--port 0" in said and "loading" not in said


def test_without_the_extra_one_sentence_names_it():
    code = "import sys; sys.modules['starlette'] = None; from evenlight import cli; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4 and "pip install 'evenlight[serve]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_ends_it_within_a_second_also_at_work(tmp_path, model):
    """Of processor time: on a busy machine a second of that takes longer."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    server = Server("-m", model, temporary=tmp_path)
    big = server.upload("big.jpg", saved(dark(3000, 4000), "jpeg", quality=30))
    asking = threading.Thread(target=lambda: ignore(server.ask, f"/photos/{big}"))
    asking.start()
    time.sleep(0.3)
    before = psutil.Process(server.process.pid).cpu_times()
    code, said = server.end()
    asking.join()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime
    assert code == 130 and "Traceback" not in said
    assert total - before.user - before.system < 1
    assert list(tmp_path.iterdir()) == []


def ignore(function, *arguments) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        function(*arguments)


# What is answered


def test_a_photo_is_brighter_the_greater_the_strength_and_itself_at_none(site):
    number = number_of(site, "a.jpg")
    assert site.json(f"/photos/{number}") == (200, {"size": [400, 300], "good": False})
    before = site.image(f"/photos/{number}/before")
    shown = [site.image(f"/photos/{number}/after?strength={s}") for s in (0, 0.25, 0.5, 1, 1.4)]
    assert before.shape == (300, 400, 3) and np.array_equal(shown[0], before)
    means = [one.mean() for one in shown]
    assert all(b > a + 3 for a, b in itertools.pairwise(means))
    _, headers, _ = site.ask(f"/photos/{number}/after?strength=1")
    assert headers["evenlight-change"].startswith("brightened by ")
    assert site.image(f"/photos/{number}/thumb").shape == (180, 240, 3)


@pytest.mark.usefixtures("toys")
def test_between_the_strengths_that_are_drawn_a_photo_is_all_but_what_a_correction_makes(model):
    predictor = load_predictor(model)
    photo = decode(saved(dark(200, 300), "png"), "x.png")
    opened = Opened(photo, predictor)
    maps = predictor.predict(visible(photo.pixels, None, predictor.settings.photo.size))
    opened.draw(1.0)
    assert opened.is_rough(0.5) and not opened.is_rough(1.0)
    while opened.missing:
        opened.draw(opened.missing[0])
    for strength in (0.1, 0.5, 0.85, 1.2, 1.4):
        data, _ = opened.after(strength)
        shown = np.array(Image.open(io.BytesIO(data))).astype(int)
        away = np.abs(shown - applied(photo, photo.in_srgb, maps, strength))
        assert away.mean() < 2 and not opened.is_rough(strength)  # the JPEG alone: 1


@pytest.mark.usefixtures("toys")
def test_what_is_saved_is_what_correct_writes_metadata_and_all(site, photos, tmp_path):
    number, out = number_of(site, "a.jpg"), photos.parent / "photos-corrected"
    original = (photos / "a.jpg").read_bytes()
    status, said = site.json(f"/photos/{number}/save?strength=0.7", "POST")
    assert status == 200 and said["output"] == str(out / "a.jpg") and "EXIF" in said["kept"]
    correct_files(photos, tmp_path, model=site.model, strength=0.7)
    written = (out / "a.jpg").read_bytes()
    assert written == (tmp_path / "a.jpg").read_bytes() != original
    assert Image.open(out / "a.jpg").getexif()[271] == "Maker"
    assert (photos / "a.jpg").read_bytes() == original
    window = site.image(f"/photos/{number}/after?strength=0.7&window=100,50,200,90")
    part = np.array(Image.open(out / "a.jpg"))[50:140, 100:300].astype(int)
    assert np.abs(window - part).mean() < 3  # two JPEGs
    before = site.image(f"/photos/{number}/before?window=100,50,200,90")
    assert np.abs(before - np.array(Image.open(photos / "a.jpg"))[50:140, 100:300]).mean() < 2


def test_a_file_that_was_not_made_here_is_replaced_only_on_request(site, photos):
    number, out = number_of(site, "b.png"), photos.parent / "photos-corrected"
    out.mkdir(exist_ok=True)
    (out / "b.png").write_bytes(b"retouched by hand")
    status, said = site.json(f"/photos/{number}/save", "POST")
    assert status == 409 and "not made here or edited since" in said["error"]
    assert (out / "b.png").read_bytes() == b"retouched by hand"
    assert site.json(f"/photos/{number}/save?overwrite", "POST")[0] == 200
    assert site.json(f"/photos/{number}/save?strength=0.5", "POST")[0] == 200  # ours now
    assert Image.open(out / "b.png").size == (60, 90)


def test_a_dropped_photo_comes_back_under_its_name_with_its_metadata(site, photos):
    there = sorted(photos.parent.rglob("*"))
    name = "../Süd & Ost.jpg"
    number = site.upload(name, saved(dark(80, 120, seed=5), "jpeg", exif=exif(6)))
    assert site.json(f"/photos/{number}")[1]["size"] == [80, 120]  # turned upright
    assert site.ask(f"/photos/{number}/saved")[0] == 404
    assert site.json(f"/photos/{number}/save?strength=1", "POST")[0] == 200
    status, headers, data = site.ask(f"/photos/{number}/saved")
    mended = Image.open(io.BytesIO(data))
    assert status == 200 and mended.size == (80, 120) and mended.getexif()[271] == "Maker"
    assert quote("Süd & Ost_even.jpg") in headers["content-disposition"]
    assert ".." not in headers["content-disposition"]
    assert sorted(photos.parent.rglob("*")) == there


# What the page does


@pytest.fixture
def look(browser, site):
    """Functions that run JavaScript in the page, find an element by id, and wait; at the end its
    console is empty."""

    def opened(width: int = 1200, height: int = 900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(site.url)
        wait("photo && $('status').textContent === ''")
        return run, lambda name: browser.find_element("id", name), wait

    def run(code: str):
        return browser.execute_script(f"return {code}")

    def wait(condition: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not run(condition):
            said = run("document.body.innerText")
            assert time.monotonic() < end, f"never {condition}: {said}"
            time.sleep(0.05)

    yield opened
    assert browser.get_log("browser") == []


MEAN = """(() => {
  const canvas = document.createElement("canvas"), image = $("whole-after");
  canvas.width = canvas.height = 8;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, 8, 8);
  return context.getImageData(0, 0, 8, 8).data.filter((_, i) => i % 4 < 3).reduce((a, b) => a + b);
})()"""


def set_strength(run, wait, strength: float) -> None:
    run(f"($('strength').value = {strength}, $('strength').dispatchEvent(new Event('input')))")
    wait("!drawing")


def test_the_slider_changes_the_picture_and_what_is_said_of_it(look, browser):
    run, find, wait = look()
    assert find("name").text == "a.jpg" and find("amount").text == "1.00"
    full, said = run(MEAN), find("said").text
    assert said.startswith("brightened by ")
    set_strength(run, wait, 0.35)
    assert run(MEAN) < 0.8 * full and find("said").text != said
    assert find("amount").text == "0.35" and " s" in find("facts").text.split("drawn in")[1]
    set_strength(run, wait, 1.5)
    assert run(MEAN) > 1.1 * full
    find("strength").send_keys("\ue012")  # arrow left: of the slider
    wait("!drawing")
    assert find("amount").text == "1.45" and find("name").text == "a.jpg"


def test_keys_walk_through_the_folder_and_compare(look, browser):
    run, find, wait = look()
    body = browser.find_element("tag name", "body")
    names = run("[...document.querySelectorAll('#strip button')].map((one) => one.title)")
    assert names[:4] == ["a.jpg", "b.png", "one colour.png", f"sub/{BAD_NAME}"]
    body.send_keys("\ue014")
    wait("$('name').textContent === 'b.png' && $('status').textContent === ''")
    body.send_keys(" ")
    assert run(BEFORE_SHARE) == 100  # all of it before
    body.send_keys(" ")
    assert run(BEFORE_SHARE) == 0
    find("toggle").click()
    body.send_keys(" ")  # not the button again
    assert run(BEFORE_SHARE) == 0
    body.send_keys("\ue014")
    wait("$('name').textContent === 'one colour.png' && $('status').textContent === ''")
    assert find("said").text == "left alone: the judge finds it good as it is"
    assert not find("strength").is_enabled()
    body.send_keys("\ue014")
    wait(f"$('name').textContent.endsWith({json.dumps(BAD_NAME)})")  # and no alert
    body.send_keys("\ue012", "\ue012")
    wait("$('name').textContent === 'b.png'")


def test_save_writes_into_the_folder_beside_the_photos(look, browser, photos):
    run, find, wait = look()
    out = photos.parent / "photos-corrected/a.jpg"
    out.unlink(missing_ok=True)
    set_strength(run, wait, 0.6)
    find("save").click()
    wait("$('status').textContent.startsWith('saved as ')")
    assert str(out) in find("status").text and "kept: EXIF" in find("status").text
    assert Image.open(out).getexif()[271] == "Maker"
    out.write_bytes(b"retouched by hand")
    find("save").click()
    from selenium.webdriver.support.expected_conditions import alert_is_present
    from selenium.webdriver.support.wait import WebDriverWait

    def answer(accept: bool) -> None:
        alert = WebDriverWait(browser, 30).until(alert_is_present())
        assert "Replace it?" in alert.text
        alert.accept() if accept else alert.dismiss()

    answer(False)
    assert out.read_bytes() == b"retouched by hand"
    find("save").click()
    answer(True)
    wait("$('status').textContent.startsWith('saved as ')")
    assert Image.open(out).size == (400, 300)
    refused = [line for line in browser.get_log("browser") if "409 (Conflict)" in line["message"]]
    assert len(refused) == 2


DROP = """
const [name, text] = arguments, bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name, { type: "image/jpeg" }));
document.body.dispatchEvent(
  new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
"""


def test_dropped_and_chosen_photos_are_shown_and_downloaded(look, browser, tmp_path):
    _, find, wait = look()
    data = saved(dark(100, 150, seed=8), "jpeg", exif=exif(1))
    browser.execute_script(DROP, "dropped.jpg", base64.b64encode(data).decode())
    wait("$('name').textContent === 'dropped.jpg' && $('status').textContent === ''")
    assert find("save").text == "Download" and find("said").text.startswith("brightened")
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    find("save").click()
    wait("$('status').textContent.startsWith('downloaded')")
    made, end = tmp_path / "dropped_even.jpg", time.monotonic() + 20
    while not made.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert Image.open(made).getexif()[271] == "Maker"
    (tmp_path / "chosen.png").write_bytes(saved(dark(64, 64, seed=9), "png"))
    find("files").send_keys(str(tmp_path / "chosen.png"))
    wait("$('name').textContent === 'chosen.png' && $('status').textContent === ''")
    assert len(browser.find_elements("css selector", "#strip button")) >= 6


def test_on_a_phone_nothing_is_cut_off_and_100_percent_shows_the_part_in_view(look, browser):
    run, find, wait = look(390, 844)
    assert run("document.documentElement.scrollWidth") == 390
    assert find("save").is_displayed() and find("status").rect["y"] < 844
    share = drag_by_finger(browser, find("stage"))
    assert run(BEFORE_SHARE) == pytest.approx(share, abs=1)
    find("zoom").click()
    wait("!$('window-after').hidden && !$('window-before').hidden")
    assert run("frame.clientWidth") == 400
    left, width = run("stage.scrollLeft"), run("stage.clientWidth")
    assert run("$('window-after').naturalWidth") == run("$('window-after').clientWidth") == width
    assert run("parseFloat($('window-after').style.left)") == pytest.approx(left, abs=1)
    set_strength(run, wait, 0.5)
    wait("!$('window-after').hidden")
    find("zoom").click()
    wait("$('window-after').hidden")


# Last, as it leaves photos that cannot be shown in the list


def test_uploads_are_bounded_in_bytes_and_in_pixels(site):
    (uploads,) = site.temporary.glob("evenlight-serve-*")
    before = site.json("/photos"), sorted(uploads.iterdir())
    with contextlib.suppress(OSError):  # it hangs up while it is still being sent
        assert site.ask("/photos?name=x", "POST", bytes(UPLOAD_BYTES + (1 << 18)))[0] == 413
    assert (site.json("/photos"), sorted(uploads.iterdir())) == before
    number = site.upload("wide.png", saved(Image.new("L", (2000, 1000)), "png"))
    status, said = site.json(f"/photos/{number}")
    assert status == 422 and "over the limit of 1 megapixels" in said["error"]
    page = site.upload("page.jpg", b"<html>" + bytes(100))
    for what in ("", "/thumb", "/before", "/after"):
        status, said = site.json(f"/photos/{page}{what}")
        assert status == 422 and "holds an HTML page" in said["error"]
