"""The linear recurrence h_t = a_t h_(t-1) + b_t: definition, fast plain form, kernels for GPUs
(Triton's in `scan_triton.py`), and the form that is exported.

`scan` chooses; every form equals `scan_reference`, forward and backward, in float32 or float64.
"""

# B batch, D inner channels, L = H*W tokens; blocked: K blocks of S tokens each

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8  # tokens of a block: fewer make more levels, more make more steps


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
        form = choose(a_BDL.device)[0] if dtype == torch.float32 else "blocked"
        return FORMS[form](a_BDL, b_BDL, reverse)


@functools.cache
def choose(device: torch.device | str) -> tuple[str, str]:
    """Which of `FORMS` `scan` runs in float32 on this device, and why, for the log and `doctor`."""
    device = torch.device(device)
    if device.type != "cuda":
        return "blocked", "plain PyTorch: the kernels need a CUDA device"
    if importlib.util.find_spec("mamba_ssm") is not None:
        return "mamba_ssm", "the mamba_ssm CUDA kernel is installed"
    missing = "mamba_ssm is not installed (extra `mamba`)"
    obstacle = triton_obstacle(device)
    if obstacle:
        return "blocked", f"plain PyTorch: {missing}, and the Triton kernel cannot run: {obstacle}"
    return "triton", f"the Triton kernel: {missing}"


def triton_obstacle(device: torch.device) -> str:
    """What keeps the Triton kernel from running on this device; "" if nothing does.

    Driver, C compiler, Python's headers, a cache that can be written: only a trial tells.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        right = _triton_is_right(device)
    except Exception as error:  # of whatever kind: it is told, and the plain form is as right
        reason = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {reason}"
    return "" if right else "its states or gradients are not those of the plain form"


def _triton_is_right(device: torch.device) -> bool:
    """States and gradients of a trial within 1e-5 of the plain form's, tokens in two spans."""
    from evenlight.stages.corrector.scan_triton import CHUNK

    shape = (1, CHUNK + 1, 16)
    with torch.inference_mode(False), torch.enable_grad():  # wherever the first scan is asked for
        ramp_BDL = torch.linspace(0, 1, math.prod(shape), device=device).view(shape).mT
        a, b = (0.5 + 0.49 * ramp_BDL).requires_grad_(), (1 - ramp_BDL).requires_grad_()
        got, want = (
            (h, *torch.autograd.grad((h * ramp_BDL).sum(), (a, b)))
            for h in (scan_triton(a, b), scan_blocked(a, b))
        )
    return all(
        bool((x - y).abs().max() <= 1e-5 * y.abs().max()) for x, y in zip(got, want, strict=True)
    )


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
    """In plain PyTorch: `BLOCK` steps inside all blocks at once, the same over their ends."""
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


def scan_triton(a_BDL: Tensor, b_BDL: Tensor, reverse: bool = False) -> Tensor:
    """As Triton kernels, in float32 on a GPU; B,L,D in memory saves a copy."""
    from evenlight.stages.corrector.scan_triton import states  # brings triton with it

    return states(a_BDL.mT, b_BDL.mT, reverse).mT


FORMS = {"blocked": scan_blocked, "mamba_ssm": scan_mamba, "triton": scan_triton}


class _Blocked(torch.autograd.Function):
    """Saves a and h only.

    With upstream g: G_t = g_t + a_(t+1) G_(t+1), db_t = G_t, da_t = G_t h_(t-1).
    """

    @staticmethod
    def forward(ctx: Any, a_BLD: Tensor, b_BLD: Tensor, reverse: bool) -> Tensor:
        h_BLD = _blocks_of_blocks(a_BLD, b_BLD, reverse)
        ctx.save_for_backward(a_BLD, h_BLD)
        ctx.reverse = reverse
        return h_BLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a_BLD, h_BLD = ctx.saved_tensors
        later, earlier = slice(1, None), slice(None, -1)  # in the order of the scan
        if ctx.reverse:
            later, earlier = earlier, later
        next_a_BLD, da_BLD = torch.zeros_like(a_BLD), torch.zeros_like(a_BLD)
        next_a_BLD[:, earlier] = a_BLD[:, later]
        G_BLD = _blocks_of_blocks(next_a_BLD, grads[0], not ctx.reverse)
        torch.mul(G_BLD[:, later], h_BLD[:, earlier], out=da_BLD[:, later])
        return da_BLD, G_BLD, None


def _blocks_of_blocks(a_BLD: Tensor, b_BLD: Tensor, reverse: bool) -> Tensor:
    """All blocks of `BLOCK` tokens at once, each from 0 on; their ends are the tokens of the same
    recurrence, whose states are what enters the blocks."""
    num_tokens = a_BLD.shape[1]
    if num_tokens <= 2 * BLOCK:
        h_BLD = torch.empty_like(b_BLD)
        _run(reverse, a_BLD, b_BLD, h_BLD)
        return h_BLD
    padding = -num_tokens % BLOCK
    if padding:  # at the end, where zeros are harmless in both directions
        a_BLD, b_BLD = (F.pad(x, (0, 0, 0, padding)) for x in (a_BLD, b_BLD))
    a_BKSD, b_BKSD = (x.unflatten(1, (-1, BLOCK)) for x in (a_BLD, b_BLD))
    h_BKSD, product_BKSD = torch.empty_like(b_BKSD), torch.empty_like(a_BKSD)
    _run(reverse, *(x.transpose(1, 2) for x in (a_BKSD, b_BKSD, h_BKSD, product_BKSD)))
    end = 0 if reverse else -1
    state_BKD = _blocks_of_blocks(product_BKSD[:, :, end], h_BKSD[:, :, end], reverse)
    if reverse:
        h_BKSD[:, :-1].addcmul_(product_BKSD[:, :-1], state_BKD[:, 1:, None])
    else:
        h_BKSD[:, 1:].addcmul_(product_BKSD[:, 1:], state_BKD[:, :-1, None])
    return h_BKSD.flatten(1, 2)[:, :num_tokens]


def _run(
    reverse: bool, a_BS: Tensor, b_BS: Tensor, h_BS: Tensor, product_BS: Tensor | None = None
) -> None:
    """The loop over S tokens, whatever follows them in the shape: states into h_BS, products of
    a so far into product_BS."""
    order = range(a_BS.shape[1])[:: -1 if reverse else 1]
    h_BS[:, order[0]] = b_BS[:, order[0]]
    if product_BS is not None:
        product_BS[:, order[0]] = a_BS[:, order[0]]
    for before, s in itertools.pairwise(order):
        torch.addcmul(b_BS[:, s], a_BS[:, s], h_BS[:, before], out=h_BS[:, s])
        if product_BS is not None:
            torch.mul(a_BS[:, s], product_BS[:, before], out=product_BS[:, s])
