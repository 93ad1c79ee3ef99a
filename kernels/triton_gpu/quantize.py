# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""Groups of channels whose codes are rounded one by one (``reference.quantize``)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import Side
from skvq.kernels.triton_gpu.e4m3 import ROUND, TINY, e4m3_decode, e4m3_encode, encode_scale

REFINE_STEPS = tl.constexpr(reference.REFINE_STEPS)


@triton.jit
def nearest_code(y, scale, mid, LEVELS: tl.constexpr):
    """The codes, as float32, of y [T, g] under scale and mid [T]."""
    x = tl.div_rn(y - mid[:, None], tl.broadcast_to(scale[:, None], y.shape)) + (LEVELS - 1) / 2
    return (tl.minimum(tl.maximum(x, 0.0), LEVELS - 1.0) + ROUND) - ROUND


@triton.jit
def fit_groups(y, there, count, unit, clip, LEVELS: tl.constexpr):
    """Codes int32 [T, g], scale and mid bytes int32 [T] of groups ``y`` [T, g]: ``reference.quantize``, step by step.

    A group has ``count`` channels; columns where ``there`` is false are padding. ``unit`` and ``clip`` are scalars or [T].
    """
    half: tl.constexpr = (LEVELS - 1) / 2
    low = tl.min(tl.where(there, y, float("inf")), 1) * clip
    high = tl.max(tl.where(there, y, float("-inf")), 1) * clip
    tiny = unit * TINY
    scale = tl.maximum(tl.div_rn(high - low, tl.full(high.shape, LEVELS - 1.0, tl.float32)), tiny)
    mid = (high + low) * 0.5
    size = tl.full(high.shape, 1.0, tl.float32) * count
    mean = tl.div_rn(tl.sum(tl.where(there, y, 0.0), 1), size)
    for _ in tl.static_range(REFINE_STEPS):
        code = tl.where(there, nearest_code(y, scale, mid, LEVELS) - half, 0.0)
        code_mean = tl.div_rn(tl.sum(code, 1), size)
        centred = tl.where(there, code - code_mean[:, None], 0.0)
        spread = tl.sum(centred * centred, 1)
        fitted = tl.maximum(tl.div_rn(tl.sum(centred * tl.where(there, y, 0.0), 1), tl.maximum(spread, 1e-6)), tiny)
        scale = tl.where(spread > 0, fitted, scale)
        mid = mean - scale * code_mean
    mid_byte = e4m3_encode(mid / unit)
    exact = e4m3_decode(mid_byte) * unit
    if LEVELS == 256:
        scale += tl.div_rn(tl.abs(exact - mid), tl.full(mid.shape, half, tl.float32))
    scale_byte = encode_scale(scale / unit, LEVELS)
    code = nearest_code(y, e4m3_decode(scale_byte) * unit, exact, LEVELS)
    return code.to(tl.int32), scale_byte, mid_byte


@triton.jit(do_not_specialize=["tokens", "widest"])
def quantize_kernel(
    y_ptr, unit_ptr, clip_ptr, member_ptr, size_ptr, code_ptr, scale_ptr, mid_ptr, tokens, groups, stride_token, widest,
    LEVELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize one group of channels, wherever they lie, of BLOCK tokens.

    ``member`` int32 [groups, widest] names the channels of each group, ``size`` int32 [groups] counts them. Codes go to the
    places of their channels, uint8 [T, channels], bytes of scale and mid to uint8 [T, groups]. Reads 4 bytes a number, writes
    1, and 2 a group.
    """
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1)
    w = tl.arange(0, WIDTH)
    count = tl.load(size_ptr + group)
    channel = tl.load(member_ptr + group * widest + w, mask=w < count, other=0)
    inside = (t < tokens)[:, None] & (w < count)[None, :]
    at = t[:, None].to(tl.int64) * stride_token + channel[None, :]
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    there = tl.broadcast_to((w < count)[None, :], [BLOCK, WIDTH])
    code, scale, mid = fit_groups(y, there, count.to(tl.float32), tl.load(unit_ptr + group), tl.load(clip_ptr + group), LEVELS)
    tl.store(code_ptr + at, code.to(tl.uint8), mask=inside)
    tl.store(scale_ptr + t.to(tl.int64) * groups + group, scale.to(tl.uint8), mask=t < tokens)
    tl.store(mid_ptr + t.to(tl.int64) * groups + group, mid.to(tl.uint8), mask=t < tokens)


def quantize_labels(y: Tensor, levels: int, side: Side, members: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [T, channels], scale and mid bytes uint8 [T, groups] of ``y`` float32 [T, channels].

    ``members`` int32 [groups, widest] and ``sizes`` int32 [groups]: channels of each group (``workspace.LabelTables``).
    """
    count, (groups, widest) = len(y), members.shape
    assert y.dtype == torch.float32 and y.is_contiguous() and members.is_contiguous(), (y.dtype, y.stride(), members.stride())
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    scale, mid = (torch.empty(count, groups, dtype=torch.uint8, device=y.device) for _ in range(2))
    quantize_kernel[(triton.cdiv(count, 16), groups)](
        y, side.unit, side.clip, members, sizes, codes, scale, mid, count, groups, y.shape[1], widest,
        LEVELS=levels, WIDTH=triton.next_power_of_2(widest), BLOCK=16, num_warps=8,
    )  # fmt: skip
    return codes, scale, mid
