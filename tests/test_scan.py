"""Every form of the scan equals the loop that defines it, forward and backward."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from evenlight.stages.corrector import scan as scans
from evenlight.stages.corrector.scan import scan, scan_blocked, scan_doubling, scan_reference

LENGTHS = [1, 2, 3, 5, 16, 17, 63, 144, 1000, 4096]


def coefficients(length: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """a in (0, 1) as the network makes it (memory of 1 to 1000 tokens), b, upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, length)
    steps = torch.exp(torch.empty(shape, dtype=torch.float64).uniform_(-7, 1, generator=generator))
    a = torch.exp(-steps)
    b = steps * torch.randn(shape, dtype=torch.float64, generator=generator)
    g = torch.randn(shape, dtype=torch.float64, generator=generator)
    return a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_(), g.to(dtype)


def run(form, a: Tensor, b: Tensor, g: Tensor, **options) -> tuple[Tensor, ...]:
    h = form(a, b, **options)
    return (h, *torch.autograd.grad((h * g).sum(), (a, b)))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.abs().max().clamp_min(1e-12))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_blocked_scan_equals_the_loop_forward_and_backward(length, reverse, dtype, bound):
    a, b, g = coefficients(length, dtype)
    expected = run(scan_reference, a, b, g, reverse=reverse)
    for got, want in zip(run(scan, a, b, g, reverse=reverse), expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        assert relative_error(got, want) <= bound


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_scan_as_it_is_exported_equals_the_loop(length, reverse):
    a, b, _ = coefficients(length, torch.float32)
    got, want = scan_doubling(a, b, reverse), scan_reference(a, b, reverse)
    assert got.shape == want.shape and relative_error(got, want) <= 1e-5


def test_the_loop_is_the_recurrence():
    a, b = torch.tensor([[[0.5, 0.5, 0.25]]]), torch.tensor([[[1.0, 2.0, 4.0]]])
    assert scan_reference(a, b).tolist() == [[[1.0, 2.5, 4.625]]]
    assert scan_reference(a, b, reverse=True).tolist() == [[[3.0, 4.0, 4.0]]]


def test_any_strides_give_the_same_states():
    a, b, _ = coefficients(50, torch.float64)
    tokens_first = [x.detach().mT.contiguous().mT for x in (a, b)]
    assert torch.equal(scan_blocked(*tokens_first), scan_blocked(a, b))


def test_the_scan_stays_in_float32_under_autocast():
    a, b, _ = coefficients(64, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = scan(a, b.bfloat16())
    assert h.dtype == torch.float32
    assert torch.equal(h, scan(a, b.bfloat16().float()))


def test_the_backward_saves_only_a_and_h():
    a, b, _ = coefficients(64, torch.float64)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        scan_blocked(a, b)
    assert len(saved) == 2


@pytest.mark.parametrize("reverse", [False, True])
def test_the_kernel_is_called_so_that_its_output_is_the_state(monkeypatch, reverse):
    """The kernel's published semantics, as a loop, stand in for the CUDA code."""

    def selective_scan_fn(u, delta, A, B, C):
        decay, drive = torch.exp(delta * A[:, 0, None]), delta * B[:, 0, None] * u
        return scan_reference(decay, drive) * C[:, 0, None]

    package = ModuleType("mamba_ssm.ops.selective_scan_interface")
    package.selective_scan_fn = selective_scan_fn
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", ModuleType("mamba_ssm.ops"))
    scans._selective_scan.cache_clear()
    a, b, g = coefficients(200, torch.float64)
    expected = run(scan_reference, a, b, g, reverse=reverse)
    for got, want in zip(run(scans.scan_mamba, a, b, g, reverse=reverse), expected, strict=True):
        assert relative_error(got, want) <= 1e-5
    scans._selective_scan.cache_clear()


def test_the_choice_names_its_reason():
    name, reason = scans.choose("cpu")
    assert name == "blocked" and "CUDA" in reason
