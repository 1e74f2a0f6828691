"""What a step sees: streams from cached tensors, as a function of seed and step alone."""

from dataclasses import replace

import pytest
import torch
from test_training import toy_data
from torch import Tensor
from torch.nn import functional as F

from evenlight.cache.errors import UsageError
from evenlight.stages.corrector import told
from evenlight.stages.corrector.batches import Batch, take
from evenlight.stages.corrector.cached import TrainingData
from evenlight.stages.corrector.camera import Camera, blocky, draw_camera, mis_exposed
from evenlight.stages.corrector.scenes import find_scenes, pairs
from evenlight.stages.corrector.streams import (
    Pools,
    draw,
    plan_streams,
    rows,
    split_photos,
    validation_draws,
)
from evenlight.stages.corrector.told import Told, draw_told
from evenlight.stages.pixels import luma
from evenlight.stages.priors import tone
from evenlight.stages.settings import TrainSettings

CPU = torch.device("cpu")
SETTINGS = TrainSettings(good=3, scenes=2, bad=1, crop=32, size=64)
POOLS = Pools(
    good=[(i, i) for i in (0, 2, 3, 5, 7, 8)], bad=[(1, 1), (4, 4)], scenes=[(9, 10), (10, 11)]
)
RIGHT = Camera(shape=1.6, gain=0.0, white=1.0, noise=0.0, regions=-1, soft=1)


def scene(count: int = 3, side: int = 64, seed: int = 0) -> Tensor:
    """Frames of one picture, from dark to bright."""
    generator = torch.Generator().manual_seed(seed)
    picture = F.interpolate(torch.rand(1, 3, 9, 9, generator=generator), (side, side))
    return tone.apply("film", picture, torch.linspace(-1.2, 1.2, count)[:, None, None, None])


def seen(data: TrainingData, settings: TrainSettings, step: int, pools: Pools) -> Batch:
    extents = data.extent.tolist()
    return take(data, extents, draw(step, pools, extents, settings), settings.crop, CPU)


