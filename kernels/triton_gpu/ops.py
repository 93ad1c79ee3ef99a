# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, misc"
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
from torch import Tensor

from skvq.kernels.dense import merge_runs
from skvq.kernels.experts import Experts
from skvq.kernels.interface import FullSlots
from skvq.kernels.linear import DenseLinear, Linear, StoredLinear
from skvq.kernels.ops import TorchOps
from skvq.kernels.triton_gpu import blocks, matvec
from skvq.kernels.triton_gpu.experts import each_linear, each_swiglu, is_each, most_pairs, route
from skvq.kernels.triton_gpu.grouped import mlps
from skvq.kernels.triton_gpu.overlap import overlapping, overlaps
from skvq.kernels.triton_gpu.small import norm_heads_kernel, norm_rows, swiglu_kernel, turn_heads


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
        return norm_rows(x, x, x, weight, eps, add=False)

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert delta.shape == x.shape and delta.dtype == x.dtype, (delta.shape, x.shape, delta.dtype, x.dtype)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return total, norm_rows(x.contiguous(), delta.contiguous(), total, weight, eps, add=True)

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
        return turn_heads(q, k, v, cos, sin, slots, ring_slots, keys, values)

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
        return turn_heads(q, k, v, cos, sin, at, at, keys[None], values[None]).transpose(0, 1)

    def turn(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not is_whole_block(q.shape[3]):
            return super().turn(q, cos, sin)
        rows, cos, sin = (t.reshape(-1, 1, *t.shape[2:]) for t in (q, cos, sin))  # [B * N, 1, ...]
        none, nowhere = rows[:, :, :0], torch.empty(len(rows), dtype=torch.int64, device=q.device)  # keys, and their places
        return turn_heads(rows, none, none, cos, sin, nowhere, nowhere, none, none).view(q.shape)

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
