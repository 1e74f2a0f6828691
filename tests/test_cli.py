"""The command line: exit codes, what goes to which stream, a surface that cannot creep, signals."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import click
import pytest
import typer
from toy_corrector import run_cli, save_toy_corrector
from toy_store import precompute as toy_precompute
from toys import ToyClip, ToySegmenter, write_photos

from evenlight import cli
from evenlight.cache.errors import EvenlightError, StoreError
from evenlight.cache.store import Store
from evenlight.pipeline import config
from evenlight.pipeline.doctor import doctor
from evenlight.pipeline.models import Models, priors_of
from evenlight.pipeline.precompute import precompute
from evenlight.pipeline.store_info import cache_verify
from evenlight.stages.corrector.training import NonFinite

SMALL = ["photo.size=64", "run.unit_size=2", "ladder.regions=3"]
COMMON = {"-q", "--quiet", "-v", "--verbose", "--config", "--set", "--json"}
# Every command and its options.  A new one is added here on purpose, with its line in the README.
SURFACE = {
    "precompute": {"photos", "-s", "--store", "--workers", "--scheduler", "--prune"}
    | {"--retry-failed"}
    | COMMON,
    "tune-clip": {"-s", "--store"} | COMMON,
    "regenerate": {"-s", "--store"} | COMMON,
    "train": {"-s", "--store", "-o", "--out"} | COMMON,
    "evaluate": {"--data", "-m", "--model", "--csv"} | COMMON,
    "correct": {
        "photos", "-o", "--out", "-m", "--model", "--strength", "--all", "--overwrite", "--skip",
        "--suffix", "--format", "--quality", "--workers", "--device", "--runtime",
        "--dry-run",
    } | COMMON,
    "report": {"target", "--out", "-o", "--photos", "--side"} | COMMON - {"--config", "--set"},
    "settings": {"--diff", "--json"},
    "serve": {"photos", "-o", "--out", "-m", "--model", "--host", "--port", "--open", "--config"}
    | {"--set", "--json"},
    "doctor": {"--json"},
    "export": {"model", "--out", "-o", "--to"} | COMMON - {"--config", "--set"},
    "cache info": {"-s", "--store", "--config", "--set", "--json"},
    "cache verify": {"-s", "--store", "--repair", "--no-repair", "--json"},
    "cache show": {"photo", "-s", "--store", "-o", "--out", "--json"},
    "cache forget": {"names", "-s", "--store", "--json"},
    "weights fetch": {"name", "-o", "--out", "--json"},
}  # fmt: skip


def toys(settings=None) -> Models:
    return Models(ToySegmenter(), ToyClip())


@pytest.fixture
def store(tmp_path):
    """A complete store of three photos in two units, made by toy models."""
    write_photos(tmp_path / "photos", 3)
    settings = config.build(overrides=SMALL)
    precompute(tmp_path / "photos", tmp_path / "S", settings=settings, models=toys())
    return tmp_path / "S"


@pytest.fixture
def toy_loaders(monkeypatch):
    for module in ("precompute", "load"):
        monkeypatch.setattr(f"evenlight.pipeline.{module}.load_models", toys)
    named = "evenlight.pipeline.store_info.priors_named"
    monkeypatch.setattr(named, lambda settings, judge: priors_of(toys(), judge))


def surface() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}

    def walk(command, name: str) -> None:
        for child_name, child in getattr(command, "commands", {}).items():
            walk(child, f"{name} {child_name}".strip())
        if not hasattr(command, "commands"):
            options = ([*p.opts, *p.secondary_opts] for p in command.params if p.name != "help")
            found[name] = {option for group in options for option in group}

    walk(typer.main.get_command(cli.app), "")
    return found


def test_commands_and_options_are_just_these():
    assert surface() == SURFACE


def damage(store: Path, array: str, unit: int = 0) -> None:
    """Flip one bit in the middle of a shard."""
    (path,) = (store / array).glob(f"c.{unit}*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_exit_0_and_1_when_done_and_when_some_failed(tmp_path, monkeypatch, capsys, toy_loaders):
    write_photos(tmp_path / "photos", 2)
    arguments = ["precompute", tmp_path / "photos", "-s", tmp_path / "S"]
    arguments += [part for text in SMALL for part in ("--set", text)]
    assert run_cli(monkeypatch, *arguments) == 0
    (tmp_path / "photos/page.jpg").write_text("<html>")
    assert run_cli(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert "1 failed:\n  page.jpg: " in said.err and said.out == ""


def test_precompute_again_goes_on_with_the_settings_of_the_store(
    store, tmp_path, monkeypatch, capsys, toy_loaders
):
    arguments = ["precompute", tmp_path / "photos", "-s", store, "--json"]
    (tmp_path / "photos/raw.dng").touch()
    assert run_cli(monkeypatch, *arguments) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["units_made"] == 0
    assert [name for name, _ in report["passed_over"]] == ["raw.dng"]
    assert "passed over 1: raw.dng (raw: develop it first" in printed.err
    assert run_cli(monkeypatch, *arguments, "--set", "pseudo_gt.max_strength=1.5") == 0
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)["parts_made"]) == {"pseudo_gt"}
    told = "pseudo_gt.max_strength 2.2 -> 1.5: what that touches is made anew in 2 units"
    assert told in printed.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["precompute", "photos"],
        ["precompute", "/nonexistent", "-s", "S"],
        ["precompute", ".", "-s", "S", "--set", "photo.size=13"],
        ["precompute", ".", "-s", "S", "--set", "photo.sise=512"],
        ["precompute", ".", "-s", "S", "--set", "photo.size=100000000000"],
        ["precompute", ".", "-s", "S", "--set", "ladder.regions=-1"],
        ["precompute", ".", "-s", "S", "--set", "clip.image_size=-5"],
        ["precompute", ".", "-s", "S", "--set", "train.ema=nan"],
        ["precompute", ".", "-s", "S", "--config", "/nonexistent.toml"],
        ["precompute", ".", "-s", "S", "--workers", "0"],
        ["correct", ".", "-o", "out", "--strength", "2"],
        ["evaluate", "--data", "nonsense"],
        ["evaluate", "--data", "pairs:.", "--csv", "/nonexistent/rows.csv"],
        ["weights", "fetch", "YOLO-xxl", "-o", "w"],
    ],
)
def test_exit_2_on_bad_usage_with_a_sentence(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err and "Traceback" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_exit_3_on_a_store_that_is_missing_damaged_or_stale(
    store, tmp_path, monkeypatch, capsys, toy_loaders
):
    assert run_cli(monkeypatch, "cache", "info", "-s", tmp_path / "none") == 3
    stale = ("--set", "regions.iou=0.9")
    assert run_cli(monkeypatch, "regenerate", "-s", store, *stale) == 3
    told = "(regions.iou 0.6 -> 0.9): 'evenlight precompute' remakes what that touches"
    assert told in capsys.readouterr().err
    assert run_cli(monkeypatch, "cache", "verify", "-s", store) == 0
    damage(store, "regions")
    assert run_cli(monkeypatch, "cache", "verify", "-s", store) == 3
    assert "unit 0 regions regions: " in capsys.readouterr().err
    (store / "evenlight").rename(store / "elsewhere")
    assert run_cli(monkeypatch, "cache", "verify", "-s", store, "--repair") == 3


def test_exit_4_where_the_environment_lacks_something(tmp_path, monkeypatch, capsys, toy_loaders):
    write_photos(tmp_path / "photos", 1)
    model = save_toy_corrector(tmp_path / "model")
    arguments = ("correct", tmp_path / "photos", "-o", tmp_path / "out")
    monkeypatch.setattr("evenlight.stages.weights.FOLDER", tmp_path / "none")
    assert run_cli(monkeypatch, *arguments) == 4
    assert "no corrector ships with this version" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_cli(monkeypatch, *arguments, "-m", model, "--set", "run.device=cuda") == 4
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EvenlightError("no room"), 1),
        (NonFinite("loss is NaN at step 3"), 1),
        (OSError(28, "No space left on device", "/runs/a"), 1),
        (MemoryError("Unable to allocate 9 GiB"), 4),
        (StoreError("[bold]odd[/x] name"), 3),
    ],
)
def test_errors_end_with_one_sentence_and_their_code(error, code, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("evenlight.pipeline.doctor.doctor", fail)
    assert run_cli(monkeypatch, "doctor") == code
    said = capsys.readouterr()
    assert said.err.startswith("evenlight: ") and said.err.count("\n") == 1
    assert str(error) in said.err and said.out == ""


def test_json_is_one_document_on_stdout_and_everything_else_on_stderr(
    store, tmp_path, monkeypatch, capsys, toy_loaders
):
    model = save_toy_corrector(tmp_path / "model")
    (tmp_path / "photos/page.jpg").write_text("<html>")
    small = [part for text in SMALL for part in ("--set", text)]
    for code, keys, arguments in (
        (1, {"photos", "failed", "units_made"}, ["precompute", tmp_path / "photos", *small]),
        (0, {"photos", "failed", "parts_made"}, ["regenerate"]),
        (0, {"photos", "units", "stale", "judge"}, ["cache", "info"]),
        (0, set(), ["cache", "verify"]),
    ):
        assert run_cli(monkeypatch, *arguments, "-s", store, "--json") == code, arguments
        said = capsys.readouterr()
        assert keys <= set(json.loads(said.out)), arguments
        assert ("page.jpg" in said.err) == ("failed" in keys)
    arguments = ("correct", tmp_path / "photos", "-m", model, "-o", tmp_path / "out", "--json")
    assert run_cli(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    document = json.loads(said.out)
    assert (len(document["corrected"]), document["failed"][0][0]) == (3, "page.jpg")
    assert "corrected 3 photos" in said.err and "1 failed" in said.err


@pytest.mark.parametrize("name", SURFACE)
def test_errors_of_every_command_are_json_where_json_is_asked_for(
    name, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run_cli(monkeypatch, *name.split(), "--frobnicate", "--json") == 2
    said = capsys.readouterr()
    error = json.loads(said.out)
    assert error["exit"] == 2 and "frobnicate" in error["error"]
    assert said.err == f"evenlight: {error['error']}\n"


def test_numbers_that_json_has_not_become_null(capsys):
    cli.emit({"psnr": float("-inf"), "rows": [(float("nan"), 1.5)]}, True)
    assert json.loads(capsys.readouterr().out) == {"psnr": None, "rows": [[None, 1.5]]}


def test_cache_info_says_what_other_settings_would_make_stale(
    store, monkeypatch, capsys, toy_loaders
):
    assert run_cli(monkeypatch, "cache", "info", "-s", store, "--json") == 0
    assert json.loads(capsys.readouterr().out)["stale"] == {}
    changed = ("--set", "pseudo_gt.max_strength=1.5")
    assert run_cli(monkeypatch, "cache", "info", "-s", store, "--json", *changed) == 0
    assert set(json.loads(capsys.readouterr().out)["stale"]) == {"0", "1"}


@pytest.mark.parametrize("array", ["photo", "regions", "clip_ladder", "t_map"])
def test_repair_drops_what_is_damaged_and_precompute_remakes_exactly_that(
    array, store, tmp_path, monkeypatch, capsys
):
    with Store.open(store) as opened:
        before = opened.digest()
    damage(store, array, unit=1)
    assert run_cli(monkeypatch, "cache", "verify", "-s", store, "--repair") == 0
    assert "1 damaged; what is damaged is forgotten" in capsys.readouterr().err
    assert cache_verify(store) == []
    parts = ["photo", "regions", "embeddings", "pseudo_gt"]
    first = {"photo": 0, "regions": 1, "clip_ladder": 2, "t_map": 3}[array]
    report = precompute(
        tmp_path / "photos", store, settings=config.build(overrides=SMALL), models=toys()
    )
    assert report.parts_made == dict.fromkeys(parts[first:], 1)
    with Store.open(store) as opened:
        assert opened.digest() == before and opened.verify() == []


def test_a_forgotten_photo_is_gone_from_what_training_sees_and_may_come_again(
    store, tmp_path, monkeypatch, capsys
):
    with Store.open(store) as opened:
        digest = opened.digest()
    assert run_cli(monkeypatch, "cache", "forget", "-s", store, "photo_01.png") == 2
    assert "no photo 'photo_01.png'; did you mean photo_001.png?" in capsys.readouterr().err
    assert run_cli(monkeypatch, "cache", "forget", "-s", tmp_path / "none", "x") == 3
    assert not (tmp_path / "none").exists() and capsys.readouterr().out == ""
    assert run_cli(monkeypatch, "cache", "forget", "-s", store, "photo_001.png", "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"forgotten": 1, "left": 2}
    assert said.err == "forgot 1 photos, 2 are left\n"
    with Store.open(store) as opened:
        assert opened.slots("pseudo_gt") == [0, 2] and opened.verify() == []
    settings = config.build(overrides=SMALL)
    assert precompute(tmp_path / "photos", store, settings=settings, models=toys()).units_made == 0
    with Store.open(store) as opened:
        assert opened.digest() == digest


def offline(*_, **__):
    raise urllib.error.URLError("[Errno -3] Temporary failure in name resolution")


def test_fetch_offline_is_exit_4_and_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("urllib.request.urlopen", offline)
    out = tmp_path / "weights"
    assert run_cli(monkeypatch, "weights", "fetch", "FastSAM-s", "-o", out) == 4
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("evenlight: cannot fetch FastSAM-s from https://github.com/")
    assert "Temporary failure in name resolution" in said.err and "give its path" in said.err
    assert not out.exists()


class Response:
    def __init__(self, data: bytes, whole: bool = True) -> None:
        self.data, self.whole = data, whole

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self) -> bytes:
        import http.client

        if not self.whole:
            raise http.client.IncompleteRead(self.data, 1000)
        return self.data


def test_fetched_weights_are_written_with_their_sha256_and_how_to_use_them(
    tmp_path, monkeypatch, capsys
):
    import hashlib

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response(b"weights"))
    name = "ViT-B-32-openai"
    assert run_cli(monkeypatch, "weights", "fetch", name, "-o", tmp_path, "--json") == 0
    said = capsys.readouterr()
    path, digest = tmp_path / f"{name}.safetensors", hashlib.sha256(b"weights").hexdigest()
    assert path.read_bytes() == b"weights"
    assert path.with_suffix(".sha256").read_text() == f"{digest}  {path.name}\n"
    found = json.loads(said.out)
    assert found["sha256"] == digest and f"clip.weights={path}" in found["use"]
    assert "--set clip.model=ViT-B-32-quickgelu" in said.err
    config.build(overrides=found["use"])


def test_a_fetch_that_breaks_off_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response(b"wei", whole=False))
    assert run_cli(monkeypatch, "weights", "fetch", "FastSAM-x", "-o", tmp_path) == 4
    assert list(tmp_path.iterdir()) == [] and "IncompleteRead" in capsys.readouterr().err


def test_doctor_says_what_is_there_and_which_scan_runs(monkeypatch, capsys):
    assert run_cli(monkeypatch, "doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lacks"] == [] and found["packages"]["zarr"].startswith("3.")
    assert found["scan"]["runs"] in ("blocked", "mamba_ssm", "triton") and found["scan"]["why"]
    assert len(found["weights"]["fastsam-n"]) == len(found["weights"]["clip-lite0"]) == 64
    assert run_cli(monkeypatch, "doctor") == 0
    text = capsys.readouterr().out
    assert "mamba-ssm: " in text and "why: " in text


def test_doctor_exits_4_naming_what_is_lacking_even_torch(tmp_path, monkeypatch, capsys):
    real, missing = importlib.metadata.version, ("torch", "zarr")

    def version(name):
        if name in missing:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("evenlight.stages.weights.FOLDER", tmp_path)
    assert doctor()["lacks"] == [
        "torch",
        "zarr",
        "fastsam-n",
        "clip-lite0",
        "region-embedder",
        "judge",
    ]
    assert run_cli(monkeypatch, "doctor") == 4
    code = (
        "import sys; sys.modules['torch'] = sys.modules['zarr'] = None\n"
        "from evenlight.pipeline.doctor import doctor"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


SLOW_PRECOMPUTE = """
import sys, time
import torch
torch.set_num_threads(1)
from toy_store import precompute as toy_precompute
from toys import ToyClip, ToySegmenter
from evenlight import cli
from evenlight.pipeline import precompute
from evenlight.pipeline.models import Models, priors_of

