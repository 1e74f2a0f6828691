"""Every form of the scan that runs here, beside a product of the same arrays.

    python -m benchmarks.scan [--device cuda] [--batch 1] [--channels 32] [--lengths 1024 65536]

A line for each form: the largest relative difference of its states and gradients from the loop's;
then, forward and backward, milliseconds, GB/s of what any scan must move (a, b, h; a, g, h, da,
db), and what share that is of the GB/s of a product (two arrays read, one written).  On a CPU the
best of `--repeats`, on a GPU the median by its own clock, its cache cleared before each.
Exits 1 where a difference is above 1e-5.
"""

import argparse
import functools
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from evenlight.stages.corrector.scan import FORMS, choose, scan_doubling, scan_reference

ON_A_CPU = (1024, 4096, 16384, 65536)  # lengths
# batch, channels, length: the network's in training and with one photo, then few channels
ON_A_GPU = ((10, 80, 6400), (10, 160, 1600), (10, 320, 400), (1, 160, 5000), (1, 32, 65536))
Form = Callable[[Tensor, Tensor], Tensor]


def forms_on(device: str) -> dict[str, Form]:
    if device == "cpu":
        return {
            "sequential": scan_reference,
            "doubling": scan_doubling,
            "blocked": FORMS["blocked"],
        }
    found = (name for name in ("mamba_ssm", "triton") if importlib.util.find_spec(name))
    return {name: FORMS[name] for name in ("blocked", *found)}


def milliseconds(work: Callable[[], object], device: str, repeats: int) -> float:
    if device != "cpu":
        from triton.testing import do_bench

        return do_bench(work, return_mode="median")
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


def both_ways(form: Form, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    h = form(a, b)
    return (h.detach(), *torch.autograd.grad(h, (a, b), g))


def error(form: Form, a: Tensor, b: Tensor, g: Tensor) -> float:
    """Against the loop in float64, over the first 2,000 tokens and the first photo."""
    few = [x.detach()[:1, :, :2000].cpu() for x in (a, b, g)]
    results = []
    for run, device, dtype in ((form, a.device, a.dtype), (scan_reference, "cpu", torch.float64)):
        x, y, z = (v.to(device, dtype) for v in few)
        results.append(both_ways(run, x.requires_grad_(), y.requires_grad_(), z))
    pairs = [(got.cpu().double(), want) for got, want in zip(*results, strict=True)]
    return max(float((got - want).abs().max() / want.abs().max()) for got, want in pairs)


def measured(
    shape: tuple[int, int, int], device: str, repeats: int
) -> Iterator[tuple[str, float, float, float]]:
    """shape: B,L,D.  Form, error, milliseconds forward and backward; first the product, with no way
    back."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.empty(shape).uniform_(1e-3, 1e-1, generator=generator)
    a = torch.exp(-steps).to(device).mT.requires_grad_()  # B,L,D in memory, as the network has it
    b = torch.randn(shape, generator=generator).to(device).mT.requires_grad_()
    g = torch.randn(shape, generator=generator).to(device).mT
    product = torch.empty_like(g)
    multiply = functools.partial(torch.mul, a.detach(), b.detach(), out=product)
    yield "product", 0.0, milliseconds(multiply, device, 5 * repeats), math.nan
    for name, form in forms_on(device).items():
        times = 1 if form is scan_reference else repeats
        forward = functools.partial(form, a, b)
        back = functools.partial(torch.autograd.grad, forward(), (a, b), g, retain_graph=True)
        off = error(form, a, b, g)
        yield name, off, milliseconds(forward, device, times), milliseconds(back, device, times)


def show(batch: int, channels: int, length: int, device: str, repeats: int) -> float:
    """A line for each form.  Returns the largest error."""
    worst, rate = 0.0, math.nan
    for name, off, forward, back in measured((batch, length, channels), device, repeats):
        speeds = [12e-6 * batch * length * channels / forward]
        speeds.append(20e-6 * batch * length * channels / back)
        rate = speeds[0] if name == "product" else rate
        cells = "".join(
            f"{ms:11.3f} {speed:7.1f} {speed / rate:5.0%}"
            for ms, speed in zip((forward, back), speeds, strict=True)
        )
        print(f"{batch:5d} {channels:8d} {length:7d} {name:>10} {off:8.0e} {cells}", flush=True)
        worst = max(worst, off)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    lengths = options.lengths or ON_A_CPU
    shapes = [(options.batch, options.channels, length) for length in lengths]
    if options.device != "cpu":
        print(torch.cuda.get_device_name(options.device))
        shapes = shapes if options.lengths else ON_A_GPU
    name, reason = choose(options.device)
    print(f"{options.device}, {options.threads} threads; scan runs {name}: {reason}")
    way = f"{'ms':>11} {'GB/s':>7} {'share':>5}"
    print(f"batch channels  length       form    error {way}{way}  forward, then backward")
    worst = max(show(*shape, options.device, options.repeats) for shape in shapes)
    return int(worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
