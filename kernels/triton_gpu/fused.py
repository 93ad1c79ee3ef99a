# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
# ruff: noqa: N803
"""Small fused operations of a decode step: everything between the matrix products that would else be a launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, width, eps, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """``r += x`` (in place, rounded to its dtype) and ``out = r / sqrt(mean(r^2) + eps) * weight``; a row a program.

    Reads x, r and the weight once, writes r and out once.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    r = tl.load(x_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        r += tl.load(residual_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
        rounded = r.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * width + c, rounded, mask=inside)
        r = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(r * r, 0) / width + eps)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    normed = (r * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + c, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm of ``x`` [rows, width]; with ``residual`` [rows, width] x is added to it in place first and the sum is normed."""
    rows, width = x.shape
    assert x.is_contiguous() and weight.shape == (width,), (x.shape, x.stride(), weight.shape)
    assert residual is None or (residual.shape == x.shape and residual.is_contiguous()), residual
    out = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(rows,)](
        x, x if residual is None else residual, weight, out, width, eps,
        BLOCK=block, ADD=residual is not None, num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return out


@triton.jit
def rope_write_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, slots_ptr, places_ptr, inv_freq_ptr, out_ptr, key_ptr, value_ptr, held_ptr,
    queries, heads, kv_heads, scale, stride_q, stride_k, stride_v, stride_slot, stride_head, stride_token, stride_held,
    D: tl.constexpr,
):  # fmt: skip
    """RoPE of one head of one token: of q to ``out``, of k to its slot, and v copied beside it; the slot's position is set.

    The angle ``position * inv_freq`` is reduced in float64: at a million a float32 angle is off by 0.03. The first kv head
    writes the position. Reads and writes each of q, k and v once.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    j = tl.arange(0, D // 2)
    row = token // queries
    position = tl.load(positions_ptr + token)
    angle = position.to(tl.float64) * tl.load(inv_freq_ptr + j)
    turn = angle * 0.15915494309189535
    small = ((turn - tl.floor(turn)) * 6.283185307179586).to(tl.float32)
    cos, sin = tl.cos(small) * scale, tl.sin(small) * scale
    slot = tl.load(slots_ptr + row)
    place = tl.load(places_ptr + token).to(tl.int64)
    if head < heads:
        base = q_ptr + token.to(tl.int64) * stride_q + head * D
        a, b = tl.load(base + j).to(tl.float32), tl.load(base + D // 2 + j).to(tl.float32)
        out = out_ptr + (token.to(tl.int64) * heads + head) * D
        tl.store(out + j, (a * cos - b * sin).to(out_ptr.dtype.element_ty))
        tl.store(out + D // 2 + j, (b * cos + a * sin).to(out_ptr.dtype.element_ty))
    else:
        kv = head - heads
        base = k_ptr + token.to(tl.int64) * stride_k + kv * D
        a, b = tl.load(base + j).to(tl.float32), tl.load(base + D // 2 + j).to(tl.float32)
        at = slot * stride_slot + kv * stride_head + place * stride_token
        tl.store(key_ptr + at + j, (a * cos - b * sin).to(key_ptr.dtype.element_ty))
        tl.store(key_ptr + at + D // 2 + j, (b * cos + a * sin).to(key_ptr.dtype.element_ty))
        d = tl.arange(0, D)
        v = tl.load(v_ptr + token.to(tl.int64) * stride_v + kv * D + d)
        tl.store(value_ptr + at + d, v.to(value_ptr.dtype.element_ty))
        if kv == 0:
            tl.store(held_ptr + slot * stride_held + place, position)


def rope_and_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, places: Tensor, inv_freq: Tensor, scale: float,
    keys: Tensor, values: Tensor, held: Tensor,
) -> Tensor:  # fmt: skip
    """Turned q [B, N, H, D]; k and v go to full-precision slots.

    ``q`` [B, N, H, D], ``k`` and ``v`` [B, N, KH, D] before RoPE (strided over tokens, heads contiguous); ``positions`` and
    ``places`` int32 [B, N] are each token's position and slot index; ``keys``, ``values`` [S, KH, F, D] and ``held`` int32
    [S, F] are written.
    """
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    for t in (q, k, v):
        assert t.stride()[2:] == (size, 1) and t.stride(0) == queries * t.stride(1), t.stride()
    assert keys.stride() == values.stride() and keys.stride(3) == 1 and held.stride(1) == 1, (keys.stride(), values.stride())
    assert positions.dtype == places.dtype == held.dtype == torch.int32 and inv_freq.dtype == torch.float64
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rope_write_kernel[(batch * queries, heads + kv_heads)](
        q, k, v, positions, slots, places, inv_freq, out, keys, values, held, queries, heads, kv_heads, scale,
        q.stride(1), k.stride(1), v.stride(1), *keys.stride()[:3], held.stride(0), D=size, num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, out_ptr, width, stride_gate, stride_up, BLOCK: tl.constexpr):
    """``silu(gate) * up``, BLOCK columns of one row a program; reads both once, writes once."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    gate = tl.load(gate_ptr + row * stride_gate + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + c, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + c, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [rows, width] tensors, halves of one projection included."""
    rows, width = gate.shape
    assert up.shape == gate.shape and gate.stride(1) == up.stride(1) == 1, (gate.stride(), up.stride())
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    silu_mul_kernel[(rows, triton.cdiv(width, 1024))](
        gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=1024, num_warps=4
    )
    return out
