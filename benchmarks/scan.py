"""Ratios sequential : doubling : blocked of the scan, forward and backward, in one run.

    python -m benchmarks.scan [--threads 2] [--channels 32] [--lengths 1024 4096 16384 65536]

Prints one line per length: milliseconds of each form (best of `--repeats`) and how many times
slower than the form that `scan` chooses on this device it is.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from evenlight.stages.corrector.scan import choose, scan, scan_reference


def scan_doubling(a_BDL: Tensor, b_BDL: Tensor) -> Tensor:
    """Hillis-Steele doubling, log2 L passes over all of them."""
    reach = 1
    while reach < a_BDL.shape[-1]:
        earlier_a = F.pad(a_BDL[..., :-reach], (reach, 0), value=1.0)
        earlier_b = F.pad(b_BDL[..., :-reach], (reach, 0))
        a_BDL, b_BDL = a_BDL * earlier_a, b_BDL + a_BDL * earlier_b
        reach *= 2
    return b_BDL


def milliseconds(
    form: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, repeats: int
) -> float:
    """Best time of a forward and backward pass."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.autograd.grad(form(a, b).sum(), (a, b))
        if a.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 1000 * best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    name, reason = choose(options.device)
    print(f"{options.device}, {options.threads} threads; scan runs {name}: {reason}")
    print(f"{'length':>7} {'sequential':>18} {'doubling':>18} {name:>18}")
    for length in options.lengths:
        generator = torch.Generator().manual_seed(0)
        shape = (options.batch, length, options.channels)  # as the network holds it
        steps = torch.empty(shape).uniform_(1e-3, 1e-1, generator=generator)
        a = torch.exp(-steps).mT.to(options.device).requires_grad_()
        b = torch.randn(shape, generator=generator).mT.to(options.device).requires_grad_()
        assert torch.allclose(scan_doubling(a, b), scan(a, b), rtol=1e-3, atol=1e-3)
        chosen = milliseconds(scan, a, b, options.repeats)
        cells = [
            milliseconds(scan_reference, a, b, 1),
            milliseconds(scan_doubling, a, b, options.repeats),
            chosen,
        ]
        row = " ".join(f"{ms:9.1f} ms {ms / chosen:4.1f}x" for ms in cells)
        print(f"{length:7d} {row}", flush=True)


if __name__ == "__main__":
    main()