def test_draws_are_a_function_of_seed_and_step_and_visit_every_photo():
    extents = [(64, 40)] * 12
    draws = [draw(step, POOLS, extents, SETTINGS) for step in range(12)]
    assert draws == [draw(step, POOLS, extents, SETTINGS) for step in range(12)]
    assert draws != [draw(s, POOLS, extents, replace(SETTINGS, seed=1)) for s in range(12)]
    assert draw(7, POOLS, extents, SETTINGS) == draws[7]
    assert len({one.noise for one in draws}) == 12
    good = [s.photo for one in draws for s in one.samples if s.stream == "good"]
    for epoch in range(len(good) // 6):
        assert sorted(good[6 * epoch : 6 * epoch + 6]) == [0, 2, 3, 5, 7, 8]
    for one in draws:
        assert [s.stream for s in one.samples] == ["good"] * 3 + ["scenes"] * 2 + ["bad"]
        for s in one.samples:
            assert s.corner[0] in range(0, 33, 8) and s.corner[1] in (0, 8)
            assert (s.camera is None) == (s.stream != "good")
            assert (s.photo, s.target) in getattr(POOLS, s.stream)
        top, left, height, width = one.view
        assert min(top, left) >= 0 and max(top + height, left + width) <= 32
        assert height >= 0.6 * 32 - 1


def test_batches_are_a_function_of_their_draw():
    data = toy_data()
    pools, _ = plan_streams(data.about, SETTINGS)
    settings = replace(SETTINGS, size=32)
    one, other = (seen(data, settings, 3, pools) for _ in range(2))
    for x, y in zip(one[:-2], other[:-2], strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(one.photo, seen(data, settings, 4, pools).photo)


def test_a_jpeg_keeps_blocks_in_steps_and_no_step_keeps_the_photo():
    photo = scene(1, 32)
    quanta = torch.tensor([0.0, 2 / 255, 9 / 255]).view(-1, 1, 1, 1)
    kept = blocky(photo.expand(3, -1, -1, -1), quanta)
    assert torch.equal(kept[0], photo[0])
    fine, coarse = ((x - photo[0]).abs().mean() * 255 for x in kept[1:])
    assert 0.1 < fine < coarse < 12
    flat = blocky(torch.full((1, 3, 16, 16), 0.4), quanta[2:])
    assert float((flat - flat.mean((2, 3), keepdim=True)).abs().max()) < 1e-5
    assert float((flat - 0.4).abs().max()) * 255 < 9 / 8  # a step of a block's sum, over 8


def test_a_stream_without_photos_leaves_its_rows_to_another_and_one_with_0_has_none():
    assert rows(POOLS, SETTINGS) == {"good": 3, "scenes": 2, "bad": 1}
    assert rows(POOLS._replace(scenes=[]), SETTINGS) == {"good": 5, "bad": 1}
    assert rows(POOLS._replace(good=[]), SETTINGS) == {"scenes": 5, "bad": 1}
    assert rows(POOLS, replace(SETTINGS, good=0)) == {"scenes": 2, "bad": 1}
    with pytest.raises(UsageError, match=r"no photo for the streams .*train\.good"):
        rows(POOLS._replace(bad=[]), replace(SETTINGS, good=0, scenes=0))
    with pytest.raises(UsageError, match="must be above 0"):
        TrainSettings(good=0, scenes=0, bad=0)


def test_streams_follow_the_judge_and_blank_photos_teach_nothing():
    data = toy_data()
    data.photo[3], data.photo[0] = 255, 0  # good: white paper and a black frame
    train, held_out = plan_streams(data.about, TrainSettings(size=32, crop=32))
    good, bad = (sorted(getattr(train, k) + getattr(held_out, k)) for k in ("good", "bad"))
    assert {i for i, _ in good} == {6, 9} and {i for i, _ in bad} == {1, 2, 4, 5, 7, 8, 10, 11}
    assert len(train.scenes) == len(held_out.scenes) > 0
    paper = TrainSettings(size=32, crop=32, good=0, scenes=0)
    train, held_out = plan_streams(data.about, paper)
    assert not train.good and not train.scenes and not held_out.scenes
    assert {i for i, _ in train.bad + held_out.bad} == {1, 2, 4, 5, 6, 7, 8, 9, 10, 11}


def test_held_out_photos_are_never_trained_on_and_scenes_stay_whole():
    scenes = [[10 * k + i for i in range(4)] for k in range(6)]
    photos, held_out = split_photos([True] * 100, scenes, TrainSettings(held_out=0.03))
    assert sorted(photos + held_out) == list(range(100))
    assert len(held_out) == 2 + 4
    assert all(set(scene) <= set(photos) or set(scene) <= set(held_out) for scene in scenes)
    with pytest.raises(UsageError, match="at least 2 photos"):
        split_photos([True, False], [], TrainSettings())
    one_scene = split_photos([True] * 3, [[0, 1, 2]], TrainSettings())
    assert len(one_scene[0]) == 2 and len(one_scene[1]) == 1


def test_validation_is_of_known_answers_and_always_the_same():
    draws = validation_draws(POOLS, SETTINGS)
    assert draws == validation_draws(POOLS, SETTINGS)
    assert [one.samples[0].stream for one in draws] == ["good"] * 6 + ["scenes"] * 2
    only_bad = validation_draws(Pools([], [(4, 4)], []), SETTINGS)
    assert [(one.samples[0].stream, one.samples[0].photo) for one in only_bad] == [("bad", 4)]
    many = validation_draws(POOLS._replace(good=[(i, i) for i in range(1000)]), SETTINGS)
    assert len(many) < 60


def test_scenes_are_folders_whose_photos_show_the_same_edges():
    frames, others = scene(4), torch.cat([scene(1, seed=k) for k in range(1, 5)])
    names = [f"a/{i}.jpg" for i in range(4)] + [f"b/{i}.jpg" for i in range(4)]
    assert find_scenes(names, torch.cat([frames, others])) == [[0, 1, 2, 3]]
    assert find_scenes(["a/0.jpg", "a/1.jpg", "c/2.jpg"], frames[:3]) == []
    mixed = torch.cat([frames[:3], others[:1]])
    assert find_scenes([f"a/{i}.jpg" for i in range(4)], mixed) == [[0, 1, 2]]


def test_any_frame_is_paired_with_each_middling_one_that_is_exposed_otherwise():
    extents = [(64, 64)] * 4
    small = torch.tensor([0.1, 0.4, 0.45, 0.9]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    assert pairs(range(4), small, extents) == [(0, 1), (3, 1), (0, 2), (3, 2)]
    extents[3] = (64, 48)
    assert pairs(range(4), small, extents) == [(0, 1), (0, 2)]
    out_of_reach = small * torch.tensor([0.01, 1, 1, 1]).view(4, 1, 1, 1)
    assert pairs(range(4), out_of_reach, extents) == []


def test_brightness_is_divided_out():
    data = toy_data()
    settings = replace(SETTINGS, size=32, apart=0.0)
    pools, _ = plan_streams(data.about, settings)
    for step in range(4):
        batch = seen(data, settings, step, pools)
        assert torch.equal(batch.given.amin((1, 2, 3)), batch.given.amax((1, 2, 3)))
        toned = tone.apply("film", batch.photo, batch.given)
        got, wanted = (luma(x).mean((1, 2, 3)) for x in (toned, batch.target))
        within_reach = batch.given[:, 0, 0, 0].abs() < 2.9
        assert torch.allclose(got[within_reach], wanted[within_reach], atol=0.03)


def unevenly_lit() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A photo whose right half is too dark, its answer, its two regions, its strength: 0."""
    target = scene(1)
    labels = torch.ones(1, 64, 64).byte()
    labels[..., 32:] = 7
    strengths = torch.where(labels == 7, -0.8, 0.2)[:, None]
    return tone.apply("film", target, strengths), target, labels, torch.zeros(1)


def test_the_judge_is_taken_to_set_regions_apart_rightly_but_for_its_errors(monkeypatch):
    photo, target, labels, whole = unevenly_lit()
    wrong = told.given(photo, target, labels, whole, [Told(1.0, 5)])
    monkeypatch.setattr(told, "ERROR", 0.0)
    monkeypatch.setattr(told, "OFF", 0)
    right, half, none = (
        told.given(photo, target, labels, whole, [Told(share, 5)])[0, 0] for share in (1.0, 0.5, 0)
    )
    assert torch.allclose(right[:, 40:] - right[:, :24].mean(), torch.tensor(1.0), atol=0.08)
    assert float(right.mean()) == pytest.approx(0, abs=0.02)  # it is of the photo's strength
    assert torch.allclose(half, right / 2, atol=1e-5) and not none.any()
    assert float((wrong - right).abs().max()) > 0.1


def test_borders_of_what_the_judge_says_lie_a_little_off(monkeypatch):
    photo, target, labels, whole = unevenly_lit()
    monkeypatch.setattr(told, "ERROR", 0.0)
    places = set()
    for seed in range(30):
        row = told.given(photo, target, labels, whole, [Told(1.0, seed)])[0, 0, 32]
        places.add(int((row[8:56] > 0).nonzero()[0]) + 8 - 32)
    assert min(places) in (-4, -5, -6) and max(places) in (3, 4, 5)


def test_what_is_said_of_regions_is_drawn_for_a_share_of_photos():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_told(generator, 0.6) for _ in range(400)]
    assert 0.5 < sum(one.share > 0 for one in drawn) / 400 < 0.7
    assert {0.4 <= one.share <= 1 for one in drawn if one.share} == {True}
    assert not any(draw_told(generator, 0.0).share for _ in range(50))
    samples = [
        s for step in range(30) for s in draw(step, POOLS, [(64, 40)] * 12, SETTINGS).samples
    ]
    differ = [s.camera is not None and s.camera.regions >= 0 for s in samples]
    assert not any(s.told.share for s, apart in zip(samples, differ, strict=True) if not apart)
    assert any(s.told.share for s in samples)


def test_a_camera_that_errs_in_nothing_keeps_the_photo():
    photo = scene()
    kept = mis_exposed(photo, torch.zeros(3, 64, 64).byte(), [RIGHT] * 3, torch.randn(photo.shape))
    assert float((kept - photo).abs().max()) < 3 / 255


def test_an_over_exposing_camera_clips_channels_on_their_own():
    photo = torch.tensor([0.8, 0.5, 0.2]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    over = RIGHT._replace(gain=1.6, white=0.9)
    kept = mis_exposed(photo, torch.zeros(1, 32, 32).byte(), [over], torch.randn(photo.shape))
    assert float(kept[0, 0].min()) == 1 and float(kept[0, 2].max()) < 0.95


def test_regions_are_exposed_otherwise_with_soft_borders():
    labels = torch.zeros(1, 64, 64).byte()
    labels[..., 32:] = 1
    photo = torch.full((1, 3, 64, 64), 0.4)
    found = []
    for seed in range(40):
        camera = RIGHT._replace(regions=seed, soft=2)
        kept = mis_exposed(photo, labels, [camera], torch.randn(photo.shape))[0, 0, 32]
        left, right = float(kept[0]), float(kept[-1])
        found.append(abs(left - right) > 0.05)
        assert float(kept.diff().abs().max()) < 0.5 * abs(left - right) + 2 / 255
    assert any(found) and not all(found)


def test_cameras_are_of_many_kinds():
    generator = torch.Generator().manual_seed(0)
    cameras = [draw_camera(generator, 1 / 3) for _ in range(600)]
    assert (
        0.6 < sum(c.gain > 0 for c in cameras if c.gain) / sum(c.gain != 0 for c in cameras) < 0.8
    )
    assert 0.25 < sum(c.regions >= 0 for c in cameras) / 600 < 0.42
    assert all(c.white == 1 for c in cameras if c.gain <= 0)
    assert {c.gain == 0 for c in cameras if c.regions < 0} == {False}
    assert all(draw_camera(generator, 0).regions < 0 for _ in range(50))


def moved_and_lost() -> TrainingData:
    """A dark and a middling frame; on the left something moved, on the right is white."""
    data = toy_data(2, 64)
    frames = scene()
    photo, target = frames[2].clone(), frames[1].clone()
    photo[:, :24, :24] = 0.1
    target[:, :24, :24] = 0.8
    photo[:, :, 40:] = 1.0
    shown = (torch.stack([photo, target]) * 255).round().byte()
    return replace(data, photo=shown, extent=torch.full((2, 2), 64))


def test_motion_is_masked_and_what_was_lost_is_not():
    pools = Pools(good=[], bad=[], scenes=[(0, 1)])
    settings = TrainSettings(good=0, scenes=1, bad=0, size=64, crop=64)
    data = moved_and_lost()
    batch = seen(data, settings, 0, pools)
    known = batch.confidence[0, 0]
    known = known.flip(-1) if batch.chosen.samples[0].flip else known
    assert float(known[4:20, 4:20].max()) == 0
    assert float(known[:, 44:].min()) == 1
    assert float(known[40:, :36].mean()) > 0.9


def test_a_pseudo_gt_answers_for_nothing_that_is_clipped():
    data = replace(moved_and_lost(), well_exposed=torch.tensor([False, False]))
    settings = TrainSettings(good=0, scenes=0, bad=1, size=64, crop=64)
    batch = seen(data, settings, 0, Pools([], [(0, 0)], []))
    clipped = (batch.photo >= 254 / 255).any(1, keepdim=True)
    assert bool(clipped.any())
    assert torch.equal(batch.confidence > 0, ~clipped)


def test_crops_of_every_array_show_the_same_place():
    """All arrays hold their own coordinates, so a crop must agree with itself after any flip."""
    side, crop = 64, 32
    rows_, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([rows_, columns, rows_ + columns])[None].repeat(2, 1, 1, 1).byte()
    data = TrainingData(
        photo=place,
        extent=torch.tensor([[64, 64], [48, 24]]),
        proto=place[:, :1, ::4, ::4].expand(-1, 32, -1, -1).half(),
        p3=place[:, 1:2, ::8, ::8].half(),
        regions=place[:, 1],
        pseudo_gt=place,
        confidence=torch.ones(2, 16, 16).half(),
        well_exposed=torch.tensor([False, False]),
        names=["a", "b"],
    )
    settings = TrainSettings(good=0, scenes=0, bad=4, crop=crop, size=side)
    pools = Pools([], [(0, 0), (1, 1)], [])
    flipped = 0
    for step in range(20):
        batch = seen(data, settings, step, pools)
        target = (batch.target * 255).round()
        assert torch.equal(batch.labels.float(), target[:, 1])
        assert torch.equal((batch.photo * 255).round(), target)
        for row, sample in enumerate(batch.chosen.samples):
            top, left = sample.corner
            straight, proto, p3 = (
                x[row].flip(-1) if sample.flip else x[row]
                for x in (batch.target, batch.proto, batch.p3)
            )
            assert (straight[0, 0, 0] * 255).round() == top
            assert (straight[1, 0, 0] * 255).round() == left
            assert float(proto[0, 0, 0]) == top and float(p3[0, 0, 0]) == left
            height, width = data.extent[sample.photo].tolist()
            inside = (target[row, 0] < height) & (target[row, 1] < width)
            assert torch.equal(batch.confidence[row, 0], inside.float())
            flipped += sample.flip
    assert flipped > 5
