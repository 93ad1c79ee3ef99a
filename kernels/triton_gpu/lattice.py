# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc, assignment"
# ruff: noqa: N803
"""Codes of a head chosen together (``reference.quantize_lattice``). A lane owns a token, for channels come one after another.

The algorithm. Nearest plane is a sweep of coordinate descent too: one in the Cholesky factor instead of the metric, from the
last channel to the first (``metric.py`` keeps the factor in that order). So one function, ``sweep``, serves both. A sweep is
given the slopes ``matrix error`` as they were before it, float32, and keeps how many steps each code has moved since: small
integers, which float16 holds exactly. It takes BLOCK channels at a time. Their slopes follow from one product, on tensor
cores, of all steps so far with BLOCK columns of the matrix, whose numbers are two float16 each: as good as float32. Within the
block each code acts on those after it by one multiply-add.

The cost, as compiled for sm_90. A block of 32 tokens takes 1,100 instructions of a warp, 68 of them on tensor cores, 140 of
them loads, mostly of matrix numbers that all lanes share. That makes 62,000 for seven sweeps of eight blocks, 5,000 for the
slopes before each sweep and fit, 16,000 for the two fits. 8,192 tokens of 8 heads occupy each scheduler of an H200 for 490,000
issue slots: 0.3 ms. A single tile takes 0.1 ms, for a block is a chain of 16 times five dependent instructions and about four
trips through shared memory or L2, some 1,500 cycles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels import reference
from skvq.kernels.interface import HeadSide
from skvq.kernels.triton_gpu.fit import fit, fit_range
from skvq.kernels.triton_gpu.forms import VARYING
from skvq.kernels.triton_gpu.metric import MetricTables
from skvq.kernels.triton_gpu.sweep import BLOCK, slopes_of_errors, sweep

ROUNDS = tl.constexpr(reference.LATTICE_ROUNDS)
SWEEPS = tl.constexpr(reference.LATTICE_SWEEPS)


@triton.jit(**VARYING)
def lattice_kernel(
    y_ptr, code_ptr, word_ptr, scale_ptr, mid_ptr, slopes_ptr, state_ptr, table_ptr, inner_ptr, ones_ptr, diagonal_ptr,
    total_ptr, down_ptr, unit_ptr, clip_ptr, tokens, heads, half,
    D: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Quantize T tokens of one head, a token a lane. Programs next to each other have the same tokens of different heads.

    In: ``y`` float32 [T, KH, D], ``metric.MetricTables`` (table, inner, ones, diagonal, total, down), ``unit`` and ``clip``
    [KH, G]. Out: ``code`` uint8 [T, KH, D], which ``word`` is again as int32; ``scale`` and ``mid`` bytes [T, KH, G]. Scratch:
    ``slopes`` float32 [T, KH, D] and ``state`` float32 [KH, 4, G, T]. Here T is all tokens; a program's are the constant T.
    Reads and writes about 40 D numbers a token, in the caches, and 5 D^2 numbers of the head's tables a program.
    """
    head = tl.program_id(0) % heads
    first = tl.program_id(0) // heads * T
    t = tl.arange(0, T)
    inside = t < tokens - first
    stride = heads * D
    row = first.to(tl.int64) * heads + head
    y, code, word, slopes = y_ptr + row * D, code_ptr + row * D, word_ptr + row * (D // 4), slopes_ptr + row * D
    scale_out, mid_out = scale_ptr + row * G, mid_ptr + row * G
    state = state_ptr + (head * 4 * G).to(tl.int64) * tokens + first
    unit, total, clip, diagonal = unit_ptr + head * G, total_ptr + head * G, clip_ptr + head * G, diagonal_ptr + head * D
    fit_range(y, code, state, unit, clip, half, t, inside, stride, tokens, T, D, G)
    for pass_ in tl.range(0, 1 + (ROUNDS + 1) * SWEEPS + ROUNDS, disable_licm=True):
        backwards = tl.where(pass_ == 0, 1, 0)
        at = (1 - backwards) * heads + head  # the factor, then the metric
        table, inner, ones = table_ptr + at * (2 * D * D), inner_ptr + at * (D * BLOCK), ones_ptr + at * (G * D)
        down = tl.load(down_ptr + at)
        slopes_of_errors(y, code, slopes, state, table, down, half, backwards, t, inside, stride, tokens, T, D, G)
        done = pass_ * (1 - backwards)  # of SWEEPS and a fit, and so on
        if (done > 0) & (done % (SWEEPS + 1) == 0):
            last = done // (ROUNDS * (SWEEPS + 1))
            fit(
                code, slopes, state, table, ones, diagonal, total, unit, scale_out, mid_out, down, half, last,
                t, inside, stride, tokens, T, D, G,
            )  # fmt: skip
        else:
            sweep(word, slopes, state, table, inner, down, half, backwards, t, inside, stride, tokens, T, D, G)


def quantize_lattice(
    y: Tensor, levels: int, side: HeadSide, tables: MetricTables, lanes: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [T, KH, D], scale and mid bytes uint8 [T, KH, G] of ``y`` float32 [T, KH, D], all new.

    ``lanes``: tokens of a program, 32 a warp.
    """
    tokens, heads, size = y.shape
    groups = side.unit.shape[1]
    assert y.dtype == torch.float32 and y.is_contiguous() and y.device == tables.table.device, (y.dtype, y.stride(), y.device)
    assert side.unit.is_contiguous() and side.clip.is_contiguous(), (side.unit.stride(), side.clip.stride())
    assert size % 32 == 0 and size // groups % 32 == 0, (size, groups)
    codes = torch.empty(y.shape, dtype=torch.uint8, device=y.device)
    scale, mid = (torch.empty(tokens, heads, groups, dtype=torch.uint8, device=y.device) for _ in range(2))
    lattice_kernel[(triton.cdiv(tokens, lanes) * heads,)](
        y, codes, codes.view(torch.int32), scale, mid, torch.empty_like(y),
        torch.empty(heads, 4, groups, tokens, dtype=torch.float32, device=y.device), tables.table, tables.inner, tables.ones,
        tables.diagonal, tables.total, tables.down, side.unit, side.clip, tokens, heads, (levels - 1) / 2,
        D=size, G=groups, T=lanes, num_warps=max(1, min(lanes // 32, 4)), num_stages=1,
    )  # fmt: skip
    return codes, scale, mid
