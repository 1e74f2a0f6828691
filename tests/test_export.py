"""Exported models: without torch, photos come out as with it; what is amiss is said in words."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from torch.export import Dim
from toy_corrector import run_cli

from evenlight.cache.errors import EnvironmentLacks, EvenlightError, StoreError, UsageError
from evenlight.cache.files import read_json, write_json
from evenlight.pipeline import config
from evenlight.pipeline.correct import correct_files
from evenlight.pipeline.export import export
from evenlight.pipeline.load import load_predictor
from evenlight.pipeline.models import load_models, priors_of
from evenlight.stages import exporting
from evenlight.stages.corrector.checkpoint import save_corrector
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.priors.judge import Judge
from evenlight.stages.settings import Settings

TOLERANCE = 2  # levels of 255 between the two at a pixel; all but one in a thousand are within 1
WITHOUT_TORCH = """
import sys
sys.modules.update(torch=None, torchvision=None)  # to import either is an error
from evenlight.cli import main
main()
"""


def trained(settings: Settings, p3_channels: int) -> Corrector:
    """A tiny corrector as after training."""
    torch.manual_seed(0)
    network = Corrector(settings.network, p3_channels).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny corrector with the priors that ship."""
    settings = config.build(overrides=["network.size=tiny", "train.size=128", "photo.size=256"])
    models = load_models(settings)
    network = trained(settings, models.segmenter.p3_channels)
    judge = Judge.shipped(models.clip)
    info = {"settings": config.to_dict(settings), "priors": priors_of(models, judge.fingerprint)}
    extra = {f"judge.{name}": tensor for name, tensor in judge.tensors.items()}
    return save_corrector(tmp_path_factory.mktemp("model"), network, info, extra)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(model, folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Dark, bright, deep, gray, and one eight times as wide as high."""
    folder = tmp_path_factory.mktemp("photos")
    bright = np.minimum(data.coffee().astype(int) * 2, 255).astype(np.uint8)
    for name, pixels in (
        ("dark.png", data.astronaut() // 4),
        ("bright.png", bright),
        ("deep.png", data.chelsea().astype(np.uint16) * 60),
        ("gray.png", data.camera() // 3),
        ("wide.png", data.rocket()[:80, :640] // 2),
    ):
        pixels = pixels[..., ::-1] if pixels.ndim == 3 else pixels
        cv2.imwrite(str(folder / name), pixels)
    return folder


def read(path: Path) -> np.ndarray:
    """In levels of 255."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return pixels.astype(float) / (257 if pixels.dtype == np.uint16 else 1)


@pytest.mark.slow
def test_a_process_without_torch_gives_the_pictures_of_torch(exported, model, photos, tmp_path):
    correct_files(photos, tmp_path / "torch", model=model, settings={"judge.prior_good": 0.0})
    arguments = ["correct", photos, "--runtime", "onnx", "-m", exported, "-o", tmp_path / "onnx"]
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments), "--all", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whats = {row["name"]: row["what"] for row in json.loads(done.stdout)["photos"]}
    assert whats["dark.png"] == "brightened" and whats["bright.png"] == "darkened"
    for photo in sorted(photos.iterdir()):
        ours, torchs = (read(tmp_path / runtime / photo.name) for runtime in ("onnx", "torch"))
        apart = np.abs(ours - torchs)
        assert apart.max() <= TOLERANCE and (apart > 1).mean() < 1e-3, (photo.name, apart.max())
        assert np.abs(ours - read(photo)).mean() > 3


@pytest.mark.slow
def test_a_network_of_the_paper_s_kind_is_exported_as_well():
    kind = ["network.head=residual", "network.attention=channel"]
    settings = config.build(overrides=["network.size=tiny", "train.size=64", *kind])
    models = load_models(settings)
    network = trained(settings, models.segmenter.p3_channels)
    judge = Judge.shipped(models.clip)
    exports = exporting.exports_of(network, models.segmenter, models.clip, judge, settings)
    _, difference = exporting.graph_of("corrector", exports["corrector"])
    assert difference < exporting.TOLERANCE


