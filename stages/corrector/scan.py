"""The linear recurrence h_t = a_t h_(t-1) + b_t: definition, fast plain form, CUDA kernel, and
the form that is exported.

`scan` chooses; every form equals `scan_reference`, forward and backward, in float32 or float64.
"""

# B batch, D inner channels, L = H*W tokens; blocked: K blocks of S tokens each

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(a_BDL: Tensor, b_BDL: Tensor, reverse: bool = False) -> Tensor:
    """States of h_t = a_t h_(t-1) + b_t with h_0 = 0 before the first token.

    a_BDL in (0, 1) and b_BDL: same shape, any strides (B,L,D in memory is fastest on a CPU).
    reverse: run from the last token to the first.  Returns B,D,L in float32 (float64 for float64).
    """
    dtype = torch.float64 if a_BDL.dtype == torch.float64 else torch.float32
    a_BDL, b_BDL = a_BDL.to(dtype), b_BDL.to(dtype)
    if torch.compiler.is_exporting():
        return scan_doubling(a_BDL, b_BDL, reverse)
    with torch.autocast(a_BDL.device.type, enabled=False):
        if dtype == torch.float32 and choose(a_BDL.device)[0] == "mamba_ssm":
            return scan_mamba(a_BDL, b_BDL, reverse)
        return scan_blocked(a_BDL, b_BDL, reverse)


def choose(device: torch.device | str) -> tuple[str, str]:
    """Which form `scan` runs in float32 on this device, and why, for the log and `doctor`."""
    if torch.device(device).type != "cuda":
        return "blocked", "plain PyTorch: the mamba_ssm kernel needs a CUDA device"
    if importlib.util.find_spec("mamba_ssm") is None:
        return "blocked", "plain PyTorch: mamba_ssm is not installed (extra `mamba`)"
    return "mamba_ssm", "the mamba_ssm CUDA kernel is installed"


def scan_reference(a_BDL: Tensor, b_BDL: Tensor, reverse: bool = False) -> Tensor:
    """The definition, one token after the other.  Returns B,D,L."""
    h_BD = torch.zeros_like(b_BDL[..., 0])
    tokens = list(zip(a_BDL.unbind(-1), b_BDL.unbind(-1), strict=True))
    states = []
    for a_BD, b_BD in reversed(tokens) if reverse else tokens:
        h_BD = a_BD * h_BD + b_BD
        states.append(h_BD)
    return torch.stack(states[::-1] if reverse else states, dim=-1)


def scan_blocked(a_BDL: Tensor, b_BDL: Tensor, reverse: bool = False) -> Tensor:
    """Two levels in plain PyTorch: sqrt(L) steps inside all blocks at once, then over blocks."""
    return _Blocked.apply(a_BDL.mT, b_BDL.mT, reverse).mT


