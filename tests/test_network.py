"""The corrector is the identity before training and takes photos of any size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evenlight.cache.errors import UsageError
from evenlight.stages.corrector.blocks import SpatialMamba
from evenlight.stages.corrector.network import Corrector, correct, photo_statistics
from evenlight.stages.settings import SIZES, NetworkSettings

P3 = 6
TINY = NetworkSettings(size="tiny")


def inputs(height: int, width: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    photo = torch.rand(batch, 3, height, width, generator=generator)
    proto = torch.randn(batch, 32, -(-height // 4), -(-width // 4), generator=generator)
    p3 = torch.randn(batch, P3, -(-height // 8), -(-width // 8), generator=generator)
    return photo, proto, p3


def trained(settings: NetworkSettings = TINY) -> Corrector:
    """A corrector whose last layers are no longer zero, as after training."""
    torch.manual_seed(0)
    network = Corrector(settings, P3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("head", ["tone", "residual"])
def test_an_untrained_corrector_is_the_identity(size, head):
    network = Corrector(NetworkSettings(size=size, head=head), P3)
    photo, proto, p3 = inputs(32, 48, batch=1)
    with torch.no_grad():
        output = correct(photo, network(photo, proto, p3), "film")
    assert float((output - photo).detach().abs().max()) < 2e-6


@pytest.mark.parametrize("head", ["tone", "residual"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (16, 200), (45, 64), (72, 40)])
def test_any_size_from_16_pixels_works(head, height, width):
    network = trained(replace(TINY, head=head))
    photo, proto, p3 = inputs(height, width)
    correction = network(photo, proto, p3)
    output = correct(photo, correction, "film")
    assert output.shape == photo.shape == correction.strength_B3HW.shape
    assert torch.isfinite(output).all()
    assert float((output - photo).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("attention", ["element", "channel"])
@pytest.mark.parametrize("head", ["tone", "residual"])
def test_gradients_reach_every_parameter_and_are_finite(attention, head):
    network = trained(NetworkSettings(size="tiny", attention=attention, head=head))
    photo, proto, p3 = inputs(32, 32)
    correct(photo, network(photo, proto, p3), "film").square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_black_and_white_photos_give_finite_output_and_gradients(value):
    network = trained()
    photo, proto, p3 = inputs(32, 32)
    photo = torch.full_like(photo, value)
    output = correct(photo, network(photo, 0 * proto, 0 * p3), "film")
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_train_and_eval_mode_agree_at_the_borders_too():
    network = trained()
    photo, proto, p3 = inputs(40, 40)
    train, evaluate = network.train()(photo, proto, p3), network.eval()(photo, proto, p3)
    assert torch.equal(train.strength_B3HW, evaluate.strength_B3HW)


@pytest.mark.parametrize("fusion", [True, False])
def test_state_fusion_starts_as_the_identity_and_a_flat_state_stays_flat(fusion):
    mamba = SpatialMamba(8, fusion=fusion)
    assert (mamba.fusion is not None) == fusion
    if mamba.fusion is None:
        return
    state = torch.randn(1, 16, 9, 7)
    assert torch.allclose(mamba._fuse(state), state)
    for kernel in mamba.fusion:  # replicate padding: a constant has no borders
        torch.nn.init.constant_(kernel, 1 / 27)
    assert torch.allclose(mamba._fuse(torch.ones(1, 16, 9, 7)), torch.ones(1, 16, 9, 7))


def test_two_way_blocks_see_both_directions_and_fused_ones_only_the_past():
    def reach(fusion: bool) -> Tensor:
        torch.manual_seed(0)
        mamba = SpatialMamba(8, fusion=fusion)
        x = torch.randn(1, 8, 12, 12, requires_grad=True)
        mamba(x)[0, :, 6, 6].sum().backward()
        assert x.grad is not None
        return x.grad.abs().sum((0, 1))

    assert float(reach(False)[10:].max()) > 0
    assert float(reach(True)[10:].max()) == 0
    assert float(reach(True)[:3].max()) > 0


def test_strength_and_residual_keep_their_bounds():
    network = trained()
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.mul_(1000)
    photo, proto, p3 = inputs(32, 32)
    correction = network(photo, proto, p3)
    assert float(correction.strength_B3HW.abs().max()) <= 2.2 + 1e-6
    assert float(correction.residual_B3HW.abs().max()) <= 0.1 + 1e-6


def test_one_weight_on_the_rule_statistic_gives_the_mean_luma_rule():
    network = Corrector(TINY, P3)
    assert network.brightness is not None
    with torch.no_grad():
        network.brightness.last.weight[0, 64] = 1.0
    photo, proto, p3 = inputs(64, 64)
    output = correct(photo * 0.3, network(photo * 0.3, proto, p3), "film")
    luma = (output * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).mean((1, 2))
    # the statistic is taken from a 32-pixel copy, which is not quite exact for noise
    assert torch.allclose(luma, torch.full((2,), 119 / 255), atol=0.06)


def test_a_crop_takes_its_brightness_from_the_whole_photo():
    network = trained()
    photo, proto, p3 = inputs(64, 64)
    whole = network(photo, proto, p3, whole_B3HW=photo * 0.2)
    alone = network(photo, proto, p3)
    assert not torch.allclose(whole.strength_B3HW, alone.strength_B3HW)
    assert torch.equal(whole.residual_B3HW, alone.residual_B3HW)


def test_photo_statistics_are_moderate_and_finite_for_any_photo():
    for photo in (torch.zeros(1, 3, 20, 20), torch.ones(1, 3, 20, 20), inputs(50, 33)[0]):
        statistics = photo_statistics(photo, "film")
        assert torch.isfinite(statistics).all() and float(statistics.abs().max()) <= 4


def test_bfloat16_autocast_keeps_the_output_finite_and_close():
    network = trained()
    photo, proto, p3 = inputs(48, 48)
    exact = correct(photo, network(photo, proto, p3), "film")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = correct(photo, network(photo, proto, p3), "film")
    assert rough.dtype == torch.float32 and torch.isfinite(rough).all()
    assert float((rough - exact).abs().mean()) < 0.02


def test_sizes_keep_their_budgets_of_parameters():
    def millions(size: str) -> float:
        network = Corrector(NetworkSettings(size=size), 64)
        return sum(p.numel() for p in network.parameters()) / 1e6

    assert millions("tiny") < 0.03
    assert millions("small") < 2
    assert millions("base") < 6


def test_small_conv_is_small_with_convolutions_where_the_scans_were():
    small, conv = (Corrector(NetworkSettings(size=size), 64) for size in ("small", "small-conv"))
    scans, none = (
        [m for m in network.modules() if isinstance(m, SpatialMamba)] for network in (small, conv)
    )
    assert scans and not none
    numbers = [sum(p.numel() for p in network.parameters()) for network in (small, conv)]
    assert abs(numbers[1] / numbers[0] - 1) < 0.03


@pytest.mark.parametrize("name", ["size", "head", "attention", "family"])
def test_an_unknown_choice_is_refused_by_name(name):
    with pytest.raises(UsageError, match=f"network.{name} must be one of .*'odd'"):
        NetworkSettings(**{name: "odd"})