@pytest.mark.slow
def test_an_export_stands_by_what_it_found_and_the_same_photo_is_not_done_twice(
    exported, photos, tmp_path
):
    card = read_json(exported / "evenlight.json")
    assert set(card["graphs"]) == {path.stem for path in exported.glob("*.onnx")}
    assert all(0 <= file["difference"] <= exporting.TOLERANCE for file in card["graphs"].values())
    given = {"model": exported, "runtime": "onnx"}
    first, second = (correct_files(photos, tmp_path / "out", **given) for _ in range(2))
    assert len(first.corrected) == len(second.skipped) == 5


@pytest.mark.slow
def test_what_is_amiss_with_a_folder_is_said_in_words(exported, model, tmp_path):
    def refused(folder: Path | None, error: type[EvenlightError], words: str, **settings) -> None:
        with pytest.raises(error, match=words):
            load_predictor(folder, runtime="onnx", settings=settings)

    refused(None, UsageError, "-m FOLDER, one that 'evenlight export' made")
    refused(model, StoreError, r"no exported corrector \(evenlight.json is missing\)")
    refused(exported, UsageError, "works on the CPU", **{"run.device": "cuda"})
    refused(exported, UsageError, "cannot be changed after training", **{"photo.size": 512})
    with pytest.raises(UsageError, match="holds an exported corrector: --runtime onnx runs it"):
        load_predictor(exported)
    folder = shutil.copytree(exported, tmp_path / "copy")
    clip = (folder / "clip.onnx").read_bytes()
    (folder / "clip.onnx").write_bytes(clip[:-1] + bytes([clip[-1] ^ 1]))
    refused(folder, StoreError, "clip.onnx is damaged")
    (folder / "clip.onnx").unlink()
    refused(folder, StoreError, "clip.onnx cannot be read: No such file")
    card = read_json(exported / "evenlight.json")
    for field, value, words in (
        ("format", 1, "has format 1, this version reads 4"),
        ("graphs", {}, "evenlight.json is damaged: it: .*graphs"),
        ("multiple", 12, "damaged: it: .*multiple 12"),
        ("settings", {"photo": {"sides": 5}}, "settings this version does not know"),
        ("priors", {}, r"damaged: priors\.segmenter"),
    ):
        write_json(folder / "evenlight.json", card | {field: value})
        refused(folder, StoreError, words)


def test_what_needs_torch_says_so_where_there_is_none(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), data.astronaut())
    command = [sys.executable, "-c", WITHOUT_TORCH, "correct", str(tmp_path), "-o", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 4 and "evenlight: this needs torch" in done.stderr


def test_a_graph_that_answers_otherwise_than_its_model_is_refused():
    def drifting(x: torch.Tensor) -> tuple[torch.Tensor]:
        calls.append(x)
        return (layer(x) + len(calls),)

    layer, calls = torch.nn.Linear(3, 2), []
    one = exporting.Export(
        owner=layer,
        call=drifting,
        outputs=("y",),
        shapes=({0: Dim("rows", min=1, max=4)},),
        draw=lambda rows, _: (torch.rand(rows, 3),),
        most=4,
    )
    with pytest.raises(
        EvenlightError, match=r"toy answers otherwise than the model, by .* nothing"
    ):
        exporting.graph_of("toy", one)


def test_nothing_is_written_where_a_graph_cannot_be_made(model, tmp_path, monkeypatch, capsys):
    def graph_of(name, export):
        if name == "clip":
            raise EvenlightError("the clip cannot be exported: nothing was written")
        return b"graph", 0.0

    monkeypatch.setattr(exporting, "graph_of", graph_of)
    assert run_cli(monkeypatch, "export", model, "-o", tmp_path / "out") == 1
    assert "the clip cannot be exported" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_an_export_needs_is_said_before_anything_is_loaded(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="to onnx, got 'coreml'"):
        export(None, tmp_path, to="coreml")
    monkeypatch.setattr("evenlight.pipeline.export.NEEDS", ("onnx", "no_such_package"))
    with pytest.raises(EnvironmentLacks, match=r"needs no_such_package: pip install"):
        export(None, tmp_path)
