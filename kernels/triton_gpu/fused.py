# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
# ruff: noqa: N803
"""``interface.Ops`` on a GPU.

One vector a step: each product of a matrix is one launch together with the operations around it (``matvec``); of a matrix of
quantized blocks up to four (``blocks``). More vectors: torch multiplies, and the operations between the products are one launch
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch
import triton
import triton.language as tl
from torch import Tensor

from skvq.kernels.dense import merge_runs
from skvq.kernels.experts import Experts
from skvq.kernels.interface import FullSlots
from skvq.kernels.linear import DenseLinear, Linear, StoredLinear
from skvq.kernels.ops import TorchOps
from skvq.kernels.triton_gpu import blocks, matvec
from skvq.kernels.triton_gpu.experts import each_linear, each_swiglu, is_each, most_pairs, route
from skvq.kernels.triton_gpu.grouped import mlps
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


class TritonOps(TorchOps):
    """Nothing here waits for the device or depends on what a tensor holds, so a CUDA graph can hold it."""

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        if is_blocks(linear, x):
            flat = x.reshape(-1, x.shape[-1])
            out = torch.empty(len(flat), linear.outs, dtype=x.dtype, device=x.device)
            for part, bias, place in linear.shares(out):
                blocks.multiply(flat, part, bias, place, norm=norm, eps=eps)
            return out.view(*x.shape[:-1], -1)
        if not is_matvec(linear, x):
            return super().norm_linear(x, norm, eps, linear)
        tiling = matvec.tiling_of(x.numel() // x.shape[-1], *linear.weight.shape, gated=False)
        return matvec.norm_linear(x, norm, eps, linear.weight, linear.bias, tiling)

    def norm_heads(self, q: Tensor, k: Tensor, query_norm: Tensor, key_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        batch, count, heads, size = q.shape
        assert k.shape[:2] == q.shape[:2] and q.dtype == k.dtype, (q.shape, k.shape, q.dtype, k.dtype)
        for x in (q, k):  # rows that lie equally far apart
            assert x.stride()[2:] == (size, 1) and (batch == 1 or x.stride(0) == count * x.stride(1)), x.stride()
        for weight in (query_norm, key_norm):
            assert weight.shape == (size,) and weight.is_contiguous() and weight.dtype == q.dtype, (weight.shape, weight.dtype)
        outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
        norm_heads_kernel[(batch * count, heads + k.shape[2])](
            q, k, query_norm, key_norm, *outs, heads, q.stride(1), k.stride(1), eps,
            D=size, BLOCK=triton.next_power_of_2(size), num_warps=1, **overlapping(overlaps(q.device)),
        )  # fmt: skip
        return outs[0], outs[1]

    def after_attention(
        self, x: Tensor, attended: Tensor, output: Linear, norm: Tensor, eps: float, gate_up: Linear, down: Linear
    ) -> Tensor:
        if is_block(output, x) and is_block(gate_up, x) and is_block(down, x):
            flat, attended = x.reshape(-1, x.shape[-1]), attended.reshape(-1, attended.shape[-1])
            flat = self._linear_add(flat, attended, output)
            h = blocks.multiply(flat, gate_up.parts[0], gate_up.bias, norm=norm, eps=eps, gated=True)
            return self._linear_add(flat, h, down).view(x.shape)
        if not (is_matvec(output, x) and is_matvec(gate_up, x) and is_matvec(down, x)):
            return super().after_attention(x, attended, output, norm, eps, gate_up, down)
        width, inner = x.shape[-1], gate_up.weight.shape[0] // 2
        x = self._linear_add(x, attended, output)
        gated = matvec.tiling_of(x.numel() // width, inner, width, gated=True)
        h = matvec.norm_swiglu(x, norm, eps, gate_up.weight, gate_up.bias, gated)
        return self._linear_add(x, h, down)

    def after_attention_experts(
        self, x: Tensor, attended: Tensor, output: Linear, norm: Tensor, eps: float, experts: Experts
    ) -> Tensor:
        if not (is_each(experts.gate_up, x) and is_each(experts.down, x)):
            return super().after_attention_experts(x, attended, output, norm, eps, experts)
        flat, attended = x.flatten(0, 1), attended.flatten(0, 1)  # [B N, d]
        if len(flat) * experts.chosen > most_pairs(experts):
            flat, h = self.add_rms_norm(flat, output(attended), norm, eps)
            ids, weights = route(experts.router(h), experts.chosen, normed=experts.normed)
            outs = mlps(h, ids, experts.gate_up, experts.down, experts.count)  # [B N, k, d]
        else:
            flat = self._linear_add(flat, attended, output)
            ids, weights = route(self.norm_linear(flat, norm, eps, experts.router), experts.chosen, normed=experts.normed)
            inner = each_swiglu(experts.gate_up, flat, norm, eps, ids.view(-1))  # [B N k, f]
            outs = each_linear(experts.down, inner, ids.view(-1)).view(*ids.shape, -1)
        return torch.baddbmm(flat[:, None], weights[:, None], outs).view(x.shape)

    def _linear_add(self, x: Tensor, h: Tensor, linear: Linear) -> Tensor:
        """``x + linear(h)`` of vectors [..., d], of blocks [N, d]."""
        if is_block(linear, x):
            return blocks.multiply(h, linear.parts[0], linear.bias, residual=x)
        if is_matvec(linear, x):
            tiling = matvec.tiling_of(x.numel() // x.shape[-1], *linear.weight.shape, gated=False)
            return matvec.linear_add(x, h, linear.weight, linear.bias, tiling)
        return x + linear(h)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        return _norm(x, x, x, weight, eps, add=False)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert delta.shape == x.shape and delta.dtype == x.dtype, (delta.shape, x.shape, delta.dtype, x.dtype)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return total, _norm(x.contiguous(), delta.contiguous(), total, weight, eps, add=True)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        *rest, both = gate_up.shape
        out = torch.empty((*rest, both // 2), dtype=gate_up.dtype, device=gate_up.device)
        rows = out.numel() // (both // 2)
        swiglu_kernel[(rows, triton.cdiv(both // 2, 1024))](gate_up, out, both // 2, BLOCK=1024, num_warps=4)
        return out

    def rope_to_slots(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, full: FullSlots, slots: Tensor, ring_slots: Tensor
    ) -> Tensor:
        rows, queries, _, size = q.shape
        if not is_whole_block(size):
            return super().rope_to_slots(q, k, v, cos, sin, full, slots, ring_slots)
        kv_heads, keys, values = k.shape[2], full.keys, full.values
        assert queries == 1 and k.shape == v.shape == (rows, 1, kv_heads, size), (q.shape, k.shape, v.shape)
        assert slots.dtype == ring_slots.dtype == torch.int64 and slots.shape == ring_slots.shape == (rows,), slots.shape
        return _turn(q, k, v, cos, sin, slots, ring_slots, keys, values)

    def rope_to_buffer(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> Tensor:
        _, count, _, size = q.shape
        if not is_whole_block(size):
            return super().rope_to_buffer(q, k, v, cos, sin, keys, values, first)
        assert q.shape[0] == 1 and k.shape == v.shape == (1, count, len(keys), size), (q.shape, k.shape, v.shape)
        assert keys.dtype == values.dtype == k.dtype and keys.stride() == values.stride() and keys.stride(2) == 1, keys.stride()
        at = torch.arange(first, first + count, device=q.device)
        q, k, v, cos, sin = (t[0][:, None] for t in (q, k, v, cos, sin))  # [N, 1, ...]
        return _turn(q, k, v, cos, sin, at, at, keys[None], values[None]).transpose(0, 1)

    def turn(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not is_whole_block(q.shape[3]):
            return super().turn(q, cos, sin)
        rows, cos, sin = (t.reshape(-1, 1, *t.shape[2:]) for t in (q, cos, sin))  # [B * N, 1, ...]
        none, nowhere = rows[:, :, :0], torch.empty(len(rows), dtype=torch.int64, device=q.device)  # keys, and their places
        return _turn(rows, none, none, cos, sin, nowhere, nowhere, none, none).view(q.shape)

    def merge(self, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        out, lse = merge_runs([t.flatten(0, 1) for t in outs], [t.flatten(0, 1) for t in lses], outs[0].dtype)
        return out.view(outs[0].shape), lse.view(lses[0].shape)


def is_whole_block(size: int) -> bool:
    """Whether ``turn_kernel`` turns heads of this size: it has no masks. Attention on others is torch's too."""
    return size & (size - 1) == 0


