"""FastSAM: features, decoding, region maps, and the shipped weights on drawn shapes."""

import numpy as np
import pytest
import torch

from evenlight.cache.errors import UsageError
from evenlight.stages.priors import fastsam, segmenting
from evenlight.stages.priors.fastsam import load_network, load_segmenter
from evenlight.stages.settings import RegionSettings
from evenlight.stages.weights import shipped

SHIPPED = shipped("fastsam-n")


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


# Features and decoding


def test_the_network_is_run_and_decoded_as_ultralytics_does(segmenter):
    photo = torch.from_numpy(photo_of(128, 160)).permute(2, 0, 1)[None].float() / 255
    network = load_network(SHIPPED).eval()
    many = fastsam.FastSAM(load_network(SHIPPED), RegionSettings(confidence=0.003), "0" * 64)
    with torch.no_grad():
        (decoded, proto), _ = network(photo)
        _, found, *rest = many.boxes(photo)
    ours = segmenting.snapped(found, 128, 160), *rest
    assert torch.allclose(segmenter.features(photo)[0], proto, atol=1e-4)
    x, y, w, h, score = decoded[0, :5]
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    boxes = segmenting.snapped(boxes, 128, 160)
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


def test_masks_follow_the_interpolated_prototypes_inside_their_boxes():
    generator = torch.Generator().manual_seed(0)
    proto = torch.randn(32, 16, 24, generator=generator)
    coefficients = torch.randn(3, 32, generator=generator)
    boxes = torch.tensor([[0.0, 0.0, 96.0, 64.0], [13.2, 7.7, 61.0, 42.4], [50.0, 4.0, 96.0, 64.0]])
    masks = segmenting.masks(proto, coefficients, boxes)
    logits = torch.einsum("kc,chw->khw", coefficients, proto)[None]
    full = torch.nn.functional.interpolate(logits, (32, 48), mode="bilinear")[0].sigmoid()
    inside = torch.zeros(3, 32, 48)
    # A pixel of the half-size mask counts where its middle lies in the box.
    inside[0], inside[1, 4:21, 7:30], inside[2, 2:, 25:] = 1, 1, 1
    assert torch.allclose(masks, full * inside, atol=1e-5)


def test_boxes_that_end_near_the_frame_reach_it():
    boxes = torch.tensor([[2.0, 30.0, 99.0, 50.0], [-5.0, 1.0, 60.0, 47.0]])
    expected = torch.tensor([[0.0, 30.0, 100.0, 50.0], [0.0, 0.0, 60.0, 47.0]])
    assert torch.equal(segmenting.snapped(boxes, 50, 100), expected)


def test_a_photo_without_any_object_is_one_region():
    unsure = fastsam.FastSAM(load_network(SHIPPED), RegionSettings(confidence=1.0), "0" * 64)
    labels, covered = unsure.painted(photo_of(64, 96))
    assert (labels == 1).all() and covered == 0
    assert (unsure.segment(photo_of(64, 96)).labels == 1).all()


def test_no_pixel_of_a_photo_is_without_a_region(segmenter, shapes):
    for photo in (shapes[0], photo_of(248, 64), np.zeros((64, 64, 3), np.uint8)):
        assert segmenter.segment(photo).labels.min() >= 1


def test_a_larger_copy_of_a_photo_has_the_same_regions(segmenter, shapes):
    labels = segmenter.regions(shapes[0])
    large = segmenter.regions(shapes[0].repeat(4, 0).repeat(4, 1))
    assert (large[2::4, 2::4] == labels).mean() > 0.97


def test_masks_are_found_at_the_side_that_the_settings_name(shapes):
    coarse, fine = (
        fastsam.FastSAM(load_network(SHIPPED), RegionSettings(side=side), "0" * 64)
        for side in (128, 256)
    )
    assert coarse.painted(shapes[0])[0].shape == (48, 64)
    assert fine.painted(shapes[0])[0].shape == (96, 128)
    with pytest.raises(UsageError, match=r"regions\.side must be a multiple of 32"):
        RegionSettings(side=100)


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
