"""The linear recurrence of `scan.py` as Triton kernels, in float32.

A program runs along the tokens of 8 channels: it reads a chunk of them, the next one already on
its way, scans it in registers and hands its last state on.  Each value passes once between memory
and chip: 12 bytes an element forward (a, b; h), 20 backward (a, g, h; da, db).

A batch of 10 has 100 programs at 80 channels, 400 at 320.  Where there are fewer than `PROGRAMS`
(20 for one photo of 160 channels), tokens are shared out in spans, and a pass over a and b before
(8 bytes more) finds what each span makes of the state that enters it.
"""

# B batch, L tokens, D channels; K spans of whole chunks of S tokens, in the order of the scan

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 8  # of a program: 32 bytes of a token, the least that a GPU's memory hands over
CHUNK = 512  # tokens at most: with 32 KB on their way, some 64 programs keep an H100's memory busy
PROGRAMS = 128  # wanted, if there are tokens enough


def states(a_BLD: Tensor, b_BLD: Tensor, reverse: bool = False) -> Tensor:
    """States of h_t = a_t h_(t-1) + b_t with h_0 = 0, as `scan.scan`.

    a_BLD, b_BLD: float32 on one GPU, same shape, not empty; contiguous saves a copy.
    Returns B,L,D, contiguous.  Under TRITON_INTERPRET=1 the same kernels run on the CPU, for tests:
    40 us a token and channel.
    """
    return _Triton.apply(a_BLD, b_BLD, reverse)


class _Triton(torch.autograd.Function):
    """Saves a and h only.

    With upstream g: G_t = g_t + a_(t+1) G_(t+1), db_t = G_t, da_t = G_t h_(t-1).
    """

    @staticmethod
    def forward(ctx: Any, a_BLD: Tensor, b_BLD: Tensor, reverse: bool) -> Tensor:
        a_BLD = a_BLD.contiguous()
        h_BLD = torch.empty_like(a_BLD)
        _launch(a_BLD, b_BLD.contiguous(), h_BLD, reverse)
        ctx.save_for_backward(a_BLD, h_BLD)
        ctx.reverse = reverse
        return h_BLD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        a_BLD, h_BLD = ctx.saved_tensors
        G_BLD, da_BLD = torch.empty_like(a_BLD), torch.empty_like(a_BLD)
        _launch(a_BLD, grads[0].contiguous(), G_BLD, not ctx.reverse, (h_BLD, da_BLD))
        return da_BLD, G_BLD, None


