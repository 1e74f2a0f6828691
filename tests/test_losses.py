"""Losses are 0 when nothing is wrong, finite on any photo, and calibrated to their shares."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evenlight.stages.corrector import losses
from evenlight.stages.corrector.batches import Batch, Draw
from evenlight.stages.corrector.losses import Calibration, Frozen, total
from evenlight.stages.settings import LossSettings

GENERATOR = torch.Generator().manual_seed(0)
PROTO, P3 = (
    torch.randn(4, 3, 4, 4, generator=GENERATOR),
    torch.randn(5, 3, 8, 8, generator=GENERATOR),
)
VIEW = (4, 4, 20, 24)


def features(rgb: Tensor) -> tuple[Tensor, Tensor]:
    return F.conv2d(rgb, PROTO, stride=4), F.conv2d(rgb, P3, stride=8)


def logits(rgb: Tensor) -> Tensor:
    mean = rgb.mean((1, 2, 3))
    return torch.stack([0.5 - mean, 0.1 - (mean - 0.5).abs(), mean - 0.5], dim=1) * 20


MODELS = Frozen(features, logits)
EVERYTHING = LossSettings(semantic=0.15, prompt=0.15)


def sample(**changes) -> Batch:
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(4, 3, 32, 32, generator=generator)
    photo = target * 0.5
    photo[:, :, :8, :8] = 1  # blown, among others
    values = {
        "photo": photo,
        "given": torch.zeros(4, 1, 32, 32),
        "proto": torch.zeros(4, 32, 8, 8),
        "p3": torch.zeros(4, 6, 4, 4),
        "target": target,
        "confidence": torch.rand(4, 1, 32, 32, generator=generator),
        "labels": torch.randint(0, 4, (4, 32, 32), generator=generator).to(torch.uint8),
        "chosen": Draw(samples=[], noise=0, view=VIEW, seen=(0, 4)),
    }
    return Batch(**(values | changes))


def parts_of(
    case: Batch, output: Tensor | None = None, settings: LossSettings | None = None
) -> dict[str, Tensor]:
    """The parts of the loss; the output is the target where none is given."""
    output = case.target if output is None else output
    loss, parts = total(case, output, losses.START_WEIGHTS, settings or EVERYTHING, MODELS)
    assert torch.isfinite(loss)
    return parts


@pytest.mark.parametrize("faithful", [False, True])
def test_every_part_but_prompt_is_0_when_the_output_is_the_target(faithful):
    parts = parts_of(sample(), settings=replace(EVERYTHING, faithful=faithful))
    assert set(parts) == {"data", "edges", "colour", "clipped", "semantic", "prompt"}
    for name in set(parts) - {"prompt"}:
        assert float(parts[name]) == pytest.approx(0, abs=2e-6), name


def test_every_part_notices_what_it_is_for():
    good = sample()
    generator = torch.Generator().manual_seed(2)
    noise = good.target + 0.2 * torch.randn(4, 3, 32, 32, generator=generator)
    parts = parts_of(good, noise)
    assert all(float(part) > 1e-3 for name, part in parts.items() if name != "prompt"), parts
    dark = parts_of(good, good.target * 0.2)
    assert float(dark["prompt"]) > 1
    assert float(dark["colour"]) == pytest.approx(0, abs=1e-2)  # same hue, other brightness
    tinted = good.target * torch.tensor([1.0, 0.5, 1.0]).view(3, 1, 1)
    assert float(parts_of(good, tinted)["colour"]) > 0.02


@pytest.mark.parametrize("output", [0.0, 1.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("faithful", [False, True])
def test_black_and_white_give_finite_losses_and_gradients(output, target, faithful):
    flat = torch.full((4, 3, 32, 32), output, requires_grad=True)
    case = sample(target=torch.full((4, 3, 32, 32), target))
    sum(parts_of(case, flat, replace(EVERYTHING, faithful=faithful)).values()).backward()
    assert flat.grad is not None and torch.isfinite(flat.grad).all()


def test_zero_confidence_everywhere_is_finite():
    assert float(parts_of(sample(confidence=torch.zeros(4, 1, 32, 32)))["data"]) >= 0


def test_pixels_without_confidence_do_not_count():
    case = sample()
    wrong = case.target.clone()
    wrong[:, :, :8] += 0.5
    sure = torch.ones(4, 1, 32, 32)
    sure[:, :, :8] = 0
    assert float(losses.mse(wrong, case.target, sure)) == 0
    assert float(losses.mse(wrong, case.target, torch.ones_like(sure))) > 0.05


def test_the_prompt_half_asks_for_no_more_than_good_enough():
    def always_normal(rgb: Tensor) -> Tensor:
        return torch.tensor([0.0, 5.0, 0.0]) + 0 * rgb.mean((1, 2, 3))[:, None]

    output = torch.rand(4, 3, 32, 32, requires_grad=True)
    loss = losses.prompt(output, always_normal, VIEW)
    loss.backward()
    assert float(loss.detach()) == 0
    assert output.grad is not None and float(output.grad.abs().max()) == 0
    doubtful = losses.prompt(output, lambda rgb: torch.zeros(4, 3), VIEW)
    assert float(doubtful) == pytest.approx(math.log(0.9) + math.log(3), rel=1e-5)


@pytest.mark.parametrize("part", [losses.mse, losses.charbonnier, losses.edges])
def test_an_offset_is_an_error_of_value_and_not_of_edges(part):
    case, sure = sample(), torch.ones(4, 1, 32, 32)
    given = (torch.zeros(4, 3, 32, 32), 0.6) if part is losses.charbonnier else ()
    error = float(part(case.target + 0.2, case.target, sure, *given))
    assert (error < 1e-6) == (part is losses.edges)


def test_the_best_guess_for_what_was_lost_is_a_light_one_and_elsewhere_their_mean():
    likely = torch.tensor([0.6] * 4 + [1.0] * 6)[:, None, None, None]  # sky or white, unknown which
    sure, sides = torch.ones(10, 1, 1, 1), torch.linspace(0.5, 1, 101)

    def best(taken: float) -> float:
        lost = torch.full((10, 1, 1, 1), taken)
        error = [
            losses.charbonnier(torch.full_like(likely, x), likely, sure, lost, 0.6) for x in sides
        ]
        return float(sides[int(torch.stack(error).argmin())])

    assert best(1.0) == pytest.approx(1.0, abs=0.011)
    assert 0.84 < best(0.0) < 0.95  # between mean and median
    dark, light = (
        float(losses.charbonnier(likely + by, likely, sure, torch.ones(10, 1, 1, 1), 0.75))
        for by in (-0.1, 0.1)
    )
    assert dark == pytest.approx(3 * light, rel=1e-4)


def test_only_photos_that_are_darkened_have_lost_what_is_guessed():
    case = sample()
    case = case._replace(
        photo=torch.ones_like(case.photo), given=torch.tensor([-1.0, 1, 0, -2]).view(4, 1, 1, 1)
    )
    assert losses.taken(case).mean((1, 2, 3)).tolist() == [1, 0, 0, 1]


def test_colour_edges_count_along_what_was_lost_and_nowhere_else():
    photo = torch.full((1, 3, 32, 32), 0.5)
    photo[:, 0, :, 20:] = 1  # red is clipped on the right
    target, sure = torch.full_like(photo, 0.5), torch.ones(1, 1, 32, 32)

    def error(columns: slice, colour: list[float]) -> float:
        output = target.clone()
        output[..., columns] += torch.tensor(colour).view(1, 3, 1, 1)
        return float(losses.clipped(output, target, sure, photo))

    assert error(slice(20, 32), [0.3, 0, 0]) > 0.01
    assert error(slice(6, 12), [0.3, 0, 0]) == 0
    assert error(slice(20, 32), [0.3, 0.3, 0.3]) < 1e-6  # of brightness alone
    assert float(losses.clipped(target + 1, target, sure, 0 * photo)) == 0


def test_regions_are_pooled_apart():
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[:, :, 4:] = 2
    mask = losses._region_shares(labels, torch.Size((4, 4)))
    x = torch.arange(4.0).expand(1, 1, 4, 4)
    assert losses._pool(x, mask).flatten().tolist() == [0.5, 0.0, 2.5]


def test_gradients_of_semantic_and_prompt_halves_reach_the_output():
    output = (sample().target * 0.3).requires_grad_()
    parts = parts_of(sample(), output)
    for name in ("semantic", "prompt"):
        (gradient,) = torch.autograd.grad(parts[name], output, retain_graph=True)
        assert float(gradient.norm()) > 0


def test_parts_with_share_zero_and_steps_without_spc_are_left_out():
    settings = LossSettings(colour=0, edges=0, clipped=0, prompt=0.1)
    assert set(parts_of(sample(), settings=settings)) == {"data", "prompt"}
    case = sample()
    parts = parts_of(case._replace(chosen=case.chosen._replace(seen=None)))
    assert "semantic" not in parts and "prompt" not in parts


def test_calibration_gives_each_part_its_share_once_and_survives_a_checkpoint():
    output = (sample().target * 0.4).requires_grad_()
    settings = EVERYTHING
    calibration = Calibration(settings, (2, 4))
    assert [calibration.measures(step) for step in range(6)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    parts = parts_of(sample(), output)
    calibration.measure(parts, output)
    half_way = Calibration(settings, (2, 4))
    half_way.restore(calibration.state())
    assert half_way.finish() == calibration.finish()
    norms = {
        name: calibration.weights[name]
        * float(torch.autograd.grad(part, output, retain_graph=True, allow_unused=True)[0].norm())
        for name, part in parts.items()
    }
    for name, norm in norms.items():
        expected = getattr(settings, name) / settings.data
        assert norm / norms["data"] == pytest.approx(expected, rel=1e-4), name
    assert not calibration.measures(3)


def test_a_part_that_was_never_active_keeps_its_start_weight():
    output = (sample().target * 0.4).requires_grad_()
    calibration = Calibration(EVERYTHING, (0, 1))
    calibration.measure(parts_of(sample(photo=torch.zeros(4, 3, 32, 32)), output), output)
    weights = calibration.finish()
    assert weights["clipped"] == losses.START_WEIGHTS["clipped"]
    assert weights["edges"] != losses.START_WEIGHTS["edges"]