def scan_doubling(a_BDL: Tensor, b_BDL: Tensor, reverse: bool = False) -> Tensor:
    """A few steps on all tokens at once, after each of which a state looks back twice as far: as
    ONNX can say it for any number of tokens (Hillis, Steele, "Data Parallel Algorithms", 1986).

    When exported, as many steps as the most tokens of the dynamic shape need.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # brings sympy with it

    if reverse:
        return scan_doubling(a_BDL.flip(-1), b_BDL.flip(-1)).flip(-1)
    tokens, reach = a_BDL.shape[-1], 1
    while not statically_known_true(tokens <= reach):
        before_a, before_b = (
            F.pad(x, (reach, 0), value=nothing)[..., :tokens]
            for x, nothing in ((a_BDL, 1.0), (b_BDL, 0.0))
        )
        a_BDL, b_BDL = a_BDL * before_a, torch.addcmul(b_BDL, a_BDL, before_b)
        reach *= 2
    return b_BDL


def scan_mamba(a_BDL: Tensor, b_BDL: Tensor, reverse: bool = False) -> Tensor:
    """The stock selective scan h_t = exp(delta A) h + delta B u, y = C h, at A = -1, B = C = 1.

    With delta = -log a and u = b / delta its output is the state itself.
    """
    if reverse:
        return scan_mamba(a_BDL.flip(-1), b_BDL.flip(-1)).flip(-1)
    delta_BDL = -a_BDL.clamp(1e-30, 1 - 1e-7).log()
    one_D1 = a_BDL.new_ones(a_BDL.shape[1], 1)
    u_BDL = (b_BDL / delta_BDL).contiguous()
    return _selective_scan()(u_BDL, delta_BDL.contiguous(), -one_D1, one_D1, one_D1)


@functools.cache
def _selective_scan() -> Callable[..., Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


class _Blocked(torch.autograd.Function):
    """Saves a and h only.

    With upstream g: G_t = g_t + a_(t+1) G_(t+1), db_t = G_t, da_t = G_t h_(t-1).
    """

    @staticmethod
    def forward(ctx: Any, a_BLD: Tensor, b_BLD: Tensor, reverse: bool) -> Tensor:
        h_BLD = _two_level(a_BLD, b_BLD, reverse)
        ctx.save_for_backward(a_BLD, h_BLD)
        ctx.reverse = reverse
        return h_BLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a_BLD, h_BLD = ctx.saved_tensors
        next_a_BLD = _shift(a_BLD, forward=ctx.reverse)
        G_BLD = _two_level(next_a_BLD, grads[0], not ctx.reverse)
        return G_BLD * _shift(h_BLD, forward=not ctx.reverse), G_BLD, None


def _shift(x_BLD: Tensor, forward: bool) -> Tensor:
    """x one token later (forward) or earlier, with 0 where nothing comes from."""
    shifted = torch.zeros_like(x_BLD, memory_format=torch.contiguous_format)
    if forward:
        shifted[:, 1:] = x_BLD[:, :-1]
    else:
        shifted[:, :-1] = x_BLD[:, 1:]
    return shifted


def _two_level(a_BLD: Tensor, b_BLD: Tensor, reverse: bool) -> Tensor:
    num_batch, num_tokens, num_channels = a_BLD.shape
    steps = max(1, round(num_tokens**0.5))  # the image width for a square image
    padding = -num_tokens % steps
    if padding:  # at the end, where zeros are harmless in both directions
        a_BLD, b_BLD = (F.pad(x, (0, 0, 0, padding)) for x in (a_BLD, b_BLD))
    shape = (num_batch, -1, steps, num_channels)
    a_BKSD, b_BKSD = a_BLD.reshape(shape), b_BLD.reshape(shape)
    num_blocks = a_BKSD.shape[1]
    h_BKSD, product_BKSD = torch.empty_like(b_BKSD), torch.empty_like(b_BKSD)

    order = list(reversed(range(steps))) if reverse else list(range(steps))
    h_BKSD[:, :, order[0]] = b_BKSD[:, :, order[0]]
    product_BKSD[:, :, order[0]] = a_BKSD[:, :, order[0]]
    for before, s in itertools.pairwise(order):
        a_BKD = a_BKSD[:, :, s]
        torch.addcmul(b_BKSD[:, :, s], a_BKD, h_BKSD[:, :, before], out=h_BKSD[:, :, s])
        torch.mul(a_BKD, product_BKSD[:, :, before], out=product_BKSD[:, :, s])

    end = order[-1]
    carry_BKD = torch.zeros_like(h_BKSD[:, :, end])  # the state that enters each block
    blocks = list(reversed(range(num_blocks))) if reverse else list(range(num_blocks))
    for before, k in itertools.pairwise(blocks):
        carry_BKD[:, k] = torch.addcmul(
            h_BKSD[:, before, end], product_BKSD[:, before, end], carry_BKD[:, before]
        )
    h_BKSD.addcmul_(product_BKSD, carry_BKD[:, :, None])
    return h_BKSD.reshape(num_batch, num_tokens + padding, num_channels)[:, :num_tokens]
