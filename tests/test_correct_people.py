"""`correct` for people: one file, what changed, other formats, pipes, and what is said of it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from photo_makers import exif, picture
from PIL import Image
from toy_corrector import run_cli, save_toy_corrector

from evenlight.cache.errors import EnvironmentLacks, UsageError
from evenlight.pipeline import console, correct_photo
from evenlight.pipeline.correct import correct_files
from evenlight.pipeline.correct_photo import Change
from evenlight.pipeline.models import choose_device
from evenlight.stages.photos.colour import srgb_light
from evenlight.stages.photos.decode import decode

pytestmark = pytest.mark.usefixtures("toys")


def dark(seed: int = 0) -> Image.Image:
    return Image.fromarray(picture(40, 60, 3, seed=seed) // 4)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two dark photos, a.jpg and b.png."""
    (tmp_path / "in").mkdir()
    dark(0).save(tmp_path / "in/a.jpg", quality=90, exif=exif(1), dpi=(72, 72))
    dark(1).save(tmp_path / "in/b.png")
    return tmp_path / "in"


def test_one_photo_goes_into_one_file_in_the_format_of_its_name(photos, model, tmp_path):
    for name, format in (("fixed.jpg", "JPEG"), ("new/fixed.png", "PNG"), ("fixed.tif", "TIFF")):
        report = correct_files(photos / "a.jpg", tmp_path / name, model=model)
        assert report.corrected == ["a.jpg"]
        with Image.open(tmp_path / name) as image:
            assert image.format == format and image.getexif()[271] == "Maker"
    assert not list(tmp_path.glob("**/.*"))
    with pytest.raises(UsageError, match="there already: --overwrite replaces it"):
        correct_files(photos / "a.jpg", tmp_path / "fixed.jpg", model=model)
    with pytest.raises(UsageError, match="one file, and there are 2 photos"):
        correct_files(photos, tmp_path / "other.jpg", model=model)
    with pytest.raises(UsageError, match="is an input"):
        correct_files(photos / "a.jpg", photos / "a.jpg", model=model, overwrite=True)
    report = correct_files(photos / "a.jpg", tmp_path / "fixed.gif", model=model)
    assert "is named as gif, but the photo is jpeg" in report.failed[0][1]
    (tmp_path / "folder.jpg").mkdir()
    correct_files(photos / "a.jpg", tmp_path / "folder.jpg", model=model)
    assert (tmp_path / "folder.jpg/a.jpg").is_file()


