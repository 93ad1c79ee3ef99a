"""The fused small operations equal the torch ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skvq.kernels.interface import FullSlots
from skvq.kernels.numba_cpu.ops import NumbaOps
from skvq.kernels.ops import TorchOps

TORCH, NUMBA = TorchOps(), NumbaOps()
SHAPES = [(1, 1, 64), (3, 1, 577), (1, 300, 576), (5, 16)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(shape: tuple[int, ...]) -> None:
    x, delta, weight = 3 * random(*shape), random(*shape, seed=1), random(shape[-1], seed=2)
    kept = x.clone()
    close(NUMBA.rms_norm(x, weight, 1e-5), TORCH.rms_norm(x, weight, 1e-5))
    total, normed = NUMBA.add_rms_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    close(normed, TORCH.add_rms_norm(x, delta, weight, 1e-5)[1])
    assert torch.equal(x, kept)
    half = x.bfloat16()
    assert torch.equal(NUMBA.rms_norm(half, weight.bfloat16(), 1e-5), TORCH.rms_norm(half, weight.bfloat16(), 1e-5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(shape: tuple[int, ...]) -> None:
    gate_up = 4 * random(*shape[:-1], 2 * shape[-1])
    gate_up.view(-1)[:5] = torch.tensor([0.0, -200.0, 200.0, 88.0, -20.0])
    gate, up = gate_up.double().chunk(2, -1)
    torch.testing.assert_close(NUMBA.swiglu(gate_up).double(), gate * torch.sigmoid(gate) * up, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [64, 80, 128])
def test_rope_to_slots(dtype: torch.dtype, size: int) -> None:
    heads, kv_heads = 6, 2
    slots, ring_slots = torch.tensor([4, 0, 2]), torch.tensor([9, 260, 30])
    qkv = random(3, 1, heads + 2 * kv_heads, size) * (4 * random(3, 1, heads + 2 * kv_heads, size, seed=1)).exp()
    q, k, v = qkv[:, :, :heads], qkv[:, :, heads : heads + kv_heads], qkv[:, :, heads + kv_heads :]
    v[0, 0, 0, :6] = torch.tensor([1e9, torch.inf, -torch.inf, torch.nan, 1e-9, 65519.0])
    angle = random(3, 1, 1, size // 2, seed=2)
    full = [
        FullSlots(
            keys=torch.zeros(5, kv_heads, 261, size, dtype=dtype),
            values=torch.zeros(5, kv_heads, 261, size, dtype=dtype),
            positions=torch.zeros(5, 261, dtype=torch.int32),
        )
        for _ in range(2)
    ]
    got, want = (
        ops.rope_to_slots(q, k, v, angle.cos(), angle.sin(), target, slots, ring_slots)
        for ops, target in zip((NUMBA, TORCH), full, strict=True)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * float(q.abs().max()))
    assert torch.equal(full[0].values.float().nan_to_num(7), full[1].values.float().nan_to_num(7))
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(full[0].keys.float(), full[1].keys.float(), rtol=2 * step, atol=1e-6 * float(k.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_rope_to_buffer(dtype: torch.dtype, count: int) -> None:
    """Of a part of the heads too, as exact prefill by groups has it; nothing but these tokens is written."""
    heads, kv_heads, size = 6, 2, 80
    q, k, v = random(1, count, heads + 2 * kv_heads, size).to(dtype).split([heads, kv_heads, kv_heads], 2)
    angle = random(1, count, 1, size // 2, seed=2)
    for part in (slice(None), slice(0, 1)):
        own = slice(None) if part == slice(None) else slice(0, heads // kv_heads)
        buffers = [torch.full((2, len(range(kv_heads)[part]), count + 9, size), 7.0, dtype=dtype) for _ in range(2)]
        got, want = (
            ops.rope_to_buffer(q[:, :, own], k[:, :, part], v[:, :, part], angle.cos(), angle.sin(), *held, 5)
            for ops, held in zip((NUMBA, TORCH), buffers, strict=True)
        )
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=4 * step, atol=2e-6)
        torch.testing.assert_close(buffers[0], buffers[1], rtol=4 * step, atol=2e-6)
        assert torch.equal(buffers[0][1], buffers[1][1]) and (buffers[0][:, :, :5] == 7).all()
        assert (buffers[0][:, :, 5 + count :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_turning_queries_alone(dtype: torch.dtype) -> None:
    q, angle = random(2, 3, 6, 80).to(dtype), random(2, 3, 1, 40, seed=2)
    torch.testing.assert_close(
        NUMBA.turn(q, angle.cos(), angle.sin()), TORCH.turn(q, angle.cos(), angle.sin()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_partial_softmaxes(dtype: torch.dtype) -> None:
    """Far apart, alike, and of tokens that nobody sees."""
    outs = [random(2, 3, 6, 80, seed=seed).to(dtype) for seed in range(3)]
    lses = [4 * random(2, 3, 6, seed=seed) for seed in range(3, 6)]
    lses[1][0, 0] = lses[0][0, 0]
    lses[1][1, 0], lses[2][1] = 200.0, -torch.inf
    lses[0][0, 1], outs[2][1] = -300.0, 0.0
    want = TORCH.merge(outs, lses)
    weights = torch.stack(lses).double().softmax(0)[..., None]
    exact = (torch.stack(outs).double() * weights).sum(0)
    got = NUMBA.merge([t.clone() for t in outs], [t.clone() for t in lses])
    for out, lse in (got, want):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=2 * torch.finfo(dtype).eps)
        torch.testing.assert_close(lse.double(), torch.stack(lses).double().logsumexp(0), rtol=1e-6, atol=1e-6)
