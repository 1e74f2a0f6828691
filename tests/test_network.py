"""The corrector is the film curve before training, fills only what is lost, takes any size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evenlight.cache.errors import UsageError
from evenlight.stages.corrector.blocks import Fourier, SpatialMamba
from evenlight.stages.corrector.correction import KEPT, Correction, correct, lost
from evenlight.stages.corrector.network import (
    MAX_OFFSET,
    MAX_RESIDUAL,
    MAX_SHIFT,
    WHOLE_FROM,
    Corrector,
)
from evenlight.stages.priors import tone
from evenlight.stages.settings import SIZES, NetworkSettings

P3 = 6
TINY = NetworkSettings(size="tiny")


def inputs(height: int, width: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    photo = torch.rand(batch, 3, height, width, generator=generator)
    proto = torch.randn(batch, 32, -(-height // 4), -(-width // 4), generator=generator)
    p3 = torch.randn(batch, P3, -(-height // 8), -(-width // 8), generator=generator)
    return photo, proto, p3, flat(photo, torch.linspace(-1.2, 0.7, batch))


def flat(photo: Tensor, strengths: Tensor | float) -> Tensor:
    """One strength for all of a photo."""
    return torch.zeros_like(photo[:, :1]) + torch.as_tensor(strengths).view(-1, 1, 1, 1)


def trained(settings: NetworkSettings = TINY) -> Corrector:
    """A corrector whose last layers are no longer zero, as after training."""
    torch.manual_seed(0)
    network = Corrector(settings, P3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("size", SIZES)
def test_an_untrained_corrector_is_the_film_curve_at_the_strength_it_is_given(size):
    network = Corrector(NetworkSettings(size=size), P3)
    photo, proto, p3, t = inputs(32, 48)
    photo[:, :, :8] = 1  # blown
    with torch.no_grad():
        output = correct(photo, network(photo, proto, p3, t), "film")
    assert torch.equal(output, tone.apply("film", photo, t))
    with torch.no_grad():
        output = correct(photo, network(photo, proto, p3, 0 * t), "film")
    assert float((output - photo).abs().max()) < 2e-6


def test_the_residual_head_starts_as_the_identity_whatever_the_judge_says():
    network = Corrector(NetworkSettings(size="tiny", head="residual"), P3)
    photo, proto, p3, t = inputs(32, 48)
    with torch.no_grad():
        output = correct(photo, network(photo, proto, p3, t), "film")
    assert float((output - photo).abs().max()) < 2e-6
    head = trained(NetworkSettings(size="tiny", head="residual"))
    once, twice = head(photo, proto, p3, t), head(photo, proto, p3, 0 * t)
    assert torch.equal(once.residual_B3HW, twice.residual_B3HW)


def test_what_is_lost_rises_smoothly_from_none_to_all():
    values = torch.tensor([0.0, 0.5, 0.88, 0.9375, 0.995, 1.0])
    assert lost(values).tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1])


def test_fills_act_only_on_values_that_clipping_may_have_taken():
    photo, _, _, t = inputs(32, 32)
    plain = Correction(
        given_B1HW=t,
        strength_B3HW=t.expand_as(photo),
        cover_B1HW=torch.zeros(2, 1, 32, 32),
        shift_B3HW=torch.zeros_like(photo),
        residual_B3HW=torch.zeros_like(photo),
    )
    filled = plain._replace(
        cover_B1HW=torch.full((2, 1, 32, 32), 0.7), shift_B3HW=torch.full_like(photo, -0.2)
    )
    changed = correct(photo, filled, "film") != correct(photo, plain, "film")
    assert bool(changed.any()) and torch.equal(changed, lost(photo) > 0)


def test_a_whole_cover_shows_the_fill_s_colour_and_some_of_the_curve_s_detail():
    photo = torch.full((1, 3, 32, 32), 1.0)
    photo[..., 16:] = 0.996
    t = flat(photo, -1.0)
    colour = torch.tensor([-0.1, 0.0, 0.1]).view(1, 3, 1, 1).expand_as(photo)
    fill = Correction(t, -1.0 + 0 * photo, torch.ones(1, 1, 32, 32), colour, 0 * photo)
    white = tone.apply("film", torch.ones(1), -1.0)
    output = correct(photo, fill, "film")
    away = output - white - colour
    assert away[..., :9].abs().max() < 1e-6 and away[..., 23:].abs().max() < 1e-6  # no detail there
    step, curve = (x[..., 15] - x[..., 16] for x in (output, tone.apply("film", photo, -1.0)))
    assert torch.allclose(step / curve, torch.full_like(step, KEPT), atol=0.15)  # less its mean's


def test_what_is_not_darkened_is_not_filled():
    network = trained()
    photo, proto, p3, _ = inputs(32, 32)
    t = flat(photo, torch.tensor([-0.5, 0.5]))
    dark, bright = network(photo, proto, p3, t).shift_B3HW.detach()
    assert float(dark.abs().max()) > 0 and float(bright.abs().max()) == 0
    t[..., 16:] = 0.3
    cover = network(photo, proto, p3, t).cover_B1HW.detach()[0]
    assert float(cover[..., :16].abs().max()) > 0 and float(cover[..., 16:].abs().max()) == 0


@pytest.mark.parametrize("head", ["tone", "residual"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 31), (16, 200), (45, 64), (72, 40)])
def test_any_size_from_16_pixels_works(head, height, width):
    network = trained(replace(TINY, head=head))
    photo, proto, p3, t = inputs(height, width)
    correction = network(photo, proto, p3, t)
    output = correct(photo, correction, "film")
    assert output.shape == photo.shape == correction.strength_B3HW.shape
    assert torch.isfinite(output).all()
    assert float((output - photo).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("attention", ["element", "channel"])
@pytest.mark.parametrize("head", ["tone", "residual"])
def test_gradients_reach_every_parameter_and_are_finite(attention, head):
    network = trained(NetworkSettings(size="tiny", attention=attention, head=head))
    photo, proto, p3, t = inputs(32, 32)
    correct(photo, network(photo, proto, p3, t), "film").square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_black_and_white_photos_give_finite_output_and_gradients(value):
    network = trained()
    photo, proto, p3, t = inputs(32, 32)
    photo = torch.full_like(photo, value)
    output = correct(photo, network(photo, 0 * proto, 0 * p3, t), "film")
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_train_and_eval_mode_agree_at_the_borders_too():
    network = trained()
    photo, proto, p3, t = inputs(40, 40)
    train, evaluate = network.train()(photo, proto, p3, t), network.eval()(photo, proto, p3, t)
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


def test_answers_keep_their_bounds_and_the_dark_may_change_more():
    network = trained()
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.mul_(1000)
    photo, proto, p3, t = inputs(32, 32)
    photo[..., :16] *= 0.05
    correction = network(photo, proto, p3, t)
    offset = correction.strength_B3HW - t
    assert float(offset.abs().max()) <= MAX_OFFSET + 1e-6
    assert float(correction.cover_B1HW.abs().max()) <= 1
    light, dark = MAX_RESIDUAL
    most = correction.residual_B3HW.abs().amax((0, 1, 2))
    assert float(most.max()) <= dark + 1e-6 and float(most[16:].max()) < float(most[:16].min())
    white = network(0 * photo + 1, proto, p3, t).residual_B3HW
    assert float(white.abs().max()) == pytest.approx(light, abs=1e-6)


@torch.no_grad()
def test_a_photo_that_hardly_changes_is_hardly_departed_from():
    network = trained()
    for parameter in network.head.parameters():
        parameter.mul_(1000)  # whatever it answers
    photo, proto, p3, _ = inputs(32, 32)
    for t in (0.0, -0.04, 0.04):
        answer = network(photo, proto, p3, flat(photo, t))
        share = abs(t) / WHOLE_FROM + 1e-6
        assert float((answer.strength_B3HW - t).abs().max()) <= share * MAX_OFFSET
        assert float(answer.cover_B1HW.abs().max()) <= share
        assert float(answer.shift_B3HW.abs().max()) <= share * MAX_SHIFT
        assert float(answer.residual_B3HW.abs().max()) <= share * max(MAX_RESIDUAL)
    full = network(photo, proto, p3, flat(photo, -WHOLE_FROM))
    assert float(full.cover_B1HW.abs().max()) > 0.99


def test_the_answer_depends_on_the_strength_of_the_judge():
    network = trained()
    photo, proto, p3, _ = inputs(64, 64)
    one, other = (network(photo, proto, p3, flat(photo, t)) for t in (-0.5, -1.0))
    assert not torch.allclose(one.residual_B3HW, other.residual_B3HW, atol=1e-3)
    apart = flat(photo, -0.5)
    apart[..., 32:] = -1.0
    both = network(photo, proto, p3, apart).residual_B3HW
    assert not torch.allclose(both[..., :24], other.residual_B3HW[..., :24], atol=1e-3)


def test_bfloat16_autocast_keeps_the_output_finite_and_close():
    network = trained()
    photo, proto, p3, t = inputs(48, 48)
    exact = correct(photo, network(photo, proto, p3, t), "film")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = correct(photo, network(photo, proto, p3, t), "film")
    assert rough.dtype == torch.float32 and torch.isfinite(rough).all()
    assert float((rough - exact).abs().mean()) < 0.02


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8, 8), (7, 10), (12, 5)])
def test_the_fourier_transform_as_it_is_exported_is_torch_s(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    fourier, wanted = Fourier(*size), torch.fft.rfft2(x, norm="ortho")
    real, imag = fourier.forward(x)
    assert torch.allclose(torch.complex(real, imag), wanted, atol=1e-5)
    assert torch.allclose(fourier.inverse(real, imag), x, atol=1e-5)


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
