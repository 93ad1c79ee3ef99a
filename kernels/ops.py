"""What a layer computes around attention, in torch. Backends fuse it.

``Ops`` is chosen once, when a model is loaded; the model and the decode step call it and know no other form.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.kernels.interface import FullSlots
from skvq.kernels.linear import Linear


class Ops(Protocol):
    """Work of a layer. Inputs are never written, except ``full``; norms are root-mean-square norms over the last dimension,
    computed in float32 (arXiv 1910.07467).

    norm_linear:     ``linear`` of the norm of x.
    after_attention: ``y + down(silu(gate) * up)`` of ``y = x + output(attended)`` and ``gate, up = gate_up(norm of y)``.
    turn_to_slots:   RoPE on q [B, 1, H, D] and k [B, 1, KH, D] by cos and sin float32 [B, 1, 1, D/2], channels pairing as
                     (j, D/2 + j); k and v go to the full-precision slots ``ring_slots`` [B] of sequence slots ``slots`` [B];
                     the turned q is returned.
    turn_to_buffer:  RoPE on q [1, N, H, D] and k [1, N, KH, D] by cos and sin float32 [1, N, 1, D/2]; k and v go to tokens
                     ``first .. first+N-1`` of ``keys`` and ``values`` [KH, T, D] of their dtype; the turned q is returned.
    """

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor: ...

    def after_attention(
        self, x: Tensor, attended: Tensor, output: Linear, norm: Tensor, eps: float, gate_up: Linear, down: Linear
    ) -> Tensor: ...

    def turn_to_slots(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, full: FullSlots, slots: Tensor, ring_slots: Tensor
    ) -> Tensor: ...

    def turn_to_buffer(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> Tensor: ...


class TorchOps:
    """The specification, on any device; and the steps that it is made of, for backends to replace one by one.

    rms_norm:     the norm of x, times ``weight``.
    add_rms_norm: ``x + delta``, and its norm.
    swiglu:       ``silu(gate) * up`` of ``gate_up`` [..., 2 f], the gates first.
    """

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        return linear(self.rms_norm(x, norm, eps))

    def after_attention(
        self, x: Tensor, attended: Tensor, output: Linear, norm: Tensor, eps: float, gate_up: Linear, down: Linear
    ) -> Tensor:
        x, h = self.add_rms_norm(x, output(attended), norm, eps)
        return self.add(x, down(self.swiglu(gate_up(h))))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        return weight * y.to(x.dtype)

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        return x + delta

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, self.rms_norm(total, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def turn_to_slots(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, full: FullSlots, slots: Tensor, ring_slots: Tensor
    ) -> Tensor:
        full.keys[slots, :, ring_slots] = turn(k, cos, sin)[:, 0].to(full.keys.dtype)
        full.values[slots, :, ring_slots] = v[:, 0].to(full.values.dtype)
        return turn(q, cos, sin)

    def turn_to_buffer(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> Tensor:
        last = first + q.shape[1]
        keys[:, first:last] = turn(k, cos, sin)[0].transpose(0, 1)
        values[:, first:last] = v[0].transpose(0, 1)
        return turn(q, cos, sin)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` [B, N, heads, D] turned, in x's dtype."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def ops_for(backend: str) -> Ops:
    """The operations that go with a backend."""
    if backend == "numba":
        from skvq.kernels.numba_cpu.ops import NumbaOps

        return NumbaOps()
    if backend == "triton":
        from skvq.kernels.triton_gpu.fused import TritonOps

        return TritonOps()
    return TorchOps()
