# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
# ruff: noqa: N803
"""The small operations between the products of matrices, one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.triton_gpu.overlap import overlapping, overlaps, wait_for_inputs


@triton.jit
def rms_norm_kernel(x_ptr, delta_ptr, weight_ptr, total_ptr, out_ptr, width, eps, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """``r / sqrt(mean(r^2) + eps) * weight`` of one row; ``r`` is x, or with ADD ``x + delta``, which goes to ``total``.

    Reads and writes each number once. Rounds wherever torch rounds.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < width
    r = tl.load(x_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        r += tl.load(delta_ptr + row * width + c, mask=inside, other=0.0).to(tl.float32)
        rounded = r.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + c, rounded, mask=inside)
        r = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(r * r, 0) / width + eps)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    normed = (r * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + c, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_heads_kernel(
    q_ptr, k_ptr, query_norm_ptr, key_norm_ptr, q_out_ptr, k_out_ptr, heads, stride_q, stride_k, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``x / sqrt(mean(x^2) + eps) * weight`` of one head, of D numbers, of one row. Rounds wherever torch rounds."""
    wait_for_inputs(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    kv_heads = tl.num_programs(1) - heads
    c = tl.arange(0, BLOCK)
    inside = c < D
    if head < heads:
        x_ptr, weight_ptr, out_ptr = q_ptr + row * stride_q + head * D, query_norm_ptr, q_out_ptr + (row * heads + head) * D
    else:
        kv = head - heads
        x_ptr, weight_ptr, out_ptr = k_ptr + row * stride_k + kv * D, key_norm_ptr, k_out_ptr + (row * kv_heads + kv) * D
    x = tl.load(x_ptr + c, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float32)
    normed = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + c, (normed * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def turn_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slots_ptr, places_ptr, out_ptr, key_ptr, value_ptr,
    heads, stride_q, stride_k, stride_v, stride_slot, stride_head, stride_token,
    D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RoPE of one head of one row. A query head goes to ``out``, a key head to its slot; its value is copied beside it."""
    wait_for_inputs(PDL)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = tl.arange(0, D // 2)
    cos, sin = tl.load(cos_ptr + row * (D // 2) + j), tl.load(sin_ptr + row * (D // 2) + j)
    if head < heads:
        base = q_ptr + row * stride_q + head * D
        a, b = tl.load(base + j).to(tl.float32), tl.load(base + D // 2 + j).to(tl.float32)
        out = out_ptr + (row * heads + head) * D
        tl.store(out + j, (a * cos - b * sin).to(out_ptr.dtype.element_ty))
        tl.store(out + D // 2 + j, (b * cos + a * sin).to(out_ptr.dtype.element_ty))
    else:
        kv = head - heads
        base = k_ptr + row * stride_k + kv * D
        a, b = tl.load(base + j).to(tl.float32), tl.load(base + D // 2 + j).to(tl.float32)
        at = tl.load(slots_ptr + row) * stride_slot + kv.to(tl.int64) * stride_head + tl.load(places_ptr + row) * stride_token
        # through the dtype of the model, as the specification goes
        first, second = (a * cos - b * sin).to(k_ptr.dtype.element_ty), (b * cos + a * sin).to(k_ptr.dtype.element_ty)
        tl.store(key_ptr + at + j, first.to(key_ptr.dtype.element_ty))
        tl.store(key_ptr + at + D // 2 + j, second.to(key_ptr.dtype.element_ty))
        d = tl.arange(0, D)
        v = tl.load(v_ptr + row * stride_v + kv * D + d)
        tl.store(value_ptr + at + d, v.to(value_ptr.dtype.element_ty))


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """``silu(gate) * up`` of BLOCK columns of one row. Reads and writes each number once."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    gate = tl.load(gate_up_ptr + row * 2 * width + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + c, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + c, (silu * up).to(out_ptr.dtype.element_ty), mask=inside)


def norm_rows(x: Tensor, delta: Tensor, total: Tensor, weight: Tensor, eps: float, *, add: bool) -> Tensor:
    """``rms_norm_kernel`` on contiguous x and delta, to a new tensor. Without ``add`` delta and total are not touched."""
    width = x.shape[-1]
    assert weight.shape == (width,) and weight.is_contiguous() and weight.dtype == x.dtype, (weight.shape, weight.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(x.numel() // width,)](
        x, delta, weight, total, out, width, eps, BLOCK=block, ADD=add, num_warps=min(max(block // 512, 1), 16)
    )
    return out


def turn_heads(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, places: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """``turn_kernel`` on rows [R, 1, heads, D]: k and v go to keys and values [S, KH, T, D], at ``slots`` [R] and ``places``
    [R].

    Returns the turned q, new. cos and sin are float32 [R, 1, 1, D / 2].
    """
    rows, _, heads, size = q.shape
    assert q.stride()[2:] == k.stride()[2:] == v.stride()[2:] == (size, 1), (q.stride(), k.stride(), v.stride())
    assert cos.shape == sin.shape == (rows, 1, 1, size // 2) and cos.is_contiguous() and sin.is_contiguous(), cos.shape
    assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
    assert keys.stride() == values.stride() and keys.stride(3) == 1, (keys.stride(), values.stride())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    slot, head, token, _ = keys.stride()
    turn_kernel[(rows, heads + k.shape[2])](
        q, k, v, cos, sin, slots, places, out, keys, values, heads, q.stride(0), k.stride(0), v.stride(0),
        slot if len(keys) > 1 else 0, head, token, D=size, num_warps=1, **overlapping(overlaps(q.device)),
    )  # fmt: skip
    return out
