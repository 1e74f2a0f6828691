"""FastSAM: loading without trust, features, decoding, and the shipped weights on drawn shapes."""

import os
import subprocess
import sys
import zipfile
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evenlight.cache.errors import EnvironmentLacks
from evenlight.stages.priors import fastsam
from evenlight.stages.priors.fastsam import load_network, load_segmenter
from evenlight.stages.settings import RegionSettings

SHIPPED = Path(str(files("evenlight.stages.weights") / "fastsam-n.safetensors"))


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter(RegionSettings())


@pytest.fixture(scope="module")
def shapes():
    """A green disc and an orange box on blue, 192x256, and the mask of each."""
    rows, columns = np.mgrid[:192, :256]
    disc = (rows - 90) ** 2 + (columns - 70) ** 2 < 45**2
    box = (abs(rows - 110) < 50) & (abs(columns - 190) < 35)
    photo = np.full((192, 256, 3), (70, 110, 200), np.uint8)
    photo[disc], photo[box] = (60, 170, 70), (230, 150, 40)
    return photo, disc, box


def photo_of(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


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


# Loading


@pytest.mark.parametrize(("width", "channels"), [("n", 64), ("s", 128)])
def test_an_ultralytics_checkpoint_loads_with_its_own_weights(tmp_path, width, channels):
    saved = ultralytics_checkpoint(tmp_path / "FastSAM.pt", width=width)
    loaded = load_network(tmp_path / "FastSAM.pt")
    assert load(tmp_path / "FastSAM.pt").p3_channels == channels
    expected, got = saved.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name].float(), got[name].float()) for name in expected)


def test_the_fingerprint_is_the_sha256_of_the_file(segmenter):
    assert segmenter.fingerprint == sha256(SHIPPED.read_bytes()).hexdigest()


def test_a_path_gives_the_same_segmenter_as_the_shipped_name(segmenter, shapes):
    by_path = load(SHIPPED)
    assert by_path.fingerprint == segmenter.fingerprint
    assert (by_path.segment(shapes[0]).labels == segmenter.segment(shapes[0]).labels).all()


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


# Features and decoding


def test_the_network_is_run_and_decoded_as_ultralytics_does(segmenter):
    photo = torch.from_numpy(photo_of(128, 160)).permute(2, 0, 1)[None].float() / 255
    network = load_network(SHIPPED).eval()
    many = fastsam.FastSAM(load_network(SHIPPED), RegionSettings(confidence=0.003), "0" * 64)
    with torch.no_grad():
        (decoded, proto), _ = network(photo)
        ours = many._detections(many._run(photo, 21), 128, 160)
    assert torch.allclose(segmenter.features(photo)[0], proto, atol=1e-4)
    x, y, w, h, score = decoded[0, :5]
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    boxes = fastsam._snapped(boxes, 128, 160)
    assert len(ours[0]) > 8
    for box, ours_score, coefficients in zip(*ours, strict=True):
        near = (boxes - box).abs().amax(1) + (score - ours_score).abs()
        assert near.min() < 1e-3
        assert torch.allclose(decoded[0, 5:, near.argmin()], coefficients, atol=1e-4)


def test_features_carry_gradients_to_the_photo_and_none_to_the_weights(segmenter):
    photo = torch.rand(2, 3, 64, 96, requires_grad=True)
    proto, p3 = segmenter.features(photo)
    assert proto.shape == (2, 32, 16, 24) and p3.shape == (2, segmenter.p3_channels, 8, 12)
    (proto.square().mean() + p3.square().mean()).backward()
    assert photo.grad.isfinite().all() and photo.grad.abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in segmenter.layers.parameters())


def test_features_of_a_photo_do_not_depend_on_its_batch(segmenter):
    photos = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    together = segmenter.features(photos)
    for index in range(3):
        alone = segmenter.features(photos[index : index + 1])
        for one, many in zip(alone, together, strict=True):
            assert torch.allclose(one[0], many[index], atol=1e-4)


def test_segment_stores_the_features_that_features_gives(segmenter):
    photo = photo_of(96, 128)
    regions = segmenter.segment(photo)
    proto, p3 = segmenter.features(torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255)
    assert regions.proto.dtype == regions.p3.dtype == np.float16
    assert np.allclose(regions.proto, proto[0].numpy(), rtol=1e-3, atol=1e-3)
    assert np.allclose(regions.p3, p3[0].numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(72, 104), (64, 64), (8, 248)])
def test_sides_of_any_multiple_of_8_come_back_as_they_were(segmenter, height, width):
    regions = segmenter.segment(photo_of(height, width))
    assert regions.labels.shape == (height, width) and regions.labels.dtype == np.uint8
    assert regions.proto.shape == (32, height // 4, width // 4)
    assert regions.p3.shape == (segmenter.p3_channels, height // 8, width // 8)


def test_what_lies_outside_the_extent_changes_nothing(segmenter, shapes):
    canvas = np.full((256, 256, 3), 255, np.uint8)
    canvas[:192] = shapes[0]
    whole, part = segmenter.segment(shapes[0]), segmenter.segment(canvas, extent=(192, 256))
    assert (part.labels[:192] == whole.labels).all() and not part.labels[192:].any()
    assert (part.proto[:, :48] == whole.proto).all() and not part.proto[:, 48:].any()
    assert (part.p3[:, :24] == whole.p3).all() and not part.p3[:, 24:].any()


def test_masks_at_full_size_follow_the_interpolated_prototypes():
    generator = torch.Generator().manual_seed(0)
    proto = torch.randn(32, 16, 24, generator=generator)
    coefficients = torch.randn(3, 32, generator=generator)
    boxes = torch.tensor([[0.0, 0.0, 96.0, 64.0], [13.2, 7.7, 61.0, 42.4], [50.0, 3.0, 96.0, 64.0]])
    masks = fastsam._masks(proto, coefficients, boxes, (64, 96))
    logits = torch.einsum("kc,chw->khw", coefficients, proto)[None]
    full = torch.nn.functional.interpolate(logits, (64, 96), mode="bilinear")[0] > 0
    for mask, expected, box in zip(masks, full.numpy(), boxes.round().int().tolist(), strict=True):
        x1, y1, x2, y2 = box
        inside = np.zeros_like(mask)
        inside[y1:y2, x1:x2] = True
        assert (mask == (expected & inside)).all()


def test_boxes_that_end_near_the_frame_reach_it():
    boxes = torch.tensor([[2.0, 30.0, 99.0, 50.0], [-5.0, 1.0, 60.0, 47.0]])
    expected = torch.tensor([[0.0, 30.0, 100.0, 50.0], [0.0, 0.0, 60.0, 47.0]])
    assert torch.equal(fastsam._snapped(boxes, 50, 100), expected)


def test_a_photo_without_any_object_is_one_region(segmenter):
    unsure = fastsam.FastSAM(load_network(SHIPPED), RegionSettings(confidence=1.0), "0" * 64)
    assert (unsure.segment(photo_of(64, 96)).labels == 1).all()


# The shipped weights


def test_the_shipped_weights_tell_drawn_shapes_apart(segmenter, shapes):
    photo, disc, box = shapes
    labels = segmenter.segment(photo).labels
    assert labels.max() > 1
    for shape in (disc, box):
        overlaps = [
            (shape & (labels == label)).sum() / (shape | (labels == label)).sum()
            for label in range(1, labels.max() + 1)
        ]
        assert max(overlaps) > 0.7