def _launch(
    a_BLD: Tensor,
    b_BLD: Tensor,
    out_BLD: Tensor,
    reverse: bool,
    gradient: tuple[Tensor, Tensor] | None = None,
) -> None:
    """States into out_BLD.  gradient: the states h of the forward pass, and where da goes; b_BLD
    is the upstream gradient then, and a counts from the token after."""
    num_batch, num_tokens, num_channels = a_BLD.shape
    chunk = min(CHUNK, max(16, triton.next_power_of_2(num_tokens)))
    runs = num_batch * triton.cdiv(num_channels, CHANNELS)
    num_chunks = triton.cdiv(num_tokens, chunk)
    span = chunk * triton.cdiv(num_chunks, max(1, PROGRAMS // runs))
    num_spans = triton.cdiv(num_tokens, span)
    sizes = (num_tokens, num_channels, span)
    options = {"REVERSE": reverse, "SHIFT": int(gradient is not None), "enable_fp_fusion": True}
    options |= {"CHUNK": chunk, "CHANNELS": CHANNELS}
    before_BKD = None
    with torch.cuda.device_of(a_BLD):
        if num_spans > 1:
            shape = (3, num_batch, num_spans, num_channels)
            product_BKD, end_BKD, before_BKD = a_BLD.new_empty(shape)
            _ends[runs, num_spans](a_BLD, b_BLD, product_BKD, end_BKD, *sizes, **options)
            _launch(product_BKD, end_BKD, before_BKD, reverse=False)
        h_BLD, da_BLD = gradient or (None, None)
        _scan[runs, num_spans](a_BLD, b_BLD, out_BLD, h_BLD, da_BLD, before_BKD, *sizes, **options)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def _scan(
    a, b, out, h, da, before, num_tokens, num_channels, span,
    REVERSE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The states of one span into `out`, from `before` its first token on (None: from 0 on)."""
    batch, channel_D = _run(num_channels, CHANNELS)
    first = tl.program_id(1) * span
    state_D = tl.zeros([CHANNELS], tl.float32)
    if before is not None and first > 0:
        entry_D = _entry(batch, channel_D, num_channels) - num_channels
        state_D = tl.load(before + entry_D, mask=channel_D < num_channels, other=0.0)
    for start in tl.range(first, min(first + span, num_tokens), CHUNK, num_stages=2):
        i_S = start + tl.arange(0, CHUNK)
        place, there = _places(i_S, batch, channel_D, num_tokens, num_channels, REVERSE)
        product_SD, out_SD = _chunk(
            a, b, i_S, batch, channel_D, num_tokens, num_channels, REVERSE, SHIFT
        )
        out_SD += product_SD * state_D[None, :]
        state_D = _last(out_SD, CHUNK)
        tl.store(out + place, out_SD, mask=there)
        if da is not None:
            at, found = _places(i_S + 1, batch, channel_D, num_tokens, num_channels, REVERSE)
            h_SD = tl.load(h + at, mask=found, other=0.0)
            tl.store(da + place, out_SD * h_SD, mask=there)


@triton.jit(do_not_specialize=["num_tokens", "span"])
def _ends(
    a, b, product, end, num_tokens, num_channels, span,
    REVERSE: tl.constexpr, SHIFT: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The product of a over one span, and the state after it from 0 on."""
    batch, channel_D = _run(num_channels, CHANNELS)
    first = tl.program_id(1) * span
    all_D, state_D = tl.full([CHANNELS], 1.0, tl.float32), tl.zeros([CHANNELS], tl.float32)
    for start in tl.range(first, min(first + span, num_tokens), CHUNK, num_stages=2):
        i_S = start + tl.arange(0, CHUNK)
        product_SD, h_SD = _chunk(
            a, b, i_S, batch, channel_D, num_tokens, num_channels, REVERSE, SHIFT
        )
        product_D = _last(product_SD, CHUNK)
        state_D = _last(h_SD, CHUNK) + product_D * state_D
        all_D *= product_D
    entry_D = _entry(batch, channel_D, num_channels)
    tl.store(product + entry_D, all_D, mask=channel_D < num_channels)
    tl.store(end + entry_D, state_D, mask=channel_D < num_channels)


@triton.jit
def _run(num_channels, CHANNELS: tl.constexpr):
    """Photo, in 64 bits since what is multiplied by it may pass 2^31, and channels of a program."""
    blocks = tl.cdiv(num_channels, CHANNELS)
    run = tl.program_id(0)
    return (run // blocks).to(tl.int64), run % blocks * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _entry(batch, channel_D, num_channels):
    """Where the program's span lies in B,K,D."""
    return (batch * tl.num_programs(1) + tl.program_id(1)) * num_channels + channel_D


@triton.jit
def _places(i_S, batch, channel_D, num_tokens, num_channels, REVERSE: tl.constexpr):
    """Where tokens i_S, counted in the order of the scan, lie in B,L,D, and which are there."""
    token_S = num_tokens - 1 - i_S if REVERSE else i_S
    place_SD = (batch * num_tokens + token_S)[:, None] * num_channels + channel_D[None, :]
    inside_S = (i_S >= 0) & (i_S < num_tokens)
    return place_SD, inside_S[:, None] & (channel_D < num_channels)[None, :]


@triton.jit
def _chunk(
    a, b, i_S, batch, channel_D, num_tokens, num_channels,
    REVERSE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Products of a so far and states of one chunk, from 0 on.  SHIFT: a is of the token before.

    Not by associative_scan(reverse=True), which gave wrong states on GPUs (triton issue 4362).
    """
    at, found = _places(i_S - SHIFT, batch, channel_D, num_tokens, num_channels, REVERSE)
    a_SD = tl.load(a + at, mask=found, other=0.0)
    at, found = _places(i_S, batch, channel_D, num_tokens, num_channels, REVERSE)
    b_SD = tl.load(b + at, mask=found, other=0.0)
    return tl.associative_scan((a_SD, b_SD), 0, _join)


@triton.jit
def _join(a, h, next_a, next_h):
    """Two runs of tokens as one."""
    return a * next_a, h * next_a + next_h


@triton.jit
def _last(x_SD, CHUNK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, CHUNK)[:, None] == CHUNK - 1, x_SD, 0.0), axis=0)
