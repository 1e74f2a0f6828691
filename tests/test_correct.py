"""Photos corrected: nothing lost, nothing touched, nothing outside OUT, failures named."""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from photo_makers import exif, picture, saved
from PIL import Image, ImageCms
from toy_corrector import run_cli

from evenlight.cache.errors import EvenlightError, UsageError
from evenlight.pipeline import correct_photo
from evenlight.pipeline.correct import correct_files
from evenlight.stages.photos.decode import decode

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


pytestmark = pytest.mark.usefixtures("toys")


def dark(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return picture(*shape, dtype=dtype, seed=seed) // 4


def write_png(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(dark(40, 60, 3, seed=seed)).save(path)
    return path


def files(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of everything in a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def mixed(tmp_path):
    """The folder of a real user: three good photos, two that are none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    large = np.ascontiguousarray(dark(3000, 4000, 3))
    data = saved(Image.fromarray(large), "JPEG", exif=exif(1), icc_profile=ICC, quality=92)
    (folder / "large.jpg").write_bytes(data)
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "deep.png").write_bytes(
        cv2.imencode(".png", dark(60, 80, 3, dtype=np.uint16))[1].tobytes()
    )
    phone = saved(Image.fromarray(dark(80, 120, 3)), "JPEG", exif=exif(6))
    (folder / "phone.jpg").write_bytes(phone)
    (folder / "text.jpg").write_text("Dear diary, today I saw a sunset.")
    return folder


def peak_growth_mb(work) -> tuple[object, float]:
    """Result of the work, and the most that resident memory grew during it, MB."""

    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 1e6

    before = peak = resident()
    stopped = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stopped.wait(0.01):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return work(), peak - before
    finally:
        stopped.set()
        watcher.join()


def test_three_good_photos_out_two_failures_named_exit_1(
    mixed, model, tmp_path, monkeypatch, capsys
):
    before, out = files(mixed), tmp_path / "out"
    code, grown = peak_growth_mb(
        lambda: run_cli(monkeypatch, "correct", mixed, "-o", out, "-m", model)
    )
    said = capsys.readouterr().err
    assert code == 1
    assert files(mixed) == before
    assert sorted(p.name for p in out.rglob("*")) == ["deep.png", "large.jpg", "phone.jpg"]
    assert "corrected 3 photos" in said and "2 failed:" in said
    assert (
        "cut.jpg: the file is truncated or damaged: premature end of JPEG image" in said
        and "text.jpg: " in said
    )
    assert grown < 800

    large = Image.open(out / "large.jpg")
    assert large.size == (4000, 3000)
    assert large.info["icc_profile"] == ICC and large.getexif()[271] == "Maker"
    assert np.asarray(large).mean() > 1.5 * np.asarray(Image.open(mixed / "large.jpg")).mean()
    deep = cv2.imread(str(out / "deep.png"), cv2.IMREAD_UNCHANGED)
    assert deep.dtype == np.uint16 and len(np.unique(deep % 257)) > 100
    phone = Image.open(out / "phone.jpg")
    assert phone.size == (80, 120)  # stored on its side, written upright
    assert phone.getexif()[274] == 1 and phone.getexif()[271] == "Maker"


def test_pictures_passed_over_are_counted_and_named_on_screen_and_in_json(
    model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "in").mkdir()
    Image.fromarray(dark(50, 70, 3)).save(tmp_path / "in/new.jfif", "JPEG")
    for name in (*(f"IMG_{n}.CR2" for n in range(7)), "logo.svg", "notes.txt", "Thumbs.db"):
        (tmp_path / "in" / name).touch()
    arguments = ("correct", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--json")
    assert run_cli(monkeypatch, *arguments) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["corrected"] == ["new.jfif"]
    names = [name for name, _ in report["passed_over"]]
    assert names == [*(f"IMG_{n}.CR2" for n in range(7)), "logo.svg"]
    assert "passed over 7: IMG_0.CR2, IMG_1.CR2" in printed.err and "and 2 more" in printed.err
    assert "passed over 1: logo.svg (a drawing: export it as PNG)" in printed.err
    assert "notes.txt" not in printed.err and "Thumbs" not in printed.err
    (tmp_path / "in/new.jfif").unlink()
    assert run_cli(monkeypatch, *arguments) == 2
    assert "passed over: 7 (raw: develop it first" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [8, 16])
def test_strength_zero_keeps_every_bit_of_a_png(bits, model, tmp_path):
    source = tmp_path / "in" / "photo.png"
    source.parent.mkdir()
    samples = dark(50, 70, 3, dtype=np.uint16 if bits == 16 else np.uint8)
    source.write_bytes(cv2.imencode(".png", samples)[1].tobytes())
    correct_files([source], tmp_path / "out", model=model, strength=0)
    result = cv2.imread(str(tmp_path / "out/photo.png"), cv2.IMREAD_UNCHANGED)
    assert result.dtype == samples.dtype and np.array_equal(result, samples)


def test_a_gray_photo_stays_gray_and_a_colour_one_is_tinted(model, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(dark(50, 70)).save(tmp_path / "in/gray.png")
    Image.fromarray(dark(50, 70, 1, dtype=np.uint16)[..., 0]).save(tmp_path / "in/gray16.png")
    Image.fromarray(dark(50, 70).repeat(3).reshape(50, 70, 3)).save(tmp_path / "in/rgb.png")
    correct_files([tmp_path / "in"], tmp_path / "out", model=model)
    gray = Image.open(tmp_path / "out/gray.png")
    assert gray.mode == "L" and np.asarray(gray).mean() > 1.5 * dark(50, 70).mean()
    assert Image.open(tmp_path / "out/gray16.png").mode == "I;16"
    red, green, _ = np.asarray(Image.open(tmp_path / "out/rgb.png")).reshape(-1, 3).mean(0)
    assert red > green + 2


def test_the_folder_of_inputs_is_refused_as_output(model, tmp_path):
    write_png(tmp_path / "a.png")
    before = files(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match="folder of inputs"):
            correct_files([tmp_path], out, model=model, overwrite=True)
    with pytest.raises(UsageError, match="never overwritten"):
        correct_files([tmp_path / "a.png"], tmp_path, model=model, overwrite=True)
    assert files(tmp_path) == before


def test_a_link_that_leads_to_itself_is_a_photo_that_cannot_be_read(model, tmp_path):
    write_png(tmp_path / "in/a.png")
    (tmp_path / "in/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "in/deeper").symlink_to("deeper")
    report = correct_files(tmp_path / "in", tmp_path / "out", model=model)
    assert report.corrected == ["a.png"]
    assert report.failed == [("loop.jpg", "cannot be read: Too many levels of symbolic links")]


def test_results_inside_the_folder_of_inputs_are_not_corrected_again(model, tmp_path):
    write_png(tmp_path / "a.png")
    for _ in range(2):
        correct_files([tmp_path], tmp_path / "out", model=model, overwrite=True)
    assert sorted(files(tmp_path)) == ["a.png", "out/a.png"]


def test_two_inputs_that_would_become_one_output_are_refused(model, tmp_path):
    first, second = write_png(tmp_path / "1/a.png"), write_png(tmp_path / "2/a.png", seed=1)
    with pytest.raises(UsageError, match="both become"):
        correct_files([first, second], tmp_path / "out", model=model)
    assert not (tmp_path / "out").exists()
    report = correct_files(
        [first, first.parent], tmp_path / "out", model=model
    )  # the same one twice
    assert report.corrected == ["a.png"]


ODD_NAMES = [
    "a..b.png", "<script>alert(1)<script>.png", "it's \"quoted\".png",
    "two\nlines.png", "[red]not[bold].png", ":warning:.png", "-rf.png", "  .png",
    "%2e%2e.png", "$(touch x).png", "\u202egnp.exe.png", b"\xff\xfe.png",
]  # fmt: skip


def test_odd_names_stay_inside_out_and_keep_their_name(model, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    data = write_png(tmp_path / "a.png").read_bytes()
    names = [os.fsdecode(name) for name in ODD_NAMES]
    for name in names:
        (folder / name).write_bytes(data)
        (folder / name.replace(".png", ".jpg")).write_text("no photo")
    (folder / "markup[").mkdir()
    (folder / "markup[/bold].jpg").write_text("no photo")
    code = run_cli(monkeypatch, "correct", folder, "-o", tmp_path / "out", "-m", model)
    assert code == 1
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == sorted(names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "in", "out"]
    said = capsys.readouterr().err
    assert "[red]not[bold].jpg: " in said and ":warning:.jpg: " in said
    assert "markup[/bold].jpg: " in said
    assert "two\\nlines.jpg: " in said  # one line each


def test_datasets_named_to_climb_out_stay_inside_out(model, tmp_path):
    import h5py

    with h5py.File(tmp_path / "in.h5", "w") as file:
        for name in ("../../climbed", "/absolute", "x/../../y"):
            file[name] = dark(40, 60, 3)
    report = correct_files([tmp_path / "in.h5"], tmp_path / "deep/out", model=model)
    assert len(report.corrected) == 3 and not report.failed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "in.h5"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_existing_outputs_are_skipped_unless_overwritten(model, tmp_path):
    source, out = write_png(tmp_path / "in/sub/a.png"), tmp_path / "out"
    assert correct_files([tmp_path / "in"], out, model=model).corrected == ["sub/a.png"]
    first = files(out)
    again = correct_files([tmp_path / "in"], out, model=model, strength=0.2, overwrite=False)
    assert (again.corrected, again.skipped) == ([], ["sub/a.png"]) and files(out) == first
    correct_files([tmp_path / "in"], out, model=model, strength=0.2, overwrite=True)
    assert files(out).keys() == first.keys() and files(out) != first
    assert source.exists()


def test_a_name_that_cannot_be_written_fails_alone(model, tmp_path):
    write_png(tmp_path / "in/a.png")
    write_png(tmp_path / "in/b/c.png")
    long = "n" * 251 + ".png"  # as long as a name can be
    write_png(tmp_path / "in" / long)
    write_png(tmp_path / "in/z.png")
    (tmp_path / "out/a.png").mkdir(parents=True)
    (tmp_path / "out/b").write_text("a file where a folder should be")
    report = correct_files([tmp_path / "in"], tmp_path / "out", model=model)
    assert report.corrected == [long, "z.png"]
    assert [name for name, _ in report.failed] == ["a.png", "b/c.png"]
    assert all("cannot write" in reason for _, reason in report.failed)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_full_or_read_only_disk_ends_the_run_with_a_sentence(
    fault, model, tmp_path, monkeypatch, capsys
):
    write_png(tmp_path / "in/a.png")
    write_png(tmp_path / "in/b.png")
    real = os.open

    def refuse(path, *rest, **options):
        if "b.png" in str(path) and str(tmp_path / "out") in str(path):
            raise OSError(fault, os.strerror(fault), str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr("evenlight.cache.files.os.open", refuse)
    code = run_cli(monkeypatch, "correct", tmp_path / "in", "-o", tmp_path / "out", "-m", model)
    said = capsys.readouterr().err
    assert code == 1
    assert f"cannot write {tmp_path / 'out/b.png'}: {os.strerror(fault)}" in said
    assert "1 photos were corrected before it" in said and "corrected 2" not in said
    assert sorted(files(tmp_path / "out")) == ["a.png"]


def test_an_output_folder_that_vanishes_is_an_error_and_not_made_anew(model, tmp_path, monkeypatch):
    for name in ("in/a.png", "in/sub/b.png", "in/z.png"):
        write_png(tmp_path / name)
    real, out = correct_photo.atomic_write, tmp_path / "out"

    def write_then_lose(path, data):
        real(path, data)
        shutil.rmtree(out)

    monkeypatch.setattr(correct_photo, "atomic_write", write_then_lose)
    with pytest.raises(EvenlightError, match=r"cannot write .*No such file"):
        correct_files([tmp_path / "in"], out, model=model)
    assert not out.exists()


def test_an_output_folder_that_cannot_be_made_is_an_error(model, tmp_path, monkeypatch, capsys):
    source = write_png(tmp_path / "in/a.png")
    (tmp_path / "file").write_text("")
    code = run_cli(monkeypatch, "correct", source, "-o", tmp_path / "file/out", "-m", model)
    assert code == 1 and "cannot make folder" in capsys.readouterr().err


def test_what_could_not_be_kept_is_said_by_photo(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(dark(40, 60, 4), "CMYK").save(tmp_path / "in/print.jpg")
    write_png(tmp_path / "in/plain.png")
    command_line = ("correct", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--json")
    assert run_cli(monkeypatch, *command_line) == 0
    said = capsys.readouterr()
    ((name, note),) = json.loads(said.out)["notes"]
    assert name == "print.jpg" and "CMYK was converted to sRGB" in note
    assert f"note: print.jpg: {note}" in said.err


def test_photos_above_the_limit_are_refused_and_the_limit_can_be_set(model, tmp_path):
    source = tmp_path / "wide.png"
    Image.fromarray(np.full((1000, 1100, 3), 40, np.uint8)).save(source)
    small = correct_files(
        [source], tmp_path / "out", model=model, settings={"photo.max_megapixels": 1}
    )
    assert small.corrected == [] and "megapixels" in small.failed[0][1]
    assert correct_files([source], tmp_path / "out", model=model).corrected == ["wide.png"]


def test_settings_that_training_fixed_cannot_be_changed(model, tmp_path):
    source = write_png(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"train\.size = 96 .*after training.*open to change"):
        correct_files([source], tmp_path / "out", model=model, settings={"train.size": 96})
    with pytest.raises(UsageError, match=r"0 to 1\.5"):
        correct_files([source], tmp_path / "out", model=model, strength=1.6)


def test_half_strength_lies_between(model, tmp_path):
    source = write_png(tmp_path / "a.png")
    means = []
    for strength in (0, 0.5, 1):
        correct_files([source], tmp_path / "out", model=model, strength=strength, overwrite=True)
        means.append(decode((tmp_path / "out/a.png").read_bytes(), "a").pixels.mean())
    assert means[0] + 5 < means[1] < means[2] - 5


def test_a_folder_without_photos_is_bad_usage(model, tmp_path, monkeypatch):
    started = time.monotonic()
    assert run_cli(monkeypatch, "correct", tmp_path, "-o", tmp_path / "out", "-m", model) == 2
    assert time.monotonic() - started < 5
