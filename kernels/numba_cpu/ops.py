"""``interface.Ops`` on the CPU: float32 by fused kernels, other dtypes by torch."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from skvq.kernels.experts import DenseStack, Experts, Stack, StoredStack
from skvq.kernels.interface import FullSlots
from skvq.kernels.numba_cpu.attend import KINDS
from skvq.kernels.numba_cpu.each import multiply_each
from skvq.kernels.numba_cpu.entry import Entry
from skvq.kernels.numba_cpu.launch import here
from skvq.kernels.numba_cpu.numeric import FLOAT32
from skvq.kernels.numba_cpu.small import (
    ADD_FIELDS,
    MERGE_FIELDS,
    NORM_FIELDS,
    SWIGLU_FIELDS,
    TURN_FIELDS,
    build_add,
    build_merge,
    build_norm,
    build_swiglu,
    build_turn,
)
from skvq.kernels.ops import TorchOps

ADD, NORM = Entry(build_add, ADD_FIELDS), Entry(build_norm, NORM_FIELDS)
SWIGLU, TURN = Entry(build_swiglu, SWIGLU_FIELDS), Entry(build_turn, TURN_FIELDS)
MERGE = Entry(build_merge, MERGE_FIELDS)
TURNED_KINDS = KINDS | {torch.float32: FLOAT32}
"""Dtypes that keys and values are turned to: the cache's, and that of prefill's buffers."""
PARALLEL_NUMBERS = 1 << 15
"""Calls on fewer numbers run on one thread."""


class NumbaOps(TorchOps):
    """Kernels are compiled when first called, once per installation."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype != torch.float32:
            return super().rms_norm(x, weight, eps)
        return _norm(x.contiguous(), 0, 0, weight, eps)

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.numel() > PARALLEL_NUMBERS:
            return super().add(x, delta)
        x, delta = x.contiguous(), delta.contiguous()
        assert delta.dtype == torch.float32 and delta.shape == x.shape, (delta.dtype, delta.shape)
        total = torch.empty_like(x)
        ADD(1, x.data_ptr(), delta.data_ptr(), total.data_ptr(), x.numel())
        return total

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.float32:
            return super().add_rms_norm(x, delta, weight, eps)
        x, delta = x.contiguous(), delta.contiguous()
        assert delta.dtype == torch.float32 and delta.shape == x.shape, (delta.dtype, delta.shape)
        total = torch.empty_like(x)
        return total, _norm(x, delta.data_ptr(), total.data_ptr(), weight, eps)

    def each(self, stack: Stack, x: Tensor, ids: Tensor) -> Tensor:
        y = x.float().contiguous()
        if isinstance(stack, StoredStack):
            out = y.new_empty(len(ids), stack.outs)
            stack.matrix.multiply_each(y, ids, out)
        else:
            assert isinstance(stack, DenseStack)
            out = y.new_empty(len(ids), stack.weight.shape[1])
            multiply_each(stack.weight.flatten(0, 1), y, ids, out)
        return out.to(x.dtype)

    def mix_many(self, h: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        if here.tape is not None:
            raise RuntimeError(f"a step of {len(h)} tokens tells the host their experts: it cannot be recorded")
        return super().mix_many(h, ids, weights, experts)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype != torch.float32:
            return super().swiglu(gate_up)
        gate_up = gate_up.contiguous()
        *rest, both = gate_up.shape
        out = gate_up.new_empty((*rest, both // 2))
        rows, threads = _share(out.numel(), both // 2)
        SWIGLU(threads, 0, gate_up.data_ptr(), out.data_ptr(), rows, both // 2, -(-rows // (4 * threads)))
        return out

    def rope_to_slots(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, full: FullSlots, slots: Tensor, ring_slots: Tensor
    ) -> Tensor:
        if q.dtype != torch.float32:
            return super().rope_to_slots(q, k, v, cos, sin, full, slots, ring_slots)
        rows, queries, _, size = q.shape
        assert queries == 1 and k.shape == v.shape == (rows, 1, k.shape[2], size), (q.shape, k.shape, v.shape)
        assert slots.dtype == ring_slots.dtype == torch.int64 and slots.shape == ring_slots.shape == (rows,), slots.shape
        return _turn(q, k, v, cos, sin, slots, ring_slots, full.keys, full.values)

    def rope_to_buffer(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> Tensor:
        if q.dtype != torch.float32:
            return super().rope_to_buffer(q, k, v, cos, sin, keys, values, first)
        _, count, _, size = q.shape
        assert q.shape[0] == 1 and k.shape == v.shape == (1, count, len(keys), size), (q.shape, k.shape, v.shape)
        places = torch.arange(first, first + count)
        q, k, v, cos, sin = (t[0][:, None] for t in (q, k, v, cos, sin))  # [N, 1, ...]
        return _turn(q, k, v, cos, sin, places, places, keys[None], values[None]).transpose(0, 1)

    def turn(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if q.dtype != torch.float32:
            return super().turn(q, cos, sin)
        rows, cos, sin = (t.reshape(-1, 1, *t.shape[2:]) for t in (q, cos, sin))  # [B * N, 1, ...]
        none, nowhere = rows[:, :, :0], torch.empty(len(rows), dtype=torch.int64)  # keys, and where they would go
        return _turn(rows, none, none, cos, sin, nowhere, nowhere, none, none).view(q.shape)

    def merge(self, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        (out, *more), (lse, *more_lses) = outs, lses
        if out.dtype != torch.float32:
            return super().merge(outs, lses)
        for t in (*outs, *lses):
            assert t.is_contiguous() and t.shape[:3] == lse.shape and t.dtype == torch.float32, (t.shape, t.stride(), t.dtype)
        for part, part_lse in zip(more, more_lses, strict=True):
            MERGE(1, out.data_ptr(), lse.data_ptr(), part.data_ptr(), part_lse.data_ptr(), lse.numel(), out.shape[3])
        return out, lse


def _turn(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, places: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """RoPE of rows [R, 1, heads, D]: k and v go to keys and values [S, KH, T, D], at ``slots`` [R] (of one, whatever they say)
    and ``places`` [R]. Returns the turned q, new. cos and sin are [R, 1, 1, D / 2].
    """
    rows, _, heads, size = q.shape
    at, item = keys.stride(), keys.element_size()
    assert q.stride()[2:] == k.stride()[2:] == v.stride()[2:] == (size, 1), (q.stride(), k.stride(), v.stride())
    assert cos.shape == sin.shape == (rows, 1, 1, size // 2) and cos.is_contiguous() and sin.is_contiguous(), cos.shape
    assert at == values.stride() and at[3] == 1 and keys.dtype == values.dtype, (at, values.stride())
    out = torch.empty(q.shape, dtype=torch.float32)
    _, threads = _share(rows * (heads + 2 * k.shape[2]) * size, size)
    TURN(
        threads, 0, q.data_ptr(), 4 * q.stride(0), k.data_ptr(), 4 * k.stride(0), v.data_ptr(), 4 * v.stride(0), cos.data_ptr(),
        sin.data_ptr(), out.data_ptr(), rows, heads, k.shape[2], size, slots.data_ptr(), places.data_ptr(),
        keys.data_ptr(), values.data_ptr(), item * at[0] if len(keys) > 1 else 0, item * at[1], item * at[2],
        TURNED_KINDS[keys.dtype], -(-rows // (4 * threads)),
    )  # fmt: skip
    return out


def _norm(x: Tensor, delta: int, total: int, weight: Tensor, eps: float) -> Tensor:
    columns = x.shape[-1]
    assert weight.dtype == torch.float32 and weight.shape == (columns,) and weight.is_contiguous(), weight.shape
    out = torch.empty_like(x)
    rows, threads = _share(x.numel(), columns)
    (bits,) = struct.unpack("q", struct.pack("d", eps))
    chunk = -(-rows // (4 * threads))
    NORM(threads, 0, x.data_ptr(), delta, total, weight.data_ptr(), out.data_ptr(), rows, columns, chunk, bits)
    return out


def _share(numbers: int, columns: int) -> tuple[int, int]:
    """Rows, and threads to share them."""
    rows = numbers // columns
    return rows, min(torch.get_num_threads(), rows) if numbers > PARALLEL_NUMBERS else 1