class Slow(ToySegmenter):
    def segment(self, photo):
        time.sleep(0.3)
        return super().segment(photo)

precompute.load_models = lambda settings: Models(Slow(), ToyClip())
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_precompute_soon_and_says_how_to_go_on(number, code, tmp_path):
    write_photos(tmp_path / "photos", 40)
    store = tmp_path / "S"
    arguments = ["precompute", tmp_path / "photos", "-s", store]
    arguments += [part for text in SMALL for part in ("--set", text)]
    command = [sys.executable, "-c", SLOW_PRECOMPUTE, *arguments]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]  # where the toys lie
    child = subprocess.Popen(
        list(map(str, command)),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not list(store.glob("evenlight/units/*.json")) and child.poll() is None:
        time.sleep(0.05)  # until one unit is complete
    os.kill(child.pid, number)
    sent = time.monotonic()
    out, said = child.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert child.returncode == code, said
    assert out == "" and said == (
        "evenlight: stopped; what is complete is kept: run the same command again to go on\n"
    )
    with Store.open(store) as opened:  # opens, nothing damaged, some done, not all
        assert opened.verify() == [] and 0 < sum(r.complete for r in opened.records()) < 20
    assert [p for p in store.rglob("*") if "tmp" in p.name or "partial" in p.name] == []
    with Store.create_or_open(store):  # the lock is free
        pass


def test_help_of_every_command_is_there(monkeypatch, capsys):
    for name in SURFACE:
        assert run_cli(monkeypatch, *name.split(), "--help") == 0
        assert f"evenlight {name} [OPTIONS]" in click.unstyle(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments", [["-s", "s"], ["-s", "s", "--json"], ["-s", "gone", "--json"]]
)
def test_output_that_cannot_be_written_ends_without_noise(arguments, tmp_path):
    toy_precompute(tmp_path / "s")
    for stdout, error in ((os.open("/dev/full", os.O_WRONLY), True), (_pipe_nobody_reads(), False)):
        done = _evenlight(["cache", "info", *arguments], tmp_path, stdout=stdout)
        os.close(stdout)
        assert done.returncode == (3 if "gone" in arguments else 1)
        said = done.stderr.splitlines()
        assert said[-1].startswith("evenlight: ") if error or "gone" in arguments else not said
        assert len(said) < 2


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_is_refused_before_a_file_takes_its_place(closed, tmp_path):
    done = _evenlight(["doctor"], tmp_path, preexec_fn=lambda: os.close(closed))
    assert done.returncode == 4
    assert ("is closed: give /dev/null in its place" in done.stderr) == (closed != 2)


def _evenlight(arguments, folder, **options):
    return subprocess.run(
        [sys.executable, "-m", "evenlight.cli", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def _pipe_nobody_reads():
    reader, writer = os.pipe()
    os.close(reader)
    return writer