def outputs(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_changed_is_redone_and_nothing_else(photos, model, tmp_path, tmp_path_factory):
    out = tmp_path / "out"

    def redone(**options):
        return correct_files(photos, out, **({"model": model} | options)).corrected

    assert redone() == ["a.jpg", "b.png"]
    first = outputs(out)
    assert redone() == [] and outputs(out) == first
    (photos / "a.jpg").touch()  # another time, the same photo
    assert redone() == []
    dark(2).save(photos / "b.png")
    assert redone() == ["b.png"] and outputs(out)["a.jpg"] == first["a.jpg"]
    assert outputs(out)["b.png"] != first["b.png"]
    assert redone(strength=0.5) == ["a.jpg", "b.png"] and redone(strength=0.5) == []
    assert redone(strength=0.5, quality=70) == ["a.jpg", "b.png"]
    assert redone(settings={"judge.prior_good": 0.0}) == ["a.jpg", "b.png"]
    assert redone(settings={"judge.prior_good": 0.0, "run.device": "cpu"}) == []
    other = save_toy_corrector(tmp_path_factory.mktemp("other"), size=128)
    assert redone(model=other) == ["a.jpg", "b.png"] and redone(model=other) == []
    assert redone(model=other, strength=0.1, overwrite=False) == []
    assert redone(model=other, overwrite=True) == ["a.jpg", "b.png"]


def test_what_was_not_made_here_or_edited_since_is_kept_and_told(
    photos, model, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    correct_files(photos, out, model=model)
    (out / "a.jpg").write_bytes(b"retouched by hand")
    (out / "b.png").unlink()
    (out / "b.png").write_bytes(b"of another program")
    code = run_cli(
        monkeypatch, "correct", photos, "-o", out, "-m", model, "--strength", "0.5", "--json"
    )
    said = capsys.readouterr()
    assert code == 0 and json.loads(said.out)["others"] == ["a.jpg", "b.png"]
    assert "2 were there already, not made here or edited since (--overwrite" in said.err
    assert outputs(out) == {"a.jpg": b"retouched by hand", "b.png": b"of another program"}
    assert run_cli(monkeypatch, "correct", photos, "-o", out, "-m", model, "--overwrite") == 0
    assert len(outputs(out)["a.jpg"]) > 500


def test_a_photo_left_alone_is_its_own_file_to_the_bit(photos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(correct_photo.Predictor, "predict", lambda *_: None)
    behind = (photos / "a.jpg").read_bytes() + b"\0\0\0\x18ftypmp42 a video"
    (photos / "a.jpg").write_bytes(behind)
    report = correct_files(photos, tmp_path / "out", model=model)
    assert (tmp_path / "out/a.jpg").read_bytes() == behind and report.notes == []
    assert [(row["what"], row["kept"]) for row in report.photos] == [
        ("left alone", ["the whole file"])
    ] * 2
    correct_files(photos / "a.jpg", tmp_path / "png", model=model, format="png")
    assert sorted(outputs(tmp_path / "png")) == ["a.png"]


def test_it_is_said_of_every_photo_what_was_done_and_kept(
    photos, model, tmp_path, monkeypatch, capsys
):
    arguments = ("correct", photos, "-o", tmp_path / "out", "-m", model, "--json")
    assert run_cli(monkeypatch, *arguments, "-v") == 0
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)["photos"]
    before, after = (
        srgb_light(np.asarray(Image.open(folder / "a.jpg")) / 255).mean()
        for folder in (photos, tmp_path / "out")
    )
    assert first["what"] == "brightened" and first["ev"] == pytest.approx(
        np.log2(after / before), abs=0.05
    )
    assert first["kept"] == ["EXIF", "resolution"] and second["kept"] == []
    assert first["output"] == str(tmp_path / "out/a.jpg") and first["highlights"] == 0
    assert f"a.jpg: brightened by {first['ev']:.1f} EV\n" in printed.err
    assert "kept: a.jpg: EXIF, resolution" in printed.err
    assert "corrected 2 photos: 2 brightened" in printed.err
    assert run_cli(monkeypatch, *arguments, "-q", "--overwrite") == 0
    assert capsys.readouterr().err == ""


def test_a_change_is_told_in_words():
    restored = Change(what="darkened", ev=-1.26, highlights=0.051)
    assert str(restored) == "darkened by 1.3 EV, highlights restored in 5.1%"
    assert str(Change(what="adjusted", ev=0.01)) == "adjusted"
    assert str(Change()) == "left alone"


def test_a_dry_run_counts_and_writes_nothing_and_loads_no_model(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "evenlight.pipeline.correct_photo", None)  # cannot be imported
    arguments = ("correct", photos, "-o", tmp_path / "out", "--dry-run", "--json")
    assert run_cli(monkeypatch, *arguments) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["planned"] == ["a.jpg", "b.png"] and report["corrected"] == []
    size = sum(p.stat().st_size for p in photos.iterdir())
    assert report["planned_bytes"] == size
    assert f"would correct 2 photos, {size / 1e6:.1f} MB" in printed.err
    assert not (tmp_path / "out").exists()


def test_a_run_with_nothing_to_do_imports_no_torch(photos, model, tmp_path):
    correct_files(photos, tmp_path / "out", model=model)
    code = (
        "import sys\nfrom evenlight import cli\n"
        f"sys.argv = ['evenlight', 'correct', {str(photos)!r}, '-o', {str(tmp_path / 'out')!r},"
        f" '-m', {str(model)!r}]\n"
        "try: cli.main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr == "looking for photos\ncorrected 0 photos; 2 were there already\n"


def test_the_first_word_is_said_before_anything_heavy_is_imported(tmp_path):
    """What takes seconds to import (how many: benchmarks/speed.py)."""
    code = (
        "import sys, logging\nfrom evenlight import cli\n"
        "heavy = {'numpy', 'torch', 'zarr', 'cv2', 'PIL', 'pyvips', 'scipy', 'skimage'}\n"
        "cli.log.info = lambda said: print(said, heavy & sys.modules.keys()) or sys.exit()\n"
        "sys.argv = ['evenlight', 'correct', 'x', '-o', 'y']\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "looking for photos set()\n", done.stderr


@pytest.mark.parametrize(
    ("format", "of_pillow", "end"),
    [
        ("jpeg", "JPEG", "jpg"),
        ("png", "PNG", "png"),
        ("tiff", "TIFF", "tif"),
        ("webp", "WEBP", "webp"),
    ],
)
def test_every_format_can_be_asked_for(format, of_pillow, end, photos, model, tmp_path):
    report = correct_files(photos, tmp_path / "out", model=model, format=format, suffix="_even")
    assert sorted(outputs(tmp_path / "out")) == sorted([f"a_even.{end}", f"b_even.{end}"])
    assert not report.failed
    with Image.open(tmp_path / f"out/a_even.{end}") as image:
        assert image.format == of_pillow and image.getexif()[271] == "Maker"
        assert image.size == (60, 40)
    assert dict(report.notes) == (
        {"a.jpg": "webp has no place for its resolution"} if format == "webp" else {}
    )


def test_quality_is_heeded(photos, model, tmp_path):
    sizes = []
    for quality in (30, 95):
        correct_files(photos / "a.jpg", tmp_path / "q.jpg", model=model, quality=quality,
                      overwrite=True)  # fmt: skip
        sizes.append((tmp_path / "q.jpg").stat().st_size)
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 1.51}, "0 to 1.5"),
        ({"quality": 0}, "1 to 100"),
        ({"format": "gif"}, "jpeg, png, tiff, webp or same"),
        ({"suffix": "/../x"}, "slash"),
        ({"overwrite": "never"}, "True, False or 'changed'"),
        ({"workers": 0}, "at least 1"),
    ],
)
def test_bad_options_are_refused_in_words(options, words, photos, tmp_path):
    with pytest.raises(UsageError, match=words):
        correct_files(photos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_strength_above_one_goes_on_in_the_same_direction_and_stays_in_range(
    photos, model, tmp_path
):
    means = []
    for strength in (0.5, 1, 1.5):
        correct_files(photos / "b.png", tmp_path / "b.png", model=model, strength=strength,
                      overwrite=True)  # fmt: skip
        pixels = decode((tmp_path / "b.png").read_bytes(), "b").pixels
        means.append(pixels.mean())
    assert means[0] + 5 < means[1] < means[2] - 5
    white = Image.fromarray(np.full((40, 60, 3), 250, np.uint8))
    corrected = correct_photo.correct(white, strength=1.5, predictor=correct_photo.predictor_of(
        str(model), '{"judge.prior_good": 0.0}'))  # fmt: skip
    assert corrected.dtype == np.uint8  # clipped, not wrapped around
    assert corrected.astype(int).std() < 30


def test_a_photo_from_stdin_goes_to_stdout(photos, model, tmp_path, monkeypatch, capsysbinary):
    data = (photos / "a.jpg").read_bytes()
    correct_files(photos / "a.jpg", tmp_path / "plain.jpg", model=model)

    class Stdin:
        buffer = io.BytesIO(data)

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert run_cli(monkeypatch, "correct", "-", "-o", "-", "-m", model) == 0
    assert capsysbinary.readouterr().out == (tmp_path / "plain.jpg").read_bytes()
    for wrong, words in (
        (("-", "-o", tmp_path / "out"), b"stdin goes into a file"),
        ((photos, "-o", "-"), b"- is one file"),
        ((photos / "a.jpg", "-o", "-", "--json"), b"stdout takes one of"),
    ):
        assert run_cli(monkeypatch, "correct", *wrong, "-m", model) == 2
        assert words in capsysbinary.readouterr().err


@pytest.mark.slow
def test_workers_correct_the_same(photos, tmp_path, monkeypatch):
    monkeypatch.undo()  # the shipped models: toys do not reach other processes
    alone = correct_files(photos, tmp_path / "1")
    two = correct_files(photos, tmp_path / "2", workers=2)
    assert sorted(two.corrected) == alone.corrected == ["a.jpg", "b.png"]
    assert outputs(tmp_path / "1") == outputs(tmp_path / "2")
    assert correct_files(photos, tmp_path / "2", workers=2).corrected == []


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", "0", "CPU", "cuda:", ""])
def test_a_device_that_is_none_is_refused_in_a_sentence(name):
    with pytest.raises(UsageError, match="must be cpu, cuda, cuda:N or auto, got"):
        choose_device(name)


def test_a_device_that_is_not_here_is_told(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [choose_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        "cuda", "cuda", "cuda:1", "cpu",
    ]  # fmt: skip
    with pytest.raises(EnvironmentLacks, match="cuda:2, but torch finds only 2"):
        choose_device("cuda:2")


def test_device_is_the_setting(photos, model, tmp_path, monkeypatch, capsys):
    arguments = ("correct", photos, "-o", tmp_path / "out", "-m", model)
    assert run_cli(monkeypatch, *arguments, "--device", "gpu") == 2
    assert "got 'gpu'" in capsys.readouterr().err
    assert run_cli(monkeypatch, *arguments, "--device", "cpu") == 0


def test_links_below_out_are_not_followed_out_of_it(photos, model, tmp_path):
    for folder in ("elsewhere", "out/real", "in/sub", "in/kept"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "elsewhere/c.png").write_bytes(b"precious")
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out/kept").symlink_to("real")
    for folder in ("sub", "kept"):
        dark().save(photos / folder / "c.png")
    (tmp_path / "target").write_bytes(b"precious too")
    (tmp_path / "out/b.png").symlink_to(tmp_path / "target")
    report = correct_files(photos, tmp_path / "out", model=model, overwrite=True)
    assert report.corrected == ["a.jpg", "b.png", "kept/c.png"]
    ((name, reason),) = report.failed
    assert name == "sub/c.png" and "is a link that leads out of" in reason
    assert (tmp_path / "elsewhere/c.png").read_bytes() == b"precious"
    assert (tmp_path / "target").read_bytes() == b"precious too"
    assert (tmp_path / "out/real/c.png").is_file()


def test_what_a_killed_run_left_beside_its_outputs_is_cleaned(photos, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".a.jpg.0123456789abcdef", ".b.png.f123456789abcdef", ".c.jpg.0123456789abcdef"):
        (out / f"{name}.evenlight-tmp").write_bytes(b"half")
    correct_files(photos, out, model=model)
    # that of c.jpg is no output of this run
    left = [".c.jpg.0123456789abcdef.evenlight-tmp", "a.jpg", "b.png"]
    assert sorted(p.name for p in out.iterdir()) == left


def test_outputs_have_the_permissions_of_the_umask(photos, model, tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            correct_files(photos, tmp_path / f"{mask}", model=model)
        finally:
            os.umask(before)
        modes = {p.stat().st_mode & 0o777 for p in (tmp_path / f"{mask}").iterdir()}
        assert modes == {mode}


def test_errors_under_json_are_json(tmp_path, monkeypatch, capsys):
    for arguments, words in (
        (("correct", tmp_path / "none", "-o", "x"), "No such file"),
        (("correct", tmp_path), "--out"),
        (("correct", tmp_path, "-o", "x", "--strength", "9"), "--strength"),
        (("frobnicate",), "frobnicate"),
    ):
        assert run_cli(monkeypatch, *arguments, "--json") == 2
        printed = capsys.readouterr()
        document = json.loads(printed.out)
        assert words in document["error"] and document["exit"] == 2
        assert words in printed.err


def test_a_log_gets_a_line_at_a_steady_interval(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress() as on_progress:
        for done in range(1, 101):
            now += 0.3
            on_progress("photos", done, 100)
    assert capsys.readouterr().err.splitlines() == [
        "photos: 34 of 100, 3.33/s, 0:00:20 left",
        "photos: 68 of 100, 3.33/s, 0:00:10 left",
    ]


def test_nothing_that_is_printed_moves_the_terminal(capsys):
    console.stderr.print("a\x1b[2Jb\x07.jpg\nnext \u202egnp \udce9 \ud800 gr\u00fcn")
    said = capsys.readouterr().err
    assert said == "a\\x1b[2Jb\\x07.jpg\nnext \\xe2\\x80\\xaegnp \\xe9 \\xed\\xa0\\x80 gr\u00fcn\n"


def test_names_that_are_no_utf_8_print_on_stdout():
    code = (
        "import sys\nfrom evenlight import cli\nfrom evenlight.pipeline import doctor\n"
        "doctor.doctor = lambda: {'photo': 'p\\udce9', 'lacks': []}\n"
        "sys.argv = ['evenlight', 'doctor']\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("photo: p\\udce9\n")


def test_h_is_help(monkeypatch, capsys):
    assert run_cli(monkeypatch, "correct", "-h") == 0
    assert "--strength" in capsys.readouterr().out
