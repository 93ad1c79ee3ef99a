"""What a backend has beside its attention unless it has better: a layer's other operations in torch, and no graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from skvq.kernels.experts import FEW_TOKENS, Experts, Stack, route
from skvq.kernels.graphs import CudaGraphs, Graphs
from skvq.kernels.interface import FullSlots, Ops, RopeFrequencies
from skvq.kernels.linear import Linear


class TorchOps:
    """The specification, on any device; and the steps that it is made of, for backends to replace one by one."""

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, linear: Linear) -> Tensor:
        return linear(self.rms_norm(x, norm, eps))

    def norm_heads(self, q: Tensor, k: Tensor, query_norm: Tensor, key_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self.rms_norm(q, query_norm, eps), self.rms_norm(k, key_norm, eps)

    def after_attention(
        self, x: Tensor, attended: Tensor, output: Linear, norm: Tensor, eps: float, gate_up: Linear, down: Linear
    ) -> Tensor:
        x, h = self.add_rms_norm(x, output(attended), norm, eps)
        return self.add(x, down(self.swiglu(gate_up(h))))

    def after_attention_experts(
        self, x: Tensor, attended: Tensor, output: Linear, norm: Tensor, eps: float, experts: Experts
    ) -> Tensor:
        x, h = self.add_rms_norm(x, output(attended), norm, eps)
        flat = h.flatten(0, 1)  # [B * N, d]
        ids, weights = route(experts.router(flat), experts.chosen, normed=experts.normed)
        mix = self.mix_few if x.shape[1] <= FEW_TOKENS else self.mix_many
        return self.add(x, mix(flat, ids, weights, experts).view(x.shape))

    def each(self, stack: Stack, x: Tensor, ids: Tensor) -> Tensor:
        """``out[p] = W_i x[p // (P / N)]``, [P, out], of x [N, in] and the expert ``i = ids[p]`` of ``stack``, ids int64 [P].

        Backends that capture steps replace it: here the host reads the ids.
        """
        share = len(ids) // len(x)
        return torch.cat([stack.of(expert)(x[pair // share, None]) for pair, expert in enumerate(ids.tolist())])

    def mix_few(self, h: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """What experts ``ids`` [N, k] make of h [N, d], times their ``weights`` float32 [N, k], added up."""
        inner = self.swiglu(self.each(experts.gate_up, h, ids.flatten()))  # [N k, f]
        outs = self.each(experts.down, inner, ids.flatten()).view(*ids.shape, -1)  # [N, k, d]
        return torch.bmm(weights.to(h.dtype)[:, None], outs)[:, 0]

    def mix_many(self, h: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """``mix_few`` of many tokens: one expert after another."""
        chosen, flat = ids.shape[1], ids.flatten()
        counts = flat.bincount(minlength=experts.count).tolist()
        out = torch.zeros(h.shape, dtype=torch.float32, device=h.device)
        for expert, pairs in enumerate(torch.split(flat.argsort(stable=True), counts)):
            if counts[expert]:
                rows = pairs // chosen
                found = experts.down.of(expert)(self.swiglu(experts.gate_up.of(expert)(h[rows])))
                out.index_add_(0, rows, found.float() * weights.flatten()[pairs][:, None])
        return out.to(h.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The norm of x, times ``weight``."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        return weight * y.to(x.dtype)

    def add(self, x: Tensor, delta: Tensor) -> Tensor:
        return x + delta

    def add_rms_norm(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``x + delta``, and its norm."""
        total = x + delta
        return total, self.rms_norm(total, weight, eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up`` of ``gate_up`` [..., 2 f], the gates first."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def rope_to_slots(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, full: FullSlots, slots: Tensor, ring_slots: Tensor
    ) -> Tensor:
        full.keys[slots, :, ring_slots] = apply_rope(k, cos, sin)[:, 0].to(full.keys.dtype)
        full.values[slots, :, ring_slots] = v[:, 0].to(full.values.dtype)
        return apply_rope(q, cos, sin)

    def rope_to_buffer(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> Tensor:
        last = first + q.shape[1]
        keys[:, first:last] = apply_rope(k, cos, sin)[0].transpose(0, 1)
        values[:, first:last] = v[0].transpose(0, 1)
        return apply_rope(q, cos, sin)

    def turn(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rope(q, cos, sin)

    def merge(self, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        total = torch.stack([*lses]).logsumexp(0)
        shares = [torch.exp(lse - total)[..., None] * out.float() for out, lse in zip(outs, lses, strict=True)]
        return torch.stack(shares).sum(0).to(outs[0].dtype), total


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of ``x`` [B, N, heads, D], in x's dtype."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def rope_turns(rope: RopeFrequencies, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [B, N], as ``apply_rope`` takes them, float32 [B, N, 1, D/2]; angles are float64."""
    angle = positions.to(torch.float64)[..., None, None] * rope.inv_freq
    return (angle.cos() * rope.scale).float(), (angle.sin() * rope.scale).float()


class Unfused:
    """To be inherited by backends: torch's operations, launched one by one. A backend for NVIDIA GPUs whose ``captures`` says
    True has CUDA graphs by that alone.
    """

    ops: Ops = TorchOps()

    def head_size_for(self, head_size: int) -> int:
        return head_size

    def captures(self, head_size: int) -> bool:
        return False

    def graphs(self, device: torch.device, max_packed: int) -> Graphs:
        return CudaGraphs(device, max_packed)
