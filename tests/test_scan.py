"""Every form of the scan equals the loop that defines it, forward and backward."""

import importlib.util
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from evenlight.stages.corrector import scan as scans
from evenlight.stages.corrector.scan import (
    scan,
    scan_blocked,
    scan_doubling,
    scan_reference,
    scan_triton,
)

LENGTHS = [1, 2, 3, 5, 16, 17, 63, 144, 1000, 4096]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # Triton is interpreted on a CPU: conftest


def coefficients(
    length: int, dtype: torch.dtype, batch: int = 2, channels: int = 3, most: float = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """a in (0, 1) as the network makes it (memory of 1 to 1000 tokens), b, upstream gradient.

    most: the log of the largest step; at -3 no memory is shorter than 20 tokens.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (batch, channels, length)
    steps = torch.exp(
        torch.empty(shape, dtype=torch.float64).uniform_(-7, most, generator=generator)
    )
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


@pytest.fixture
def triton_scan(monkeypatch):
    """The module, in programs of 2 channels and chunks of 16 tokens: interpreting is slow."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it comes with torch on Linux alone")
    from evenlight.stages.corrector import scan_triton as module

    monkeypatch.setattr(module, "CHANNELS", 2)
    monkeypatch.setattr(module, "CHUNK", 16)
    return module


def among_nan(x_BDL: Tensor) -> Tensor:
    """The same values on the device, B,L,D in memory, with NaN before and after them."""
    around_BLD = x_BDL.detach().mT.new_full((len(x_BDL) + 2, *x_BDL.mT.shape[1:]), torch.nan)
    around_BLD[1:-1] = x_BDL.detach().mT
    return around_BLD.to(DEVICE)[1:-1].mT.requires_grad_()


def assert_triton_equals_the_loop(inputs: tuple[Tensor, ...], reverse: bool) -> None:
    expected = run(scan_reference, *inputs, reverse=reverse)
    got = run(scan_triton, *map(among_nan, inputs), reverse=reverse)
    for one, want in zip(got, expected, strict=True):
        assert one.dtype == torch.float32 and one.shape == want.shape
        assert relative_error(one.cpu(), want) <= 1e-5


TRITON_CASES = [  # length, channels, programs, reverse
    (1, 80, 1, False), (2, 32, 128, True), (15, 1, 128, True), (16, 5, 128, False),
    (17, 1, 1, False), (17, 1, 1, True), (17, 3, 128, False), (33, 3, 1, False), (33, 3, 1, True),
    (100, 3, 6, False), (100, 3, 6, True), (1000, 1, 7, True),
]  # fmt: skip


@pytest.mark.parametrize(("length", "channels", "programs", "reverse"), TRITON_CASES)
def test_the_triton_scan_equals_the_loop(
    triton_scan, monkeypatch, length, channels, programs, reverse
):
    """programs: 1 has each run along all tokens, 128 along a chunk, others along some chunks."""
    monkeypatch.setattr(triton_scan, "PROGRAMS", programs)
    batch = 2 if length in (17, 33) else 1
    inputs = coefficients(length, torch.float32, batch, channels, most=-3)
    assert_triton_equals_the_loop(inputs, reverse)


