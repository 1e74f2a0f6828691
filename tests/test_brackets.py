"""Frames of one scene are found by what they show, and share the best frame's target."""

import torch
from torch.nn import functional as F

from evenlight.stages.corrector.brackets import find_brackets, share_targets
from evenlight.stages.priors import tone


def scene(seed: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (32, 32), mode="bicubic").clamp(0.05, 0.95)


def frames(seed: int, exposures: tuple[float, ...]) -> list[torch.Tensor]:
    return [(tone.apply("ev", scene(seed), t) * 255).round() / 255 for t in exposures]


def found(names, photos, extents=None):
    extents = torch.full((len(names), 2), 64) if extents is None else extents
    return find_brackets(names, extents, torch.cat(photos))


def test_frames_of_one_scene_are_a_bracket_and_other_scenes_are_not():
    photos = frames(0, (-1.0, 0.0, 0.8)) + frames(1, (0.0, 0.5)) + frames(2, (0.0,))
    names = ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg", "6.jpg"]
    assert found(names, photos) == [[0, 1, 2], [3, 4]]


def test_numbers_in_names_count_as_numbers():
    photos = [*frames(0, (-0.5,)), *frames(1, (0.0,)), *frames(0, (0.5,))]
    assert found(["9.jpg", "11.jpg", "10.jpg"], photos) == [[0, 2]]


def test_a_bracket_stays_within_a_folder_and_a_size():
    photos = frames(0, (-0.5, 0.5))
    assert found(["a/1.jpg", "b/2.jpg"], photos) == []
    assert found(["a/1.jpg", "a/2.jpg"], photos, torch.tensor([[64, 48], [48, 64]])) == []
    assert found(["a/1.jpg", "a/2.jpg"], photos) == [[0, 1]]


def test_photos_without_any_tone_are_in_no_bracket():
    assert found(["1.jpg", "2.jpg"], [torch.zeros(1, 3, 32, 32), scene(0)]) == []


def test_every_frame_gets_the_target_of_the_least_corrected_one():
    targets = torch.arange(4)[:, None].repeat(1, 5)
    confidence = targets.float() / 10
    share_targets([[0, 1, 2]], torch.tensor([1.2, -0.1, -0.9, 0.0]), targets, confidence)
    assert targets[:, 0].tolist() == [1, 1, 1, 3]
    assert torch.allclose(confidence[:, 0], torch.tensor([0.1, 0.1, 0.1, 0.3]))
