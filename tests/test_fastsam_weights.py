"""FastSAM weight files: read without trust, refused in words, nothing in them ever called."""

import os
import subprocess
import sys
import zipfile
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save_file

from evenlight.cache.errors import EnvironmentLacks
from evenlight.stages.priors import fastsam
from evenlight.stages.priors.fastsam import load_network, load_segmenter
from evenlight.stages.settings import RegionSettings
from evenlight.stages.weights import shipped

SHIPPED = shipped("fastsam-n")


def load(path):
    return load_segmenter(RegionSettings(segmenter=str(path)))


def ultralytics_checkpoint(path, *, width="n", nc=1, change=None):
    """A checkpoint as ultralytics saves one: the pickled module in float16 and its settings."""
    torch.manual_seed(0)
    network = fastsam._tasks.SegmentationModel(f"yolov8{width}-seg.yaml", nc=nc, verbose=False)
    content = {"epoch": -1, "best_fitness": None, "model": network.half(), "ema": None}
    content |= {"optimizer": None, "train_args": {"task": "segment"}, "version": "8.4.190"}
    if change:
        change(network)
    torch.save(content, path)
    return network


@pytest.mark.parametrize(("width", "channels"), [("n", 64), ("s", 128)])
def test_an_ultralytics_checkpoint_loads_with_its_own_weights(tmp_path, width, channels):
    saved = ultralytics_checkpoint(tmp_path / "FastSAM.pt", width=width)
    loaded = load_network(tmp_path / "FastSAM.pt")
    assert load(tmp_path / "FastSAM.pt").p3_channels == channels
    expected, got = saved.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name].float(), got[name].float()) for name in expected)


def test_the_fingerprint_is_the_sha256_of_the_file():
    assert load_segmenter(RegionSettings()).fingerprint == sha256(SHIPPED.read_bytes()).hexdigest()


def test_a_path_gives_the_same_segmenter_as_the_shipped_name():
    photo = torch.rand(1, 3, 64, 64)
    named, by_path = load_segmenter(RegionSettings()), load(SHIPPED)
    assert by_path.fingerprint == named.fingerprint
    assert torch.equal(by_path.features(photo)[0], named.features(photo)[0])


def test_missing_weights_are_named_with_what_to_do(tmp_path):
    with pytest.raises(EnvironmentLacks, match=r"FastSAM-s\.pt is not a file.*weights fetch"):
        load(tmp_path / "FastSAM-s.pt")


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_a_checkpoint_that_runs_a_command_is_refused_and_nothing_runs(tmp_path):
    path, trace = tmp_path / "hostile.pt", tmp_path / "trace"
    torch.save({"model": Calls(os.system, f"touch {trace}")}, path)
    with pytest.raises(EnvironmentLacks, match=r"hostile\.pt .*asks for (posix|nt)\.system"):
        load(path)
    assert not trace.exists()


def test_a_checkpoint_that_calls_ultralytics_itself_runs_nothing(tmp_path):
    path, trace = tmp_path / "hostile.pt", tmp_path / "trace"
    # parse_model evaluates the string "activation" of a model's description.
    description = {"activation": f"open({str(trace)!r}, 'w')", "nc": 1, "scales": {}}
    description |= {"backbone": [], "head": []}
    torch.save({"model": Calls(fastsam._tasks.SegmentationModel, description)}, path)
    with pytest.raises(EnvironmentLacks, match=r"hostile\.pt cannot be used"):
        load(path)
    assert not trace.exists()


def test_a_compressed_checkpoint_is_refused_before_it_unfolds(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(20_000_000))
    with pytest.raises(EnvironmentLacks, match=r"bomb\.pt .*compressed"):
        load(path)


def test_modules_that_hold_each_other_are_refused(tmp_path):
    path = tmp_path / "loop.pt"
    ultralytics_checkpoint(path, change=lambda network: network.model[0].add_module("up", network))
    with pytest.raises(EnvironmentLacks, match=r"loop\.pt .*modules"):
        load(path)


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_a_cut_file_is_refused(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".pt":
        ultralytics_checkpoint(path)
    data = SHIPPED.read_bytes() if path.suffix == ".safetensors" else path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(EnvironmentLacks, match=rf"{name} cannot be used"):
        load(path)


def test_a_model_of_80_classes_is_refused(tmp_path):
    ultralytics_checkpoint(tmp_path / "coco.pt", nc=80)
    with pytest.raises(EnvironmentLacks, match=r"coco\.pt .*one-class yolov8n-seg"):
        load(tmp_path / "coco.pt")


def drop(tensors):
    del tensors["model.3.conv.weight"]


def add(tensors):
    tensors["model.99.weight"] = torch.zeros(1)


def reshape(tensors):
    tensors["model.3.conv.weight"] = tensors["model.3.conv.weight"][:, :8].contiguous()


def spoil(tensors):
    tensors["model.3.conv.weight"][0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, r"model\.3\.conv\.weight: expected .*got None"),
        (add, r"model\.99\.weight: expected None"),
        (reshape, r"model\.3\.conv\.weight: expected .*32.*got .*8"),
        (spoil, r"NaN or infinity, first model\.3\.conv\.weight"),
        (dict.clear, r"first convolution"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_the_file(tmp_path, change, reason):
    tensors = load_file(SHIPPED)
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(EnvironmentLacks, match=r"changed\.safetensors .*" + reason):
        load(tmp_path / "changed.safetensors")


def test_loading_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(SHIPPED)
    assert torch.equal(torch.rand(4), expected)


def test_importing_opens_no_connection_and_leaves_threads_and_home_alone(tmp_path):
    script = """
import os, socket, sys
def refuse(*_, **__): raise AssertionError("opened a connection")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import cv2, torch
cv2.setNumThreads(3); torch.set_num_threads(2)
from evenlight.stages.priors.fastsam import load_segmenter
from evenlight.stages.settings import RegionSettings
from evenlight.stages.weights import shipped
load_segmenter(RegionSettings())
assert cv2.getNumThreads() == 3 and torch.get_num_threads() == 2
assert "OMP_NUM_THREADS" not in os.environ
from ultralytics.utils import ONLINE, SETTINGS
from ultralytics.utils.checks import AUTOINSTALL
assert not ONLINE and not SETTINGS["sync"] and not AUTOINSTALL
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "XDG_CONFIG_HOME": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "Ultralytics" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if "ltralytics" in path.name]