def test_the_triton_scan_equals_the_loop_in_chunks_of_their_real_size(triton_scan, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(triton_scan, "PROGRAMS", 1)
    inputs = coefficients(triton_scan.CHUNK + 1, torch.float32, 1, 1, most=-3)
    assert_triton_equals_the_loop(inputs, reverse=False)


def test_the_triton_scan_takes_any_strides(triton_scan):
    tokens_last = coefficients(20, torch.float32)
    spread = torch.ones(()).expand_as(tokens_last[2])  # the gradient of a sum: no strides at all
    for upstream in (tokens_last[2], spread):
        results = []
        for form, device in ((scan_triton, DEVICE), (scan_reference, "cpu")):
            a, b = (x.detach().to(device).requires_grad_() for x in tokens_last[:2])
            h = form(a, b)
            results.append((h, *torch.autograd.grad(h, (a, b), upstream.to(device))))
        assert results[0][0].mT.is_contiguous()  # as the network goes on
        for got, want in zip(*results, strict=True):
            assert relative_error(got.cpu(), want) <= 1e-5


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU of 48 GB")
def test_the_triton_scan_takes_maps_of_more_than_two_billion_values():
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("needs 48 GB of GPU memory")
    a = torch.full((3, 2**27, 8), 0.5, device=DEVICE).mT
    h = scan_triton(a, torch.ones_like(a))
    assert h[..., 0].eq(1).all() and h[..., 30:].eq(2).all()


def test_what_triton_cannot_do_here_is_told(triton_scan, monkeypatch):
    with torch.inference_mode():  # as `correct` asks
        assert scans.triton_obstacle(torch.device(DEVICE)) == ""
    monkeypatch.setattr(scans, "scan_triton", lambda a, b: scan_blocked(a, b) * 1.001)
    assert "not those of the plain form" in scans.triton_obstacle(torch.device(DEVICE))

    def fail(a, b):
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(scans, "scan_triton", fail)
    assert scans.triton_obstacle(torch.device(DEVICE)) == "RuntimeError: Failed to find C compiler."
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert scans.triton_obstacle(torch.device(DEVICE)) == "triton is not installed"


def test_the_choice_names_its_reason(monkeypatch):
    name, reason = scans.choose.__wrapped__("cpu")
    assert name == "blocked" and "CUDA" in reason
    for installed, obstacle, runs, why in (
        (True, "", "mamba_ssm", "mamba_ssm CUDA kernel is installed"),
        (None, "", "triton", "mamba_ssm is not installed"),
        (None, "no compiler", "blocked", "the Triton kernel cannot run: no compiler"),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=installed: found)
        monkeypatch.setattr(scans, "triton_obstacle", lambda device, found=obstacle: found)
        name, reason = scans.choose.__wrapped__("cuda")
        assert name == runs and why in reason


@pytest.mark.parametrize("form", ["blocked", "mamba_ssm", "triton"])
def test_the_form_that_was_chosen_runs_in_float32_alone(monkeypatch, form):
    monkeypatch.setattr(scans, "choose", lambda device: (form, ""))
    monkeypatch.setitem(scans.FORMS, form, lambda a, b, reverse: f"{form} ran, reverse {reverse}")
    a, b, _ = coefficients(4, torch.float32)
    assert scan(a, b, reverse=True) == f"{form} ran, reverse True"
    if form != "blocked":
        assert scan(a.double(), b.double()).dtype == torch.float64


COMPILED = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:  # of a GPU that is not there
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)

triton.runtime.driver.set_active(Driver())
made, compile_and_launch = [], JITFunction.run
def compile_only(self, *args, **kwargs):
    made.append(compile_and_launch(self, *args, **kwargs | {"warmup": True}))
JITFunction.run = compile_only
from evenlight.stages.corrector.scan_triton import CHUNK, states
a, b = (torch.ones(1, CHUNK + 1, 16, requires_grad=True) for _ in range(2))
states(a, b).backward(a)
for kernel in made:
    print(json.dumps([kernel.metadata.name, kernel.metadata.shared, kernel.asm["ttir"]]))
"""


def test_the_triton_kernels_compile_for_gpus_with_addresses_of_64_bits(triton_scan, tmp_path):
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", COMPILED, "80"],
        env=without | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in made] == ["_ends", "_scan", "_scan"] * 2
    assert max(shared for _, shared, _ in made) <= 64 << 10  # bytes, the least that a GPU has
    addresses = [line for _, _, code in made for line in code.splitlines() if "tt.addptr" in line]
    assert addresses and all(line.split("xi")[-1].startswith("64>") for line in addresses)