def is_matvec(linear: Linear, x: Tensor) -> TypeGuard[DenseLinear]:
    """Whether ``matvec`` multiplies x by this matrix: a single vector, both of one 16-bit dtype. All else is torch's."""
    few = x.numel() // x.shape[-1] <= matvec.FASTER_VECTORS
    return few and isinstance(linear, DenseLinear) and linear.weight.dtype == x.dtype and x.dtype in matvec.HALVES


def is_blocks(linear: Linear, x: Tensor) -> TypeGuard[StoredLinear[blocks.BlockMatrix]]:
    """Whether ``blocks`` multiplies x by these matrices in single launches: a few vectors, all of it in blocks."""
    few = x.numel() // x.shape[-1] <= matvec.MOST_VECTORS
    return few and isinstance(linear, StoredLinear) and all(isinstance(part, blocks.BlockMatrix) for part in linear.parts)


def is_block(linear: Linear, x: Tensor) -> TypeGuard[StoredLinear[blocks.BlockMatrix]]:
    """The same, by one matrix."""
    return is_blocks(linear, x) and len(linear.parts) == 1


def _norm(x: Tensor, delta: Tensor, total: Tensor, weight: Tensor, eps: float, *, add: bool) -> Tensor:
    """``rms_norm_kernel`` on contiguous x and delta, to a new tensor. Without ``add`` delta and total are not touched."""
    width = x.shape[-1]
    assert weight.shape == (width,) and weight.is_contiguous() and weight.dtype == x.dtype, (weight.shape, weight.dtype)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(x.numel() // width,)](
        x, delta, weight, total, out, width, eps, BLOCK=block, ADD=add, num_warps=min(max(block // 512, 1), 16)
    )
    return out


def _turn(
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
